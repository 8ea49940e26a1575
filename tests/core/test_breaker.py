"""A breaker all processes share: against a real Valkey that is wiped, cut off and silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from app.core.breaker import BreakerState, CircuitBreaker, GuardedBucket
from app.core.circuit import Condition, Rhythm
from app.core.throttle import Grant, TokenBucket
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for_async

NO_TIME = timedelta(0)
ALL = Grant(10, NO_TIME)
CLOSED = BreakerState(Condition.CLOSED)
TENTH = timedelta(milliseconds=100)
# On Redis's clock: short enough to wait for.
QUICK = Rhythm(
    first_pause=TENTH,
    first_fatal_pause=TENTH,
    longest_pause=2 * TENTH,
    probe_lease=3 * TENTH,
    probe_glance=TENTH / 10,
)
SLOW = Rhythm()

Make = Callable[..., CircuitBreaker]


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def make(redis_url: str) -> AsyncIterator[Make]:
    """Make breakers as if each were in a process of its own."""
    clients: list[Redis] = []

    def one(
        rhythm: Rhythm = QUICK, url: str = redis_url, **more: object
    ) -> CircuitBreaker:
        client = Redis.from_url(url)
        clients.append(client)
        return CircuitBreaker(client, "test", rhythm=rhythm, **more)  # type: ignore

    yield one
    for client in clients:
        await client.aclose()


@pytest.fixture
async def wire(redis_url: str) -> AsyncIterator[TcpProxy]:
    """A connection to Valkey that can be cut."""
    parts = urlsplit(redis_url)
    assert parts.hostname and parts.port
    async with TcpProxy(parts.hostname, parts.port) as wire:
        yield wire


def over(wire: TcpProxy, redis_url: str) -> str:
    """Give the address of Valkey at the other end of the wire."""
    parts = urlsplit(redis_url)
    return f"redis://:{parts.password}@127.0.0.1:{wire.port}/0"


async def fail(breaker: CircuitBreaker, times: int = 1, *, fatal: bool = False) -> None:
    for _ in range(times):
        await breaker.report_trouble(breaker.turn, "ill", is_fatal=fatal)


async def probe_of(*breakers: CircuitBreaker) -> CircuitBreaker:
    """Wait until one of them lets a single one through; give that one."""

    async def ask() -> CircuitBreaker | None:
        for breaker in breakers:
            if (await breaker.allow(10)).granted:
                return breaker
        return None

    return await wait_for_async(ask, within=5, what="a probe may go")


async def seen_by(breaker: CircuitBreaker, condition: Condition) -> BreakerState:
    """Wait until a reader sees it so: what it knows may be a second old."""

    async def look() -> BreakerState | None:
        state = await breaker.state()
        return state if state.condition is condition else None

    return await wait_for_async(look, within=5, what=f"seen as {condition}")


async def test_what_one_process_met_with_holds_the_others_back(make: Make) -> None:
    ours, theirs = make(SLOW), make(SLOW)

    await fail(ours, fatal=True)

    for breaker in (ours, theirs):
        grant = await breaker.allow(10)
        assert grant.granted == 0
        assert timedelta(seconds=14) < grant.retry_after <= timedelta(seconds=15)
        state = await breaker.state()
        assert (state.condition, state.reason) == (Condition.OPEN, "ill")
        assert state.since and state.retry_at
        assert state.retry_at - state.since == SLOW.first_fatal_pause


async def test_trouble_of_several_processes_adds_up(make: Make) -> None:
    breakers = [make(SLOW) for _ in range(SLOW.threshold)]

    for breaker in breakers[1:]:
        await fail(breaker)
    assert await make(SLOW).state() == CLOSED
    await fail(breakers[0])

    assert (await make(SLOW).allow(10)).granted == 0


async def test_anothers_success_ends_a_row_of_trouble(make: Make) -> None:
    now = 1000.0
    ours, theirs = make(SLOW), make(SLOW, clock=lambda: now)

    for _ in range(5):
        await fail(ours, SLOW.threshold - 1)
        now += 1  # what they know of us is old by then
        assert await theirs.allow(10) == ALL
        await theirs.report_success(theirs.turn)

    assert await ours.allow(10) == ALL


async def test_of_many_processes_one_sends_the_probe_and_closes_it(make: Make) -> None:
    # The probe is out for longer than this takes.
    patient = replace(QUICK, probe_lease=SLOW.probe_lease)
    breakers = [make(patient) for _ in range(6)]
    await fail(breakers[0], fatal=True)

    first = await probe_of(*breakers)
    others = await asyncio.gather(
        *(breaker.allow(10) for _ in range(5) for breaker in breakers)
    )

    assert sum(grant.granted for grant in others) == 0
    await first.report_success(first.turn)
    for breaker in breakers:
        assert await breaker.allow(10) == ALL


async def test_at_the_same_moment_too_only_one_probe_leaves(make: Make) -> None:
    breakers = [make() for _ in range(8)]
    await fail(breakers[0], fatal=True)
    await seen_by(breakers[0], Condition.HALF_OPEN)

    grants = await asyncio.gather(*(breaker.allow(10) for breaker in breakers))

    assert sum(grant.granted for grant in grants) == 1


async def test_a_probe_whose_process_died_is_replaced(make: Make) -> None:
    dead, alive = make(), make()
    await fail(dead, fatal=True)
    assert await probe_of(dead) is dead
    assert (await alive.allow(10)).granted == 0

    assert await probe_of(alive) is alive
    await alive.report_success(alive.turn)

    assert await make().state() == CLOSED


async def test_a_failed_probe_opens_it_again_for_longer(make: Make) -> None:
    breaker = make()
    await fail(breaker, fatal=True)
    began = (await breaker.state()).since

    await probe_of(breaker)
    await fail(breaker)

    state = await breaker.state()
    assert state.condition is Condition.OPEN
    assert state.since == began
    grant = await breaker.allow(10)
    assert grant.granted == 0 and grant.retry_after > TENTH


async def test_a_probe_that_was_not_used_is_given_back(make: Make) -> None:
    ours, theirs = make(), make()
    await fail(ours, fatal=True)
    await probe_of(ours)

    await ours.give_back(1)

    assert (await theirs.allow(10)).granted == 1
    # Not ours any more: nothing to give back.
    await ours.give_back(1)
    assert (await ours.allow(10)).granted == 0


async def test_what_began_before_it_opened_changes_nothing(make: Make) -> None:
    ours, theirs = make(SLOW), make(SLOW)
    early = theirs.turn
    await fail(ours, fatal=True)
    opened = await ours.state()

    await theirs.report_success(early)
    await theirs.report_answer(early)
    await theirs.report_trouble(early, "worse", is_fatal=True)

    assert await make(SLOW).state() == opened


async def test_it_tells_each_opening_once(make: Make) -> None:
    told: list[str] = []
    breakers = [make(on_opened=told.append) for _ in range(4)]

    with capture_logs() as logs:
        await asyncio.gather(*(fail(one, 3, fatal=True) for one in breakers))
        await fail(await probe_of(*breakers), fatal=True)
        last = await probe_of(*breakers)
        await last.report_success(last.turn)

    assert told == ["ill"]
    events = [line["event"] for line in logs]
    assert events == ["breaker.opened", "breaker.closed"]


async def test_while_all_is_well_a_success_costs_nothing(
    make: Make, wire: TcpProxy, redis_url: str
) -> None:
    breaker = make(SLOW, over(wire, redis_url))
    assert await breaker.allow(10) == ALL
    await wire.refuse()

    with capture_logs() as logs:
        for _ in range(100):
            await breaker.report_success(breaker.turn)
            await breaker.report_answer(breaker.turn)

    assert not logs  # nobody found out that Redis is gone


async def test_a_wiped_redis_closes_it_until_the_next_trouble(
    make: Make, redis: Redis
) -> None:
    breaker = make(SLOW)
    await fail(breaker, fatal=True)
    turn = breaker.turn

    await redis.flushall()

    assert await breaker.allow(10) == ALL
    await breaker.report_trouble(turn, "ill", is_fatal=True)
    assert (await breaker.allow(10)).granted == 0


async def test_another_versions_record_is_overwritten(make: Make, redis: Redis) -> None:
    breaker = make(SLOW)
    await redis.set("breaker:test", b'{"version": 99}')

    assert await breaker.allow(10) == ALL
    await fail(breaker, fatal=True)

    assert (await make(SLOW).allow(10)).granted == 0


@pytest.mark.parametrize("how", ["refuse", "fall_silent"])
async def test_without_redis_a_process_goes_by_what_it_knows(
    make: Make, wire: TcpProxy, redis_url: str, how: str
) -> None:
    breaker = make(SLOW, over(wire, redis_url))
    await fail(breaker, fatal=True)
    known = await breaker.state()

    await getattr(wire, how)()

    assert (await breaker.allow(10)).granted == 0
    assert await breaker.state() == known


@pytest.mark.parametrize("how", ["refuse", "fall_silent"])
async def test_without_redis_a_process_opens_and_closes_by_itself(
    make: Make, wire: TcpProxy, redis_url: str, how: str
) -> None:
    now = 1000.0
    breaker = make(SLOW, over(wire, redis_url), clock=lambda: now)
    await getattr(wire, how)()
    loop = asyncio.get_running_loop()
    began = loop.time()

    assert await breaker.allow(10) == ALL
    await fail(breaker, SLOW.threshold)
    assert (await breaker.allow(10)).granted == 0
    # Only the first of them waited for Redis.
    assert loop.time() - began < 0.5

    now += SLOW.first_pause.total_seconds()
    assert (await breaker.allow(10)).granted == 1
    assert (await breaker.allow(10)).granted == 0
    await breaker.report_success(breaker.turn)
    assert await breaker.allow(10) == ALL


async def test_redis_is_used_again_when_it_is_back(
    make: Make, wire: TcpProxy, redis_url: str
) -> None:
    now = 1000.0
    breaker = make(SLOW, over(wire, redis_url), clock=lambda: now)
    await wire.refuse()
    assert await breaker.allow(10) == ALL
    await wire.restore()
    await fail(make(SLOW), fatal=True)

    assert await breaker.allow(10) == ALL  # not asked again so soon
    now += 2

    assert (await breaker.allow(10)).granted == 0


async def test_many_readers_ask_once(make: Make, redis: Redis) -> None:
    breaker = make(SLOW)
    await fail(make(SLOW), fatal=True)

    before = (await redis.info("commandstats")).get("cmdstat_get", {"calls": 0})
    states = await asyncio.gather(*(breaker.state() for _ in range(50)))
    after = (await redis.info("commandstats"))["cmdstat_get"]

    assert {state.condition for state in states} == {Condition.OPEN}
    assert after["calls"] - before["calls"] == 1


# ---------------------------------------------------------------------- with a bucket


def bucket(redis: Redis, burst: int) -> TokenBucket:
    return TokenBucket(redis, "test", per_minute=1, burst=burst)


async def test_a_guarded_bucket_gives_what_both_allow(make: Make, redis: Redis) -> None:
    breaker, tokens = make(SLOW), bucket(redis, 6)
    guarded = GuardedBucket(breaker, tokens)

    assert await guarded.take(4) == Grant(4, NO_TIME)
    rest = await guarded.take(4)
    assert rest.granted == 2 and rest.retry_after > timedelta(seconds=30)
    await guarded.give_back(2)
    await fail(breaker, fatal=True)

    assert (await guarded.take(4)).granted == 0
    assert (await tokens.take(2)).granted == 2  # no token went while it was open


async def test_a_probe_without_a_token_does_not_leave(make: Make, redis: Redis) -> None:
    ours, theirs = make(), make()
    tokens = bucket(redis, 1)
    await tokens.take(1)
    await fail(ours, fatal=True)
    await seen_by(ours, Condition.HALF_OPEN)

    grant = await GuardedBucket(ours, tokens).take(10)

    assert grant.granted == 0 and grant.retry_after > timedelta(seconds=30)
    assert (await theirs.allow(10)).granted == 1


async def test_an_unused_probe_goes_back_with_its_token(
    make: Make, redis: Redis
) -> None:
    ours, theirs = make(), make()
    guarded = GuardedBucket(ours, bucket(redis, 1))
    await fail(ours, fatal=True)
    await seen_by(ours, Condition.HALF_OPEN)

    assert (await guarded.take(10)).granted == 1
    await guarded.give_back(1)

    assert (await GuardedBucket(theirs, bucket(redis, 1)).take(10)).granted == 1
