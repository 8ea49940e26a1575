"""Child processes that do not outlive us, and processes we can name again after a restart.

Shared by `app.embedded` (the servers) and `app.up` (the supervisor).  A child runs in a
session of its own, so that Ctrl-C in the terminal reaches only the supervisor, which then
ends its children in order.  On Linux the kernel signals a child when the thread that
started it dies (`PR_SET_PDEATHSIG`), so even a SIGKILLed supervisor leaves nothing behind.

Processes are ended by pid, and a pid is believed only together with the moment the process
started: a number that has been given to somebody else is never signalled.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# psutil derives the start time from the boot time, which moves when the clock is corrected.
_CLOCK_TOLERANCE = 5.0
_LOG_LIMIT = 10 * 1024 * 1024
_PORTS = range(20_000, 30_000)


class ProcessError(RuntimeError):
    """A process cannot be started or used; the message is one line and names the remedy."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that can be recognised later: its pid and when it started (seconds, Unix time)."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Read the identity of a running process; `None` when there is none with this pid."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.Error:
            return None

    def find(self) -> psutil.Process | None:
        """Find the process if it is still alive and still the same one."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) > _CLOCK_TOLERANCE:
                return None
            return process if _lives(process) else None
        except psutil.Error:
            return None


@dataclass(frozen=True, slots=True)
class Account:
    """The system account a server process runs as."""

    uid: int
    gid: int


def spawn(
    argv: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    account: Account | None = None,
    death_signal: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a child in its own session, its output appended to `log`.

    `account` (only as root) is the account to run as; see `run_as`.  `death_signal` is sent to the
    child when we die, however we die; only on Linux with util-linux, and only when called
    from the main thread, because the kernel means the death of the *thread* that started the child.
    Raises `ProcessError` when the program cannot be started.
    """
    command = [*run_as(account), *(str(word) for word in argv)]
    if _can_link_deaths() and threading.current_thread() is threading.main_thread():
        linked = ["--pdeathsig", death_signal.name.removeprefix("SIG")]
        if account is None:
            command = [_setpriv() or "", *linked, "--", *command]
        else:
            command[1:1] = linked
    if log.exists() and log.stat().st_size > _LOG_LIMIT:
        log.unlink()
    with open(log, "ab") as output:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as exc:
            raise ProcessError(f"cannot start {argv[0]}: {exc.strerror}") from exc


def run_as(account: Account | None) -> list[str]:
    """Compose the prefix that makes a command run as another account; empty for our own.

    The command keeps the one capability it needs to reach files below folders that are closed to
    the account (a checkout under /root, a `mktemp -d`), so no folder outside the data
    directory has to be opened.  `setpriv` replaces itself by the command: the pid stays.
    Raises `ProcessError` when util-linux's `setpriv` is missing.
    """
    if account is None:
        return []
    program = _setpriv()
    if program is None:
        raise ProcessError(
            "PostgreSQL refuses to run as root and `setpriv` is missing: install util-linux, "
            "run as an ordinary user, or set DATABASE_URL to a server of your own"
        )
    return [
        program,
        f"--reuid={account.uid}",
        f"--regid={account.gid}",
        "--clear-groups",
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
        # access(2), by which initdb looks for its programs, ignores capabilities else.
        "--securebits=+no_setuid_fixup",
        "--",
    ]


def end(
    processes: Sequence[subprocess.Popen[bytes]],
    *,
    by: Sequence[signal.Signals] = (signal.SIGTERM,),
    within: float,
) -> None:
    """End the processes and all their descendants; when this returns none is left.

    All get the first of the signals together, and what still lives after `within` seconds gets
    the next one; after the last one SIGKILL.  Processes that have ended already are fine.
    """
    family = _families(processes)
    for number in by:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        if _await_end(processes, seconds=within):
            break
    family |= _families(processes)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    kill_strangers(family)


def end_strangers(
    processes: Collection[psutil.Process],
    *,
    by: signal.Signals = signal.SIGTERM,
    within: float,
) -> None:
    """End processes that are not our children; SIGKILL for what lives after `within` seconds.

    psutil compares start times before it signals, so a recycled pid is left alone.
    """
    for process in processes:
        _signal(process, by)
    kill_strangers(_await_strangers(processes, seconds=within))


def kill_strangers(processes: Collection[psutil.Process]) -> None:
    """Kill processes that are not our children and return when they are gone."""
    for process in processes:
        _signal(process, signal.SIGKILL)
    _await_strangers(processes, seconds=1)


def descendants(pid: int) -> set[psutil.Process]:
    """List the children of a process, and theirs; empty when it is gone."""
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()


def is_free(port: int) -> bool:
    """Tell whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
        return True


def free_port() -> int:
    """Choose a port of 127.0.0.1 that nobody uses at the moment.

    Preferably none that the system gives to outgoing connections (Linux: 32768 to 60999, IANA:
    from 49152): until a server listens there, it could.
    """
    for _ in range(100):
        port = secrets.choice(_PORTS)
        if is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, *, lines: int = 5) -> str:
    """Return the last lines of a log that say something; empty when there is no log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


@functools.cache
def _setpriv() -> str | None:
    return shutil.which("setpriv") or shutil.which("setpriv", path="/usr/bin:/bin")


@functools.cache
def _can_link_deaths() -> bool:
    # BusyBox has a `setpriv` too, without this option.
    program = _setpriv()
    if not sys.platform.startswith("linux") or program is None:
        return False
    usage = subprocess.run([program, "--help"], capture_output=True, check=False)
    return b"--pdeathsig" in usage.stdout + usage.stderr


def _families(processes: Sequence[subprocess.Popen[bytes]]) -> set[psutil.Process]:
    return {
        child
        for process in processes
        if process.poll() is None
        for child in descendants(process.pid)
    }


def _await_end(processes: Sequence[subprocess.Popen[bytes]], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def _await_strangers(
    processes: Collection[psutil.Process], *, seconds: float
) -> list[psutil.Process]:
    """Wait for the end of processes and return those that still live."""
    deadline = time.monotonic() + seconds
    alive = [process for process in processes if _lives(process)]
    while alive and time.monotonic() < deadline:
        time.sleep(0.01)
        alive = [process for process in alive if _lives(process)]
    return alive


def _lives(process: psutil.Process) -> bool:
    # A dead orphan stays a zombie where process 1 reaps nobody, as in many containers.
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
