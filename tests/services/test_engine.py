"""The worker's loop, with looks that do what the test says and a real table below."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from sqlalchemy import text

from app.core.database import open_engine
from app.core.throttle import TokenBucket
from app.domain.errors import Unavailable
from app.domain.events import (
    Event,
    GenerationFailed,
    Progressed,
    Refused,
    Started,
)
from app.domain.generation import Failure, RefusalKind
from app.domain.policy import Policy
from app.services import engine as engine_module
from app.services import ledger as ledger_module
from app.services.engine import Engine
from app.services.job_records import Claim
from app.services.job_service import Change, Hold
from app.services.ledger import Ledger
from app.services.starts import never
from tests.support.jobs import JobTable
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for_async

PATIENCE = timedelta(seconds=5)
NO = Refused(RefusalKind.PERMANENT, Failure("no", "No.", False))
NO_PICTURE = GenerationFailed(Failure("no", "No.", False), is_transient=False)
PLENTY = 60_000


class RecordingLedger(Ledger):
    """Notes what is claimed together; `gate` holds back the answers of claims."""

    def __init__(self, jobs: JobTable, policy: Policy) -> None:
        super().__init__(jobs.engine, policy)
        self.batches: list[int] = []
        self.failures = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def claim(self, job_ids: Sequence[UUID], *, starts: int) -> list[Claim]:
        """Claim, then wait for the gate."""
        self.batches.append(len(job_ids))
        try:
            claims = await super().claim(job_ids, starts=starts)
        except Unavailable:
            self.failures += 1
            raise
        await self.gate.wait()
        return claims


class Looks:
    """A runner that writes `event` down at the end of each look, once the gate is open."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.event: Callable[[Claim], Event] = lambda claim: NO
        self.begun: list[tuple[float, Claim]] = []
        self.cut_off: list[UUID] = []
        self.under_way = 0
        self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def count(self) -> Counter[UUID]:
        """How often each job was looked at."""
        return Counter(claim.job_id for _, claim in self.begun)

    async def advance(self, claim: Claim) -> timedelta | None:
        """Look."""
        self.begun.append((asyncio.get_running_loop().time(), claim))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.gate.wait()
            change = Change(claim.job_id, self.event(claim), Hold.RELEASE, claim.token)
            return (await self._ledger.change(change)).next_look
        except asyncio.CancelledError:
            self.cut_off.append(claim.job_id)
            raise
        finally:
            self.under_way -= 1

    async def reach(self, count: int, within: float = 30.0) -> None:
        """Wait until so many looks have begun."""

        async def are_begun() -> bool:
            return len(self.begun) >= count

        await wait_for_async(are_begun, within=within, what=f"{count} looks")


class Rig:
    """An engine, what it works on, and the budget it buys from."""

    def __init__(self, ledger: RecordingLedger, looks: Looks, redis: Redis) -> None:
        self.ledger, self.looks, self._redis = ledger, looks, redis
        self._engines: list[Engine] = []

    def start(
        self,
        *,
        concurrency: int = 100,
        per_minute: int = PLENTY,
        burst: int = 1000,
        is_paused: Callable[[], Awaitable[bool]] = never,
    ) -> Engine:
        """Start an engine; it is drained at the end of the test."""
        # A bucket that is slow to answer on a busy machine is no bucket that is away.
        self.bucket = TokenBucket(
            self._redis,
            "test",
            per_minute=per_minute,
            burst=burst,
            patience=timedelta(seconds=30),
        )
        engine = Engine(
            ledger=self.ledger,
            runner=self.looks,
            purchases=self.bucket,
            concurrency=concurrency,
            is_paused=is_paused,
        )
        engine.start()
        self._engines.append(engine)
        return engine

    async def close(self) -> None:
        """End every engine."""
        self.looks.gate.set()
        self.ledger.gate.set()
        for engine in self._engines:
            await engine.drain(PATIENCE)


@pytest.fixture
async def rig(jobs: JobTable, redis_url: str) -> AsyncIterator[Rig]:
    jobs.policy = Policy(
        shortest_look=timedelta(milliseconds=200),
        straggler_look=timedelta(milliseconds=200),
        longest_look=timedelta(milliseconds=200),
        unknown_usual=timedelta(milliseconds=10),
    )
    ledger = RecordingLedger(jobs, jobs.policy)
    async with Redis.from_url(redis_url) as redis:
        rig = Rig(ledger, Looks(ledger), redis)
        yield rig
        await rig.close()


