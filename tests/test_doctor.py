"""`mediagen doctor`: every dependency has a finding, every finding a remedy, and nothing hangs."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine
from uuid_utils.compat import uuid7

from app.core.heartbeat import Heartbeat, living
from app.doctor import Finding, Mark, examine
from app.domain.access import Budget, Limits, Scope
from app.processes import free_port
from app.services import keys
from app.services.keys import NewKey, Secret
from app.services.media_client import open_breaker
from tests.support.command_line import Stub, recorded_run, run, stub_api
from tests.support.waiting import wait_for_async

ADMIN_KEY = "s3cret-of-an-administrator"
SECRETS = ("s3cret", "r8_hidden")


@pytest.fixture
def api() -> Iterator[Stub]:
    with stub_api() as server:
        yield server


@pytest.fixture
def closed_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


def _by_name(output: str) -> dict[str, str]:
    """Read a doctor's output: name → the line from its mark on."""
    return {
        line[2:14].strip(): line for line in output.splitlines() if line[1:2] == " "
    }


def test_doctor_names_missing_settings_and_the_remedy(tmp_path: Path) -> None:
    result = run("doctor", "--data-dir", str(tmp_path))

    assert result.exit_code == 1
    for name in ("DATABASE_URL", "REDIS_URL", "REPLICATE_API_TOKEN"):
        assert f"{name} is not set: " in result.stdout
    assert "`mediagen up` needs none" in result.stdout


def _unusable(tmp_path: Path, port: str, **changes: str) -> dict[str, str]:
    (tmp_path / "file").write_text("in the way")
    return {
        "DATABASE_URL": f"postgresql://me:s3cret@127.0.0.1:{port}/pictures",
        "REDIS_URL": f"redis://:s3cret@127.0.0.1:{port}/0",
        "REPLICATE_API_TOKEN": "r8_hidden",
        "REPLICATE_API_BASE_URL": f"http://127.0.0.1:{port}/v1",
        "STORAGE_PATH": str(tmp_path / "file" / "media"),
        "LOG_DIR": str(tmp_path / "file" / "logs"),
    } | changes


def test_doctor_with_everything_down_names_every_remedy(
    closed_url: str, tmp_path: Path
) -> None:
    port = closed_url.rpartition(":")[2]
    began = time.monotonic()

    result = run("doctor", **_unusable(tmp_path, port))

    assert time.monotonic() - began < 10
    assert result.exit_code == 1
    found = _by_name(result.stdout)
    assert found["database"].startswith("✗")
    assert f"start PostgreSQL at 127.0.0.1:{port}/pictures" in found["database"]
    assert f"start Redis or Valkey at 127.0.0.1:{port}" in found["broker"]
    assert "mend the broker first" in found["worker"]
    assert "STORAGE_PATH" in found["storage"]
    assert "REPLICATE_API_BASE_URL" in found["provider"]
    assert f"set OUTPUT_HOSTS=127.0.0.1:{port}" in found["output hosts"]
    assert "LOG_DIR" in found["log folder"] and found["log folder"][0] == "✗"
    assert not any(secret in result.output for secret in SECRETS)
    assert "\x1b" not in result.output


def test_doctor_does_not_hang_with_servers_that_never_answer(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        began = time.monotonic()
        result = run("doctor", **_unusable(tmp_path, str(silent.getsockname()[1])))

    assert time.monotonic() - began < 10
    found = _by_name(result.stdout)
    assert {found[name][0] for name in ("database", "broker", "provider")} == {"✗"}
    assert "no answer" in found["provider"]


def test_doctor_names_each_wrong_setting(closed_url: str, tmp_path: Path) -> None:
    port = closed_url.rpartition(":")[2]
    wrong = {"DATABASE_URL": "mysql://x", "MAX_RETRIES": "99", "LOG_FORMAT": "loud"}

    result = run("doctor", **_unusable(tmp_path, port, **wrong))

    complaints = [line for line in result.stdout.splitlines() if "settings" in line]
    for name in wrong:
        assert any(name in line for line in complaints)


def test_doctor_refuses_output_hosts_that_are_none(
    closed_url: str, tmp_path: Path
) -> None:
    port = closed_url.rpartition(":")[2]

    found = _by_name(
        run("doctor", **_unusable(tmp_path, port, OUTPUT_HOSTS="https://x/")).stdout
    )

    assert "is not a host or host:port" in found["output hosts"]
    assert "mend OUTPUT_HOSTS first" in found["provider"]


@pytest.fixture
def sound(
    api: Stub, database_url: str, redis_url: str, tmp_path: Path
) -> dict[str, str]:
    """The settings of a system with nothing wrong, but without a worker."""
    api.on("GET /v1/account", {"type": "user", "username": "tester"})
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "REPLICATE_API_TOKEN": "r8_hidden",
        "REPLICATE_API_BASE_URL": f"{api.url}/v1",
        "OUTPUT_HOSTS": f"127.0.0.1:{api.server_port}",
        "ADMIN_API_KEY": ADMIN_KEY,
        "STORAGE_PATH": str(tmp_path / "media"),
        "LOG_DIR": str(tmp_path / "logs"),
    }


