"""The switch of the queue: while it is off nothing that is pending starts, or runs out of time.

    pause   writes the switch and waits for claims under way: what they start began before
    claim   passes the bar, which it holds until its commit, and reads the switch behind it
    resume  gives the pending jobs back the time of the pause and switches on, in one transaction

So there is no moment at which a claim sees the queue on and a deadline of before, and none after
a pause was committed at which one starts a job.  Nothing here commits.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import (
    DateTime,
    Uuid,
    bindparam,
    exists,
    func,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.models.notice import Switch
from app.services.job_records import table_of

SWITCHES = table_of(Switch)

_BAR = 0x6D67_0010  # far enough from the watcher's
BATCH = 5000  # deadlines pushed by one statement
_NO_JOB = UUID(int=0)
_Moment = DateTime(timezone=True)

_is_queue = SWITCHES.c.name == literal_column("'queue'")

# For statements that must find nothing to start while the queue is paused.  It is looked up
# once for all rows.
IS_PAUSED = exists(
    select(literal_column("1")).where(_is_queue, SWITCHES.c.is_on.is_(False))
)

# For the statement before the one that reads the switch: a statement sees what was committed
# when it began, and not what it waited for.
PASS_THE_BAR = select(func.pg_advisory_xact_lock_shared(_BAR)).scalar_subquery()
_WAIT_FOR_CLAIMS = select(func.pg_advisory_xact_lock(_BAR))

_insert_off = upsert(SWITCHES).values(
    name="queue",
    is_on=False,
    reason=bindparam("reason"),
    changed_at=func.clock_timestamp(),
    changed_by=bindparam("by"),
)
_SWITCH_OFF = _insert_off.on_conflict_do_update(
    index_elements=[SWITCHES.c.name],
    set_={
        "is_on": False,
        "reason": _insert_off.excluded.reason,
        # Not the insert's: it may have waited for a resume.
        "changed_at": func.clock_timestamp(),
        "changed_by": _insert_off.excluded.changed_by,
    },
    where=SWITCHES.c.is_on,
).returning(SWITCHES.c.changed_at)
_LOCK_OFF = (
    select(SWITCHES.c.changed_at)
    .where(_is_queue, SWITCHES.c.is_on.is_(False))
    .with_for_update()
)
_SWITCH_ON = (
    update(SWITCHES)
    .where(_is_queue)
    .values(
        is_on=True,
        reason="",
        changed_at=bindparam("at", type_=_Moment),
        changed_by=bindparam("by"),
    )
)
# Rows are locked in the order in which everybody locks them.
_PUSH_DEADLINES = text("""
WITH waiting AS (
    SELECT id FROM jobs WHERE status = 'pending' AND id > :after
    ORDER BY id LIMIT :size FOR UPDATE
)
UPDATE jobs
SET deadline_at = deadline_at + greatest(:at - greatest(created_at, :since), interval '0')
FROM waiting WHERE jobs.id = waiting.id
RETURNING jobs.id
""").bindparams(
    bindparam("after", type_=Uuid()),
    bindparam("at", type_=_Moment),
    bindparam("since", type_=_Moment),
)


@dataclass(frozen=True, slots=True)
class QueueState:
    """Whether the queue is paused; if so, since when, why, and by whom (as in the audit log)."""

    is_paused: bool = False
    since: datetime | None = None
    reason: str | None = None
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Resumed:
    """How long the pause was, and how many jobs were given their time back."""

    length: timedelta
    jobs: int


async def read(conn: AsyncConnection) -> QueueState:
    """Tell how the queue is."""
    query = select(SWITCHES).where(_is_queue, SWITCHES.c.is_on.is_(False))
    row = (await conn.execute(query)).one_or_none()
    if row is None:
        return QueueState()
    return QueueState(True, row.changed_at, row.reason, row.changed_by)


async def pause(conn: AsyncConnection, *, reason: str, by: str) -> bool:
    """Pause the queue; tell whether it was running.

    Waits for claims under way, which hold nothing up for long.  After the commit no job is
    started; attempts that are `sent` by then go on.  Does not commit.
    """
    # The switch first and the bar afterwards: whoever waits for the switch bars nobody.
    changed = await conn.scalar(_SWITCH_OFF, {"reason": reason, "by": by})
    if changed is None:
        return False
    await conn.execute(_WAIT_FOR_CLAIMS)
    return True


async def resume(conn: AsyncConnection, *, by: str) -> Resumed | None:
    """Let the queue go on; None when it was not paused.

    Every pending job's deadline moves by the length of the pause, or of the part it waited
    through.  Until the commit these jobs are locked: a cancellation waits.  Does not commit.
    """
    since = await conn.scalar(_LOCK_OFF)
    if since is None:
        return None
    at: datetime = await conn.scalar(select(func.clock_timestamp())) or since
    jobs, last, found = 0, _NO_JOB, BATCH
    while found == BATCH:
        values = {"after": last, "size": BATCH, "at": at, "since": since}
        pushed = list((await conn.execute(_PUSH_DEADLINES, values)).scalars())
        found = len(pushed)
        jobs += found
        last = max(pushed, default=last)
    await conn.execute(_SWITCH_ON, {"at": at, "by": by})
    return Resumed(at - since, jobs)
