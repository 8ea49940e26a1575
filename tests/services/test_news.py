"""News of purchases: repeated, reordered, late, from strangers; at every stage of a job."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from app.domain.errors import NotFound
from app.domain.events import (
    Generated,
    GenerationFailed,
    Intended,
    NotFound as NotListed,
    OutcomeUnknown,
    Progressed,
    Refused,
    Started,
    Stored,
)
from app.domain.generation import GenerationRequest, RefusalKind
from app.domain.policy import Policy
from app.domain.state import AttemptState, Status
from app.services import news
from app.services.job_queries import lost_attempts, unwanted
from app.services.job_records import JOBS
from app.services.ledger import Ledger
from app.services.news import ANSWER_EXPECTED, Hint, Told
from tests.support.jobs import FAILURE, JobTable, new_job, stored_output
from tests.support.waiting import wait_for_async

HOUR = timedelta(hours=1)


@pytest.fixture
def ledger(jobs: JobTable) -> Ledger:
    return Ledger(jobs.engine, Policy())


async def _running(jobs: JobTable, handle: str = "h-1") -> UUID:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Started(handle))
    return job_id


async def _sent(jobs: JobTable) -> UUID:
    """Make a job whose purchase is under way, for longer than answers usually take."""
    (job_id,) = await jobs.submit()
    await jobs.claim_one(job_id)
    await jobs.age(ANSWER_EXPECTED, job_id)
    return job_id


async def _lost(jobs: JobTable, **order: object) -> UUID:
    """Make a job whose first attempt was declared lost; it waits to buy again."""
    (job_id,) = await jobs.submit(new_job(**order))
    await jobs.look(job_id, OutcomeUnknown("timeout"))
    await jobs.age(jobs.policy.grace, job_id)
    await jobs.look(job_id, NotListed())
    assert (await jobs.attempts(job_id))[0].state == AttemptState.LOST
    return job_id


async def _somebody_waits(jobs: JobTable) -> None:
    """Return when a session waits for a lock."""

    async def is_waiting() -> bool:
        query = text(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
        async with jobs.engine.connect() as conn:
            return bool(await conn.scalar(query))

    await wait_for_async(is_waiting, within=5, what="somebody who waits for a lock")


async def _lost_twice(jobs: JobTable) -> UUID:
    job_id = await _lost(jobs)
    await jobs.look(job_id, OutcomeUnknown("timeout"))
    await jobs.age(jobs.policy.grace, job_id)
    await jobs.look(job_id, NotListed())
    return job_id


async def _cancellations(jobs: JobTable) -> list[str]:
    async with jobs.engine.connect() as conn:
        return [one.handle for one in await unwanted(conn, limit=100)]


# ------------------------------------------------------------------------ what makes a look due


async def test_news_of_the_end_makes_the_look_due(jobs: JobTable) -> None:
    job_id = await _running(jobs)
    before = await jobs.row(job_id)

    told = await jobs.hear(job_id, "h-1", is_over=True)

    row = await jobs.row(job_id)
    assert told == Told(job_id)
    assert row.due_at <= row.now < before.due_at
    assert (row.has_news, row.version) == (True, before.version)


async def test_that_it_started_is_no_news_when_the_handle_is_known(
    jobs: JobTable,
) -> None:
    job_id = await _running(jobs)
    before = await jobs.snapshot(job_id)

    assert await jobs.hear(job_id, "h-1") == Told()
    assert await jobs.snapshot(job_id) == before


async def test_who_looks_keeps_the_lease_and_the_settle_makes_the_next_look_due(
    jobs: JobTable,
) -> None:
    job_id = await _running(jobs)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    lease = (await jobs.row(job_id)).due_at

    assert await jobs.hear(job_id, "h-1", is_over=True) == Told(job_id)
    assert (await jobs.row(job_id)).due_at == lease
    outcome = await jobs.settle(claim, Progressed(0.5))

    assert outcome.next_look == timedelta(0)
    again = await jobs.claim_one(job_id)
    assert again.state.has_news
    assert not (await jobs.row(job_id)).has_news, "the look itself answers it"


async def test_a_look_without_news_waits_as_decided(jobs: JobTable) -> None:
    job_id = await _running(jobs)
    await jobs.make_due(job_id)

    outcome = await jobs.settle(await jobs.claim_one(job_id), Progressed(0.5))

    assert outcome.next_look is not None and outcome.next_look > timedelta(seconds=1)


async def test_news_ends_with_the_attempt_it_was_about(jobs: JobTable) -> None:
    job_id = await _running(jobs)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.hear(job_id, "h-1", is_over=True)

    await jobs.settle(claim, GenerationFailed(FAILURE, is_transient=True))

    row = await jobs.row(job_id)
    assert (row.status, row.has_news) == ("pending", False)
    assert row.due_at > (await jobs.events(job_id))[-1].at, "the pause is kept"


async def test_an_old_answer_does_not_put_the_news_to_rest(jobs: JobTable) -> None:
    job_id = await _running(jobs)
    await jobs.hear(job_id, "h-1", is_over=True)

    claim = await jobs.claim_one(job_id)
    outcome = await jobs.settle(claim, Progressed(0.5, is_contradicted=True))

    assert outcome.next_look is not None and outcome.next_look < timedelta(seconds=1)
    await jobs.make_due(job_id)
    assert (await jobs.claim_one(job_id)).state.has_news


@pytest.mark.parametrize("ending", ["completed", "failed", "storing"])
async def test_news_of_what_is_known_to_be_over_changes_nothing(
    jobs: JobTable, ending: str
) -> None:
    job_id = await _running(jobs)
    if ending == "failed":
        await jobs.look(job_id, GenerationFailed(FAILURE, is_transient=False))
    else:
        await jobs.look(job_id, Generated())
    if ending == "completed":
        await jobs.make_due(job_id)
        claim = await jobs.claim_one(job_id)
        await jobs.settle(claim, Stored(1), outputs=[stored_output()])
    before = await jobs.snapshot(job_id)

    for is_over in (True, False):
        assert await jobs.hear(job_id, "h-1", is_over=is_over) == Told()
    assert await jobs.snapshot(job_id) == before


async def test_the_sweep_wakes_only_what_sleeps(jobs: JobTable) -> None:
    asleep = await _running(jobs, "h-1")
    due, claimed = await _running(jobs, "h-2"), await _running(jobs, "h-3")
    await jobs.make_due(due, claimed)
    await jobs.claim_one(claimed)
    before = [await jobs.snapshot(due), await jobs.snapshot(claimed)]

    async with jobs.engine.begin() as conn:
        woken = await news.wake(conn, ["h-1", "h-2", "h-3", "h-unknown"])

    assert woken == [asleep]
    assert (await jobs.claim_one(asleep)).state.has_news
    assert [await jobs.snapshot(due), await jobs.snapshot(claimed)] == before


async def test_a_list_that_is_contradicted_does_not_hurry_the_looks(
    jobs: JobTable,
) -> None:
    job_id = await _running(jobs)

    async def sweep() -> list[UUID]:
        async with jobs.engine.begin() as conn:
            return await news.wake(conn, ["h-1"])

    assert await sweep() == [job_id]
    claim = await jobs.claim_one(job_id)
    outcome = await jobs.settle(claim, Progressed(0.5, is_contradicted=True))

    assert await sweep() == []
    assert (await jobs.row(job_id)).due_at == outcome.after.due_at


async def test_without_a_list_those_whose_look_comes_next_are_woken(
    jobs: JobTable,
) -> None:
    ids = [await _running(jobs, f"h-{n}") for n in range(3)]
    for n, job_id in enumerate(ids):
        await jobs.age(timedelta(seconds=n), job_id)

    async with jobs.engine.begin() as conn:
        assert await news.wake_next(conn, limit=2) == [ids[2], ids[1]]


# ------------------------------------------------------------------------------------ adoption


@pytest.mark.parametrize("is_over", [True, False])
async def test_an_attempt_without_a_handle_is_given_it(
    jobs: JobTable, is_over: bool
) -> None:
    job_id = await _sent(jobs)
    claim_until = (await jobs.row(job_id)).due_at

    told = await jobs.hear(job_id, "h-1", is_over=is_over)

    row = await jobs.row(job_id)
    assert told == Told(job_id, is_adoption=True)
    assert (row.stage, row.attempt_state, row.attempt_handle) == (
        *("generating", "running", "h-1"),
    )
    assert row.due_at == claim_until, "whoever buys keeps the lease"
    assert row.has_news == is_over


async def test_whoever_let_the_lease_lapse_does_not_get_it_back_by_an_adoption(
    jobs: JobTable,
) -> None:
    job_id = await _sent(jobs)
    await jobs.make_due(job_id)

    await jobs.hear(job_id, "h-1")
    assert await jobs.due() == []
    assert (await jobs.row(job_id)).claim_token is None
    await jobs.hear(job_id, "h-1", is_over=True)

    assert await jobs.due() == [job_id]


@pytest.mark.parametrize(
    "event",
    [
        Started("h-1"),
        OutcomeUnknown("timeout"),
        Refused(RefusalKind.PERMANENT, FAILURE),
        Refused(RefusalKind.THROTTLED, FAILURE),
    ],
    ids=lambda event: type(event).__name__,
)
async def test_whatever_the_overtaken_purchase_says_it_was_made_once(
    jobs: JobTable, event: Started | OutcomeUnknown | Refused
) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    await jobs.age(ANSWER_EXPECTED, job_id)
    await jobs.hear(job_id, "h-1")

    outcome = await jobs.settle(claim, event)

    row = await jobs.row(job_id)
    assert (row.stage, row.attempt_handle, row.claim_token) == (
        *("generating", "h-1", None),
    )
    assert outcome.next_look == timedelta(0)


async def test_that_it_started_is_left_to_the_answer_that_is_about_to_come(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    before = await jobs.snapshot(job_id)

    assert await jobs.hear(job_id, "h-1") == Told()
    assert await jobs.snapshot(job_id) == before
    await jobs.settle(claim, OutcomeUnknown("timeout"))
    assert await jobs.hear(job_id, "h-1") == Told(job_id, is_adoption=True)


async def test_a_reconciled_attempt_is_adopted_once_whoever_finds_it_first(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, OutcomeUnknown("timeout"))
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)

    await jobs.hear(job_id, "h-1", is_over=True)
    await jobs.settle(claim, Started("h-1", is_adopted=True))
    await jobs.hear(job_id, "h-1", is_over=False)

    (attempt,) = await jobs.attempts(job_id)
    assert (attempt.state, attempt.handle) == ("running", "h-1")
    assert len([e for e in await jobs.events(job_id) if e.name == "Heard"]) == 1


async def test_start_and_end_in_one_breath_and_in_any_order(jobs: JobTable) -> None:
    for number, order in enumerate(((False, True), (True, False))):
        job_id = await _sent(jobs)
        (attempt,) = await jobs.attempts(job_id)
        hints = [
            Hint(attempt.id, attempt.token, f"h-{number}", is_over) for is_over in order
        ]
        async with jobs.engine.begin() as conn:
            told = await news.hear(conn, hints, policy=jobs.policy)

        assert Told(job_id, is_adoption=True) in told
        assert (await jobs.row(job_id)).has_news


async def test_a_prediction_of_another_attempt_is_not_taken(jobs: JobTable) -> None:
    owner = await _running(jobs, "h-1")
    seeker = await _sent(jobs)

    assert await jobs.hear(seeker, "h-1", is_over=True) == Told()
    assert (await jobs.row(seeker)).attempt_handle is None
    assert (await jobs.row(owner)).attempt_handle == "h-1"


async def test_two_attempts_told_of_one_prediction_in_one_breath_do_not_both_get_it(
    jobs: JobTable, ledger: Ledger
) -> None:
    ids = [await _sent(jobs) for _ in range(2)]
    hints = []
    for job_id in ids:
        (attempt,) = await jobs.attempts(job_id)
        hints.append(Hint(attempt.id, attempt.token, "h-1", is_over=False))

    with pytest.raises(IntegrityError):
        async with jobs.engine.begin() as conn:
            await news.hear(conn, hints, policy=jobs.policy)
    told = [await ledger.hint(hint) for hint in hints]

    assert told == [Told(ids[0], is_adoption=True), Told()]
    assert await jobs.handles() == {"h-1"}


async def test_a_batch_of_both_kinds_locks_its_jobs_in_everybodys_order(
    jobs: JobTable,
) -> None:
    """A job whose end is heard comes before, one that is adopted after, in every order."""
    known, unknown = await _running(jobs, "h-1"), await _sent(jobs)
    hints = []
    for job_id, handle in ((known, "h-1"), (unknown, "h-2")):
        (attempt,) = await jobs.attempts(job_id)
        hints.append(Hint(attempt.id, attempt.token, handle, is_over=True))
    lock = select(JOBS.c.id).where(JOBS.c.id == known).with_for_update()

    async def hear() -> list[Told | Exception]:
        async with jobs.engine.begin() as conn:
            return await news.hear(conn, hints, policy=jobs.policy)

    async with jobs.engine.begin() as conn:
        await conn.execute(lock)
        hearing = asyncio.create_task(hear())
        await _somebody_waits(jobs)
        # Free: whoever waits for the first job holds none behind it.
        await conn.execute(
            select(JOBS.c.id).where(JOBS.c.id == unknown).with_for_update(nowait=True)
        )
    assert await hearing == [Told(known), Told(unknown, is_adoption=True)]


# ------------------------------------------------------------------------------------ strangers


async def test_only_the_attempts_own_token_counts(jobs: JobTable) -> None:
    job_id = await _sent(jobs)
    (attempt,) = await jobs.attempts(job_id)
    before = await jobs.snapshot(job_id)
    async with jobs.engine.begin() as conn:
        told = await news.hear(
            conn,
            [
                Hint(attempt.id, "guessed", "h-1", True),
                Hint(attempt.id, "", "h-1", True),
                Hint(attempt.id, attempt.token + "\udcff", "h-1", True),
                Hint(uuid4(), attempt.token, "h-1", True),
            ],
            policy=jobs.policy,
        )

    assert [type(one) for one in told] == [NotFound] * 4
    assert await jobs.snapshot(job_id) == before


async def test_a_stranger_does_not_spoil_the_others_of_a_batch(jobs: JobTable) -> None:
    job_id = await _sent(jobs)
    (attempt,) = await jobs.attempts(job_id)
    async with jobs.engine.begin() as conn:
        told = await news.hear(
            conn,
            [
                Hint(uuid4(), "x", "h-1", True),
                Hint(attempt.id, attempt.token, "h-1", True),
            ],
            policy=jobs.policy,
        )

    assert told[1] == Told(job_id, is_adoption=True)


# --------------------------------------------------------------------------------- late survivors


async def test_a_late_survivor_is_used_by_a_job_that_waits_to_buy_again(
    jobs: JobTable,
) -> None:
    job_id = await _lost(jobs)

    assert await jobs.hear(job_id, "h-1") == Told(job_id, is_adoption=True)

    (attempt,) = await jobs.attempts(job_id)
    assert (attempt.state, attempt.handle, attempt.closed_at) == (
        *("running", "h-1", None),
    )
    assert await _cancellations(jobs) == []


async def test_of_two_late_survivors_one_is_used_and_one_is_cancelled(
    jobs: JobTable,
) -> None:
    for number, (first, second) in enumerate([(1, 2), (2, 1)]):
        job_id = await _lost_twice(jobs)
        used, other = f"used-{number}", f"other-{number}"

        await jobs.hear(job_id, used, number=first)
        await jobs.hear(job_id, other, number=second)

        assert (await jobs.row(job_id)).attempt_handle == used
        assert other in await _cancellations(jobs)


async def test_of_two_late_survivors_in_one_breath_one_is_cancelled(
    jobs: JobTable,
) -> None:
    job_id = await _lost_twice(jobs)
    hints = [
        Hint(row.id, row.token, f"h-{row.number}", is_over=False)
        for row in await jobs.attempts(job_id)
    ]

    async with jobs.engine.begin() as conn:
        await news.hear(conn, hints, policy=jobs.policy)

    assert (await jobs.row(job_id)).attempt_handle == "h-1"
    assert await _cancellations(jobs) == ["h-2"]


async def test_a_late_survivor_of_a_job_that_bought_again_is_cancelled(
    jobs: JobTable,
) -> None:
    job_id = await _lost(jobs)
    await jobs.look(job_id, Started("h-2"))

    assert await jobs.hear(job_id, "h-1") == Told()

    first, second = await jobs.attempts(job_id)
    assert (first.state, first.handle) == ("lost", "h-1")
    assert (second.state, second.handle) == ("running", "h-2")
    assert await _cancellations(jobs) == ["h-1"]


async def test_a_late_survivor_of_a_finished_job_is_cancelled_unless_it_is_over(
    jobs: JobTable,
) -> None:
    for number, is_over in enumerate((False, True)):
        job_id = await _lost(jobs)
        assert (await jobs.cancel(job_id)).after.status is Status.CANCELLED
        before = await jobs.events(job_id)

        await jobs.hear(job_id, f"h-{number}", is_over=is_over)

        assert await jobs.events(job_id) == before
    assert await _cancellations(jobs) == ["h-0"]
    assert await jobs.handles() == {"h-0", "h-1"}


async def test_what_only_looks_like_it_is_not_taken_from_one_who_is_buying_it(
    jobs: JobTable,
) -> None:
    request = GenerationRequest("acme/painter", {"prompt": "an unseeded mill"})
    lost = await _lost(jobs, request=request)
    await jobs.cancel(lost)
    (buying,) = await jobs.submit(new_job(request=request))
    claim = await jobs.claim_one(buying)
    before = await jobs.snapshot(lost)

    await jobs.hear(lost, "h-1", is_certain=False)
    assert await jobs.snapshot(lost) == before
    await jobs.settle(claim, Started("h-1"))
    await jobs.hear(lost, "h-1", is_certain=False)
    assert await jobs.snapshot(lost) == before, "it has an owner"
    await jobs.hear(lost, "h-2", is_certain=False)
    assert await _cancellations(jobs) == ["h-2"]


async def test_lost_attempts_are_searched_for_while_the_provider_keeps_them(
    jobs: JobTable,
) -> None:
    young, found = await _lost(jobs), await _lost(jobs)
    old = await _lost(jobs)
    await jobs.hear(found, "h-1")
    await jobs.age(HOUR, old)

    async with jobs.engine.connect() as conn:
        lost = await lost_attempts(conn, age=jobs.policy.data_lifetime, limit=10)

    (attempt,) = await jobs.attempts(young)
    assert [(one.attempt_id, one.token) for one in lost] == [
        (attempt.id, attempt.token)
    ]


async def test_what_is_given_up_while_it_runs_is_to_be_cancelled(
    jobs: JobTable,
) -> None:
    job_id = await _running(jobs)
    await jobs.expire(job_id)
    await jobs.age(jobs.policy.last_resort, job_id)
    await jobs.make_due(job_id)

    assert await jobs.claim(job_id) == []

    assert (await jobs.state(job_id)).status is Status.FAILED
    assert await _cancellations(jobs) == ["h-1"]


async def test_the_attempt_after_a_lost_one_is_another(jobs: JobTable) -> None:
    job_id = await _lost(jobs)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)

    assert claim.state.attempt is not None
    assert (claim.state.attempt.number, claim.is_fresh) == (2, True)
    assert [e.name for e in await jobs.events(job_id)][-1] == Intended.__name__
