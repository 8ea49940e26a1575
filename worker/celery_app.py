"""The worker's composition root: `celery -A worker.celery_app worker --loglevel=info`.

Celery receives the bells; the work itself runs in one asyncio engine, in a thread of its
own, started and drained with the worker.  The pool is `solo`: tasks only hand ids over, so
there is nothing for a pool to do, and a forked child would have no engine.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import Future
from datetime import timedelta
from typing import Any
from uuid import UUID

import structlog
import uvloop
from celery import Celery, bootsteps
from celery.signals import setup_logging

from app.core.config import CONFIGURATION_ERROR, Settings, get_settings
from app.core.queue import celery_settings
from app.core.telemetry import configure_logging
from app.runtime import open_worker
from app.services.engine import Engine
from app.tasks.celery_tasks import register

log = structlog.get_logger("worker")

DRAIN = timedelta(seconds=20)  # below the 30 s that platforms give before they kill
START = timedelta(seconds=30)

settings = get_settings()


@setup_logging.connect
def _set_up_logging(**options: Any) -> None:
    """Take logging over from Celery: ours has files and no prompts."""
    configure_logging(
        "worker",
        log_dir=settings.log_dir,
        log_format=settings.log_format,
        debug=settings.debug,
    )


class EngineThread:
    """The engine's event loop, in a thread; ids come in from Celery's thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._stop: asyncio.Event | None = None
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the loop and wait until the engine takes ids; raise what went wrong."""
        self._thread.start()
        self._ready.result(timeout=START.total_seconds())

    def offer(self, job_id: UUID) -> None:
        """Hand an id over; forgotten when there is no engine, for the row stays due."""
        loop, engine = self._loop, self._engine
        if loop is not None and engine is not None and not loop.is_closed():
            loop.call_soon_threadsafe(engine.offer, (job_id,))

    def stop(self) -> None:
        """Drain the engine and end the thread.  Harmless when repeated."""
        if self._loop is not None and self._stop is not None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=(DRAIN + timedelta(seconds=5)).total_seconds())

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(self._serve())
            except BaseException as error:
                if self._ready.done():
                    raise
                self._ready.set_exception(error)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        async with open_worker(self._settings, drain=DRAIN) as worker:
            self._loop, self._engine = asyncio.get_running_loop(), worker.engine
            self._ready.set_result(None)
            await self._stop.wait()
            self._engine = None


engine_thread = EngineThread(settings)


class EngineStep(bootsteps.StartStopStep):
    """Start the engine with the worker, drain it when the worker stops."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        pool = str(getattr(parent.pool_cls, "__module__", parent.pool_cls))
        if not any(name in pool for name in ("solo", "thread")):
            print(
                "The worker needs the solo or threads pool: leave --pool out, the"
                " configuration has the right one.",
                file=sys.stderr,
            )
            raise SystemExit(CONFIGURATION_ERROR)

        # Workers have nothing to tell each other: skip the second they wait for neighbours.
        parent.options |= {"without_mingle": True, "without_gossip": True}

    def start(self, parent: Any) -> None:
        """Start the engine."""
        engine_thread.start()

    def stop(self, parent: Any) -> None:
        """Let the looks under way finish."""
        log.info("worker.stopping")
        engine_thread.stop()

    def terminate(self, parent: Any) -> None:
        """Stop at once: leases and the watcher take care of what is left."""
        engine_thread.stop()


app = Celery("mediagen")
app.conf.update(celery_settings(settings.redis_url.get_secret_value()))
app.steps["worker"].add(EngineStep)
advance_job = register(app, engine_thread.offer)
