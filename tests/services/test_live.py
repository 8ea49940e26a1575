"""One reader of the log for all who listen: nothing is missed, nothing is told twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis
from sqlalchemy import insert, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.core.hints import Hints
from app.domain import notices
from app.domain.events import Generated, Progressed, Started, Stored
from app.domain.policy import Policy
from app.services import event_log, listeners, live
from app.services.event_log import Position
from app.services.job_records import EVENTS
from app.services.ledger import Ledger
from app.services.live import Follower, JobFollower, Live, LiveEvent, Reset
from tests.support.jobs import JobTable, new_job, stored_output
from tests.support.waiting import wait_for_async

SOON = 15.0  # seconds, on a busy machine
QUIET = 0.3  # seconds in which nothing is told


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lost hints made up for soon: most of what is written here gives none."""
    monkeypatch.setattr(live, "REREAD", 0.1)


class Scene:
    """A process that listens, and its database."""

    def __init__(self, engine: AsyncEngine, redis: Redis, **options: Any) -> None:
        self.engine = engine
        self.jobs = JobTable(engine)
        self.hints = Hints(redis, "test:events")
        self.stopping = asyncio.Event()
        self.ledger = Ledger(engine, Policy(), on_events=self.hints.give)
        self.live = Live(self.ledger, self.hints, self.stopping, **options)

    async def aclose(self) -> None:
        await self.live.aclose()
        await self.hints.aclose()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_url, socket_timeout=0.5, socket_connect_timeout=0.5)
    yield client
    await client.aclose()


@pytest.fixture
async def scene(engine: AsyncEngine, redis: Redis) -> AsyncIterator[Scene]:
    scene = Scene(engine, redis)
    yield scene
    await scene.aclose()


async def hear(
    follower: Follower | JobFollower, number: int
) -> list[LiveEvent | Reset]:
    """Hear so many things."""
    found: list[LiveEvent | Reset] = []
    async with asyncio.timeout(SOON):
        while len(found) < number:
            found += await follower.heard()
            assert not follower.is_over or len(found) >= number
    assert len(found) == number
    return found


async def events(follower: Follower | JobFollower, number: int) -> list[LiveEvent]:
    """Hear so many events, and nothing else."""
    found = await hear(follower, number)
    return [one for one in found if isinstance(one, LiveEvent)]


def told(found: list[LiveEvent]) -> list[tuple[UUID, int]]:
    return [(one.job_id, one.version) for one in found]


async def rewrite(conn: AsyncConnection, job_id: UUID, version: int) -> None:
    """Write an entry of a job's log, as a transition would."""
    await conn.execute(
        insert(EVENTS).values(
            job_id=job_id,
            version=version,
            name="Progressed",
            data={"progress": 0.5},
            status="processing",
            stage="generating",
            at=text("now()"),
        )
    )


# ------------------------------------------------------------------------ the whole log


async def test_what_happens_is_told_as_it_is_committed(scene: Scene) -> None:
    async with scene.live.follow(None) as follower:
        job = new_job(owner="alice")
        await scene.ledger.submit(job)
        (one,) = await events(follower, 1)
    row = (await scene.jobs.events(job.id))[0]
    assert one == LiveEvent(
        id=f"{row.xid}.{row.id}",
        job_id=job.id,
        owner="alice",
        version=1,
        name=notices.CREATED,
        status="pending",
        stage="queued",
        progress=None,
        at=row.at,
    )


async def test_who_comes_first_hears_only_what_comes_after(scene: Scene) -> None:
    await scene.jobs.submit()
    async with scene.live.follow(None) as follower:
        (later,) = await scene.jobs.submit()
        assert told(await events(follower, 1)) == [(later, 1)]


async def test_a_late_commit_is_told_in_its_place_and_nothing_overtakes_it(
    scene: Scene,
) -> None:
    """A lower id, committed after a higher one: going by ids, it would never be seen."""
    early, late = await scene.jobs.submit(new_job(), new_job())
    async with scene.live.follow(None) as follower:
        async with scene.engine.connect() as slow, scene.engine.connect() as quick:
            await rewrite(slow, early, 2)
            await rewrite(quick, late, 2)
            await quick.commit()
            scene.hints.give()
            assert await follower.heard(QUIET) == ()
            mark = str(follower.position)
            await slow.commit()
        found = await events(follower, 2)
        assert told(found) == [(early, 2), (late, 2)]
    async with scene.live.follow(None, after=mark) as again:
        assert await events(again, 2) == found


