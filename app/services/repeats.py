"""Requests that must not make a second job: decided by the primary key of `submissions`.

A request is *once* when it has an Idempotency-Key, or when an SDK marks its tries.  While its
first one is being accepted it holds an advisory lock, so that the next one is told so instead
of waiting behind it; first tries of an SDK make a job each, and hold it together.  What is
accepted stands in the table, where a second row of the same key cannot be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Interval,
    Text,
    and_,
    bindparam,
    case,
    column,
    delete,
    func,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import arrays, unnest
from app.domain.errors import KeyReused
from app.models import account as tables
from app.services.job_records import table_of

SUBMISSIONS = table_of(tables.Submission)

KEPT = timedelta(hours=24)  # an Idempotency-Key is remembered that long, at least
JOINED = timedelta(minutes=15)  # an SDK's last try comes within its own timeouts


class Kind(Enum):
    """What an earlier request of the same key means."""

    KEYED = "keyed"  # an Idempotency-Key: the same job, or an error
    FIRST = "first"  # an SDK's first try: a new job, which later tries join
    LATER = "later"  # an SDK's later try: the job of the earlier one, if there was one


@dataclass(frozen=True, slots=True)
class Once:
    """What makes a request once: `key` within its owner, `fingerprint` of what is asked."""

    key: str
    fingerprint: str
    kind: Kind = Kind.KEYED


@dataclass(frozen=True, slots=True)
class Earlier:
    """The job an earlier request of the same key made, and how long ago."""

    job_id: UUID
    fingerprint: str
    created_at: datetime
    age: timedelta = timedelta(0)


def heed(once: Once, earlier: Earlier) -> Earlier | KeyReused | None:
    """Say what an earlier request means for this one: None when it does not count."""
    match once.kind:
        case Kind.FIRST:
            return None
        case Kind.LATER if earlier.age > JOINED:
            return None
        case Kind.LATER | Kind.KEYED if earlier.fingerprint == once.fingerprint:
            return earlier
        case _:
            return KeyReused(
                "This Idempotency-Key was sent before, with another request."
            )


class Overtaken(Exception):
    """Somebody else recorded the same key first; nothing of ours may be committed."""


Place = tuple[str, str]  # owner and key

_places = unnest(SUBMISSIONS, ("owner", "key"), alias="place")
_age = func.now() - SUBMISSIONS.c.created_at
_FIND = select(SUBMISSIONS, type_coerce(_age, Interval()).label("age")).join(
    _places,
    and_(
        SUBMISSIONS.c.owner == _places.c.owner,
        SUBMISSIONS.c.key == _places.c.key,
    ),
)
_asked = (
    func.unnest(
        bindparam("numbers", type_=ARRAY(BigInteger(), dimensions=1)),
        bindparam("are_shared", type_=ARRAY(Boolean(), dimensions=1)),
    )
    .table_valued(column("number", BigInteger), column("is_shared", Boolean))
    .render_derived()
)
_TRY_LOCK = select(
    _asked.c.number,
    case(
        (_asked.c.is_shared, func.pg_try_advisory_xact_lock_shared(_asked.c.number)),
        else_=func.pg_try_advisory_xact_lock(_asked.c.number),
    ).label("is_held"),
)
_COLUMNS = ("owner", "key", "fingerprint", "job_id", "created_at")
_rows = unnest(SUBMISSIONS, _COLUMNS, alias="row")
_new = upsert(SUBMISSIONS).from_select(
    list(_COLUMNS),
    select(_rows).order_by(_rows.c.owner, _rows.c.key),
    include_defaults=False,
)
_RECORD = _new.on_conflict_do_update(
    index_elements=[SUBMISSIONS.c.owner, SUBMISSIONS.c.key],
    set_={
        "fingerprint": _new.excluded.fingerprint,
        "job_id": _new.excluded.job_id,
        "created_at": _new.excluded.created_at,
    },
    # A key that still counts is nobody's to take: its row is left, and missed in the answer.
    where=or_(
        _new.excluded.key == func.any(bindparam("free", type_=ARRAY(Text()))),
        _age > bindparam("kept", type_=Interval()),
    ),
).returning(SUBMISSIONS.c.key)
_old = (
    select(SUBMISSIONS.c.owner, SUBMISSIONS.c.key)
    .where(SUBMISSIONS.c.created_at < func.now() - bindparam("kept", type_=Interval()))
    .order_by(SUBMISSIONS.c.created_at)
    .limit(bindparam("limit"))
    # One that is used again at this moment would be old no more, and deleted all the same.
    .with_for_update(skip_locked=True)
    .cte("old")
)
_FORGET = delete(SUBMISSIONS).where(
    SUBMISSIONS.c.owner == _old.c.owner, SUBMISSIONS.c.key == _old.c.key
)


async def hold(
    conn: AsyncConnection, wanted: Collection[tuple[Place, Kind]]
) -> set[Place]:
    """Lock the keys until the transaction ends; give those that are to be had now.

    First tries have a key together, for each makes a job; all others have it alone.
    """
    alone = {place for place, kind in wanted if kind is not Kind.FIRST}
    numbers = {_number(place): place for place, _ in wanted}
    values = {
        "numbers": sorted(numbers),
        "are_shared": [numbers[number] not in alone for number in sorted(numbers)],
    }
    rows = await conn.execute(_TRY_LOCK, values)
    return {numbers[row.number] for row in rows if row.is_held}


async def find(
    conn: AsyncConnection, places: Collection[Place]
) -> Mapping[Place, Earlier]:
    """Read what was made by earlier requests of these keys, as long as it counts."""
    rows = [{"owner": owner, "key": key} for owner, key in places]
    values = arrays(rows, ("owner", "key"), alias="place")
    return {
        (row.owner, row.key): Earlier(
            row.job_id, row.fingerprint, row.created_at, row.age
        )
        for row in await conn.execute(_FIND, values)
        if row.age <= KEPT
    }


async def record(
    conn: AsyncConnection,
    made: Sequence[tuple[Place, Once, UUID]],
    now: datetime,
) -> None:
    """Write down which job each request made; raise `Overtaken` when a key has one already."""
    latest = {place: (once, job_id) for place, once, job_id in made}
    rows = [
        {
            "owner": owner,
            "key": key,
            "fingerprint": once.fingerprint,
            "job_id": job_id,
            "created_at": now,
        }
        for (owner, key), (once, job_id) in latest.items()
    ]
    free = [once.key for once, _ in latest.values() if once.kind is not Kind.KEYED]
    values = arrays(rows, _COLUMNS, alias="row") | {"free": free, "kept": KEPT}
    written = (await conn.execute(_RECORD, values)).all()
    if len(written) < len(rows):
        raise Overtaken


async def forget(conn: AsyncConnection, *, limit: int) -> int:
    """Remove keys that count no more, the oldest first; say how many.  Does not commit."""
    return (await conn.execute(_FORGET, {"kept": KEPT, "limit": limit})).rowcount


def _number(place: Place) -> int:
    """Map a key to PostgreSQL's signed 64 bits; two that meet there wait for each other."""
    digest = hashlib.sha256("\x00".join(place).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
