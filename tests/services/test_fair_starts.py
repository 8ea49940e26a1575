"""Fair starts from end to end: real workers, a provider over HTTP, more jobs than tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from sqlalchemy import text

from app.core.config import Settings
from app.domain.generation import GenerationRequest
from app.worker_runtime import WorkerRuntime, open_worker
from app.services import submission
from sandbox.config import SandboxConfig
from sandbox.create import FAULTS
from sandbox.runner import Sandbox
from tests.support.jobs import JobTable, new_job
from tests.support.waiting import wait_for_async

FLUX = "black-forest-labs/flux-schnell"
CONFIG = SandboxConfig(pictures="plain", creates_per_minute=0, requests_per_minute=0)
NEVER_DONE = {"fault": "prediction.slow", "times": None, "params": {"seconds": 3600}}
STARTED = "SELECT jobs.owner, count(*) FROM attempts JOIN jobs ON jobs.id = job_id"


class Scene:
    """Workers on one database, and owners who submit."""

    def __init__(self, jobs: JobTable, open_one: Callable[[], Any]) -> None:
        self.jobs = jobs
        self.workers: list[WorkerRuntime] = []
        self._open_one = open_one

    async def hire(self, stack: AsyncExitStack) -> None:
        """Start one more worker."""
        self.workers.append(await stack.enter_async_context(self._open_one()))

    async def submit(self, owner: str, count: int = 1, **fields: Any) -> list[UUID]:
        """Accept jobs of the owner in one transaction; nobody is rung."""
        orders = [
            new_job(
                owner=owner,
                request=GenerationRequest(FLUX, {"prompt": f"{owner} {n}"}),
                **fields,
            )
            for n in range(count)
        ]
        async with self.jobs.engine.begin() as conn:
            for first in range(0, count, 500):
                await submission.submit(conn, orders[first : first + 500])
        return [order.id for order in orders]

    def ring(self, ids: list[UUID]) -> None:
        """Ring as the bell does: each id to one of the workers."""
        for number, worker in enumerate(self.workers):
            worker.engine.offer(ids[number :: len(self.workers)])

    async def started(self, where: str = "true", **values: Any) -> Counter[str]:
        """Count the purchases, by owner."""
        query = text(f"{STARTED} WHERE {where} GROUP BY jobs.owner")
        async with self.jobs.engine.connect() as conn:
            rows = await conn.execute(query, values)
            return Counter({owner: count for owner, count in rows})

    async def reach(self, total: int, within: float = 40) -> Counter[str]:
        """Wait until so many were bought in all."""

        async def found() -> Counter[str] | None:
            counts = await self.started()
            return counts if counts.total() >= total else None

        return await wait_for_async(found, within=within, what=f"{total} starts")


Stage = Callable[..., Scene]


@pytest.fixture
async def stage(
    jobs: JobTable, settings: Callable[..., Settings]
) -> AsyncIterator[Callable[..., Any]]:
    """Set scenes; `per_minute` is what the account may buy."""
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(Sandbox(CONFIG))
        provider.app[FAULTS].replace([NEVER_DONE])

        async def make(per_minute: int, workers: int = 1, **changes: Any) -> Scene:
            made = settings(
                replicate_api_base_url=f"{provider.url}/v1",
                output_hosts=(urlsplit(provider.url).netloc,),
                provider_creates_per_minute=per_minute,
                provider_requests_per_minute=60_000,
                **changes,
            )
            scene = Scene(jobs, lambda: open_worker(made, drain=timedelta(0)))
            for _ in range(workers):
                await scene.hire(stack)
            return scene

        yield make


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_flood_of_one_owner_holds_nobody_else_up(
    stage: Callable[..., Any], workers: int
) -> None:
    scene: Scene = await stage(per_minute=300, workers=workers)
    flood = await scene.submit("flood", 4000, priority=1)
    scene.ring(flood)
    # A tenth of a minute's tokens are there at once; after them, five a second.
    await scene.reach(33)

    for number in range(4):
        (job_id,) = await scene.submit(f"guest{number}", priority=-1)
        if number % 2:  # a bell may be lost
            scene.ring([job_id])

        async def is_started(job_id: UUID = job_id) -> bool:
            return (await scene.jobs.row(job_id)).attempts == 1

        await wait_for_async(is_started, within=5, what="the guest's start")
        row = await scene.jobs.row(job_id)
        between = await scene.started(
            "sent_at > :born AND sent_at < :started",
            born=row.created_at,
            started=row.attempt_sent_at,
        )
        assert between["flood"] <= 2, between


@pytest.mark.parametrize("workers", [1, 2])
async def test_starts_are_shared_by_weight(
    stage: Callable[..., Any], workers: int
) -> None:
    scene: Scene = await stage(per_minute=6000, workers=workers)
    weights = {"one": 1, "two": 2, "five": 5}
    async with scene.jobs.engine.begin() as conn:
        for name, weight in weights.items():
            await conn.execute(
                text("INSERT INTO owners (name, weight) VALUES (:name, :weight)"),
                {"name": name, "weight": weight},
            )
    ids = [job_id for name in weights for job_id in await scene.submit(name, 800)]
    scene.ring(ids)

    counts = await scene.reach(400)

    assert counts["five"] < 800, "all of them waited all the time"
    for name, weight in weights.items():
        share = counts[name] / counts.total()
        assert share == pytest.approx(weight / 8, rel=0.05), counts


async def test_one_free_look_at_a_time_is_shared_too(stage: Callable[..., Any]) -> None:
    """Tokens are plenty; what is scarce is who looks."""
    scene: Scene = await stage(per_minute=60_000, worker_concurrency=2)
    first = await scene.submit("flood", 300)
    second = await scene.submit("guest", 40)
    scene.ring(first + second)

    counts = await scene.reach(60)

    assert abs(counts["flood"] - counts["guest"]) <= max(4, counts.total() * 0.05)


async def test_when_there_is_enough_again_jobs_start_at_once(
    stage: Callable[..., Any],
) -> None:
    scene: Scene = await stage(per_minute=6000)
    scene.ring(await scene.submit("flood", 700))
    await scene.reach(700)
    (worker,) = scene.workers

    async def is_calm() -> bool:
        return not worker.engine.is_seeking

    await wait_for_async(is_calm, within=5, what="the end of the want")
    (job_id,) = await scene.submit("guest")
    scene.ring([job_id])
    await scene.reach(701, within=2)
