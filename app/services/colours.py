"""The colours of stored pictures: what stands in for them until they are loaded.

No part of a job's version: whoever reads a job sees the colour once it is known.
"""

from __future__ import annotations

from sqlalchemy import bindparam, exists, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.services.job_records import ASSETS

_colourless = (ASSETS.c.key == bindparam("file"), ASSETS.c.colour.is_(None))
_twin = ASSETS.alias("twin")
_known = (
    select(_twin.c.colour)
    .where(_twin.c.key == bindparam("file"), _twin.c.colour.is_not(None))
    .limit(1)
)
_WRITE = update(ASSETS).where(*_colourless).values(colour=bindparam("found"))
_INHERIT = (
    update(ASSETS).where(*_colourless).values(colour=_known.scalar_subquery())
).where(exists(_known))
_IS_MISSING = select(exists(select(ASSETS.c.key).where(*_colourless)))


async def write(conn: AsyncConnection, key: str, colour: str) -> None:
    """Note the colour of a file with every output that has it.  Safe to repeat."""
    await conn.execute(_WRITE, {"file": key, "found": colour})


async def inherit(conn: AsyncConnection, key: str) -> bool:
    """Take over what is known of the same file; tell whether all its outputs know it now."""
    await conn.execute(_INHERIT, {"file": key})
    return not await conn.scalar(_IS_MISSING, {"file": key})
