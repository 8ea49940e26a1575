"""Whose job starts next: shares, newcomers, order, and pickers that meet."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.dialects.postgresql import insert

from app.core.database import open_engine
from app.services import turns
from app.services.ledger import Ledger
from tests.support.jobs import JobTable, new_job
from tests.support.servers import DatabaseServer

A, B, C = "ann", "bob", "cid"
_OWN = text(
    "UPDATE jobs SET owner = :owner, due_at = now() + (own.n - 1000) * interval '1 ms'"
    " FROM unnest(CAST(:ids AS uuid[])) WITH ORDINALITY AS own (id, n)"
    " WHERE own.id = jobs.id"
)


class Queue:
    """Jobs of several owners that wait, and who was started, in which order."""

    def __init__(self, jobs: JobTable) -> None:
        self.jobs = jobs
        self.ledger = Ledger(jobs.engine, jobs.policy)
        self.owners: dict[UUID, str] = {}
        self.started: list[UUID] = []

    async def weigh(self, **weights: int) -> None:
        """Give owners their weights."""
        async with self.jobs.engine.begin() as conn:
            for name, weight in weights.items():
                statement = insert(turns.OWNERS).values(name=name, weight=weight)
                await conn.execute(
                    statement.on_conflict_do_update(
                        index_elements=["name"], set_={"weight": weight}
                    )
                )

    async def add(self, owner: str, *priorities: int) -> list[UUID]:
        """Submit jobs of the owner, oldest first."""
        ids = await self.jobs.submit(*(new_job(priority=p) for p in priorities))
        async with self.jobs.engine.begin() as conn:
            # Those of one transaction are of one age.
            await conn.execute(_OWN, {"owner": owner, "ids": ids})
        self.owners |= dict.fromkeys(ids, owner)
        return ids

    async def start(self, limit: int) -> list[str]:
        """Start jobs in turn and name their owners."""
        found = await self.ledger.start(limit)
        ids = [claim.job_id for claim in found.claims]
        self.started += ids
        return [self.owners[job_id] for job_id in ids]

    @property
    def counts(self) -> Counter[str]:
        """How many of each owner's jobs were started."""
        return Counter(self.owners[job_id] for job_id in self.started)

    async def forget(self) -> None:
        """Begin again."""
        async with self.jobs.engine.begin() as conn:
            await conn.execute(text("TRUNCATE jobs, owners CASCADE"))
        self.owners, self.started = {}, []


def _assert_shared(counts: Mapping[str, int], weights: Mapping[str, int]) -> None:
    """See that no two owners that always waited are further apart than a job of each.

    That is what fair queueing promises, and far less than 5 % of some hundred starts.
    """
    for one, its in weights.items():
        for other, others in weights.items():
            apart = abs(counts[one] / its - counts[other] / others)
            assert apart <= 1 / its + 1 / others + 1e-6, (counts, weights)


@pytest.fixture
def queue(jobs: JobTable) -> Queue:
    return Queue(jobs)


@pytest.fixture(scope="module")
async def long_queue(
    database_server: DatabaseServer, template_database: str
) -> AsyncIterator[Queue]:
    """One queue for many examples."""
    name = database_server.create(template=template_database)
    url = SecretStr(database_server.url_of(name))
    engine = open_engine(url, name="turns", pool_size=4)
    yield Queue(JobTable(engine))
    await engine.dispose()
    database_server.drop(name)


# --------------------------------------------------------------------------------- shares

WEIGHTS = st.lists(st.integers(1, 9), min_size=2, max_size=5).map(
    lambda weights: {f"owner{number}": w for number, w in enumerate(weights)}
)
SIZES = st.lists(st.integers(1, 25), min_size=1, max_size=12)
PRIORITIES = st.lists(st.integers(-1, 1), min_size=1, max_size=7)


