"""Processes are replaced while people work: nobody notices, nothing is lost or waits."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
import redis

from app.core import counters, heartbeat
from app.core.queue import QUEUE_NAME, publisher_app
from app.runtime import ADVANCE_TASK
from tests.support.load import Load
from tests.support.stack import Program, Stack
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

Env = Callable[..., dict[str, str]]

DRAINED = 25  # seconds a worker may take, below the 30 that platforms give
HANDOVER = 2.0
SURELY_HEARD = 1.0  # seconds: whoever waited longer had not been overlooked

# Looks that are still under way when the signal comes: buying, watching, downloading.
SLOW_LOOKS: Sequence[Mapping[str, Any]] = (
    {"fault": "create.slow_after", "probability": 0.3, "params": {"seconds": 2}},
    {"fault": "get.slow", "probability": 0.2, "params": {"seconds": 1.5}},
    {
        "fault": "download.slow",
        "probability": 0.3,
        "params": {"bytes_per_second": 4096},
    },
)
FOR_EVER: Mapping[str, Any] = {
    "fault": "prediction.stuck_processing",
    "match": {"prompt_contains": "for ever"},
}


def is_ready(origin: str) -> bool:
    try:
        return httpx.get(f"{origin}/api/v1/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_until_ready(origin: str) -> None:
    wait_for(lambda: is_ready(origin), within=40, what=f"{origin} is ready", every=0.1)


def wait_for_calls(load: Load, count: int) -> None:
    """Wait until the callers got so many answers more."""
    before = len(load.calls)
    wait_for(lambda: len(load.calls) >= before + count, within=30, what="the load runs")


def check_answers(
    load: Load, apis: Sequence[Program], database_url: str, *others: str
) -> None:
    """See that whoever was heard was answered, and that what was accepted was told."""
    codes = Counter(call.status for call in load.calls)
    assert set(codes) <= {200, 202, None}, codes
    said = "".join(api.said() for api in apis)
    heard = [
        call
        for call in load.broken
        if call.request_id in said or call.seconds > SURELY_HEARD
    ]
    assert not heard, heard
    assert "Cancel" not in said, "a request was cut off"
    with psycopg.connect(database_url) as conn:
        kept = conn.execute("SELECT id::text FROM jobs").fetchall()
    assert sorted(id for (id,) in kept) == sorted([*load.accepted, *others])


def check_jobs(
    stack: Stack, jobs: Sequence[Mapping[str, Any]], *, others: int = 0
) -> None:
    """See that each job completed, whole, with one purchase, and none waited for a lease."""
    assert Counter(job["status"] for job in jobs) == {"completed": len(jobs)}
    assert Counter(job["attempts"] for job in jobs) == {1: len(jobs)}
    bought = stack.purchases()
    assert bought["purchases"] == len(jobs) + others
    assert bought["purchases_repeated"] == 0
    for job in jobs[:: max(len(jobs) // 10, 1)]:
        stack.check_files(job)


# --------------------------------------------------------------------------------- the API


@contextmanager
def waiting(
    stack: Stack, job_id: str, count: int
) -> Iterator[list[http.client.HTTPConnection]]:
    """Open so many long-polls; the API waits with all of them when this returns."""
    address = urlsplit(stack.url).netloc
    polls = [http.client.HTTPConnection(address, timeout=30) for _ in range(count)]
    for poll in polls:
        poll.request("GET", f"/api/v1/status/{job_id}?wait=60")
    # A connection of its own: those that came before it have been taken before, and read.
    httpx.get(f"{stack.url}/api/v1/status/{job_id}").raise_for_status()
    yield polls
    for poll in polls:
        poll.close()


def test_an_api_asked_to_stop_answers_everybody_and_ends(
    tmp_path: Path, child_env: Env
) -> None:
    stack = Stack(tmp_path, child_env)
    body = json.dumps({"prompt": "half of me is on the way"}).encode()
    try:
        stack.sandbox.start()
        stack.api.start()
        wait_until_ready(stack.url)
        job_id = stack.submit(prompt="nobody makes me")
        upload = http.client.HTTPConnection(urlsplit(stack.url).netloc, timeout=30)
        upload.putrequest("POST", "/api/v1/generate")
        upload.putheader("Content-Length", str(len(body)))
        upload.endheaders(body[:10])
        with waiting(stack, job_id, 10) as polls:
            began = time.monotonic()
            stack.api.send(signal.SIGTERM)
            answers = [poll.getresponse() for poll in polls]
            took = time.monotonic() - began
            assert {answer.status for answer in answers} == {200}
            assert {answer.getheader("connection") for answer in answers} == {"close"}
            assert {json.load(answer)["status"] for answer in answers} == {"pending"}
        wait_for(lambda: not is_ready(stack.url), within=5, what="the door is closed")
        upload.send(body[10:])
        answer = upload.getresponse()
        accepted = json.load(answer)
        assert answer.status == 202
        stack.api.wait(5)
        stack.api.start()
        wait_until_ready(stack.url)
        assert stack.job(accepted["job_id"])["status"] == "pending"
    finally:
        stack.__exit__()
    assert took < 15  # of the 60 they had asked for


def test_apis_are_replaced_one_by_one_and_no_caller_notices(
    tmp_path: Path, child_env: Env, database_url: str
) -> None:
    with Stack(tmp_path, child_env, sandbox=("--speed", "10")) as stack:
        other, other_url = stack.another_api()
        other.start()
        wait_until_ready(other_url)
        apis = {stack.url: stack.api, other_url: other}
        stack.trouble(FOR_EVER)
        watched = stack.submit(prompt="for ever")
        with Load(*apis, watched=watched) as load:
            for origin, api in apis.items():
                wait_for_calls(load, 40)
                api.end(signal.SIGTERM, within=5)
                wait_for_calls(load, 20)
                api.start()
                wait_until_ready(origin)
            wait_for_calls(load, 40)
            stack.client.post(f"/api/v1/jobs/{watched}/cancel").raise_for_status()
        check_answers(load, list(apis.values()), database_url, watched)
        check_jobs(stack, stack.finish(load.accepted, within=40), others=1)


# ------------------------------------------------------------------------------- the worker


def leads(worker: Program) -> int:
    """How often the worker took over the watch."""
    return worker.said().count('"watcher.leads"')


def replace(old: Program, new: Program, *numbers: signal.Signals) -> None:
    """Start the new worker, then ask the old one to stop, once or more often."""
    ready, led = new.said().count('"worker.ready"'), leads(new)
    new.start()
    wait_for(
        lambda: new.said().count('"worker.ready"') > ready, within=30, what="a worker"
    )
    for number in numbers:
        old.send(number)
    wait_for(lambda: leads(new) > led, within=HANDOVER, what="the watch is taken over")
    assert old.wait(DRAINED) == 0, old.said()
    assert '"cut_off":0' in old.said()


def test_workers_are_replaced_with_jobs_in_hand(
    tmp_path: Path, child_env: Env, database_url: str
) -> None:
    with Stack(tmp_path, child_env, sandbox=("--speed", "3")) as stack:
        first, second, third = (
            stack.worker,
            stack.another_worker(),
            stack.another_worker(),
        )
        stack.trouble(*SLOW_LOOKS)
        with Load(stack.url) as load:
            wait_for_calls(load, 40)
            replace(first, second, signal.SIGTERM)
            wait_for_calls(load, 40)
            replace(second, third, signal.SIGTERM, signal.SIGTERM)
            wait_for_calls(load, 40)
            replace(third, first, signal.SIGINT)
            wait_for_calls(load, 20)
        check_answers(load, [stack.api], database_url)
        check_jobs(stack, stack.finish(load.accepted, within=40))
        said = "".join(worker.said() for worker in (first, second, third))
    assert "engine.draining" in said, "no look was under way: the test shows nothing"
    for event in ("job.lease_expired", "claim.lost", "cut_short"):
        assert event not in said


def test_a_worker_asked_to_stop_while_it_starts_ends(
    tmp_path: Path, child_env: Env
) -> None:
    worker = Stack(tmp_path, child_env).worker
    try:
        worker.start()
        wait_for(
            lambda: ADVANCE_TASK in worker.said(),
            within=30,
            what="the banner, after which signals are handled",
            every=0.005,
        )
        assert "worker.ready" not in worker.said(), "too late to show anything"
        assert worker.end(signal.SIGTERM, within=10) == 0, worker.said()
    finally:
        worker.kill()


def elsewhere(url: str, port: int) -> str:
    """Give the address behind which a proxy stands."""
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{login}@127.0.0.1:{port}").geturl()


async def test_a_silent_broker_or_database_keeps_nobody_from_ending(
    tmp_path: Path, child_env: Env, database_url: str, redis_url: str
) -> None:
    tables, broker = urlsplit(database_url), urlsplit(redis_url)
    async with (
        TcpProxy(str(tables.hostname), tables.port or 0) as to_tables,
        TcpProxy(str(broker.hostname), broker.port or 0) as to_broker,
    ):
        stack = Stack(
            tmp_path,
            child_env,
            DATABASE_URL=elsewhere(database_url, to_tables.port),
            REDIS_URL=elsewhere(redis_url, to_broker.port),
        )
        starting = stack.another_worker()
        try:
            await asyncio.to_thread(stack.__enter__)
            await to_broker.fall_silent()
            starting.start()
            await asyncio.to_thread(
                wait_for,
                lambda: '"worker.ready"' in starting.said(),
                within=30,
                what="a worker that finds no broker",
            )
            ended = await asyncio.gather(
                *(
                    asyncio.to_thread(worker.end, signal.SIGTERM, 12)
                    for worker in (stack.worker, starting)
                )
            )
            assert ended == [0, 0], stack.worker.said() + starting.said()
            await to_tables.fall_silent()
            await asyncio.to_thread(stack.api.end, signal.SIGTERM, 8)
        finally:
            await asyncio.to_thread(stack.__exit__)


# ---------------------------------------------------------------------- versions side by side

# What the next version may do to the tables, and what its processes may leave behind.
NEWER = """
ALTER TABLE jobs ADD COLUMN tenant text, ADD COLUMN mood text NOT NULL DEFAULT 'calm';
ALTER TABLE attempts ADD COLUMN region text NOT NULL DEFAULT 'north';
ALTER TABLE assets ADD COLUMN colours jsonb NOT NULL DEFAULT '[]';
ALTER TABLE job_events ADD COLUMN actor text;
CREATE TABLE tenants (id text PRIMARY KEY);
CREATE INDEX ix_jobs_tenant ON jobs (tenant);
UPDATE alembic_version SET version_num = 'the_next_one';
INSERT INTO job_events (job_id, version, name, status, stage, data, at)
SELECT id, version + 1000, 'Admired', status, stage, '{"by": "everybody"}', now() FROM jobs;
"""


def leave_traces(redis_url: str) -> None:
    """Do in Redis what processes of the next version may do."""
    with redis.Redis.from_url(redis_url) as broker:
        beat = {"in_flight": "3", "version": "2", "mood": "calm"}
        broker.hset(f"{heartbeat.PREFIX}next:1", mapping=beat)
        broker.hincrby(counters.KEY, "c\x1fsmiles\x1fface=round", 2)
        broker.hincrby(counters.KEY, "h99\x1fjob_phase_seconds\x1fphase=polish", 1)
        broker.hset(counters.KEY, "z\x1fwords", "not a number")
    with publisher_app(redis_url) as app:
        app.send_task(ADVANCE_TASK, args=["no-uuid", 7, None], kwargs={"why": "news"})
        app.send_task("mediagen.polish_job", args=["anything"])


def test_the_version_before_works_on_while_the_next_one_moves_in(
    tmp_path: Path, child_env: Env, database_url: str, redis_url: str
) -> None:
    """Migrated under running processes, whose statements are prepared and known by heart."""
    with Stack(tmp_path, child_env, sandbox=("--speed", "3")) as stack:
        with Load(stack.url) as load:
            wait_for_calls(load, 40)
            with psycopg.connect(database_url) as conn:
                conn.execute("SET lock_timeout = '3s'")
                conn.execute(NEWER)
            leave_traces(redis_url)
            wait_for_calls(load, 40)
        check_answers(load, [stack.api], database_url)
        check_jobs(stack, stack.finish(load.accepted, within=40))
        assert is_ready(stack.url)
        health = stack.client.get("/api/v1/health").json()
        assert health["status"] == "ok"
        assert "next:1" in health["components"]["workers"]["figures"]["workers"]
        assert stack.client.get("/metrics").status_code == 200
        with redis.Redis.from_url(redis_url) as broker:
            assert broker.llen(QUEUE_NAME) == 0, "a bell nobody understood stays"
        assert not stack.worker.has_ended()
        assert "crashed" not in stack.worker.said() + stack.api.said()
