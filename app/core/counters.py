"""Counters and histograms that all processes share, kept in Redis.

A counter in one process's memory tells a different story each time another process answers
the scrape.  Here every process adds up locally and pushes the sums once a second; whoever
is asked reads the total.  A wiped Redis starts them at zero, as a restart would, which
Prometheus handles; figures about jobs that must be exact come from the tables instead.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from redis.asyncio import Redis
from redis.exceptions import RedisError

KEY = "mediagen:counters"
EVERY = timedelta(seconds=1)
MOST_SERIES = 5000  # kept while Redis is away; enough for every label there is

# Upper bounds in seconds, from a quick read to a job that met its deadline.
BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0),
)

_HISTOGRAM_KINDS = frozenset(("s", *(f"h{n}" for n in range(len(BUCKETS) + 1))))

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """One histogram: counts per bucket (not cumulated; the last is +Inf) and the sum."""

    counts: list[float] = field(default_factory=lambda: [0.0] * (len(BUCKETS) + 1))
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything counted so far, by name and labels."""

    counters: Mapping[str, Mapping[Labels, float]]
    histograms: Mapping[str, Mapping[Labels, Histogram]]


class SharedCounters:
    """Adds up here, pushes there.  Adding costs a dictionary entry and never waits."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._task: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count something that happened."""
        field = _field("c", name, _labels(labels))
        if field in self._sums or len(self._sums) < MOST_SERIES:
            self._sums[field] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Put one duration into a histogram."""
        own = _labels(labels)
        bucket = _field(f"h{bisect_left(BUCKETS, seconds)}", name, own)
        if bucket in self._sums or len(self._sums) < MOST_SERIES:
            self._sums[bucket] += 1
            self._sums[_field("s", name, own)] += seconds

    def start(self) -> None:
        """Push once a second from now on, in the running loop."""
        self._task = asyncio.create_task(self._push_for_ever())

    async def stop(self) -> None:
        """Push what is left, once, and end."""
        # Not cancelled: a push under way would be lost, or counted twice.
        self._ending.set()
        if self._task is not None:
            await self._task
        await self.push()

    async def push(self) -> None:
        """Push the sums; keep them for the next time if Redis is not there."""
        if not self._sums:
            return
        sums, self._sums = self._sums, defaultdict(float)
        pipeline = self._redis.pipeline(transaction=False)
        for name, amount in sums.items():
            pipeline.hincrbyfloat(KEY, name, amount)
        try:
            await pipeline.execute()
        except (RedisError, OSError, TimeoutError):
            for name, amount in sums.items():
                self._sums[name] += amount

    async def read(self) -> Snapshot:
        """Read the totals of all processes; empty when Redis is not there."""
        try:
            stored = await self._redis.hgetall(KEY)
        except (RedisError, OSError, TimeoutError):
            stored = {}
        counters: dict[str, dict[Labels, float]] = {}
        histograms: dict[str, dict[Labels, Histogram]] = {}
        for key, value in stored.items():
            kind, name, labels = _parse(_text(key))
            if kind == "c":
                counters.setdefault(name, {})[labels] = float(value)
            elif kind in _HISTOGRAM_KINDS:
                known = histograms.setdefault(name, {})
                found = known.get(labels, Histogram())
                if kind == "s":
                    found = Histogram(found.counts, float(value))
                else:
                    found.counts[int(kind[1:])] = float(value)
                known[labels] = found
            # What is left was written by another version: not ours to interpret.
        return Snapshot(counters, histograms)

    async def _push_for_ever(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY.total_seconds()):
                    await self._ending.wait()
            await self.push()


def _labels(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def _field(kind: str, name: str, labels: Labels) -> str:
    return "\x1f".join((kind, name, *(f"{key}={value}" for key, value in labels)))


def _parse(text: str) -> tuple[str, str, Labels]:
    kind, _, rest = text.partition("\x1f")
    name, *pairs = rest.split("\x1f")
    labels = tuple((key, value) for key, _, value in (p.partition("=") for p in pairs))
    return kind, name, labels


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
