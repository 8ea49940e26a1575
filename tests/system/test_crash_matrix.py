"""The table of crashes, row by row: who dies where, what is left, who repairs it, at what cost.

Each test ends a real process between two statements (`app.core.crashpoints`), looks at the
rows it left, starts what an operator would start, and counts what the provider sold.  The
processes are the test build (tests/support/crashing_build.py): the same code with a short
lease and a short grace, for two minutes of waiting for a lost purchase are too long here.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import namedtuple_row

from app.services.media_store import is_key
from tests.support.stack import CRASHING_API, CRASHING_WORKER, FINISHED, Program, Stack
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

Env = Callable[..., dict[str, str]]

LEASE = 2.0
TEST_BUILD = {
    "MEDIAGEN_TEST_LEASE": str(LEASE),
    "MEDIAGEN_TEST_RECONCILE": "0.2,0.5,1,2,3",
    "MEDIAGEN_TEST_LAST_RESORT": "1",
    "RETRY_BACKOFF_BASE": "1",
}
BUSY = 1.5  # seconds a shared machine may add to a promise
PATIENCE = 60  # seconds until something is said never to happen


@dataclass(frozen=True, slots=True)
class Left:
    """The rows of a job as they are, read past the service."""

    id: str
    status: str
    stage: str | None
    is_claimed: bool
    is_due: bool
    error: str | None
    attempts: list[tuple[str, str | None]]
    events: list[str]
    outputs: int


@dataclass(frozen=True, slots=True)
class Bench:
    """A stack whose processes can be told where to die, and a view of its tables."""

    stack: Stack
    rows: psycopg.Connection[Any] = field(repr=False)

    def left(self) -> Left:
        """Read the one job there is."""
        job = self.rows.execute(
            "SELECT id, status, stage, claim_token IS NOT NULL AS is_claimed,"
            " due_at <= now() AS is_due, error_code FROM jobs"
        ).fetchone()
        assert job is not None
        attempts = self.rows.execute(
            "SELECT state, handle FROM attempts ORDER BY number"
        ).fetchall()
        events = self.rows.execute("SELECT name FROM job_events ORDER BY version")
        assets = self.rows.execute("SELECT 1 FROM assets").fetchall()
        return Left(
            str(job.id),
            job.status,
            job.stage,
            job.is_claimed,
            bool(job.is_due),
            job.error_code,
            [(one.state, one.handle) for one in attempts],
            [one.name for one in events],
            len(assets),
        )

    def crash(self, program: Program, code: int = -signal.SIGKILL) -> Left:
        """Wait until the armed process has died, and read what it left behind."""
        assert program.wait(PATIENCE) == code
        program.set(MEDIAGEN_CRASH_AT="")
        return self.left()

    def seconds_until(self, event: str, since: str) -> float:
        """Say how long after a moment of the database's clock the event was recorded."""
        found = self.rows.execute(
            "SELECT extract(epoch FROM at - %s::timestamptz) AS seconds"
            " FROM job_events WHERE name = %s ORDER BY version LIMIT 1",
            [since, event],
        ).fetchone()
        assert found is not None
        return float(found.seconds)

    def clock(self) -> str:
        """Read the database's clock."""
        now = self.rows.execute("SELECT now()::text AS now").fetchone()
        assert now is not None
        return str(now.now)

    def finish(self, within: float = PATIENCE) -> Left:
        """Wait until the job is finished."""

        def finished() -> Left | None:
            left = self.left()
            return left if left.status in FINISHED else None

        return wait_for(finished, within=within, what="the job is finished", every=0.05)

    def bought(self) -> list[str]:
        """Name every prediction the provider ever made, oldest first."""
        return self.stack.predictions()

    def check_completed(self, handles: list[str]) -> None:
        """See that the picture is there and that these and no others were bought for it."""
        job = self.stack.job(self.left().id)
        assert job["status"] == "completed", job["error"]
        assert len(job["outputs"]) == 1
        self.stack.check_files(job)
        assert self.bought() == handles


