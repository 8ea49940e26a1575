"""Remembering what was dealt with: here for nothing, in Redis for all processes.

Forgetful on purpose: for work that may be repeated and is only better not repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

log = structlog.get_logger("app.recall")

PATIENCE = timedelta(milliseconds=300)
REST = timedelta(seconds=5)  # without asking, after Redis failed to answer
MOST_HERE = 4096

T = TypeVar("T")


class Recall:
    """Knows keys for `lifetime`, in this process at least.  Never raises, hardly waits."""

    def __init__(
        self,
        redis: Redis,
        name: str,
        *,
        lifetime: timedelta,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._prefix = f"mediagen:{name}:"
        self._lifetime = lifetime
        self._clock = clock
        self._here: OrderedDict[str, float] = OrderedDict()  # until when, oldest first
        self._silent_until = float("-inf")

    async def knows(self, key: str) -> bool:
        """Tell whether the key was noted lately; False also when that cannot be found out."""
        if key in self._here and self._clock() < self._here[key]:
            return True
        name = self._prefix + key
        return await self._ask(lambda: self._redis.get(name)) is not None

    async def note(self, key: str) -> None:
        """Know the key from now on."""
        self._here.pop(key, None)
        self._here[key] = self._clock() + self._lifetime.total_seconds()
        if len(self._here) > MOST_HERE:
            self._here.popitem(last=False)
        name = self._prefix + key
        await self._ask(lambda: self._redis.set(name, 1, ex=self._lifetime))

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """Ask Redis; None when it is away, or was so a moment ago."""
        if self._clock() < self._silent_until:
            return None
        try:
            async with asyncio.timeout(PATIENCE.total_seconds()):
                return await call()
        except (RedisError, OSError, TimeoutError) as error:
            self._silent_until = self._clock() + REST.total_seconds()
            log.warning("recall.redis_lost", error=type(error).__name__)
            return None
