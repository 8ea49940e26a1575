"""A notification as it goes over the wire: its body, and the signatures over these bytes.

Standard Webhooks 1.0: `webhook-id` is the same with every try, `webhook-timestamp` is the
try's, and `webhook-signature` has one signature for each secret that counts.  Links are made
here and not when the notification is written: those to private pictures end.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from standardwebhooks import Webhook

from app.core.signing import PREFIX, signing_key
from app.services.media_links import MediaLinks
from app.services.notifications import Dispatch

LONGEST_BODY: Final = 20_000  # bytes
_OF_AN_OWNER: Final = b"mediagen: webhooks of an owner\n"


class OwnerSecrets:
    """The secrets that sign what goes to the `webhook_url` of an owner's jobs.

    Derived from the keys that sign links, so that there is nothing to store: with a new key
    before an old one both sign, until the old one is dropped.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)

    def of(self, owner: str) -> tuple[str, ...]:
        """Give the owner's secrets; the first one is the one to use."""
        message = _OF_AN_OWNER + owner.encode()
        derived = (hmac.digest(key, message, "sha256") for key in self._keys)
        return tuple(PREFIX + base64.b64encode(one).decode() for one in derived)


@dataclass(frozen=True, slots=True)
class Letter:
    """What is sent: exactly these bytes, with these headers."""

    body: bytes
    headers: Mapping[str, str]


class Letters:
    """Writes notifications out.  One per process."""

    def __init__(self, links: MediaLinks, secrets: OwnerSecrets, prefix: str) -> None:
        """`prefix` is that of the JSON API, for the links to it."""
        self._links = links
        self._secrets = secrets
        self._prefix = prefix

    def write(self, dispatch: Dispatch, now: datetime) -> Letter:
        """Write a notification, to be sent now."""
        body = self._body(dispatch)
        secrets = dispatch.secrets or self._secrets.of(dispatch.owner)
        return Letter(
            body,
            {
                "Content-Type": "application/json",
                "webhook-id": dispatch.webhook_id,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": " ".join(
                    _sign(secret, dispatch.webhook_id, now, body) for secret in secrets
                ),
            },
        )

    def _body(self, dispatch: Dispatch) -> bytes:
        data = dict(dispatch.data)
        if "job_id" in data:
            data = self._with_links(data)
        told = {
            "type": dispatch.type,
            "timestamp": dispatch.created_at.astimezone(UTC),
            "data": data,
        }
        body = _written(told)
        if len(body) > LONGEST_BODY and data.get("metadata"):
            # Receivers put a limit to what they take; the job itself has all of it.
            data |= {"metadata": {}, "metadata_omitted": True}
            body = _written(told | {"data": data})
        return body

    def _with_links(self, data: dict[str, Any]) -> dict[str, Any]:
        addresses = self._links.now()
        is_public = data["visibility"] == "public"
        api = addresses.base + self._prefix
        outputs = [
            {name: value for name, value in output.items() if name != "key"}
            | {"url": addresses.url(output["key"], is_public=is_public)}
            for output in data["outputs"]
        ]
        links = {
            "status": f"{api}/status/{data['job_id']}",
            "events": f"{api}/jobs/{data['job_id']}/events",
        }
        return data | {"outputs": outputs, "links": links}


def _written(told: Mapping[str, Any]) -> bytes:
    return orjson.dumps(told, option=orjson.OPT_UTC_Z)


def _sign(secret: str, webhook_id: str, now: datetime, body: bytes) -> str:
    signature: str = Webhook(signing_key(secret)).sign(webhook_id, now, body.decode())
    return signature
