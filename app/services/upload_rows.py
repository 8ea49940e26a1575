"""Verbs on the rows of uploads, on the caller's connection, never committing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Interval,
    Row,
    Uuid,
    bindparam,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.services.job_records import UPLOADS


@dataclass(frozen=True, slots=True)
class Upload:
    """A picture somebody gave us.  `key` is its place in the store."""

    id: UUID
    owner: str
    key: str
    sha256: str
    content_type: str
    size_bytes: int
    width: int
    height: int
    created_at: datetime
    used_at: datetime


@dataclass(frozen=True, slots=True)
class NewUpload:
    """A picture that is in the store and belongs to an owner from now on."""

    id: UUID
    owner: str
    key: str
    sha256: str
    content_type: str
    size_bytes: int
    width: int
    height: int


_ids = func.any(bindparam("ids", type_=ARRAY(Uuid(), dimensions=1)))
_NEW = ("id", "owner", "key", "sha256", "content_type", "size_bytes", "width", "height")
_RECORD = (
    insert(UPLOADS)
    .values(
        {name: bindparam(name) for name in _NEW}
        | {"created_at": func.now(), "used_at": func.now()}
    )
    .on_conflict_do_update(
        index_elements=[UPLOADS.c.owner, UPLOADS.c.key], set_={"used_at": func.now()}
    )
    .returning(UPLOADS)
)
_USE = (
    update(UPLOADS)
    .where(UPLOADS.c.id == _ids, UPLOADS.c.owner == bindparam("of_owner"))
    .values(used_at=func.now())
    .returning(UPLOADS)
)
_unused = (
    select(UPLOADS.c.id)
    .where(UPLOADS.c.used_at < func.now() - bindparam("age", type_=Interval()))
    .order_by(UPLOADS.c.used_at)
    .limit(bindparam("most"))
    # One that is being used is left alone, and seen again in the next round.
    .with_for_update(skip_locked=True)
)
_FORGET_UNUSED = (
    delete(UPLOADS).where(UPLOADS.c.id.in_(_unused)).returning(UPLOADS.c.key)
)


async def record(conn: AsyncConnection, new: NewUpload) -> Upload:
    """Note the upload, or that the owner has brought the same bytes again: then the old one.

    The caller holds the file's lock shared until the commit.  Safe to repeat.
    """
    values = {name: getattr(new, name) for name in _NEW}
    return _read((await conn.execute(_RECORD, values)).one())


async def find(conn: AsyncConnection, upload_id: UUID) -> Upload | None:
    """Read one upload, whoever's it is."""
    query = select(UPLOADS).where(UPLOADS.c.id == upload_id)
    row = (await conn.execute(query)).one_or_none()
    return None if row is None else _read(row)


async def use(
    conn: AsyncConnection, owner: str, ids: Sequence[UUID]
) -> dict[UUID, Upload]:
    """Read those of the uploads that are the owner's, and note that they were needed now."""
    # In one order, so that two jobs with the same pictures do not wait for each other in turn.
    values = {"ids": sorted(set(ids)), "of_owner": owner}
    return {row.id: _read(row) for row in await conn.execute(_USE, values)}


async def forget(conn: AsyncConnection, upload_id: UUID) -> None:
    """Remove the row, if it is there; its file is `orphans_among`'s."""
    await conn.execute(delete(UPLOADS).where(UPLOADS.c.id == upload_id))


async def forget_unused(
    conn: AsyncConnection, *, age: timedelta, limit: int
) -> list[str]:
    """Remove rows of uploads nobody needed for so long; name their files."""
    found = await conn.execute(_FORGET_UNUSED, {"age": age, "most": limit})
    return list(found.scalars())


def _read(row: Row[Any]) -> Upload:
    return Upload(**row._mapping)
