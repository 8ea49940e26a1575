"""Webhooks as the provider sends them, and how to spoil one."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from app.services.job_records import Claim
from sandbox.webhooks import sign

SECRET = "whsec_" + base64.b64encode(b"of the provider, 24 byte").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"of somebody else 24 byte").decode()


def prediction(handle: str, status: str = "succeeded", **more: Any) -> bytes:
    """Write the body of a webhook."""
    return json.dumps({"id": handle, "status": status, **more}).encode()


@dataclass(frozen=True, slots=True)
class Letter:
    """One webhook, not signed yet.  Headers given as None are left out."""

    attempt_id: str
    token: str
    body: bytes
    id: str = field(default_factory=lambda: f"msg_{uuid4().hex}")
    at: float = field(default_factory=time.time)
    secret: str = SECRET
    headers: Mapping[str, str | bytes | None] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"/api/v1/callbacks/replicate/{self.attempt_id}"

    @property
    def signature(self) -> str:
        return sign(self.secret, self.id, int(self.at), self.body)

    def signed(self) -> dict[str, str | bytes]:
        """Give the headers it goes out with."""
        headers: dict[str, str | bytes | None] = {
            "content-type": "application/json",
            "webhook-id": self.id,
            "webhook-timestamp": str(int(self.at)),
            "webhook-signature": self.signature,
            **self.headers,
        }
        return {name: value for name, value in headers.items() if value is not None}

    def but(self, **changes: Any) -> Letter:
        """Give the same letter, changed."""
        return replace(self, **changes)

    def tampered(self, body: bytes) -> Letter:
        """Give a letter with another body under the signature of this one."""
        return self.but(body=body, headers={"webhook-signature": self.signature})


def letter_to(claim: Claim, handle: str, status: str = "succeeded") -> Letter:
    """Write about the attempt of a claim."""
    assert claim.attempt_id is not None and claim.attempt_token is not None
    return Letter(
        str(claim.attempt_id), claim.attempt_token, prediction(handle, status)
    )