async def test_a_lost_hint_is_made_up_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "REREAD", 2.0)
    async with scene.live.follow(None) as follower:
        await asyncio.sleep(0)
        (job_id,) = await scene.jobs.submit()  # past the ledger: nobody is told
        assert told(await events(follower, 1)) == [(job_id, 1)]


async def test_a_hint_is_quicker_than_the_next_reading(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "REREAD", 3600.0)
    async with scene.live.follow(None) as follower:
        for _ in range(3):
            job = new_job()
            await scene.ledger.submit(job)
            assert told(await events(follower, 1)) == [(job.id, 1)]


async def test_owners_hear_of_their_own_only(scene: Scene) -> None:
    async with AsyncExitStack() as stack:
        alice = await stack.enter_async_context(scene.live.follow("alice"))
        bob = await stack.enter_async_context(scene.live.follow("bob"))
        everything = await stack.enter_async_context(scene.live.follow(None))
        mark = str(alice.position)
        hers, his = new_job(owner="alice"), new_job(owner="bob")
        await scene.jobs.submit(hers)
        await scene.jobs.submit(his)
        both = [(hers.id, 1), (his.id, 1)]
        assert told(await events(everything, 2)) == both
        assert told(await events(alice, 1)) == both[:1]
        assert told(await events(bob, 1)) == both[1:]
    async with scene.live.follow("bob", after=mark) as again:
        assert told(await events(again, 1)) == both[1:]


async def test_nothing_is_missed_or_repeated_between_the_log_and_what_is_new(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "REPLAYED_AT_ONCE", 3)
    async with scene.live.follow(None) as first:
        mark = str(first.position)
        made = [job_id for _ in range(5) for job_id in await scene.jobs.submit()]
        async with scene.live.follow(None, after=mark) as follower:
            found = list(await follower.heard())
            made += [job_id for _ in range(5) for job_id in await scene.jobs.submit()]
            while len(found) < 10:
                found += await follower.heard(SOON)
        assert found == await events(first, 10)
    assert sorted(told([x for x in found if isinstance(x, LiveEvent)])) == sorted(
        (job_id, 1) for job_id in made
    )


async def test_a_slow_listener_keeps_a_short_queue_and_loses_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "ROOM", 4)
    monkeypatch.setattr(live, "PAGE", 3)
    async with (
        scene.live.follow(None) as slow,
        scene.live.follow(None) as quick,
    ):
        assert await slow.heard(0.01) == ()
        made = [job_id for _ in range(20) for job_id in await scene.jobs.submit()]
        scene.hints.give()
        heard = await events(quick, 20)
        assert len(slow._queue) <= 4
        found = await events(slow, 20)
    assert found == heard
    assert told(found) == [(job_id, 1) for job_id in made]


async def test_a_position_of_the_future_is_answered_with_a_reset(scene: Scene) -> None:
    await scene.jobs.submit()
    async with scene.live.follow(None, after=f"{2**62}.7") as follower:
        (reset,) = await hear(follower, 1)
        assert isinstance(reset, Reset) and reset.reason == "unknown_position"
        (job_id,) = await scene.jobs.submit()
        assert told(await events(follower, 1)) == [(job_id, 1)]


async def test_a_position_too_far_back_is_answered_with_a_reset(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "LONGEST_REPLAY", 3)
    made = [job_id for _ in range(6) for job_id in await scene.jobs.submit()]
    async with scene.live.follow(None, after="0.0") as follower:
        (reset,) = await hear(follower, 1)
        assert isinstance(reset, Reset) and reset.reason == "too_far_back"
        (job_id,) = await scene.jobs.submit()
        assert told(await events(follower, 1)) == [(job_id, 1)]
    row = (await scene.jobs.events(made[2]))[0]
    async with scene.live.follow(None, after=f"{row.xid}.{row.id}") as follower:
        assert told(await events(follower, 4)) == [
            *((job_id, 1) for job_id in made[3:]),
            (job_id, 1),
        ]


