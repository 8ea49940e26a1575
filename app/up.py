"""`mediagen up`: the whole system on one machine, with one command.

Starts PostgreSQL and Valkey (unless DATABASE_URL / REDIS_URL name your own), the sandbox provider
(unless REPLICATE_API_TOKEN is set), the migrations, the API and one worker; keeps them running;
ends all of them on Ctrl-C.  Everything it writes is in the data directory.  A composition root:
the settings it reads, it reads from the environment and `.env`, and hands on to its children.

    terminal ── Ctrl-C ──▶ up ──┬── sandbox, API, worker     end first, together
                                ├── Valkey                   then
                                └── PostgreSQL               last: everybody writes to it
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dotenv import dotenv_values

from app import processes
from app.embedded import Postgres, Valkey
from app.processes import Identity, ProcessError

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORT = 8000
_PORTS_TRIED = 100

# Together under the 5 s that Ctrl-C may take.
_END_CHILDREN = 3.0
_END_SERVER = 0.8

_READY_WITHIN = 60.0
_QUICK_DEATH = 5.0
_QUICK_DEATHS_ALLOWED = 3
_WRONG_SETTING = 2  # the exit code of API and worker for a setting they refuse


class UpError(RuntimeError):
    """The system cannot be started; the message is one line and names the remedy."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _StopRequestedError(Exception):
    """Somebody asked us to end while we were waiting for something."""


@dataclass(slots=True)
class _Child:
    """A part of ours that is a Python program, and what we remember of its health."""

    title: str
    argv: list[str]
    out: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    quick_deaths: int = 0
    restart_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Environment:
    """The settings we look at: the process's environment first, then `.env`."""

    values: Mapping[str, str]
    file: Mapping[str, str | None] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str | None:
        """Look a setting up; an empty one counts as not set, as in the service itself."""
        return (
            self.values[name] if name in self.values else self.file.get(name)
        ) or None

    def knows(self, name: str) -> bool:
        """Tell whether the setting was given at all, if only as empty."""
        return name in self.values or name in self.file


def up(
    port: int | None = None,
    data_dir: Path = Path(".data"),
    *,
    say: Callable[[str], None] | None = None,
) -> int:
    """Run the whole system until Ctrl-C, SIGTERM or SIGHUP; return the exit code.

    `port` is the API's; without it PORT, else 8000 or the next free one.  0: ended as asked.
    1: something could not be started or kept dying.  2: a mistake of the caller (port in
    use, already running here, a wrong setting).  Must be called from the main thread.
    """
    tell = say or _print
    environment = _Environment(dict(os.environ), dotenv_values(ROOT / ".env"))
    data_dir = data_dir.resolve()
    stop = threading.Event()
    with _signals(stop):
        try:
            with _locked(data_dir):
                chosen = _choose_port(port, environment, tell)
                _Supervisor(chosen, data_dir, environment, stop, tell).run()
        except UpError as exc:
            tell(f"mediagen: {exc}")
            return exc.exit_code
        except ProcessError as exc:
            tell(f"mediagen: {exc}")
            return 1
        except _StopRequestedError:
            pass
    return 0


