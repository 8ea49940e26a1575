"""How often something named may happen in a minute, in all processes together.

Each name has a bucket in Redis that holds `burst` tokens and fills evenly at `per_minute`.  A
process that is busy with a name takes a tenth of a second's worth in advance, so that most
takings cost a subtraction; what it does not need goes back.  Whatever is asked meanwhile, of
any number of names, goes to Redis in one call.  A refusal is remembered until there can be
something again: a flood costs no more than what it may have.

While Redis is away each process has a share of every bucket.  Nothing here raises.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from redis.asyncio import Redis

from app.core.batching import Batcher
from app.core.lifeline import Lifeline
from app.core.patience import end
from app.core.throttle import LocalBucket

SHARES = 4  # processes a bucket is thought to be divided among while Redis is away
MOST_NAMES = 10_000  # known here; whoever was not seen longest is forgotten first
IN_ADVANCE = 600  # parts of a minute: a process takes one of them in advance, at most
HASTE = 0.1  # seconds; who asks again within them takes more at once
HOLD = 0.5  # seconds until what was taken in advance goes back
LONGEST_REFUSAL = 1.0  # seconds a refusal is believed without asking again

_NO_TIME = timedelta(0)
_LARGEST_BATCH = 1000

# KEYS are buckets; for each of them ARGV has per_minute, burst and how many are wanted, which
# is negative for what comes back.  A bucket that is gone (idle, or Redis was wiped) is full.
# Answers {granted, tokens left as text} for each, in order.
_TAKE = """
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local answers = {}
for i, key in ipairs(KEYS) do
  local per_minute, burst = tonumber(ARGV[3 * i - 2]), tonumber(ARGV[3 * i - 1])
  local row = redis.call('HMGET', key, 'tokens', 'at')
  local tokens, at = tonumber(row[1]) or burst, tonumber(row[2]) or now
  tokens = tokens + math.max(0, now - at) * per_minute / 60000000
  tokens = math.min(burst, tokens)
  local granted = math.min(tonumber(ARGV[3 * i]), math.floor(tokens))
  tokens = math.min(burst, tokens - granted)
  local left = string.format('%.6f', tokens)
  redis.call('HSET', key, 'tokens', left, 'at', string.format('%.0f', now))
  local full = (burst - tokens) * 60000 / per_minute
  redis.call('PEXPIRE', key, string.format('%.0f', full + 1000))
  answers[i] = {granted, left}
end
return answers
"""


class _Script(Protocol):
    def __call__(
        self, keys: Sequence[str], args: Sequence[int]
    ) -> Awaitable[Sequence[tuple[int, bytes | str]]]: ...


@dataclass(frozen=True, slots=True)
class Standing:
    """What became of one taking, and how the quota stands after it.

    `wait` is zero exactly when it was let through.  `left` more could follow at once, and after
    `reset` the whole burst could.
    """

    left: int
    wait: timedelta
    reset: timedelta


class Quotas:
    """Buckets by name.  Safe to share within one event loop; close it with `aclose`.

    Whoever makes names up (an address) must not push out those that cost money: they belong
    into separate ones, on one `lifeline`.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        lifeline: Lifeline,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lifeline = lifeline
        self._script: _Script = redis.register_script(_TAKE)
        self._leases: OrderedDict[str, _Lease] = OrderedDict()
        self._holding: set[_Lease] = set()
        self._returning: asyncio.Task[None] | None = None
        self._ask: Batcher[_Lease, Standing] = Batcher(self._run, limit=_LARGEST_BATCH)

    async def take(
        self, name: str, *, per_minute: int, burst: int | None = None
    ) -> Standing:
        """Let one through if there is a token; the burst is a minute's worth unless given.

        Both must be positive.  Other figures than before hold from now on.
        """
        lease = self._lease(name, per_minute, per_minute if burst is None else burst)
        known = lease.at_hand(self._clock())
        if known is not None:
            return known
        return await self._ask(lease)

    def refusal(self, name: str) -> timedelta:
        """Say how long takings of the name are refused, as far as this process knows."""
        lease = self._leases.get(name)
        return _NO_TIME if lease is None else lease.refusal(self._clock())

    async def aclose(self) -> None:
        """Give back what was taken in advance, and end."""
        if self._returning is not None:
            await end(self._returning)
        await self._give_back(list(self._holding))

    def _lease(self, name: str, per_minute: int, burst: int) -> _Lease:
        lease = self._leases.get(name)
        if lease is not None and (lease.per_minute, lease.burst) == (per_minute, burst):
            self._leases.move_to_end(name)
            return lease
        lease = self._leases[name] = _Lease(name, per_minute, burst)
        self._leases.move_to_end(name)
        if len(self._leases) > MOST_NAMES:
            self._leases.popitem(last=False)
        return lease

    async def _run(self, waiting: Sequence[_Lease]) -> list[Standing | Exception]:
        """Ask for all who wait: one entry is one taking."""
        now = self._clock()
        counts = Counter(waiting)
        # Somebody before may have left enough in this process's hand.
        ready = {lease: lease.hand_out(count) for lease, count in counts.items()}
        missing = {
            lease: counts[lease] - len(served)
            for lease, served in ready.items()
            if len(served) < counts[lease]
        }
        answers = await self._call(
            {lease: n + lease.in_advance(now) for lease, n in missing.items()}
        )
        now = self._clock()
        for lease, count in missing.items():
            if answers is None:
                ready[lease] += lease.share(count, now)
            else:
                granted, left = answers[lease]
                ready[lease] += lease.settle(count, granted, left, now)
                self._watch(lease)
        return [ready[lease].pop(0) for lease in waiting]

    async def _call(
        self, amounts: dict[_Lease, int]
    ) -> dict[_Lease, tuple[int, float]] | None:
        if not amounts:
            return {}
        keys = [f"throttle:{lease.name}" for lease in amounts]
        args: list[int] = []
        for lease, amount in amounts.items():
            args += (lease.per_minute, lease.burst, amount)
        found = await self._lifeline.call(lambda: self._script(keys=keys, args=args))
        if found is None:
            return None
        given = ((int(granted), float(left)) for granted, left in found)
        return dict(zip(amounts, given, strict=True))

    # ------------------------------------------------------------------- what goes back

    def _watch(self, lease: _Lease) -> None:
        if lease.held:
            self._holding.add(lease)
            if self._returning is None or self._returning.done():
                self._returning = asyncio.create_task(self._return_in_time())

    async def _return_in_time(self) -> None:
        while self._holding:
            await asyncio.sleep(HOLD)
            now = self._clock()
            await self._give_back([x for x in self._holding if now >= x.held_until])

    async def _give_back(self, leases: Sequence[_Lease]) -> None:
        self._holding.difference_update(leases)
        unused = {lease: -lease.held for lease in leases if lease.held}
        for lease in unused:
            lease.held = 0
        await self._call(unused)


