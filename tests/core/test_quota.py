"""Quotas against a real Valkey: shared, taken in advance, given back; and without it."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from app.core import lifeline, quota
from app.core.lifeline import Lifeline
from app.core.quota import Quotas, Standing
from tests.support.servers import ROOT
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for_async

MINUTE = timedelta(minutes=1)
NO_TIME = timedelta(0)
BUSY_MACHINE = timedelta(seconds=30)  # slow is not away


class Clock:
    """A local clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def another(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def wire(redis_url: str) -> AsyncIterator[TcpProxy]:
    parts = urlsplit(redis_url)
    assert parts.hostname is not None and parts.port is not None
    async with TcpProxy(parts.hostname, parts.port) as wire:
        yield wire


@pytest.fixture
async def through_wire(redis_url: str, wire: TcpProxy) -> AsyncIterator[Redis]:
    parts = urlsplit(redis_url)
    url = f"redis://:{parts.password}@127.0.0.1:{wire.port}/0"
    async with Redis.from_url(url) as client:
        yield client


def open_quotas(redis: Redis, **options: Any) -> Quotas:
    """Make what one process has."""
    clock = options.pop("clock", time.monotonic)
    line = Lifeline(redis, **{"clock": clock, "patience": BUSY_MACHINE} | options)
    return Quotas(redis, lifeline=line, clock=clock)


async def take(quotas: Quotas, n: int, **limits: int) -> list[Standing]:
    limits = {"per_minute": 1, "burst": 10} | limits
    return [await quotas.take("a", **limits) for _ in range(n)]


def passed(standings: Sequence[Standing]) -> int:
    return sum(not one.wait for one in standings)


async def calls(redis: Redis) -> int:
    """Count the scripts Redis has run."""
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))


# ------------------------------------------------------------------------- one process


async def test_a_full_bucket_gives_its_burst_and_no_more(redis: Redis) -> None:
    quotas = open_quotas(redis)

    standings = await take(quotas, 12)

    assert [one.left for one in standings] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0]
    assert passed(standings) == 10
    assert standings[0].reset == MINUTE
    assert standings[9].reset == 10 * MINUTE
    for refused in standings[10:]:
        assert MINUTE - timedelta(seconds=2) < refused.wait <= MINUTE


async def test_the_burst_is_a_minutes_worth(redis: Redis) -> None:
    quotas = open_quotas(redis)

    standings = [await quotas.take("a", per_minute=5) for _ in range(6)]

    assert passed(standings) == 5
    assert standings[0].left == 4
    assert timedelta(seconds=10) < standings[-1].wait <= timedelta(seconds=12)


async def test_a_bucket_fills_evenly(redis: Redis) -> None:
    quotas = open_quotas(redis)
    limits = {"per_minute": 60 * 200, "burst": 10}
    began, done = time.monotonic(), 0
    while done < 60:
        (standing,) = await take(quotas, 1, **limits)
        done += not standing.wait
        await asyncio.sleep(standing.wait.total_seconds())

    # Ten were there; fifty more take a quarter of a second at 200 a second.
    assert 0.23 <= time.monotonic() - began < 2


async def test_names_are_strangers(redis: Redis) -> None:
    quotas = open_quotas(redis)

    for name in ("a", "b"):
        assert not (await quotas.take(name, per_minute=1)).wait
        assert (await quotas.take(name, per_minute=1)).wait


async def test_a_refusal_is_known_until_there_may_be_more(redis: Redis) -> None:
    clock = Clock()
    quotas = open_quotas(redis, clock=clock)
    assert quotas.refusal("a") == NO_TIME
    await take(quotas, 10)
    assert quotas.refusal("a") == NO_TIME

    await take(quotas, 1)

    assert quotas.refusal("a") > timedelta(seconds=55)
    clock.now += quota.LONGEST_REFUSAL
    assert quotas.refusal("a") == NO_TIME


async def test_other_figures_hold_at_once(redis: Redis) -> None:
    quotas = open_quotas(redis)
    await take(quotas, 11)

    raised = await take(quotas, 1, per_minute=60_000, burst=100)
    lowered = await take(quotas, 1, per_minute=60_000, burst=2)

    # The bucket is the same, and fills a thousand times a second now.
    assert not raised[0].wait or raised[0].wait < timedelta(milliseconds=2)
    assert lowered[0].left < 2


