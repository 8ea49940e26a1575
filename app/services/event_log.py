"""The log of all jobs' events, read in an order in which nothing turns up late.

Ids are given out before commits, so a row with a lower id may become visible after one with a
higher id.  A row's transaction (`xid`) tells more: once every transaction below some number is
over, no row with such a number can come any more.  Rows up to there are *settled*, and have
their place for good: by (`xid`, `id`).  See docs/adr/0021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Text,
    and_,
    bindparam,
    cast,
    func,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import arrays, unnest
from app.domain import notices
from app.domain.events import Generated, Progressed, Stored
from app.domain.state import Status
from app.services.job_records import EVENTS, JOBS

LONGEST_REPLAY = 10_000  # events, of all owners
REPAIRED_AT_ONCE = 5_000

_MARK = "has_events"  # in a connection's `info`
_LARGEST = 2**63 - 1


class Position(NamedTuple):
    """A place in the log: after the row with this transaction and id."""

    xid: int
    id: int

    def __str__(self) -> str:
        return f"{self.xid}.{self.id}"


def read_position(text: str) -> Position | None:
    """Read a position back; None for what is none."""
    xid, point, row_id = text.partition(".")
    if not point or not (_is_number(xid) and _is_number(row_id)):
        return None
    return Position(min(int(xid), _LARGEST), min(int(row_id), _LARGEST))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20


@dataclass(frozen=True, slots=True)
class LiveEvent:
    """One entry of the log, as the outside is told of it (names: `domain/notices.py`).

    `id` is its position among the events of all jobs, `version` its place among its job's.
    """

    id: str
    job_id: UUID
    owner: str
    version: int
    name: str
    status: str
    stage: str | None
    progress: float | None
    at: datetime

    @property
    def is_end(self) -> bool:
        """Tell whether nothing comes after it."""
        return Status(self.status).is_terminal


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where the log stands: rows below `settled` are, and none has reached `limit` yet."""

    settled: int
    limit: int

    @property
    def end(self) -> Position:
        """Give the position after all that is settled."""
        return Position(self.settled, 0)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows of the log after a position: settled ones in their order, then others.

    Those others come again, once they are settled.  `is_full`: there may be more.
    """

    bounds: Bounds
    settled: Sequence[tuple[Position, LiveEvent]]
    unsettled: Sequence[LiveEvent]
    is_full: bool


# -- writing -----------------------------------------------------------------------------------


def mark(conn: AsyncConnection) -> None:
    """Note that this transaction writes events: somebody waits to be told of the commit."""
    conn.info[_MARK] = True


def take_mark(conn: AsyncConnection) -> bool:
    """Tell whether the connection was marked; it no longer is."""
    return bool(conn.info.pop(_MARK, False))


# -- reading -----------------------------------------------------------------------------------


def _xid(snapshot_part: Any) -> Any:
    return cast(cast(snapshot_part, Text), BigInteger)


_SNAPSHOT = func.pg_current_snapshot()
_bounds = select(
    _xid(func.pg_snapshot_xmin(_SNAPSHOT)).label("settled"),
    _xid(func.pg_snapshot_xmax(_SNAPSHOT)).label("limit"),
).subquery("bounds")

_EVENT = (
    *(EVENTS.c.xid, EVENTS.c.id, EVENTS.c.job_id, EVENTS.c.version, EVENTS.c.name),
    *(EVENTS.c.status, EVENTS.c.stage, EVENTS.c.at),
    EVENTS.c.data["progress"].label("progress"),
    JOBS.c.owner,
)
_JOINED = select(*_EVENT).join(JOBS, JOBS.c.id == EVENTS.c.job_id)
_PLACE = tuple_(EVENTS.c.xid, EVENTS.c.id)


def _place(name: str) -> Any:
    return tuple_(
        bindparam(f"{name}_xid", type_=BigInteger()),
        bindparam(f"{name}_id", type_=BigInteger()),
    )


_stretch = (
    _JOINED.where(_PLACE > _place("after"), EVENTS.c.xid < _bounds.c.limit)
    .order_by(EVENTS.c.xid, EVENTS.c.id)
    .limit(bindparam("most"))
    .correlate(_bounds)
    .lateral("stretch")
)
# In one statement, and so with one snapshot; one row at least, for where the log stands.
_READ = (
    select(_bounds, _stretch)
    .select_from(_bounds.outerjoin(_stretch, true()))
    .order_by(_stretch.c.xid, _stretch.c.id)
)
_BOUNDS = select(_bounds)
_FLOOR = (
    select(EVENTS.c.xid, EVENTS.c.id)
    .where(_PLACE <= _place("until"))
    .order_by(EVENTS.c.xid.desc(), EVENTS.c.id.desc())
    .offset(bindparam("most"))
    .limit(1)
)
_BETWEEN = (
    _JOINED.where(_PLACE > _place("after"), _PLACE <= _place("until"))
    .order_by(EVENTS.c.xid, EVENTS.c.id)
    .limit(bindparam("most"))
)
_BETWEEN_OF_OWNER = _BETWEEN.where(JOBS.c.owner == bindparam("owner"))
_wanted = unnest(EVENTS, ("job_id", "version"), alias="wanted")
_OF_JOBS = _JOINED.join(
    _wanted,
    and_(EVENTS.c.job_id == _wanted.c.job_id, EVENTS.c.version >= _wanted.c.version),
).order_by(EVENTS.c.job_id, EVENTS.c.version)


async def bounds(conn: AsyncConnection) -> Bounds:
    """Tell where the log stands."""
    row = (await conn.execute(_BOUNDS)).one()
    return Bounds(row.settled, row.limit)


async def read(conn: AsyncConnection, after: Position, *, limit: int) -> Stretch:
    """Read on after a position, at most so many rows."""
    values = _values(after=after) | {"most": limit}
    rows = (await conn.execute(_READ, values)).all()
    where = Bounds(rows[0].settled, rows[0].limit)
    settled, unsettled = [], []
    found = [row for row in rows if row.xid is not None]
    for row in found:
        if row.xid < where.settled:
            settled.append((Position(row.xid, row.id), _event(row)))
        else:
            unsettled.append(_event(row))
    return Stretch(where, settled, unsettled, is_full=len(found) == limit)


async def between(
    conn: AsyncConnection,
    after: Position,
    until: Position,
    *,
    owner: str | None,
    limit: int,
) -> list[tuple[Position, LiveEvent]]:
    """Read settled rows again, of one owner or (None) of all, at most so many."""
    values = _values(after=after, until=until) | {"most": limit}
    statement = _BETWEEN
    if owner is not None:
        statement, values["owner"] = _BETWEEN_OF_OWNER, owner
    rows = await conn.execute(statement, values)
    return [(Position(row.xid, row.id), _event(row)) for row in rows]


async def floor(conn: AsyncConnection, until: Position) -> Position:
    """Give the earliest position from which the log is told again, up to another one."""
    values = _values(until=until) | {"most": LONGEST_REPLAY}
    row = (await conn.execute(_FLOOR, values)).one_or_none()
    return Position(-1, 0) if row is None else Position(row.xid, row.id)


async def of_jobs(
    conn: AsyncConnection, wanted: Sequence[tuple[UUID, int]]
) -> dict[UUID, list[LiveEvent]]:
    """Read the logs of jobs, each from a version on; whoever has none is left out.

    These need no order among transactions: changes of one job wait for each other.
    """
    least: dict[UUID, int] = {}
    for job_id, version in wanted:
        least[job_id] = min(version, least.get(job_id, version))
    rows = [{"job_id": job_id, "version": one} for job_id, one in least.items()]
    values = arrays(rows, ("job_id", "version"), alias="wanted")
    found: dict[UUID, list[LiveEvent]] = {}
    for row in await conn.execute(_OF_JOBS, values):
        found.setdefault(row.job_id, []).append(_event(row))
    return found


def _values(**places: Position) -> dict[str, Any]:
    return {
        f"{name}_{part}": value
        for name, place in places.items()
        for part, value in place._asdict().items()
    }


def _event(row: Any) -> LiveEvent:
    return LiveEvent(
        id=f"{row.xid}.{row.id}",
        job_id=row.job_id,
        owner=row.owner,
        version=row.version,
        name=notices.name_of(row.name, row.status),
        status=row.status,
        stage=row.stage,
        progress=_progress(row),
        at=row.at,
    )


def _progress(row: Any) -> float | None:
    if row.name in (Generated.__name__, Stored.__name__):
        return 1.0
    if row.name == Progressed.__name__ and row.progress is not None:
        return float(row.progress)
    return None


# -- after a dump was restored -----------------------------------------------------------------

_FOREIGN = EVENTS.c.xid >= _xid(func.pg_snapshot_xmax(_SNAPSHOT))
_HAS_FOREIGN = select(select(EVENTS.c.id).where(_FOREIGN).exists())
_REPAIR = (
    update(EVENTS)
    .where(
        EVENTS.c.id.in_(select(EVENTS.c.id).where(_FOREIGN).limit(bindparam("most")))
    )
    .values(xid=0)
)


async def has_foreign(conn: AsyncConnection) -> bool:
    """Tell whether there are rows of transactions this server has not had yet.

    They came with a dump of another server.  Nobody is told of them, until the server's own
    transactions reach their numbers: then they would pass for news.
    """
    return bool(await conn.scalar(_HAS_FOREIGN))


async def repair(conn: AsyncConnection) -> bool:
    """Put some of those rows where old ones are, before everything; tell whether it was all.

    Rows written meanwhile are none of them.  Does not commit.  May be repeated.
    """
    done = await conn.execute(_REPAIR, {"most": REPAIRED_AT_ONCE})
    return done.rowcount < REPAIRED_AT_ONCE