async def _submit(jobs: JobTable, count: int) -> list[UUID]:
    return [(await jobs.submit())[0] for _ in range(count)]


# ------------------------------------------------------------------------------- claiming


async def test_what_is_offered_together_is_claimed_together(
    rig: Rig, jobs: JobTable
) -> None:
    ids = await _submit(jobs, 50)
    engine = rig.start()

    engine.offer(ids)
    await rig.looks.reach(50)

    assert rig.ledger.batches == [50]


async def test_never_more_looks_at_once_than_allowed(rig: Rig, jobs: JobTable) -> None:
    ids = await _submit(jobs, 14)
    for number, job_id in enumerate(ids):
        await jobs.look(job_id, Started(f"h-{number}"))
    await jobs.make_due(*ids)
    engine = rig.start(concurrency=4)
    rig.looks.event = lambda claim: NO_PICTURE
    rig.looks.gate.clear()

    engine.offer(ids)
    await rig.looks.reach(4)
    assert (engine.in_flight, engine.room) == (4, 0)
    rig.looks.gate.set()
    await rig.looks.reach(14)

    assert rig.looks.most == 4
    assert max(rig.ledger.batches) <= 4
    assert engine.room == 8
    assert set(rig.looks.count.values()) == {1}


async def test_never_more_starts_at_once_than_there_are_looks(
    rig: Rig, jobs: JobTable
) -> None:
    ids = await _submit(jobs, 14)
    engine = rig.start(concurrency=4)
    rig.looks.gate.clear()

    engine.offer(ids)
    await rig.looks.reach(4)
    assert engine.in_flight == 4
    rig.looks.gate.set()
    await rig.looks.reach(14)

    assert rig.looks.most == 4
    assert set(rig.looks.count.values()) == {1}


async def test_a_job_offered_many_times_is_looked_at_once(
    rig: Rig, jobs: JobTable
) -> None:
    ids = await _submit(jobs, 2)
    engine = rig.start()
    rig.looks.gate.clear()

    engine.offer([*ids, *ids])
    engine.offer(ids)
    await rig.looks.reach(2)
    engine.offer(ids)

    async def is_claimed_again() -> bool:
        return len(rig.ledger.batches) == 2

    await wait_for_async(is_claimed_again, within=5, what="a claim in vain")
    assert rig.ledger.batches == [2, 2]
    assert rig.looks.count == Counter(ids)


async def test_nobody_knows_an_id_and_nothing_happens(rig: Rig, jobs: JobTable) -> None:
    (job_id,) = await _submit(jobs, 1)
    engine = rig.start()

    engine.offer([UUID(int=7), job_id])
    await rig.looks.reach(1)

    assert rig.looks.count == Counter([job_id])


# --------------------------------------------------------------------------------- timers


async def test_a_job_is_looked_at_again_when_its_next_look_is_due(
    rig: Rig, jobs: JobTable
) -> None:
    (job_id,) = await _submit(jobs, 1)
    engine = rig.start()
    rig.looks.event = lambda claim: (
        Started("h-1") if claim.is_fresh else Progressed(0.5)
    )

    engine.offer([job_id])
    await rig.looks.reach(4)

    moments = [moment for moment, _ in rig.looks.begun]
    gaps = [later - sooner for sooner, later in zip(moments, moments[1:])]
    assert min(gaps) >= 0.2
    assert sorted(gaps)[0] < 0.35, "the watcher would take much longer"
    # One claim for one look: none came early, in vain.
    assert rig.ledger.batches == [1] * len(rig.looks.begun)


async def test_a_bell_before_the_timer_takes_its_place(
    rig: Rig, jobs: JobTable
) -> None:
    (job_id,) = await _submit(jobs, 1)
    engine = rig.start()
    rig.looks.event = lambda claim: Started("h-1") if claim.is_fresh else NO_PICTURE
    engine.offer([job_id])

    async def is_settled() -> bool:
        return (await jobs.state(job_id)).stage == "generating"

    await wait_for_async(is_settled, within=5, what="the first look")
    await jobs.make_due(job_id)
    engine.offer([job_id])
    await rig.looks.reach(2)
    (other,) = await _submit(jobs, 1)
    rig.looks.event = lambda claim: Started("h-2") if claim.is_fresh else NO_PICTURE
    engine.offer([other])
    await rig.looks.reach(4)

    assert rig.looks.count == Counter({job_id: 2, other: 2})
    assert rig.ledger.batches == [1] * 4, "the timer of the first job did not ring"