async def test_an_idle_bucket_leaves_nothing_behind(redis: Redis) -> None:
    await take(open_quotas(redis), 10, per_minute=6000)

    assert 0 < await redis.pttl("throttle:a") <= 1200


async def test_a_wiped_redis_is_a_full_bucket(redis: Redis) -> None:
    clock = Clock()
    quotas = open_quotas(redis, clock=clock)
    await take(quotas, 11)
    await redis.flushall()
    await redis.script_flush()

    clock.now += quota.LONGEST_REFUSAL

    assert passed(await take(quotas, 11)) == 10


async def test_only_so_many_names_are_known() -> None:
    clock = Clock()
    async with Redis.from_url("redis://127.0.0.1:9/0") as nowhere:
        quotas = open_quotas(nowhere, clock=clock)
        await quotas.take("first", per_minute=1)
        assert (await quotas.take("first", per_minute=1)).wait

        for number in range(quota.MOST_NAMES):
            await quotas.take(str(number), per_minute=1)

        assert quotas.refusal("first") == NO_TIME
        assert (await quotas.take("1", per_minute=1)).wait
        await quotas._lifeline.aclose()


# -------------------------------------------------------------------------- its price


async def test_who_is_busy_asks_redis_seldom(redis: Redis) -> None:
    quotas = open_quotas(redis)
    before = await calls(redis)

    standings = [await quotas.take("a", per_minute=600_000) for _ in range(5000)]

    assert passed(standings) == 5000
    assert await calls(redis) - before < 40
    await quotas.aclose()


async def test_a_small_limit_is_never_taken_in_advance(
    redis: Redis, another: Redis
) -> None:
    here, there = open_quotas(redis), open_quotas(another)
    await take(here, 5, per_minute=10)

    assert passed(await take(there, 6, per_minute=10)) == 5


async def test_a_flood_of_refusals_asks_redis_seldom(redis: Redis) -> None:
    quotas = open_quotas(redis)
    await take(quotas, 10)
    before = await calls(redis)

    assert passed(await take(quotas, 2000)) == 0

    assert await calls(redis) - before <= 1 + math.ceil(quota.LONGEST_REFUSAL)


async def test_many_names_ask_in_one_call(redis: Redis) -> None:
    quotas = open_quotas(redis)
    before = await calls(redis)

    standings = await asyncio.gather(
        *(quotas.take(str(number), per_minute=2) for number in range(300))
    )

    assert [one.left for one in standings] == [1] * 300
    assert await calls(redis) - before <= 3


async def test_what_was_not_needed_goes_back(redis: Redis) -> None:
    quotas = open_quotas(redis)
    limits = {"per_minute": 60_000, "burst": 4000}
    before = await calls(redis)
    standings = await take(quotas, 20, **limits)
    asked = await calls(redis) - before
    assert passed(standings) == 20 and asked < 10
    assert quotas._holding

    async def is_given_back() -> bool:
        return await calls(redis) - before == asked + 1

    await wait_for_async(is_given_back, within=5, what="what was not needed")
    assert not quotas._holding


async def test_who_ends_leaves_nothing_behind_in_its_hand(
    redis: Redis, another: Redis
) -> None:
    limits = {"per_minute": 1200, "burst": 4000}  # 20 a second, taken by two
    here, there = open_quotas(redis), open_quotas(another)
    await take(here, 2, **limits)
    assert here._holding

    await here.aclose()

    assert (await take(there, 1, **limits))[0].left >= 4000 - 3


# ------------------------------------------------------------------------------ shared


async def test_two_processes_share_a_bucket(redis: Redis, another: Redis) -> None:
    here, there = open_quotas(redis), open_quotas(another)

    assert passed(await take(here, 6)) == 6
    assert passed(await take(there, 6)) == 4
    assert passed(await take(here, 1)) == 0


