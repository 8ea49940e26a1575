"""Every verb that changes jobs: set-based, on the caller's connection, never committing.

`transition` is the one gate: it locks the rows, lets `lifecycle.decide` decide each, and
writes jobs, attempts, assets and events of all of them in a handful of statements.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID, uuid4

import structlog
from sqlalchemy import (
    ARRAY,
    Interval,
    Row,
    Select,
    Text,
    Uuid,
    bindparam,
    delete,
    func,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.errors import Conflict, LostClaim, NotFound
from app.domain.events import CancelRequested, Event, Intended, WentSilent
from app.domain.lifecycle import decide, overdue
from app.domain.policy import Policy
from app.domain.state import JobState, Status
from app.services import outbox
from app.services.job_records import (
    ASSETS,
    ATTEMPTS,
    JOBS,
    UPLOADS,
    SELECT_STATE,
    Claim,
    StoredOutput,
    read_claim,
    read_state,
)
from app.services.job_writes import Writes

log = structlog.get_logger("app.jobs")


class Hold(Enum):
    """What becomes of the claim when a change is written."""

    NONE = "none"  # the change comes from outside any look; claims stay as they are
    KEEP = "keep"  # the look goes on
    RELEASE = "release"  # the look is over; the next one is due as decided


@dataclass(frozen=True, slots=True)
class Change:
    """One event for one job, to go through the gate.

    With a `token` the change is refused (`LostClaim`) unless that claim still stands.  With a
    `realm`, a job of any other owner is as unknown as one that does not exist.
    """

    job_id: UUID
    event: Event
    hold: Hold = Hold.NONE
    token: UUID | None = None
    outputs: tuple[StoredOutput, ...] = ()
    cost_usd: Decimal | None = None
    realm: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a change came to.  `next_look` is how far ahead, None when finished.

    `is_told`: somebody is to be told of it by webhook.
    """

    before: JobState
    after: JobState
    next_look: timedelta | None
    is_told: bool = False

    @property
    def is_end(self) -> bool:
        """Tell whether the job finished by this."""
        return self.after.is_terminal and not self.before.is_terminal


# ------------------------------------------------------------------------------- claim


@dataclass(frozen=True, slots=True)
class Claimed:
    """What was taken; the jobs that ended instead; whether webhooks are to tell of either."""

    claims: Sequence[Claim]
    ended: Sequence[JobState]
    are_told: bool = False


# Lock first, read afterwards: a statement that waited for a lock, or came a moment before
# another one's commit, sees the job as it is now and its attempt as it was before (PostgreSQL 18
# manual, 13.2.1).
_LOCK = (
    select(JOBS.c.id)
    .where(JOBS.c.id == func.any(bindparam("ids", type_=ARRAY(Uuid()))))
    .order_by(JOBS.c.id)
)
_LOCK_DUE = _LOCK.where(JOBS.c.due_at <= func.now()).with_for_update(skip_locked=True)
_LOCK_ALL = _LOCK.with_for_update()
# Others' jobs are not even locked: how long that took would tell that they exist.
_asked = (
    func.unnest(
        bindparam("asked", type_=ARRAY(Uuid(), dimensions=1)),
        bindparam("realms", type_=ARRAY(Text(), dimensions=1)),
    )
    .table_valued("job_id", "realm", name="asked")
    .render_derived()
)
_LOCK_SEEN = _LOCK.where(
    (JOBS.c.id == func.any(bindparam("free", type_=ARRAY(Uuid(), dimensions=1))))
    | tuple_(JOBS.c.id, JOBS.c.owner).in_(select(_asked.c.job_id, _asked.c.realm))
).with_for_update()
# Rows are locked in the order in which everybody locks them.
_standing = (
    select(JOBS.c.id)
    .where(JOBS.c.id == func.any(bindparam("ids", type_=ARRAY(Uuid()))))
    .where(JOBS.c.claim_token == func.any(bindparam("tokens", type_=ARRAY(Uuid()))))
    .order_by(JOBS.c.id)
    .with_for_update()
    .cte("standing")
)
_RENEW = (
    update(JOBS)
    .where(JOBS.c.id == _standing.c.id)
    .values(due_at=func.now() + bindparam("lease", type_=Interval()))
    .returning(JOBS.c.claim_token)
)


async def lock(conn: AsyncConnection, job_ids: Collection[UUID]) -> None:
    """Lock the jobs, in the order in which everybody does.

    For whoever needs some of them in one statement and others in the next.
    """
    await conn.execute(_LOCK_ALL, {"ids": list(job_ids)})


async def _read_locked(
    conn: AsyncConnection,
    lock: Select[Any],
    job_ids: Collection[UUID],
    **values: Sequence[object],
) -> Sequence[Row[Any]]:
    """Lock what `lock` selects among the jobs, and read all that a decision needs."""
    values["ids"] = list(job_ids)
    locked = list((await conn.execute(lock, values)).scalars())
    if not locked:
        return []
    return (await conn.execute(SELECT_STATE, {"ids": locked})).all()


