"""Whose a stored file is: equal bytes are one file, so it may be many owners'."""

from __future__ import annotations

from sqlalchemy import bindparam, exists, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.services.job_records import ASSETS, JOBS, UPLOADS

_jobs_with_it = (
    select(JOBS.c.id)
    .join(ASSETS, ASSETS.c.job_id == JOBS.c.id)
    .where(ASSETS.c.key == bindparam("key"))
)
_uploads_of_it = select(UPLOADS.c.id).where(UPLOADS.c.key == bindparam("key"))
_IS_PUBLIC = select(exists(_jobs_with_it.where(JOBS.c.is_public)))
_IS_OWNED = select(
    exists(_jobs_with_it.where(JOBS.c.owner == bindparam("owner")))
    | exists(_uploads_of_it.where(UPLOADS.c.owner == bindparam("owner")))
)


async def is_public(conn: AsyncConnection, key: str) -> bool:
    """Tell whether anybody may have the file: a public job made it."""
    return bool(await conn.scalar(_IS_PUBLIC, {"key": key}))


async def is_owned(conn: AsyncConnection, key: str, *, owner: str) -> bool:
    """Tell whether a job or an upload of the owner has the file."""
    return bool(await conn.scalar(_IS_OWNED, {"key": key, "owner": owner}))