@pytest.fixture
def bench(tmp_path: Path, child_env: Env, database_url: str) -> Callable[..., Any]:
    """Start a stack with processes armed: `with bench(worker="purchase.made") as b`."""

    @contextmanager
    def start(*, api: str = "", worker: str = "", **settings: str) -> Iterator[Bench]:
        stack = Stack(
            tmp_path,
            child_env,
            sandbox=("--speed", "10"),
            api=CRASHING_API,
            worker=CRASHING_WORKER,
            **TEST_BUILD,
            **settings,
        )
        stack.api.set(MEDIAGEN_CRASH_AT=api)
        stack.worker.set(MEDIAGEN_CRASH_AT=worker)
        rows = psycopg.connect(
            database_url, autocommit=True, row_factory=namedtuple_row
        )
        with rows, stack:
            yield Bench(stack, rows)

    return start


def test_an_api_dies_after_the_commit_and_before_the_bell(
    bench: Callable[..., Any],
) -> None:
    with bench(api="submit.committed") as b:
        b.stack.worker.freeze()
        with pytest.raises(httpx.TransportError):
            b.stack.submit(prompt="a fox")
        left = b.crash(b.stack.api)
        assert (left.status, left.stage) == ("pending", "queued")
        assert (left.is_due, left.is_claimed, left.attempts) == (True, False, [])

        began = b.clock()
        b.stack.worker.thaw()
        done = b.finish()

        assert b.seconds_until("Intended", since=began) < 1 + BUSY
        b.stack.api.start()
        b.stack.wait_until_ready()
        b.check_completed([handle for _, handle in done.attempts])
        assert len(done.attempts) == 1


def test_a_worker_dies_after_the_claim_and_before_the_purchase(
    bench: Callable[..., Any],
) -> None:
    """Nobody can know that nothing was bought: a grace period is what it costs."""
    with bench(worker="purchase.intended") as b:
        b.stack.submit(prompt="an owl")
        left = b.crash(b.stack.worker)
        assert (left.status, left.stage) == ("processing", "submitting")
        assert (left.is_claimed, left.attempts) == (True, [("sent", None)])
        assert b.bought() == []

        b.stack.worker.start()
        done = b.finish()

        assert [state for state, _ in done.attempts] == ["lost", "succeeded"]
        assert done.events[1:5] == [
            "Intended",
            "OutcomeUnknown",
            "NotFound",
            "Intended",
        ]
        b.check_completed([done.attempts[1][1]])


def test_a_worker_dies_after_the_purchase_and_before_the_handle_is_saved(
    bench: Callable[..., Any],
) -> None:
    with bench(worker="purchase.made") as b:
        b.stack.submit(prompt="a heron")
        left = b.crash(b.stack.worker)
        assert (left.status, left.stage) == ("processing", "submitting")
        assert (left.is_claimed, left.attempts) == (True, [("sent", None)])
        (handle,) = b.bought()

        b.stack.worker.start()
        done = b.finish()

        assert done.attempts == [("succeeded", handle)]
        b.check_completed([handle])


def test_a_worker_dies_after_the_handle_is_saved(bench: Callable[..., Any]) -> None:
    with bench(worker="purchase.saved") as b:
        b.stack.submit(prompt="a crane")
        left = b.crash(b.stack.worker)
        (handle,) = b.bought()
        assert (left.status, left.stage) == ("processing", "generating")
        assert (left.is_claimed, left.attempts) == (False, [("running", handle)])

        b.stack.worker.start()
        done = b.finish()

        assert done.attempts == [("succeeded", handle)]
        assert "OutcomeUnknown" not in done.events
        b.check_completed([handle])


