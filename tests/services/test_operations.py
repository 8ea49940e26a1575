"""The figures operators see: what they count, what they leave out, and what bounds them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import uuid4

import pytest
from sqlalchemy import text

from app.domain.errors import Conflict
from app.services import figures, usage
from app.services.figures import HOUR
from app.services.ledger import Ledger
from app.services.operations import Operations, _Remembered
from tests.support.history import BLOCKED, BROKEN, past_job
from tests.support.jobs import JobTable, new_job

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


# ------------------------------------------------------------------------------- the queue


async def test_the_queue_counts_what_is_not_finished(jobs: JobTable) -> None:
    await jobs.submit(*(new_job(owner="ann") for _ in range(2)))
    (under_way,) = await jobs.submit(new_job(owner="bob"))
    await jobs.claim_one(under_way)
    await past_job(jobs, HOUR)
    await jobs.age(timedelta(seconds=90))

    async with jobs.engine.connect() as conn:
        everybodys = await figures.queue(conn, realm=None)
        anns = await figures.queue(conn, realm="ann")
        bobs = await figures.queue(conn, realm="bob")

    assert (everybodys.pending, everybodys.in_flight) == (2, 1)
    assert (anns.pending, anns.in_flight) == (2, 0)
    assert anns.oldest and timedelta(seconds=90) <= datetime.now(UTC) - anns.oldest
    assert (bobs.pending, bobs.in_flight, bobs.oldest) == (0, 1, None)


# ---------------------------------------------------------------------------- hour by hour


async def test_each_hour_tells_of_its_own_jobs(jobs: JobTable) -> None:
    this = NOW.replace(minute=0, second=0, microsecond=0)
    within = NOW - this + timedelta(minutes=30)  # half past the hour before
    for seconds in ((1, 10, 2), (2, 20, 2), (3, 30, 2)):
        await past_job(jobs, within, seconds=seconds)
    await past_job(jobs, within, failure=BROKEN)
    await past_job(jobs, within + 2 * HOUR, seconds=(5, 5, 5))

    async with jobs.engine.connect() as conn:
        oldest, _, middle, latest = await figures.hours(conn, now=NOW, count=4)

    assert [hour.at for hour in (oldest, latest)] == [this - 3 * HOUR, this]
    assert (oldest.jobs, oldest.failed_share) == (1, 0.0)
    assert oldest.queue and oldest.queue.median == pytest.approx(5, abs=0.5)
    assert (middle.jobs, middle.completed, middle.failed) == (4, 3, 1)
    assert middle.failed_share == 0.25
    assert middle.generate and middle.store and middle.queue
    assert middle.generate.median == pytest.approx(20, abs=0.5)
    assert 28 < middle.generate.p95 < 31
    assert middle.store.median == pytest.approx(2, abs=0.5)
    assert (latest.jobs, latest.failed_share, latest.queue) == (0, None, None)


# -------------------------------------------------------------------------------- failures


async def test_failures_are_grouped_by_reason(jobs: JobTable) -> None:
    broken = [
        await past_job(jobs, timedelta(minutes=10 * n), failure=BROKEN)
        for n in (5, 4, 3, 2)
    ]
    blocked = await past_job(jobs, HOUR, failure=BLOCKED)
    await past_job(jobs, HOUR)
    await past_job(jobs, 9 * DAY, failure=BROKEN)

    async with jobs.engine.connect() as conn:
        first, second = await figures.failure_groups(conn, since=NOW - 7 * DAY)

    assert (first.code, first.count, first.is_retryable) == (BROKEN.code, 4, True)
    assert list(first.samples) == broken[:0:-1]  # the latest three
    assert first.message == BROKEN.message
    assert (second.code, second.count, second.is_retryable) == (BLOCKED.code, 1, False)
    assert list(second.samples) == [blocked]


async def test_what_was_run_again_is_no_failure_any_more(jobs: JobTable) -> None:
    again, left = [await past_job(jobs, HOUR, failure=BROKEN) for _ in range(2)]
    await jobs.submit(new_job(retry_of=again))

    async with jobs.engine.connect() as conn:
        (group,) = await figures.failure_groups(conn, since=NOW - DAY)
        ids = await figures.failed_with(conn, BROKEN.code, since=NOW - DAY, limit=10)

    assert (group.count, list(group.samples)) == (1, [left])
    assert ids == [left]


async def test_the_oldest_of_a_group_come_first(jobs: JobTable) -> None:
    ids = [
        await past_job(jobs, timedelta(minutes=n), failure=BROKEN) for n in (9, 8, 7)
    ]
    await past_job(jobs, HOUR, failure=BLOCKED)

    async with jobs.engine.connect() as conn:
        found = await figures.failed_with(conn, BROKEN.code, since=NOW - DAY, limit=2)

    assert found == ids[:2]


async def test_two_cannot_take_the_same_group_at_once(jobs: JobTable) -> None:
    ledger = Ledger(jobs.engine, jobs.policy)
    job_id = await past_job(jobs, HOUR, failure=BROKEN)
    ours, theirs = (Operations(ledger, health=None) for _ in range(2))  # type: ignore[arg-type]

    async with ours.taking(BROKEN.code) as taken:
        assert taken == [job_id]
        with pytest.raises(Conflict):
            async with theirs.taking(BROKEN.code):
                raise AssertionError("taken twice")
        async with theirs.taking(BLOCKED.code) as others:
            assert others == []
    async with theirs.taking(BROKEN.code) as taken:
        assert taken == [job_id]


async def test_whoever_fails_with_a_group_lets_go_of_it(jobs: JobTable) -> None:
    operations = Operations(Ledger(jobs.engine, jobs.policy), health=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        async with operations.taking(BROKEN.code):
            raise RuntimeError
    async with operations.taking(BROKEN.code) as taken:
        assert taken == []


async def test_an_answer_from_before_a_change_is_not_remembered() -> None:
    state = "runs"
    reading, may_go_on = asyncio.Event(), asyncio.Event()

    async def read() -> str:
        found = state
        reading.set()
        await may_go_on.wait()
        return found

    remembered = _Remembered(read, DAY)
    early = asyncio.create_task(remembered())
    await reading.wait()
    state = "paused"
    remembered.forget()
    late = asyncio.create_task(remembered())
    may_go_on.set()

    assert (await early, await late, await remembered()) == ("runs", "paused", "paused")


# ------------------------------------------------------------------------ money, the store


async def test_money_is_added_up_day_by_day(jobs: JobTable) -> None:
    today = NOW.date()
    charge = text(
        "INSERT INTO ledger_entries (day, owner, job_id, model, kind, amount_usd, status,"
        " outputs, at) VALUES (:day, 'ann', :job, 'm', :kind, :usd, 'completed', 1, now())"
    )
    rows = [
        (today, "charge", Decimal("0.25")),
        (today, "charge", None),
        (today, "reserve", Decimal("7")),
        (today - 2 * DAY, "charge", Decimal("0.5")),
        (today - 3 * DAY, "charge", Decimal("9")),
    ]
    async with jobs.engine.begin() as conn:
        for day, kind, usd in rows:
            values = {"day": day, "kind": kind, "usd": usd, "job": uuid4()}
            await conn.execute(charge, values)
        days = await usage.days(conn, today - 2 * DAY, today)

    assert [(one.day, one.jobs, one.cost_usd, one.unpriced_jobs) for one in days] == [
        (today - 2 * DAY, 1, Decimal("0.5"), 0),
        (today - DAY, 0, Decimal(0), 0),
        (today, 2, Decimal("0.25"), 1),
    ]


@pytest.mark.parametrize("few", [5000, 2])
async def test_what_is_kept_is_counted_or_estimated(
    jobs: JobTable, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    for _ in range(3):
        await past_job(jobs, HOUR)
    monkeypatch.setattr(figures, "_FEW", few)
    async with jobs.engine.begin() as conn:
        await conn.execute(text("ANALYZE assets"))
        found = await figures.stored(conn)

    assert (found.pictures, found.picture_bytes) == (3, 3 * 1234)
    assert found.database_bytes > 1_000_000
