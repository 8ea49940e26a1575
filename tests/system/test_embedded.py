"""The servers from wheels: data, passwords, ports and leftovers."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.embedded import EmbeddedServerError, Postgres, Valkey
from app.processes import Account, Identity, free_port, is_free, run_as
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]


def test_postgres_keeps_data_port_and_durability_over_a_restart(tmp_path: Path) -> None:
    # Below a folder that is closed to everybody else, like /root or a fresh temporary one.
    closed = tmp_path / "closed to others"
    closed.mkdir(mode=0o700)
    with Postgres(closed / "data", settings={"max_connections": "37"}) as first:
        url = first.url
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE note AS SELECT 7 AS n")
            shown = [
                connection.execute(f"SHOW {name}").fetchone()
                for name in ("fsync", "max_connections", "server_encoding", "timezone")
            ]
        assert shown == [("on",), ("37",), ("UTF8",), ("UTC",)]
    with Postgres(closed / "data") as second, psycopg.connect(second.url) as connection:
        assert second.url == url
        assert connection.execute("SELECT n FROM note").fetchone() == (7,)


def test_a_killed_postgres_starts_again_on_the_same_port(tmp_path: Path) -> None:
    with Postgres(tmp_path / "data") as server:
        url = server.url
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE note AS SELECT 7 AS n")
        server.kill()
        assert not server.is_running
        server.start()
        assert server.url == url
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT n FROM note").fetchone() == (7,)


def test_both_ask_for_their_password(tmp_path: Path) -> None:
    no_patience = Retry(NoBackoff(), retries=0)
    with Postgres(tmp_path / "p") as postgres, Valkey(tmp_path / "v") as valkey:
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(
                f"postgresql://postgres:wrong@127.0.0.1:{postgres.port}/postgres"
            )
        with redis.Redis(port=valkey.port, retry=no_patience) as stranger:
            with pytest.raises(redis.AuthenticationError):
                stranger.ping()
        with redis.Redis.from_url(valkey.url) as known:
            assert known.config_get("maxmemory-policy") == {
                "maxmemory-policy": "noeviction"
            }
    for secret in ("p/password", "v/password", "v/valkey.conf"):
        assert stat.S_IMODE((tmp_path / secret).stat().st_mode) == 0o600


def test_what_a_killed_owner_left_running_is_stopped_first(tmp_path: Path) -> None:
    # Started from a thread, the servers are not tied to their owner's death by the kernel.
    owner = """
import pathlib, sys, threading
from app.embedded import Postgres, Valkey
servers = [Postgres(pathlib.Path(sys.argv[1])), Valkey(pathlib.Path(sys.argv[2]))]
for server in servers:
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
print(*(server.pid for server in servers), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", owner, tmp_path / "p", tmp_path / "v"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        left = [Identity.of(pid) for pid in pids]
        process.kill()
    assert [one.find() is not None for one in left if one] == [True, True]
    with Postgres(tmp_path / "p") as postgres, Valkey(tmp_path / "v") as valkey:
        assert postgres.pid not in pids
        assert valkey.pid not in pids
        assert [one.find() for one in left if one] == [None, None]


def test_a_busy_port_is_left_to_its_owner(tmp_path: Path) -> None:
    with socket.socket() as taken:
        with Valkey(tmp_path / "data") as valkey:
            before = valkey.port
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", before))
        taken.listen()
        with pytest.raises(EmbeddedServerError, match=f"port {before} .* is in use"):
            Valkey(tmp_path / "data", before).start()
        with Valkey(tmp_path / "data") as moved:
            assert moved.port != before


def test_a_server_that_cannot_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="max_connections"):
        Postgres(tmp_path / "data", settings={"max_connections": "many"}).start()


def test_a_recycled_pid_is_not_taken_for_the_old_process() -> None:
    mine = Identity.of(os.getpid())
    assert mine is not None and mine.find() is not None
    assert Identity(mine.pid, mine.started - 60).find() is None


def test_ending_a_server_leaves_no_process(tmp_path: Path) -> None:
    server = Postgres(tmp_path / "data")
    server.start()
    assert server.pid is not None
    known = Identity.of(server.pid)
    server.stop()
    assert known is not None
    wait_for(lambda: known.find() is None, within=1, what="PostgreSQL has ended")
    assert server.pid is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_programs_below_a_closed_folder_can_be_found_as_another_account(
    tmp_path: Path,
) -> None:
    """A checkout under /root: initdb asks access(2) whether it may run its neighbours."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    program = shutil.copy("/bin/true", closed / "program")
    nobody = pwd.getpwnam("nobody")
    account = Account(nobody.pw_uid, nobody.pw_gid)

    asked = subprocess.run([*run_as(account), "test", "-x", str(program)])

    assert asked.returncode == 0


def test_a_free_port_is_none_that_outgoing_connections_get() -> None:
    ports = [free_port() for _ in range(200)]

    assert all(20_000 <= port < 30_000 for port in ports)
    assert all(is_free(port) for port in ports)
