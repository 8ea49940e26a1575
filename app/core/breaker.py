"""A circuit breaker all processes share; each on its own while Redis is away.

While something outside fails, trying again and again wastes what each try costs.  The
breaker counts trouble, lets nobody through for a while, then one to try, and closes by
itself.  `circuit` decides; here its decisions are kept in one key of Redis, changed by
compare-and-swap on Redis's own clock, so that of any number of processes one sends the probe.

Nothing here raises or takes longer than `patience`.  A wiped Redis closes the circuit, which
costs a few tries until it opens again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.core import circuit as rules
from app.core.circuit import Circuit, Condition, Rhythm
from app.core.throttle import Grant, TokenBucket

PATIENCE = timedelta(milliseconds=250)  # for all it takes
REST = timedelta(seconds=2)  # how long a failure of Redis is remembered
FRESH = timedelta(milliseconds=250)  # how long "closed" is believed without asking
GLANCE = timedelta(seconds=1)  # how old an answer to a reader may be
LIFE = timedelta(minutes=10)  # an open circuit nobody tries any more is forgotten

_NO_TIME = timedelta(0)
_log = structlog.get_logger(__name__)

_READ = """
local clock = redis.call('TIME')
return {clock[1], clock[2], redis.call('GET', KEYS[1]) or ''}
"""

_SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
"""

Decision = Callable[[Circuit, datetime], tuple[Circuit, Grant]]


class _Script(Protocol):
    def __call__(
        self, keys: Sequence[str], args: Sequence[bytes | int] = ()
    ) -> Awaitable[Any]: ...


@dataclass(frozen=True, slots=True)
class BreakerState:
    """A breaker as a reader sees it; of a closed one nothing else is known.

    `since` is when it opened first, `retry_at` when the next one may try.
    """

    condition: Condition
    reason: str | None = None
    since: datetime | None = None
    retry_at: datetime | None = None


