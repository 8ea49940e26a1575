"""Remembering across processes, as long as Redis lets us."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from app.core import recall
from app.core.recall import Recall
from tests.support.tcp_proxy import TcpProxy

LIFETIME = timedelta(minutes=10)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


def open_recall(redis: Redis, **changes: Any) -> Recall:
    return Recall(redis, "test", **{"lifetime": LIFETIME} | changes)


async def test_what_was_noted_is_known_to_all_processes(redis: Redis) -> None:
    here, there = open_recall(redis), open_recall(redis)
    assert not await here.knows("a")

    await here.note("a")

    assert await here.knows("a")
    assert await there.knows("a")
    assert not await there.knows("b")
    (name,) = await redis.keys()
    assert 0 < await redis.ttl(name) <= LIFETIME.total_seconds()


async def test_it_is_forgotten_in_time(redis: Redis) -> None:
    now = 1000.0
    memory = open_recall(redis, clock=lambda: now)
    await memory.note("a")
    await redis.flushall()

    now += LIFETIME.total_seconds() - 1
    assert await memory.knows("a")
    now += 1
    assert not await memory.knows("a")


async def test_without_redis_a_process_knows_its_own_and_waits_once(
    redis_url: str,
) -> None:
    parts = urlsplit(redis_url)
    assert parts.hostname is not None and parts.port is not None
    async with TcpProxy(parts.hostname, parts.port) as wire:
        async with Redis.from_url(f"redis://127.0.0.1:{wire.port}/0") as redis:
            memory = open_recall(redis)
            await wire.fall_silent()
            began = time.monotonic()

            for number in range(20):
                assert not await memory.knows(f"new {number}")
                await memory.note(f"new {number}")
                assert await memory.knows(f"new {number}")

            assert time.monotonic() - began < 2 * recall.PATIENCE.total_seconds()


async def test_a_silent_redis_is_asked_again_after_a_rest(redis: Redis) -> None:
    now = 1000.0
    async with Redis.from_url("redis://127.0.0.1:9/0") as nowhere:
        memory = open_recall(nowhere, clock=lambda: now)
        await memory.note("a")
        memory._redis = redis  # it is back
        await memory.note("b")
        assert not await open_recall(redis).knows("b")

        now += recall.REST.total_seconds()
        await memory.note("c")

    assert await open_recall(redis).knows("c")


async def test_a_process_keeps_only_so_many() -> None:
    async with Redis.from_url("redis://127.0.0.1:9/0") as nowhere:
        memory = open_recall(nowhere, clock=lambda: 1000.0)

        for number in range(recall.MOST_HERE + 1):
            await memory.note(str(number))

        assert not await memory.knows("0")
        assert await memory.knows("1")
        assert await memory.knows(str(recall.MOST_HERE))
