"""Token buckets in Redis, shared by all processes; a cautious local share without Redis.

A bucket fills evenly at `per_minute` up to `burst`.  Taking is one Lua script on Redis's own
clock, so any number of processes together never get more than one bucket gives.  Nothing
here raises or waits longer than `patience`: a limiter that is down must not stop work,
it only makes it slower.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

REDIS_PATIENCE = timedelta(milliseconds=250)  # for one call
REDIS_REST = timedelta(seconds=1)  # how long a failure is remembered
LONGEST_PAUSE = timedelta(hours=1)

_NO_TIME = timedelta(0)
_log = structlog.get_logger(__name__)

# Shared by the three scripts: reads the bucket and refills it up to this moment.
# `at` may lie in the future, at the end of a pause: the bucket does not fill before.
# A key that is gone (idle, or Redis was wiped) means a full bucket: at worst one burst more.
_REFILL = """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local per_minute, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local row = redis.call('HMGET', KEYS[1], 'tokens', 'at', 'until')
local tokens, at = tonumber(row[1]) or burst, tonumber(row[2]) or now
local pause_end = tonumber(row[3]) or 0
if now > at then
  tokens = math.min(burst, tokens + (now - at) * per_minute / 60000000)
  at = now
elseif at > pause_end then
  at = now
end
local function save()
  local full = (burst - tokens) * 60000 / per_minute
  local rest = math.max(at, now) - now
  redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens),
    'at', string.format('%.0f', at), 'until', string.format('%.0f', pause_end))
  redis.call('PEXPIRE', KEYS[1], string.format('%.0f', full + rest / 1000 + 1000))
end
"""

# All answer {granted, microseconds until there may be more, 1 when paused}.
_TAKE = _REFILL + """
if now < pause_end then return {0, pause_end - now, 1} end
local wanted = tonumber(ARGV[3])
local granted = math.min(wanted, math.floor(tokens))
tokens = tokens - granted
save()
if granted == wanted then return {granted, 0, 0} end
return {granted, math.ceil((1 - tokens) * 60000000 / per_minute), 0}
"""

# While a pause lasts at most one token waits for its end: the first caller is the probe.
_GIVE_BACK = _REFILL + """
local room = burst
if now < pause_end then room = 1 end
tokens = math.max(tokens, math.min(room, tokens + tonumber(ARGV[3])))
save()
return {0, 0, 0}
"""

_PAUSE = _REFILL + """
local target = now + tonumber(ARGV[3])
if target > pause_end then
  pause_end = target
  tokens = math.min(tokens, 1)
  at = pause_end
  save()
