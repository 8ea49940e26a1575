"""What is told is written with what it tells of: both or neither, to whom it concerns."""

from __future__ import annotations

import asyncio
import json
import random
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain import notices
from app.domain.events import (
    CancelRequested,
    Generated,
    Progressed,
    Refused,
    Started,
    Stored,
)
from app.domain.generation import Failure, RefusalKind
from app.domain.policy import Policy
from app.services import job_service, submission
from app.services.job_service import Change
from app.services.ledger import Ledger
from tests.support.hooks import Hooks
from tests.support.jobs import FAILURE, JobTable, new_job, stored_output

URL = "https://hooks.example/all?token=t"
OWN = "https://own.example/hook"
PERMANENT = Refused(RefusalKind.PERMANENT, FAILURE)


@pytest.fixture
def hooks(engine: AsyncEngine) -> Hooks:
    return Hooks(engine)


async def complete(jobs: JobTable, **fields: Any) -> Any:
    """Take a job to its picture."""
    (job_id,) = await jobs.submit(new_job(**fields))
    await jobs.look(job_id, Started("p1"), Progressed(0.5), Generated())
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.settle(
        claim, Stored(1), outputs=[stored_output()], cost_usd=Decimal("0.00300")
    )
    return job_id


async def test_nothing_is_written_for_whom_nobody_listens(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks
) -> None:
    """And nothing more is sent to the database: the hot path stays as it was."""
    statements: list[str] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def _see(conn: object, cursor: object, statement: str, *more: object) -> None:
        statements.append(statement)

    await hooks.register(URL, owner="somebody-else")
    statements.clear()

    await complete(jobs)

    assert not [one for one in statements if "INSERT INTO notifications" in one]
    assert await hooks.written() == []


async def test_an_endpoint_hears_of_everything_worth_a_webhook_in_order(
    jobs: JobTable, hooks: Hooks
) -> None:
    endpoint = await hooks.register(URL)

    job_id = await complete(jobs)

    written = await hooks.written()
    assert [(row.type, row.job_version) for row in written] == [
        ("job.created", 1),
        ("job.started", 2),
        ("job.completed", (await jobs.row(job_id)).version),
    ]
    assert {row.endpoint_id for row in written} == {endpoint.id}
    assert {row.url for row in written} == {None}
    assert {(row.state, row.attempts) for row in written} == {("pending", 0)}
    assert [row.data["version"] for row in written] == [
        row.job_version for row in written
    ]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("complete", "job.completed"),
        ("fail", "job.failed"),
        ("cancel", "job.cancelled"),
    ],
)
async def test_the_jobs_own_url_hears_of_the_end_alone(
    jobs: JobTable, hooks: Hooks, how: str, told: str
) -> None:
    if how == "complete":
        job_id = await complete(jobs, webhook_url=OWN)
    else:
        (job_id,) = await jobs.submit(new_job(webhook_url=OWN))
        if how == "fail":
            await jobs.look(job_id, PERMANENT)
        else:
            await jobs.cancel(job_id)

    (row,) = await hooks.written()
    assert (row.type, row.url, row.endpoint_id) == (told, OWN, None)
    assert row.job_id == job_id


async def test_a_job_that_ends_for_want_of_time_is_told_of(
    jobs: JobTable, hooks: Hooks
) -> None:
    (job_id,) = await jobs.submit(new_job(webhook_url=OWN))
    await jobs.expire(job_id)

    assert await jobs.claim(job_id) == []

    (row,) = await hooks.written()
    assert row.type == "job.failed"
    assert row.data["error"]["code"] == (await jobs.row(job_id)).error_code


async def test_subscriptions_and_owners_are_kept_apart(
    jobs: JobTable, hooks: Hooks
) -> None:
    ends = await hooks.register(URL, "job.completed", "job.failed", owner="alice")
    starts = await hooks.register(URL, "job.started", owner="alice")
    await hooks.register(URL, owner="bob")

    (job_id,) = await jobs.submit(new_job(owner="alice"))
    await jobs.look(job_id, PERMANENT)

    told = {(row.endpoint_id, row.type, row.owner) for row in await hooks.written()}
    assert told == {
        (ends.id, "job.failed", "alice"),
        (starts.id, "job.started", "alice"),
    }


async def test_each_attempt_is_told_of(jobs: JobTable, hooks: Hooks) -> None:
    await hooks.register(URL, "job.started")
    (job_id,) = await jobs.submit(new_job())

    await jobs.look(job_id, Refused(RefusalKind.TRANSIENT, FAILURE))
    await jobs.make_due(job_id)
    await jobs.claim_one(job_id)

    assert [row.data["attempts"] for row in await hooks.written()] == [1, 2]


