"""Accepting jobs: many submits in a few statements, on the caller's connection, never committing.

Whether a job may be accepted is decided under the locks of the accounts it counts in, and
written together with it.  A request that made a job before gets that one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    DateTime,
    Interval,
    Uuid,
    bindparam,
    func,
    insert,
    literal,
    select,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import arrays, unnest
from app.domain import journal
from app.domain.access import DEFAULT_OWNER, Budget, Limits
from app.domain.admission import SERVICE, Account, Terms, objection
from app.domain.errors import InProgress, KeyReused, ServiceError
from app.domain.generation import JSON, GenerationRequest
from app.domain.state import Stage, Status
from app.services import accounts, repeats
from app.services.accounts import Movement
from app.services.job_records import EVENTS, JOBS
from app.services.repeats import Earlier, Once, Place


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as accepted, everything about it that never changes.

    `worst_usd` is what it costs at worst, None when its price is unknown; `limits` and
    `budget` are its key's.  `uploads` names the uploads behind the links of its input.
    """

    id: UUID
    request: GenerationRequest
    provider: str
    prompt: str
    num_outputs: int
    priority: int
    deadline: timedelta
    metadata: dict[str, JSON]
    webhook_url: str | None = None
    request_id: str | None = None
    retry_of: UUID | None = None
    warnings: tuple[str, ...] = ()
    owner: str = DEFAULT_OWNER
    key_id: UUID | None = None
    is_public: bool = True
    uploads: Mapping[str, JSON] = field(default_factory=dict)
    worst_usd: Decimal | None = None
    limits: Limits = Limits()
    budget: Budget = Budget()
    is_trusted: bool = True  # may know what the whole service has left
    once: Once | None = None

    @property
    def place(self) -> Place | None:
        """Say where the request is remembered, if it must not make a second job."""
        return None if self.once is None else (self.owner, self.once.key)


@dataclass(frozen=True, slots=True)
class Birth:
    """The job a request made; `is_repeat`: an earlier request had made it already."""

    job_id: UUID
    at: datetime
    is_repeat: bool = False


_NEW_COLUMNS = (
    "id",
    "provider",
    "model",
    "prompt",
    "input",
    "num_outputs",
    "priority",
    "webhook_url",
    "metadata",
    "request_id",
    "retry_of",
    "warnings",
    "owner",
    "key_id",
    "is_public",
    "uploads",
    "reserved_usd",
)
_new = unnest(JOBS, _NEW_COLUMNS, alias="new")
# Not the transaction's: it may have begun on the day before and waited for the accounts, in
# whose new day others have counted meanwhile.
_NOW = func.statement_timestamp()
_LONG_AGO = date(1970, 1, 1)
_INSERT_JOBS = (
    upsert(JOBS)
    .from_select(
        [
            *_NEW_COLUMNS,
            *("version", "status", "stage", "is_cancel_requested", "attempts"),
            *("look_failures", "due_at", "created_at", "deadline_at"),
        ],
        select(
            _new,
            literal(1),
            literal(Status.PENDING.value),
            literal(Stage.QUEUED.value),
            literal(False),
            literal(0),
            literal(0),
            _NOW,
            func.greatest(_NOW, bindparam("not_before", type_=DateTime(timezone=True))),
            _NOW + bindparam("deadline", type_=Interval()),
        ),
        include_defaults=False,
    )
    # A submit is repeated with the same id when the answer to its commit was lost.
    .on_conflict_do_nothing(index_elements=[JOBS.c.id])
    .returning(JOBS.c.id, JOBS.c.created_at)
)
_BORN = select(JOBS.c.id, JOBS.c.created_at).where(
    JOBS.c.id == func.any(bindparam("ids", type_=ARRAY(Uuid(), dimensions=1)))
)
_births = unnest(EVENTS, ("job_id", "data", "at"), alias="born")
_INSERT_BIRTHS = insert(EVENTS).from_select(
    ["job_id", "data", "at", "version", "name", "status", "stage"],
    select(
        _births,
        literal(1),
        literal(journal.SUBMITTED),
        literal(Status.PENDING.value),
        literal(Stage.QUEUED.value),
    ),
    include_defaults=False,
)
# Whatever is written beside the jobs, in one statement.
_BOOKED = _INSERT_BIRTHS.add_cte(
    accounts.INSERT_ENTRIES.cte("entries_written"),
    accounts.BOOK_ACCEPTED.cte("accounts_written"),
)


