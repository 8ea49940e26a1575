"""A world to attack the claim protocol in: a table, a provider, workers that may die anywhere.

A look is a generator: it pauses wherever a process may die or fall asleep.  It is written
against `Table`, so the same workers drive a model of the table in memory and the real one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from uuid import UUID, uuid4

from app.domain import journal
from app.domain.errors import LostClaim
from app.domain.events import (
    CancelRequested,
    Event,
    Expired,
    GenerationCancelled,
    GenerationFailed,
    Generated,
    Heard,
    Intended,
    NotFound,
    OutcomeUnknown,
    Progressed,
    Refused,
    Started,
    Stored,
)
from app.domain.generation import Failure, Phase, RefusalKind
from app.domain.lifecycle import decide
from app.domain.policy import Policy
from app.domain.state import Attempt, AttemptState, JobState, Stage, Status, new_job
from app.services.job_records import Claim
from app.services.news import Told
from tests.support.jobs import JobTable
from tests.support.jobs import new_job as new_order

FAILURE = Failure("bad_weather", "The weather was bad.", retryable=True)
LEASE = timedelta(seconds=30)


class Table(Protocol):
    """What workers and the watcher may do with the jobs; every verb is a commit."""

    policy: Policy

    def now(self) -> datetime: ...
    def pass_time(self, span: timedelta) -> None: ...
    def submit(self) -> UUID: ...
    def cancel(self, job_id: UUID) -> None: ...
    def hear(self, purchase: Purchase, is_over: bool) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def due(self) -> list[UUID]: ...
    def next_due(self) -> datetime | None: ...
    def claim(self, job_ids: Sequence[UUID], starts: int) -> list[Claim]: ...
    def renew(self, claim: Claim) -> bool: ...
    def settle(self, claim: Claim, event: Event) -> None: ...
    def record(self, claim: Claim, event: Event) -> None: ...
    def owned(self) -> set[str]: ...
    def state(self, job_id: UUID) -> JobState: ...
    def attempts(self, job_id: UUID) -> list[Attempt]: ...
    def replayed(self, job_id: UUID) -> JobState: ...
    def snapshot(self, job_id: UUID) -> Any: ...


# --------------------------------------------------------------------------- the provider


@dataclass(slots=True)
class Purchase:
    """A prediction somebody pays for.  It shows in the list from `listed_at` on."""

    job_id: UUID
    attempt: int
    handle: str
    listed_at: datetime
    phase: Phase = Phase.RUNNING
    is_transient: bool = False


@dataclass(slots=True)
class SimulatedProvider:
    """Counts purchases.  `fate` is what becomes of the next request for one."""

    purchases: list[Purchase] = field(default_factory=list)
    fate: str = "created"
    lag: timedelta = timedelta(0)
    _handles: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    FATES = (
        *("created", "created", "answer_lost", "request_lost"),
        *("throttled", "account", "transient", "permanent"),
    )
    REFUSALS = {
        "throttled": RefusalKind.THROTTLED,
        "account": RefusalKind.ACCOUNT,
        "transient": RefusalKind.TRANSIENT,
        "permanent": RefusalKind.PERMANENT,
    }

    def create(self, claim: Claim, now: datetime) -> Event:
        """Take one request; answer what the worker learns of it."""
        fate, self.fate = self.fate, "created"
        if fate in self.REFUSALS:
            return Refused(self.REFUSALS[fate], FAILURE)
        if fate == "request_lost":
            return OutcomeUnknown("connection reset")
        assert claim.state.attempt is not None
        handle = f"h-{next(self._handles)}"
        lag, self.lag = self.lag, timedelta(0)
        number = claim.state.attempt.number
        self.purchases.append(Purchase(claim.job_id, number, handle, now + lag))
        return OutcomeUnknown("timeout") if fate == "answer_lost" else Started(handle)

    def get(self, handle: str) -> Purchase:
        """Read one prediction."""
        return next(p for p in self.purchases if p.handle == handle)

    def find(self, job_id: UUID, owned: set[str], now: datetime) -> str | None:
        """Look through the list for a purchase of the job that no attempt has yet."""
        for purchase in self.purchases:
            if purchase.job_id == job_id and purchase.listed_at <= now:
                if purchase.handle not in owned:
                    return purchase.handle
        return None

    def end(self, purchase: Purchase, phase: Phase, *, is_transient: bool) -> None:
        """Let a running prediction end."""
        if not purchase.phase.is_over:
            purchase.phase, purchase.is_transient = phase, is_transient


# ------------------------------------------------------------------------------ the workers


def look(claim: Claim, table: Table, provider: SimulatedProvider) -> Iterator[str]:
    """Work on a claim; every `yield` is a moment at which the process may end."""
    yield "claimed"
    state, now = claim.state, claim.now
    attempt = state.attempt
    assert attempt is not None
    is_late = now >= state.deadline_at
    event: Event
    match state.stage:
        case Stage.SUBMITTING if claim.is_fresh:
            event = provider.create(claim, table.now())
            yield "sent"
        case Stage.SUBMITTING:
            event = OutcomeUnknown("the worker died")
        case Stage.RECONCILING:
            handle = provider.find(claim.job_id, table.owned(), table.now())
            yield "listed"
            if handle is not None:
                event = Started(handle, is_adopted=True)
            else:
                event = Expired() if is_late else NotFound()
        case Stage.GENERATING:
            assert attempt.handle is not None
            purchase = provider.get(attempt.handle)
            if state.is_cancel_requested or is_late:
                provider.end(purchase, Phase.CANCELLED, is_transient=False)
                yield "cancelled"
            event = _news(purchase)
            if isinstance(event, Generated):
                table.record(claim, event)
                yield "recorded"
                event = Stored(1)
        case _:
            yield "fetched"
            event = Stored(1)
    table.settle(claim, event)


def _news(purchase: Purchase) -> Event:
    match purchase.phase:
        case Phase.SUCCEEDED:
            return Generated()
        case Phase.FAILED:
            return GenerationFailed(FAILURE, purchase.is_transient)
        case Phase.CANCELLED | Phase.ABORTED:
            return GenerationCancelled(purchase.phase is Phase.ABORTED)
    return Progressed(0.5)


# ---------------------------------------------------------------- a model of the table


@dataclass(slots=True)
class _Row:
    state: JobState
    token: UUID | None = None
    attempts: dict[int, Attempt] = field(default_factory=dict)
    history: list[tuple[Event, datetime]] = field(default_factory=list)


class ModelTable:
    """The rules of the claim, in a few lines, over `decide`."""

    def __init__(self, policy: Policy, deadline: timedelta) -> None:
        self.policy = policy
        self.rows: dict[UUID, _Row] = {}
        self._paused_at: datetime | None = None
        self._deadline = deadline
        self._now = datetime(2026, 1, 1, tzinfo=UTC)
        self._draws = itertools.cycle((0.5, 0.0, 1.0, 0.3))

    def now(self) -> datetime:
        return self._now

    def pass_time(self, span: timedelta) -> None:
        self._now += span

    def submit(self) -> UUID:
        job_id = uuid4()
        self.rows[job_id] = _Row(new_job(self._now, self._deadline))
        return job_id

    def pause(self) -> None:
        self._paused_at = self._paused_at or self._now

    def resume(self) -> None:
        if self._paused_at is None:
            return
        for row in self.rows.values():
            if row.state.status is Status.PENDING:
                since = max(row.state.created_at, self._paused_at)
                deadline = row.state.deadline_at + (self._now - since)
                row.state = replace(row.state, deadline_at=deadline)
        self._paused_at = None

    def due(self) -> list[UUID]:
        return [i for i, row in self.rows.items() if self._is_due(row)]

    def next_due(self) -> datetime | None:
        moments = [row.state.due_at for row in self.rows.values()]
        return min((m for m in moments if m is not None), default=None)

    def claim(self, job_ids: Sequence[UUID], starts: int) -> list[Claim]:
        claims = []
        for job_id in dict.fromkeys(job_ids):
            row = self.rows[job_id]
            if not self._is_due(row):
                continue
            is_fresh = row.state.status is Status.PENDING
            if is_fresh and self._paused_at is not None:
                continue
            if is_fresh and self._now >= row.state.deadline_at:
                self._write(row, Expired())
                continue
            if is_fresh and starts <= 0:
                continue
            if is_fresh:
                starts -= 1
                self._write(row, Intended())
            row.token = uuid4()
            row.state = replace(row.state, due_at=self._now + LEASE)
            claims.append(self._claim(job_id, row, row.token, is_fresh))
        return claims

    def renew(self, claim: Claim) -> bool:
        row = self.rows[claim.job_id]
        if row.token != claim.token:
            return False
        row.state = replace(row.state, due_at=self._now + LEASE)
        return True

    def settle(self, claim: Claim, event: Event) -> None:
        row = self._held(claim)
        row.token = None
        self._write(row, event)

    def record(self, claim: Claim, event: Event) -> None:
        row = self._held(claim)
        lease_end = row.state.due_at
        self._write(row, event)
        row.state = replace(row.state, due_at=lease_end)

    def cancel(self, job_id: UUID) -> None:
        self._write(self.rows[job_id], CancelRequested())

    def hear(self, purchase: Purchase, is_over: bool) -> None:
        row = self.rows[purchase.job_id]
        if (
            purchase.handle in self.owned()
            or row.attempts.get(purchase.attempt) is None
        ):
            return
        if row.attempts[purchase.attempt].handle is not None:
            return
        self._write(row, Heard(purchase.attempt, purchase.handle, is_over))
        attempt = row.attempts[purchase.attempt]
        if attempt.state is AttemptState.LOST and purchase.handle not in self.owned():
            row.attempts[purchase.attempt] = replace(attempt, handle=purchase.handle)

    def owned(self) -> set[str]:
        attempts = (a for row in self.rows.values() for a in row.attempts.values())
        return {attempt.handle for attempt in attempts if attempt.handle is not None}

    def state(self, job_id: UUID) -> JobState:
        return self.rows[job_id].state

    def attempts(self, job_id: UUID) -> list[Attempt]:
        return list(self.rows[job_id].attempts.values())

    def replayed(self, job_id: UUID) -> JobState:
        row = self.rows[job_id]
        born = row.state.created_at
        deadline = row.state.deadline_at - born
        return journal.replay(born, deadline, row.history, self.policy)

    def snapshot(self, job_id: UUID) -> Any:
        row = self.rows[job_id]
        return (row.state, row.token, dict(row.attempts), list(row.history))

    def _is_due(self, row: _Row) -> bool:
        return row.state.due_at is not None and row.state.due_at <= self._now

    def _held(self, claim: Claim) -> _Row:
        row = self.rows[claim.job_id]
        if row.token != claim.token:
            raise LostClaim("Somebody else is looking at the job.")
        return row

    def _write(self, row: _Row, event: Event) -> None:
        is_claimed = row.token is not None and not self._is_due(row)
        before = replace(row.state, is_claimed=is_claimed)
        after = decide(before, event, self._now, self.policy, next(self._draws))
        if after.version != before.version:
            row.history.append((event, self._now))
        if after.attempt is not None and after.attempt != before.attempt:
            is_taken = after.attempt.handle in self.owned()
            if before.attempt is None or after.attempt.handle != before.attempt.handle:
                assert not is_taken, "a handle belongs to one attempt"
            row.attempts[after.attempt.number] = after.attempt
        if after.is_terminal:
            row.token = None
        row.state = after

    def _claim(self, job_id: UUID, row: _Row, token: UUID, is_fresh: bool) -> Claim:
        return Claim(
            job_id=job_id,
            token=token,
            state=row.state,
            request=new_order().request,
            num_outputs=1,
            attempt_id=None,
            attempt_token=None,
            request_id=None,
            now=self._now,
            is_fresh=is_fresh,
        )


# ------------------------------------------------------------------------ the real table


class PostgresTable:
    """The real verbs on the real tables.  Time passes by moving all jobs into the past."""

    def __init__(
        self, jobs: JobTable, runner: asyncio.Runner, deadline: timedelta
    ) -> None:
        self.policy = jobs.policy
        self.job_ids: list[UUID] = []
        self._jobs = jobs
        self._run = runner.run
        self._deadline = deadline
        self._passed = timedelta(0)

    def now(self) -> datetime:
        return datetime.now(UTC) + self._passed

    def pass_time(self, span: timedelta) -> None:
        self._passed += span
        self._run(self._jobs.age(span))

    def submit(self) -> UUID:
        (job_id,) = self._run(self._jobs.submit(new_order(deadline=self._deadline)))
        self.job_ids.append(job_id)
        return job_id

    def due(self) -> list[UUID]:
        return self._run(self._jobs.due())

    def next_due(self) -> datetime | None:
        moment = self._run(self._jobs.next_due())
        return None if moment is None else moment + self._passed

    def claim(self, job_ids: Sequence[UUID], starts: int) -> list[Claim]:
        return self._run(self._jobs.claim(*job_ids, lease=LEASE, starts=starts))

    def renew(self, claim: Claim) -> bool:
        return claim.token in self._run(self._jobs.renew(claim, lease=LEASE))

    def settle(self, claim: Claim, event: Event) -> None:
        self._run(self._jobs.settle(claim, event))

    def record(self, claim: Claim, event: Event) -> None:
        self._run(self._jobs.record(claim, event))

    def cancel(self, job_id: UUID) -> None:
        self._run(self._jobs.cancel(job_id))

    def hear(self, purchase: Purchase, is_over: bool) -> None:
        told = self._jobs.hear(
            purchase.job_id, purchase.handle, number=purchase.attempt, is_over=is_over
        )
        assert isinstance(self._run(told), Told)

    def pause(self) -> None:
        self._run(self._jobs.pause())

    def resume(self) -> None:
        self._run(self._jobs.resume())

    def owned(self) -> set[str]:
        return self._run(self._jobs.handles())

    def state(self, job_id: UUID) -> JobState:
        return self._run(self._jobs.state(job_id))

    def attempts(self, job_id: UUID) -> list[Attempt]:
        return self._run(self._jobs.attempt_values(job_id))

    def replayed(self, job_id: UUID) -> JobState:
        return self._run(self._jobs.replayed(job_id))

    def snapshot(self, job_id: UUID) -> Any:
        return self._run(self._jobs.snapshot(job_id))