async def test_an_endpoint_hears_nothing_from_before_it_was_there(
    jobs: JobTable, hooks: Hooks
) -> None:
    (job_id,) = await jobs.submit(new_job())
    await hooks.register(URL)

    await jobs.cancel(job_id)

    assert [row.type for row in await hooks.written()] == ["job.cancelled"]


async def test_what_a_disabled_endpoint_would_hear_is_kept_and_not_sent(
    jobs: JobTable, hooks: Hooks
) -> None:
    await hooks.register(URL, enabled=False)

    await jobs.submit(new_job())

    (row,) = await hooks.written()
    assert (row.state, row.due_at) == ("dropped", None)
    assert row.finished_at is not None


class _TakenBack(Exception):
    """The transaction is."""


async def test_what_is_taken_back_is_not_told(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks
) -> None:
    await hooks.register(URL)
    (job_id,) = await jobs.submit(new_job(webhook_url=OWN))
    before = await hooks.written()

    with pytest.raises(_TakenBack):
        async with engine.begin() as conn:
            await job_service.cancel(conn, job_id, policy=Policy())
            raise _TakenBack
    with pytest.raises(_TakenBack):
        async with engine.begin() as conn:
            await submission.submit(conn, [new_job()])
            raise _TakenBack

    assert await hooks.written() == before
    await jobs.cancel(job_id)
    assert len(await hooks.written()) == len(before) + 2


async def test_a_change_that_is_refused_or_repeated_tells_nothing(
    jobs: JobTable, hooks: Hooks
) -> None:
    (job_id,) = await jobs.submit(new_job(webhook_url=OWN))
    await jobs.cancel(job_id)
    await jobs.cancel(job_id)
    claimless = Change(job_id, PERMANENT, token=uuid4())

    (refused,) = await jobs.transition(claimless)

    assert isinstance(refused, Exception)
    assert len(await hooks.written()) == 1


async def test_a_submit_that_is_repeated_tells_of_one_birth(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks
) -> None:
    await hooks.register(URL)
    job = new_job()

    await jobs.submit(job, job)
    async with engine.begin() as conn:
        await submission.submit(conn, [job], is_again=True)
    await jobs.submit(job)

    assert [row.type for row in await hooks.written()] == ["job.created"]


async def test_many_at_once_are_told_of_each(jobs: JobTable, hooks: Hooks) -> None:
    await hooks.register(URL)
    await hooks.register(URL)

    ids = await jobs.submit(*(new_job(metadata={"n": n}) for n in range(30)))
    await jobs.claim(*ids)

    written = await hooks.written()
    assert len(written) == 2 * 2 * 30
    by_job = {row.job_id: row.data["metadata"]["n"] for row in written}
    assert [by_job[job_id] for job_id in ids] == list(range(30))


async def test_what_is_told_is_what_was_true_and_no_prompt(
    jobs: JobTable, hooks: Hooks
) -> None:
    job_id = await complete(
        jobs,
        webhook_url=OWN,
        prompt="a secret",
        metadata={"order": [1, {"a": "ü"}]},
        owner="alice",
        is_public=False,
    )

    (row,) = await hooks.written()
    stored = await jobs.row(job_id)
    assert row.data == {
        "job_id": str(job_id),
        "owner": "alice",
        "visibility": "private",
        "version": stored.version,
        "status": "completed",
        "stage": None,
        "model": "acme/painter",
        "num_outputs": 1,
        "attempts": 1,
        "error": None,
        "cost_usd": "0.003",
        "created_at": stored.created_at.isoformat().replace("+00:00", "Z"),
        "started_at": stored.started_at.isoformat().replace("+00:00", "Z"),
        "completed_at": stored.completed_at.isoformat().replace("+00:00", "Z"),
        "retry_of": None,
        "metadata": {"order": [1, {"a": "ü"}]},
        "outputs": [
            {
                "index": 0,
                "key": stored_output().key,
                "content_type": "image/png",
                "size_bytes": 1234,
                "width": 64,
                "height": 48,
                "sha256": stored_output().sha256,
            }
        ],
    }


async def test_a_long_and_odd_error_is_told_in_part(
    jobs: JobTable, hooks: Hooks
) -> None:
    odd = Failure("bad_weather", "rain\x00 " + "and more " * 1000, retryable=True)
    (job_id,) = await jobs.submit(new_job(webhook_url=OWN))

    await jobs.look(job_id, Refused(RefusalKind.PERMANENT, odd))

    (row,) = await hooks.written()
    assert row.data["error"]["message"].startswith("rain\ufffd and")
    assert len(json.dumps(row.data)) < 3000


