"""Purchases that turn up late, and predictions nobody wants, at a real local provider."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis

from app.core.config import Settings
from app.core.counters import SharedCounters
from app.domain.errors import ProviderThrottled
from app.domain.events import NotFound, OutcomeUnknown, Started
from app.domain.generation import GenerationRequest, MediaClient, Started as Bought
from app.domain.policy import Policy
from app.domain.state import AttemptState, Stage
from app.services.callback_urls import callback_url
from app.services.job_service import delete_job
from app.services.ledger import Ledger
from app.services.media_client import Throttle, open_media_client
from app.services.reconciler import Found, Reconciler, Seeker
from app.services.survivors import CancelUnwanted, SearchForLost
from sandbox.config import SandboxConfig
from sandbox.create import BOOK, FAULTS
from sandbox.runner import Sandbox
from tests.support.jobs import JobTable, new_job

FLUX = "black-forest-labs/flux-schnell"
SLOW = SandboxConfig(
    speed=0.0001,
    pictures="plain",
    creates_per_minute=0,
    requests_per_minute=0,
    echo_webhook=True,
)


class RecordingBell:
    """Remembers who was rung for."""

    def __init__(self) -> None:
        self.rung: list[str] = []

    def ring(self, subject: str) -> None:
        """Remember the subject."""
        self.rung.append(subject)


@dataclass
class Bench:
    """Both duties, with everything real around them."""

    sandbox: Sandbox
    jobs: JobTable
    client: MediaClient
    search: SearchForLost
    cancel: CancelUnwanted
    bell: RecordingBell
    counters: SharedCounters
    ledger: Ledger

    async def buy(self, prompt: str, webhook: str | None = None) -> str:
        """Make a prediction at the provider."""
        outcome = await self.client.create(
            GenerationRequest(FLUX, {"prompt": prompt}),
            cancel_after=timedelta(minutes=10),
            webhook=webhook,
        )
        assert isinstance(outcome, Bought)
        return outcome.prediction.handle

    async def lost(self, prompt: str) -> UUID:
        """Make a job whose only attempt was declared lost."""
        request = GenerationRequest(FLUX, {"prompt": prompt})
        (job_id,) = await self.jobs.submit(new_job(request=request))
        await self.jobs.look(job_id, OutcomeUnknown("timeout"))
        await self.jobs.age(self.jobs.policy.grace, job_id)
        await self.jobs.look(job_id, NotFound())
        return job_id

    def status_of(self, handle: str) -> str:
        """Say how a prediction stands at the provider."""
        found = self.sandbox.app[BOOK].find(handle)
        assert found is not None
        return found.status

    def spoil(self, *rules: dict[str, Any]) -> None:
        """Put these faults in force, and no others."""
        self.sandbox.app[FAULTS].replace(list(rules))


@dataclass
class Interrupted:
    """A search in the middle of which somebody deletes a job."""

    bench: Bench
    delete: UUID

    async def search(self, seekers: Sequence[Seeker]) -> Sequence[Found | None]:
        """Search; then cancel and delete the job."""
        reconciler = Reconciler(self.bench.ledger, self.bench.client)
        found = await reconciler.search(seekers)
        await self.bench.jobs.cancel(self.delete)
        async with self.bench.jobs.engine.begin() as conn:
            await delete_job(conn, self.delete, realm=None)
        return found


@dataclass
class Slow:
    """A search that takes a while and finds nothing, or fails."""

    takes: timedelta
    error: Exception | None = None
    now: float = 0.0

    async def search(self, seekers: Sequence[Seeker]) -> Sequence[Found | None]:
        """Let the time pass."""
        self.now += self.takes.total_seconds()
        if self.error is not None:
            raise self.error
        return [None] * len(seekers)


@pytest.fixture
async def bench(
    settings: Callable[..., Settings], redis_url: str, jobs: JobTable
) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(Sandbox(SLOW))
        redis = await stack.enter_async_context(Redis.from_url(redis_url))
        throttle = Throttle.open(
            redis, creates_per_minute=600_000, requests_per_minute=600_000
        )
        client = open_media_client(
            settings(replicate_api_base_url=f"{sandbox.url}/v1"), throttle
        )
        stack.push_async_callback(client.aclose)
        ledger, counters = Ledger(jobs.engine, Policy()), SharedCounters(redis)
        bell = RecordingBell()
        yield Bench(
            sandbox,
            jobs,
            client,
            SearchForLost(
                ledger=ledger,
                reconciler=Reconciler(ledger, client),
                bell=bell,  # type: ignore[arg-type]
                counters=counters,
            ),
            CancelUnwanted(ledger=ledger, client=client, counters=counters),
            bell,
            counters,
            ledger,
        )


async def test_a_purchase_that_turns_up_is_used_by_a_job_that_waits(
    bench: Bench,
) -> None:
    job_id = await bench.lost("a late mill")
    handle = await bench.buy("a late mill")

    await bench.search.perform()

    state = await bench.jobs.state(job_id)
    assert state.stage is Stage.GENERATING
    assert state.attempt is not None
    assert (state.attempt.number, state.attempt.handle) == (1, handle)
    assert bench.bell.rung == [str(job_id)]


async def test_a_purchase_that_turns_up_too_late_is_cancelled(bench: Bench) -> None:
    job_id = await bench.lost("a later mill")
    handle = await bench.buy("a later mill")
    await bench.jobs.look(job_id, Started("another"))

    await bench.search.perform()
    assert bench.status_of(handle) in ("starting", "processing")
    await bench.cancel.perform()

    assert bench.status_of(handle) == "canceled"
    first, _ = await bench.jobs.attempts(job_id)
    assert (first.state, first.handle) == (AttemptState.LOST, handle)
    assert first.cancel_at is None


async def test_one_that_names_its_attempt_is_found_whatever_others_are_buying(
    bench: Bench,
) -> None:
    job_id = await bench.lost("a common mill")
    (attempt,) = await bench.jobs.attempts(job_id)
    request = GenerationRequest(FLUX, {"prompt": "a common mill"})
    (rival,) = await bench.jobs.submit(new_job(request=request))
    await bench.jobs.claim_one(rival)
    theirs = await bench.buy("a common mill")
    await bench.search.perform()
    assert (await bench.jobs.attempts(job_id))[0].handle is None, theirs

    named = await bench.buy(
        "a common mill",
        callback_url("https://x.test/api/v1", attempt.id, attempt.token),
    )
    await bench.search.perform()

    assert (await bench.jobs.attempts(job_id))[0].handle == named


async def test_of_more_than_one_search_takes_the_others_come_next(
    bench: Bench,
) -> None:
    """Else the newest were searched for when their purchases are over, if at all."""
    search = SearchForLost(
        ledger=bench.ledger,
        reconciler=Reconciler(bench.ledger, bench.client),
        bell=bench.bell,  # type: ignore[arg-type]
        counters=bench.counters,
        at_once=2,
    )
    ids = [await bench.lost(f"a mill of many, {number}") for number in range(3)]
    handle = await bench.buy("a mill of many, 2")

    for _ in range(2):
        await search.perform()

    (attempt,) = await bench.jobs.attempts(ids[2])
    assert attempt.handle == handle
    other = await bench.buy("a mill of many, 0")
    await search.perform()
    (attempt,) = await bench.jobs.attempts(ids[0])
    assert attempt.handle == other, "and then the first again"


@pytest.mark.parametrize("error", [None, ProviderThrottled("slow down")])
async def test_a_long_search_is_followed_by_a_longer_rest(
    bench: Bench, error: Exception | None
) -> None:
    await bench.lost("a mill in a long list")
    slow = Slow(timedelta(minutes=2), error)
    search = SearchForLost(
        ledger=bench.ledger,
        reconciler=slow,  # type: ignore[arg-type]
        bell=bench.bell,  # type: ignore[arg-type]
        counters=bench.counters,
        clock=lambda: slow.now,
    )

    assert await search.perform() == timedelta(minutes=8)


async def test_a_job_deleted_during_the_search_does_not_end_it(bench: Bench) -> None:
    gone, waiting = await bench.lost("a mill"), await bench.lost("a second mill")
    await bench.buy("a mill")
    handle = await bench.buy("a second mill")
    search = SearchForLost(
        ledger=bench.ledger,
        reconciler=Interrupted(bench, delete=gone),  # type: ignore[arg-type]
        bell=bench.bell,  # type: ignore[arg-type]
        counters=bench.counters,
    )

    await search.perform()

    (attempt,) = await bench.jobs.attempts(waiting)
    assert attempt.handle == handle


async def test_a_cancellation_the_provider_does_not_hear_is_repeated(
    bench: Bench,
) -> None:
    job_id = await bench.lost("a stubborn mill")
    handle = await bench.buy("a stubborn mill")
    await bench.jobs.cancel(job_id)
    await bench.search.perform()
    bench.spoil({"fault": "get.error", "times": 1})

    await bench.cancel.perform()
    (attempt,) = await bench.jobs.attempts(job_id)
    assert attempt.cancel_at is not None, "nobody saw the provider agree"
    await bench.jobs.age(timedelta(minutes=1), job_id)
    await bench.cancel.perform()

    (attempt,) = await bench.jobs.attempts(job_id)
    assert (attempt.cancel_at, bench.status_of(handle)) == (None, "canceled")


async def test_a_provider_that_denies_the_prediction_is_asked_again_for_its_hour(
    bench: Bench,
) -> None:
    job_id = await bench.lost("a denied mill")
    await bench.buy("a denied mill")
    await bench.jobs.cancel(job_id)
    await bench.search.perform()
    bench.spoil({"fault": "get.not_found"})

    await bench.cancel.perform()
    (attempt,) = await bench.jobs.attempts(job_id)
    assert attempt.cancel_at is not None, "an old answer may deny what runs"
    await bench.jobs.age(bench.jobs.policy.data_lifetime, job_id)
    await bench.cancel.perform()

    (attempt,) = await bench.jobs.attempts(job_id)
    assert attempt.cancel_at is None


async def test_without_anything_lost_the_list_is_not_asked(bench: Bench) -> None:
    bench.spoil({"fault": "list.error"})
    (job_id,) = await bench.jobs.submit()
    await bench.jobs.look(job_id, Started("h-1"))

    await bench.search.perform()
    await bench.cancel.perform()

    (rule,) = bench.sandbox.app[FAULTS].rules()
    assert rule["hits"] == 0