@pytest.mark.parametrize("text", ["", "1", "1.", ".1", "-1.2", "1.2.3", "1.x", "１.1"])
async def test_what_is_no_position_is_refused(scene: Scene, text: str) -> None:
    with pytest.raises(ValueError):
        async with scene.live.follow(None, after=text):
            pass


async def test_a_log_that_was_replaced_meanwhile_is_told_as_such(scene: Scene) -> None:
    async with scene.live.follow(None) as follower:
        # As if the server had been another one until now.
        scene.live._position = Position(2**60, 0)
        scene.hints.give()
        (reset,) = await hear(follower, 1)
        assert isinstance(reset, Reset) and reset.reason == "log_replaced"
        (job_id,) = await scene.jobs.submit()
        assert told(await events(follower, 1)) == [(job_id, 1)]


async def test_rows_of_another_server_become_old_ones(scene: Scene) -> None:
    restored = await scene.jobs.submit(new_job(), new_job())
    async with scene.engine.begin() as conn:
        await conn.execute(update(EVENTS).values(xid=2**50))
    async with scene.live.follow(None) as follower:

        async def is_repaired() -> bool:
            found = [await scene.jobs.events(one) for one in restored]
            return all(row.xid == 0 for rows in found for row in rows)

        await wait_for_async(is_repaired, within=SOON, what="the repair")
        (job_id,) = await scene.jobs.submit()
        assert told(await events(follower, 1)) == [(job_id, 1)]
    async with scene.live.follow(None, after="0.0") as again:
        found = await events(again, 3)
        assert told(found) == [(one, 1) for one in [*restored, job_id]]


async def test_all_end_when_the_process_stops(scene: Scene) -> None:
    (job_id,) = await scene.jobs.submit()
    async with (
        scene.live.follow(None) as follower,
        scene.live.follow_job(job_id) as of_job,
        scene.live.watch(job_id) as watch,
    ):
        await events(of_job, 1)
        async with asyncio.timeout(SOON):
            waiting = [
                asyncio.create_task(follower.heard()),
                asyncio.create_task(of_job.heard()),
                asyncio.create_task(watch.newer_than(1, 60)),
            ]
            await asyncio.sleep(0)
            scene.stopping.set()
            await asyncio.gather(*waiting)
        assert follower.is_over and of_job.is_over
    async with scene.live.follow(None) as late:
        assert await late.heard() == ()


# --------------------------------------------------------------------------- one job's log


async def story(scene: Scene) -> UUID:
    """Make a job with five entries in its log."""
    (job_id,) = await scene.jobs.submit()
    await scene.jobs.look(job_id, Started("h-" + job_id.hex), Progressed(0.4))
    await scene.jobs.look(job_id, Generated())
    return job_id


async def finish(scene: Scene, job_id: UUID) -> None:
    await scene.jobs.make_due(job_id)
    claim = await scene.jobs.claim_one(job_id)
    await scene.jobs.settle(claim, Stored(1), outputs=[stored_output()])


async def test_a_job_is_followed_from_its_birth_to_its_end(scene: Scene) -> None:
    job_id = await story(scene)
    async with scene.live.follow_job(job_id) as follower:
        found = await events(follower, 5)
        await finish(scene, job_id)
        found += await events(follower, 1)
        assert follower.is_over
        assert [one async for one in follower] == []
    rows = await scene.jobs.events(job_id)
    assert told(found) == [(job_id, row.version) for row in rows]
    assert [(one.name, one.progress) for one in found] == [
        (notices.CREATED, None),
        (notices.STARTED, None),
        (notices.UPDATED, None),
        (notices.PROGRESS, 0.4),
        (notices.UPDATED, 1.0),
        (notices.COMPLETED, 1.0),
    ]


async def test_a_finished_job_is_told_at_once_from_any_version_on(scene: Scene) -> None:
    job_id = await story(scene)
    await finish(scene, job_id)
    for after in range(7):
        async with scene.live.follow_job(job_id, after=after) as follower:
            async with asyncio.timeout(SOON):
                found = [one async for one in follower]
        assert [one.version for one in found if isinstance(one, LiveEvent)] == list(
            range(after + 1, 7)
        )


