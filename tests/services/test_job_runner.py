"""One look after the other at real jobs, while the provider misbehaves in every known way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
import structlog
from aiohttp import web
from pydantic import SecretStr
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.config import Settings
from app.core.counters import SharedCounters
from app.core.database import open_engine
from app.domain import generation
from app.domain.durations import Durations
from app.domain.errors import Unavailable
from app.domain.events import Progressed
from app.domain.generation import GenerationRequest, Phase, Prediction
from app.domain.policy import Policy, RetryPolicy
from app.domain.pricing import Basis, Price, PriceTable
from app.domain.state import AttemptState, JobState, Stage, Status
from app.worker_runtime import open_worker
from app.services.job_records import Claim
from app.services.job_runner import JobRunner
from app.services.job_service import Change, Outcome
from app.services.ledger import LEASE, Ledger
from app.services.media_client import Throttle, open_breaker, open_media_client
from app.services.media_store import MediaStore, open_media_store
from app.services.reconciler import Reconciler
from sandbox.config import SandboxConfig
from sandbox.create import BOOK, FAULTS
from sandbox.runner import Sandbox
from tests.support.endings import sure_to_end
from tests.support.jobs import JobTable, new_job
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for_async

FLUX = "black-forest-labs/flux-schnell"
PRICE = Decimal("0.003")
PRICES = PriceTable([Price(FLUX, date(2020, 1, 1), Basis.IMAGE, PRICE)], "test")
AT_ONCE = SandboxConfig(
    speed=0, pictures="plain", creates_per_minute=0, requests_per_minute=0
)
NEVER = SandboxConfig(
    speed=0.0001, pictures="plain", creates_per_minute=0, requests_per_minute=0
)
MILLISECOND = timedelta(milliseconds=1)
QUICK = Policy(
    retry=RetryPolicy(max_retries=3, base=1.0, cap=timedelta(milliseconds=5)),
    reconcile_at=(10 * MILLISECOND, 20 * MILLISECOND, 40 * MILLISECOND),
    shortest_look=5 * MILLISECOND,
    account_pause=5 * MILLISECOND,
)
MOST_LOOKS = 60

Rule = dict[str, Any]


def fault(name: str, times: int | None = None, **params: Any) -> Rule:
    """Make a rule: for ever unless a number is given."""
    return {"fault": name, "times": times, "params": params}


class CountingLedger(Ledger):
    """Counts the changes that the database did not take."""

    in_vain = 0

    async def change(self, change: Change) -> Outcome:
        """Put the change through the gate."""
        try:
            return await super().change(change)
        except (Unavailable, DBAPIError):
            self.in_vain += 1
            raise


@dataclass
class Bench:
    """A runner with everything real around it; a test looks at its jobs by hand."""

    sandbox: Sandbox
    jobs: JobTable
    ledger: CountingLedger
    runner: JobRunner
    counters: SharedCounters
    folder: Path
    numbered: int = field(default=0)

    # -- the provider --------------------------------------------------------------------

    def spoil(self, *rules: Rule) -> None:
        """Put these faults in force, and no others."""
        self.sandbox.app[FAULTS].replace(list(rules))

    @property
    def purchases(self) -> int:
        """How many predictions were made."""
        return self.sandbox.app[BOOK].purchases.total

    @property
    def endings(self) -> list[str]:
        """The status of every prediction, oldest first."""
        return [prediction.status for prediction in self.sandbox.app[BOOK]]

    # -- jobs ----------------------------------------------------------------------------

    async def submit(self, *, outputs: int = 1, **inputs: Any) -> UUID:
        """Accept a job with an input of its own."""
        self.numbered += 1
        given = {"prompt": f"mill {self.numbered}", "num_outputs": outputs} | inputs
        job = new_job(request=GenerationRequest(FLUX, given), num_outputs=outputs)
        (job_id,) = await self.jobs.submit(job)
        return job_id

    async def claim(self, job_id: UUID) -> Claim:
        """Claim the job, due or not."""
        await self.jobs.make_due(job_id)
        (claim,) = await self.ledger.claim([job_id], starts=1)
        return claim

    async def look(self, job_id: UUID) -> JobState:
        """Look once, unless the job is finished."""
        await self.jobs.make_due(job_id)
        for claim in await self.ledger.claim([job_id], starts=1):
            await self.runner.advance(claim)
        return await self.jobs.state(job_id)

    async def drive(
        self, job_id: UUID, until: Callable[[JobState], bool] = lambda state: False
    ) -> JobState:
        """Look until the job is finished, or as `until` says."""
        for _ in range(MOST_LOOKS):
            state = await self.jobs.state(job_id)
            if state.is_terminal or until(state):
                return state
            await self.look(job_id)
        raise AssertionError(f"not after {MOST_LOOKS} looks: {state}")

    async def drive_to(self, job_id: UUID, stage: Stage) -> JobState:
        """Look until the job is in the stage."""
        state = await self.drive(job_id, lambda state: state.stage is stage)
        assert state.stage is stage
        return state

    async def reach_deadline(self, job_id: UUID, ago: timedelta = MILLISECOND) -> None:
        """Let the deadline be a moment ago."""
        async with self.jobs.engine.begin() as conn:
            await conn.execute(
                text(
                    "UPDATE jobs SET deadline_at = now() - CAST(:ago AS interval)"
                    " WHERE id = :id"
                ),
                {"id": job_id, "ago": ago},
            )

    async def counted(self, name: str) -> float:
        """Say how often something was counted."""
        await self.counters.push()
        counters = (await self.counters.read()).counters
        return sum(counters.get(name, {}).values())


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[Sandbox]:
    async with Sandbox(AT_ONCE) as sandbox:
        yield sandbox


@pytest.fixture
async def slow_provider() -> AsyncIterator[Sandbox]:
    async with Sandbox(NEVER) as sandbox:
        yield sandbox


@pytest.fixture
async def tools(
    settings: Callable[..., Settings], redis_url: str, jobs: JobTable, tmp_path: Path
) -> AsyncIterator[Callable[..., Bench]]:
    """Make benches; their parts are closed after the test."""
    async with AsyncExitStack() as stack:
        redis = Redis.from_url(redis_url)
        stack.push_async_callback(redis.aclose)
        throttle = Throttle.open(
            redis, creates_per_minute=600_000, requests_per_minute=600_000
        )
        jobs.policy = QUICK

        def make(
            sandbox: Sandbox,
            engine: AsyncEngine = jobs.engine,
            client: Any = None,
            prices: PriceTable = PRICES,
        ) -> Bench:
            """Make a bench on the engine; with a client of the test's own if given."""
            sandbox.app[BOOK].reset()
            sandbox.app[FAULTS].clear()
            if client is None:
                client = open_media_client(
                    settings(
                        replicate_api_base_url=f"{sandbox.url}/v1",
                        output_hosts=(urlsplit(sandbox.url).netloc,),
                    ),
                    throttle,
                )
                stack.push_async_callback(client.aclose)
            store: MediaStore = open_media_store((tmp_path / "media").as_uri())
            stack.push_async_callback(store.aclose)
            counters = SharedCounters(redis)
            ledger = CountingLedger(engine, QUICK)
            runner = JobRunner(
                ledger=ledger,
                client=client,
                store=store,
                counters=counters,
                breaker=open_breaker(redis),
                max_output_bytes=1_000_000,
                prices=prices,
                reconciler=Reconciler(ledger, client),
                durations=Durations(),
            )
            return Bench(sandbox, jobs, ledger, runner, counters, tmp_path / "media")

        yield make