class _Supervisor:
    """Starts the parts in order, watches them, ends them in the opposite order."""

    def __init__(
        self,
        port: int,
        data_dir: Path,
        environment: _Environment,
        stop: threading.Event,
        say: Callable[[str], None],
    ) -> None:
        self._port = port
        self._data_dir = data_dir
        self._logs = data_dir / "logs"
        self._migrations_out = self._logs / "migrations.out"
        self._settings = environment
        self._stop = stop
        self._say = say
        self._prefix = environment["API_V1_PREFIX"] or "/api/v1"
        self._env = dict(environment.values) | {"PYTHONUNBUFFERED": "1"}
        self._postgres = (
            None if environment["DATABASE_URL"] else Postgres(data_dir / "postgres")
        )
        self._valkey = None if environment["REDIS_URL"] else Valkey(data_dir / "valkey")
        self._children: list[_Child] = []
        self._record = data_dir / "run.json"

    def run(self) -> None:
        """Start everything, stay until asked to stop, end everything whatever happened."""
        started = time.monotonic()
        try:
            self._end_leftovers()
            self._logs.mkdir(parents=True, exist_ok=True)
            self._start_servers()
            self._start_programs()
            self._invite(time.monotonic() - started)
            while not self._stop.wait(0.1):
                self._tend()
        finally:
            self._end()

    # -- starting ----------------------------------------------------------------------------

    def _start_servers(self) -> None:
        servers = [
            server for server in (self._valkey, self._postgres) if server is not None
        ]
        for server in servers:
            server.launch()
        self._wait(lambda: all(server.is_ready() for server in servers), "the servers")
        for server in servers:
            self._say(f"{server.title:<11} 127.0.0.1:{server.port}")
        if self._postgres is not None:
            self._env["DATABASE_URL"] = self._postgres.url
        if self._valkey is not None:
            self._env["REDIS_URL"] = self._valkey.url

    def _start_programs(self) -> None:
        if not self._settings.knows("STORAGE_PATH"):
            self._env["STORAGE_PATH"] = str(self._data_dir / "media")
        if not self._settings.knows("LOG_DIR"):
            self._env["LOG_DIR"] = str(self._logs)
        if not (self._settings["AUTH_REQUIRED"] or self._settings["ADMIN_API_KEY"]):
            # Loopback only, and nobody could have a key yet.
            self._env["AUTH_REQUIRED"] = "false"
        admin_key = self._settings["ADMIN_API_KEY"]
        if admin_key is not None:
            # Also when it is in `.env`: `mediagen` finds it in our children's environment.
            self._env["ADMIN_API_KEY"] = admin_key
        self._env["PORT"] = str(self._port)
        sandbox_port = None
        if self._settings["REPLICATE_API_TOKEN"] is None:
            sandbox_port = self._start_sandbox()
        # The API imports while the migrations run, and is not ready before they are done; the
        # worker looks for due jobs at once and has to wait for its tables.
        migrations = self._start_migrations()
        api = f"-m uvicorn app.main:app --host 127.0.0.1 --port {self._port}"
        # Clients that wait for a job are cut off: a stop must not take as long as they wait.
        self._start("API", f"{api} --timeout-graceful-shutdown 2", out="api.out")
        self._finish_migrations(migrations)
        worker = "-m celery -A worker.celery_app worker --loglevel=info"
        self._start("worker", worker, out="worker.out")
        if sandbox_port is not None:
            self._wait(lambda: _answers(sandbox_port, "/"), "the sandbox")
            self._say(
                f"{'sandbox':<11} 127.0.0.1:{sandbox_port} draws the pictures; "
                "set REPLICATE_API_TOKEN for real ones"
            )
        ready = f"{self._prefix}/health/ready"
        self._wait(lambda: _answers(self._port, ready, status=200), "the API")
        self._say(f"{'API, worker':<11} logs in {_short(self._logs)}")

    def _start_sandbox(self) -> int:
        port = processes.free_port()
        self._env |= {
            "REPLICATE_API_BASE_URL": f"http://127.0.0.1:{port}/v1",
            "REPLICATE_API_TOKEN": "r8_sandbox",
            "OUTPUT_HOSTS": f"127.0.0.1:{port}",
            # It signs with a secret of its own, whatever `.env` has for the real provider.
            "REPLICATE_WEBHOOK_SECRET": "",
        }
        if self._settings["PUBLIC_BASE_URL"] is None:
            # The sandbox reaches us on loopback, which the real provider cannot.
            self._env["PUBLIC_BASE_URL"] = f"http://127.0.0.1:{self._port}"
        self._start("sandbox", f"-m sandbox --port {port}", out="sandbox.out")
        return port

    def _start_migrations(self) -> subprocess.Popen[bytes]:
        self._migrations_out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "alembic", "upgrade", "head"]
        return processes.spawn(
            command, log=self._migrations_out, env=self._env, cwd=ROOT
        )

    def _finish_migrations(self, process: subprocess.Popen[bytes]) -> None:
        out = self._migrations_out
        try:
            self._wait(lambda: process.poll() is not None, "the migrations")
        finally:
            processes.end([process], within=1)
        if process.returncode != 0:
            raise UpError(
                f"migrations failed (log: {_short(out)})\n{processes.tail(out)}",
                exit_code=_WRONG_SETTING if process.returncode == _WRONG_SETTING else 1,
            )
        self._say(f"{'migrations':<11} done")

    def _start(self, title: str, arguments: str, *, out: str) -> None:
        log = self._logs / out
        log.unlink(missing_ok=True)
        child = _Child(title, [sys.executable, *arguments.split()], log)
        self._children.append(child)
        self._launch(child)

    def _launch(self, child: _Child) -> None:
        child.process = processes.spawn(
            child.argv, log=child.out, env=self._env, cwd=ROOT
        )
        child.started_at = time.monotonic()
        child.restart_at = None
        self._note_children()

    def _wait(self, is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _READY_WITHIN
        while not is_done():
            if self._stop.wait(0.02):
                raise _StopRequestedError
            self._tend()
            if time.monotonic() > deadline:
                raise UpError(
                    f"{what} did not get ready within {_READY_WITHIN:.0f} s: "
                    f"see the logs in {_short(self._logs)}"
                )

    def _invite(self, seconds: float) -> None:
        url = f"http://127.0.0.1:{self._port}"
        self._say(
            f"Ready in {seconds:.1f} s: {url} (API at {url}/docs; Ctrl-C stops everything)"
        )
        demands_key = _answers(self._port, f"{self._prefix}/models", status=401)
        key = ' -H "Authorization: Bearer $ADMIN_API_KEY"' if demands_key else ""
        self._say(
            f"Try: curl -s {url}{self._prefix}/generate{key} "
            """-H 'Content-Type: application/json' """
            """-d '{"prompt": "a lighthouse at dawn"}'"""
        )

    # -- watching ----------------------------------------------------------------------------

    def _tend(self) -> None:
        """Start again what has died, a little later each time."""
        for server in (self._valkey, self._postgres):
            if server is not None and server.pid is not None and not server.is_running:
                said = processes.tail(server.log, lines=3)
                self._say(
                    f"{server.title} has died, starting it again. Its last words:\n{said}"
                )
                server.launch()
                self._wait(server.is_ready, server.title)
        for child in self._children:
            if child.process is not None and child.process.poll() is not None:
                self._note_death(child, child.process.returncode)
            if child.restart_at is not None and time.monotonic() >= child.restart_at:
                self._launch(child)

    def _note_death(self, child: _Child, code: int) -> None:
        now = time.monotonic()
        child.process = None
        child.quick_deaths = (
            child.quick_deaths + 1 if now - child.started_at < _QUICK_DEATH else 0
        )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        last_words = f"(log: {_short(child.out)})\n{processes.tail(child.out)}"
        if code == _WRONG_SETTING:
            raise UpError(
                f"the {child.title} refuses to start {last_words}", exit_code=2
            )
        if child.quick_deaths >= _QUICK_DEATHS_ALLOWED:
            raise UpError(f"the {child.title} keeps dying, {how} {last_words}")
        child.restart_at = now + 0.5 * 2**child.quick_deaths
        self._say(
            f"The {child.title} has ended ({how}) and is started again {last_words}"
        )

    # -- ending ------------------------------------------------------------------------------

    def _end(self) -> None:
        """End every part and leave none; under 5 s."""
        # A second Ctrl-C would only leave things half done.
        for number in _ASKING_TO_STOP:
            signal.signal(number, signal.SIG_IGN)
        running = [
            child.process for child in self._children if child.process is not None
        ]
        processes.end(running, within=_END_CHILDREN)
        for server in (self._valkey, self._postgres):
            if server is not None:
                server.stop(seconds=_END_SERVER)
        with contextlib.suppress(OSError):
            self._record.unlink(missing_ok=True)
        if running:
            self._say(f"Stopped. Your data stay in {_short(self._data_dir)}")

    def _note_children(self) -> None:
        alive = [child for child in self._children if child.process is not None]
        known = [
            Identity.of(child.process.pid)
            for child in alive
            if child.process is not None
        ]
        self._record.write_text(
            json.dumps(
                [{"pid": one.pid, "started": one.started} for one in known if one]
            )
        )

    def _end_leftovers(self) -> None:
        """End children of a run that was killed and could not end them itself."""
        try:
            noted = json.loads(self._record.read_text())
            known = [Identity(int(one["pid"]), float(one["started"])) for one in noted]
        except (OSError, ValueError, TypeError, KeyError):
            return
        alive = [
            process for identity in known if (process := identity.find()) is not None
        ]
        family = {
            child for process in alive for child in processes.descendants(process.pid)
        }
        processes.end_strangers(alive, within=2)
        processes.kill_strangers(family)


_ASKING_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """Turn the signals that ask us to end into an event, and give them back afterwards."""
    before = {number: signal.getsignal(number) for number in _ASKING_TO_STOP}
    for number, handler in before.items():
        # `nohup` starts us with SIGHUP ignored, and means it.
        if number is not signal.SIGHUP or handler is not signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Keep a second supervisor out of the data directory for as long as the block runs."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = open(data_dir / "lock", "a+")
    except OSError as exc:
        raise UpError(
            f"cannot use {_short(data_dir)} ({exc.strerror}): give the folder to the user "
            "you run as, or choose another data directory",
            exit_code=2,
        ) from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.seek(0)
            raise UpError(
                f"already running in {_short(data_dir)} (pid {lock.read().strip() or '?'}): "
                "stop that one, or choose another data directory",
                exit_code=2,
            ) from exc
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _choose_port(
    wanted: int | None, environment: _Environment, say: Callable[[str], None]
) -> int:
    named = environment["PORT"]
    if wanted is None and named is not None:
        if not named.isdecimal() or not 0 < int(named) < 65536:
            raise UpError(
                f"PORT is {named!r}: set it to a number from 1 to 65535", exit_code=2
            )
        wanted = int(named)
    if wanted is not None:
        if not processes.is_free(wanted):
            raise UpError(
                f"port {wanted} is in use: stop what uses it or choose another one "
                "(make run PORT=8001, mediagen up --port 8001)",
                exit_code=2,
            )
        return wanted
    for port in range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED):
        if processes.is_free(port):
            if port != DEFAULT_PORT:
                say(f"Port {DEFAULT_PORT} is in use, taking {port} instead")
            return port
    raise UpError(
        "no port from 8000 to 8099 is free: choose one with --port", exit_code=2
    )


def _answers(port: int, path: str, *, status: int | None = None) -> bool:
    """Tell whether an HTTP server on this port answers, with this status if one is given."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return status is None or answer.status == status
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _short(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return f"./{path.relative_to(Path.cwd())}"
    return str(path)


def _print(line: str) -> None:
    # The terminal may be gone already when we say good-bye.
    with contextlib.suppress(OSError):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(up(data_dir=Path(os.environ.get("MEDIAGEN_DATA_DIR") or ".data")))
