"""Hints: heard by all processes, few on the wire, and nobody's trouble when Redis is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from app.core import hints
from app.core.hints import Hints
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for_async

SOON = 15.0


class Ear:
    """Counts what it hears."""

    def __init__(self) -> None:
        self.count = 0

    def hear(self) -> None:
        self.count += 1

    async def heard_more_than(self, number: int) -> None:
        async def has_heard() -> bool:
            return self.count > number

        await wait_for_async(has_heard, within=SOON, what="a hint")


@asynccontextmanager
async def process(url: str) -> AsyncIterator[Hints]:
    """Give what a process has to give and hear hints."""
    redis = Redis.from_url(url, socket_timeout=0.3, socket_connect_timeout=0.3)
    made = Hints(redis, "test:hints")
    try:
        yield made
    finally:
        await made.aclose()
        await redis.aclose()


async def listening(made: Hints, redis: Redis) -> Ear:
    """Listen, once the subscription stands."""
    before = len(await redis.client_list(_type="pubsub"))
    ear = Ear()
    made.listen(ear.hear)

    async def is_subscribed() -> bool:
        return len(await redis.client_list(_type="pubsub")) > before

    await wait_for_async(is_subscribed, within=SOON, what="a subscription")
    await ear.heard_more_than(0)  # what was before may have been missed
    return ear


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


async def test_a_hint_is_heard_in_every_process(redis: Redis, redis_url: str) -> None:
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(process(redis_url)) for _ in range(2)
        ]
        ears = [await listening(one, redis) for one in (first, second)]
        before = [ear.count for ear in ears]
        first.give()
        assert ears[0].count == before[0] + 1  # one's own at once
        await ears[1].heard_more_than(before[1])


async def test_another_database_of_the_server_is_another_deployment(
    redis: Redis, redis_url: str
) -> None:
    other = redis_url.rpartition("/")[0] + "/1"
    async with process(redis_url) as here, process(other) as there:
        ear, far = await listening(here, redis), await listening(there, redis)
        before = far.count
        async with process(redis_url) as giver:
            heard = ear.count
            giver.give()
            await ear.heard_more_than(heard)
        assert far.count == before


async def test_many_hints_are_few_messages(redis: Redis, redis_url: str) -> None:
    async with process(redis_url) as giver:
        async with redis.pubsub() as pubsub:
            await pubsub.subscribe("test:hints:0")
            began = time.monotonic()
            for _ in range(500):
                giver.give()
                await asyncio.sleep(0)
            await asyncio.sleep(5 * hints.PACE)
            most = (time.monotonic() - began) / hints.PACE + 2
            number = 0
            while (one := await pubsub.get_message(timeout=0.2)) is not None:
                number += one["type"] == "message"
    assert 1 <= number <= most < 500


async def test_without_redis_giving_is_quick_and_silent() -> None:
    async with process("redis://127.0.0.1:9/0") as giver:
        began = time.monotonic()
        for _ in range(1000):
            giver.give()
        assert time.monotonic() - began < 1.0
        await asyncio.sleep(0.05)
        giver.give()


@pytest.mark.parametrize("outage", ["refuse", "fall_silent"])
async def test_hints_are_heard_again_after_an_outage(
    redis: Redis, redis_url: str, outage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "LONGEST_QUIET", 0.5)
    parts = urlsplit(redis_url)
    assert parts.hostname and parts.port
    async with TcpProxy(parts.hostname, parts.port) as wire:
        async with (
            process(redis_url.replace(f":{parts.port}", f":{wire.port}")) as made,
            process(redis_url) as giver,
        ):
            ear = await listening(made, redis)
            await getattr(wire, outage)()
            await asyncio.sleep(1.0)
            await wire.restore()

            async def is_heard() -> bool:
                for _ in range(5):  # quicker than it looks by itself
                    before = ear.count
                    giver.give()
                    await asyncio.sleep(0.1)
                    if ear.count == before:
                        return False
                return True

            await wait_for_async(is_heard, within=SOON, what="a hint after it")
            assert len(await redis.client_list(_type="pubsub")) == 1
            await made.silence()

            async def is_silent() -> bool:
                return not await redis.client_list(_type="pubsub")

            await wait_for_async(is_silent, within=SOON, what="the end")
