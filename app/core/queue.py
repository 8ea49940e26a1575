"""The bell: a Celery message that means only "look at this".

Lossy on purpose.  A ring that cannot be delivered at once is logged and forgotten: the
database knows what is due.  Ringing never delays the caller and never raises.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import structlog
from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

log = structlog.get_logger("app.queue")

QUEUE_NAME = "mediagen"
WAITING_RINGS = 256
RINGS_IN_A_MESSAGE = 64
PACE = 0.02  # seconds between messages: publishing costs more CPU than a submit
PUBLISH_TIMEOUT = 0.5  # seconds, for one connect and for one write
SILENCE = 1.0  # seconds without trying after a failed ring

# One try and one quick reconnect; Celery's default would hold the caller for seconds.
_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0.05}


def celery_settings(redis_url: str) -> dict[str, Any]:
    """Give the settings every Celery process of ours uses.

    `ack_emulation` off: acknowledgements buy a bell nothing, and with them a worker exits
    when the broker restarts (measured with Celery 5.7.0; see docs/adr/0002).
    """
    return {
        "broker_url": redis_url,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            "ack_emulation": False,
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        "task_default_queue": QUEUE_NAME,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "worker_pool": "solo",
        "worker_prefetch_multiplier": 16,
        "worker_hijack_root_logger": False,
        "worker_send_task_events": False,
        "worker_enable_remote_control": True,
        "enable_utc": True,
    }


def publisher_app(redis_url: str) -> Celery:
    """Make the Celery app that only sends: short timeouts, no tasks of its own."""
    app = Celery("mediagen-bell")
    app.conf.update(celery_settings(redis_url))
    app.conf.broker_transport_options = app.conf.broker_transport_options | {
        "socket_timeout": PUBLISH_TIMEOUT,
        "socket_connect_timeout": PUBLISH_TIMEOUT,
    }
    return app


class Bell:
    """Rings from one thread of its own, with a short queue; a full queue drops the ring.

    One message carries whatever waits: a task called with one subject or many.

    Under load a dropped ring costs nothing: the watcher finds the row within a second, and
    when jobs come faster than they may start, a ring would only say what it knows.
    """

    def __init__(self, app: Celery, task: str) -> None:
        self._app = app
        self._task = task
        self._rings: queue.Queue[str | None] = queue.Queue(WAITING_RINGS)
        self._silent_until = 0.0
        self._thread = threading.Thread(target=self._serve, name="bell", daemon=True)

    def start(self) -> None:
        """Start the publishing thread."""
        self._thread.start()

    def ring(self, subject: str) -> None:
        """Ask for a look at the subject, soon, perhaps.  Returns at once."""
        with contextlib.suppress(queue.Full):
            self._rings.put_nowait(subject)

    def stop(self) -> None:
        """Send what is waiting, for at most a second, and end the thread."""
        with contextlib.suppress(queue.Full):
            self._rings.put(None, timeout=0.5)
        self._thread.join(timeout=1.0)

    def _serve(self) -> None:
        with self._app.producer_pool.acquire(block=True) as producer:
            last = 0.0
            while (subject := self._rings.get()) is not None:
                # A lone ring goes out at once; a stream of them shares messages.
                if (early := last + PACE - time.monotonic()) > 0:
                    time.sleep(early)
                subjects = [subject, *self._waiting()]
                self._publish(producer, [one for one in subjects if one is not None])
                last = time.monotonic()
                if None in subjects:
                    return

    def _waiting(self) -> Iterator[str | None]:
        for _ in range(RINGS_IN_A_MESSAGE - 1):
            try:
                yield self._rings.get_nowait()
            except queue.Empty:
                return

    def _publish(self, producer: Any, subjects: list[str]) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            self._app.send_task(
                self._task,
                args=subjects,
                producer=producer,
                retry=True,
                retry_policy=_RETRY,
            )
        except (KombuError, RedisError, OSError) as error:
            self._silent_until = time.monotonic() + SILENCE
            log.warning("bell.lost", error=type(error).__name__)
