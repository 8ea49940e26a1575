"""What the gatekeeper asks the table, and how long it believes the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis
from sqlalchemy import event, select, update
from sqlalchemy.ext.asyncio import AsyncEngine
from uuid_utils.compat import uuid7

from app.core.lifeline import Lifeline
from app.core.quota import Quotas
from app.domain.access import ANYBODY, Budget, Caller, Limits, Scope
from app.domain.errors import InvalidKey, OverLimit, Unauthorized
from app.domain.policy import Policy
from app.services import keys
from app.services.attempts import BURST, FailedAttempts
from app.services.gatekeeper import (
    BELIEVED,
    FRESH,
    REFUSED,
    USE_NOTED_EVERY,
    Gatekeeper,
)
from app.services.keys import KEYS, Changes, NewKey, Secret
from app.services.ledger import Ledger
from tests.support.waiting import wait_for_async

ADMIN_KEY = "an-admin-key-of-many-characters"
TOKEN = "a-metrics-token-of-many-characters"
HERE = "192.0.2.7"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def asked(engine: AsyncEngine) -> list[str]:
    """The statements that were sent, as they are sent."""
    statements: list[str] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        statements.append(statement)

    return statements


def lookups(asked: list[str]) -> int:
    return sum("api_keys.hash = any" in text for text in asked)


Open = Callable[..., Gatekeeper]


@pytest.fixture
async def open_gate(
    engine: AsyncEngine, redis_url: str, clock: Clock
) -> AsyncIterator[Open]:
    gates: list[Gatekeeper] = []
    redis = Redis.from_url(redis_url)
    line = Lifeline(redis, clock=clock)

    def open_one(*, demands_keys: bool = True) -> Gatekeeper:
        gates.append(
            Gatekeeper(
                Ledger(engine, Policy()),
                demands_keys=demands_keys,
                attempts=FailedAttempts(
                    Quotas(redis, lifeline=line, clock=clock), clock=clock
                ),
                admin_key=ADMIN_KEY,
                metrics_token=TOKEN,
                clock=clock,
            )
        )
        return gates[-1]

    yield open_one
    for gate in gates:
        await gate.aclose()
    await redis.aclose()


@pytest.fixture
def gate(open_gate: Open) -> Gatekeeper:
    return open_gate()


@pytest.fixture
async def make(engine: AsyncEngine) -> Callable[..., Any]:
    async def make(**fields: Any) -> tuple[UUID, str]:
        """Make a key; give its id and itself."""
        secret = Secret.mint()
        new = NewKey(
            **{
                "id": uuid7(),
                "owner": "acme",
                "name": "theirs",
                "scopes": frozenset((Scope.READ,)),
                "expires_at": None,
                "limits": Limits(),
                "budget": Budget(),
            }
            | fields
        )
        async with engine.begin() as conn:
            await keys.create(conn, new, secret)
        return new.id, secret.text

    return make


async def use(gate: Gatekeeper, secret: str) -> Caller | None:
    """Come with a key; None when turned away."""
    try:
        return await gate.identify(secret, HERE)
    except InvalidKey:
        return None


async def settled(gate: Gatekeeper) -> None:
    """Let the gatekeeper finish what it does beside the requests."""

    async def is_idle() -> bool:
        return not gate._lookups and not gate._tasks

    await wait_for_async(is_idle, within=5, what="nothing is under way")


# ------------------------------------------------------------------------------- who it is


async def test_a_key_says_who_calls_and_what_they_may_do(
    gate: Gatekeeper, make: Any
) -> None:
    limits = Limits(concurrent_jobs=3, models=frozenset(("acme/painter",)))
    key_id, secret = await make(limits=limits)

    caller = await gate.identify(secret, HERE)

    assert (caller.owner, caller.key_id) == ("acme", key_id)
    assert caller.scopes == {Scope.READ} and not caller.is_admin
    assert caller.limits == limits and not caller.budget.applies


async def test_the_configured_secrets_need_no_table(
    gate: Gatekeeper, asked: list[str]
) -> None:
    admin, monitor = await use(gate, ADMIN_KEY), await use(gate, TOKEN)

    assert admin and admin.is_admin and admin.owner == "default"
    assert monitor and [s for s in Scope if monitor.may(s)] == [Scope.MONITOR]
    assert not asked


async def test_without_demand_everybody_is_anybody(open_gate: Open) -> None:
    gate = open_gate(demands_keys=False)

    for secret in (None, "", "nonsense", "x" * 100_000):
        assert await gate.identify(secret, HERE) is ANYBODY


@pytest.mark.parametrize("secret", [None, ""])
async def test_no_key_is_told_what_to_send(
    gate: Gatekeeper, secret: str | None
) -> None:
    with pytest.raises(Unauthorized, match="Authorization: Bearer mgs_") as caught:
        await gate.identify(secret, HERE)

    assert not isinstance(caught.value, InvalidKey)


@pytest.mark.parametrize(
    "secret",
    [
        *("x", ADMIN_KEY[:-1], f"{ADMIN_KEY}x", ADMIN_KEY.upper()),
        *("mgs_", "mgs_" + "a" * 42, "mgs_" + "a" * 44, "mgs_" + "é" * 43),
        *("mgs_" + "a" * 42 + "\n", "a" * 1_000_000),
    ],
)
async def test_what_cannot_be_a_key_costs_the_table_nothing(
    gate: Gatekeeper, asked: list[str], secret: str
) -> None:
    with pytest.raises(InvalidKey, match=REFUSED):
        await gate.identify(secret, HERE)

    assert not asked


# ------------------------------------------------------------------- what the table is asked


async def test_many_requests_with_one_key_are_one_question(
    gate: Gatekeeper, make: Any, asked: list[str]
) -> None:
    _, secret = await make()

    callers = await asyncio.gather(*(use(gate, secret) for _ in range(200)))
    for _ in range(200):
        callers.append(await use(gate, secret))

    assert {caller.owner for caller in callers if caller} == {"acme"}
    assert len(callers) == 400 and lookups(asked) == 1


async def test_many_keys_at_once_are_few_questions(
    gate: Gatekeeper, make: Any, asked: list[str]
) -> None:
    secrets = [(await make(owner=f"o{n}"))[1] for n in range(30)]
    before = lookups(asked)

    callers = await asyncio.gather(*(use(gate, secret) for secret in secrets))

    assert [c and c.owner for c in callers] == [f"o{n}" for n in range(30)]
    assert lookups(asked) - before <= 3


async def test_a_key_in_use_is_renewed_beside_the_requests(
    gate: Gatekeeper, make: Any, asked: list[str], clock: Clock
) -> None:
    _, secret = await make()
    await gate.identify(secret, HERE)
    await settled(gate)

    clock.now += FRESH.total_seconds()
    for _ in range(20):
        assert await use(gate, secret)
        assert lookups(asked) == 1  # nobody waited for the second one
    await settled(gate)

    assert lookups(asked) == 2
    clock.now += FRESH.total_seconds() - 0.01
    assert await use(gate, secret)
    await settled(gate)
    assert lookups(asked) == 2


async def test_an_old_answer_is_not_believed(
    gate: Gatekeeper, make: Any, engine: AsyncEngine, clock: Clock
) -> None:
    key_id, secret = await make()
    assert await use(gate, secret)
    async with engine.begin() as conn:
        await keys.revoke(conn, key_id)

    clock.now += FRESH.total_seconds() - 0.01
    assert await use(gate, secret)  # a moment more, on what was heard
    clock.now += BELIEVED.total_seconds() - FRESH.total_seconds() + 0.02

    assert await use(gate, secret) is None


async def test_the_time_of_an_answer_is_when_it_was_asked_for(
    gate: Gatekeeper, make: Any, clock: Clock, engine: AsyncEngine
) -> None:
    """A slow answer may lack what was committed while it was under way."""
    key_id, secret = await make()
    async with engine.begin() as conn:
        await conn.exec_driver_sql("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
        slow = asyncio.create_task(use(gate, secret))

        async def is_asked() -> bool:
            return bool(gate._lookups)

        await wait_for_async(is_asked, within=5, what="the question")
        clock.now += BELIEVED.total_seconds()
    assert await slow
    async with engine.begin() as conn:
        await keys.revoke(conn, key_id)

    assert await use(gate, secret) is None


async def test_other_limits_hold_soon(
    gate: Gatekeeper, make: Any, engine: AsyncEngine, clock: Clock
) -> None:
    key_id, secret = await make()
    assert await use(gate, secret)
    async with engine.begin() as conn:
        changes = Changes(columns={}, limits={"jobs_per_day": 5}, budget={})
        await keys.change(conn, key_id, changes)

    clock.now += BELIEVED.total_seconds()
    caller = await gate.identify(secret, HERE)

    assert caller.limits.jobs_per_day == 5


async def test_a_refusal_is_not_remembered(
    gate: Gatekeeper, asked: list[str], engine: AsyncEngine
) -> None:
    secret = Secret.mint()
    assert await use(gate, secret.text) is None
    new = NewKey(
        uuid7(), "acme", "late", frozenset((Scope.READ,)), None, Limits(), Budget()
    )
    async with engine.begin() as conn:
        await keys.create(conn, new, secret)

    assert await use(gate, secret.text)
    assert not [known for known in gate._known.values() if known.record is None]


async def test_whoever_hangs_up_takes_nothing_from_the_others(
    gate: Gatekeeper, make: Any, engine: AsyncEngine
) -> None:
    _, secret = await make()
    async with engine.begin() as conn:
        await conn.exec_driver_sql("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
        first = asyncio.create_task(use(gate, secret))
        others = [asyncio.create_task(use(gate, secret)) for _ in range(3)]

        async def is_asked() -> bool:
            return bool(gate._lookups)

        await wait_for_async(is_asked, within=5, what="the question")
        first.cancel()

    assert all(await asyncio.gather(*others))


# ------------------------------------------------------------------------ when it was used


async def test_its_last_use_is_noted_once_a_minute(
    open_gate: Open, make: Any, engine: AsyncEngine, clock: Clock, asked: list[str]
) -> None:
    key_id, secret = await make()
    used_at = select(KEYS.c.last_used_at).where(KEYS.c.id == key_id)
    gate, other = open_gate(), open_gate()

    for _ in range(20):
        assert await use(gate, secret)
    await settled(gate)
    async with engine.connect() as conn:
        first = await conn.scalar(used_at)
    assert await use(other, secret)  # another process
    await settled(other)
    async with engine.connect() as conn:
        again = await conn.scalar(used_at)

    assert first is not None and again == first
    assert sum(text.startswith("UPDATE api_keys") for text in asked) == 2
    async with engine.begin() as conn:
        long_ago = first - USE_NOTED_EVERY
        await conn.execute(update(KEYS).values(last_used_at=long_ago))
    clock.now += USE_NOTED_EVERY.total_seconds()
    assert await use(gate, secret)
    await settled(gate)
    async with engine.connect() as conn:
        later = await conn.scalar(used_at)
    assert later is not None and later >= first


async def test_noting_a_use_delays_no_request(
    gate: Gatekeeper, make: Any, engine: AsyncEngine
) -> None:
    _, secret = await make()
    async with engine.begin() as conn:
        # Whoever reads may; whoever wants to write must wait.
        await conn.exec_driver_sql("LOCK TABLE api_keys IN SHARE MODE")
        assert await asyncio.wait_for(gate.identify(secret, HERE), 1)
        assert gate._tasks  # still trying
    await settled(gate)


async def test_a_hash_is_enough_for_who_showed_the_key_before(
    gate: Gatekeeper, make: Any, asked: list[str]
) -> None:
    key_id, secret = await make()
    first = await gate.identify(secret, HERE)

    again = await gate.identify_again(keys.digest(secret))

    assert again == first and again.key_id == key_id
    assert lookups(asked) == 1


async def test_a_hash_of_no_live_key_is_refused_and_no_attempt(
    gate: Gatekeeper, make: Any, engine: AsyncEngine
) -> None:
    key_id, secret = await make()
    async with engine.begin() as conn:
        await keys.revoke(conn, key_id)

    for _ in range(3 * BURST):
        with pytest.raises(InvalidKey, match="unknown, expired or revoked"):
            await gate.identify_again(keys.digest(secret))
    with pytest.raises(InvalidKey):
        await gate.identify_again(keys.digest(ADMIN_KEY))

    assert await use(gate, (await make())[1])


async def test_a_configured_key_is_found_by_what_its_hash_fits(
    gate: Gatekeeper,
) -> None:
    hashed = keys.digest(ADMIN_KEY)

    found = gate.find_configured(lambda known: known == hashed)

    assert found and found.is_admin
    assert gate.find_configured(lambda known: False) is None


# ------------------------------------------------------------------------- failed attempts


async def guess(gate: Gatekeeper, n: int) -> list[type[Exception]]:
    """Come with made-up keys; tell how each was turned away."""
    ends: list[type[Exception]] = []
    for _ in range(n):
        with pytest.raises((InvalidKey, OverLimit)) as caught:
            await gate.identify(Secret.mint().text, HERE)
        ends.append(caught.type)
    return ends


async def test_beyond_the_limit_wrong_keys_cost_no_lookup(
    gate: Gatekeeper, asked: list[str]
) -> None:
    ends = await guess(gate, BURST + 20)

    assert ends == [InvalidKey] * BURST + [OverLimit] * 20
    assert lookups(asked) == BURST + 1


async def test_one_wrong_key_again_and_again_costs_no_more(
    gate: Gatekeeper, asked: list[str]
) -> None:
    secret = Secret.mint().text
    for _ in range(BURST + 20):
        with pytest.raises((InvalidKey, OverLimit)):
            await gate.identify(secret, HERE)

    assert lookups(asked) == BURST + 1


async def test_a_key_that_was_met_is_let_in_whatever_its_neighbours_do(
    gate: Gatekeeper, make: Any, clock: Clock
) -> None:
    (_, met), (_, new) = await make(), await make()
    assert await use(gate, met)
    await guess(gate, BURST + 5)

    clock.now += 2 * BELIEVED.total_seconds()  # long enough to be looked up again
    await guess(gate, 1)

    assert await use(gate, met)
    with pytest.raises(OverLimit):
        await gate.identify(new, HERE)
    assert await gate.identify(new, "192.0.2.8")
    clock.now += 3
    assert await use(gate, new)


async def test_right_keys_are_no_failures(gate: Gatekeeper, make: Any) -> None:
    for _ in range(3 * BURST):
        assert await use(gate, (await make())[1])
    assert await guess(gate, BURST) == [InvalidKey] * BURST
