"""The sweep over the real list of a provider: what it wakes, how far it walks, when it rests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from redis.asyncio import Redis

from app.core.counters import SharedCounters
from app.domain.durations import EARLIER, Durations
from app.domain.errors import ProviderThrottled, ProviderUnavailable
from app.domain.events import CancelRequested, Started
from app.domain.generation import Phase, Prediction
from app.domain.policy import Policy
from app.services import sweep as sweep_module
from app.services.ledger import Ledger
from app.services.reconciler import SKEW
from app.services.sweep import LONGEST_REST, ROUND, ROUND_WITH_WEBHOOKS, ListSweep
from tests.support.jobs import JobTable

MODEL = "acme/painter"  # of the jobs that the factory makes


@dataclass
class Listing:
    """The provider's list; a page at a time, counted."""

    pages: list[list[Prediction]] = field(default_factory=list)
    error: Exception | None = None
    walks: list[datetime] = field(default_factory=list)
    read: int = 0

    async def list_since(self, moment: datetime) -> AsyncIterator[list[Prediction]]:
        """Walk the pages."""
        self.walks.append(moment)
        if self.error is not None:
            raise self.error
        for page in self.pages:
            self.read += 1
            yield page


class Desk:
    """Stands where engine and bell stand."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.offered: list[UUID] = []
        self.rung: list[UUID] = []

    def offer(self, job_ids: Iterable[UUID]) -> None:
        """Take the ids."""
        self.offered += job_ids

    def ring(self, subject: str) -> None:
        """Remember the subject."""
        self.rung.append(UUID(subject))


@dataclass
class Bench:
    """A sweep with a list in a test's hands."""

    jobs: JobTable
    listing: Listing
    desk: Desk
    durations: Durations
    counters: SharedCounters

    def sweep(self, *, per_minute: int = 600_000, webhooks: bool = False) -> ListSweep:
        """Make the duty."""
        return ListSweep(
            ledger=Ledger(self.jobs.engine, Policy()),
            client=self.listing,  # type: ignore[arg-type]
            engine=self.desk,  # type: ignore[arg-type]
            bell=self.desk,  # type: ignore[arg-type]
            durations=self.durations,
            counters=self.counters,
            requests_per_minute=per_minute,
            has_webhooks=webhooks,
        )

    async def running(self, count: int, *, age: float = 1.0) -> list[UUID]:
        """Make jobs whose predictions h-0, h-1, … run for so many seconds."""
        first = len(await self.jobs.handles())
        ids = []
        for number in range(first, first + count):
            (job_id,) = await self.jobs.submit()
            await self.jobs.look(job_id, Started(f"h-{number}"))
            await self.jobs.age(timedelta(seconds=age), job_id)
            ids.append(job_id)
        return ids

    def show(self, *pages: dict[str, Phase]) -> None:
        """Let the list have these pages."""
        self.listing.pages = [
            [Prediction(handle, phase) for handle, phase in page.items()]
            for page in pages
        ]


@pytest.fixture
async def bench(jobs: JobTable, redis_url: str) -> AsyncIterator[Bench]:
    async with Redis.from_url(redis_url) as redis:
        yield Bench(jobs, Listing(), Desk(), Durations(), SharedCounters(redis))


OVER = (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED, Phase.ABORTED)


async def test_jobs_whose_predictions_are_over_are_looked_at(bench: Bench) -> None:
    ids = await bench.running(6)
    phases = (*OVER, Phase.RUNNING, Phase.QUEUED)
    bench.show({f"h-{n}": phase for n, phase in enumerate(phases)})

    assert await bench.sweep().perform() == ROUND

    assert set(bench.desk.offered) == set(ids[:4])
    assert set(await bench.jobs.due()) == set(ids[:4])
    (claim,) = await bench.jobs.claim(ids[0])
    assert claim.state.has_news


async def test_what_does_not_fit_here_is_looked_at_elsewhere(bench: Bench) -> None:
    ids = await bench.running(3)
    bench.desk.room = 1
    bench.show({f"h-{n}": Phase.SUCCEEDED for n in range(3)})

    await bench.sweep().perform()

    assert len(bench.desk.offered) == 1
    assert {*bench.desk.offered, *bench.desk.rung} == set(ids)


async def test_a_second_sweep_tells_nothing_new(bench: Bench) -> None:
    await bench.running(2)
    bench.show({"h-0": Phase.SUCCEEDED, "h-1": Phase.RUNNING})
    sweep = bench.sweep()

    await sweep.perform()
    await sweep.perform()

    assert len(bench.desk.offered) == 1


async def test_strangers_in_the_list_are_left_alone(bench: Bench) -> None:
    await bench.running(1)
    bench.show({"x-1": Phase.SUCCEEDED}, {"h-0": Phase.RUNNING, "x-2": Phase.FAILED})

    await bench.sweep().perform()

    assert (bench.desk.offered, bench.desk.rung) == ([], [])


