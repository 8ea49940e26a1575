"""The books of a database, compared with its jobs and with themselves."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain.admission import SERVICE
from app.services.accounts import ACCOUNTS, ENTRIES

# What entries, and jobs, say about an account.
_OF_ENTRIES = """
    SELECT coalesce(sum(amount_usd) FILTER (WHERE kind IN ('reserve', 'release')), 0) AS reserved,
           coalesce(sum(amount_usd) FILTER (WHERE kind = 'charge'), 0) AS spent,
           coalesce(sum(amount_usd) FILTER (WHERE day = :day), 0) AS day,
           coalesce(sum(amount_usd) FILTER (WHERE date_trunc('month', day) = :month), 0) AS month
    FROM ledger_entries WHERE CAST(:key AS text) IS NULL OR CAST(key_id AS text) = :key
"""
_OF_JOBS = """
    SELECT count(*) FILTER (WHERE completed_at IS NULL) AS live,
           coalesce(sum(reserved_usd) FILTER (WHERE completed_at IS NULL), 0) AS reserved
    FROM jobs WHERE (CAST(:key AS text) IS NULL OR CAST(key_id AS text) = :key)
      AND (CAST(:key AS text) IS NOT NULL OR reserved_usd IS NOT NULL)
"""


async def account(engine: AsyncEngine, name: str = SERVICE) -> Any:
    """Read an account's row; None when nothing was ever booked."""
    async with engine.connect() as conn:
        query = select(ACCOUNTS).where(ACCOUNTS.c.name == name)
        return (await conn.execute(query)).one_or_none()


async def total(engine: AsyncEngine, *kinds: str) -> Decimal:
    """Sum the entries of some kinds."""
    async with engine.connect() as conn:
        query = select(func.sum(ENTRIES.c.amount_usd)).where(ENTRIES.c.kind.in_(kinds))
        return await conn.scalar(query) or Decimal(0)


async def check_books(engine: AsyncEngine) -> None:
    """Fail unless every account says what its entries say, and what its live jobs hold."""
    async with engine.connect() as conn:
        for row in (await conn.execute(select(ACCOUNTS))).all():
            key = None if row.name == SERVICE else row.name.removeprefix("key:")
            values = {"key": key, "day": row.day, "month": row.month}
            said = (await conn.execute(text(_OF_ENTRIES), values)).one()
            held = (await conn.execute(text(_OF_JOBS), {"key": key})).one()
            assert (row.reserved_usd, row.spent_usd) == (said.reserved, said.spent)
            assert (row.day_usd, row.month_usd) == (said.day, said.month), row
            assert (row.live, row.reserved_usd) == (held.live, held.reserved), row