class _Lease:
    """What a process knows of one bucket, and has of it in its hand."""

    def __init__(self, name: str, per_minute: int, burst: int) -> None:
        self.name = name
        self.per_minute = per_minute
        self.burst = burst
        self.held = 0
        self.held_until = 0.0
        self._left: float | None = None  # in the bucket, when Redis was asked last
        self._size = 1  # to ask for at once
        self._asked_at = float("-inf")
        self._refused_until = float("-inf")
        self._next_token_at = 0.0
        self._local: LocalBucket | None = None

    def at_hand(self, now: float) -> Standing | None:
        """Take one without asking anybody, or refuse so; None when nothing is known."""
        if self.held:
            self.held -= 1
            return self._standing()
        if now < self._refused_until:
            return self._refused(now)
        return None

    def hand_out(self, count: int) -> list[Standing]:
        """Take up to `count` of those in the hand."""
        served: list[Standing] = []
        while self.held and len(served) < count:
            self.held -= 1
            served.append(self._standing())
        return served

    def in_advance(self, now: float) -> int:
        """Say how many to ask for beyond those that are needed now."""
        largest = max(1, min(self.per_minute // IN_ADVANCE, self.burst // 20))
        is_hasty = now - self._asked_at < HASTE
        self._size = min(self._size * 2, largest) if is_hasty else self._size // 2 or 1
        self._asked_at = now
        return self._size - 1

    def settle(
        self, count: int, granted: int, left: float, now: float
    ) -> list[Standing]:
        """Write down what Redis granted, and divide it among `count` that wait."""
        self._local = None
        self._left = left
        self.held += max(0, granted - count)
        self.held_until = now + HOLD
        if granted < count:
            self._refuse((1 - left) * 60 / self.per_minute, now)
        served = [self._standing()] * min(count, granted)
        return served + [self._refused(now)] * (count - len(served))

    def share(self, count: int, now: float) -> list[Standing]:
        """Divide this process's own share of the bucket among `count` that wait."""
        if self._local is None:
            known = self.burst if self._left is None else self._left
            start = min(known, max(1.0, known / SHARES))
            self._local = LocalBucket(
                per_second=self.per_minute / 60 / SHARES,
                burst=max(1.0, self.burst / SHARES),
                tokens=start,
                now=now,
            )
        grant = self._local.take(count, now)
        self._left = self._local.tokens
        if grant.granted < count:
            self._refuse(grant.retry_after.total_seconds(), now)
        served = [self._standing()] * grant.granted
        return served + [self._refused(now)] * (count - len(served))

    def refusal(self, now: float) -> timedelta:
        """Say how long it is going to be refused, zero when that is not known."""
        if now >= self._refused_until:
            return _NO_TIME
        return self._wait(now)

    def _refuse(self, wait: float, now: float) -> None:
        self._next_token_at = now + wait
        self._refused_until = now + min(wait, LONGEST_REFUSAL)

    def _refused(self, now: float) -> Standing:
        return Standing(0, self._wait(now), self._reset(0))

    def _wait(self, now: float) -> timedelta:
        # Never zero, which would mean the opposite.
        wait = timedelta(seconds=self._next_token_at - now)
        return max(wait, timedelta(milliseconds=1))

    def _standing(self) -> Standing:
        left = int(self._left or 0) + self.held
        return Standing(left, _NO_TIME, self._reset(left))

    def _reset(self, left: int) -> timedelta:
        return timedelta(seconds=(self.burst - left) * 60 / self.per_minute)
