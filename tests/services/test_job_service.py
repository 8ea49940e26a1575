import asyncio
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain.errors import Conflict, LostClaim, NotFound
from app.domain.events import (
    CancelRequested,
    Expired,
    Generated,
    GenerationCancelled,
    GenerationFailed,
    LookFailed,
    OutcomeUnknown,
    Progressed,
    Refused,
    Started,
    Stored,
)
from app.domain.generation import Failure, RefusalKind
from app.domain.policy import Policy
from app.domain.lifecycle import IllegalEvent
from app.domain.state import AttemptState, Stage, Status
from app.services import job_service, submission
from app.services.submission import Birth
from app.services.job_records import JOBS
from app.services.job_service import Change, Hold, Outcome
from tests.support.jobs import (
    FAILURE,
    LEASE,
    JobTable,
    new_job,
    stored_output,
    timeless,
)
from tests.support.waiting import wait_for_async

TO_STORING = (Started("h-1"), Generated(1.5))


async def _generating(jobs: JobTable, handle: str = "h-1") -> UUID:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Started(handle))
    return job_id


# ------------------------------------------------------------------------------- submit


async def test_a_submitted_job_is_pending_and_due_now(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()

    row = await jobs.row(job_id)

    assert (row.status, row.stage, row.version) == ("pending", "queued", 1)
    assert row.due_at == row.created_at <= row.now
    assert row.deadline_at - row.created_at == timedelta(minutes=15)
    assert [event.name for event in await jobs.events(job_id)] == ["Submitted"]


async def test_submit_keeps_everything_that_was_asked_for(jobs: JobTable) -> None:
    job = new_job(
        prompt='quotes " and \\ and emoji 🎨',
        metadata={"nested": {"list": [1, None, "x"]}},
        webhook_url="https://example.com/hook",
        request_id="req-1",
        retry_of=uuid4(),
        warnings=("width was rounded",),
        num_outputs=4,
        priority=1,
    )
    await jobs.submit(job)

    row = await jobs.row(job.id)

    assert row.prompt == job.prompt
    assert row.metadata == job.metadata
    assert row.webhook_url == job.webhook_url
    assert (row.request_id, row.retry_of) == (job.request_id, job.retry_of)
    assert row.warnings == list(job.warnings)
    assert (row.num_outputs, row.priority) == (4, 1)
    assert row.input == job.request.input


async def test_submitting_again_with_the_same_ids_changes_nothing(
    jobs: JobTable,
) -> None:
    first, second = new_job(), new_job()
    await jobs.submit(first)
    await jobs.look(first.id, Started("h-1"))
    before = await jobs.snapshot(first.id)

    await jobs.submit(replace(first, prompt="another one"), second)

    assert await jobs.snapshot(first.id) == before
    assert (await jobs.row(second.id)).status == "pending"
    assert len(await jobs.events(second.id)) == 1


async def test_submit_tells_when_each_job_was_born(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    first, second = new_job(), new_job()
    await jobs.submit(first)
    async with engine.begin() as conn:
        born = await submission.submit(conn, [first, second])

    assert born == [
        Birth(job.id, (await jobs.row(job.id)).created_at) for job in (first, second)
    ]


# -------------------------------------------------------------------------------- claim


async def test_claiming_a_pending_job_writes_the_intended_purchase_down(
    jobs: JobTable,
) -> None:
    job = new_job()
    await jobs.submit(job)

    claim = await jobs.claim_one(job.id)

    (attempt,) = await jobs.attempts(job.id)
    row = await jobs.row(job.id)
    assert claim.is_fresh
    assert (row.status, row.stage, row.attempts) == ("processing", "submitting", 1)
    assert (attempt.number, attempt.state, attempt.handle) == (1, "sent", None)
    assert attempt.fingerprint == job.request.fingerprint
    assert (attempt.id, attempt.token) == (claim.attempt_id, claim.attempt_token)
    assert len(attempt.token) >= 32
    assert row.claim_token == claim.token
    assert row.due_at == claim.now + LEASE
    assert claim.request == job.request


async def test_a_claimed_job_cannot_be_claimed_until_its_lease_is_over(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    first = await jobs.claim_one(job_id)

    assert await jobs.claim(job_id) == []
    await jobs.make_due(job_id)
    second = await jobs.claim_one(job_id)

    assert second.token != first.token
    assert not second.is_fresh
    assert second.attempt_id == first.attempt_id
    assert second.state.stage is Stage.SUBMITTING
    assert len(await jobs.attempts(job_id)) == 1


async def test_unknown_finished_and_not_yet_due_jobs_are_not_claimed(
    jobs: JobTable,
) -> None:
    finished, waiting, free = await jobs.submit(new_job(), new_job(), new_job())
    await jobs.cancel(finished)
    await jobs.look(waiting, Started("h-1"))

    claims = await jobs.claim(finished, waiting, free, uuid4())

    assert [claim.job_id for claim in claims] == [free]


async def test_sixteen_claimers_get_each_of_two_hundred_jobs_exactly_once(
    jobs: JobTable,
) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(200)))

    rounds = await asyncio.gather(*(jobs.claim(*ids) for _ in range(16)))

    claimed = Counter(claim.job_id for claims in rounds for claim in claims)
    assert claimed == Counter(ids)


async def test_a_claim_does_not_wait_for_rows_in_other_hands(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    held, free = await jobs.submit(new_job(), new_job())
    async with engine.begin() as conn:
        await conn.execute(select(JOBS).where(JOBS.c.id == held).with_for_update())

        claims = await asyncio.wait_for(jobs.claim(held, free), timeout=2)

    assert [claim.job_id for claim in claims] == [free]


async def test_starts_go_by_priority_and_then_by_age(jobs: JobTable) -> None:
    old, young, urgent, idle = await jobs.submit(
        new_job(), new_job(), new_job(priority=1), new_job(priority=-1)
    )

    claims = await jobs.claim(idle, urgent, young, old, starts=2)

    assert [claim.job_id for claim in claims] == [urgent, old]
    assert (await jobs.row(young)).status == "pending"
    assert (await jobs.attempts(idle)) == []


async def test_looks_at_jobs_under_way_need_no_starts(jobs: JobTable) -> None:
    job_id = await _generating(jobs)
    await jobs.make_due(job_id)

    (claim,) = await jobs.claim(job_id, starts=0)

    assert claim.state.stage is Stage.GENERATING


async def test_a_pending_job_past_its_deadline_fails_unbought(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.expire(job_id)

    assert await jobs.claim(job_id) == []

    row = await jobs.row(job_id)
    assert (row.status, row.error_code) == ("failed", "deadline_exceeded")
    assert await jobs.attempts(job_id) == []
    assert timeless(await jobs.replayed(job_id)) == timeless(await jobs.state(job_id))


async def test_a_throttled_job_past_its_deadline_closes_its_unsent_attempt(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Refused(RefusalKind.THROTTLED, FAILURE, 1.0))
    await jobs.make_due(job_id)
    await jobs.expire(job_id)

    assert await jobs.claim(job_id) == []

    (attempt,) = await jobs.attempts(job_id)
    assert attempt.state == "refused"
    assert attempt.closed_at is not None


async def test_a_job_that_kills_every_worker_ends(jobs: JobTable) -> None:
    """Claimed again and again and never settled: the deadline and the last resort bound it."""
    job_id = await _generating(jobs)
    await jobs.make_due(job_id)
    await jobs.claim_one(job_id)
    await jobs.age(timedelta(seconds=900), job_id)
    await jobs.claim_one(job_id)  # late, and still worth a look
    await jobs.age(Policy().last_resort, job_id)

    assert await jobs.claim(job_id) == []

    row = await jobs.row(job_id)
    assert (row.status, row.error_code) == ("failed", "deadline_exceeded")
    assert timeless(await jobs.replayed(job_id)) == timeless(await jobs.state(job_id))


async def test_a_picture_that_kills_every_worker_ends(jobs: JobTable) -> None:
    job_id = await _generating(jobs)
    await jobs.make_due(job_id)
    await jobs.record(await jobs.claim_one(job_id), Generated())
    await jobs.age(Policy().data_lifetime, job_id)
    await jobs.claim_one(job_id)
    await jobs.age(Policy().last_resort, job_id)

    assert await jobs.claim(job_id) == []

    row = await jobs.row(job_id)
    assert (row.status, row.error_code) == ("failed", "output_expired")


async def test_renewing_pushes_the_lease_of_claims_that_stand(jobs: JobTable) -> None:
    kept, lost = await jobs.submit(new_job(), new_job())
    old, new = await jobs.claim_one(lost), await jobs.claim_one(kept)
    await jobs.make_due(lost)
    thief = await jobs.claim_one(lost)
    theirs = (await jobs.row(lost)).due_at

    standing = await jobs.renew(old, new, lease=timedelta(hours=1))

    assert standing == {new.token}
    row = await jobs.row(kept)
    assert row.due_at - row.now > timedelta(minutes=59)
    assert (await jobs.row(lost)).due_at == theirs
    assert (await jobs.row(lost)).claim_token == thief.token


async def test_a_settled_claim_cannot_be_renewed(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, Started("h-1"))
    before = await jobs.snapshot(job_id)

    assert await jobs.renew(claim) == set()
    assert await jobs.snapshot(job_id) == before


# --------------------------------------------------------------------------- transition


async def test_settling_releases_the_claim_and_sets_the_next_look(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)

    outcome = await jobs.settle(claim, Started("h-1"))

    row = await jobs.row(job_id)
    assert row.claim_token is None
    wait = jobs.policy.next_look(timedelta(0), None)
    assert outcome.next_look is not None
    assert timedelta(0) < outcome.next_look <= wait
    assert row.due_at - row.now <= wait
    assert (row.stage, row.attempt_handle) == ("generating", "h-1")


async def test_a_lost_claim_cannot_settle(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    slow = await jobs.claim_one(job_id)
    await jobs.make_due(job_id)
    quick = await jobs.claim_one(job_id)
    before = await jobs.snapshot(job_id)

    with pytest.raises(LostClaim):
        await jobs.settle(slow, Started("h-1"))
    with pytest.raises(LostClaim):
        await jobs.record(slow, Started("h-1"))

    assert await jobs.snapshot(job_id) == before
    await jobs.settle(quick, OutcomeUnknown("the worker died"))


async def test_a_claim_whose_lease_ran_out_still_settles_while_nobody_took_it(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    await jobs.make_due(job_id)

    await jobs.settle(claim, Started("h-1"))

    assert (await jobs.state(job_id)).stage is Stage.GENERATING


async def test_a_claim_cannot_settle_twice(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, Started("h-1"))

    with pytest.raises(LostClaim):
        await jobs.settle(claim, Started("h-1"))


async def test_recording_in_the_middle_of_a_look_keeps_claim_and_lease(
    jobs: JobTable,
) -> None:
    job_id = await _generating(jobs)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    lease_end = (await jobs.row(job_id)).due_at

    await jobs.record(claim, Generated(1.0))

    row = await jobs.row(job_id)
    assert (row.stage, row.claim_token, row.due_at) == (
        "storing",
        claim.token,
        lease_end,
    )
    await jobs.settle(claim, Stored(1), outputs=[stored_output()])
    assert (await jobs.row(job_id)).status == "completed"


async def test_news_from_outside_never_shortens_a_live_lease(jobs: JobTable) -> None:
    job_id = await _generating(jobs)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    lease_end = (await jobs.row(job_id)).due_at

    await jobs.tell(job_id, Progressed(0.5))

    row = await jobs.row(job_id)
    assert (row.progress, row.due_at, row.claim_token) == (0.5, lease_end, claim.token)


async def test_changes_of_one_job_in_one_transition_see_each_other(
    jobs: JobTable,
) -> None:
    job_id = await _generating(jobs)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    lease_end = (await jobs.row(job_id)).due_at

    outcomes = await jobs.transition(
        Change(job_id, Progressed(0.5), Hold.KEEP, claim.token),
        Change(job_id, CancelRequested()),
        Change(job_id, Progressed(0.75), Hold.KEEP, claim.token),
    )

    assert not any(isinstance(outcome, Exception) for outcome in outcomes)
    row = await jobs.row(job_id)
    assert (row.progress, row.is_cancel_requested) == (0.75, True)
    assert (row.due_at, row.claim_token) == (lease_end, claim.token)
    names = [event.name for event in await jobs.events(job_id)]
    assert names[-3:] == ["Progressed", "CancelRequested", "Progressed"]


async def test_a_cancel_between_two_changes_of_a_look_leaves_the_lease(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    lease_end = (await jobs.row(job_id)).due_at

    await jobs.transition(
        Change(job_id, Started("h-1"), Hold.KEEP, claim.token),
        Change(job_id, CancelRequested()),
    )

    row = await jobs.row(job_id)
    assert (row.due_at, row.claim_token) == (lease_end, claim.token)


async def test_after_a_release_in_the_same_transition_the_claim_is_lost(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)

    first, second = await jobs.transition(
        Change(job_id, Started("h-1"), Hold.RELEASE, claim.token),
        Change(job_id, Progressed(0.5), Hold.RELEASE, claim.token),
    )

    assert not isinstance(first, Exception)
    assert isinstance(second, LostClaim)
    assert (await jobs.row(job_id)).progress is None


async def test_a_cost_written_first_survives_a_later_change_in_the_same_transition(
    jobs: JobTable,
) -> None:
    job_id = await _generating(jobs)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)

    await jobs.transition(
        Change(
            *(job_id, Generated(1.0), Hold.KEEP, claim.token), cost_usd=Decimal("0.003")
        ),
        Change(job_id, Stored(1), Hold.RELEASE, claim.token, (stored_output(),)),
    )

    assert (await jobs.row(job_id)).cost_usd == Decimal("0.003")


async def test_one_transition_serves_many_jobs_and_refuses_one_by_one(
    jobs: JobTable,
) -> None:
    good, stolen = await jobs.submit(new_job(), new_job())
    claim, stale = await jobs.claim_one(good), await jobs.claim_one(stolen)
    await jobs.make_due(stolen)
    await jobs.claim_one(stolen)

    outcomes = await jobs.transition(
        Change(uuid4(), CancelRequested()),
        Change(stolen, Started("h-1"), Hold.RELEASE, stale.token),
        Change(good, Started("h-2"), Hold.RELEASE, claim.token),
    )

    assert [type(outcome) for outcome in outcomes] == [
        *(NotFound, LostClaim, job_service.Outcome)
    ]
    assert (await jobs.row(good)).attempt_handle == "h-2"


async def test_an_illegal_event_changes_nothing(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    before = await jobs.snapshot(job_id)

    with pytest.raises(IllegalEvent):
        await jobs.tell(job_id, Generated())

    assert await jobs.snapshot(job_id) == before


async def test_a_handle_belongs_to_one_attempt_and_the_batch_rolls_back(
    jobs: JobTable,
) -> None:
    await _generating(jobs, "h-1")
    second, innocent = await jobs.submit(new_job(), new_job())
    claims = {claim.job_id: claim for claim in await jobs.claim(second, innocent)}
    before = await jobs.snapshot(second), await jobs.snapshot(innocent)

    with pytest.raises(IntegrityError, match="uq_attempts_handle"):
        await jobs.transition(
            Change(innocent, Started("h-2"), Hold.RELEASE, claims[innocent].token),
            Change(second, Started("h-1"), Hold.RELEASE, claims[second].token),
        )

    assert (await jobs.snapshot(second), await jobs.snapshot(innocent)) == before


async def test_a_throttled_purchase_goes_again_as_the_same_attempt(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    first = await jobs.claim_one(job_id)
    await jobs.settle(first, Refused(RefusalKind.THROTTLED, FAILURE, 5.0))
    assert (await jobs.row(job_id)).attempt_state == "ready"
    await jobs.make_due(job_id)

    second = await jobs.claim_one(job_id)

    (attempt,) = await jobs.attempts(job_id)
    assert second.is_fresh
    assert (second.attempt_id, second.attempt_token) == (
        first.attempt_id,
        first.attempt_token,
    )
    assert (attempt.number, attempt.state) == (1, "sent")
    assert attempt.sent_at > first.now
    assert (await jobs.row(job_id)).attempts == 1


async def test_another_attempt_is_another_row_with_another_token(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    first = await jobs.claim_one(job_id)
    await jobs.settle(first, Refused(RefusalKind.TRANSIENT, FAILURE))
    await jobs.make_due(job_id)

    second = await jobs.claim_one(job_id)

    rows = await jobs.attempts(job_id)
    assert [(row.number, row.state) for row in rows] == [(1, "refused"), (2, "sent")]
    assert rows[0].closed_at is not None
    assert rows[1].closed_at is None
    assert second.attempt_id != first.attempt_id
    assert second.attempt_token != first.attempt_token


async def test_completing_stores_outputs_cost_and_warnings(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit(new_job(warnings=("size rounded",)))
    await jobs.look(job_id, *TO_STORING)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    outputs = [stored_output(0), stored_output(1, digest="cd" * 32)]

    outcome = await jobs.settle(
        claim, Stored(2, ("one is missing",)), outputs=outputs, cost_usd=Decimal("0.01")
    )

    row = await jobs.row(job_id)
    assets = await jobs.assets(job_id)
    assert outcome.next_look is None
    assert (row.status, row.stage, row.due_at) == ("completed", None, None)
    assert row.completed_at is not None
    assert row.cost_usd == Decimal("0.01")
    assert row.warnings == ["size rounded", "one is missing"]
    assert [(a.index, a.key, a.size_bytes) for a in assets] == [
        (o.index, o.key, o.size_bytes) for o in outputs
    ]
    assert timeless(await jobs.replayed(job_id)) == timeless(await jobs.state(job_id))


async def test_a_finished_job_never_changes(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Refused(RefusalKind.PERMANENT, FAILURE))
    before = await jobs.snapshot(job_id)

    for event in (CancelRequested(), Expired(), Started("h-9"), LookFailed("x")):
        await jobs.tell(job_id, event)

    assert await jobs.snapshot(job_id) == before
    row = await jobs.row(job_id)
    assert (row.error_code, row.error_message, row.error_retryable) == (
        *(FAILURE.code, FAILURE.message),
        FAILURE.retryable,
    )


async def test_looks_without_news_leave_version_and_history_alone(
    jobs: JobTable,
) -> None:
    job_id = await _generating(jobs)
    await jobs.look(job_id, Progressed(0.7))
    version, history = (await jobs.row(job_id)).version, await jobs.events(job_id)

    await jobs.look(job_id, Progressed(0.7), LookFailed("timeout"), Progressed(None))

    assert (await jobs.row(job_id)).version == version
    assert await jobs.events(job_id) == history


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.7, 0.123456789])
async def test_progress_comes_back_as_it_was_decided(
    jobs: JobTable, share: float
) -> None:
    job_id = await _generating(jobs)

    outcome = await jobs.look(job_id, Progressed(share))

    assert (await jobs.state(job_id)).progress == outcome.after.progress
    assert (await jobs.row(job_id)).version == outcome.after.version


async def test_the_history_gives_back_the_stored_state(jobs: JobTable) -> None:
    job = new_job(warnings=("the width was rounded",))
    await jobs.submit(job)
    for event in (
        Refused(RefusalKind.THROTTLED, FAILURE, 1.0),
        OutcomeUnknown("timeout"),
        Started("h-1", is_adopted=True),
        Progressed(0.3),
        GenerationFailed(FAILURE, is_transient=True),
        Started("h-2"),
        Progressed(1 / 3),
    ):
        await jobs.look(job.id, event)
    await jobs.cancel(job.id)
    assert timeless(await jobs.replayed(job.id)) == timeless(await jobs.state(job.id))

    await jobs.look(job.id, GenerationCancelled())

    assert timeless(await jobs.replayed(job.id)) == timeless(await jobs.state(job.id))
    events = await jobs.events(job.id)
    assert [event.version for event in events] == list(range(1, len(events) + 1))
    assert (events[-1].status, events[-1].stage) == ("cancelled", None)


async def test_text_postgresql_cannot_keep_does_not_stop_a_job(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    failure = Failure("odd", "a\x00b\ud800c", retryable=False)

    await jobs.look(job_id, Refused(RefusalKind.PERMANENT, failure))

    row = await jobs.row(job_id)
    assert (row.status, row.error_code) == ("failed", "odd")
    assert row.error_message.startswith("a")
    assert timeless(await jobs.replayed(job_id)) == timeless(await jobs.state(job_id))


# ---------------------------------------------- changes that wait for each other's locks


async def _is_waiting(engine: AsyncEngine) -> bool:
    async with engine.connect() as conn:
        waiting = await conn.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
        )
    return bool(waiting)


async def test_a_cancel_that_waited_for_a_settle_sees_what_it_did_to_the_attempt(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    refused = Refused(RefusalKind.THROTTLED, FAILURE, 1.0)
    async with engine.begin() as conn:
        change = Change(job_id, refused, Hold.RELEASE, claim.token)
        await job_service.transition(conn, [change], policy=jobs.policy)
        cancelling = asyncio.create_task(jobs.cancel(job_id))
        await wait_for_async(lambda: _is_waiting(engine), within=5, what="the cancel")
    outcome = await cancelling

    (attempt,) = await jobs.attempts(job_id)
    assert outcome.after.status is Status.CANCELLED
    assert attempt.state == "refused"
    assert timeless(await jobs.replayed(job_id)) == timeless(await jobs.state(job_id))


async def test_changes_of_the_same_jobs_in_any_order_do_not_deadlock(
    jobs: JobTable,
) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(20)))
    await jobs.claim(*ids)

    await asyncio.gather(
        *(
            jobs.transition(*(Change(i, CancelRequested()) for i in order))
            for order in (ids, ids[::-1]) * 5
        )
    )

    rows = [await jobs.row(job_id) for job_id in ids]
    assert {row.is_cancel_requested for row in rows} == {True}


# ------------------------------------------------------------------------------- cancel


async def test_cancelling_a_pending_job_ends_it_at_once(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()

    outcome = await jobs.cancel(job_id)

    assert outcome.after.status is Status.CANCELLED
    assert (await jobs.row(job_id)).status == "cancelled"
    assert await jobs.claim(job_id) == []


@pytest.mark.parametrize(
    "events",
    [(), (OutcomeUnknown("timeout"),), (Started("h-1"),)],
    ids=["submitting", "reconciling", "generating"],
)
async def test_cancelling_leaves_a_live_claim_in_its_hands(
    jobs: JobTable, events: tuple[Started | OutcomeUnknown, ...]
) -> None:
    (job_id,) = await jobs.submit()
    if events:
        await jobs.look(job_id, *events)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    lease_end = (await jobs.row(job_id)).due_at

    await jobs.cancel(job_id)

    row = await jobs.row(job_id)
    assert row.is_cancel_requested
    assert (row.claim_token, row.due_at) == (claim.token, lease_end)
    assert await jobs.claim(job_id) == []
    await jobs.settle(claim, LookFailed("whatever"))


async def test_cancelling_a_generating_job_nobody_looks_at_makes_it_due(
    jobs: JobTable,
) -> None:
    job_id = await _generating(jobs)
    assert await jobs.claim(job_id) == []

    await jobs.cancel(job_id)

    (claim,) = await jobs.claim(job_id)
    assert claim.state.is_cancel_requested


async def test_cancelling_a_job_whose_worker_died_makes_it_due(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.claim_one(job_id)
    await jobs.age(timedelta(minutes=1), job_id)

    await jobs.cancel(job_id)

    (claim,) = await jobs.claim(job_id)
    assert (claim.state.stage, claim.is_fresh) == (Stage.SUBMITTING, False)


async def test_cancelling_comes_too_late_for_a_picture_that_is_made(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, *TO_STORING)
    before = await jobs.snapshot(job_id)

    await jobs.cancel(job_id)

    assert await jobs.snapshot(job_id) == before


async def test_a_job_cancelled_while_the_request_was_out_is_not_sent_again(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    await jobs.cancel(job_id)

    await jobs.settle(claim, Refused(RefusalKind.THROTTLED, FAILURE, 1.0))

    row = await jobs.row(job_id)
    assert (row.status, row.attempt_state) == ("cancelled", "refused")


async def test_cancelling_an_unknown_job_says_so(jobs: JobTable) -> None:
    with pytest.raises(NotFound):
        await jobs.cancel(uuid4())


# ------------------------------------------------------------------------------- delete


async def _completed(jobs: JobTable, handle: str, digest: str) -> UUID:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Started(handle), Generated())
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, Stored(1), outputs=[stored_output(digest=digest)])
    return job_id


async def test_deleting_removes_every_row_and_tells_which_files_are_orphans(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    shared, own = "ab" * 32, "cd" * 32
    await _completed(jobs, "h-1", shared)
    doomed = await _completed(jobs, "h-2", shared)
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Started("h-3"), Generated())
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    outputs = [stored_output(0, digest=shared), stored_output(1, digest=own)]
    await jobs.settle(claim, Stored(2), outputs=outputs)

    async with engine.begin() as conn:
        keys = await job_service.delete_job(conn, job_id, realm=None)
        orphans = await job_service.orphans_among(conn, keys)

    assert sorted(keys) == [f"ab/{shared}.png", f"cd/{own}.png"]
    assert orphans == [f"cd/{own}.png"]
    assert not any((await jobs.snapshot(job_id)).values())
    assert all((await jobs.snapshot(doomed)).values())


async def test_a_live_job_cannot_be_deleted(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    (job_id,) = await jobs.submit()

    with pytest.raises(Conflict, match="cancel it first"):
        async with engine.begin() as conn:
            await job_service.delete_job(conn, job_id, realm=None)

    assert (await jobs.row(job_id)).status == "pending"


async def test_the_gate_knows_no_jobs_of_other_owners(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    """In one batch: hers by her, hers by him, his by him, hers by the service, nobody's."""
    (hers,) = await jobs.submit(new_job(owner="alice"))
    (his,) = await jobs.submit(new_job(owner="bob"))
    (third,) = await jobs.submit(new_job(owner="alice"))

    outcomes = await jobs.transition(
        Change(third, CancelRequested(), realm="bob"),
        Change(hers, CancelRequested(), realm="bob"),
        Change(hers, CancelRequested(), realm="alice"),
        Change(hers, CancelRequested(), realm="bob"),
        Change(his, CancelRequested(), realm="bob"),
        Change(third, CancelRequested()),
        Change(uuid4(), CancelRequested(), realm="bob"),
    )

    kinds = [type(one) for one in outcomes]
    assert kinds == [NotFound, NotFound, Outcome, NotFound, Outcome, Outcome, NotFound]
    assert len({str(one) for one in outcomes if isinstance(one, NotFound)}) == 1
    for job_id in (hers, his, third):
        assert (await jobs.row(job_id)).status == "cancelled"
        assert [one.name for one in await jobs.events(job_id)][1:] == [
            "CancelRequested"
        ]


async def test_a_stranger_waits_for_nobodys_lock(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    """The time an answer takes does not tell that there is such a job."""
    (job_id,) = await jobs.submit(new_job(owner="alice"))
    async with engine.begin() as holder:
        await job_service.lock(holder, [job_id])
        async with asyncio.timeout(5):
            change = Change(job_id, CancelRequested(), realm="bob")
            (outcome,) = await jobs.transition(change)
            with pytest.raises(NotFound):
                async with engine.begin() as conn:
                    await job_service.delete_job(conn, job_id, realm="bob")
    assert isinstance(outcome, NotFound)


async def test_deleting_an_unknown_job_says_so(engine: AsyncEngine) -> None:
    with pytest.raises(NotFound):
        async with engine.begin() as conn:
            await job_service.delete_job(conn, uuid4(), realm=None)


# ------------------------------------------------------- laws the table keeps by itself


@pytest.mark.parametrize(
    ("values", "law"),
    [
        ({"status": "completed"}, "finished_"),
        ({"due_at": None}, "finished_not_due"),
        ({"completed_at": func.now()}, "finished_has_moment"),
        ({"stage": None}, "finished_no_stage|pending_is_queued"),
        ({"status": "processing"}, "pending_is_queued"),
        ({"stage": "storing"}, "pending_is_queued"),
        ({"status": "odd"}, "status_known|pending_is_queued"),
        ({"stage": "odd", "status": "processing"}, "stage_known"),
        ({"error_code": "x"}, "failed_has_reason"),
        ({"progress": 1.5}, "progress_is_share"),
        ({"version": 0}, "counts_sane"),
        ({"attempts": -1}, "counts_sane"),
        (
            {
                **{"status": "cancelled", "stage": None, "due_at": None},
                **{"completed_at": func.now(), "claim_token": uuid4()},
            },
            "finished_unclaimed",
        ),
        (
            {
                **{"status": "failed", "stage": None, "due_at": None},
                **{"completed_at": func.now()},
            },
            "failed_has_reason",
        ),
    ],
)
async def test_the_table_refuses_rows_that_break_a_law(
    jobs: JobTable, engine: AsyncEngine, values: dict[str, object], law: str
) -> None:
    (job_id,) = await jobs.submit()

    with pytest.raises(IntegrityError, match=law):
        async with engine.begin() as conn:
            await conn.execute(update(JOBS).where(JOBS.c.id == job_id).values(**values))


@pytest.mark.parametrize(
    ("statement", "law"),
    [
        (
            "INSERT INTO attempts SELECT gen_random_uuid(), job_id, 2, 'sent', NULL,"
            " fingerprint, token, sent_at, NULL FROM attempts",
            "uq_attempts_open",
        ),
        (
            "INSERT INTO attempts SELECT gen_random_uuid(), job_id, 1, 'lost', NULL,"
            " fingerprint, token, sent_at, NULL FROM attempts",
            "uq_attempts_job_id_number",
        ),
        ("UPDATE attempts SET state = 'running'", "bought_has_handle"),
        ("UPDATE attempts SET state = 'odd'", "state_known"),
        (
            "INSERT INTO job_events (job_id, version, name, data, status, at)"
            " SELECT job_id, version, name, data, status, at FROM job_events",
            "uq_job_events_job_id_version",
        ),
        (
            "INSERT INTO assets SELECT job_id, 0, 'k', 's', 't', 0, 1, 1, now()"
            " FROM attempts",
            "not_empty",
        ),
    ],
)
async def test_the_tables_of_a_job_refuse_rows_that_break_a_law(
    jobs: JobTable, engine: AsyncEngine, statement: str, law: str
) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    assert claim.state.attempt is not None
    assert claim.state.attempt.state is AttemptState.SENT

    with pytest.raises(IntegrityError, match=law):
        async with engine.begin() as conn:
            await conn.execute(text(statement))


# ------------------------------------------------------------------------------- silent looks


async def test_a_job_whose_looks_end_in_silence_is_spared_and_then_given_up(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Started("h-1"))
    claims = 0
    for _ in range(40):
        await jobs.make_due(job_id)
        claims += len(await jobs.claim(job_id))
        if (await jobs.state(job_id)).is_terminal:
            break

    state = await jobs.state(job_id)
    assert state.failure is not None
    assert (state.status, state.failure.code) == (Status.FAILED, "poisonous")
    assert claims == jobs.policy.most_silent_looks
    (attempt,) = await jobs.attempts(job_id)
    assert (attempt.state, attempt.handle) == ("cancelled", "h-1")
    assert attempt.cancel_at is not None, "it may still run at the provider"
    assert timeless(await jobs.replayed(job_id)) == timeless(state)


async def test_one_look_with_a_word_forgives_the_silent_ones(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Started("h-1"))
    for _ in range(2):
        await jobs.make_due(job_id)
        await jobs.claim(job_id)
    assert (await jobs.state(job_id)).silent_looks == 1

    await jobs.make_due(job_id)
    (claim,) = await jobs.claim(job_id)
    await jobs.settle(claim, Progressed(0.5))

    assert (await jobs.state(job_id)).silent_looks == 0


async def test_a_job_in_a_word_of_a_newer_version_is_left_to_its_workers(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    strange, (known,) = (await jobs.submit())[0], await jobs.submit()
    await jobs.look(strange, Started("h-1"))
    async with engine.begin() as conn:
        await conn.execute(text("ALTER TABLE jobs DROP CONSTRAINT ck_jobs_stage_known"))
        await conn.execute(
            text("UPDATE jobs SET stage = 'polishing' WHERE id = :id"), {"id": strange}
        )
    await jobs.make_due(strange)

    claims = await jobs.claim(strange, known)

    assert [claim.job_id for claim in claims] == [known]