async def claim(
    conn: AsyncConnection,
    job_ids: Sequence[UUID],
    *,
    lease: timedelta,
    starts: int,
    policy: Policy,
) -> Claimed:
    """Take those of the jobs that somebody needs to look at now.

    Locks the rows and pushes `due_at` one lease beyond the database's now.  A pending job
    is taken only while `starts` lasts, and its attempt is intended in the same breath: after
    the commit exactly one request may leave for it.  A job whose time is up for good ends
    here (see `lifecycle.overdue`), and so does one whose looks end in silence each time; before
    that, they are spaced out.  A job missing from the claims is unknown, finished, not due, out
    of budget or in other hands.  Does not commit.
    """
    began = time.monotonic()
    rows = await _read_locked(conn, _LOCK_DUE, job_ids)
    # When the budget does not reach for all: by priority, then by age (ids are in time order).
    rows = sorted(rows, key=lambda row: (-row.priority, row.due_at, row.id))
    claims: list[Claim] = []
    ended: list[JobState] = []
    writes = Writes()
    for row in rows:
        try:
            state = read_state(row)
        except ValueError as error:
            # A word of a newer version: left to its workers.
            log.error("job.unreadable", job_id=str(row.id), reason=str(error))
            continue
        token = uuid4()
        if (end := overdue(state, row.now, policy)) is not None:
            ended.append(_end(writes, row, state, end, policy))
        elif state.status is not Status.PENDING:
            if row.claim_token is not None:
                log.warning("job.lease_expired", job_id=str(row.id), stage=state.stage)
                silence = WentSilent(state.silent_looks + 1)
                after = decide(state, silence, row.now, policy, random.random())
                if after.due_at != state.due_at:
                    writes.decided(row, state, after, silence)
                    ended.append(after)
                    continue
                state = after
            # What was heard until now, this look will see.
            known = replace(state, has_news=False)
            writes.add(row, state, known, due_at=row.now + lease, claim_token=token)
            claims.append(read_claim(row, state, token, began=began, is_fresh=False))
        elif starts > 0:
            starts -= 1
            claims.append(_intend(writes, row, state, token, began, lease, policy))
    # A claim that a crash takes back was never there; an intended purchase must stay.
    is_relaxed = not ended and not any(claim.is_fresh for claim in claims)
    await writes.flush(conn, is_relaxed=is_relaxed)
    finished = [state for state in ended if state.is_terminal]
    return Claimed(claims, finished, are_told=writes.tells)


def _end(
    writes: Writes, row: Any, state: JobState, end: Event, policy: Policy
) -> JobState:
    """End a job without another look."""
    after = decide(state, end, row.now, policy, random.random())
    writes.decided(row, state, after, end)
    return after


def _intend(
    writes: Writes,
    row: Any,
    state: JobState,
    token: UUID,
    began: float,
    lease: timedelta,
    policy: Policy,
) -> Claim:
    after = decide(state, Intended(), row.now, policy, random.random())
    attempt_id, attempt_token = row.attempt_id, row.attempt_token
    if state.open_attempt is None:
        attempt_id, attempt_token = uuid4(), secrets.token_urlsafe(24)
    writes.add(row, state, after, due_at=row.now + lease, claim_token=token)
    writes.event(row, after, Intended())
    writes.attempt(row, after, Intended(), attempt_id=attempt_id, token=attempt_token)
    return read_claim(
        row,
        after,
        token,
        began=began,
        is_fresh=True,
        attempt_id=attempt_id,
        attempt_token=attempt_token,
    )


async def renew(
    conn: AsyncConnection, claims: Sequence[Claim], *, lease: timedelta
) -> set[UUID]:
    """Push the lease of the claims that still stand; give their tokens.  Does not commit."""
    values = {
        "ids": [claim.job_id for claim in claims],
        "tokens": [claim.token for claim in claims],
        "lease": lease,
    }
    return set((await conn.execute(_RENEW, values)).scalars())


# -------------------------------------------------------------------------- transition


