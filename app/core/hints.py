"""Hints: "something was written, read on", from any process to all that listen, over Redis.

A hint carries nothing and may be lost: whoever listens reads on by itself now and then.  Giving
one never waits and never raises.  However many listen in a process, it has one connection for
all of them, and none while nobody does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import timedelta

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from app.core.stopping import pause

log = structlog.get_logger("app.hints")

PACE = 0.02  # seconds between two messages of a process: one speaks for all before it
SILENCE = 1.0  # seconds without trying after a message that could not be sent
LONGEST_QUIET = 10.0  # seconds until Redis is asked whether it is there
TRY_AGAIN = 0.5  # seconds until the next try to listen
FAREWELL = timedelta(seconds=1)

_TROUBLE = (RedisError, OSError, TimeoutError)


class Hints:
    """Gives hints, and hears those of all processes.  For one event loop; close it in the end."""

    def __init__(self, redis: Redis, name: str) -> None:
        """Use the channel of this name; each of Redis's databases has its own."""
        self._redis = redis
        # Channels know nothing of databases, and two deployments may share a server.
        number = redis.connection_pool.connection_kwargs.get("db") or 0
        self._channel = f"{name}:{number}"
        self._ending = asyncio.Event()
        self._is_given = False
        self._giving: asyncio.Task[None] | None = None
        self._on_hint: Callable[[], None] | None = None
        self._stop_listening = asyncio.Event()
        self._hearing: asyncio.Task[None] | None = None

    # -- giving --------------------------------------------------------------------------

    def give(self) -> None:
        """Tell everybody who listens, soon, perhaps.  Returns at once."""
        if self._on_hint is not None:
            self._on_hint()  # our own need no Redis
        self._is_given = True
        if self._giving is None and not self._ending.is_set():
            self._giving = asyncio.create_task(self._give(), name="hints")

    async def _give(self) -> None:
        try:
            while self._is_given:
                self._is_given = False
                await pause(PACE if await self._publish() else SILENCE, self._ending)
        finally:
            # In the same step as finding nothing to do, or the next hint would wait for ever.
            self._giving = None

    async def _publish(self) -> bool:
        try:
            await self._redis.publish(self._channel, b"")
        except _TROUBLE as error:
            log.warning("hint.lost", error=type(error).__name__)
            return False
        return True

    # -- hearing -------------------------------------------------------------------------

    def listen(self, on_hint: Callable[[], None]) -> None:
        """Have a function called at every hint, and whenever one may have been missed."""
        self._on_hint = on_hint
        if self._hearing is None:
            self._stop_listening = asyncio.Event()
            self._hearing = asyncio.create_task(self._hear(), name="hints-heard")

    async def silence(self) -> None:
        """Stop listening, and let go of the connection."""
        self._on_hint = None
        self._stop_listening.set()
        task, self._hearing = self._hearing, None
        if task is None:
            return
        # A client that is just connecting takes a cancellation for a timeout, and swallows it
        # (seen with redis 8.1): then the loop ends by the event.
        task.cancel()
        await asyncio.wait((task,), timeout=FAREWELL.total_seconds())

    async def _hear(self) -> None:
        stop = self._stop_listening
        was_heard = True
        while not stop.is_set():
            # Its own connection, for as long as it lasts.
            pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
            try:
                await pubsub.subscribe(self._channel)
                was_heard = True
                await self._hear_all(pubsub, stop)
            except _TROUBLE as error:
                if was_heard:
                    log.warning("hints.not_heard", error=type(error).__name__)
                was_heard = False
            finally:
                await _leave(pubsub)
            await pause(TRY_AGAIN, stop)

    async def _hear_all(self, pubsub: PubSub, stop: asyncio.Event) -> None:
        """Hear one after the other; raise `TimeoutError` when the other side is lost."""
        is_asked = False
        while not stop.is_set():
            message = await pubsub.get_message(timeout=LONGEST_QUIET)
            if message is not None:
                is_asked = False
            elif is_asked:
                raise TimeoutError
            else:
                # Quiet, or just connected again: is anybody there?
                await pubsub.ping()
                is_asked = True
            if message is None or message["type"] == "message":
                self._wake()

    def _wake(self) -> None:
        if self._on_hint is not None:
            self._on_hint()

    async def aclose(self) -> None:
        """Stop listening; send the last hint, if that is quick."""
        self._ending.set()
        await self.silence()
        if self._giving is not None:
            await asyncio.wait((self._giving,), timeout=FAREWELL.total_seconds())


async def _leave(pubsub: PubSub) -> None:
    with contextlib.suppress(*_TROUBLE):
        await pubsub.aclose()  # type: ignore[no-untyped-call]