async def submit(
    conn: AsyncConnection,
    jobs: Sequence[NewJob],
    *,
    service: Budget = Budget(),
    is_again: bool = False,
) -> list[Birth | ServiceError]:
    """Accept the jobs that may be, pending and due now; answer one birth or refusal each.

    `service` is the budget of all jobs together.  All must have the same deadline (one service
    has one setting).  Safe to repeat with the same ids, and `is_again`, when nobody knows
    whether the first time was committed.  Does not commit.
    """
    known = await _find_born(conn, [job.id for job in jobs]) if is_again else {}
    new = [job for job in jobs if job.id not in known]
    desk = _Desk(service)
    once = {(job.place, job.once.kind) for job in new if job.place and job.once}
    if once:
        desk.held = await repeats.hold(conn, once)
        desk.earlier = await repeats.find(conn, {place for place, _ in once})
    if names := desk.accounts_to_lock(new):
        desk.accounts, desk.now = await accounts.lock(conn, names)
    for job in new:
        desk.judge(job)
    born = known | await _insert(conn, desk.accepted, first_day=desk.first_day)
    return [desk.answer(job, born) for job in jobs]


async def objection_to(
    conn: AsyncConnection, jobs: Sequence[NewJob], *, service: Budget
) -> ServiceError | None:
    """Say why one of the jobs would be refused at this moment, if so: the first such reason.

    Each is judged as if those before it had been accepted.  Changes and locks nothing.
    """
    desk = _Desk(service)
    if names := desk.accounts_to_lock(jobs):
        desk.accounts, desk.now = await accounts.glance(conn, names)
    for job in jobs:
        if (found := desk.objection(job)) is not None:
            return found
        desk.count(job)
    return None


class _Desk:
    """Judges one job after the other; each sees what was accepted before it."""

    def __init__(self, service: Budget) -> None:
        self._service = service
        self.held: Collection[Place] = ()
        self.earlier: Mapping[Place, Earlier] = {}
        self.accounts: dict[str, Account] = {}
        self.now = datetime.now(UTC)
        self.accepted: list[NewJob] = []
        self._made: dict[Place, NewJob] = {}
        self._answers: dict[UUID, Birth | ServiceError | UUID] = {}

    def accounts_to_lock(self, jobs: Sequence[NewJob]) -> set[str]:
        """Name all accounts of the jobs, if one of them has terms; none otherwise.

        All, because they are written at the end, and everybody locks in the same order.
        """
        if not any(terms.applies for job in jobs for _, terms in self._terms(job)):
            return set()
        names = {name for job in jobs for name, _ in self._terms(job)}
        return names

    def _terms(self, job: NewJob) -> list[tuple[str, Terms]]:
        """List the accounts the job counts in, and what each allows."""
        found = []
        if job.key_id is not None:
            terms = Terms("key", job.limits, job.budget)
            found.append((accounts.account_of(job.key_id), terms))
        terms = Terms(SERVICE, budget=self._service, is_told=job.is_trusted)
        if job.worst_usd is not None or terms.applies:
            found.append((SERVICE, terms))
        return found

    @property
    def first_day(self) -> date:
        """Give the latest day of the accounts: a clock that went back must not escape it."""
        return max((one.day for one in self.accounts.values()), default=_LONG_AGO)

    def count(self, job: NewJob) -> None:
        """Have the job in its accounts, for those that are judged after it."""
        for name, _ in self._terms(job):
            if name in self.accounts:  # locked, for somebody has terms
                self.accounts[name] = self.accounts[name].with_job(job.worst_usd)

    def judge(self, job: NewJob) -> None:
        """Accept the job, or note why not, or which one was made before."""
        found = self._seen(job) or self.objection(job)
        if found is not None:
            self._answers[job.id] = found
            return
        self.count(job)
        self.accepted.append(job)
        if job.place is not None:
            self._made[job.place] = job

    def _seen(self, job: NewJob) -> Birth | ServiceError | UUID | None:
        """Tell what an earlier request of the same key made, here or before."""
        if job.once is None or job.place is None:
            return None
        if job.place not in self.held:
            return InProgress("The first request with this key is being accepted.")
        if (made := self._made.get(job.place)) is not None:
            assert made.once is not None
            just_now = Earlier(made.id, made.once.fingerprint, self.now)
            found = repeats.heed(job.once, just_now)
            if found is None:
                return None
            return found if isinstance(found, KeyReused) else made.id
        if (before := self.earlier.get(job.place)) is None:
            return None
        found = repeats.heed(job.once, before)
        if isinstance(found, Earlier):
            return Birth(found.job_id, found.created_at, is_repeat=True)
        return found

    def objection(self, job: NewJob) -> ServiceError | None:
        """Say why the job must not be accepted, if so."""
        for name, terms in self._terms(job):
            if terms.applies:
                account = self.accounts[name]
                found = objection(terms, account, job.worst_usd, self.now)
                if found is not None:
                    return found
        return None

    def answer(
        self, job: NewJob, born: Mapping[UUID, datetime]
    ) -> Birth | ServiceError:
        """Say what became of a job, once it is known when the accepted ones were born."""
        found = self._answers.get(job.id, job.id)
        if isinstance(found, UUID):
            return Birth(found, born[found], is_repeat=found != job.id)
        return found


