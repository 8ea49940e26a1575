"""What every benchmark needs: real servers, our processes, and waiting for them.

A `Machine` has a PostgreSQL (fsync on) and a Valkey from wheels; a `Service` on it is one
deployment with a database of its own, its provider, API and worker.  All of it ends with the
machine, and its folder goes too.  Nothing is taken over from `.env` or from settings in the
environment: a run measures what the command says.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self, TypeVar

import orjson
import psycopg

from app import processes
from app.core.config import Settings
from app.embedded import Postgres, Valkey

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
UNLIMITED = "60000000"  # a minute


class Machine:
    """The servers, and every process that is started here.  Use as a context manager."""

    def __init__(self, **postgres: str) -> None:
        """`postgres` are extra settings of the server."""
        self._settings = {"max_connections": "200", **postgres}
        self._parts = contextlib.ExitStack()
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, _leave)
        with contextlib.ExitStack() as parts:
            name = parts.enter_context(
                tempfile.TemporaryDirectory(
                    prefix="mediagen-bench-", ignore_cleanup_errors=True
                )
            )
            self.folder = Path(name)
            self.postgres = Postgres(self.folder / "pg", settings=self._settings)
            self.valkey = Valkey(self.folder / "valkey")
            parts.enter_context(self.postgres)
            parts.enter_context(self.valkey)
            parts.callback(self._end_all)
            self._parts = parts.pop_all()
        self._databases = 0
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._parts.close()

    def environment(self) -> dict[str, str]:
        """Give an environment without settings of ours, in which our modules are found."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name.lower() not in Settings.model_fields
        }
        return kept | {"PYTHONPATH": str(ROOT)}

    def create_database(self) -> tuple[str, str]:
        """Make an empty database and choose a Valkey database: the URLs of both."""
        name, number = f"bench_{self._databases}", self._databases
        self._databases += 1
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        broker = f"{self.valkey.url.rpartition('/')[0]}/{number}"
        return self.postgres.url_of(name), broker

    def start(self, title: str, argv: Sequence[str], env: Mapping[str, str]) -> int:
        """Start `python -m …` and give its pid; it may not be ready yet."""
        process = processes.spawn(
            [sys.executable, "-m", *argv],
            log=self.folder / f"{title}.log",
            env=env,
            cwd=self.folder,  # no .env here
        )
        self._running[title] = process
        print(f"{title} is process {process.pid}", file=sys.stderr)
        return process.pid

    def stop(self, title: str) -> None:
        """End a process in order."""
        processes.end([self._running.pop(title)], within=30)

    def wait_until(
        self, probe: Callable[[], T], *, within: float, what: str, every: float = 0.05
    ) -> T:
        """Ask until the answer is true and give it.

        Ends the benchmark when that takes too long, or when a process has died.
        """
        deadline = time.monotonic() + within
        while not (answer := probe()):
            for title, process in self._running.items():
                if process.poll() is not None:
                    said = processes.tail(self.folder / f"{title}.log", lines=15)
                    raise SystemExit(f"{title} has ended:\n{said}")
            if time.monotonic() > deadline:
                raise SystemExit(f"{what}: not within {within:g} s")
            time.sleep(every)
        return answer

    def _end_all(self) -> None:
        # In reverse order: nobody shall miss what it talks to.
        for title in reversed(list(self._running)):
            self.stop(title)


