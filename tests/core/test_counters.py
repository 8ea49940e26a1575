"""Counters all processes share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from app.core import counters
from app.core.counters import BUCKETS, KEY, SharedCounters
from tests.support.waiting import wait_for_async

CLOSED_PORT = "redis://127.0.0.1:9/0"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


async def test_what_several_processes_counted_adds_up(redis: Redis) -> None:
    ours, theirs = SharedCounters(redis), SharedCounters(redis)

    ours.add("requests", code="200")
    ours.add("requests", code="200")
    ours.add("requests", code="404")
    theirs.add("requests", 3, code="200")
    await ours.push()
    await theirs.push()

    found = (await ours.read()).counters["requests"]
    assert found == {(("code", "200"),): 5, (("code", "404"),): 1}
    assert found == (await theirs.read()).counters["requests"]


async def test_the_order_of_labels_does_not_matter(redis: Redis) -> None:
    ours = SharedCounters(redis)

    ours.add("requests", route="/jobs", code="200")
    ours.add("requests", code="200", route="/jobs")
    await ours.push()

    assert list((await ours.read()).counters["requests"].values()) == [2]


@pytest.mark.parametrize("value", ["a=b", "", "ü ✓", "a:b/{c}"])
async def test_labels_come_back_as_they_were(redis: Redis, value: str) -> None:
    ours = SharedCounters(redis)

    ours.add("requests", route=value)
    await ours.push()

    assert list((await ours.read()).counters["requests"]) == [(("route", value),)]


async def test_a_duration_lands_in_its_bucket(redis: Redis) -> None:
    ours = SharedCounters(redis)

    for seconds in (0.001, BUCKETS[0], 0.006, 10_000.0):
        ours.observe("seconds", seconds)
    await ours.push()

    found = (await ours.read()).histograms["seconds"][()]
    assert found.counts == [2, 1, *[0] * (len(BUCKETS) - 2), 1]
    assert found.total == pytest.approx(10_000.012)


async def test_pushing_twice_counts_once(redis: Redis) -> None:
    ours = SharedCounters(redis)
    ours.add("requests")

    await ours.push()
    await ours.push()

    assert (await ours.read()).counters["requests"] == {(): 1}


async def test_what_was_counted_is_pushed_by_itself_and_at_the_end(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "EVERY", counters.EVERY / 100)
    ours = SharedCounters(redis)
    ours.start()
    ours.add("early")
    async with asyncio.timeout(5):
        while "early" not in (await ours.read()).counters:
            pass

    ours.add("late")
    await ours.stop()

    assert "late" in (await SharedCounters(redis).read()).counters


async def test_counting_goes_on_without_redis_and_nothing_is_lost(
    redis: Redis,
) -> None:
    async with Redis.from_url(CLOSED_PORT, retry=None) as nobody:
        ours = SharedCounters(nobody)
        ours.add("requests")
        ours.observe("seconds", 1.0)
        await ours.push()
        ours.add("requests")
        assert (await ours.read()).counters == {}

        ours._redis = redis  # it came back
        await ours.push()

    found = await ours.read()
    assert found.counters["requests"] == {(): 2}
    assert sum(found.histograms["seconds"][()].counts) == 1


async def test_memory_is_bounded_while_redis_is_away(redis: Redis) -> None:
    ours = SharedCounters(redis)
    ours.add("known")
    ours.observe("seconds", 1.0)
    for number in range(counters.MOST_SERIES + 10):
        ours.add("flood", number=str(number))

    ours.add("known")
    ours.observe("seconds", 1.0)
    await ours.push()

    found = await ours.read()
    assert len(found.counters["flood"]) <= counters.MOST_SERIES
    assert found.counters["known"] == {(): 2}
    assert sum(found.histograms["seconds"][()].counts) == 2


async def test_stopping_in_the_middle_of_a_push_loses_nothing(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "EVERY", counters.EVERY / 1000)
    ours = SharedCounters(redis)
    ours.add("requests")
    await redis.client_pause(300)
    ours.start()

    async def is_under_way() -> bool:
        return not ours._sums

    await wait_for_async(is_under_way, within=5, what="a push", every=0)
    await ours.stop()

    assert (await ours.read()).counters["requests"] == {(): 1}


async def test_a_wiped_redis_starts_at_zero(redis: Redis) -> None:
    ours = SharedCounters(redis)
    ours.add("requests", 41)
    await ours.push()

    await redis.delete(KEY)
    ours.add("requests")
    await ours.push()

    assert (await ours.read()).counters["requests"] == {(): 1}


@pytest.mark.parametrize("junk", [b"", b"x", b"h99\x1fseconds", b"hx\x1fa"])
async def test_what_another_version_left_does_no_harm(
    redis: Redis, junk: bytes
) -> None:
    ours = SharedCounters(redis)
    ours.add("requests")
    await ours.push()
    await redis.hset(KEY, junk, "1")

    assert (await ours.read()).counters["requests"] == {(): 1}