@pytest.fixture
def bench(tools: Callable[..., Bench], provider: Sandbox) -> Bench:
    return tools(provider)


# ------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Case:
    """What goes wrong, and what must come of it."""

    name: str
    rules: tuple[Rule, ...] = ()
    status: str = "completed"
    code: str | None = None
    retryable: bool | None = None
    attempts: int = 1
    purchases: int = 1
    warnings: int = 0
    outputs: int = 1
    asked: int = 1
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> Decimal | None:
        """What it costs: pictures that were made are paid for, whatever became of the files."""
        if not self.purchases:
            return None
        was_made = self.code in ("output_invalid", "output_expired")
        return PRICE * (self.asked if was_made else self.outputs)


def failed(name: str, rule: Rule, code: str, retryable: bool, **expected: Any) -> Case:
    given: dict[str, Any] = {"outputs": 0} | expected
    return Case(name, (rule,), "failed", code, retryable, **given)


PA = "Prediction interrupted; please retry (code: PA)"
E005 = "The input or output was flagged as sensitive. Please try again. (E005) (x7Jq)"
NSFW = "NSFW content detected in all outputs."

CASES = (
    Case("all is well"),
    Case("several outputs", asked=3, outputs=3),
    # The generation itself.
    Case("PA once", (fault("prediction.fails", 1, error=PA),), attempts=2, purchases=2),
    failed(
        *("PA always", fault("prediction.fails", error=PA)),
        *("provider_interrupted", True),
        attempts=4,
        purchases=4,
    ),
    failed("E005", fault("prediction.fails", error=E005), "content_policy", False),
    failed("NSFW", fault("prediction.fails", error=NSFW), "content_policy", True),
    failed("E1001", fault("prediction.fails", error="(E1001)"), "out_of_memory", False),
    failed(
        *("validation", fault("prediction.fails", error="Input validation failed: x")),
        *("invalid_input", False),
    ),
    failed(
        *(
            "the model's own",
            fault("prediction.fails", error="list index out of range"),
        ),
        *("model_error", False),
    ),
    Case("aborted", (fault("prediction.aborted", 1),), attempts=2, purchases=2),
    Case(
        "fewer outputs",
        (fault("prediction.fewer_outputs", count=2),),
        asked=4,
        outputs=2,
        warnings=1,
    ),
    Case("no output", (fault("prediction.no_output", 1),), attempts=2, purchases=2),
    failed("wiped", fault("prediction.data_removed"), "output_expired", True),
    # Buying: certainly refused.
    Case("throttled", (fault("create.throttled", 3),)),
    Case("no credit for a while", (fault("create.no_credit", 3),)),
    Case("unauthorized for a while", (fault("create.unauthorized", 3),)),
    failed(
        *("an input the model refuses", fault("create.throttled", 0), "invalid_input"),
        False,
        purchases=0,
        inputs={"num_outputs": 99},
    ),
    # Buying: nobody knows.  Not made: found to be lost after the grace period, bought again.
    Case("error before", (fault("create.error_before", 1),), attempts=2),
    Case("dropped", (fault("create.dropped", 1),), attempts=2),
    # Made: adopted.
    Case("lost response", (fault("create.lost_response"),)),
    Case("truncated", (fault("create.truncated"),)),
    Case("bad JSON", (fault("create.bad_json"),)),
    Case("error after", (fault("create.error_after", status=502, body="json"),)),
    Case(
        "lost response, and no list for a while",
        (fault("create.lost_response"), fault("list.error", 8)),
    ),
    Case(
        "truncated, and a list that drops",
        (fault("create.truncated"), fault("list.dropped", 8)),
    ),
    # Reading.
    Case("get error", (fault("get.error", 12),)),
    Case("get error with an empty body", (fault("get.error", 3, body="empty"),)),
    Case("get dropped", (fault("get.dropped", 12),)),
    Case("get stale", (fault("get.stale", 6, seconds=2),)),
    Case("get denied for a while", (fault("get.not_found", 12),)),
    # Fetching.
    Case("download truncated", (fault("download.truncated", 3),)),
    Case("download error", (fault("download.error", 3),)),
    Case("download slow", (fault("download.slow", bytes_per_second=400_000),)),
    Case("download not found", (fault("download.not_found", 2),)),
    Case("download with a wrong type", (fault("download.wrong_type"),)),
    Case("wrong magic once", (fault("download.wrong_magic", 1),)),
    Case("HTML once", (fault("download.html", 1),)),
    Case(
        "one of three truncated", (fault("download.truncated", 1),), asked=3, outputs=3
    ),
    failed("HTML", fault("download.html"), "output_invalid", True),
    failed("wrong magic", fault("download.wrong_magic"), "output_invalid", True),
    failed("bomb", fault("download.bomb"), "output_invalid", True),
    failed("oversized", fault("download.oversized"), "output_invalid", True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_what_becomes_of_a_job(bench: Bench, case: Case) -> None:
    bench.spoil(*case.rules)
    job_id = await bench.submit(**{"outputs": case.asked} | case.inputs)

    state = await bench.drive(job_id)

    failure = state.failure
    assert (
        state.status.value,
        failure.code if failure else None,
        failure.retryable if failure else None,
        state.attempts,
        bench.purchases,
        len(state.warnings),
    ) == (
        *(case.status, case.code, case.retryable),
        *(case.attempts, case.purchases, case.warnings),
    )
    assets = await bench.jobs.assets(job_id)
    assert [asset.index for asset in assets] == list(range(case.outputs))
    assert all((bench.folder / asset.key).is_file() for asset in assets)
    row = await bench.jobs.row(job_id)
    assert row.cost_usd == case.cost
    assert len(await bench.jobs.attempts(job_id)) == case.attempts
    assert bench.sandbox.app[BOOK].purchases.repeated() == case.purchases - min(
        case.purchases, 1
    )
    with structlog.testing.capture_logs():
        replayed = await bench.jobs.replayed(job_id)
    assert (replayed.status, replayed.failure) == (state.status, failure)


# ------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize("name", ["create.no_credit", "create.unauthorized"])
async def test_an_account_in_trouble_makes_the_job_wait_and_uses_no_attempt(
    bench: Bench, name: str
) -> None:
    bench.spoil(fault(name))
    job_id = await bench.submit()

    for _ in range(6):
        state = await bench.look(job_id)

    assert (state.status, state.stage) == (Status.PENDING, Stage.QUEUED)
    assert state.attempts == 1
    assert bench.purchases == 0
    bench.spoil()
    state = await bench.drive(job_id)
    assert (state.status, state.attempts) == (Status.COMPLETED, 1)


async def test_a_throttled_purchase_waits_as_told(bench: Bench) -> None:
    bench.jobs.policy = Policy()
    bench.ledger.policy = Policy()
    bench.spoil(fault("create.throttled", retry_after=7))
    job_id = await bench.submit()

    wait = await bench.runner.advance(await bench.claim(job_id))

    assert wait is not None
    assert timedelta(seconds=7) <= wait < timedelta(seconds=8)


@pytest.mark.parametrize("name", ["list.error", "list.dropped"])
async def test_without_the_list_a_purchase_of_unknown_fate_waits(
    bench: Bench, name: str
) -> None:
    bench.spoil(fault("create.dropped", 1), fault(name))
    job_id = await bench.submit()

    for _ in range(10):
        state = await bench.look(job_id)
    await bench.jobs.age(QUICK.grace, job_id)
    state = await bench.look(job_id)

    assert state.stage is Stage.RECONCILING
    assert bench.purchases == 0
    bench.spoil()
    state = await bench.drive(job_id)
    assert (state.status, state.attempts) == (Status.COMPLETED, 2)
    assert bench.purchases == 1


async def test_a_list_that_lags_is_asked_again(bench: Bench) -> None:
    bench.ledger.policy = Policy()
    bench.spoil(fault("create.lost_response"), fault("list.stale", 3, seconds=60))
    job_id = await bench.submit()

    state = await bench.drive(job_id)

    assert (state.status, state.attempts) == (Status.COMPLETED, 1)
    assert bench.purchases == 1
    assert await bench.counted("orphans_adopted") == 1
    assert await bench.counted("unknown_outcomes") == 1


async def test_a_worker_that_died_after_the_intent_is_reconciled_first(
    bench: Bench,
) -> None:
    """The next claim finds a SENT attempt and must not send it again."""
    job_id = await bench.submit()
    await bench.claim(job_id)  # and dies

    state = await bench.look(job_id)

    assert state.stage is Stage.RECONCILING
    assert bench.purchases == 0
    assert await bench.counted("unknown_outcomes") == 1
    state = await bench.drive(job_id)
    assert (state.status, state.attempts) == (Status.COMPLETED, 2)
    assert [row.state for row in await bench.jobs.attempts(job_id)] == [
        AttemptState.LOST,
        AttemptState.SUCCEEDED,
    ]


@pytest.mark.parametrize(
    "name", ["download.truncated", "download.not_found", "download.error"]
)
async def test_files_are_fetched_for_as_long_as_the_provider_keeps_them(
    bench: Bench, name: str
) -> None:
    bench.spoil(fault(name))
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.STORING)

    await bench.reach_deadline(job_id)
    for _ in range(5):
        state = await bench.look(job_id)
        assert state.stage is Stage.STORING
    await bench.jobs.age(QUICK.data_lifetime, job_id)
    state = await bench.look(job_id)

    assert state.failure is not None and state.failure.code == "output_expired"
    assert (state.attempts, bench.purchases) == (1, 1)


async def test_a_redirect_off_the_list_is_never_followed(bench: Bench) -> None:
    visits: list[str] = []

    async def take(request: web.Request) -> web.Response:
        visits.append(request.path)
        return web.Response(text="secrets")

    elsewhere = web.Application()
    elsewhere.router.add_get("/{path:.*}", take)
    site = web.AppRunner(elsewhere, access_log=None)
    await site.setup()
    try:
        await web.TCPSite(site, "127.0.0.1", 0).start()
        port = site.addresses[0][1]
        address = f"http://127.0.0.1:{port}/latest"
        bench.spoil(fault("download.redirect", 2, location=address))
        job_id = await bench.submit()

        state = await bench.drive_to(job_id, Stage.STORING)
        assert visits == []
        state = await bench.drive(job_id)
    finally:
        await site.cleanup()

    assert visits == []
    assert (state.status, bench.purchases) == (Status.COMPLETED, 1)


async def test_a_store_that_is_down_costs_time_and_no_purchase(bench: Bench) -> None:
    job_id = await bench.submit()
    bench.folder.mkdir(exist_ok=True)
    away = bench.folder.with_name("away")
    bench.folder.rename(away)
    bench.folder.touch()

    await bench.drive_to(job_id, Stage.STORING)
    state = await bench.look(job_id)
    assert state.stage is Stage.STORING
    assert state.look_failures >= 1
    bench.folder.unlink()
    away.rename(bench.folder)
    state = await bench.drive(job_id)

    assert (state.status, state.attempts) == (Status.COMPLETED, 1)
    assert bench.purchases == 1


# ------------------------------------------------------------------------------ deadlines


async def test_a_stuck_generation_ends_at_its_deadline_here_and_there(
    bench: Bench,
) -> None:
    bench.spoil(fault("prediction.stuck_processing"))
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.GENERATING)
    for _ in range(3):
        state = await bench.look(job_id)
    assert state.stage is Stage.GENERATING
    assert bench.endings == ["processing"]

    await bench.reach_deadline(job_id)
    state = await bench.drive(job_id)

    assert state.failure is not None
    assert (state.failure.code, state.failure.retryable) == ("deadline_exceeded", True)
    assert (state.attempts, bench.endings) == (1, ["canceled"])


