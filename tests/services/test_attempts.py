"""Wrong keys by address: counted together, forgiven in time, never held against a right key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from redis.asyncio import Redis

from app.core.lifeline import Lifeline
from app.core.quota import Quotas
from app.domain.errors import OverLimit
from app.services import attempts
from app.services.attempts import BURST, FailedAttempts, network_of

HERE = "198.51.100.7"
THERE = "198.51.100.8"
NEW = b"never seen"


class Clock:
    """A clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def door(redis: Redis, clock: Clock) -> FailedAttempts:
    return open_door(redis, clock)


def open_door(redis: Redis, clock: Clock) -> FailedAttempts:
    line = Lifeline(redis, patience=timedelta(seconds=30), clock=clock)
    return FailedAttempts(Quotas(redis, lifeline=line, clock=clock), clock=clock)


async def fail(door: FailedAttempts, address: str, key: str) -> bool:
    """Come with a wrong key; tell whether it was one too many."""
    try:
        await door.note_failure(address, key.encode())
    except OverLimit:
        return True
    return False


async def guess(door: FailedAttempts, address: str, n: int) -> int:
    """Come with wrong keys, each another one; tell how many were too many."""
    return sum([await fail(door, address, f"guess {k}") for k in range(n)])


async def test_some_wrong_keys_are_only_wrong(door: FailedAttempts) -> None:
    assert await guess(door, HERE, BURST) == 0

    door.let_try(HERE, NEW)


async def test_after_too_many_nothing_is_looked_up(door: FailedAttempts) -> None:
    assert await guess(door, HERE, BURST + 5) == 5

    with pytest.raises(OverLimit) as caught:
        door.let_try(HERE, NEW)

    assert caught.value.code == "too_many_attempts"
    assert timedelta(0) < caught.value.retry_after <= timedelta(seconds=3)
    door.let_try(THERE, NEW)


async def test_it_is_forgiven_in_time(door: FailedAttempts, clock: Clock) -> None:
    await guess(door, HERE, BURST + 1)

    clock.now += 3

    door.let_try(HERE, NEW)


async def test_the_same_wrong_key_is_held_back_by_itself(
    door: FailedAttempts, clock: Clock
) -> None:
    refused = [await fail(door, HERE, "old") for _ in range(BURST + 3)]

    assert refused == [False] * BURST + [True] * 3
    with pytest.raises(OverLimit):
        door.let_try(HERE, b"old")
    door.let_try(HERE, NEW)
    clock.now += 3
    door.let_try(HERE, b"old")


async def test_a_wrong_key_is_forgotten_in_time(
    door: FailedAttempts, clock: Clock
) -> None:
    await fail(door, HERE, "old")
    clock.now += attempts.MEMORY.total_seconds()
    await guess(door, HERE, BURST)

    with pytest.raises(OverLimit):  # as any other that was not seen
        door.let_try(HERE, b"old")


async def test_a_forgotten_program_leaves_its_neighbours_alone(
    door: FailedAttempts,
) -> None:
    for _ in range(5 * BURST):
        await fail(door, HERE, "old")

    door.let_try(HERE, NEW)


async def test_what_is_no_key_at_all_is_counted_and_costs_no_lookup(
    door: FailedAttempts,
) -> None:
    for _ in range(BURST):
        await door.note_failure(HERE)

    with pytest.raises(OverLimit):
        await door.note_failure(HERE)
    door.let_try(HERE, NEW)


async def test_processes_count_together(redis: Redis, clock: Clock) -> None:
    one, other = open_door(redis, clock), open_door(redis, clock)
    await guess(one, HERE, BURST)

    assert await guess(other, HERE, 2) == 2
    with pytest.raises(OverLimit):
        other.let_try(HERE, NEW)


async def test_failures_are_counted(redis: Redis, clock: Clock) -> None:
    told: list[None] = []
    line = Lifeline(redis, clock=clock)
    door = FailedAttempts(
        Quotas(redis, lifeline=line, clock=clock), on_failure=lambda: told.append(None)
    )

    await guess(door, HERE, BURST + 2)

    assert len(told) == BURST + 2


async def test_without_redis_each_process_counts_for_itself(clock: Clock) -> None:
    async with Redis.from_url("redis://127.0.0.1:9/0") as nowhere:
        line = Lifeline(nowhere, clock=clock)
        door = FailedAttempts(Quotas(nowhere, lifeline=line, clock=clock), clock=clock)

        refused = await guess(door, HERE, BURST)

        assert BURST - BURST // 4 - 1 <= refused < BURST
        with pytest.raises(OverLimit):
            door.let_try(HERE, NEW)
        door.let_try(THERE, NEW)
        await line.aclose()


async def test_only_so_many_wrong_keys_are_remembered(clock: Clock) -> None:
    async with Redis.from_url("redis://127.0.0.1:9/0") as nowhere:
        line = Lifeline(nowhere, clock=clock)
        door = FailedAttempts(Quotas(nowhere, lifeline=line, clock=clock), clock=clock)

        for number in range(attempts.MOST_WRONG + 1):
            await fail(door, HERE, str(number))

        assert len(door._wrong) == attempts.MOST_WRONG
        assert b"0" not in door._wrong and b"1" in door._wrong
        await line.aclose()


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("unknown", "unknown"),
        ("", "unknown"),
        ("evil, 192.0.2.1", "unknown"),
        ("192.0.2.1:80", "unknown"),
        ("192.0.2.01", "unknown"),
        ("x" * 5000, "unknown"),
    ],
)
def test_an_address_belongs_to_a_network(address: str, network: str) -> None:
    assert network_of(address) == network
