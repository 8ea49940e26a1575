"""Signs of life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from app.core import heartbeat
from app.core.heartbeat import PREFIX, Heartbeat, living
from tests.support.waiting import wait_for_async


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


async def test_whoever_beats_is_alive_and_says_how_it_is(redis: Redis) -> None:
    beat = Heartbeat(redis, "host:1", lambda: {"in_flight": "7"})

    beat.start()
    found = await wait_for_async(lambda: living(redis), within=5, what="a beat")

    assert found == {"host:1": {"in_flight": "7"}}
    await beat.stop()


async def test_every_process_is_seen(redis: Redis) -> None:
    beats = [Heartbeat(redis, f"host:{n}", lambda: {"n": "1"}) for n in range(3)]
    for beat in beats:
        beat.start()

    async def all_three() -> bool:
        return set(await living(redis)) == {"host:0", "host:1", "host:2"}

    await wait_for_async(all_three, within=5, what="three beats")
    for beat in beats:
        await beat.stop()


async def test_whoever_stops_is_gone_at_once(redis: Redis) -> None:
    beat = Heartbeat(redis, "host:1", lambda: {"in_flight": "0"})
    beat.start()
    await wait_for_async(lambda: living(redis), within=5, what="a beat")

    await beat.stop()

    assert await living(redis) == {}


async def test_whoever_dies_is_forgotten_soon(redis: Redis) -> None:
    beat = Heartbeat(redis, "host:1", lambda: {"in_flight": "0"})
    beat.start()
    await wait_for_async(lambda: living(redis), within=5, what="a beat")

    left = await redis.pttl(f"{PREFIX}host:1")

    assert 0 < left <= heartbeat.LIFETIME.total_seconds() * 1000
    assert heartbeat.LIFETIME > 3 * heartbeat.EVERY, "one lost beat must not matter"
    await beat.stop()


async def test_it_beats_again_after_redis_was_wiped(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "EVERY", heartbeat.EVERY / 100)
    beat = Heartbeat(redis, "host:1", lambda: {"in_flight": "0"})
    beat.start()
    await wait_for_async(lambda: living(redis), within=5, what="a beat")

    await redis.flushall()

    assert await wait_for_async(lambda: living(redis), within=5, what="a beat")
    await beat.stop()


async def test_it_beats_and_stops_without_redis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "EVERY", heartbeat.EVERY / 100)
    tries = 0

    def describe() -> dict[str, str]:
        nonlocal tries
        tries += 1
        return {"in_flight": "0"}

    async with Redis.from_url("redis://127.0.0.1:9/0", retry=None) as nobody:
        beat = Heartbeat(nobody, "host:1", describe)
        beat.start()

        async def tried_again() -> bool:
            return tries > 1

        await wait_for_async(tried_again, within=5, what="a second try")
        await beat.stop()


async def test_whoever_stops_while_connecting_ends(redis_url: str) -> None:
    """Wherever the first beat is: connecting, greeting, sending."""
    for steps in range(60):
        async with Redis.from_url(redis_url, socket_timeout=0.5) as client:
            beat = Heartbeat(client, "host:1", lambda: {"in_flight": "0"})
            beat.start()
            for _ in range(steps):
                await asyncio.sleep(0)
            await asyncio.wait_for(beat.stop(), 2)
            assert await living(client) == {}