async def transition(
    conn: AsyncConnection, changes: Sequence[Change], *, policy: Policy
) -> list[Outcome | Exception]:
    """Put the changes through the gate, in order; answer one outcome or refusal each.

    `NotFound` for an unknown job, `LostClaim` for a claim that no longer stands.  Changes
    of one job see each other.  Finished jobs stay as they are.  Does not commit.
    """
    rows = {row.id: row for row in await _lock_for(conn, changes)}
    tokens = {job_id: row.claim_token for job_id, row in rows.items()}
    states = {job_id: read_state(row) for job_id, row in rows.items()}
    outcomes: list[Outcome | Exception] = []
    writes = Writes()
    for change in changes:
        row = rows.get(change.job_id)
        if row is None or change.realm not in (None, row.owner):
            outcomes.append(NotFound("There is no such job."))
            continue
        if change.token is not None and change.token != tokens[row.id]:
            outcomes.append(LostClaim("Somebody else is looking at the job."))
            continue
        before = states[row.id]
        after = decide(before, change.event, row.now, policy, random.random())
        if change.hold is Hold.RELEASE and before.has_news and after.has_news:
            # Heard while the look went on, which may have asked too early.
            after = replace(after, due_at=row.now)
        if change.hold is Hold.RELEASE or after.is_terminal:
            tokens[row.id] = None
        next_look = _ahead(after, row.now)
        if change.hold is Hold.RELEASE:
            after = replace(after, is_claimed=False, silent_looks=0)
        elif not after.is_terminal and (change.hold is Hold.KEEP or after.is_claimed):
            # Somebody is looking: `due_at` is their lease, whatever was decided.
            after = replace(after, due_at=before.due_at)
        elif after.due_at is not None and after.due_at > row.now:
            # A lapsed claim must not come to life with the next look for a lease.
            tokens[row.id] = None
        states[row.id] = after
        is_told = after.version != before.version and outbox.is_heard(
            row, change.event, after
        )
        outcomes.append(Outcome(before, after, next_look, is_told))
        if after == before and change.hold is Hold.NONE:
            continue
        writes.add(
            row,
            before,
            after,
            due_at=after.due_at,
            claim_token=tokens[row.id],
            cost_usd=change.cost_usd,
        )
        if after.version != before.version:
            writes.event(row, after, change.event)
            writes.outputs(row, change.outputs)
        if after.attempt != before.attempt:
            writes.attempt(row, after, change.event)
    await writes.flush(conn)
    return outcomes


async def _lock_for(
    conn: AsyncConnection, changes: Sequence[Change]
) -> Sequence[Row[Any]]:
    ids = {change.job_id for change in changes}
    asked = [
        (change.job_id, change.realm) for change in changes if change.realm is not None
    ]
    if not asked:
        return await _read_locked(conn, _LOCK_ALL, ids)
    return await _read_locked(
        conn,
        _LOCK_SEEN,
        ids,
        free=[change.job_id for change in changes if change.realm is None],
        asked=[job_id for job_id, _ in asked],
        realms=[realm for _, realm in asked],
    )


def _ahead(state: JobState, now: datetime) -> timedelta | None:
    return None if state.due_at is None else max(state.due_at - now, timedelta(0))


# ---------------------------------------------------------------------- cancel, delete


async def cancel(conn: AsyncConnection, job_id: UUID, *, policy: Policy) -> Outcome:
    """Ask for the end of a job: at once if nothing was sent, else with the provider.

    A finished job stays as it is.  Raise `NotFound`.  Does not commit.
    """
    change = Change(job_id, CancelRequested())
    (outcome,) = await transition(conn, [change], policy=policy)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


_CANCEL_AGAIN = (
    update(ATTEMPTS).where(ATTEMPTS.c.id == bindparam("attempt_id", type_=Uuid()))
    # NULL: nothing more is to be done.
    .values(cancel_at=func.now() + bindparam("after", type_=Interval()))
)


async def cancel_again(
    conn: AsyncConnection, attempt_id: UUID, *, after: timedelta | None
) -> None:
    """Say when to cancel an unwanted prediction again; None: it is over.  Does not commit."""
    await conn.execute(_CANCEL_AGAIN, {"attempt_id": attempt_id, "after": after})


_among = func.any(bindparam("keys", type_=ARRAY(Text(), dimensions=1)))
_USED = union_all(
    select(ASSETS.c.key).where(ASSETS.c.key == _among),
    select(UPLOADS.c.key).where(UPLOADS.c.key == _among),
)
_KEYS_OF = select(ASSETS.c.key).where(ASSETS.c.job_id == bindparam("job_id"))


async def delete_job(
    conn: AsyncConnection, job_id: UUID, *, realm: str | None
) -> list[str]:
    """Remove a finished job with all its rows; name its files, some of which are orphans now.

    With a `realm`, a job of any other owner is as unknown as one that does not exist.  Raise
    `NotFound`, or `Conflict` for a live job.  Does not commit.
    """
    lock = select(JOBS.c.status).where(JOBS.c.id == job_id).with_for_update()
    if realm is not None:
        lock = lock.where(JOBS.c.owner == realm)
    status = await conn.scalar(lock)
    if status is None:
        raise NotFound("There is no such job.")
    if not Status(status).is_terminal:
        raise Conflict(f"The job is {status}: cancel it first, then delete it.")
    files = list((await conn.execute(_KEYS_OF, {"job_id": job_id})).scalars())
    await conn.execute(delete(JOBS).where(JOBS.c.id == job_id))
    return files


async def orphans_among(conn: AsyncConnection, keys: Sequence[str]) -> list[str]:
    """Tell which of the files no job and no upload has any more, whoever's."""
    used = set((await conn.execute(_USED, {"keys": list(keys)})).scalars())
    return [key for key in keys if key not in used]
