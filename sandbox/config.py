"""What can be set about a sandbox, with the values a newcomer should meet."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

Pictures = Literal["painted", "plain"]


def _default_secret() -> str:
    """Return the same secret at every start, so that a client may keep it."""
    digest = hashlib.sha256(b"sandbox webhook secret").digest()[:24]
    return "whsec_" + base64.b64encode(digest).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxConfig:
    """Settings of one sandbox; every default is what Replicate documents.

    ``token`` None accepts any non-empty token.  ``speed`` divides queue and run times; 0 means
    that predictions finish at once.  A limit of 0 is no limit.  ``retention`` is counted from
    creation.  ``webhook_window`` is the time over which a terminal webhook is tried again.
    """

    public_url: str | None = None
    token: str | None = None
    speed: float = 1.0
    pictures: Pictures = "painted"
    creates_per_minute: int = 600
    requests_per_minute: int = 3000
    burst: int | None = None
    retention: timedelta = timedelta(hours=1)
    forget_after: timedelta = timedelta(hours=1)
    files_retention: timedelta = timedelta(hours=24)
    webhook_secret: str = _default_secret()
    webhook_window: timedelta = timedelta(minutes=1)
    echo_webhook: bool = False
    cache_bytes: int = 64 * 1024 * 1024
    files_bytes: int = 512 * 1024 * 1024