async def test_nothing_in_flight_costs_no_request(bench: Bench) -> None:
    await bench.jobs.submit()

    assert await bench.sweep().perform() == ROUND
    assert bench.listing.walks == []


async def test_the_list_is_asked_for_since_the_oldest(bench: Bench) -> None:
    await bench.running(1, age=30)
    await bench.running(1, age=5)
    bench.show({})

    await bench.sweep().perform()

    (since,) = bench.listing.walks
    asked = datetime.now(UTC) - since - SKEW
    assert timedelta(seconds=29) < asked < timedelta(seconds=40)


async def test_the_walk_ends_when_all_are_seen(bench: Bench) -> None:
    await bench.running(2)
    bench.show({"h-1": Phase.RUNNING}, {"h-0": Phase.RUNNING}, {"x": Phase.RUNNING})

    await bench.sweep().perform()

    assert bench.listing.read == 2


@pytest.mark.parametrize(("stragglers", "pages"), [(1, 2), (3, 4)])
async def test_the_walk_ends_where_single_looks_cost_less(
    bench: Bench, stragglers: int, pages: int
) -> None:
    await bench.running(stragglers + 1)
    strange = [{f"x-{n}": Phase.RUNNING} for n in range(20)]
    bench.show({f"h-{stragglers}": Phase.RUNNING}, *strange)

    await bench.sweep().perform()

    assert bench.listing.read == pages


async def test_the_next_sweep_waits_for_what_the_pages_cost(bench: Bench) -> None:
    await bench.running(1)
    bench.show(*({f"x-{n}": Phase.RUNNING} for n in range(1)))

    rest = await bench.sweep(per_minute=60).perform()

    # A page a second is the whole budget; the sweep has half of it.
    assert rest == timedelta(seconds=2)


async def test_with_webhooks_the_list_is_only_the_net(bench: Bench) -> None:
    await bench.running(1)
    bench.show({})

    assert await bench.sweep(webhooks=True).perform() == ROUND_WITH_WEBHOOKS


async def test_before_anything_can_be_over_nobody_asks(bench: Bench) -> None:
    bench.durations.learn(MODEL, timedelta(seconds=100))
    await bench.running(1, age=70)

    rest = await bench.sweep().perform()

    assert bench.listing.walks == []
    assert timedelta(seconds=5) < rest < timedelta(seconds=11)
    await bench.running(1, age=79.9)
    await bench.jobs.age(timedelta(seconds=1))
    await bench.sweep().perform()
    assert len(bench.listing.walks) == 1


async def test_the_rest_does_not_outlast_what_may_be_sent_meanwhile(
    bench: Bench,
) -> None:
    bench.durations.learn(MODEL, timedelta(seconds=100))
    bench.durations.learn("acme/sketcher", timedelta(seconds=2))
    await bench.running(1)

    assert await bench.sweep().perform() == timedelta(seconds=2) * EARLIER


async def test_however_long_a_model_takes_the_sweep_looks_up_now_and_then(
    bench: Bench,
) -> None:
    bench.durations.learn(MODEL, timedelta(hours=1))
    await bench.running(1)

    assert await bench.sweep().perform() == LONGEST_REST


async def test_when_throttled_nobody_is_looked_at_instead(bench: Bench) -> None:
    await bench.running(3)
    pause = timedelta(seconds=7)
    bench.listing.error = ProviderThrottled("slow down", retry_after=pause)

    assert await bench.sweep().perform() == pause
    assert bench.desk.offered == []


async def test_without_the_list_jobs_are_looked_at_in_turn(bench: Bench) -> None:
    ids = await bench.running(3)
    bench.listing.error = ProviderUnavailable("the provider answered 500")
    sweep = bench.sweep(per_minute=240)

    rests = [await sweep.perform() for _ in range(3)]

    assert bench.desk.offered == ids, "one a round: the budget lets no more"
    assert min(rests) >= ROUND


async def test_with_many_in_flight_those_seen_running_need_no_look(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "FEW", 3)
    ids = await bench.running(4)
    bench.show({"h-0": Phase.RUNNING, "h-1": Phase.RUNNING, "h-2": Phase.SUCCEEDED})
    await bench.jobs.tell(ids[1], CancelRequested())
    before = [(await bench.jobs.row(one)).due_at for one in ids]

    await bench.sweep().perform()

    after = [(await bench.jobs.row(one)).due_at for one in ids]
    assert after[0] - before[0] > timedelta(seconds=40)
    assert (after[1], after[3]) == (before[1], before[3]), "cancelled; not seen"
    assert after[2] < before[2], "over"
    await bench.sweep().perform()
    again = (await bench.jobs.row(ids[0])).due_at
    assert again == after[0], "put off once in a while, not with each page"


async def test_few_in_flight_look_by_themselves(bench: Bench) -> None:
    (job_id,) = await bench.running(1)
    bench.show({"h-0": Phase.RUNNING})
    before = await bench.jobs.snapshot(job_id)

    await bench.sweep().perform()

    assert await bench.jobs.snapshot(job_id) == before