async def test_a_status_nobody_knows_is_a_generation_under_way(
    tools: Callable[..., Bench], slow_provider: Sandbox
) -> None:
    bench = tools(slow_provider)
    bench.spoil(fault("prediction.unknown_status"))
    job_id = await bench.submit()
    for _ in range(5):
        state = await bench.look(job_id)
    assert state.stage is Stage.GENERATING

    await bench.reach_deadline(job_id)
    state = await bench.drive(job_id)

    assert state.failure is not None and state.failure.code == "deadline_exceeded"
    assert bench.endings == ["canceled"]


async def test_a_picture_made_before_the_deadline_is_kept(bench: Bench) -> None:
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.GENERATING)
    await bench.reach_deadline(job_id)

    assert (await bench.drive(job_id)).status is Status.COMPLETED


async def test_a_pending_job_past_its_deadline_is_never_bought(bench: Bench) -> None:
    job_id = await bench.submit()
    await bench.reach_deadline(job_id)

    assert await bench.ledger.claim([job_id], starts=1) == []

    state = await bench.jobs.state(job_id)
    assert state.failure is not None and state.failure.code == "deadline_exceeded"
    assert (state.attempts, bench.purchases) == (0, 0)


async def test_a_purchase_that_never_shows_up_ends_at_the_deadline(
    bench: Bench,
) -> None:
    bench.spoil(fault("create.dropped"))
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.RECONCILING)
    await bench.reach_deadline(job_id)

    state = await bench.look(job_id)

    assert state.failure is not None and state.failure.code == "deadline_exceeded"
    assert bench.purchases == 0


