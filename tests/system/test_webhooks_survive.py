"""Webhooks outlive the processes that send them; every one is a real one, ended on purpose."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
from standardwebhooks import Webhook

from tests.support.stack import CRASHING_WORKER, Stack
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

Env = Callable[..., dict[str, str]]


@dataclass
class Receiver:
    """What arrived; `may_answer` holds answers back while it is not set."""

    url: str = ""
    came: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    may_answer: threading.Event = field(default_factory=threading.Event)

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.came]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    found.may_answer.set()

    class Take(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.came.append((headers, body))
            found.may_answer.wait(20)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Take) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}
        ).start()
        found.url = f"http://127.0.0.1:{server.server_port}/hook"
        yield found
        found.may_answer.set()
        server.shutdown()


@pytest.fixture
def stack(tmp_path: Path, child_env: Env, receiver: Receiver) -> Callable[..., Any]:
    """Start a system that may call the receiver, with a worker armed."""

    @contextmanager
    def start(crash_at: str = "") -> Iterator[Stack]:
        found = Stack(
            tmp_path,
            child_env,
            sandbox=("--speed", "instant"),
            worker=CRASHING_WORKER,
            OUTBOUND_HOSTS=receiver.url.split("/")[2],
            MEDIAGEN_TEST_LEASE="2",
        )
        found.worker.set(MEDIAGEN_CRASH_AT=crash_at)
        with found:
            yield found

    return start


def states(rows: psycopg.Connection[Any]) -> list[tuple[str, int]]:
    found = rows.execute("SELECT state, attempts FROM notifications").fetchall()
    return [(state, attempts) for state, attempts in found]


def test_killed_before_and_after_the_call_it_arrives_under_one_id(
    stack: Callable[..., Any], receiver: Receiver, database_url: str
) -> None:
    with (
        stack("job.settled") as s,
        psycopg.connect(database_url, autocommit=True) as rows,
    ):
        s.submit(prompt="a fox", webhook_url=receiver.url)
        wait_for(s.worker.has_ended, within=30, what="it dies before the call")
        assert states(rows) == [("pending", 0)]
        assert receiver.came == []

        s.worker.set(MEDIAGEN_CRASH_AT="webhook.sent")
        s.worker.start()
        wait_for(s.worker.has_ended, within=30, what="it dies after the call")
        assert states(rows) == [("pending", 1)]
        assert len(receiver.came) == 1

        s.worker.set(MEDIAGEN_CRASH_AT="")
        s.worker.start()
        wait_for(lambda: "worker.ready" in s.worker.said(), within=30, what="a worker")
        rows.execute("UPDATE notifications SET due_at = now()")  # the lease runs out
        wait_for(
            lambda: states(rows) == [("delivered", 2)], within=30, what="it is settled"
        )

        assert len(receiver.came) == 2 and len(set(receiver.ids())) == 1
        secret = s.client.get("/api/v1/webhooks/secret").json()["secret"]
        for headers, body in receiver.came:
            Webhook(secret).verify(body, headers)


def test_a_worker_that_is_asked_to_stop_waits_for_the_answer(
    stack: Callable[..., Any], receiver: Receiver, database_url: str
) -> None:
    receiver.may_answer.clear()
    with stack() as s, psycopg.connect(database_url, autocommit=True) as rows:
        s.submit(prompt="an owl", webhook_url=receiver.url)
        wait_for(lambda: receiver.came, within=30, what="the call")

        s.worker.send(signal.SIGTERM)
        wait_for(
            lambda: "engine.drained" in s.worker.said(), within=30, what="the drain"
        )
        assert not s.worker.has_ended()
        receiver.may_answer.set()

        assert s.worker.wait(30) == 0
        assert states(rows) == [("delivered", 1)]
        assert len(receiver.came) == 1
