"""The command line under test, and an HTTP server that answers as told."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from typer.testing import CliRunner, Result

from app.cli import app


def run(*words: str, **env: str) -> Result:
    """Run `mediagen` with these words in this process, its variables unset unless given."""
    unset = {"MEDIAGEN_URL": None, "MEDIAGEN_API_KEY": None}
    return CliRunner().invoke(app, words, env={**unset, **env}, catch_exceptions=False)


@contextmanager
def recorded_run(data_dir: Path, **env: str) -> Iterator[None]:
    """Keep a process that is recorded as `mediagen up` records its children."""
    process = subprocess.Popen(["sleep", "60"], env=env | {"PATH": os.environ["PATH"]})
    try:
        started = psutil.Process(process.pid).create_time()
        note = [{"pid": 1, "started": 0.0}, {"pid": process.pid, "started": started}]
        (data_dir / "run.json").write_text(json.dumps(note))
        yield
    finally:
        process.kill()
        process.wait()


def a_problem(status: int, detail: str, **more: Any) -> tuple[int, dict[str, Any]]:
    return (
        status,
        {"title": "x", "status": status, "detail": detail, "code": "x"} | more,
    )


Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]] | Any
"""What the API says: a body (bytes as they are, else JSON), (status, body), (status, body,
headers), or None to hang up."""


class Stub(ThreadingHTTPServer):
    """An API that answers as told.  The last answer of a route is repeated for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers: dict[str, list[Answer]] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []

    def on(self, route: str, *answers: Answer) -> None:
        """Answer `GET /path` (or another method) with each in turn."""
        self.answers[route] = list(answers)

    def body_of(self, route: str) -> Any:
        """Read the JSON the last request to the route carried."""
        bodies = [
            body for method, path, _, body in self.seen if route == f"{method} {path}"
        ]
        return json.loads(bodies[-1])


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        path = self.path.partition("?")[0]
        self.server.seen.append(
            (self.command, self.path, dict(self.headers), self.rfile.read(length))
        )
        answers = self.server.answers.get(
            f"{self.command} {path}", [a_problem(404, "There is no such thing.")]
        )
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:
            self.close_connection = True
            return
        status, body, *more = answer if isinstance(answer, tuple) else (200, answer)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(self.server.seen)}"')
        for name, value in (more[0] if more else {}).items():
            self.send_header(name, value)
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)

    do_POST = do_PATCH = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def stub_api() -> Iterator[Stub]:
    """Serve for as long as the block runs."""
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
