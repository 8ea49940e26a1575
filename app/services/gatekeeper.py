"""Who a key belongs to: from the secret in a request to a caller."""

from __future__ import annotations

import hashlib
import hmac

from app.domain.access import ANYBODY, Caller
from app.domain.errors import Unauthorized
from app.services.attempts import FailedAttempts

CONFIGURED = Caller(name="ADMIN_API_KEY")


class Gatekeeper:
    """Identifies callers.  Safe to share within one event loop."""

    def __init__(
        self, *, demands_keys: bool, admin_key: str | None, attempts: FailedAttempts
    ) -> None:
        self._demands_keys = demands_keys
        self._attempts = attempts
        self._admin_hash = digest(admin_key) if admin_key else None

    async def identify(self, secret: str | None, address: str) -> Caller:
        """Say who calls from the address; raise `Unauthorized`, `OverLimit`."""
        if not self._demands_keys:
            return ANYBODY
        if secret is None:
            raise Unauthorized("Send an API key: Authorization: Bearer mgs_…")
        found = digest(secret)
        if self._admin_hash and hmac.compare_digest(found, self._admin_hash):
            return CONFIGURED
        self._attempts.let_try(address, found)
        # The place to look it up, and to return whom it belongs to.
        await self._attempts.note_failure(address, found)
        raise Unauthorized("The API key is unknown, expired or revoked.")


def digest(secret: str) -> bytes:
    """Hash a key, as it is stored: random keys of 256 bits need no salt and no stretching."""
    return hashlib.sha256(secret.encode()).digest()