end
return {0, pause_end - now, 1}
"""


class _Script(Protocol):
    def __call__(
        self, keys: Sequence[str], args: Sequence[int]
    ) -> Awaitable[tuple[int, int, int]]: ...


@dataclass(frozen=True, slots=True)
class Grant:
    """How many tokens were given, and when it is worth asking for the rest.

    `retry_after` is zero exactly when all that were asked for were given.
    """

    granted: int
    retry_after: timedelta


class TokenBucket:
    """Share `per_minute` actions a minute between all processes that use `name`.

    `burst` defaults to a tenth of a minute's worth.  An account limit is itself a bucket
    with a minute's worth of capacity (observed `ratelimit-remaining: 599` after one create
    of 600 a minute); ours stays far below it, so that a restart or a wiped Redis, which
    forgets what was spent, still fits into theirs.  `shares` is the number of processes the
    budget is thought to be divided among while Redis is away.
    """

    def __init__(
        self,
        redis: Redis,
        name: str,
        *,
        per_minute: int,
        burst: int | None = None,
        shares: int = 4,
        patience: timedelta = REDIS_PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._key = f"throttle:{name}"
        self._per_minute = per_minute
        self._burst = max(1, per_minute // 10 if burst is None else burst)
        self._patience = patience
        self._clock = clock
        self._local = LocalBucket(
            per_second=per_minute / 60 / shares,
            burst=max(1.0, self._burst / shares),
            now=clock(),
        )
        self._down_until: float | None = None
        self._take = redis.register_script(_TAKE)
        self._give_back = redis.register_script(_GIVE_BACK)
        self._pause = redis.register_script(_PAUSE)

    async def take(self, n: int = 1) -> Grant:
        """Get up to `n` tokens at once: as many as are there, without waiting for more."""
        if n <= 0:
            return Grant(0, _NO_TIME)
        paused = self._local.pause_left(self._clock())
        if paused > 0:
            return Grant(0, _duration(paused))
        answer = await self._call(self._take, n)
        if answer is None:
            return self._local.take(n, self._clock())
        return answer

    async def give_back(self, n: int) -> None:
        """Return tokens that were taken and not used."""
        if n <= 0:
            return
        if await self._call(self._give_back, n) is None:
            self._local.give_back(n)

    async def pause(self, delay: timedelta) -> None:
        """Give nobody anything for `delay` (at most an hour).  Never shortens a pause."""
        delay = min(delay, LONGEST_PAUSE)
        if delay <= _NO_TIME:
            return
        self._local.pause(delay.total_seconds(), self._clock())
        await self._call(self._pause, delay // timedelta(microseconds=1))

    async def _call(self, script: _Script, amount: int) -> Grant | None:
        """Run a script; None when Redis is away, or was so within the last second."""
        if self._down_until is not None and self._clock() < self._down_until:
            return None
        try:
            async with asyncio.timeout(self._patience.total_seconds()):
                answer = await script(
                    keys=[self._key], args=[self._per_minute, self._burst, amount]
                )
        except (RedisError, OSError, TimeoutError) as exc:
            if self._down_until is None:
                _log.warning(
                    "throttle.redis_lost", bucket=self.name, error=type(exc).__name__
                )
            self._down_until = self._clock() + REDIS_REST.total_seconds()
            return None
        if self._down_until is not None:
            _log.info("throttle.redis_found", bucket=self.name)
            self._down_until = None
        granted, wait, is_paused = answer
        if is_paused:
            # Remembered here too, so that it holds when Redis goes away meanwhile.
            self._local.pause(wait / 1_000_000, self._clock())
        return Grant(granted, timedelta(microseconds=wait))


class LocalBucket:
    """A process's own share while Redis is away.  Starts with a single token unless told."""

    def __init__(
        self, *, per_second: float, burst: float, now: float, tokens: float = 1.0
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._tokens = tokens
        self._at = now
        self._paused_until = now

    @property
    def tokens(self) -> float:
        """Say how many tokens were left after the latest taking."""
        return self._tokens

    def pause_left(self, now: float) -> float:
        """Say how many seconds of a pause are left."""
        return max(0.0, self._paused_until - now)

    def pause(self, seconds: float, now: float) -> None:
        """Give nothing for that long, then a single token, then the usual rate."""
        until = now + seconds
        if until > self._paused_until:
            self._paused_until = until
            self._tokens = min(self._tokens, 1.0)
            self._at = until

    def take(self, n: int, now: float) -> Grant:
        """Get up to `n` tokens."""
        left = self.pause_left(now)
        if left > 0:
            return Grant(0, _duration(left))
        grown = max(0.0, now - self._at) * self._per_second
        self._tokens = min(self._burst, self._tokens + grown)
        self._at = now
        granted = min(n, int(self._tokens))
        self._tokens -= granted
        if granted == n:
            return Grant(granted, _NO_TIME)
        return Grant(granted, _duration((1 - self._tokens) / self._per_second))

    def give_back(self, n: int) -> None:
        """Return unused tokens."""
        self._tokens = min(self._burst, self._tokens + n)


def _duration(seconds: float) -> timedelta:
    """Keep a wait that is too short for the type from becoming none."""
    return max(timedelta(seconds=seconds), timedelta.resolution)
