"""A pause under load, with workers that are killed: nothing starts, nothing is lost or rebought."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.support.stack import CRASHING_API, CRASHING_WORKER, Stack
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

Env = Callable[..., dict[str, str]]

# A short lease and a short search, as in the crash matrix.
TEST_BUILD = {
    "MEDIAGEN_TEST_LEASE": "2",
    "MEDIAGEN_TEST_RECONCILE": "0.2,0.5,1,2,3",
    "MEDIAGEN_TEST_LAST_RESORT": "1",
}
JOBS = 120


class Load:
    """Submits jobs one after the other, pause or no pause, from a thread of its own."""

    def __init__(self, url: str, count: int) -> None:
        self.ids: list[str] = []
        self.refused: list[int] = []
        self._client = httpx.Client(base_url=url, timeout=30)
        self._count = count
        self._thread = threading.Thread(target=self._run)

    @contextmanager
    def running(self) -> Iterator[Load]:
        """Run until all are submitted."""
        self._thread.start()
        yield self
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        for number in range(self._count):
            body = {"prompt": f"fox {number}"}
            answer = self._client.post("/api/v1/generate", json=body)
            if answer.status_code == 202:
                self.ids.append(answer.json()["job_id"])
            else:
                self.refused.append(answer.status_code)


def attempts(conn: psycopg.Connection[Any]) -> int:
    """Count the purchases that were intended, sent or not."""
    row = conn.execute("SELECT count(*) FROM attempts").fetchone()
    assert row is not None
    return int(row[0])


def queue(stack: Stack) -> dict[str, Any]:
    body: dict[str, Any] = stack.client.get("/api/v1/queue").json()
    return body


def workers(stack: Stack) -> set[int]:
    """Name the processes that gave a sign of life."""
    health = stack.client.get("/api/v1/health").json()
    found = health["components"]["workers"]["figures"]["workers"]
    return {int(name.rpartition(":")[2]) for name in found}


def post(stack: Stack, act: str, **body: str) -> None:
    answer = stack.client.post(f"/api/v1/queue/{act}", json=body)
    assert answer.status_code == 200, answer.text


def test_a_pause_under_load_with_workers_that_die(
    tmp_path: Path, child_env: Env, database_url: str
) -> None:
    stack = Stack(
        tmp_path,
        child_env,
        sandbox=("--speed", "10"),
        api=CRASHING_API,
        worker=CRASHING_WORKER,
        WORKER_CONCURRENCY="16",
        JOB_DEADLINE_SECONDS="60",
        **TEST_BUILD,
    )
    conn = psycopg.connect(database_url, autocommit=True)
    with stack, conn, Load(stack.url, JOBS).running() as load:
        second = stack.another_worker()
        second.start()
        wait_for(
            lambda: stack.purchases()["purchases"] >= 15,
            within=60,
            what="some purchases",
        )

        post(stack, "pause", reason="a test")
        intended = attempts(conn)  # whatever is sent by now goes on
        stack.worker.kill()
        wait_for(lambda: len(load.ids) == JOBS, within=60, what="all are accepted")
        wait_for(
            lambda: queue(stack)["in_flight"] == 0,
            within=60,
            what="what was under way has come to an end",
        )
        second.kill()
        for program in (stack.worker, second):
            program.start()
        wait_for(
            lambda: workers(stack) >= {stack.worker.pid, second.pid},
            within=60,
            what="both workers are back",
        )
        last = stack.submit(prompt="a fox that came late")
        assert stack.job(last, wait=3)["status"] == "pending"

        assert attempts(conn) == intended
        assert stack.purchases()["purchases"] <= intended
        held = queue(stack)
        assert held["state"] == "paused"
        # Where nobody knows of a purchase, its attempt is lost, and the job waits again.
        assert held["pending"] >= JOBS + 1 - intended > 0
        ids = [*load.ids, last]
        statuses = {job["status"] for job in stack.jobs(ids)}
        assert statuses == {"pending", "completed"}

        post(stack, "resume")
        jobs = stack.finish(ids, within=120)
        bought = stack.purchases()

    assert load.refused == []
    assert Counter(job["status"] for job in jobs) == {"completed": JOBS + 1}
    assert (bought["purchases"], bought["purchases_repeated"]) == (JOBS + 1, 0)
