"""What is thrown away when nobody needs it any more: duties of the leading watcher."""

from __future__ import annotations

from datetime import timedelta

from app.services import notifications, repeats
from app.services.ledger import Ledger
from app.services.uploads import Uploads

KEYS_AT_ONCE = 500  # rows; short transactions, however many there are
REST = timedelta(minutes=10)
REST_BETWEEN_BATCHES = timedelta(seconds=1)


class RemoveUnusedUploads:
    """Removes uploads that no job has named for a week.  A watcher's duty."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    async def perform(self) -> timedelta:
        """Remove some; say how long to rest."""
        has_more = await self._uploads.remove_unused()
        return REST_BETWEEN_BATCHES if has_more else REST


class ForgetSubmissions:
    """Removes Idempotency-Keys that count no more.  A watcher's duty."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def perform(self) -> timedelta:
        """Remove some; say how long to rest."""
        async with self._ledger.transaction() as conn:
            removed = await repeats.forget(conn, limit=KEYS_AT_ONCE)
        return REST_BETWEEN_BATCHES if removed == KEYS_AT_ONCE else REST


class ForgetNotifications:
    """Removes webhooks that ended a month ago, and the tries to deliver them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def perform(self) -> timedelta:
        """Remove some; say how long to rest."""
        async with self._ledger.transaction() as conn:
            removed = await notifications.forget(conn, limit=KEYS_AT_ONCE)
        return REST_BETWEEN_BATCHES if removed == KEYS_AT_ONCE else REST