# --------------------------------------------------------------------------------- budget


async def test_no_more_starts_than_the_budget_lets(rig: Rig, jobs: JobTable) -> None:
    ids = await _submit(jobs, 8)
    engine = rig.start(per_minute=1, burst=3)

    engine.offer(ids)
    await rig.looks.reach(3)

    assert not engine.may_start
    assert len(rig.looks.begun) == 3
    states = [await jobs.state(job_id) for job_id in ids]
    assert sum(state.status == "pending" for state in states) == 5


async def test_looks_under_way_need_no_budget(rig: Rig, jobs: JobTable) -> None:
    (job_id,) = await _submit(jobs, 1)
    await jobs.look(job_id, Started("h-1"))
    await jobs.make_due(job_id)
    engine = rig.start(per_minute=1, burst=1)
    await rig.bucket.take(1)
    rig.looks.event = lambda claim: NO_PICTURE

    engine.offer([job_id])
    await rig.looks.reach(1)

    assert not engine.may_start


async def test_what_is_left_of_the_budget_is_given_back(
    rig: Rig, jobs: JobTable
) -> None:
    ids = await _submit(jobs, 5)
    await jobs.claim(*ids[:3])
    engine = rig.start(per_minute=1, burst=10)

    engine.offer(ids)
    await rig.looks.reach(2)

    assert engine.may_start
    assert (await rig.bucket.take(10)).granted == 8


async def test_the_budget_opens_again(rig: Rig, jobs: JobTable) -> None:
    ids = await _submit(jobs, 3)
    engine = rig.start(per_minute=240, burst=1)
    began = asyncio.get_running_loop().time()
    engine.offer(ids)
    await rig.looks.reach(1)
    assert not engine.may_start

    await rig.looks.reach(3, within=2)
    assert rig.looks.begun[2][0] - began > 0.49, "a token each quarter of a second"


# --------------------------------------------------------------------------------- leases


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "LEASE", timedelta(milliseconds=600))
    monkeypatch.setattr(engine_module, "RENEW_EVERY", timedelta(milliseconds=100))


async def test_a_look_longer_than_its_lease_keeps_the_job(
    short_leases: None, rig: Rig, jobs: JobTable
) -> None:
    (job_id,) = await _submit(jobs, 1)
    rig.looks.gate.clear()
    rig.start().offer([job_id])
    await rig.looks.reach(1)
    first = (await jobs.row(job_id)).due_at

    async def has_outlived_its_lease() -> bool:
        assert await jobs.claim(job_id) == []
        return (await jobs.row(job_id)).now > first + timedelta(milliseconds=200)

    await wait_for_async(has_outlived_its_lease, within=5, what="the time")
    rig.looks.gate.set()

    async def is_settled() -> bool:
        return (await jobs.state(job_id)).is_terminal

    await wait_for_async(is_settled, within=5, what="the settle")
    assert rig.looks.cut_off == []


async def test_a_look_whose_claim_was_taken_over_is_ended(
    short_leases: None, rig: Rig, jobs: JobTable
) -> None:
    ids = await _submit(jobs, 2)
    rig.looks.gate.clear()
    engine = rig.start()
    engine.offer(ids)
    await rig.looks.reach(2)

    await jobs.make_due(ids[0])
    (taken,) = await jobs.claim(ids[0])

    async def is_ended() -> bool:
        return bool(rig.looks.cut_off)

    await wait_for_async(is_ended, within=5, what="the end of the look")
    assert rig.looks.cut_off == [ids[0]]
    assert engine.in_flight == 1
    assert await jobs.renew(taken) == {taken.token}


# ---------------------------------------------------------------------------------- drain


async def test_draining_finishes_looks_and_takes_nothing_more(
    rig: Rig, jobs: JobTable
) -> None:
    ids = await _submit(jobs, 3)
    rig.looks.gate.clear()
    engine = rig.start()
    engine.offer(ids[:2])
    await rig.looks.reach(2)

    draining = asyncio.create_task(engine.drain(PATIENCE))
    await asyncio.sleep(0)
    engine.offer(ids[2:])
    assert engine.room == 0
    rig.looks.gate.set()
    await draining

    assert [(await jobs.state(job_id)).status for job_id in ids] == [
        *("failed", "failed", "pending")
    ]
    assert (rig.looks.cut_off, engine.in_flight) == ([], 0)


