"""Who watches for the deployment, and what is done with what is due."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from datetime import timedelta
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.database import open_engine
from app.core.leasing import Leadership
from app.domain.errors import NotFound, ProviderUnavailable, Unavailable
from app.domain.events import Started
from app.domain.policy import Policy
from app.services.ledger import Ledger
from app.services.watcher import (
    LEADERSHIP_KEY,
    RINGS_A_ROUND,
    ROUND,
    Duty,
    EndOutOfTime,
    Watcher,
)
from tests.support.jobs import JobTable, new_job
from tests.support.waiting import wait_for_async

OVERDUE = timedelta(seconds=1)
TAKEOVER = 2.0  # seconds until another one leads
PICKUP = 1.0  # seconds until a job nobody rang for is offered


class Desk:
    """Stands where the engine stands: takes what is offered, looks at nothing."""

    def __init__(self, room: int = 100, is_seeking: bool = False) -> None:
        self.room, self.is_seeking = room, is_seeking
        self.offered: list[UUID] = []
        self.sought: list[int] = []

    def offer(self, job_ids: Iterable[UUID]) -> None:
        """Take the ids."""
        self.offered += job_ids

    def seek(self, count: int) -> None:
        """Note how many wait to be started."""
        self.sought.append(count)


class RecordingBell:
    """Remembers who was rung for."""

    def __init__(self) -> None:
        self.rung: list[UUID] = []

    def ring(self, subject: str) -> None:
        """Remember the subject."""
        self.rung.append(UUID(subject))


class CountedLeadership(Leadership):
    """Counts the rounds."""

    rounds = 0

    async def confirm(self) -> bool:
        """Ask, and count."""
        self.rounds += 1
        return await super().confirm()


class Post:
    """One watcher with its desk and its bell, on a pool of its own."""

    def __init__(self, engine: AsyncEngine, *duties: Duty, **desk: int) -> None:
        self.desk, self.bell = Desk(**desk), RecordingBell()
        self.leadership = CountedLeadership(engine, LEADERSHIP_KEY)
        self.watcher = Watcher(
            ledger=Ledger(engine, Policy()),
            engine=self.desk,
            leadership=self.leadership,
            bell=self.bell,
            duties=duties,
        )


class Stumbling:
    """A duty that fails the first time."""

    def __init__(self, error: Exception) -> None:
        self.error, self.performed = error, 0

    async def perform(self) -> timedelta:
        """Fail, or count."""
        self.performed += 1
        if self.performed == 1:
            raise self.error
        return ROUND


Manned = Callable[..., Post]


@pytest.fixture
async def man(database_url: str) -> AsyncIterator[Manned]:
    """Make posts; their watchers are stopped after the test."""
    async with AsyncExitStack() as stack:

        def make(*duties: Duty, **desk: int) -> Post:
            engine = open_engine(SecretStr(database_url), name="post", pool_size=3)
            post = Post(engine, *duties, **desk)
            stack.push_async_callback(engine.dispose)
            stack.push_async_callback(post.watcher.stop)
            return post

        yield make


async def _leading(*posts: Post) -> Post:
    async def leader() -> Post | None:
        return next((post for post in posts if post.watcher.is_leading), None)

    found = await wait_for_async(leader, within=TAKEOVER, what="a leader")
    assert found is not None
    return found


async def _rounds(post: Post, count: int) -> None:
    target = post.leadership.rounds + count

    async def are_over() -> bool:
        return post.leadership.rounds >= target

    await wait_for_async(are_over, within=10, what=f"{count} rounds")


async def _due_looks(jobs: JobTable, count: int) -> list[UUID]:
    ids = []
    for number in range(count):
        (job_id,) = await jobs.submit()
        await jobs.look(job_id, Started(f"h-{number}"))
        await jobs.make_due(job_id)
        await jobs.age(OVERDUE + timedelta(seconds=count - number), job_id)
        ids.append(job_id)
    return ids


# ----------------------------------------------------------------------------- leadership


async def test_only_one_of_two_watches(man: Manned, jobs: JobTable) -> None:
    posts = [man(), man()]
    for post in posts:
        post.watcher.start()
    leader = await _leading(*posts)
    (other,) = set(posts) - {leader}

    (job_id,) = await _due_looks(jobs, 1)
    await _rounds(other, 3)

    assert not other.watcher.is_leading
    assert job_id in leader.desk.offered
    assert (other.desk.offered, other.bell.rung) == ([], [])


async def test_another_one_takes_over_when_the_leaders_session_ends(
    man: Manned, jobs: JobTable
) -> None:
    posts = [man(), man()]
    posts[0].watcher.start()
    await _leading(posts[0])
    posts[1].watcher.start()
    await _rounds(posts[1], 1)
    async with jobs.engine.begin() as conn:
        # The first one is never quick enough to win its place back.
        posts[0].watcher._tasks[0].cancel()
        await conn.execute(
            text(
                "SELECT pg_terminate_backend(pid, 2000) FROM pg_locks"
                " WHERE locktype = 'advisory' AND objid = :key AND granted"
                " AND database = (SELECT oid FROM pg_database"
                "                 WHERE datname = current_database())"
            ),
            {"key": LEADERSHIP_KEY},
        )

    assert await _leading(posts[1]) is posts[1]
    (job_id,) = await _due_looks(jobs, 1)

    async def is_offered() -> bool:
        return job_id in posts[1].desk.offered

    await wait_for_async(is_offered, within=TAKEOVER, what="the job")


async def test_whoever_stops_hands_over(man: Manned) -> None:
    first, second = man(), man()
    first.watcher.start()
    await _leading(first)
    second.watcher.start()

    await first.watcher.stop()

    assert not first.watcher.is_leading
    assert await _leading(second) is second


async def test_nothing_is_swept_without_leadership(man: Manned, jobs: JobTable) -> None:
    (job_id,) = await _due_looks(jobs, 1)
    post = man()
    async with Leadership(jobs.engine, LEADERSHIP_KEY) as rival:
        assert await rival.confirm()
        post.watcher.start()
        await _rounds(post, 3)

        assert (post.desk.offered, post.bell.rung) == ([], [])
    await _leading(post)

    async def is_offered() -> bool:
        return post.desk.offered == [job_id]

    await wait_for_async(is_offered, within=PICKUP, what="what is due")


async def test_every_worker_seeks_pending_jobs_leading_or_not(
    man: Manned, jobs: JobTable
) -> None:
    """Each has looks to give, and no other way to know of jobs nobody rang for."""
    posts = [man(), man()]
    for post in posts:
        post.watcher.start()
    await _leading(*posts)

    await jobs.submit(new_job(), new_job())

    async def are_sought() -> bool:
        return all(2 in post.desk.sought for post in posts)

    await wait_for_async(are_sought, within=PICKUP, what="the jobs")
    assert [post.desk.offered + post.bell.rung for post in posts] == [[], []]


# ---------------------------------------------------------------------------------- rounds


async def test_a_job_nobody_rang_for_is_picked_up_within_a_second(
    man: Manned, jobs: JobTable
) -> None:
    post = man()
    post.watcher.start()
    await _leading(post)

    await jobs.submit()

    async def is_sought() -> bool:
        return 1 in post.desk.sought

    await wait_for_async(is_sought, within=PICKUP, what="the job")
    assert (post.desk.offered, post.bell.rung) == ([], [])


async def test_a_lapsed_lease_is_picked_up(man: Manned, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.claim(job_id)
    await jobs.age(timedelta(minutes=1), job_id)
    post = man()

    await post.watcher.sweep()

    assert post.desk.offered == [job_id]


async def test_looks_beyond_one_worker_are_rung_to_the_others(
    man: Manned, jobs: JobTable
) -> None:
    await jobs.submit()
    looks = await _due_looks(jobs, RINGS_A_ROUND + 10)
    post = man(room=2)

    is_full = await post.watcher.sweep()

    assert post.desk.offered == looks[:2]
    assert post.bell.rung == looks[2 : 2 + RINGS_A_ROUND]
    assert is_full


async def test_what_fits_is_not_rung(man: Manned, jobs: JobTable) -> None:
    looks = await _due_looks(jobs, 5)
    post = man(room=6)

    assert not await post.watcher.sweep()

    assert (post.desk.offered, post.bell.rung) == (looks, [])


async def test_without_room_nothing_is_offered(man: Manned, jobs: JobTable) -> None:
    await _due_looks(jobs, 1)
    post = man(room=0)

    assert await post.watcher.sweep()

    assert (post.desk.offered, post.bell.rung) == ([], [])


async def test_an_engine_that_seeks_starts_is_not_told_of_them(
    man: Manned, jobs: JobTable
) -> None:
    await jobs.submit()
    busy, idle = man(is_seeking=True), man()

    for post in (busy, idle):
        await post.watcher.seek_starts()

    assert (busy.desk.sought, idle.desk.sought) == ([], [1])


async def test_a_look_due_this_moment_is_left_to_its_workers_timer(
    man: Manned, jobs: JobTable
) -> None:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Started("h-1"))
    await jobs.make_due(job_id)
    post = man()

    await post.watcher.sweep()
    assert post.desk.offered == []
    await jobs.age(OVERDUE, job_id)
    await post.watcher.sweep()

    assert post.desk.offered == [job_id]


async def test_finished_and_waiting_jobs_are_left_alone(
    man: Manned, jobs: JobTable
) -> None:
    done, later = await jobs.submit(new_job(), new_job())
    await jobs.cancel(done)
    await jobs.age(timedelta(minutes=-1), later)
    post = man()

    await post.watcher.sweep()
    await post.watcher.seek_starts()

    assert (post.desk.offered, post.desk.sought) == ([], [])


async def test_the_rounds_go_on_after_a_round_that_failed(
    man: Manned, jobs: JobTable
) -> None:
    """A worker may be up before the tables are."""
    (job_id,) = await _due_looks(jobs, 1)
    async with jobs.engine.begin() as conn:
        await conn.execute(text("ALTER TABLE jobs RENAME TO elsewhere"))
    post = man()
    post.watcher.start()
    await _rounds(post, 2)

    async with jobs.engine.begin() as conn:
        await conn.execute(text("ALTER TABLE elsewhere RENAME TO jobs"))

    async def is_offered() -> bool:
        return job_id in post.desk.offered

    await wait_for_async(is_offered, within=2 * PICKUP, what="the job")


@pytest.mark.parametrize("error", [ProviderUnavailable("away"), NotFound("gone")])
async def test_a_duty_that_failed_is_performed_again(
    man: Manned, error: Exception
) -> None:
    duty = Stumbling(error)
    man(duty).watcher.start()

    async def is_back() -> bool:
        return duty.performed > 1

    await wait_for_async(is_back, within=10, what="the duty")


async def test_the_rounds_go_on_when_the_leader_loses_its_connections(
    man: Manned, jobs: JobTable
) -> None:
    post = man()
    post.watcher.start()
    await _leading(post)
    async with jobs.engine.begin() as conn:
        await conn.execute(
            text(
                "SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity"
                " WHERE application_name = 'post' AND datname = current_database()"
            )
        )
    (job_id,) = await _due_looks(jobs, 1)

    async def is_offered() -> bool:
        return job_id in post.desk.offered

    await wait_for_async(is_offered, within=TAKEOVER + PICKUP, what="the job")
    assert post.watcher.is_leading


async def test_a_watcher_ends_although_a_duty_loses_the_cancellation(
    man: Manned,
) -> None:
    """As a request to Redis under way may, with Python 3.11."""

    class Deaf:
        """Loses the first cancellation, and would go on for ever."""

        lost = 0

        async def perform(self) -> timedelta:
            """Wait."""
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.lost += 1
                if self.lost > 1:
                    raise
            return timedelta(hours=1)

    deaf = Deaf()
    post, other = man(deaf), man()
    post.watcher.start()
    await _leading(post)
    await _rounds(post, 2)

    async with asyncio.timeout(20):
        await post.watcher.stop()
    other.watcher.start()

    assert deaf.lost == 1
    assert await _leading(other) is other


# ----------------------------------------------------------------------------------- duties


async def test_pending_jobs_out_of_time_are_offered_also_while_nothing_may_start(
    jobs: JobTable,
) -> None:
    late, _ = await jobs.submit(new_job(), new_job())
    await jobs.expire(late)
    desk = Desk(is_seeking=True)

    await EndOutOfTime(Ledger(jobs.engine, Policy()), desk).perform()  # type: ignore[arg-type]

    assert desk.offered == [late]


async def test_a_duty_is_done_by_the_leader_alone_and_again_after_trouble(
    database_url: str,
) -> None:
    class Chore:
        """Fails the first time, then works."""

        done = 0

        async def perform(self) -> timedelta:
            """Count."""
            self.done += 1
            if self.done == 1:
                raise Unavailable("not now")
            return timedelta(milliseconds=10)

    async with AsyncExitStack() as stack:
        chores = [Chore(), Chore()]
        watchers = []
        for chore in chores:
            engine = open_engine(SecretStr(database_url), name="post", pool_size=3)
            stack.push_async_callback(engine.dispose)
            desk, bell = Desk(), RecordingBell()
            watcher = Watcher(
                ledger=Ledger(engine, Policy()),
                engine=desk,  # type: ignore[arg-type]
                leadership=Leadership(engine, LEADERSHIP_KEY),
                bell=bell,  # type: ignore[arg-type]
                duties=(chore,),
            )
            stack.push_async_callback(watcher.stop)
            watchers.append(watcher)
        watchers[0].start()

        async def is_done() -> bool:
            return chores[0].done >= 3

        async def leads() -> bool:
            return watchers[0].is_leading

        await wait_for_async(leads, within=TAKEOVER, what="a leader")
        watchers[1].start()
        await wait_for_async(is_done, within=10, what="the chore, done again")

    assert chores[1].done == 0