def _for(examples: int) -> Callable[[Callable[..., object]], Callable[..., object]]:
    return settings(
        max_examples=examples,
        suppress_health_check=[
            *(HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
        ],
    )


@_for(20)
@given(weights=WEIGHTS, sizes=SIZES, priorities=PRIORITIES)
async def test_owners_with_a_backlog_share_by_weight_and_keep_their_own_order(
    long_queue: Queue,
    weights: dict[str, int],
    sizes: list[int],
    priorities: list[int],
) -> None:
    await long_queue.forget()
    await long_queue.weigh(**weights)
    total = sum(sizes)
    expected: dict[str, Sequence[UUID]] = {}
    for owner, weight in weights.items():
        count = total * weight // sum(weights.values()) + 2
        mixed = (priorities * count)[:count]
        ids = await long_queue.add(owner, *mixed)
        ranked = sorted(zip(ids, mixed), key=lambda pair: -pair[1])
        expected[owner] = [job_id for job_id, _ in ranked]

    for size in sizes:
        assert len(await long_queue.start(size)) == size
        _assert_shared(long_queue.counts, weights)
        for owner, count in long_queue.counts.items():
            own = {i for i in long_queue.started if long_queue.owners[i] == owner}
            assert own == set(expected[owner][:count]), "its most urgent, oldest ones"
    assert len(set(long_queue.started)) == total


@_for(15)
@given(
    weights=WEIGHTS,
    sizes=SIZES,
    priority=st.integers(-1, 1),
    weight=st.none() | st.integers(1, 9),
)
async def test_a_newcomers_job_is_among_the_next_two(
    long_queue: Queue,
    weights: dict[str, int],
    sizes: list[int],
    priority: int,
    weight: int | None,
) -> None:
    await long_queue.forget()
    await long_queue.weigh(**weights)
    # As many as it takes until all have had a turn: nobody else is a newcomer.
    sizes = [sum(weights.values()), *sizes]
    for owner in weights:
        await long_queue.add(owner, *[1] * (sum(sizes) + 2))
    for size in sizes:
        await long_queue.start(size)
    if weight is not None:
        await long_queue.weigh(newcomer=weight)
    await long_queue.add("newcomer", priority)

    assert "newcomer" in await long_queue.start(1) + await long_queue.start(1)


async def test_priority_does_not_let_one_owner_starve_another(queue: Queue) -> None:
    await queue.add(A, *[1] * 20)
    await queue.add(B, *[-1] * 20)

    assert Counter(await queue.start(20)) == {A: 10, B: 10}


async def test_an_owner_that_comes_back_has_saved_nothing_up(queue: Queue) -> None:
    await queue.add(A, *[0] * 100)
    await queue.add(B, *[0] * 5)
    await queue.start(60)
    assert queue.counts == {A: 55, B: 5}

    await queue.add(B, *[0] * 40)
    seen = "".join([owner[0] for _ in range(20) for owner in await queue.start(1)])

    assert seen.startswith("b")
    assert abs(seen.count("b") - 10) <= 1
    assert not re.search("aaa|bbb", seen)


async def test_an_owner_pays_nothing_for_what_it_had_alone(queue: Queue) -> None:
    await queue.add(A, *[0] * 60)
    await queue.start(50)
    await queue.add(B, *[0] * 10)

    assert Counter(await queue.start(10)) == {A: 5, B: 5}


async def test_a_weight_that_changes_counts_from_then_on(queue: Queue) -> None:
    await queue.add(A, *[0] * 60)
    await queue.add(B, *[0] * 60)
    await queue.start(20)
    before = queue.counts

    await queue.weigh(bob=4)
    await queue.start(50)

    after = queue.counts - before
    _assert_shared(after, {A: 1, B: 4})


async def test_coming_often_with_one_job_is_no_advantage(queue: Queue) -> None:
    """Whoever has one job waiting at a time gets its share at most."""
    await queue.add(A, *[0] * 60)
    for _ in range(40):
        if not await _has_pending(queue, B):
            await queue.add(B, 1)
        await queue.start(1)

    assert abs(queue.counts[B] - 20) <= 1


async def _has_pending(queue: Queue, owner: str) -> bool:
    async with queue.jobs.engine.connect() as conn:
        query = "SELECT count(*) FROM jobs WHERE status = 'pending' AND owner = :owner"
        return bool(await conn.scalar(text(query), {"owner": owner}))


async def test_a_thousand_owners_are_served_one_after_the_other(queue: Queue) -> None:
    """More than one pick names: the horizon must not cut off whose turn it is."""
    names = [f"o{number:03}" for number in range(250)]
    ids = await queue.jobs.submit(*(new_job() for _ in range(500)))
    queue.owners = {job_id: names[n % 250] for n, job_id in enumerate(ids)}
    async with queue.jobs.engine.begin() as conn:
        await conn.execute(
            text(
                "UPDATE jobs SET owner = own.name"
                " FROM unnest(CAST(:ids AS uuid[]), CAST(:names AS text[]))"
                " AS own (id, name) WHERE own.id = jobs.id"
            ),
            {"ids": ids, "names": list(queue.owners.values())},
        )

    for round_ in (1, 2):
        for _ in range(5):
            await queue.start(50)
        assert queue.counts == dict.fromkeys(names, round_)


# ------------------------------------------------------------------------- what is passed by


async def test_it_tells_whether_anybody_is_left_waiting(queue: Queue) -> None:
    await queue.add(A, *[0] * 5)

    first, second = await queue.ledger.start(4), await queue.ledger.start(1)
    third = await queue.ledger.start(3)

    assert (first.has_more, second.has_more, third.has_more) == (True, False, False)
    assert third.claims == []


async def test_what_may_not_start_yet_holds_up_nobody(queue: Queue) -> None:
    later, now = await queue.add(A, 1, 0)
    await queue.jobs.age(-timedelta(hours=1), later)

    await queue.start(2)

    assert queue.started == [now]


async def test_what_is_in_other_hands_is_passed_by_and_not_charged(
    queue: Queue,
) -> None:
    held, free = await queue.add(A, 1, 0)
    await queue.add(B, 0, 0)
    async with queue.jobs.engine.begin() as other:
        await other.execute(
            text("SELECT FROM jobs WHERE id = :id FOR UPDATE"), {"id": held}
        )
        started = await queue.ledger.start(2)

    assert free in {claim.job_id for claim in started.claims}
    assert len(started.claims) == 2
    await queue.start(2)
    assert queue.started[0] == held or queue.started[1] == held


async def test_jobs_out_of_time_are_passed_by_and_cost_no_turn(queue: Queue) -> None:
    late = await queue.add(A, *[1] * 3)
    await queue.jobs.expire(*late)
    (good,) = await queue.add(A, 0)

    found = await queue.ledger.start(2)

    assert [claim.job_id for claim in found.claims] == [good]
    assert not found.has_more
    await queue.add(A, 0, 0)
    await queue.add(B, 0, 0)
    assert Counter(await queue.start(2)) == {A: 1, B: 1}


# ---------------------------------------------------------------------- several at a time


async def test_pickers_that_meet_start_every_job_once_and_share(queue: Queue) -> None:
    await queue.weigh(ann=1, bob=2, cid=5)
    for owner in (A, B, C):
        await queue.add(owner, *[0] * 60)

    async def pick() -> None:
        for _ in range(4):
            await queue.start(6)

    await asyncio.gather(*(pick() for _ in range(4)))
    _assert_shared(queue.counts, {A: 1, B: 2, C: 5})
    while await queue.start(50):
        pass

    assert queue.counts == {A: 60, B: 60, C: 60}
    assert len(set(queue.started)) == 180


async def test_claims_by_name_and_in_turn_never_take_the_same_job(queue: Queue) -> None:
    ids = await queue.add(A, *[0] * 120)

    async def by_name() -> list[UUID]:
        found = [await queue.ledger.claim(ids[n::10], starts=12) for n in range(10)]
        return [claim.job_id for claims in found for claim in claims]

    async def in_turn() -> None:
        for _ in range(10):
            await queue.start(12)

    named, _ = await asyncio.gather(by_name(), in_turn())

    assert Counter(named + queue.started) == Counter(ids)


async def test_a_picker_that_froze_holds_the_others_up_for_seconds_only(
    queue: Queue,
) -> None:
    (job_id,) = await queue.add(A, 0)
    async with queue.jobs.engine.connect() as frozen:
        await frozen.execute(turns._TAKE_THE_FLOOR)

        await queue.start(1)

        await frozen.invalidate()
    assert queue.started == [job_id]
