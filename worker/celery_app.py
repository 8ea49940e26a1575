"""The worker's composition root: `celery -A worker.celery_app worker --loglevel=info`.

Celery receives the bells; the work itself runs in one asyncio engine, in a thread of its
own, started and drained with the worker.  The pool is `solo`: tasks only hand ids over, so
there is nothing for a pool to do, and a forked child would have no engine.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from typing import Any
from uuid import UUID

import structlog
import uvloop
from celery import Celery, bootsteps
from celery.signals import setup_logging, worker_shutting_down

from app.core.config import CONFIGURATION_ERROR, Settings, get_settings
from app.core.queue import celery_settings
from app.core.telemetry import configure_logging
from app.runtime import prices_of
from app.services.engine import Engine
from app.tasks.celery_tasks import register
from app.worker_runtime import certificate_of, open_worker

log = structlog.get_logger("worker")

DRAIN = timedelta(seconds=20)  # below the 30 s that platforms give before they kill
CLOSING = timedelta(seconds=2)  # what the engine's parts have beyond that
FAREWELL = timedelta(seconds=3)  # what Celery has after the engine
START = timedelta(seconds=30)

settings = get_settings()
prices_of(settings)  # a wrong file is told here, in one line
certificate_of(settings)


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
    """The engine's event loop, in a thread; ids come in from Celery's thread.

    It drains from the moment the worker is asked to stop.  Celery notices a signal only
    between two words with its broker, and a silent broker keeps it for minutes.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._stop: asyncio.Event | None = None
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._is_asked = False
        self._is_hurried = False
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def is_asked(self) -> bool:
        """Tell whether the end is what somebody asked for."""
        return self._is_asked

    def start(self) -> None:
        """Start the loop and wait until the engine takes ids; raise what went wrong."""
        threading.Thread(target=self._see_the_end, name="end", daemon=True).start()
        self._thread.start()
        self._ready.result(timeout=START.total_seconds())

    def offer(self, job_id: UUID) -> None:
        """Hand an id over; forgotten when there is no engine, for the row stays due."""
        loop, engine = self._loop, self._engine
        if loop is not None and engine is not None and not loop.is_closed():
            loop.call_soon_threadsafe(engine.offer, (job_id,))

    def ask_to_stop(self) -> None:
        """Begin to drain, and see that the process ends in time.  Returns at once.

        Fit for signal handlers: it takes no lock that the interrupted code may hold.  May
        come before the start, and more than once.
        """
        self._is_asked = True
        self._asked.put(None)
        self._tell_to_stop()

    def hurry(self) -> None:
        """Wait for nothing any more: leases and the watcher take care of what is left."""
        self._is_hurried = True

    def stop(self) -> None:
        """Drain the engine and end the thread.  Harmless when repeated."""
        self._tell_to_stop()
        ends = time.monotonic() + (DRAIN + CLOSING).total_seconds()
        while self._thread.is_alive() and not self._is_hurried:
            if time.monotonic() > ends:
                return
            self._thread.join(0.05)

    def _tell_to_stop(self) -> None:
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)

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
        self._loop = asyncio.get_running_loop()
        if self._is_asked:  # by a signal that found no loop to tell
            self._stop.set()
        async with open_worker(self._settings, drain=DRAIN) as worker:
            self._engine = worker.engine
            self._ready.set_result(None)
            asked = asyncio.create_task(self._stop.wait())
            broken = asyncio.create_task(worker.breakdown())
            await asyncio.wait((asked, broken), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                # A mistake of ours.  A process that only looks alive helps nobody: leases
                # end, and whoever starts us starts another one.
                log.critical("worker.broken")
                os._exit(os.EX_SOFTWARE)
            broken.cancel()
            self._engine = None

    def _see_the_end(self) -> None:
        """End the process when it was asked to end and did not, though it has had its time.

        Nothing is lost: what Celery would still do is say goodbye to the broker.
        """
        self._asked.get()
        self._thread.join((DRAIN + CLOSING).total_seconds())
        time.sleep(FAREWELL.total_seconds())
        log.warning("worker.cut_short", is_drained=not self._thread.is_alive())
        os._exit(os.EX_OK)


engine_thread = EngineThread(settings)


@worker_shutting_down.connect
def _hear_the_signal(how: str, **options: Any) -> None:
    """Drain at the first SIGTERM or Ctrl-C; at SIGQUIT or the second Ctrl-C give up."""
    engine_thread.ask_to_stop()
    if how == "Cold":
        engine_thread.hurry()


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
        if engine_thread.is_asked:
            parent.exitcode = os.EX_OK  # after Ctrl-C, too

    def terminate(self, parent: Any) -> None:
        """Stop at once: leases and the watcher take care of what is left."""
        engine_thread.stop()


app = Celery("mediagen")
app.conf.update(celery_settings(settings.redis_url.get_secret_value()))
app.steps["worker"].add(EngineStep)
advance_job = register(app, engine_thread.offer)