@pytest.mark.parametrize(
    ("stage", "rules"),
    [
        (Stage.GENERATING, [fault("get.error")]),
        (Stage.GENERATING, [fault("get.dropped")]),
        (Stage.RECONCILING, [fault("create.dropped"), fault("list.error")]),
    ],
    ids=["get error", "get dropped", "no list"],
)
async def test_a_provider_that_never_answers_is_not_waited_for_past_the_deadline(
    bench: Bench, stage: Stage, rules: list[Rule]
) -> None:
    bench.spoil(*rules)
    job_id = await bench.submit()
    await bench.drive_to(job_id, stage)
    await bench.reach_deadline(job_id)
    assert (await bench.look(job_id)).stage is stage, "it may still answer"

    await bench.reach_deadline(job_id, QUICK.last_resort)
    state = await bench.look(job_id)

    assert state.failure is not None and state.failure.code == "deadline_exceeded"
    assert state.attempts == 1


# -------------------------------------------------------------------------------- cancel

STUCK = fault("prediction.stuck_processing")


async def test_a_queued_job_is_cancelled_at_once(bench: Bench) -> None:
    job_id = await bench.submit()

    await bench.jobs.cancel(job_id)

    assert (await bench.jobs.state(job_id)).status is Status.CANCELLED
    assert await bench.ledger.claim([job_id], starts=1) == []
    assert bench.purchases == 0


