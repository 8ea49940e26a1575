"""What the worker makes of a provider that refuses to sell or does not answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from redis.asyncio import Redis

from app.core.breaker import CircuitBreaker, GuardedBucket
from app.core.circuit import Condition, Rhythm
from app.core.config import Settings
from app.core.counters import SharedCounters
from app.domain.durations import Durations
from app.domain.generation import GenerationRequest
from app.domain.policy import Policy, RetryPolicy
from app.domain.pricing import PriceTable
from app.domain.state import JobState, Stage, Status
from app.services.engine import Engine
from app.services.job_runner import JobRunner
from app.services.ledger import Ledger
from app.services.media_client import Throttle, open_media_client
from app.services.media_store import open_media_store
from app.services.reconciler import Reconciler
from sandbox.config import SandboxConfig
from sandbox.create import BOOK, FAULTS
from sandbox.runner import Sandbox
from tests.support.jobs import JobTable, new_job
from tests.support.waiting import wait_for_async

FLUX = "black-forest-labs/flux-schnell"
CONFIG = SandboxConfig(
    speed=0, pictures="plain", creates_per_minute=0, requests_per_minute=0
)
MILLISECOND = timedelta(milliseconds=1)
POLICY = Policy(
    retry=RetryPolicy(max_retries=30, base=1.0, cap=50 * MILLISECOND),
    reconcile_at=(50 * MILLISECOND, 200 * MILLISECOND),
    shortest_look=20 * MILLISECOND,
    straggler_look=20 * MILLISECOND,
    unknown_usual=MILLISECOND,
    account_pause=200 * MILLISECOND,
)
SHORT = Rhythm(
    first_pause=300 * MILLISECOND,
    first_fatal_pause=300 * MILLISECOND,
    longest_pause=300 * MILLISECOND,
    probe_glance=20 * MILLISECOND,
)
LONG = Rhythm()
DRAIN = timedelta(seconds=5)


def fault(name: str, *, prompt: str = "", **params: Any) -> dict[str, Any]:
    match = {"prompt_contains": prompt} if prompt else {}
    return {"fault": name, "times": None, "params": params, "match": match}


class Worker:
    """A worker's parts around a breaker, and somebody who offers it whatever is due."""

    def __init__(
        self, sandbox: Sandbox, jobs: JobTable, breaker: CircuitBreaker, engine: Engine
    ) -> None:
        self.sandbox, self.jobs, self.breaker = sandbox, jobs, breaker
        self.engine = engine
        self.ids: list[UUID] = []
        self.creates: Counter[str] = Counter()

    def spoil(self, *rules: dict[str, Any]) -> None:
        """Put these faults in force, and no others."""
        self.sandbox.app[FAULTS].replace(list(rules))

    @property
    def purchases(self) -> int:
        """How many predictions were made."""
        return self.sandbox.app[BOOK].purchases.total

    async def submit(self, count: int = 1, word: str = "mill", **inputs: Any) -> None:
        """Accept jobs and have them looked at."""
        for _ in range(count):
            prompt = f"{word} {len(self.ids)}"
            request = GenerationRequest(FLUX, {"prompt": prompt, **inputs})
            self.ids += await self.jobs.submit(new_job(request=request))

    async def states(self) -> Sequence[JobState]:
        """Read all jobs."""
        return [await self.jobs.state(job_id) for job_id in self.ids]

    async def reach(
        self, what: str, is_so: Callable[[Sequence[JobState]], bool]
    ) -> Sequence[JobState]:
        """Wait until the jobs are as told; the worker is offered all of them meanwhile."""

        async def look() -> Sequence[JobState] | None:
            self.engine.offer(self.ids)
            found = await self.states()
            return found if is_so(found) else None

        return await wait_for_async(look, within=20, what=what, every=0.1)

    async def end(self) -> Sequence[JobState]:
        """Wait until all are finished."""
        return await self.reach(
            "all are finished", lambda found: all(job.is_terminal for job in found)
        )

    async def opens(self) -> None:
        """Wait until purchases are held back and nobody is on the way any more."""

        async def is_open() -> bool:
            self.engine.offer(self.ids)
            state = await self.breaker.state()
            return state.condition is not Condition.CLOSED and not self.engine.in_flight

        await wait_for_async(is_open, within=10, what="the breaker is open")