class CircuitBreaker:
    """Ask with `allow` before acting, note the `turn`, and report what came of it.

    `on_opened(reason)` is told by the process whose report opened it.
    Safe to share within one event loop.
    """

    def __init__(
        self,
        redis: Redis,
        name: str,
        *,
        rhythm: Rhythm = Rhythm(),
        patience: timedelta = PATIENCE,
        on_opened: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._key = f"breaker:{name}"
        self._rhythm = rhythm
        self._patience = patience
        self._on_opened = on_opened
        self._clock = clock
        self._read: _Script = redis.register_script(_READ)
        self._swap: _Script = redis.register_script(_SWAP)
        # One at a time within a process: others would only lose the swap.
        self._lock = asyncio.Lock()
        self._glancing = asyncio.Lock()
        self._known = Circuit()
        self._seen_at: float | None = None
        self._down_until: float | None = None
        # Redis's clock, told from ours once it was seen.
        self._offset = time.time() - clock()
        self._has_probe = False

    @property
    def turn(self) -> datetime:
        """What to hand back with the report about an action that begins now."""
        return self._known.turn

    async def allow(self, n: int = 1) -> Grant:
        """Say how many of `n` may act now: all, none, or one to try how it is."""
        if n <= 0:
            return Grant(0, _NO_TIME)
        if self._known.is_quiet and self._age() < FRESH.total_seconds():
            self._has_probe = False
            return Grant(n, _NO_TIME)
        grant = await self._change(partial(self._admit, n))
        self._has_probe = grant.granted > 0 and self._known.is_open
        return grant

    async def give_back(self, n: int = 1) -> None:
        """Say that `n` of those last allowed did not act."""
        if n > 0 and self._has_probe:
            self._has_probe = False
            await self._change(_noted(rules.recall_probe))

    async def report_success(self, turn: datetime) -> None:
        """Tell that an action did what it should.  Costs nothing while all is well."""
        if not self._is_settled(turn):
            await self._change(_noted(partial(rules.success, turn=turn)))

    async def report_answer(self, turn: datetime) -> None:
        """Tell that an action was answered, if not as hoped: nobody is away."""
        if not self._is_settled(turn):
            await self._change(_noted(partial(rules.answer, turn=turn)))

    async def report_trouble(
        self, turn: datetime, reason: str, *, is_fatal: bool = False
    ) -> None:
        """Tell that an action met with trouble; fatal is what will be so for everybody."""
        if turn >= self._known.turn:
            await self._change(partial(self._trouble, turn, reason, is_fatal))

    async def state(self) -> BreakerState:
        """Tell how it is, for readers: at most a second old, the last known without Redis."""
        if self._is_old():
            async with self._glancing:
                if self._is_old():  # nobody asked meanwhile
                    await self._change(_noted(lambda known: known))
        known, now = self._known, self._now()
        condition = known.condition(now)
        if condition is Condition.CLOSED:
            return BreakerState(condition)
        return BreakerState(condition, known.reason, known.since, known.retry_at)

    # ---------------------------------------------------------------------- decisions

    def _admit(self, n: int, known: Circuit, now: datetime) -> tuple[Circuit, Grant]:
        after, granted, wait = rules.admit(known, now, self._rhythm, n)
        return after, Grant(granted, wait)

    def _trouble(
        self, turn: datetime, reason: str, is_fatal: bool, known: Circuit, now: datetime
    ) -> tuple[Circuit, Grant]:
        after = rules.trouble(
            known, now, self._rhythm, turn=turn, reason=reason, is_fatal=is_fatal
        )
        return after, Grant(0, _NO_TIME)

    def _is_settled(self, turn: datetime) -> bool:
        """Tell whether good news of that turn would change nothing."""
        return self._known.is_quiet or turn < self._known.turn

    # ----------------------------------------------------------------- where it is kept

    async def _change(self, decide: Decision) -> Grant:
        """Decide on what all know; on what this process knows while Redis is away."""
        if self._down_until is None or self._clock() >= self._down_until:
            try:
                async with asyncio.timeout(self._patience.total_seconds()):
                    async with self._lock:
                        return await self._change_shared(decide)
            except (RedisError, OSError, TimeoutError) as error:
                if self._down_until is None:
                    _log.warning(
                        "breaker.redis_lost",
                        breaker=self.name,
                        error=type(error).__name__,
                    )
                self._down_until = self._clock() + REST.total_seconds()
        before, now = self._known, self._now()
        self._known, grant = decide(before, now)
        self._announce(before, self._known)
        return grant

    async def _change_shared(self, decide: Decision) -> Grant:
        while True:
            seconds, micros, written = await self._read(keys=[self._key])
            now = _moment(int(seconds), int(micros))
            before = rules.read(written)
            after, grant = decide(before, now)
            if after != before:
                swap = [written, rules.write(after), LIFE // timedelta(seconds=1)]
                if not await self._swap(keys=[self._key], args=swap):
                    continue  # somebody was faster: decide again
                self._announce(before, after)
            self._learn(after, now)
            return grant

    def _learn(self, known: Circuit, now: datetime) -> None:
        self._known = known
        self._seen_at = self._clock()
        self._offset = now.timestamp() - self._seen_at
        if self._down_until is not None:
            _log.info("breaker.redis_found", breaker=self.name)
            self._down_until = None

    def _announce(self, before: Circuit, after: Circuit) -> None:
        if after.is_open and not before.is_open:
            _log.warning("breaker.opened", breaker=self.name, reason=after.reason)
            self._on_opened(after.reason)
        elif before.is_open and not after.is_open:
            _log.info("breaker.closed", breaker=self.name, reason=before.reason)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock() + self._offset, UTC)

    def _is_old(self) -> bool:
        return self._age() >= GLANCE.total_seconds()

    def _age(self) -> float:
        """Say how many seconds ago Redis told what is known."""
        return float("inf") if self._seen_at is None else self._clock() - self._seen_at


class GuardedBucket:
    """A bucket behind a breaker: gives no more tokens than the breaker lets act."""

    def __init__(self, breaker: CircuitBreaker, bucket: TokenBucket) -> None:
        self._breaker = breaker
        self._bucket = bucket

    async def take(self, n: int = 1) -> Grant:
        """Get up to `n` tokens at once, without waiting for more."""
        allowed = await self._breaker.allow(n)
        if not allowed.granted:
            return allowed
        grant = await self._bucket.take(allowed.granted)
        await self._breaker.give_back(allowed.granted - grant.granted)
        wait = max(allowed.retry_after, grant.retry_after)
        return Grant(grant.granted, wait)

    async def give_back(self, n: int) -> None:
        """Return tokens that were taken and not used."""
        await self._bucket.give_back(n)
        await self._breaker.give_back(n)


def _noted(change: Callable[[Circuit], Circuit]) -> Decision:
    """Make a decision of what is noted without a clock and lets nobody through."""
    return lambda known, now: (change(known), Grant(0, _NO_TIME))


def _moment(seconds: int, micros: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=micros)