@pytest.mark.parametrize("name", ["create.slow_before", "create.slow_after"])
async def test_a_job_cancelled_while_it_is_bought_ends_with_the_prediction(
    bench: Bench, name: str
) -> None:
    bench.spoil(fault(name, seconds=0.2), STUCK)
    job_id = await bench.submit()
    look = asyncio.create_task(bench.look(job_id))

    async def is_submitting() -> bool:
        return (await bench.jobs.state(job_id)).stage is Stage.SUBMITTING

    await wait_for_async(is_submitting, within=5, what="submitting")
    await bench.jobs.cancel(job_id)
    assert not (await bench.jobs.state(job_id)).is_terminal
    await look
    state = await bench.drive(job_id)

    assert state.status is Status.CANCELLED
    assert bench.endings == ["canceled"]


async def test_a_job_cancelled_while_reconciled_is_found_and_cancelled(
    bench: Bench,
) -> None:
    bench.spoil(fault("create.lost_response"), STUCK)
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.RECONCILING)

    await bench.jobs.cancel(job_id)
    state = await bench.drive(job_id)

    assert (state.status, state.attempts) == (Status.CANCELLED, 1)
    assert bench.endings == ["canceled"]


async def test_a_cancelled_job_whose_purchase_never_was_is_not_bought_again(
    bench: Bench,
) -> None:
    bench.spoil(fault("create.dropped"))
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.RECONCILING)

    await bench.jobs.cancel(job_id)
    state = await bench.drive(job_id)

    assert (state.status, state.attempts) == (Status.CANCELLED, 1)
    assert bench.purchases == 0


async def test_a_running_generation_is_cancelled_at_the_provider(bench: Bench) -> None:
    bench.spoil(STUCK)
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.GENERATING)

    await bench.jobs.cancel(job_id)
    assert not (await bench.jobs.state(job_id)).is_terminal
    state = await bench.drive(job_id)

    assert state.status is Status.CANCELLED
    assert bench.endings == ["canceled"]


async def test_a_generation_that_is_over_beats_the_cancel(bench: Bench) -> None:
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.GENERATING)

    await bench.jobs.cancel(job_id)
    state = await bench.drive(job_id)

    assert state.status is Status.COMPLETED
    assert bench.endings == ["succeeded"]


async def test_a_picture_being_stored_beats_the_cancel(bench: Bench) -> None:
    bench.spoil(fault("download.truncated", 2))
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.STORING)

    await bench.jobs.cancel(job_id)

    assert (await bench.drive(job_id)).status is Status.COMPLETED


@pytest.mark.parametrize("is_cancelled", [True, False], ids=["cancelled", "late"])
async def test_a_prediction_the_provider_denies_is_waited_for_until_the_deadline(
    bench: Bench, is_cancelled: bool
) -> None:
    bench.spoil(STUCK)
    job_id = await bench.submit()
    await bench.drive_to(job_id, Stage.GENERATING)
    bench.sandbox.app[BOOK].reset()
    if is_cancelled:
        await bench.jobs.cancel(job_id)

    for _ in range(8):
        state = await bench.look(job_id)
    assert (state.stage, state.attempts) == (Stage.GENERATING, 1)
    await bench.reach_deadline(job_id)
    state = await bench.look(job_id)

    code = state.failure.code if state.failure else None
    if is_cancelled:
        assert (state.status, code) == (Status.CANCELLED, None)
    else:
        assert (state.status, code) == (Status.FAILED, "deadline_exceeded")
    assert bench.purchases == 0, "never bought again"