async def test_a_deleted_job_is_told_of_all_the_same(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks
) -> None:
    job_id = await complete(jobs, webhook_url=OWN)

    async with engine.begin() as conn:
        await job_service.delete_job(conn, job_id, realm=None)

    (row,) = await hooks.written()
    assert (row.state, row.type) == ("pending", "job.completed")


async def test_the_rest_is_for_streams(jobs: JobTable, hooks: Hooks) -> None:
    (job_id,) = await jobs.submit(new_job())
    await jobs.look(job_id, Started("p0"))
    await hooks.register(URL)

    await jobs.look(job_id, Progressed(0.3), Generated())

    assert await hooks.written() == []


def test_what_endpoints_may_hear_of_is_what_is_announced() -> None:
    from typing import get_args

    from app.models.webhook_schemas import EventWord

    assert set(get_args(EventWord)) == set(notices.ANNOUNCED)


# What should be there beside what is, for all events of all jobs: missing, unfounded, doubled.
_COMPARED = """
WITH told AS (
    SELECT e.job_id, e.version, j.webhook_url IS NOT NULL AND j.due_at IS NULL AS has_own,
        CASE
            WHEN e.status IN ('completed', 'failed', 'cancelled') THEN 'job.' || e.status
            WHEN e.name = 'Submitted' THEN 'job.created'
            WHEN e.name = 'Intended' THEN 'job.started'
        END AS type
    FROM job_events e JOIN jobs j ON j.id = e.job_id
),
wanted AS (
    SELECT told.job_id, version, type, n.id AS endpoint_id FROM told
    JOIN endpoints n ON type = ANY(n.events) OR n.events = '{}' AND type IS NOT NULL
    UNION ALL
    SELECT job_id, version, type, NULL FROM told
    WHERE has_own AND type NOT IN ('job.created', 'job.started')
),
written AS (
    SELECT job_id, job_version AS version, type, endpoint_id, count(*) AS times
    FROM notifications GROUP BY 1, 2, 3, 4
)
SELECT
    count(*) FILTER (WHERE written.job_id IS NULL) AS missing,
    count(*) FILTER (WHERE wanted.job_id IS NULL) AS unfounded,
    count(*) FILTER (WHERE times > 1) AS doubled,
    count(*) AS written
FROM wanted FULL JOIN written
    ON (wanted.job_id, wanted.version, wanted.type)
        = (written.job_id, written.version, written.type)
    AND coalesce(wanted.endpoint_id, wanted.job_id)
        = coalesce(written.endpoint_id, written.job_id)
"""


async def test_whatever_happens_at_once_each_is_told_of_each_change_once(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks
) -> None:
    """Submits, repeated ones, starts in turn and at once, ends for want of time, cancels."""
    await hooks.register(URL)
    await hooks.register(URL, "job.created", "job.cancelled")
    draw, job_ids = random.Random(3), list[UUID]()
    ledgers = Ledger(engine, Policy()), Ledger(engine, Policy())

    async def submit(ledger: Ledger) -> None:
        for _ in range(20):
            late, own = draw.random() < 0.3, draw.random() < 0.5
            job = new_job(
                deadline=timedelta(0) if late else timedelta(minutes=10),
                webhook_url=OWN if own else None,
            )
            async with engine.begin() as conn:
                await submission.submit(conn, [job, job])
            job_ids.append(job.id)
            async with engine.begin() as conn:
                again = draw.random() < 0.5
                await submission.submit(conn, [job], is_again=again)

    async def start(ledger: Ledger) -> None:
        for _ in range(20):
            await ledger.start(3)
            await ledger.claim(draw.sample(job_ids, min(len(job_ids), 6)), starts=2)

    async def cancel(ledger: Ledger) -> None:
        for _ in range(20):
            some = draw.sample(job_ids, min(len(job_ids), 3))
            await ledger.change_all(
                [Change(one, CancelRequested()) for one in 2 * some]
            )

    verbs = (submit, start, cancel)
    await asyncio.gather(*(verb(ledger) for verb in verbs for ledger in ledgers))
    await ledgers[0].claim(job_ids, starts=0)

    async with engine.connect() as conn:
        found = (await conn.execute(text(_COMPARED))).one()
    assert (found.missing, found.unfounded, found.doubled) == (0, 0, 0)
    assert found.written > 100