Make = Callable[..., Any]


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[Sandbox]:
    async with Sandbox(CONFIG) as sandbox:
        yield sandbox


@pytest.fixture
async def make(
    provider: Sandbox,
    jobs: JobTable,
    redis_url: str,
    tmp_path: Path,
    settings: Callable[..., Settings],
) -> AsyncIterator[Make]:
    """Start workers; `url` is another provider than the sandbox."""
    jobs.policy = POLICY
    provider.app[BOOK].reset()
    provider.app[FAULTS].clear()
    async with AsyncExitStack() as stack:
        redis = Redis.from_url(redis_url)
        stack.push_async_callback(redis.aclose)
        store = open_media_store((tmp_path / "media").as_uri())
        stack.push_async_callback(store.aclose)

        def start(rhythm: Rhythm = SHORT, url: str = provider.url) -> Worker:
            throttle = Throttle.open(
                redis, creates_per_minute=60_000, requests_per_minute=600_000
            )
            worker: Worker

            def count(operation: str, code: str, seconds: float) -> None:
                if operation == "create":
                    worker.creates[code] += 1

            client = open_media_client(
                settings(
                    replicate_api_base_url=f"{url}/v1",
                    output_hosts=(urlsplit(url).netloc,),
                ),
                throttle,
                on_request=count,
            )
            stack.push_async_callback(client.aclose)
            breaker = CircuitBreaker(redis, "test", rhythm=rhythm)
            ledger = Ledger(jobs.engine, POLICY)
            runner = JobRunner(
                ledger=ledger,
                client=client,
                store=store,
                counters=SharedCounters(redis),
                breaker=breaker,
                max_output_bytes=1_000_000,
                prices=PriceTable((), "none"),
                reconciler=Reconciler(ledger, client),
                durations=Durations(),
            )
            engine = Engine(
                ledger=ledger,
                runner=runner,
                purchases=GuardedBucket(breaker, throttle.creates),
                concurrency=100,
            )
            engine.start()
            stack.push_async_callback(engine.drain, DRAIN)
            worker = Worker(provider, jobs, breaker, engine)
            return worker

        yield start


@pytest.mark.parametrize("name", ["create.no_credit", "create.unauthorized"])
async def test_an_account_in_trouble_holds_purchases_back_at_once(
    make: Make, name: str
) -> None:
    worker = make(LONG)
    worker.spoil(fault(name))
    await worker.submit()
    await worker.opens()
    await worker.submit(30)

    for _ in range(20):
        worker.engine.offer(worker.ids)
        await asyncio.sleep(0.01)

    assert worker.creates.total() == 1
    first, *others = await worker.states()
    assert (first.status, first.attempts) == (Status.PENDING, 1)
    # Not as much as touched.
    assert {(job.status, job.attempts, job.version) for job in others} == {
        (Status.PENDING, 0, 1)
    }
    state = await worker.breaker.state()
    assert (state.condition, state.reason) == (Condition.OPEN, "provider_account")


async def test_when_the_account_is_well_again_all_complete_with_one_attempt(
    make: Make,
) -> None:
    worker = make()
    worker.spoil(fault("create.no_credit"))
    await worker.submit(10)
    await worker.opens()
    refused = worker.creates.total()

    async def was_probed() -> bool:
        worker.engine.offer(worker.ids)
        return worker.creates.total() >= refused + 2

    await wait_for_async(was_probed, within=10, what="two probes")
    worker.spoil()
    found = await worker.end()

    assert Counter((job.status, job.attempts) for job in found) == {
        (Status.COMPLETED, 1): 10
    }
    assert worker.purchases == 10
    assert (await worker.breaker.state()).condition is Condition.CLOSED