async def test_a_cancel_racing_with_the_end_has_one_winner(bench: Bench) -> None:
    async def race(turns: int) -> tuple[Status, str]:
        job_id = await bench.submit()
        async with asyncio.TaskGroup() as group:
            looking = group.create_task(bench.drive(job_id))
            for _ in range(turns):
                await bench.jobs.state(job_id)
            await bench.jobs.cancel(job_id)
        state = looking.result()
        before = await bench.jobs.snapshot(job_id)
        await bench.jobs.cancel(job_id)
        assert await bench.jobs.snapshot(job_id) == before
        prompt = (await bench.jobs.row(job_id)).input["prompt"]
        fates = [p.status for p in bench.sandbox.app[BOOK] if p.prompt == prompt]
        return state.status, fates[0] if fates else "never bought"

    async with asyncio.TaskGroup() as group:
        races = [group.create_task(race(turns)) for turns in range(12)]
    ends = {race.result() for race in races}

    assert ends <= {
        (Status.COMPLETED, "succeeded"),
        (Status.CANCELLED, "canceled"),
        (Status.CANCELLED, "never bought"),
    }


# --------------------------------------------------------------------- writing it down


async def test_a_lost_claim_changes_nothing(bench: Bench) -> None:
    bench.spoil(fault("create.slow_after", 1, seconds=1.5))
    job_id = await bench.submit()
    slow = await bench.claim(job_id)
    sleeper = asyncio.create_task(bench.runner.advance(slow))

    async def is_bought() -> bool:
        return bench.purchases == 1

    await wait_for_async(is_bought, within=5, what="the purchase")
    # Another worker takes the job over, finds the purchase and goes on.
    state = await bench.drive(job_id)
    before = await bench.jobs.snapshot(job_id)
    with structlog.testing.capture_logs() as logs:
        next_look = await sleeper

    assert next_look is None
    said = [log["event"] for log in logs]
    assert said.count("claim.lost") == 1
    assert "job.changed" not in said
    assert await bench.jobs.snapshot(job_id) == before
    assert (state.status, bench.purchases) == (Status.COMPLETED, 1)
    assert await bench.counted("claims_lost") == 1


async def test_the_settle_insists_while_the_database_is_away(
    tools: Callable[..., Bench], provider: Sandbox, database_url: str
) -> None:
    parts = urlsplit(database_url)
    assert parts.hostname is not None and parts.port is not None
    async with TcpProxy(parts.hostname, parts.port) as wire:
        login = parts.netloc.rpartition("@")[0]
        netloc = f"{login}@127.0.0.1:{wire.port}" if login else f"127.0.0.1:{wire.port}"
        url = parts._replace(netloc=netloc).geturl()
        engine = open_engine(SecretStr(url), name="wired", pool_size=3)
        bench = tools(provider, engine)
        bench.spoil(fault("create.slow_after", 1, seconds=0.1))
        job_id = await bench.submit()
        claim = await bench.claim(job_id)
        look = asyncio.create_task(bench.runner.advance(claim))

        await wire.refuse()

        async def is_answered() -> bool:
            return bench.purchases == 1

        await wait_for_async(is_answered, within=5, what="the purchase")

        async def was_in_vain() -> bool:
            return bench.ledger.in_vain >= 2

        await wait_for_async(was_in_vain, within=5, what="a settle in vain")
        assert not look.done()
        await wire.restore()
        next_look = await look
        await engine.dispose()

    state = await bench.jobs.state(job_id)
    assert next_look is not None
    assert (state.stage, state.attempts) == (Stage.GENERATING, 1)
    assert (await bench.jobs.row(job_id)).claim_token is None
    assert bench.purchases == 1


async def test_the_settle_insists_while_the_database_refuses_it(bench: Bench) -> None:
    """Such as for the loser of a deadlock, twice."""
    bench.spoil(fault("create.slow_after", 1, seconds=0.1))
    job_id = await bench.submit()
    look = asyncio.create_task(bench.runner.advance(await bench.claim(job_id)))
    async with bench.jobs.engine.begin() as conn:
        for statement in (
            "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01'; END $$",
            "CREATE TRIGGER lose BEFORE UPDATE ON jobs EXECUTE FUNCTION lose()",
        ):
            await conn.execute(text(statement))

    async def was_refused() -> bool:
        return bench.ledger.in_vain >= 2

    await wait_for_async(was_refused, within=5, what="a settle in vain")
    async with bench.jobs.engine.begin() as conn:
        await conn.execute(text("DROP TRIGGER lose ON jobs"))

    assert await look is not None
    state = await bench.jobs.state(job_id)
    assert (state.stage, bench.purchases) == (Stage.GENERATING, 1)


class ScriptedClient:
    """Answers what it was told to; anything else is a mistake."""

    name = "replicate"

    def __init__(
        self, *, create: Any = None, get: Any = None, listed: Any = ()
    ) -> None:
        self._create, self._get, self._listed = create, get, listed

    async def create(self, request: GenerationRequest, **options: Any) -> Any:
        return self._create

    async def get(self, handle: str) -> Prediction:
        if isinstance(self._get, Exception):
            raise self._get
        return self._get

    async def cancel(self, handle: str) -> None:
        raise AssertionError("nobody asked for it")

    async def list_since(self, moment: Any) -> AsyncIterator[list[Prediction]]:
        yield list(self._listed)