class Service:
    """One deployment on a machine; its parts are started one by one."""

    def __init__(
        self,
        machine: Machine,
        name: str = "",
        *,
        callbacks: bool = False,
        **settings: str,
    ) -> None:
        """Make the database.  `callbacks`: the provider can reach the API."""
        self._machine = machine
        self._name = name
        self.port, self.provider_port = processes.free_port(), processes.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._database, self._broker = machine.create_database()
        self.media = machine.folder / f"media{name}"
        self._env = machine.environment() | {
            "DATABASE_URL": self._database,
            "REDIS_URL": self._broker,
            "REPLICATE_API_TOKEN": "r8_bench",
            "AUTH_REQUIRED": "false",
            "REPLICATE_API_BASE_URL": f"http://127.0.0.1:{self.provider_port}/v1",
            "OUTPUT_HOSTS": f"127.0.0.1:{self.provider_port}",
            "STORAGE_PATH": str(self.media),
            "PROVIDER_CREATES_PER_MINUTE": UNLIMITED,
            "PROVIDER_REQUESTS_PER_MINUTE": UNLIMITED,
            "LOG_DIR": "",
            "LOG_FORMAT": "json",  # as in the image
            **({"PUBLIC_BASE_URL": self.url} if callbacks else {}),
            **settings,
        }
        self.pids: dict[str, int] = {}
        alembic = ["alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head"]
        subprocess.run(
            [sys.executable, "-m", *alembic],
            cwd=machine.folder,
            env=self._env,
            check=True,
        )

    @property
    def database(self) -> str:
        """The address of the database, in libpq's form."""
        return self._database

    def start_provider(self, *options: str) -> None:
        """Start `bench.provider` and wait until it answers."""
        port = str(self.provider_port)
        self._start("provider", ["bench.provider", "--port", port, *options])
        self._machine.wait_until(
            lambda: self._answers(self.provider_port, "/control/stats") is not None,
            within=60,
            what="the provider answers",
        )

    def start_api(self) -> None:
        """Start one uvicorn process and wait until it accepts jobs."""
        uvicorn = ["uvicorn", "app.main:app", "--port", str(self.port)]
        self._start("api", [*uvicorn, "--no-access-log"])
        self._machine.wait_until(
            lambda: self._answers(self.port, "/api/v1/health/ready") is not None,
            within=60,
            what="the API is ready",
        )

    def start_worker(self) -> None:
        """Start one worker and wait for its first sign of life."""
        celery = ["celery", "-A", "worker.celery_app", "worker", "--loglevel=info"]
        self._start("worker", celery)
        self._machine.wait_until(
            self._has_worker, within=60, what="the worker is ready", every=0.2
        )

    def start(self, *provider: str) -> None:
        """Start provider, API and worker."""
        self.start_provider(*provider)
        self.start_api()
        self.start_worker()

    def stop_worker(self) -> None:
        """End the worker in order."""
        self._machine.stop("worker" + self._name)

    def ask_provider(self, path: str, *, data: bytes | None = None) -> Any:
        """Call one of the provider's control routes; with data it is a POST."""
        answer = self._answers(self.provider_port, path, data)
        if answer is None:
            raise SystemExit(f"the provider does not answer {path}")
        return answer

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement and give its rows."""
        with psycopg.connect(self._database, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def finished(self) -> dict[str, int]:
        """Count the finished jobs by status."""
        return dict(
            self.rows(
                "SELECT status, count(*) FROM jobs WHERE completed_at IS NOT NULL"
                " GROUP BY status"
            )
        )

    def wait_for(self, jobs: int, *, within: float, every: float = 0.25) -> None:
        """Wait until so many jobs are finished; end when one of them is not completed."""

        def all_finished() -> bool:
            counts = self.finished()
            if strange := {k: n for k, n in counts.items() if k != "completed"}:
                raise SystemExit(f"not all jobs were completed: {strange}")
            return counts.get("completed", 0) >= jobs

        what = f"{jobs} jobs are completed"
        self._machine.wait_until(all_finished, within=within, what=what, every=every)

    @contextlib.contextmanager
    def frozen_worker(self) -> Iterator[None]:
        """Stop the worker's process in its tracks meanwhile: jobs pile up."""
        os.kill(self.pids["worker"], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pids["worker"], signal.SIGCONT)

    def _start(self, part: str, argv: Sequence[str]) -> None:
        self.pids[part] = self._machine.start(part + self._name, argv, self._env)

    def _has_worker(self) -> bool:
        answer = self._answers(self.port, "/api/v1/health")
        return answer is not None and answer["status"] == "ok"

    def _answers(self, port: int, path: str, data: bytes | None = None) -> Any:
        """Give the JSON of a 200; None for anything else."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}{path}", data, timeout=60
            ) as answer:
                return orjson.loads(answer.read())
        except (urllib.error.URLError, OSError, orjson.JSONDecodeError):
            return None


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End in order, as at Ctrl-C."""
    raise SystemExit(128 + number)