async def test_takers_together_get_all_there_is_and_no_more(
    redis: Redis, another: Redis
) -> None:
    per_second, burst = 400, 800
    limits = {"per_minute": per_second * 60, "burst": burst}
    fleet = [open_quotas(client) for client in (redis, another, redis, another)]
    loop = asyncio.get_running_loop()

    async def taker(quotas: Quotas, until: float) -> int:
        done = 0
        while loop.time() < until:
            done += passed(await take(quotas, 1, **limits))
            await asyncio.sleep(0)
        return done

    await another.ping()
    began = loop.time()
    # Not full any more: from here on every drop counts.
    opening = (fleet[0].take("a", **limits) for _ in range(400))
    total = passed(await asyncio.gather(*opening))
    takers = (taker(fleet[n % 4], began + 0.5) for n in range(40))
    total += sum(await asyncio.gather(*takers))
    spent = loop.time() - began
    for quotas in fleet:
        await quotas.aclose()

    assert burst + per_second * (spent - 0.25) < total
    assert total <= burst + per_second * spent + 1


# Each goes on until it was let through and refused, however slow the machine is: with a bucket
# that is never empty nothing would be shown.  For the same reason Redis is never taken to be away.
PROGRAM = """
import asyncio, sys, time
from datetime import timedelta
from redis.asyncio import Redis
from app.core.lifeline import Lifeline
from app.core.quota import Quotas
async def main(url, seconds):
    async with Redis.from_url(url) as redis:
        lifeline = Lifeline(redis, patience=timedelta(seconds=30))
        quotas = Quotas(redis, lifeline=lifeline)
        await redis.ping()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        until, answers = time.monotonic() + float(seconds), {True: 0, False: 0}
        async def taker():
            while time.monotonic() < until or not all(answers.values()):
                standing = await quotas.take("a", per_minute=6_000, burst=600)
                answers[not standing.wait] += 1
                await asyncio.sleep(0)
        await asyncio.gather(*(taker() for _ in range(8)))
        await quotas.aclose()
        print(answers[True])
asyncio.run(main(*sys.argv[1:]))
"""


async def test_real_processes_never_exceed_a_bucket(redis_url: str) -> None:
    pipe = asyncio.subprocess.PIPE
    programs = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, redis_url, "0.6"),
            cwd=ROOT,
            stdin=pipe,
            stdout=pipe,
        )
        for _ in range(3)
    ]
    try:
        for program in programs:
            assert program.stdout and await program.stdout.readline() == b"ready\n"
        began = time.monotonic()
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*(one.communicate(b"\n") for one in programs))
        spent = time.monotonic() - began
    finally:
        for program in programs:
            if program.returncode is None:
                program.kill()
                await program.wait()
    counts = [int(said) for said, _ in ends]

    assert all(counts)
    assert 300 < sum(counts) <= 600 + 100 * spent + 1


Steps = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(1, 9)),
    max_size=30,
)


@settings(max_examples=25)
@given(steps=Steps, burst=st.integers(1, 30))
async def test_whoever_takes_in_whatever_order_a_bucket_gives_its_burst(
    valkey: Any, steps: list[tuple[str, int, int]], burst: int
) -> None:
    async with Redis.from_url(valkey.url) as redis:
        await redis.flushall()
        fleet = [open_quotas(redis) for _ in range(3)]
        wanted, given_out = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
        for name, process, amount in steps:
            takings = (
                fleet[process].take(name, per_minute=1, burst=burst)
                for _ in range(amount)
            )
            wanted[name] += amount
            given_out[name] += passed(await asyncio.gather(*takings))

    # One a minute more: too slow for a test to see.
    assert given_out == {name: min(burst, n) for name, n in wanted.items()}


async def test_a_taker_that_gives_up_holds_nobody_up(redis: Redis) -> None:
    quotas = open_quotas(redis)
    takers = [
        asyncio.create_task(quotas.take("a", per_minute=1, burst=10)) for _ in range(5)
    ]
    await asyncio.sleep(0)
    for taker in takers[::2]:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)

    assert 5 <= passed(await take(quotas, 10)) <= 8


# ----------------------------------------------------------------------- without Redis