async def test_a_handle_somebody_else_owns_is_not_believed(
    tools: Callable[..., Bench], provider: Sandbox
) -> None:
    bought = generation.Started(Prediction("h-1", Phase.QUEUED))
    bench = tools(provider, client=ScriptedClient(create=bought))
    first, second = await bench.submit(), await bench.submit()
    await bench.look(first)

    with structlog.testing.capture_logs() as logs:
        state = await bench.look(second)

    assert "handle.taken" in [log["event"] for log in logs]
    assert state.stage is Stage.RECONCILING
    assert (await bench.jobs.state(first)).stage is Stage.GENERATING
    state = await bench.drive(second, lambda state: state.status is Status.PENDING)
    assert [row.state for row in await bench.jobs.attempts(second)] == ["lost"]


async def test_a_look_that_crashes_is_repeated_later(
    tools: Callable[..., Bench], provider: Sandbox
) -> None:
    client = ScriptedClient(
        create=generation.Started(Prediction("h-1", Phase.QUEUED)),
        get=ZeroDivisionError("a mistake of ours"),
    )
    bench = tools(provider, client=client)
    job_id = await bench.submit()
    await bench.look(job_id)
    before = await bench.jobs.state(job_id)

    with structlog.testing.capture_logs() as logs:
        wait = await bench.runner.advance(await bench.claim(job_id))

    after = await bench.jobs.state(job_id)
    assert wait is not None
    assert [log["event"] for log in logs if log["log_level"] == "error"] == [
        "look.crashed"
    ]
    assert (after.stage, after.version) == (before.stage, before.version)
    assert after.look_failures == before.look_failures + 1


async def test_a_job_that_crashes_every_look_ends_at_its_deadline(
    tools: Callable[..., Bench], provider: Sandbox
) -> None:
    client = ScriptedClient(
        create=generation.Started(Prediction("h-1", Phase.QUEUED)),
        get=ZeroDivisionError("a mistake of ours"),
    )
    bench = tools(provider, client=client)
    job_id = await bench.submit()
    await bench.look(job_id)
    await bench.reach_deadline(job_id, QUICK.last_resort)

    state = await bench.look(job_id)

    assert state.failure is not None and state.failure.code == "deadline_exceeded"


async def test_progress_is_written_down(
    tools: Callable[..., Bench], provider: Sandbox
) -> None:
    client = ScriptedClient(
        create=generation.Started(Prediction("h-1", Phase.QUEUED)),
        get=Prediction("h-1", Phase.RUNNING, progress=0.424),
    )
    bench = tools(provider, client=client)
    job_id = await bench.submit()
    await bench.look(job_id)

    state = await bench.look(job_id)

    assert state.progress == 0.42
    assert (await bench.jobs.events(job_id))[-1].name == Progressed.__name__


# -------------------------------------------------------------------------------- money


def priced(basis: Basis, usd: int) -> PriceTable:
    return PriceTable([Price(FLUX, date(2020, 1, 1), basis, Decimal(usd))], "test")


async def test_hardware_is_paid_for_by_every_attempt(
    tools: Callable[..., Bench], provider: Sandbox
) -> None:
    bench = tools(provider, prices=priced(Basis.SECOND, 1000))
    bench.spoil(fault("prediction.fails", 2, error=PA))
    job_id = await bench.submit(outputs=2)

    state = await bench.drive(job_id)

    assert (state.status, state.attempts) == (Status.COMPLETED, 3)
    book = bench.sandbox.app[BOOK]
    spent = [prediction.as_json("", time.time()) for prediction in book]
    seconds = [Decimal(str(one["metrics"]["predict_time"])) for one in spent]
    assert len(seconds) == 3 and all(seconds)
    assert (await bench.jobs.row(job_id)).cost_usd == sum(
        (1000 * one).quantize(Decimal("0.000001"), ROUND_CEILING) for one in seconds
    )


@pytest.mark.parametrize(
    ("phase", "cost"),
    [
        (Phase.FAILED, Decimal("2.5")),
        (Phase.CANCELLED, Decimal("2.5")),
        (Phase.ABORTED, Decimal(0)),
    ],
)
async def test_hardware_is_paid_for_when_nothing_came_of_it(
    tools: Callable[..., Bench], provider: Sandbox, phase: Phase, cost: Decimal
) -> None:
    client = ScriptedClient(
        create=generation.Started(Prediction("h-1", Phase.QUEUED)),
        get=Prediction("h-1", phase, predict_seconds=2.5),
    )
    bench = tools(provider, client=client, prices=priced(Basis.SECOND, 1))
    job_id = await bench.submit()

    await bench.look(job_id)
    await bench.look(job_id)

    assert (await bench.jobs.row(job_id)).cost_usd == cost


@pytest.mark.parametrize("faults", [(), (fault("download.truncated", 3),)])
async def test_pixels_are_paid_for_once_they_are_counted(
    tools: Callable[..., Bench], provider: Sandbox, faults: tuple[Rule, ...]
) -> None:
    bench = tools(provider, prices=priced(Basis.MEGAPIXEL, 10))
    bench.spoil(*faults)
    job_id = await bench.submit(outputs=2)
    if faults:
        await bench.drive_to(job_id, Stage.STORING)
        assert (await bench.jobs.row(job_id)).cost_usd is None

    state = await bench.drive(job_id)

    assert state.status is Status.COMPLETED
    pixels = sum(one.width * one.height for one in await bench.jobs.assets(job_id))
    expected = Decimal(pixels) * 10 / 1_000_000
    assert (await bench.jobs.row(job_id)).cost_usd == expected > 0


