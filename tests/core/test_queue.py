import json
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import structlog

from app.core.queue import (
    PACE,
    QUEUE_NAME,
    RINGS_IN_A_MESSAGE,
    WAITING_RINGS,
    Bell,
    publisher_app,
)
from app.embedded import Valkey
from tests.support.waiting import wait_for

TASK = "app.tasks.look"
CLOSED = "redis://127.0.0.1:9/0"


def _messages(url: str) -> list[list[str]]:
    """Read whom each waiting message asks to look at, oldest message first."""
    with redis.Redis.from_url(url) as client:
        messages = [json.loads(raw) for raw in client.lrange(QUEUE_NAME, 0, -1)]
    assert {message["headers"]["task"] for message in messages} <= {TASK}
    return [list(json.loads(b64decode(m["body"]))[0]) for m in reversed(messages)]


def _rings(url: str) -> list[str]:
    """Read whom all waiting messages ask to look at, oldest first."""
    return [subject for some in _messages(url) for subject in some]


@pytest.fixture
def bell(redis_url: str) -> Iterator[Bell]:
    app = publisher_app(redis_url)
    bell = Bell(app, TASK)
    bell.start()
    yield bell
    bell.stop()
    app.close()


def test_a_ring_reaches_the_queue(bell: Bell, redis_url: str) -> None:
    bell.ring("job-1")
    bell.ring("job-2")

    wait_for(lambda: len(_rings(redis_url)) == 2, within=5, what="two rings")
    assert _rings(redis_url) == ["job-1", "job-2"]


def test_stopping_sends_what_is_waiting(redis_url: str) -> None:
    app = publisher_app(redis_url)
    bell = Bell(app, TASK)
    bell.start()
    for number in range(20):
        bell.ring(f"job-{number}")

    bell.stop()
    app.close()

    assert _rings(redis_url) == [f"job-{number}" for number in range(20)]


def test_waiting_rings_share_a_message(redis_url: str) -> None:
    app = publisher_app(redis_url)
    bell = Bell(app, TASK)
    rings = [f"job-{number}" for number in range(2 * RINGS_IN_A_MESSAGE + 10)]
    for ring in rings:
        bell.ring(ring)

    bell.start()
    bell.stop()
    app.close()

    messages = _messages(redis_url)
    assert [len(message) for message in messages] == [
        *(RINGS_IN_A_MESSAGE, RINGS_IN_A_MESSAGE, 10)
    ]
    assert [ring for message in messages for ring in message] == rings


def test_a_lone_ring_goes_out_at_once_and_a_stream_of_them_shares_messages(
    bell: Bell, redis_url: str
) -> None:
    bell.ring("alone")
    wait_for(lambda: _rings(redis_url), within=5, what="the lone ring")
    began = time.monotonic()
    rung = []

    def streams() -> bool:
        rung.append(f"job-{len(rung)}")
        bell.ring(rung[-1])
        return len(rung) == 200

    wait_for(streams, within=10, what="the stream", every=0.001)
    wait_for(lambda: len(_rings(redis_url)) == 201, within=5, what="all rings")
    took = time.monotonic() - began

    assert _rings(redis_url) == ["alone", *rung]
    assert len(_messages(redis_url)) <= took / PACE + 2


def test_a_full_queue_drops_rings_and_never_delays_the_caller() -> None:
    app = publisher_app(CLOSED)
    bell = Bell(app, TASK)  # Not started: nobody takes the rings.
    began = time.monotonic()

    for number in range(WAITING_RINGS * 10):
        bell.ring(f"job-{number}")

    assert time.monotonic() - began < 0.5
    app.close()


def test_a_dead_broker_loses_the_ring_with_one_line_of_log() -> None:
    app = publisher_app(CLOSED)
    bell = Bell(app, TASK)
    with structlog.testing.capture_logs() as logs:
        bell.start()
        for number in range(5):
            bell.ring(f"job-{number}")
        wait_for(lambda: list(logs), within=5, what="the lost ring's line")
        bell.stop()
    app.close()

    assert [log["event"] for log in logs] == ["bell.lost"]


def test_the_bell_rings_again_when_the_broker_is_back(tmp_path: Path) -> None:
    with Valkey(tmp_path / "valkey") as server:
        app = publisher_app(server.url)
        bell = Bell(app, TASK)
        bell.start()
        bell.ring("before")
        wait_for(lambda: _rings(server.url), within=5, what="the first ring")
        server.kill()
        with structlog.testing.capture_logs() as logs:
            bell.ring("meanwhile")
            wait_for(lambda: list(logs), within=5, what="the lost ring's line")
        server.start()

        def rings_again() -> bool:
            bell.ring("after")
            return "after" in _rings(server.url)

        wait_for(rings_again, within=5, what="a ring after the restart", every=0.1)
        bell.stop()
        app.close()