def test_a_worker_dies_while_the_picture_is_fetched(bench: Callable[..., Any]) -> None:
    with bench(worker="picture.generated") as b:
        # A fetch that takes longer than half a second is told of.
        slow = {"fault": "download.slow", "params": {"bytes_per_second": 2048}}
        b.stack.trouble(slow)
        b.stack.submit(prompt="a stork")
        left = b.crash(b.stack.worker)
        b.stack.heal()
        (handle,) = b.bought()
        assert (left.status, left.stage) == ("processing", "storing")
        assert (left.outputs, left.attempts) == (0, [("succeeded", handle)])

        b.stack.worker.start()
        b.finish()

        b.check_completed([handle])


def test_a_worker_dies_after_the_file_is_stored_and_before_the_row(
    bench: Callable[..., Any],
) -> None:
    with bench(worker="output.stored") as b:
        b.stack.submit(prompt="a wren")
        left = b.crash(b.stack.worker)
        (handle,) = b.bought()
        assert (left.status, left.is_claimed, left.outputs) == ("processing", True, 0)
        (file,) = stored_files(b.stack.media)
        before = file.stat()

        b.stack.worker.start()
        b.finish()

        b.check_completed([handle])
        assert stored_files(b.stack.media) == [file]
        after = file.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def stored_files(media: Path) -> list[Path]:
    found = [path for path in media.rglob("*") if path.is_file()]
    return [path for path in found if is_key(str(path.relative_to(media)))]


def test_a_worker_dies_after_the_job_is_finished(bench: Callable[..., Any]) -> None:
    with bench(worker="job.settled") as b:
        b.stack.submit(prompt="a seal")
        left = b.crash(b.stack.worker)

        assert (left.status, left.is_claimed, left.outputs) == ("completed", False, 1)
        b.check_completed([handle for _, handle in left.attempts])


def test_a_slow_worker_wakes_up_after_its_lease(bench: Callable[..., Any]) -> None:
    """It bought, and fell asleep with the answer in its hands; somebody else finished."""
    with bench(worker="purchase.made=stop") as b:
        b.stack.submit(prompt="a hare")
        slow = b.stack.worker
        wait_for(slow.is_frozen, within=PATIENCE, what="the worker sleeps")
        (handle,) = b.bought()
        # Nothing was written by it; the provider's webhook may have told already.
        assert b.left().attempts in ([("sent", None)], [("running", handle)])

        second = b.stack.another_worker()
        second.set(MEDIAGEN_CRASH_AT="")
        second.start()
        wait_for(
            lambda: "worker.ready" in second.said(), within=PATIENCE, what="the second"
        )
        # It led; PostgreSQL ends the session of a leader that falls silent.
        done = b.finish()
        slow.thaw()
        # By the token, at its settle or already when it renews its lease.
        wait_for(
            lambda: {"claim.lost", "look.abandoned"} & set(slow.said().split('"')),
            within=PATIENCE,
            what="it gives way",
        )

        assert done.attempts == [("succeeded", handle)]
        assert b.left() == done
        b.check_completed([handle])


def test_a_job_that_kills_every_worker_ends_with_its_deadline(
    bench: Callable[..., Any],
) -> None:
    with bench(worker="look.begun:each", JOB_DEADLINE_SECONDS="10") as b:
        began = b.clock()
        b.stack.submit(prompt="a poisoned apple")
        deaths = []

        def ended() -> bool:
            if b.stack.worker.has_ended():
                deaths.append(b.clock())
                b.stack.worker.start()
            return b.left().status in FINISHED

        wait_for(ended, within=60, what="the job is finished", every=0.05)
        done = b.left()

        assert len(deaths) >= 2
        assert (done.status, done.error) == ("failed", "deadline_exceeded")
        assert [state for state, _ in done.attempts] == ["lost"]
        # The deadline, the last resort, and somebody who has to come and look.
        assert 11 <= b.seconds_until("Expired", since=began) < 11 + LEASE + 3 + BUSY
        assert b.bought() == []