@pytest.fixture
async def worker(redis_url: str) -> AsyncIterator[str]:
    """A worker's sign of life; give its name."""
    redis = Redis.from_url(redis_url)
    beat = Heartbeat(redis, "host:1", lambda: {"in_flight": "0"})
    beat.start()
    await wait_for_async(lambda: living(redis), within=5, what="a sign of life")
    yield "host:1"
    await beat.stop()
    await redis.aclose()


def test_doctor_finds_nothing_wrong_with_a_sound_system(
    sound: dict[str, str], worker: str
) -> None:
    result = run("doctor", **sound)

    found = _by_name(result.stdout)
    assert {line[0] for line in found.values()} == {"✓"}, result.stdout
    assert result.exit_code == 0
    assert "PostgreSQL" in found["database"]
    assert "migrations current" in found["database"]
    assert "maxmemory-policy noeviction" in found["broker"]
    assert worker in found["worker"]
    assert "accepts the token" in found["provider"]


def test_doctor_misses_the_worker(sound: dict[str, str]) -> None:
    result = run("doctor", **sound)

    assert result.exit_code == 1
    assert "celery -A worker.celery_app worker" in _by_name(result.stdout)["worker"]


def test_doctor_misses_a_key_to_make_others_with(sound: dict[str, str]) -> None:
    result = run("doctor", **sound | {"ADMIN_API_KEY": ""})

    found = _by_name(result.stdout)["keys"]
    assert found[0] == "✗" and "set ADMIN_API_KEY" in found


async def test_doctor_finds_a_key_to_make_others_with(
    sound: dict[str, str], engine: AsyncEngine
) -> None:
    made = NewKey(
        id=uuid7(),
        owner="default",
        name="mine",
        scopes=frozenset((Scope.ADMIN,)),
        expires_at=None,
        limits=Limits(),
        budget=Budget(),
    )
    async with engine.begin() as conn:
        await keys.create(conn, made, Secret.mint())

    command = partial(run, "doctor", **sound | {"ADMIN_API_KEY": ""})
    result = await asyncio.to_thread(command)

    assert _by_name(result.stdout)["keys"][0] == "✓"


@pytest.mark.parametrize("switch", ["AUTH_REQUIRED=false", "DEBUG=true"])
def test_doctor_says_that_no_keys_are_demanded(
    sound: dict[str, str], switch: str
) -> None:
    name, _, value = switch.partition("=")

    found = _by_name(run("doctor", **sound | {name: value}).stdout)["keys"]

    assert found[0] == "!" and "AUTH_REQUIRED=true" in found


def test_doctor_warns_of_a_broker_that_forgets(
    sound: dict[str, str], redis_url: str
) -> None:
    with SyncRedis.from_url(redis_url) as redis:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        try:
            found = _by_name(run("doctor", **sound).stdout)
        finally:
            redis.config_set("maxmemory-policy", "noeviction")

    assert found["broker"][0] == "!"
    assert "allkeys-lru: set it to noeviction" in found["broker"]


def test_doctor_misses_migrations(
    sound: dict[str, str], empty_database_url: str
) -> None:
    result = run("doctor", **sound | {"DATABASE_URL": empty_database_url})

    assert "run alembic upgrade head" in _by_name(result.stdout)["database"]


@pytest.mark.parametrize(
    ("part", "wrong", "reason"),
    [
        ("@", "x@", "user or password refused"),
        ("test_", "no_such_", "no such database"),
    ],
)
def test_doctor_says_what_the_database_refuses(
    sound: dict[str, str], part: str, wrong: str, reason: str
) -> None:
    url = wrong.join(sound["DATABASE_URL"].rsplit(part, 1))

    found = _by_name(run("doctor", **sound | {"DATABASE_URL": url}).stdout)

    assert reason in found["database"]


def test_doctor_tells_a_refused_token(api: Stub, sound: dict[str, str]) -> None:
    api.on("GET /v1/account", (401, {"title": "Unauthenticated", "detail": "no"}))

    found = _by_name(run("doctor", **sound).stdout)

    assert found["provider"][0] == "✗"
    assert "REPLICATE_API_TOKEN" in found["provider"]


async def test_doctor_tells_that_purchases_are_held_back(
    sound: dict[str, str], redis_url: str
) -> None:
    async with Redis.from_url(redis_url) as redis:
        breaker = open_breaker(redis)
        await breaker.report_trouble(breaker.turn, "provider_account", is_fatal=True)

    found = _by_name((await asyncio.to_thread(run, "doctor", **sound)).stdout)

    assert found["provider"][0] == "!"
    assert "held back (provider_account, since " in found["provider"]


def test_doctor_uses_the_system_of_this_folder(
    sound: dict[str, str], tmp_path: Path
) -> None:
    with recorded_run(tmp_path, PORT="1", **sound):
        result = run("doctor", "--data-dir", str(tmp_path))

    assert "Settings: those of the system running" in result.stderr
    assert _by_name(result.stdout)["database"][0] == "✓"


def test_examine_needs_no_settings_to_tell_the_python() -> None:
    def load() -> Any:
        raise SystemExit(2)

    python, rest = examine(load)

    assert isinstance(python, Finding)
    assert (python.mark, rest.mark) == (Mark.FINE, Mark.DOUBTFUL)
