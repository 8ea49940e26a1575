"""Every answer to a purchase is lost: what is bought must be found, and never bought again."""

from __future__ import annotations

import time
from pathlib import Path

import aiohttp

from tests.prove.clients import Crowd
from tests.prove.faults import Director
from tests.prove.run import Order, Result, Tell, collect, conclude, settle
from tests.prove.system import open_system
from tests.support.stack import CRASHING_WORKER

BATCH = 1000  # jobs of one run
AT_ONCE = 32
SETTLING = 300.0  # seconds


async def lose_answers(seed: int, count: int, folder: Path, tell: Tell) -> Result:
    """Let so many jobs be bought with every answer lost; judge as any other run."""
    options = ("--speed", "instant")
    async with open_system(
        folder,
        sandbox_options=options,
        has_webhooks=False,
        # Production stops buying after five purchases without an answer, and then makes one
        # now and then to see: too few to prove anything in an hour.
        worker=CRASHING_WORKER,
        MEDIAGEN_TEST_TROUBLES=str(10 * count),
    ) as system:
        await _lose_every_answer(system.sandbox_url)
        crowd = Crowd(system.api_urls, seed=seed, before_delete=_never)
        began = time.monotonic()
        await crowd.submit_all(count, at_once=AT_ONCE)
        settlement = await settle(system, within=SETTLING)
        seconds = time.monotonic() - began
        tell(f"{count} answers lost in {seconds:.0f} s")
        evidence = await collect(system, crowd, {}, Director(system), settlement)
    order = Order(seed, seconds, jobs_per_minute=0, every=0)
    result = conclude(
        order, evidence, {"provider.create.lost_response": count}, settlement
    )
    if result.bought != result.jobs or result.ends != {"completed": count}:
        result.findings["extra"].append(
            f"{result.bought} purchases for {result.jobs} jobs: {result.ends}"
        )
    return result


async def _lose_every_answer(sandbox_url: str) -> None:
    rule = {"fault": "create.lost_response"}
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        await http.post(f"{sandbox_url}/sandbox/faults", json=rule)


async def _never(job_id: str) -> bool:
    return False