async def test_without_redis_there_is_a_share(
    through_wire: Redis, wire: TcpProxy
) -> None:
    clock = Clock()
    quotas = open_quotas(through_wire, clock=clock)
    limits = {"per_minute": 240, "burst": 40}
    await wire.refuse()

    # A quarter of 40 at once, and of four a second.
    standings = await take(quotas, 12, **limits)
    assert passed(standings) == 10
    assert standings[-1].wait == timedelta(seconds=1)
    clock.now += 3
    assert passed(await take(quotas, 5, **limits)) == 3
    clock.now += 3600
    assert passed(await take(quotas, 50, **limits)) == 10
    await quotas._lifeline.aclose()


async def test_the_share_is_one_of_what_was_left(
    through_wire: Redis, wire: TcpProxy
) -> None:
    quotas = open_quotas(through_wire)
    await take(quotas, 32, burst=40)

    await wire.refuse()

    assert passed(await take(quotas, 10, burst=40)) == 2
    await quotas._lifeline.aclose()


async def test_another_outage_is_another_share(
    through_wire: Redis, wire: TcpProxy
) -> None:
    clock = Clock()
    quotas = open_quotas(through_wire, clock=clock)
    await take(quotas, 4, burst=40)
    await wire.refuse()
    assert passed(await take(quotas, 10, burst=40)) == 9
    await wire.restore()

    async def is_back() -> bool:
        clock.now += 1.1
        return quotas._lifeline.is_up

    await wait_for_async(is_back, within=5, what="Redis")
    assert (await take(quotas, 1, burst=40))[0].left == 35
    await wire.refuse()

    assert passed(await take(quotas, 10, burst=40)) == 8
    await quotas._lifeline.aclose()


async def test_who_has_nothing_left_has_no_share(
    through_wire: Redis, wire: TcpProxy
) -> None:
    clock = Clock()
    quotas = open_quotas(through_wire, clock=clock)
    await take(quotas, 10)

    await wire.refuse()

    assert passed(await take(quotas, 3)) == 0
    await quotas._lifeline.aclose()


async def test_a_silent_redis_costs_its_timeout_once_for_all(
    through_wire: Redis, wire: TcpProxy
) -> None:
    clock = Clock()
    line = Lifeline(through_wire, clock=clock)
    keys, addresses = (
        Quotas(through_wire, lifeline=line, clock=clock) for _ in range(2)
    )
    await wire.fall_silent()
    began = time.monotonic()

    for number in range(200):
        await keys.take(f"key {number % 7}", per_minute=600)
        await addresses.take(str(number), per_minute=20)
        clock.now += 0.05  # past REST more than once

    spent = time.monotonic() - began
    await line.aclose()
    patience = lifeline.PATIENCE.total_seconds()
    assert patience * 0.9 < spent < 3 * patience


async def test_those_who_wait_together_wait_once(
    through_wire: Redis, wire: TcpProxy
) -> None:
    quotas = open_quotas(through_wire, patience=lifeline.PATIENCE)
    await wire.fall_silent()
    began = time.monotonic()

    standings = await asyncio.gather(
        *(quotas.take(str(n), per_minute=600) for n in range(100))
    )

    assert passed(standings) == 100
    assert time.monotonic() - began < 3 * lifeline.PATIENCE.total_seconds()
    await quotas._lifeline.aclose()


async def test_a_redis_that_comes_back_is_asked_again(
    through_wire: Redis, wire: TcpProxy, redis: Redis
) -> None:
    clock = Clock()
    quotas = open_quotas(through_wire, clock=clock)
    await take(quotas, 4)
    await wire.refuse()
    assert passed(await take(quotas, 5)) == 1
    await wire.restore()
    # Somebody else went on meanwhile.
    assert passed(await take(open_quotas(redis), 4)) == 4

    clock.now += 1.1

    async def is_asked() -> bool:
        return passed(await take(quotas, 1)) == 0 and quotas._lifeline.is_up

    async def rest() -> int:
        return passed(await take(quotas, 5))

    # The first taking has a look beside its work; the bucket decides from then on.
    before = await rest()
    await wait_for_async(is_asked, within=5, what="the bucket")
    assert before + await rest() <= 2


async def test_a_script_that_is_refused_stops_nobody(redis: Redis) -> None:
    await redis.set("throttle:a", "not a hash")
    quotas = open_quotas(redis)

    assert passed(await take(quotas, 3)) == 2
    await quotas._lifeline.aclose()
