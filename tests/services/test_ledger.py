"""Many callers, few transactions; and a clear word in time when there is no database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.database import open_engine
from app.domain.errors import LostClaim, NotFound, Unavailable
from app.domain.events import CancelRequested, Refused, Started
from app.domain.generation import RefusalKind
from app.domain.policy import Policy
from app.domain.state import JobState
from app.services.job_records import Claim
from app.services.job_service import Change, Hold
from app.services.ledger import Ledger
from tests.support.jobs import FAILURE, JobTable, new_job
from tests.support.tcp_proxy import TcpProxy

MANY = 150
NOBODY = UUID(int=7)
PROMISE = 2.0  # seconds


@dataclass
class Traffic:
    """What an engine sent so far."""

    commits: int = 0
    statements: list[str] = field(default_factory=list)


@pytest.fixture
def traffic(engine: AsyncEngine) -> Traffic:
    seen = Traffic()

    @event.listens_for(engine.sync_engine, "commit")
    def _commit(conn: object) -> None:
        seen.commits += 1

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def _execute(conn: object, cursor: object, statement: str, *more: object) -> None:
        seen.statements.append(statement)

    return seen


@pytest.fixture
def ledger(engine: AsyncEngine) -> Ledger:
    return Ledger(engine, Policy())


def _started(claim: Claim, handle: str) -> Change:
    return Change(claim.job_id, Started(handle), Hold.RELEASE, claim.token)


# ------------------------------------------------------------------------------ together


async def test_submits_at_the_same_time_share_transactions(
    ledger: Ledger, jobs: JobTable, traffic: Traffic
) -> None:
    new = [new_job() for _ in range(MANY)]

    born = await asyncio.gather(*(ledger.submit(job) for job in new))

    assert traffic.commits <= 4
    rows = [await jobs.row(job.id) for job in new[::10]]
    assert [row.created_at for row in rows] == [one.at for one in born[::10]]


async def test_changes_at_the_same_time_share_transactions(
    ledger: Ledger, jobs: JobTable, traffic: Traffic
) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(MANY)))
    claims = await jobs.claim(*ids)
    before = traffic.commits

    outcomes = await asyncio.gather(
        *(ledger.change(_started(claim, f"h-{n}")) for n, claim in enumerate(claims))
    )

    assert traffic.commits - before <= 3
    assert {outcome.after.stage for outcome in outcomes} == {"generating"}


async def test_reads_at_the_same_time_share_statements(
    ledger: Ledger, jobs: JobTable, traffic: Traffic
) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(MANY)))
    before = len(traffic.statements)

    records = await asyncio.gather(
        *(ledger.read(job_id, realm=None) for job_id in [*ids, *ids])
    )

    assert len(traffic.statements) - before <= 6
    assert [record.row.id for record in records] == [*ids, *ids]


@pytest.mark.parametrize("verb", ["submit", "change", "read"])
async def test_one_call_right_after_another_is_not_left_waiting(
    ledger: Ledger, jobs: JobTable, verb: str
) -> None:
    (job_id,) = await jobs.submit()

    async def call() -> None:
        match verb:
            case "submit":
                await ledger.submit(new_job())
            case "change":
                await ledger.change(Change(job_id, CancelRequested()))
            case _:
                await ledger.read(job_id, realm=None)

    began = time.monotonic()
    for _ in range(4):
        await call()

    assert time.monotonic() - began < 1.0


async def test_a_lone_call_is_one_transaction(ledger: Ledger, traffic: Traffic) -> None:
    await ledger.submit(new_job())

    assert traffic.commits == 1


# ------------------------------------------------------------------------- each by itself


async def test_one_bad_job_is_refused_alone(ledger: Ledger, jobs: JobTable) -> None:
    bad = new_job(provider="x" * 33)  # longer than the column
    new = [new_job(), bad, new_job(), new_job(), new_job()]

    answers = await asyncio.gather(
        *(ledger.submit(job) for job in new), return_exceptions=True
    )

    assert [isinstance(answer, DBAPIError) for answer in answers] == [
        *(False, True, False, False, False)
    ]
    assert await jobs.due() == sorted(job.id for job in new if job is not bad)


async def test_one_lost_claim_is_refused_alone(ledger: Ledger, jobs: JobTable) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(4)))
    claims = {claim.job_id: claim for claim in await jobs.claim(*ids)}
    await jobs.make_due(ids[1])
    await jobs.claim(ids[1])
    changes = [_started(claims[job_id], f"h-{job_id}") for job_id in ids]

    answers = await asyncio.gather(
        *(ledger.change(change) for change in [*changes, Change(NOBODY, Started("h"))]),
        return_exceptions=True,
    )

    kinds = [type(answer).__name__ for answer in answers]
    assert kinds == ["Outcome", LostClaim.__name__, "Outcome", "Outcome", "NotFound"]


async def test_one_taken_handle_is_refused_alone(
    ledger: Ledger, jobs: JobTable
) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(3)))
    claims = await jobs.claim(*ids)
    handles = ["h-1", "h-2", "h-1"]

    answers = await asyncio.gather(
        *(ledger.change(_started(c, h)) for c, h in zip(claims, handles)),
        return_exceptions=True,
    )

    assert sum(isinstance(answer, DBAPIError) for answer in answers) == 1
    assert await jobs.handles() == {"h-1", "h-2"}


async def test_one_unknown_id_is_refused_alone(ledger: Ledger, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()

    answers = await asyncio.gather(
        ledger.read(job_id, realm=None),
        ledger.read(NOBODY, realm=None),
        return_exceptions=True,
    )

    assert isinstance(answers[1], NotFound)
    assert not isinstance(answers[0], BaseException)


async def test_a_repeated_submit_is_harmless(ledger: Ledger, jobs: JobTable) -> None:
    job = new_job()

    born = await asyncio.gather(*(ledger.submit(job) for _ in range(5)))
    await jobs.look(job.id, Started("h-1"))
    again = await ledger.submit(job)

    assert {*born, again} == {born[0]}
    assert (await jobs.state(job.id)).stage == "generating"
    assert len(await jobs.events(job.id)) == 3


# ------------------------------------------------------------------------ no database


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[TcpProxy]:
    parts = urlsplit(database_url)
    assert parts.hostname is not None and parts.port is not None
    async with TcpProxy(parts.hostname, parts.port) as wire:
        yield wire


@pytest.fixture
async def wired(wire: TcpProxy, database_url: str) -> AsyncIterator[Ledger]:
    """A ledger whose connections lead through the wire."""
    parts = urlsplit(database_url)
    login = parts.netloc.rpartition("@")[0]
    netloc = f"{login}@127.0.0.1:{wire.port}" if login else f"127.0.0.1:{wire.port}"
    url = parts._replace(netloc=netloc).geturl()
    async with AsyncExitStack() as stack:
        engine = open_engine(SecretStr(url), name="wired", pool_size=4)
        stack.push_async_callback(engine.dispose)
        yield Ledger(engine, Policy())


@pytest.mark.parametrize("outage", ["refused", "silent"])
@pytest.mark.parametrize("pool", ["cold", "warm"])
async def test_without_the_database_everybody_hears_so_in_time(
    wired: Ledger, wire: TcpProxy, jobs: JobTable, outage: str, pool: str
) -> None:
    (job_id,) = await jobs.submit()
    if pool == "warm":
        await asyncio.gather(wired.read(job_id, realm=None), wired.submit(new_job()))
    await (wire.refuse() if outage == "refused" else wire.fall_silent())
    began = time.monotonic()

    answers = await asyncio.gather(
        *(wired.submit(new_job()) for _ in range(5)),
        *(wired.read(job_id, realm=None) for _ in range(5)),
        *(wired.change(Change(job_id, CancelRequested())) for _ in range(5)),
        return_exceptions=True,
    )

    assert time.monotonic() - began < PROMISE
    assert {type(answer) for answer in answers} == {Unavailable}
    await wire.restore()
    assert (await wired.read(job_id, realm=None)).row.status == "pending"
    assert await wired.submit(new_job())


async def test_a_restart_of_the_database_is_not_noticed_by_submits_and_reads(
    wired: Ledger, wire: TcpProxy, jobs: JobTable
) -> None:
    (job_id,) = await jobs.submit()
    await asyncio.gather(wired.read(job_id, realm=None), wired.submit(new_job()))

    await wire.refuse()
    await wire.restore()
    assert (await wired.read(job_id, realm=None)).row.id == job_id
    await wire.refuse()
    await wire.restore()

    assert await wired.submit(new_job())


async def test_without_the_database_claims_and_renewals_say_so(
    wired: Ledger, wire: TcpProxy, jobs: JobTable
) -> None:
    ids = await jobs.submit(new_job(), new_job())
    (claim,) = await jobs.claim(ids[0])
    await wire.refuse()

    with pytest.raises(Unavailable):
        await wired.claim(ids, starts=2)
    with pytest.raises(Unavailable):
        await wired.renew([claim])


# ---------------------------------------------------------------------------------- ends


async def test_every_end_of_a_job_is_told_once_wherever_it_comes(
    jobs: JobTable,
) -> None:
    ended: list[JobState] = []
    ledger = Ledger(jobs.engine, Policy(), on_end=ended.append)
    cancelled, late, refused = await jobs.submit(new_job(), new_job(), new_job())
    await jobs.expire(late)

    await ledger.change(Change(cancelled, CancelRequested()))
    await ledger.change(Change(cancelled, CancelRequested()))
    assert await ledger.claim([late], starts=1) == []
    assert await ledger.claim([late], starts=1) == []
    (claim,) = await ledger.claim([refused], starts=1)
    permanent = Refused(RefusalKind.PERMANENT, FAILURE)
    await ledger.change(Change(refused, permanent, Hold.RELEASE, claim.token))

    told = [
        (state.status.value, state.failure and state.failure.code) for state in ended
    ]
    assert told == [
        ("cancelled", None),
        ("failed", "deadline_exceeded"),
        ("failed", FAILURE.code),
    ]
