"""Signed files that were about to be stored: what is noted of them, and forgotten.

No second signature gives the same bytes, so whoever dies between storing one and recording it
leaves a file that no other put finds again.  See `models/job.py:Stray`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import ARRAY, Interval, Text, bindparam, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.services.job_records import STRAYS

_noting = insert(STRAYS).values(key=bindparam("key"))
_NOTE = _noting.on_conflict_do_update(
    index_elements=[STRAYS.c.key], set_={"noted_at": func.now()}
)
_OLDER = (
    select(STRAYS.c.key)
    .where(STRAYS.c.noted_at < func.now() - bindparam("age", type_=Interval()))
    .order_by(STRAYS.c.noted_at)
    .limit(bindparam("most"))
)
_FORGET = delete(STRAYS).where(
    STRAYS.c.key == func.any(bindparam("keys", type_=ARRAY(Text(), dimensions=1)))
)


async def note(conn: AsyncConnection, key: str) -> None:
    """Note that a file of this key is about to be stored.  Does not commit."""
    await conn.execute(_NOTE, {"key": key})


async def older(conn: AsyncConnection, *, age: timedelta, limit: int) -> list[str]:
    """Name what was noted so long ago, the oldest first."""
    found = await conn.execute(_OLDER, {"age": age, "most": limit})
    return list(found.scalars())


async def forget(conn: AsyncConnection, keys: Sequence[str]) -> None:
    """Take the notes away: whose the files are is known by now.  Does not commit."""
    await conn.execute(_FORGET, {"keys": list(keys)})
