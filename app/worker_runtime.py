"""What only the worker runs, on top of the parts every process has."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

import structlog

from app.core.breaker import GuardedBucket
from app.core.config import Settings, refuse_to_start
from app.core.database import close_engine, open_engine
from app.core.heartbeat import Heartbeat
from app.core.leasing import Leadership
from app.domain.durations import Durations
from app.runtime import Runtime, open_runtime, policy_of, settle_memory
from app.services.courier import Courier
from app.services.credentials import (
    Certificate,
    Credentials,
    UnusableCertificate,
    load_certificate,
)
from app.services.engine import Engine
from app.services.housekeeping import (
    ForgetNotifications,
    ForgetSubmissions,
    RemoveStrays,
    RemoveUnusedUploads,
)
from app.services.job_runner import JobRunner
from app.services.ledger import Ledger
from app.services.letters import Letters
from app.services.reconciler import Reconciler
from app.services.survivors import CancelUnwanted, SearchForLost
from app.services.sweep import ListSweep
from app.services.watcher import LEADERSHIP_KEY, Duty, EndOutOfTime, Watcher

log = structlog.get_logger("app.runtime")

WORKER_POOL = 6
COURIER_POOL = 2
# Generic plans of updates from parameter tables go wrong as `jobs` grows (docs/adr/0006); the
# API's reads by key are better off with them.
WORKER_SESSION = {"plan_cache_mode": "force_custom_plan"}


def certificate_of(settings: Settings) -> Certificate | None:
    """Give what pictures are signed with, if they are; a wrong one ends the process."""
    chain, key = settings.c2pa_certificate_file, settings.c2pa_private_key_file
    if chain is None or key is None:
        return None
    try:
        return load_certificate(chain, key)
    except UnusableCertificate as error:
        refuse_to_start("c2pa_certificate_file", f"{error}: see docs/provenance.md")


@dataclass(frozen=True, slots=True)
class WorkerRuntime:
    """What the worker runs on top."""

    base: Runtime
    engine: Engine
    watcher: Watcher
    courier: Courier

    async def breakdown(self) -> None:
        """Return when something ended that must go on: the process is of no more use."""
        parts = [
            asyncio.create_task(part.breakdown())
            for part in (self.engine, self.watcher, self.courier)
        ]
        await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)


def _duties(
    base: Runtime, engine: Engine, reconciler: Reconciler, durations: Durations
) -> tuple[Duty, ...]:
    """Give what one worker does for the whole deployment."""
    ledger, counters = base.ledger, base.counters
    return (
        ListSweep(
            ledger=ledger,
            client=base.client,
            engine=engine,
            bell=base.bell,
            durations=durations,
            counters=counters,
            requests_per_minute=base.settings.provider_requests_per_minute,
            has_webhooks=base.settings.callback_base_url is not None,
        ),
        SearchForLost(
            ledger=ledger, reconciler=reconciler, bell=base.bell, counters=counters
        ),
        CancelUnwanted(ledger=ledger, client=base.client, counters=counters),
        EndOutOfTime(ledger, engine),
        ForgetSubmissions(ledger),
        ForgetNotifications(ledger),
        RemoveUnusedUploads(base.uploads),
        RemoveStrays(ledger, base.store),
    )


@asynccontextmanager
async def _open_courier(settings: Settings, base: Runtime) -> AsyncIterator[Courier]:
    """Give what sends webhooks, with connections nobody else waits for; and have it told."""
    database = open_engine(
        settings.database_url,
        name="mediagen-courier",
        pool_size=COURIER_POOL,
        settings=WORKER_SESSION,
    )
    courier = Courier(
        ledger=Ledger(database, policy_of(settings)),
        outbound=base.outbound,
        letters=Letters(base.links, base.owner_secrets, settings.api_v1_prefix),
        counters=base.counters,
    )
    base.ledger.on_told = courier.wake
    try:
        yield courier
    finally:
        await close_engine(database)


@asynccontextmanager
async def open_worker(
    settings: Settings, *, drain: timedelta
) -> AsyncIterator[WorkerRuntime]:
    """Build and start the engine and the watcher; drain them at the end."""
    async with (
        open_runtime(
            settings,
            name="mediagen-worker",
            pool_size=WORKER_POOL,
            session=WORKER_SESSION,
        ) as base,
        _open_courier(settings, base) as courier,
    ):
        certificate = certificate_of(settings)
        if certificate is not None:
            base.store.sign_with(Credentials(base.ledger, certificate))
        durations = Durations()
        reconciler = Reconciler(base.ledger, base.client)
        runner = JobRunner(
            ledger=base.ledger,
            client=base.client,
            store=base.store,
            counters=base.counters,
            breaker=base.breaker,
            max_output_bytes=settings.max_output_bytes,
            prices=base.prices,
            reconciler=reconciler,
            durations=durations,
            callback_base_url=settings.callback_base_url,
            on_stored=base.thumbnails.offer,
        )
        engine = Engine(
            ledger=base.ledger,
            runner=runner,
            purchases=GuardedBucket(base.breaker, base.throttle.creates),
            concurrency=settings.worker_concurrency,
            is_paused=base.pausing.is_paused,
        )
        watcher = Watcher(
            ledger=base.ledger,
            engine=engine,
            leadership=Leadership(base.database, LEADERSHIP_KEY),
            bell=base.bell,
            duties=_duties(base, engine, reconciler, durations),
        )
        name = f"{socket.gethostname()}:{os.getpid()}"
        heartbeat = Heartbeat(
            base.redis, name, lambda: {"in_flight": str(engine.in_flight)}
        )
        engine.start()
        watcher.start()
        courier.start()
        heartbeat.start()
        base.thumbnails.start()
        settle_memory()
        log.info("worker.ready", concurrency=settings.worker_concurrency)
        try:
            yield WorkerRuntime(base, engine, watcher, courier)
        finally:
            await watcher.stop()
            await asyncio.gather(engine.drain(drain), courier.drain(drain))
            await heartbeat.stop()
