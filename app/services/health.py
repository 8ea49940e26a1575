"""How each part is, found out by really asking it, all at once and never for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core import heartbeat, migrations
from app.core.breaker import BreakerState, CircuitBreaker
from app.core.circuit import Condition as Circuit
from app.core.database import DISCONNECTED
from app.core.patience import within
from app.core.queue import QUEUE_NAME
from app.domain.errors import ServiceError
from app.domain.generation import MediaClient
from app.services import job_queries, switches
from app.services.ledger import Ledger
from app.services.media_store import MediaStore

PATIENCE = timedelta(seconds=1.5)
PROVIDER_EVERY = timedelta(seconds=30)  # asking costs a request of the account's budget
STORAGE_EVERY = timedelta(seconds=5)


ESSENTIAL = frozenset(("database", "storage"))  # without these, no job is accepted


class Condition(StrEnum):
    """How a part is.  DEGRADED: it hurts, and jobs are still accepted and kept."""

    OK = "ok"
    DEGRADED = "degraded"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class PartHealth:
    """One part's answer."""

    condition: Condition
    latency: timedelta | None = None
    detail: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


Check = Callable[[], Coroutine[Any, Any, PartHealth]]

_TROUBLE = (ServiceError, RedisError, DBAPIError, TimeoutError, *DISCONNECTED)


class HealthChecks:
    """Asks the parts.  Without the database or the store nothing can be accepted or kept;
    without broker, workers or provider jobs wait."""

    def __init__(
        self,
        *,
        database: AsyncEngine,
        ledger: Ledger,
        redis: Redis,
        store: MediaStore,
        client: MediaClient,
        breaker: CircuitBreaker,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._redis = redis
        self._store = store
        self._client = client
        self._breaker = breaker
        self._remembered: dict[str, tuple[float, PartHealth]] = {}

    async def essential(self) -> dict[str, PartHealth]:
        """Ask what we need to accept a job."""
        return await self._ask({"database": self._check_database, **self._storage()})

    async def everything(self) -> dict[str, PartHealth]:
        """Ask every part."""
        return await self._ask(
            {
                "database": self._check_database,
                "broker": self._check_broker,
                "workers": self._check_workers,
                "queue": self._check_queue,
                **self._storage(),
                "provider": self._check_provider,
            }
        )

    def _storage(self) -> dict[str, Check]:
        return {
            "storage": self._remember("storage", self._check_storage, STORAGE_EVERY)
        }

    async def _ask(self, checks: Mapping[str, Check]) -> dict[str, PartHealth]:
        answers = await asyncio.gather(*(_timed(check) for check in checks.values()))
        return {
            name: answer if name in ESSENTIAL else _soften(answer)
            for name, answer in zip(checks, answers, strict=True)
        }

    def _remember(self, name: str, check: Check, span: timedelta) -> Check:
        """Ask again only when the last good answer is old."""

        async def ask() -> PartHealth:
            known = self._remembered.get(name)
            if known is not None and time.monotonic() - known[0] < span.total_seconds():
                return known[1]
            began = time.monotonic()
            answer = await check()
            latency = timedelta(seconds=time.monotonic() - began)
            answer = PartHealth(
                answer.condition, latency, answer.detail, answer.figures
            )
            self._remembered[name] = (time.monotonic(), answer)
            return answer

        return ask

    async def _check_database(self) -> PartHealth:
        async with self._ledger.reading() as conn:
            if not await migrations.is_current(conn):
                return PartHealth(
                    Condition.DOWN,
                    detail="migrations are missing: alembic upgrade head",
                )
        return PartHealth(Condition.OK, figures=pool_figures(self._database))

    async def _check_broker(self) -> PartHealth:
        waiting = await self._redis.llen(QUEUE_NAME)
        return PartHealth(Condition.OK, figures={"waiting_bells": waiting})

    async def _check_workers(self) -> PartHealth:
        found = await heartbeat.living(self._redis)
        figures = {"seen": len(found), "workers": found}
        if not found:
            return PartHealth(
                Condition.DOWN, detail="no worker gave a sign of life", figures=figures
            )
        return PartHealth(Condition.OK, figures=figures)

    async def _check_queue(self) -> PartHealth:
        async with self._ledger.reading() as conn:
            live = await job_queries.live_figures(conn)
            queue = await switches.read(conn)
        figures = {
            "state": "paused" if queue.is_paused else "running",
            "pending": live.by_stage.get("queued", 0),
            "in_flight": sum(live.by_stage.values()) - live.by_stage.get("queued", 0),
            "oldest_due_seconds": round(live.overdue.total_seconds(), 3),
        }
        if queue.is_paused:
            since = f"{queue.since:%Y-%m-%d %H:%M:%S} UTC"
            detail = f"paused since {since}, nothing starts: {queue.reason}"
            return PartHealth(Condition.DEGRADED, detail=detail, figures=figures)
        return PartHealth(Condition.OK, figures=figures)

    async def _check_storage(self) -> PartHealth:
        await self._store.check_writable()
        return PartHealth(Condition.OK)

    async def _check_provider(self) -> PartHealth:
        """Tell what purchases met with, or else whether the provider answers at all."""
        state = await self._breaker.state()
        if state.condition is not Circuit.CLOSED:
            return self._held_back(state)
        ask = self._remember("provider", self._ask_provider, PROVIDER_EVERY)
        answer = await ask()
        return replace(answer, figures={**answer.figures, "breaker": "closed"})

    def _held_back(self, state: BreakerState) -> PartHealth:
        figures = {
            "name": self._client.name,
            "breaker": state.condition.value,
            "reason": state.reason,
            "since": state.since,
            "retry_at": state.retry_at,
        }
        detail = f"purchases are held back ({state.reason}), jobs wait"
        return PartHealth(Condition.DEGRADED, detail=detail, figures=figures)

    async def _ask_provider(self) -> PartHealth:
        await self._client.ping()
        return PartHealth(Condition.OK, figures={"name": self._client.name})


async def _timed(check: Check) -> PartHealth:
    """Ask one part; silence and trouble are an answer, too."""
    began = time.monotonic()
    try:
        answer = await within(PATIENCE, check())
    except ServiceError as error:
        answer = PartHealth(Condition.DOWN, detail=str(error))
    except _TROUBLE as error:
        answer = PartHealth(
            Condition.DOWN, detail=f"does not answer ({type(error).__name__})"
        )
    latency = answer.latency or timedelta(seconds=time.monotonic() - began)
    return PartHealth(answer.condition, latency, answer.detail, answer.figures)


def _soften(answer: PartHealth) -> PartHealth:
    if answer.condition is Condition.DOWN:
        return PartHealth(
            Condition.DEGRADED, answer.latency, answer.detail, answer.figures
        )
    return answer


def pool_figures(engine: AsyncEngine) -> dict[str, int]:
    """Tell how many connections this process may have, has, and uses."""
    pool = engine.pool
    figures = {}
    for name, attribute in (("size", "size"), ("in_use", "checkedout")):
        measure = getattr(pool, attribute, None)
        figures[name] = int(measure()) if callable(measure) else 0
    return figures


def overall(parts: Mapping[str, PartHealth]) -> Condition:
    """The worst of the parts."""
    conditions = {part.condition for part in parts.values()}
    for condition in (Condition.DOWN, Condition.DEGRADED):
        if condition in conditions:
            return condition
    return Condition.OK