async def test_a_version_the_job_does_not_have_is_answered_with_all(
    scene: Scene,
) -> None:
    job_id = await story(scene)
    async with scene.live.follow_job(job_id, after=70) as follower:
        reset, *found = await hear(follower, 6)
    assert isinstance(reset, Reset) and reset.reason == "unknown_position"
    assert [one.version for one in found if isinstance(one, LiveEvent)] == [
        *range(1, 6)
    ]


async def test_of_an_unknown_job_nothing_is_heard(scene: Scene) -> None:
    async with scene.live.follow_job(new_job().id) as follower:
        assert await follower.heard() == ()
        assert follower.is_over


async def test_who_only_asks_what_there_is_does_not_wait_for_the_database(
    scene: Scene,
) -> None:
    (job_id,) = await scene.jobs.submit()
    async with scene.live.follow_job(job_id) as follower:
        async with scene.engine.begin() as conn:
            await conn.execute(text("ALTER TABLE job_events RENAME TO away"))

        async with asyncio.timeout(SOON):
            assert await follower.heard(0) == ()
        assert not follower.is_over

        async with scene.engine.begin() as conn:
            await conn.execute(text("ALTER TABLE away RENAME TO job_events"))
        assert [one.version for one in await events(follower, 1)] == [1]


async def test_a_job_is_told_of_while_an_old_transaction_keeps_the_log_unsettled(
    scene: Scene,
) -> None:
    job_id = await story(scene)
    async with scene.engine.connect() as old:
        await old.execute(text("SELECT pg_current_xact_id()"))
        async with (
            scene.live.follow_job(job_id, after=5) as follower,
            scene.live.follow(None) as everything,
            scene.live.watch(job_id) as watch,
        ):
            noticing = asyncio.create_task(watch.newer_than(5, 60))
            await finish(scene, job_id)
            assert [one.version for one in await events(follower, 1)] == [6]
            async with asyncio.timeout(SOON):
                await noticing
            assert await everything.heard(QUIET) == ()
            await old.rollback()
            assert told(await events(everything, 1)) == [(job_id, 6)]


async def test_a_job_is_told_of_however_much_is_unsettled(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PAGE", 3)
    job_id = await story(scene)
    async with scene.engine.connect() as old:
        await old.execute(text("SELECT pg_current_xact_id()"))
        async with scene.live.follow_job(job_id, after=5) as follower:
            await scene.jobs.submit(*(new_job() for _ in range(5)))
            await finish(scene, job_id)
            assert [one.version for one in await events(follower, 1)] == [6]


async def test_a_change_is_noticed_once_it_is_there(scene: Scene) -> None:
    job_id = await story(scene)
    async with asyncio.timeout(SOON):
        await scene.live.changed(job_id, 4, 60)  # it is newer already
        waiting = asyncio.create_task(scene.live.changed(job_id, 5, 60))
        await asyncio.sleep(QUIET)
        assert not waiting.done()
        await finish(scene, job_id)
        await waiting


# ------------------------------------------------------------------------------ Redis


async def subscriptions(redis: Redis) -> int:
    return len(await redis.client_list(_type="pubsub"))


async def test_one_connection_serves_all_and_goes_with_the_last(
    engine: AsyncEngine, redis: Redis
) -> None:
    scene = Scene(engine, redis, linger=timedelta(0))
    (job_id,) = await scene.jobs.submit()
    try:
        async with AsyncExitStack() as stack:
            assert await subscriptions(redis) == 0
            for _ in range(100):
                await stack.enter_async_context(scene.live.follow(None))
                await stack.enter_async_context(scene.live.follow_job(job_id))

            async def is_heard() -> bool:
                return await subscriptions(redis) > 0

            await wait_for_async(is_heard, within=SOON, what="a subscription")
            await scene.ledger.submit(new_job())
            assert await subscriptions(redis) == 1

        async def is_gone() -> bool:
            return await subscriptions(redis) == 0

        await wait_for_async(is_gone, within=SOON, what="its end")
        assert scene.live._reader is None
    finally:
        await scene.aclose()
