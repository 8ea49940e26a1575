"""Signs of life: a short-lived key in Redis per process, so that liveness costs one scan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import timedelta

from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.core.stopping import pause

PREFIX = "mediagen:worker:"
EVERY = timedelta(seconds=2)
LIFETIME = timedelta(seconds=10)


class Heartbeat:
    """Says every two seconds that this process lives; silence of ten means it does not."""

    def __init__(
        self, redis: Redis, name: str, describe: Callable[[], Mapping[str, str]]
    ) -> None:
        self._redis = redis
        self._key = PREFIX + name
        self._describe = describe
        self._task: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()

    def start(self) -> None:
        """Start beating, in the running loop."""
        self._task = asyncio.create_task(self._beat_for_ever(), name="heartbeat")

    async def stop(self) -> None:
        """Stop, and say so at once."""
        # Not cancelled: a client that is just connecting takes that for a timeout, swallows
        # it, and the beating would go on (seen with redis 8.1).
        self._ending.set()
        if self._task is not None:
            await self._task
        try:
            await self._redis.delete(self._key)
        except (RedisError, OSError, TimeoutError):
            return  # the key ends by itself

    async def _beat_for_ever(self) -> None:
        while not self._ending.is_set():
            try:
                pipeline = self._redis.pipeline(transaction=True)
                for field, value in self._describe().items():
                    pipeline.hset(self._key, field, value)
                pipeline.pexpire(self._key, LIFETIME)
                await pipeline.execute()
            except (RedisError, OSError, TimeoutError):
                pass  # seen by health as no worker; the work itself goes on
            await pause(EVERY.total_seconds(), self._ending)


async def living(redis: Redis) -> dict[str, dict[str, str]]:
    """Name the processes that gave a sign of life lately, with what they said.

    Raises `RedisError` when Redis cannot be asked.
    """
    found: dict[str, dict[str, str]] = {}
    async for key in redis.scan_iter(match=f"{PREFIX}*", count=500):
        said = await redis.hgetall(key)
        if said:
            found[_text(key).removeprefix(PREFIX)] = {
                _text(name): _text(value) for name, value in said.items()
            }
    return found


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