async def test_draining_drops_what_only_waits(rig: Rig, jobs: JobTable) -> None:
    ids = await _submit(jobs, 3)
    rig.looks.gate.clear()
    engine = rig.start(concurrency=1)
    engine.offer(ids)
    await rig.looks.reach(1)

    draining = asyncio.create_task(engine.drain(PATIENCE))
    await asyncio.sleep(0)
    rig.looks.gate.set()
    await draining

    assert len(rig.looks.begun) == 1
    assert len(await jobs.claim(*ids)) == 2, "free for others at once"


async def test_draining_cuts_off_what_takes_too_long(rig: Rig, jobs: JobTable) -> None:
    (job_id,) = await _submit(jobs, 1)
    rig.looks.gate.clear()
    engine = rig.start()
    engine.offer([job_id])
    await rig.looks.reach(1)

    await engine.drain(timedelta(milliseconds=50))

    assert rig.looks.cut_off == [job_id]
    row = await jobs.row(job_id)
    assert row.claim_token is not None, "its lease hands it on"


async def test_draining_during_a_claim_looks_at_what_was_claimed(
    rig: Rig, jobs: JobTable
) -> None:
    ids = await _submit(jobs, 3)
    rig.ledger.gate.clear()
    engine = rig.start()
    engine.offer(ids)

    async def are_claimed() -> bool:
        rows = [await jobs.row(job_id) for job_id in ids]
        return all(row.claim_token is not None for row in rows)

    await wait_for_async(are_claimed, within=5, what="the claims")
    draining = asyncio.create_task(engine.drain(PATIENCE))
    await asyncio.sleep(0)
    assert not draining.done()
    rig.ledger.gate.set()
    await draining

    assert rig.looks.count == Counter(ids)
    assert {(await jobs.state(job_id)).status for job_id in ids} == {"failed"}


async def test_draining_an_idle_engine_ends_at_once(rig: Rig) -> None:
    engine = rig.start()

    async with asyncio.timeout(1):
        await engine.drain(PATIENCE)


# --------------------------------------------------------------------------------- outages


async def test_the_engine_outlives_an_outage_of_the_database(
    rig: Rig, jobs: JobTable, database_url: str
) -> None:
    parts = urlsplit(database_url)
    assert parts.hostname is not None and parts.port is not None
    (job_id,) = await _submit(jobs, 1)
    async with TcpProxy(parts.hostname, parts.port) as wire:
        login = parts.netloc.rpartition("@")[0]
        netloc = f"{login}@127.0.0.1:{wire.port}" if login else f"127.0.0.1:{wire.port}"
        url = SecretStr(parts._replace(netloc=netloc).geturl())
        rig.ledger.engine = open_engine(url, name="wired", pool_size=2)
        engine = rig.start()
        await wire.refuse()

        engine.offer([job_id])

        async def was_in_vain() -> bool:
            return rig.ledger.failures > 0

        await wait_for_async(was_in_vain, within=5, what="a claim in vain")
        await wire.restore()
        engine.offer([job_id])
        await rig.looks.reach(1)
        await engine.drain(PATIENCE)
        await rig.ledger.engine.dispose()

    assert engine.may_start
    assert (await rig.bucket.take(1000)).granted >= 999, "the tokens came back"


async def test_the_engine_outlives_a_database_that_is_not_migrated(
    rig: Rig, jobs: JobTable
) -> None:
    (job_id,) = await _submit(jobs, 1)
    engine = rig.start()
    async with jobs.engine.begin() as conn:
        await conn.execute(text("ALTER TABLE jobs RENAME TO elsewhere"))
    engine.offer([job_id])

    async def was_claimed_in_vain() -> bool:
        return bool(rig.ledger.batches)

    await wait_for_async(was_claimed_in_vain, within=5, what="a claim in vain")
    async with jobs.engine.begin() as conn:
        await conn.execute(text("ALTER TABLE elsewhere RENAME TO jobs"))

    async def is_looked_at() -> bool:
        engine.offer([job_id])
        return bool(rig.looks.begun)

    await wait_for_async(is_looked_at, within=5, what="the look", every=0.1)