@pytest.mark.parametrize(
    "rule",
    [fault("create.error_before", status=503), fault("create.dropped")],
    ids=["503", "no answer"],
)
async def test_a_provider_that_does_not_answer_is_left_alone_for_a_while(
    make: Make, rule: dict[str, Any]
) -> None:
    worker = make(replace(SHORT, first_pause=timedelta(seconds=2)))
    worker.spoil(rule)
    await worker.submit(LONG.threshold)
    await worker.opens()
    state = await worker.breaker.state()
    assert state.reason == "provider_unavailable"

    await worker.submit(20)
    worker.spoil()
    found = await worker.end()

    assert {job.status for job in found} == {Status.COMPLETED}
    assert worker.purchases == len(found)
    # Of those that came while it was open, at most one was sent as a probe too early.
    assert sum(job.attempts > 1 for job in found[LONG.threshold :]) <= 1


async def test_an_address_where_nobody_answers_opens_it_too(make: Make) -> None:
    worker = make(LONG, url="http://127.0.0.1:9")
    await worker.submit(LONG.threshold)

    await worker.opens()

    assert (await worker.breaker.state()).reason == "provider_unavailable"


async def test_looks_under_way_go_on_while_purchases_are_held_back(make: Make) -> None:
    worker = make(LONG)
    worker.spoil(fault("prediction.slow", prompt="slow", seconds=0.5))
    await worker.submit(3, "slow")
    await worker.reach(
        "all three are bought",
        lambda found: all(job.stage is Stage.GENERATING for job in found),
    )
    worker.spoil(fault("create.no_credit"))
    await worker.submit()
    await worker.opens()

    found = await worker.reach(
        "those bought are finished",
        lambda found: all(job.is_terminal for job in found[:3]),
    )

    assert [job.status for job in found[:3]] == [Status.COMPLETED] * 3
    assert found[3].status is Status.PENDING
    assert (await worker.breaker.state()).condition is Condition.OPEN


async def test_a_request_that_is_refused_is_no_trouble(make: Make) -> None:
    worker = make(LONG)
    await worker.submit(20, num_outputs=99)

    found = await worker.end()

    assert {job.status for job in found} == {Status.FAILED}
    assert worker.creates == {"422": 20}
    assert (await worker.breaker.state()).condition is Condition.CLOSED


async def test_being_asked_to_slow_down_is_no_trouble(make: Make) -> None:
    worker = make(LONG)
    throttled = fault("create.throttled", retry_after=0.01) | {"times": 10}
    worker.spoil(throttled)
    await worker.submit(20)

    found = await worker.end()

    assert {job.status for job in found} == {Status.COMPLETED}
    assert worker.creates["429"] == 10
    assert (await worker.breaker.state()).condition is Condition.CLOSED


async def test_one_forbidden_model_does_not_hold_all_others_back(make: Make) -> None:
    worker = make(LONG)
    worker.spoil(fault("create.error_before", prompt="forbidden", status=403))
    await worker.submit(1, "forbidden")
    while worker.creates["403"] < LONG.threshold + 1:
        await worker.submit(1, "allowed")
        await worker.reach(
            "the allowed ones are finished",
            lambda found: all(job.is_terminal for job in found[1:]),
        )

    forbidden, *allowed = await worker.states()

    assert forbidden.status in (Status.PENDING, Status.PROCESSING)
    assert forbidden.attempts == 1
    assert {job.status for job in allowed} == {Status.COMPLETED}
    assert (await worker.breaker.state()).condition is Condition.CLOSED


async def test_an_account_that_may_buy_nothing_holds_purchases_back(make: Make) -> None:
    worker = make(LONG)
    worker.spoil(fault("create.error_before", status=403))
    await worker.submit(LONG.threshold)

    await worker.opens()

    assert (await worker.breaker.state()).reason == "provider_account"


async def test_reads_that_fail_say_nothing_about_purchases(make: Make) -> None:
    worker = make(LONG)
    worker.spoil(
        fault("get.error", status=503),
        fault("list.error", status=503),
        fault("create.lost_response") | {"times": 2},
    )
    await worker.submit(12)
    failing = 3
    await worker.reach(
        "looks failed",
        lambda found: sum(job.look_failures >= failing for job in found) >= 5,
    )

    assert (await worker.breaker.state()).condition is Condition.CLOSED
