"""News of purchases from outside any look: webhooks, the sweep, the search for lost ones.

News is a hint.  It makes a look due, and may give an attempt of unknown fate its handle; what
became of the prediction is read again before it is believed.  On the caller's connection, never
committing; safe to repeat, in any order.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Executable,
    Interval,
    Row,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import RELAXED
from app.domain.errors import NotFound
from app.domain.events import Heard
from app.domain.policy import Policy
from app.domain.state import AttemptState, Stage
from app.services import job_queries
from app.services.job_records import ATTEMPTS, JOBS
from app.services.job_service import Change, Outcome, lock, transition

# How long the answer to a purchase is expected any moment: it usually comes after the
# webhook that tells of the start, and brings the same.
ANSWER_EXPECTED = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Hint:
    """News about an attempt, from whoever speaks for the provider.

    `token` must be the attempt's own.  `is_over`: the provider is done with the prediction.
    `is_certain` tells that the attempt was named by the provider; otherwise the prediction
    only looks like what the attempt asked for.
    """

    attempt_id: UUID
    token: str
    handle: str
    is_over: bool
    is_certain: bool = True


@dataclass(frozen=True, slots=True)
class Told:
    """What came of a hint: a job worth a look now, if any; whether it was adopted by this."""

    job_id: UUID | None = None
    is_adoption: bool = False


_IDS = bindparam("ids", type_=ARRAY(Uuid(), dimensions=1))
_HANDLES = bindparam("handles", type_=ARRAY(Text(), dimensions=1))

_TOLD_OF = (
    select(
        *(ATTEMPTS.c.id, ATTEMPTS.c.job_id, ATTEMPTS.c.number, ATTEMPTS.c.token),
        *(ATTEMPTS.c.state, ATTEMPTS.c.handle, ATTEMPTS.c.fingerprint),
        and_(
            JOBS.c.claim_token.is_not(None),
            JOBS.c.due_at > func.now(),
            JOBS.c.stage == Stage.SUBMITTING.value,
            ATTEMPTS.c.sent_at > func.now() - ANSWER_EXPECTED,
        ).label("is_being_bought"),
    )
    .join(JOBS, JOBS.c.id == ATTEMPTS.c.job_id)
    .where(ATTEMPTS.c.id == func.any(_IDS))
)

_is_asleep = and_(JOBS.c.claim_token.is_(None), JOBS.c.due_at > func.now())
# Rows are locked in the order in which everybody locks them.
_generating = (
    select(JOBS.c.id)
    .where(JOBS.c.id == func.any(_IDS))
    .where(JOBS.c.stage == Stage.GENERATING.value)
    # Nothing is written for what is known already.
    .where(or_(JOBS.c.has_news.is_(False), _is_asleep))
    .order_by(JOBS.c.id)
    .with_for_update()
    .cte("generating")
)
_is_free = or_(JOBS.c.claim_token.is_(None), JOBS.c.due_at < func.now())
_WAKE = (
    update(JOBS)
    .where(JOBS.c.id == _generating.c.id)
    # Whoever is looking keeps the lease; the settle sees that there was news.
    .values(has_news=True, due_at=case((_is_free, func.now()), else_=JOBS.c.due_at))
    .returning(JOBS.c.id)
)
_WAKE_RELAXED = _WAKE.where(RELAXED)
_asleep = (
    select(JOBS.c.id)
    .join(ATTEMPTS, ATTEMPTS.c.job_id == JOBS.c.id)
    .where(ATTEMPTS.c.handle == func.any(_HANDLES))
    .where(ATTEMPTS.c.state == literal_column("'running'"))
    .where(JOBS.c.stage == Stage.GENERATING.value)
    # Told already, and in doubt (`Policy.doubted_look`): each sweep would end the pause.
    .where(_is_asleep, JOBS.c.has_news.is_(False))
    .order_by(JOBS.c.id)
    .with_for_update(of=JOBS)
    .cte("asleep")
)
_WAKE_SLEEPERS = (
    update(JOBS)
    .where(JOBS.c.id == _asleep.c.id, RELAXED)
    .values(has_news=True, due_at=func.now())
    .returning(JOBS.c.id)
)
_next = (
    select(JOBS.c.id)
    .where(JOBS.c.stage == Stage.GENERATING.value, _is_asleep)
    .order_by(JOBS.c.due_at)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
    .cte("next")
)
_WAKE_NEXT = (
    update(JOBS)
    .where(JOBS.c.id == _next.c.id)
    .values(due_at=func.now())
    .returning(JOBS.c.id)
)
_calm = (
    select(JOBS.c.id)
    .join(ATTEMPTS, ATTEMPTS.c.job_id == JOBS.c.id)
    .where(ATTEMPTS.c.handle == func.any(_HANDLES))
    .where(ATTEMPTS.c.state == literal_column("'running'"))
    .where(JOBS.c.stage == Stage.GENERATING.value)
    .where(JOBS.c.claim_token.is_(None), JOBS.c.has_news.is_(False))
    .where(JOBS.c.is_cancel_requested.is_(False))
    .where(JOBS.c.due_at < func.now() + bindparam("soon", type_=Interval()))
    .where(JOBS.c.deadline_at > func.now() + bindparam("calm", type_=Interval()))
    .order_by(JOBS.c.id)
    .with_for_update(of=JOBS, skip_locked=True)
    .cte("calm")
)
_POSTPONE = (
    update(JOBS)
    .where(JOBS.c.id == _calm.c.id, RELAXED)
    .values(due_at=func.now() + bindparam("calm", type_=Interval()))
)
_RIVALS = select(ATTEMPTS.c.fingerprint).where(
    ATTEMPTS.c.state == literal_column("'sent'"),
    ATTEMPTS.c.fingerprint
    == func.any(bindparam("prints", type_=ARRAY(Text(), dimensions=1))),
)
_SURVIVED = (
    update(ATTEMPTS)
    .where(ATTEMPTS.c.id == bindparam("attempt_id", type_=Uuid()))
    .where(ATTEMPTS.c.state == AttemptState.LOST.value, ATTEMPTS.c.handle.is_(None))
)


_LOST_SIBLING = (
    select(ATTEMPTS.c.id)
    .where(ATTEMPTS.c.job_id == bindparam("job_id", type_=Uuid()))
    .where(ATTEMPTS.c.state == AttemptState.LOST.value, ATTEMPTS.c.handle.is_(None))
    .order_by(ATTEMPTS.c.number)
    .limit(1)
)


async def wake(conn: AsyncConnection, handles: Sequence[str]) -> list[UUID]:
    """Make the jobs of these predictions due now, and name them.

    Leaves out jobs that are due anyway, that somebody is looking at, or that were told and
    found the provider to say otherwise.  Does not commit.
    """
    if not handles:
        return []
    woken = await conn.execute(_WAKE_SLEEPERS, {"handles": list(handles)})
    return list(woken.scalars())


async def postpone(
    conn: AsyncConnection, handles: Sequence[str], *, calm: timedelta
) -> None:
    """Put off looks of jobs whose predictions were just seen running.

    Leaves alone whoever is looked at, told of, cancelled, or near the deadline.  Does not
    commit.
    """
    if handles:
        await conn.execute(
            _POSTPONE, {"handles": list(handles), "calm": calm, "soon": calm / 2}
        )


async def wake_next(conn: AsyncConnection, *, limit: int) -> list[UUID]:
    """Make the jobs at the provider whose looks come next due now.  Does not commit."""
    return list((await conn.execute(_WAKE_NEXT, {"limit": limit})).scalars())


async def hear_known(
    conn: AsyncConnection, hints: Sequence[Hint]
) -> list[Told | Exception | None]:
    """Take the short way: act on hints about predictions that have their owner already.

    As `hear`, which must see to those that are answered None.  The connection may be in
    autocommit: there is one statement that writes, and it waits for no disk.
    """
    rows = {row.id: row for row in await _told_of(conn, hints)}
    answers: list[Told | Exception | None] = []
    over: dict[int, UUID] = {}
    for index, hint in enumerate(hints):
        row = rows.get(hint.attempt_id)
        answers.append(_answer_known(hint, row))
        if row is not None and _is_news(hint, row) and answers[index] == Told():
            over[index] = row.job_id
    for index, told in (await _wake_told(conn, _WAKE_RELAXED, over)).items():
        answers[index] = told
    return answers


async def hear(
    conn: AsyncConnection, hints: Sequence[Hint], *, policy: Policy
) -> list[Told | Exception]:
    """Act on the hints; say for each what came of it.

    `NotFound` for an attempt that does not exist or has another token.  What is known
    already, or belongs to a finished job, changes nothing.  A purchase that turns up for a
    lost attempt is used if the job is waiting to buy again, else it is owned by that attempt
    and will be cancelled.  Does not commit.
    """
    rows = {row.id: row for row in await _told_of(conn, hints)}
    owned = await _owned(conn, hints, rows)
    rivals = await _rivals(conn, hints, rows)
    answers: list[Told | Exception] = []
    unknown: list[tuple[int, Hint, Row[Any]]] = []
    strays: list[tuple[Hint, Row[Any]]] = []
    over: dict[int, UUID] = {}
    for index, hint in enumerate(hints):
        row = rows.get(hint.attempt_id)
        known = _answer_known(hint, row)
        answers.append(known or Told())
        if row is None or isinstance(known, Exception):
            continue
        if known is not None:
            if _is_news(hint, row):
                over[index] = row.job_id
        elif hint.handle in owned:
            continue
        elif row.handle is None:
            if hint.is_certain or row.fingerprint not in rivals:
                unknown.append((index, hint, row))
        elif hint.is_certain:
            strays.append((hint, row))
    if unknown and over:
        await lock(conn, {row.job_id for *_, row in unknown}.union(over.values()))
    for index, job_id, is_over in await _adopt(conn, unknown, policy):
        answers[index] = Told(job_id, is_adoption=True)
        if is_over:
            over[index] = job_id
    for hint, row in strays:
        await _survive(conn, row, hint)
    for index, told in (await _wake_told(conn, _WAKE, over)).items():
        if answers[index] == Told():
            answers[index] = told
    return answers


def _answer_known(hint: Hint, row: Row[Any] | None) -> Told | Exception | None:
    """Answer a hint that nothing is to be found out about; None for all others."""
    if row is None or not secrets.compare_digest(
        row.token.encode(), hint.token.encode(errors="replace")
    ):
        return NotFound("There is no such attempt.")
    if row.handle == hint.handle:
        return Told()
    if row.is_being_bought and not hint.is_over:
        # Should the answer be lost, there are the list and the end to tell.
        return Told()
    return None


def _is_news(hint: Hint, row: Row[Any]) -> bool:
    """Tell a hint that the running prediction of the attempt is over."""
    is_running = row.state == AttemptState.RUNNING.value
    return hint.is_over and is_running and row.handle == hint.handle


async def _wake_told(
    conn: AsyncConnection, statement: Executable, over: Mapping[int, UUID]
) -> dict[int, Told]:
    """Make the jobs due whose predictions are over; answer for those that were not yet."""
    if not over:
        return {}
    woken = await conn.execute(statement, {"ids": list(set(over.values()))})
    due = set(woken.scalars())
    return {index: Told(job_id) for index, job_id in over.items() if job_id in due}


async def _told_of(conn: AsyncConnection, hints: Sequence[Hint]) -> Sequence[Any]:
    ids = list({hint.attempt_id for hint in hints})
    return (await conn.execute(_TOLD_OF, {"ids": ids})).all()


async def _owned(
    conn: AsyncConnection, hints: Sequence[Hint], rows: Mapping[UUID, Row[Any]]
) -> set[str]:
    """Tell which handles have an owner, as far as an attempt might become one."""
    unclear = [
        hint.handle
        for hint in hints
        if hint.attempt_id in rows and rows[hint.attempt_id].handle != hint.handle
    ]
    return await job_queries.owned(conn, unclear) if unclear else set()


async def _rivals(
    conn: AsyncConnection, hints: Sequence[Hint], rows: Mapping[UUID, Row[Any]]
) -> set[str]:
    """Name the inputs that somebody may be buying right now.

    Among equal purchases an unowned prediction may be theirs, not yet written down.
    """
    prints = [
        rows[hint.attempt_id].fingerprint
        for hint in hints
        if not hint.is_certain and hint.attempt_id in rows
    ]
    if not prints:
        return set()
    return set((await conn.execute(_RIVALS, {"prints": prints})).scalars())


async def _adopt(
    conn: AsyncConnection,
    unknown: Sequence[tuple[int, Hint, Row[Any]]],
    policy: Policy,
) -> list[tuple[int, UUID, bool]]:
    """Give attempts of unknown fate their handles; say which jobs are under way by that."""
    if not unknown:
        return []
    changes = [
        Change(row.job_id, Heard(row.number, hint.handle, hint.is_over))
        for _, hint, row in unknown
    ]
    adopted: list[tuple[int, UUID, bool]] = []
    outcomes = await transition(conn, changes, policy=policy)
    for (index, hint, row), outcome in zip(unknown, outcomes, strict=True):
        if isinstance(outcome, Outcome) and _has(outcome, hint.handle):
            adopted.append((index, row.job_id, hint.is_over))
        else:
            await _survive(conn, row, hint)
    return adopted


async def _survive(conn: AsyncConnection, row: Row[Any], hint: Hint) -> None:
    """Let the lost attempt own the prediction, so that nobody adopts it.

    It is cancelled unless it is over.
    """
    cancel_at = None if hint.is_over else func.now()
    survived = _SURVIVED.values(handle=hint.handle, cancel_at=cancel_at)
    done = await conn.execute(survived, {"attempt_id": row.id})
    if done.rowcount == 0 and hint.is_certain:
        # The attempt has the purchase of an earlier one, which takes this one in return.
        sibling = await conn.scalar(_LOST_SIBLING, {"job_id": row.job_id})
        await conn.execute(survived, {"attempt_id": sibling})


def _has(outcome: Outcome, handle: str) -> bool:
    attempt = outcome.after.open_attempt
    return attempt is not None and attempt.handle == handle
