"""What is thrown away when nobody needs it any more: duties of the leading watcher."""

from __future__ import annotations

from datetime import timedelta

from app.services import repeats, strays
from app.services.ledger import Ledger
from app.services.media_store import MediaStore
from app.services.uploads import Uploads

STRAYS_AT_ONCE = 50
STRAY_AGE = timedelta(hours=1)  # long after whoever stored it has recorded it
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


class RemoveStrays:
    """Removes signed files that were stored and never recorded.  A watcher's duty."""

    def __init__(self, ledger: Ledger, store: MediaStore) -> None:
        self._ledger = ledger
        self._store = store

    async def perform(self) -> timedelta:
        """Look at some; say how long to rest."""
        async with self._ledger.reading() as conn:
            keys = await strays.older(conn, age=STRAY_AGE, limit=STRAYS_AT_ONCE)
        async with self._ledger.removing(keys) as orphans:
            await self._store.delete(orphans)
        if keys:
            async with self._ledger.transaction() as conn:
                await strays.forget(conn, keys)
        return REST_BETWEEN_BATCHES if len(keys) == STRAYS_AT_ONCE else REST


class ForgetSubmissions:
    """Removes Idempotency-Keys that count no more.  A watcher's duty."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def perform(self) -> timedelta:
        """Remove some; say how long to rest."""
        async with self._ledger.transaction() as conn:
            removed = await repeats.forget(conn, limit=KEYS_AT_ONCE)
        return REST_BETWEEN_BATCHES if removed == KEYS_AT_ONCE else REST