async def _find_born(
    conn: AsyncConnection, ids: Sequence[UUID]
) -> dict[UUID, datetime]:
    rows = await conn.execute(_BORN, {"ids": list(ids)})
    return {row.id: row.created_at for row in rows}


async def _insert(
    conn: AsyncConnection, jobs: Sequence[NewJob], *, first_day: date
) -> dict[UUID, datetime]:
    """Write the jobs and whatever goes with them; answer when each was born.

    None is born before `first_day`, in whose budget it was let in.
    """
    if not jobs:
        return {}
    deadline = jobs[0].deadline
    not_before = datetime.combine(first_day, time(), UTC)
    values: dict[str, Any] = {"deadline": deadline, "not_before": not_before}
    values |= arrays(map(_row, jobs), _NEW_COLUMNS, alias="new")
    born = {row.id: row.created_at for row in await conn.execute(_INSERT_JOBS, values)}
    # One row each, also when a submit was repeated within the batch.
    fresh = list({job.id: job for job in jobs if job.id in born}.values())
    if fresh:
        await _book(conn, fresh, deadline, born)
    if repeated := [job.id for job in jobs if job.id not in born]:
        born |= await _find_born(conn, repeated)
    return born


async def _book(
    conn: AsyncConnection,
    jobs: Sequence[NewJob],
    deadline: timedelta,
    born: Mapping[UUID, datetime],
) -> None:
    """Write the jobs' first events, what they hold of the budgets, and the keys they came with."""
    births = [
        {
            "job_id": job.id,
            "data": {
                "deadline": deadline.total_seconds(),
                "warnings": list(job.warnings),
            },
            "at": born[job.id],
        }
        for job in jobs
    ]
    values = arrays(births, ("job_id", "data", "at"), alias="born")
    moved = [(_movement(job, born[job.id]), job.worst_usd) for job in jobs]
    booked = accounts.booked_accepted(moved)
    if booked:
        entries = [
            movement.entry(accounts.RESERVE, usd, born[movement.job_id])
            for movement, usd in moved
            if usd is not None
        ]
        values |= arrays(entries, accounts.ENTRY_COLUMNS, alias="entry")
        values |= arrays(booked, accounts.ACCEPTED_COLUMNS, alias="accepted")
    await conn.execute(_BOOKED if booked else _INSERT_BIRTHS, values)
    made = [(job.place, job.once, job.id) for job in jobs if job.place and job.once]
    if made:
        await repeats.record(conn, made, born[jobs[0].id])


def _movement(job: NewJob, born: datetime) -> Movement:
    return Movement(
        job.id, job.owner, job.key_id, job.request.model, accounts.day_of(born)
    )


def _row(job: NewJob) -> dict[str, Any]:
    return {
        "id": job.id,
        "provider": job.provider,
        "model": job.request.model,
        "prompt": job.prompt,
        "input": dict(job.request.input),
        "num_outputs": job.num_outputs,
        "priority": job.priority,
        "webhook_url": job.webhook_url,
        "metadata": job.metadata,
        "request_id": job.request_id,
        "retry_of": job.retry_of,
        "warnings": list(job.warnings),
        "owner": job.owner,
        "key_id": job.key_id,
        "is_public": job.is_public,
        "uploads": dict(job.uploads),
        "reserved_usd": job.worst_usd,
    }
