"""What is kept for a while only: the watcher's duty to forget it in time."""

from __future__ import annotations

from datetime import timedelta

from app.services import repeats
from app.services.ledger import Ledger

AT_ONCE = 500  # rows; short transactions, however many there are
REST = timedelta(minutes=10)


class ForgetSubmissions:
    """Removes Idempotency-Keys that count no more."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def perform(self) -> timedelta:
        """Remove some; come back at once while there are more."""
        async with self._ledger.transaction() as conn:
            removed = await repeats.forget(conn, limit=AT_ONCE)
        return timedelta(0) if removed == AT_ONCE else REST