async def test_renewing_outlives_a_statement_that_fails(
    short_leases: None, rig: Rig, jobs: JobTable
) -> None:
    """Such as the loser of a deadlock: the looks it spoke for go on."""
    (job_id,) = await _submit(jobs, 1)
    rig.looks.gate.clear()
    rig.start().offer([job_id])
    await rig.looks.reach(1)
    before = (await jobs.row(job_id)).due_at
    async with jobs.engine.begin() as conn:
        await conn.execute(
            text(
                "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01'; END $$"
            )
        )
        await conn.execute(
            text(
                "CREATE TRIGGER deadlock BEFORE UPDATE ON jobs EXECUTE FUNCTION lose()"
            )
        )
    seen = (await jobs.row(job_id)).now

    async def has_failed() -> bool:
        return (await jobs.row(job_id)).now > seen + timedelta(milliseconds=250)

    await wait_for_async(has_failed, within=5, what="a renewal in vain")
    async with jobs.engine.begin() as conn:
        await conn.execute(text("DROP TRIGGER deadlock ON jobs"))
    healed = (await jobs.row(job_id)).due_at

    async def is_renewed() -> bool:
        return (await jobs.row(job_id)).due_at > healed

    await wait_for_async(is_renewed, within=2, what="the next renewal")
    assert healed >= before


# ------------------------------------------------------------------------------ breakdown


async def test_an_engine_that_serves_no_more_says_so(
    rig: Rig, jobs: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.start()
    breakdown = asyncio.create_task(engine.breakdown())

    async def confuse(batch: object, *, starts: int) -> list[Claim]:
        raise ValueError("a mistake of ours")

    engine.offer(await _submit(jobs, 1))
    await rig.looks.reach(1)
    assert not breakdown.done()
    monkeypatch.setattr(rig.ledger, "claim", confuse)
    engine.offer(await _submit(jobs, 1))

    await asyncio.wait_for(breakdown, timeout=5)


async def test_a_look_that_tidies_up_after_its_settle_is_not_ended(
    monkeypatch: pytest.MonkeyPatch, rig: Rig, jobs: JobTable
) -> None:
    monkeypatch.setattr(engine_module, "RENEW_EVERY", timedelta(milliseconds=100))
    (job_id,) = await _submit(jobs, 1)
    settled, tidied = asyncio.Event(), asyncio.Event()
    advance = rig.looks.advance

    async def slowly(claim: Claim) -> timedelta | None:
        result = await advance(claim)
        settled.set()
        await asyncio.sleep(0.15)  # at least one renewal, at most two
        tidied.set()
        return result

    rig.looks.advance = slowly  # type: ignore[method-assign]
    rig.start().offer([job_id])

    await asyncio.wait_for(settled.wait(), timeout=5)
    await asyncio.wait_for(tidied.wait(), timeout=5)


# ------------------------------------------------------------------------------- a pause


@pytest.mark.parametrize("concurrency", [100, 1])
async def test_while_paused_no_tokens_are_taken_and_looks_go_on(
    rig: Rig, jobs: JobTable, concurrency: int
) -> None:
    waiting, under_way = await _submit(jobs, 3), await _submit(jobs, 3)
    for number, job_id in enumerate(under_way):
        await jobs.look(job_id, Started(f"h-{number}"))
    await jobs.make_due(*under_way)
    rig.looks.event = lambda claim: NO_PICTURE if claim.job_id in under_way else NO
    asked = []
    paused = True

    async def is_paused() -> bool:
        asked.append(paused)
        return paused

    await jobs.pause()
    # One token a minute: those that are there at once are all that can be had.
    engine = rig.start(
        concurrency=concurrency, per_minute=1, burst=10, is_paused=is_paused
    )
    engine.offer(waiting + under_way)
    engine.seek(3)
    await rig.looks.reach(3)
    await wait_for_async(
        _is_idle(engine), within=5, what="the engine has nothing to do"
    )
    before = len(asked)
    assert before < 30, "it asks again and again"
    assert {claim.job_id for _, claim in rig.looks.begun} == set(under_way)
    assert (await rig.bucket.take(10)).granted == 10
    await rig.bucket.give_back(10)

    paused = False
    await jobs.resume()
    engine.seek(3)
    await rig.looks.reach(6)
    assert {claim.job_id for _, claim in rig.looks.begun[3:]} == set(waiting)


def _is_idle(engine: Engine) -> Callable[[], Awaitable[bool]]:
    async def is_idle() -> bool:
        return engine.in_flight == 0 and not engine.is_seeking

    return is_idle
