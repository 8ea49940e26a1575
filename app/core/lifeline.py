"""One memory of Redis being away, for all who can do without it for a while.

The first to find out waits for `patience`; everybody after that is told at once.  Whether it is
back is found out beside the work, so that no caller ever waits for a second timeout.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.core.patience import end

PATIENCE = timedelta(milliseconds=250)  # for one call
REST = timedelta(seconds=1)  # between two looks whether it is back

T = TypeVar("T")
_log = structlog.get_logger(__name__)


class Lifeline:
    """Passes calls to Redis on while it answers.  Close it with `aclose`."""

    def __init__(
        self,
        redis: Redis,
        *,
        patience: timedelta = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._patience = patience
        self._clock = clock
        self._ask_again: float | None = None  # not None: Redis is away
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Tell whether Redis is worth asking; now and then have a look when it was not."""
        if self._ask_again is None:
            return True
        if self._clock() >= self._ask_again and self._probe is None:
            self._probe = asyncio.create_task(self._look())
        return False

    async def call(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """Give what Redis answers; None when it is away, or does not answer in time."""
        if not self.is_up:
            return None
        return await self._try(work)

    async def aclose(self) -> None:
        """End the look that may be under way."""
        if self._probe is not None:
            await end(self._probe)

    async def _look(self) -> None:
        try:
            await self._try(self._redis.ping)
        finally:
            self._probe = None

    async def _try(self, work: Callable[[], Awaitable[T]]) -> T | None:
        try:
            async with asyncio.timeout(self._patience.total_seconds()):
                answer = await work()
        except (RedisError, OSError, TimeoutError) as error:
            if self._ask_again is None:
                _log.warning("quota.redis_lost", error=type(error).__name__)
            self._ask_again = self._clock() + REST.total_seconds()
            return None
        if self._ask_again is not None:
            _log.info("quota.redis_found")
            self._ask_again = None
        return answer
