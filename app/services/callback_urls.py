"""Where the provider's webhooks come in: for whoever asks for them and whoever takes them.

The token is in the query, not in the path: our own logs keep paths and blank queries, and
problem documents repeat the path.  Replicate keeps a webhook's query as it is
(api.replicate.com/openapi.json, 2026-03).
"""

from __future__ import annotations

import re
from uuid import UUID

CALLBACK_PATH = "/callbacks/replicate/{attempt_id}"  # below the prefix of the JSON API
TOKEN = "token"

_ATTEMPT = re.compile(r"/callbacks/replicate/([0-9a-f-]{36})\?token=")


def callback_url(base_url: str, attempt_id: UUID, token: str) -> str:
    """Compose the address the provider is to call about an attempt.

    `base_url` is that of the JSON API as the provider sees it, prefix included.  `token` is
    the attempt's, and of characters that need no escaping.
    """
    return f"{base_url}{CALLBACK_PATH.format(attempt_id=attempt_id)}?{TOKEN}={token}"


def attempt_of(url: str) -> UUID | None:
    """Name the attempt an address was composed for; None for an address of another kind."""
    match = _ATTEMPT.search(url)
    if match is None:
        return None
    try:
        return UUID(match[1])
    except ValueError:
        return None
