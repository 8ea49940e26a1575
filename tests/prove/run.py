"""One run: a system, callers, a plan; then healing, settling, and the verdict."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psycopg

from app.domain.policy import Policy
from tests.prove.checks import judge
from tests.prove.clients import Crowd
from tests.prove.evidence import (
    Evidence,
    Job,
    read_bought,
    read_complaints,
    read_books,
    read_jobs,
    read_served,
)
from tests.prove.faults import Director
from tests.prove.plan import KINDS, Kind, make_plan
from tests.prove.system import System, open_system

Tell = Callable[[str], None]

SETTLING = 60.0  # seconds after the last fault in which everything has to end …
# … but for purchases of unknown fate, which are looked for so long, and then made again.
GRACE = Policy().grace.total_seconds() + 60.0


@dataclass(frozen=True, slots=True)
class Order:
    """What a run is to be."""

    seed: int
    seconds: float
    jobs_per_minute: float
    every: float
    kinds: Sequence[Kind] = KINDS


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to."""

    seed: int
    seconds: float
    jobs: int
    ends: dict[str, int]
    bought: int
    lost_attempts: int
    sights: int
    faults: dict[str, int]
    settled: float
    settled_known: float
    in_grace: int
    findings: dict[str, list[str]]
    answers: dict[str, int] = field(default_factory=dict)
    complaints: dict[str, int] = field(default_factory=dict)
    last_jobs: list[str] = field(default_factory=list)

    @property
    def is_proved(self) -> bool:
        """Tell whether every check holds."""
        return not any(self.findings.values())


@dataclass(frozen=True, slots=True)
class Settlement:
    """How long it took until nothing was left to do; `late` are jobs that took too long.

    `known` is until nothing was left but purchases of unknown fate, in their grace.
    """

    seconds: float
    known: float
    in_grace: int
    late: tuple[str, ...]


async def prove(order: Order, folder: Path, tell: Tell) -> Result:
    """Make a run in an empty folder and judge it."""
    plan = make_plan(
        order.seed, seconds=order.seconds, every=order.every, kinds=order.kinds
    )
    async with open_system(folder) as system:
        tell(f"{len(plan)} faults in {order.seconds:.0f} s; logs in {folder}")
        deleted: dict[str, Job] = {}
        crowd = Crowd(
            system.api_urls,
            seed=order.seed,
            before_delete=lambda job_id: _remember(system, job_id, deleted),
        )
        director = Director(system)
        async with _meanwhile(system.supervise(), crowd.watch()):
            await asyncio.gather(
                crowd.submit_for(order.seconds, jobs_per_minute=order.jobs_per_minute),
                director.play(plan, lambda fault: tell(str(fault))),
            )
            crowd.only_watch()
            await system.heal()
            tell("healed")
            settlement = await settle(system)
        tell(f"settled in {settlement.seconds:.1f} s")
        evidence = await collect(system, crowd, deleted, director, settlement)
    return conclude(order, evidence, director.done, settlement)


@asynccontextmanager
async def _meanwhile(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Let these go on inside; raise what one of them raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ended:
        if isinstance(end, BaseException) and not isinstance(
            end, asyncio.CancelledError
        ):
            raise end


async def _remember(system: System, job_id: str, deleted: dict[str, Job]) -> bool:
    """Keep what is known of a job before it is deleted; tell whether that was possible."""
    try:
        found = await asyncio.to_thread(read_jobs, system.postgres.url, [job_id])
    except psycopg.OperationalError:
        return False
    deleted.update(found)
    return job_id in found


# ----------------------------------------------------------------------------- settling


async def settle(system: System, *, within: float = SETTLING) -> Settlement:
    """Wait until no job is live and nothing runs at the provider."""
    began = time.monotonic()
    known = 0.0
    in_grace: set[str] = set()
    late: set[str] = set()
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        while (waited := time.monotonic() - began) < within + GRACE:
            live = await asyncio.to_thread(_live, system.postgres.url)
            if not live and not await _running(http, system.sandbox_url):
                break
            if not all(live.values()):
                known = waited
            if waited >= within:
                in_grace |= {job_id for job_id, unknown in live.items() if unknown}
                late |= live.keys() - in_grace
            await asyncio.sleep(0.25)
    told = tuple(f"{job_id}: took more than {within:.0f} s" for job_id in late)
    return Settlement(time.monotonic() - began, known, len(in_grace), told)


def _live(database_url: str) -> dict[str, bool]:
    """Give the jobs that are not finished; True where a purchase's fate is or was unknown."""
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT id::text, EXISTS (SELECT 1 FROM attempts WHERE job_id = jobs.id"
            " AND state IN ('sent', 'lost')) FROM jobs WHERE due_at IS NOT NULL"
        ).fetchall()
    return dict(rows)


async def _running(http: aiohttp.ClientSession, sandbox_url: str) -> int:
    async with http.get(f"{sandbox_url}/sandbox/stats?brief=1") as answer:
        return int((await answer.json())["running"])


# ------------------------------------------------------------------------------ verdict


async def collect(
    system: System,
    crowd: Crowd,
    deleted: dict[str, Job],
    director: Director,
    settlement: Settlement,
) -> Evidence:
    """Gather what there is."""
    jobs = await asyncio.to_thread(read_jobs, system.postgres.url)
    logs = [part.program.log for part in system.parts.values()]
    return Evidence(
        diary=crowd.diary,
        jobs=jobs,
        deleted=deleted,
        bought=await read_bought(system.sandbox_url),
        served=await read_served(system.api_urls[0], jobs),
        deaths=system.deaths,
        books=await asyncio.to_thread(read_books, system.postgres.url),
        slow_stops=director.slow_stops,
        late=settlement.late,
        complaints=await asyncio.to_thread(read_complaints, logs),
    )


def conclude(
    order: Order,
    evidence: Evidence,
    faults: Mapping[str, int],
    settlement: Settlement,
) -> Result:
    """Judge, and count."""
    jobs = {**evidence.deleted, **evidence.jobs}
    attempts = [one for job in jobs.values() for one in job.attempts]
    return Result(
        seed=order.seed,
        seconds=order.seconds,
        jobs=len(jobs),
        ends=dict(Counter(job.status for job in jobs.values())),
        bought=len(evidence.bought),
        lost_attempts=sum(one.state == "lost" for one in attempts),
        sights=sum(map(len, evidence.diary.sights.values())),
        faults=dict(sorted(faults.items())),
        settled=settlement.seconds,
        settled_known=settlement.known,
        in_grace=settlement.in_grace,
        findings=judge(evidence),
        answers=dict(sorted(evidence.diary.answers.items())),
        complaints=dict(evidence.complaints),
        last_jobs=list(_last_jobs(evidence)),
    )


def _last_jobs(evidence: Evidence) -> Iterator[str]:
    """Tell the stories of the jobs that came to their end last: what took so long."""
    for job in sorted(evidence.jobs.values(), key=lambda job: job.events[-1].at)[-3:]:
        yield f"{job.id}: {job.status}, {[one.state for one in job.attempts]}"
        for event in job.events:
            yield f"    {event.at:%H:%M:%S.%f} {event.version:3d} {event.name} {event.data}"
