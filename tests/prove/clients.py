"""Callers: they submit, watch, cancel, retry and delete, and write down what they were told."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.support.stack import FINISHED

POLLERS = 6
PATIENCE = aiohttp.ClientTimeout(total=12, connect=3)
LONGEST_WAIT = 3  # seconds a poller asks the API to wait

# Models that take a seed, and models that take none: two jobs of those may be equal.
SCHNELL = "black-forest-labs/flux-schnell"
MODELS: Mapping[str, int] = {
    SCHNELL: 5,
    "google/imagen-4-fast": 3,
    "black-forest-labs/flux-dev": 1,
    "stability-ai/sdxl": 1,
    "recraft-ai/recraft-v3": 1,
}

# What callers do with a job beside watching it, out of a hundred.
FATES: Mapping[str, int] = {"cancel": 5, "retry": 4, "delete": 3, "keep": 88}


@dataclass(frozen=True, slots=True)
class Sight:
    """One answer about a job: asked at `began`, answered at `ended`, on one clock."""

    began: float
    ended: float
    version: int
    status: str


@dataclass(slots=True)
class Diary:
    """What the callers were told.  `accepted` are the jobs answered with 202, by prompt."""

    accepted: dict[str, str] = field(default_factory=dict)
    sights: dict[str, list[Sight]] = field(default_factory=dict)
    cancels: set[str] = field(default_factory=set)
    deletions: set[str] = field(default_factory=set)
    answers: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)


# What each verb may be answered; 503 and no answer at all are always possible.
PROMISED: Mapping[str, frozenset[int]] = {
    "submit": frozenset((202,)),
    "status": frozenset((200, 404)),
    "cancel": frozenset((200, 404)),
    "retry": frozenset((202, 404, 409)),
    "delete": frozenset((204, 404, 409)),
}


class Crowd:
    """Callers with a plan of their own.  `before_delete` is told of a job about to go."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        seed: int,
        before_delete: Callable[[str], Awaitable[bool]],
    ) -> None:
        self.diary = Diary()
        self._urls = urls
        self._seed = seed
        self._before_delete = before_delete
        self._rng = random.Random(f"callers of {seed}")
        self._live: list[str] = []
        self._over: list[str] = []
        self._fates: dict[str, str] = {}
        self._number = 0
        self._only_watches = False

    def only_watch(self) -> None:
        """From now on nobody wants anything but to see the jobs end."""
        self._only_watches = True

    async def submit_for(self, seconds: float, *, jobs_per_minute: float) -> None:
        """Submit at random moments for so long; wait for the last answers."""
        deadline = time.monotonic() + seconds
        async with self._session() as http, asyncio.TaskGroup() as group:
            while True:
                gap = self._rng.expovariate(jobs_per_minute / 60)
                if time.monotonic() + gap > deadline:
                    return
                await asyncio.sleep(gap)
                (fate,) = self._rng.choices(list(FATES), list(FATES.values()))
                group.create_task(self._submit(http, self._request(), fate))

    async def submit_all(self, count: int, *, at_once: int) -> None:
        """Submit so many as fast as the API takes them."""
        gate = asyncio.Semaphore(at_once)

        async def one(http: aiohttp.ClientSession) -> None:
            async with gate:
                await self._submit(http, self._request(SCHNELL), "keep")

        async with self._session() as http, asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one(http))

    async def watch(self) -> None:
        """Ask for the status of random jobs, and do to some what was meant for them.

        Until cancelled.
        """
        async with self._session() as http, asyncio.TaskGroup() as group:
            for _ in range(POLLERS):
                group.create_task(self._poll(http, group))

    @staticmethod
    def _session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=PATIENCE)

    # ------------------------------------------------------------------------ submit

    def _request(self, model: str | None = None) -> dict[str, Any]:
        """Make a request whose prompt is nobody else's."""
        self._number += 1
        if model is None:
            (model,) = self._rng.choices(list(MODELS), list(MODELS.values()))
        request: dict[str, Any] = {
            "prompt": f"proof {self._seed}-{self._number}, in oil",
            "model": model,
            "priority": self._rng.choice(("low", "normal", "high")),
        }
        if model == SCHNELL:
            request["num_outputs"] = self._rng.choice((1, 1, 2, 3))
        return request

    async def _submit(
        self, http: aiohttp.ClientSession, request: dict[str, Any], fate: str
    ) -> None:
        body = await self._ask(http, "submit", "POST", "/generate", request)
        if body is None:
            return
        job_id = self._accept(body)
        self._fates[job_id] = fate
        if fate == "cancel":
            await asyncio.sleep(self._rng.uniform(0, 4))
            await self._cancel(http, job_id)

    def _accept(self, body: Mapping[str, Any]) -> str:
        job_id = str(body["job_id"])
        self.diary.accepted[job_id] = str(body["prompt"])
        self._live.append(job_id)
        return job_id

    # ------------------------------------------------------------------------- watch

    async def _poll(
        self, http: aiohttp.ClientSession, group: asyncio.TaskGroup
    ) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0.02, 0.15))
            job_id = self._choose()
            if job_id is None:
                continue
            began = time.monotonic()
            wait = self._rng.choice((0, 0, LONGEST_WAIT))
            path = f"/status/{job_id}?wait={wait}"
            body = await self._ask(http, "status", "GET", path)
            if body is None:
                continue
            sight = Sight(began, time.monotonic(), body["version"], body["status"])
            self.diary.sights.setdefault(job_id, []).append(sight)
            if body["status"] in FINISHED and job_id in self._live:
                self._live.remove(job_id)
                self._over.append(job_id)
                group.create_task(self._deal_with(http, job_id))

    def _choose(self) -> str | None:
        """Mostly a job that is not over, sometimes one that should not change any more."""
        if self._live and self._rng.random() < 0.8:
            return self._rng.choice(self._live)
        return self._rng.choice(self._over) if self._over else None

    async def _deal_with(self, http: aiohttp.ClientSession, job_id: str) -> None:
        match self._fates.get(job_id):
            case _ if self._only_watches:
                return
            case "retry":
                path = f"/jobs/{job_id}/retry"
                body = await self._ask(http, "retry", "POST", path)
                if body is not None:
                    self._accept(body)
            case "delete":
                await self._delete(http, job_id)

    async def _cancel(self, http: aiohttp.ClientSession, job_id: str) -> None:
        path = f"/jobs/{job_id}/cancel"
        if await self._ask(http, "cancel", "POST", path) is not None:
            self.diary.cancels.add(job_id)

    async def _delete(self, http: aiohttp.ClientSession, job_id: str) -> None:
        if not await self._before_delete(job_id):
            return
        # From now on it may be gone, whatever is answered.
        self.diary.deletions.add(job_id)
        self._over.remove(job_id)
        await self._ask(http, "delete", "DELETE", f"/jobs/{job_id}")

    # -------------------------------------------------------------------------- wire

    async def _ask(
        self,
        http: aiohttp.ClientSession,
        verb: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Ask one of the APIs; give the answer when it is a yes, and note it in any case."""
        url = f"{self._rng.choice(self._urls)}/api/v1{path}"
        try:
            async with http.request(method, url, json=body) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            self.diary.answers[f"{verb}: none"] += 1
            return None
        self.diary.answers[f"{verb}: {answer.status}"] += 1
        if answer.status not in PROMISED[verb] | {503}:
            self.diary.surprises.append(f"{verb} {path}: {answer.status} {text[:300]}")
        if answer.status not in (200, 202):
            return None
        with suppress(ValueError):
            found: dict[str, Any] = await answer.json()
            return found
        self.diary.surprises.append(f"{verb} {path}: not JSON: {text[:300]}")
        return None