async def test_a_picture_is_paid_for_before_its_file_is_here_and_once(
    bench: Bench,
) -> None:
    bench.spoil(fault("download.truncated", 3))
    job_id = await bench.submit(outputs=2)

    await bench.drive_to(job_id, Stage.STORING)

    assert (await bench.jobs.row(job_id)).cost_usd == 2 * PRICE
    assert (await bench.drive(job_id)).status is Status.COMPLETED
    assert (await bench.jobs.row(job_id)).cost_usd == 2 * PRICE


async def test_the_price_is_that_of_the_utc_day_the_job_was_accepted(
    tools: Callable[..., Bench], provider: Sandbox
) -> None:
    days = (date(2026, 2, 27), date(2026, 2, 28), date(2026, 3, 1))
    lines = [Price(FLUX, day, Basis.IMAGE, Decimal(day.day)) for day in days]
    bench = tools(provider, prices=PriceTable(lines, "test"))
    job_id = await bench.submit()
    async with bench.jobs.engine.begin() as conn:
        moment = datetime.fromisoformat("2026-03-01T00:30:00+02:00")
        update = text("UPDATE jobs SET created_at = :moment WHERE id = :id")
        await conn.execute(update, {"id": job_id, "moment": moment})

    await bench.drive(job_id)

    assert (await bench.jobs.row(job_id)).cost_usd == 28


async def test_what_nobody_knows_the_price_of_costs_nobody_knows_what(
    tools: Callable[..., Bench], provider: Sandbox
) -> None:
    bench = tools(provider, prices=PriceTable((), "none"))
    job_id = await bench.submit()

    assert (await bench.drive(job_id)).status is Status.COMPLETED
    assert (await bench.jobs.row(job_id)).cost_usd is None


# ------------------------------------------------------------------------ all together


async def test_a_worker_brings_every_job_to_its_end_whatever_happens(
    provider: Sandbox, settings: Callable[..., Settings], jobs: JobTable
) -> None:
    """The engine, the watcher and no bell: many jobs, and faults that come by chance."""
    provider.app[BOOK].reset()
    chances = {
        "create.throttled": 0.1,
        "create.lost_response": 0.2,
        "create.bad_json": 0.1,
        "get.error": 0.1,
        "download.truncated": 0.2,
        "download.not_found": 0.1,
        "prediction.aborted": 0.1,
    }
    provider.app[FAULTS].replace(
        [
            {"fault": name, "probability": chance, "times": 3, "seed": seed}
            for seed, (name, chance) in enumerate(chances.items())
        ]
    )
    made = settings(
        replicate_api_base_url=f"{provider.url}/v1",
        output_hosts=(urlsplit(provider.url).netloc,),
        provider_creates_per_minute=60_000,
        provider_requests_per_minute=60_000,
        retry_backoff_base=1.0,
    )
    submitted = [
        new_job(request=GenerationRequest(FLUX, {"prompt": f"barn {n}"}))
        for n in range(40)
    ]
    await jobs.submit(*submitted)

    async def are_done() -> bool:
        async with jobs.engine.connect() as conn:
            left = await conn.scalar(
                text("SELECT count(*) FROM jobs WHERE due_at IS NOT NULL")
            )
        return left == 0

    opened = open_worker(made, drain=timedelta(seconds=5))
    async with sure_to_end(opened, what="the worker"):
        await wait_for_async(are_done, within=40, what="the end of all jobs", every=0.1)

    aborted = sum(p.status == "aborted" for p in provider.app[BOOK])
    states = [await jobs.state(job.id) for job in submitted]
    assert {state.status for state in states} == {Status.COMPLETED}
    assert provider.app[BOOK].purchases.total == len(submitted) + aborted


async def test_a_worker_that_slept_through_its_claim_buys_nothing(
    tools: Callable[..., Bench], provider: Sandbox
) -> None:
    """Frozen between the claim and the request: others may have bought again meanwhile."""
    bench = tools(provider)
    job_id = await bench.submit()
    claim = await bench.claim(job_id)
    slept = replace(claim, began=claim.began - LEASE.total_seconds())

    assert await bench.runner.advance(slept) is None

    assert bench.purchases == 0
    assert (await bench.jobs.state(job_id)).stage is Stage.SUBMITTING


async def test_a_report_that_cannot_be_true_changes_nothing_and_ends_the_look(
    tools: Callable[..., Bench], provider: Sandbox
) -> None:
    """The job was finished by nobody's mistake but ours: say `Started` of a stored picture."""
    bench = tools(provider)
    job_id = await bench.submit()
    claim = await bench.claim(job_id)
    async with bench.jobs.engine.begin() as conn:
        await conn.execute(
            text("UPDATE jobs SET stage = 'storing' WHERE id = :id"), {"id": job_id}
        )

    with structlog.testing.capture_logs() as logs:
        assert await bench.runner.advance(claim) is None

    assert "settle.illegal" in [log["event"] for log in logs]
    assert (await bench.jobs.row(job_id)).stage == "storing"
