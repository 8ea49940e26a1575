"""The claim protocol under attack, in a model of the table and on the real one.

Bells are lost, repeated and late; workers die and fall asleep anywhere; answers of the provider
get lost.  Whatever happens, in the end every job is finished and nothing was bought twice.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr

from app.core.database import open_engine
from app.domain import generation
from app.domain.errors import LostClaim
from app.domain.policy import Policy, RetryPolicy
from app.domain.state import AttemptState, Status
from app.services.job_records import Claim
from tests.support.jobs import JobTable, timeless
from tests.support.simulation import (
    ModelTable,
    PostgresTable,
    SimulatedProvider,
    Table,
    look,
)

POLICY = Policy(retry=RetryPolicy(max_retries=2))
DEADLINES = st.sampled_from([timedelta(seconds=60), timedelta(minutes=15)])
MAY_BE_BOUGHT_AGAIN = (
    *(AttemptState.FAILED, AttemptState.LOST, AttemptState.CANCELLED),
)
ENDINGS = st.sampled_from(
    [
        *((generation.Phase.SUCCEEDED, False), (generation.Phase.FAILED, False)),
        *((generation.Phase.FAILED, True), (generation.Phase.ABORTED, False)),
        (generation.Phase.CANCELLED, False),
    ]
)


class ClaimProtocol(RuleBasedStateMachine):
    """Several workers, a watcher, a provider and an impatient caller."""

    def make_table(self, deadline: timedelta) -> Table:
        return ModelTable(POLICY, deadline)

    @initialize(deadline=DEADLINES, jobs=st.integers(1, 3))
    def begin(self, deadline: timedelta, jobs: int) -> None:
        self.table = self.make_table(deadline)
        self.provider = SimulatedProvider()
        self.jobs = [self.table.submit() for _ in range(jobs)]
        self.looks: list[tuple[Claim, Iterator[str]]] = []
        self.asked_to_cancel: set[UUID] = set()
        self.is_paused = False

    # -- what happens --------------------------------------------------------------------

    @precondition(lambda self: len(self.jobs) < 4)
    @rule()
    def a_job_is_submitted(self) -> None:
        self.jobs.append(self.table.submit())

    @rule(data=st.data(), starts=st.integers(0, 3))
    def a_bell_rings(self, data: st.DataObject, starts: int) -> None:
        some = st.lists(st.sampled_from(self.jobs), min_size=1, max_size=3)
        self.claim(data.draw(some), starts)

    @rule()
    def the_watcher_sweeps(self) -> None:
        self.claim(self.table.due(), 10)

    @precondition(lambda self: self.looks)
    @rule(data=st.data())
    def a_look_goes_on(self, data: st.DataObject) -> None:
        self.go_on(data.draw(st.integers(0, len(self.looks) - 1)))

    @precondition(lambda self: self.looks)
    @rule(data=st.data())
    def a_look_runs_to_its_end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.looks) - 1))
        while self.go_on(index):
            pass

    @precondition(lambda self: self.looks)
    @rule(data=st.data())
    def a_worker_dies(self, data: st.DataObject) -> None:
        self.looks.pop(data.draw(st.integers(0, len(self.looks) - 1)))

    @precondition(lambda self: self.looks)
    @rule(data=st.data())
    def a_lease_is_renewed(self, data: st.DataObject) -> None:
        claim, _ = data.draw(st.sampled_from(self.looks))
        before = self.table.snapshot(claim.job_id)
        if not self.table.renew(claim):
            assert self.table.snapshot(claim.job_id) == before

    @rule(seconds=st.sampled_from([0.6, 2, 11, 31, 121, 901, 3600]))
    def time_passes(self, seconds: float) -> None:
        self.table.pass_time(timedelta(seconds=seconds))

    @rule(data=st.data())
    def somebody_cancels(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.jobs))
        self.asked_to_cancel.add(job_id)
        self.table.cancel(job_id)

    @rule(pauses=st.booleans())
    def somebody_pauses_or_resumes(self, pauses: bool) -> None:
        """Twice in a row as well."""
        self.is_paused = pauses
        if pauses:
            self.table.pause()
        else:
            self.table.resume()

    @rule(
        fate=st.sampled_from(SimulatedProvider.FATES),
        lag=st.sampled_from([0, 0, 5, 100, 300]),
    )
    def the_next_request_meets(self, fate: str, lag: int) -> None:
        self.provider.fate, self.provider.lag = fate, timedelta(seconds=lag)

    @precondition(lambda self: self.provider.purchases)
    @rule(data=st.data(), ending=ENDINGS)
    def a_prediction_ends(
        self, data: st.DataObject, ending: tuple[generation.Phase, bool]
    ) -> None:
        purchase = data.draw(st.sampled_from(self.provider.purchases))
        self.provider.end(purchase, ending[0], is_transient=ending[1])

    @precondition(lambda self: self.provider.purchases)
    @rule(data=st.data())
    def a_webhook_arrives(self, data: st.DataObject) -> None:
        """At any time, in any order, as often as it likes, true or a moment old."""
        purchase = data.draw(st.sampled_from(self.provider.purchases))
        self.table.hear(purchase, purchase.phase.is_over and data.draw(st.booleans()))

    # -- how -----------------------------------------------------------------------------

    def claim(self, job_ids: list[UUID], starts: int) -> None:
        waiting = {one for one in self.jobs if self.is_pending(one)}
        claims = self.table.claim(job_ids, starts)
        if self.is_paused:
            assert not any(claim.is_fresh for claim in claims), "started while paused"
            assert all(map(self.is_pending, waiting)), "ended while paused"
        for claim in claims:
            assert claim.token not in {other.token for other, _ in self.looks}
            self.looks.append((claim, look(claim, self.table, self.provider)))

    def is_pending(self, job_id: UUID) -> bool:
        return self.table.state(job_id).status is Status.PENDING

    def go_on(self, index: int) -> bool:
        """Take one step of a look; a look that lost its claim must change nothing."""
        claim, steps = self.looks[index]
        before = self.table.snapshot(claim.job_id)
        try:
            next(steps)
        except StopIteration:
            self.looks.pop(index)
            assert not self.table.renew(claim), "a settled claim still stands"
            return False
        except LostClaim:
            self.looks.pop(index)
            assert self.table.snapshot(claim.job_id) == before
            return False
        return True

    # -- in the end ----------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "table"):
            return
        self.let_the_sleepers_wake()
        self.somebody_pauses_or_resumes(pauses=False)
        self.run_to_quiescence()
        for job_id in self.jobs:
            self.check(job_id)

    def let_the_sleepers_wake(self) -> None:
        while self.looks:
            self.go_on(0)

    def run_to_quiescence(self) -> None:
        """Heal everything; let the watcher work until nothing is left to do."""
        self.provider.fate, self.provider.lag = "created", timedelta(0)
        for _ in range(400):
            for purchase in self.provider.purchases:
                self.provider.end(
                    purchase, generation.Phase.SUCCEEDED, is_transient=False
                )
            self.the_watcher_sweeps()
            self.let_the_sleepers_wake()
            moment = self.table.next_due()
            if moment is None:
                return
            wait = moment - self.table.now() + timedelta(milliseconds=1)
            self.table.pass_time(max(wait, timedelta(0)))
        raise AssertionError("some job never ends")

    def check(self, job_id: UUID) -> None:
        """Hold one finished job against the laws."""
        state, attempts = self.table.state(job_id), self.table.attempts(job_id)
        assert state.is_terminal
        assert (state.due_at, state.stage, state.is_claimed) == (None, None, False)
        assert [attempt.number for attempt in attempts] == [
            *range(1, state.attempts + 1)
        ]
        assert len(attempts) <= POLICY.retry.max_retries + 1
        assert not any(attempt.state.is_open for attempt in attempts)
        assert timeless(self.table.replayed(job_id)) == timeless(state)
        if state.status is Status.CANCELLED:
            assert job_id in self.asked_to_cancel

        bought = [p for p in self.provider.purchases if p.job_id == job_id]
        by_attempt = Counter(purchase.attempt for purchase in bought)
        assert all(count == 1 for count in by_attempt.values()), "bought twice"
        ended = {a.number for a in attempts if a.state in MAY_BE_BOUGHT_AGAIN}
        assert len(by_attempt.keys() - ended) <= 1, "bought twice"
        refused = {a.number for a in attempts if a.state is AttemptState.REFUSED}
        assert not by_attempt.keys() & refused, "bought what was refused"


ClaimProtocol.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
test_the_claim_protocol_in_a_model_of_the_table = ClaimProtocol.TestCase


def test_the_claim_protocol_on_the_real_table(database_url: str) -> None:
    engine = open_engine(SecretStr(database_url), name="test", pool_size=1)
    with asyncio.Runner() as runner:
        jobs = JobTable(engine, POLICY)

        class OnPostgres(ClaimProtocol):
            def make_table(self, deadline: timedelta) -> Table:
                runner.run(jobs.wipe())
                runner.run(jobs.resume())
                return PostgresTable(jobs, runner, deadline)

        try:
            run_state_machine_as_test(
                OnPostgres,
                settings=settings(
                    max_examples=12,
                    stateful_step_count=25,
                    # Looking for the smallest failure would take minutes here.
                    phases=[Phase.explicit, Phase.reuse, Phase.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(engine.dispose())


@pytest.mark.parametrize("table", ["model", "postgres"])
def test_a_lost_answer_is_adopted_and_not_bought_again(
    table: str, database_url: str
) -> None:
    engine = open_engine(SecretStr(database_url), name="test", pool_size=1)
    deadline = timedelta(minutes=15)
    with asyncio.Runner() as runner:
        machine = ClaimProtocol()
        machine.make_table = lambda deadline: (  # type: ignore[method-assign]
            ModelTable(POLICY, deadline)
            if table == "model"
            else PostgresTable(JobTable(engine, POLICY), runner, deadline)
        )
        machine.begin(deadline=deadline, jobs=1)
        machine.the_next_request_meets(fate="answer_lost", lag=5)
        machine.the_watcher_sweeps()
        machine.let_the_sleepers_wake()
        machine.teardown()

        assert len(machine.provider.purchases) == 1
        assert machine.table.state(machine.jobs[0]).status is Status.COMPLETED
        runner.run(engine.dispose())
