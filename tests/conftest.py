"""Fixtures every test may use, and the rules every test keeps.

Servers are real: PostgreSQL and Valkey from wheels, once per session.  TEST_DATABASE_URL names
a PostgreSQL server to use instead (its user must be allowed to create databases).

`database_url`  a migrated database of the test's own     `empty_database_url`  without tables
`engine`        an async engine on it                     `jobs`      `JobTable` on it
`redis_url`     a Valkey, wiped before the test           `settings`  a factory of `Settings`
`child_env`     environment for a process under test
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import pytest_socket
import redis
from pydantic import SecretStr
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.config import DatabaseSettings, Settings, get_settings
from app.core.database import open_engine
from app.embedded import Postgres, Valkey
from tests.support import log_net
from tests.support.jobs import JobTable
from tests.support.servers import (
    FAST_AND_LOOSE,
    ROOT,
    DatabaseServer,
    fast_folder,
    migrate,
)

LOOPBACK = ["127.0.0.1", "::1", "localhost"]
NOWHERE = {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none",
    "REDIS_URL": "redis://127.0.0.1:9/0",
    "REPLICATE_API_TOKEN": "r8_for_tests_only",
    "REPLICATE_API_BASE_URL": "http://127.0.0.1:9/v1",
    "AUTH_REQUIRED": "false",
    "LOG_DIR": "",
}

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("default"), database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    """Forget the developer's settings, before anything can read them.

    For this process and its children: a real token must never be near a test.  `app.main` makes
    an application when it is imported; here that one talks to closed ports.
    """
    for name in Settings.model_fields:
        os.environ.pop(name.upper(), None)
    for kind in (DatabaseSettings, Settings):
        kind.model_config["env_file"] = None
    os.environ |= NOWHERE
    config.pluginmanager.register(log_net)
    get_settings.cache_clear()
    get_settings()
    for name in NOWHERE:
        del os.environ[name]


# Where tests run in several processes, files are given out in this order: whoever got the longest
# one last would keep everybody waiting.  Heavy and light ones take turns.
LONGEST = (
    *("system/test_survival.py", "api/test_schemathesis.py", "system/test_prove.py"),
    *("system/test_crash_matrix.py", "system/test_rolling_restart.py"),
    *("browser/test_gallery.py", "browser/test_accessibility.py"),
    *("api/test_cli_keys.py", "services/test_job_runner.py"),
    *("system/test_failing_well.py", "system/test_make_run.py", "api/test_webhooks.py"),
    *("browser/test_create.py", "browser/test_job_page.py", "api/test_callbacks.py"),
)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Put the longest files first in a process that is one of several."""
    if hasattr(config, "workerinput"):
        order = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup() -> None:
    """Allow connections to this machine and to the given test database, no others."""
    given = make_url(os.environ.get("TEST_DATABASE_URL", "postgresql://localhost")).host
    hosts = [*LOOPBACK, given] if given else LOOPBACK
    pytest_socket.socket_allow_hosts(hosts, allow_unix_socket=True)


# ---------------------------------------------------------------------------- PostgreSQL


@pytest.fixture(scope="session")
def database_server() -> Iterator[DatabaseServer]:
    """The session's PostgreSQL server."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        server = DatabaseServer(given)
        yield server
        server.close()
        return
    with (
        fast_folder() as folder,
        Postgres(folder / "postgres", settings=FAST_AND_LOOSE) as postgres,
    ):
        server = DatabaseServer(postgres.url_of("postgres"))
        yield server
        server.close()


@pytest.fixture(scope="session")
def template_database(database_server: DatabaseServer) -> Iterator[str]:
    """The name of a migrated database, to be cloned."""
    name = database_server.create()
    migrate(database_server.url_of(name))
    yield name
    database_server.drop(name)


@pytest.fixture
def database_url(
    database_server: DatabaseServer, template_database: str
) -> Iterator[str]:
    """A migrated, empty database of the test's own."""
    name = database_server.create(template=template_database)
    yield database_server.url_of(name)
    database_server.drop(name)


@pytest.fixture
def empty_database_url(database_server: DatabaseServer) -> Iterator[str]:
    """A database of the test's own, without tables."""
    name = database_server.create()
    yield database_server.url_of(name)
    database_server.drop(name)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine on the test's database, as the service opens it."""
    engine = open_engine(SecretStr(database_url), name="test", pool_size=20)
    yield engine
    await engine.dispose()


@pytest.fixture
def jobs(engine: AsyncEngine) -> JobTable:
    """The jobs of the test's database."""
    return JobTable(engine)


# -------------------------------------------------------------------------------- Valkey


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """The session's Valkey server.  A test that ends it starts its own instead."""
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """The address of a Valkey with nothing in it."""
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


# ------------------------------------------------------------------------------ settings


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Settings]:
    """Make `Settings` from keywords alone: no environment, no `.env`, no network.

    DATABASE_URL and REDIS_URL are the test's own unless given; the provider is a closed port.
    """

    def make(**changes: Any) -> Settings:
        values = _test_settings(tmp_path) | changes
        for name in ("database_url", "redis_url"):
            if name not in values:
                values[name] = request.getfixturevalue(name)
        return Settings(**values)

    return make


@pytest.fixture
def child_env(
    database_url: str, redis_url: str, tmp_path: Path
) -> Callable[..., dict[str, str]]:
    """Make the environment of a process under test from upper-case keywords.

    Start the process in a folder without `.env`; the project is on its PYTHONPATH.
    """

    def make(**changes: str) -> dict[str, str]:
        values: Mapping[str, object] = _test_settings(tmp_path) | {
            "database_url": database_url,
            "redis_url": redis_url,
        }
        ours = {name.upper(): str(value) for name, value in values.items()}
        return {**os.environ, "PYTHONPATH": str(ROOT), **ours, **changes}

    return make


def _test_settings(folder: Path) -> dict[str, Any]:
    return {
        "replicate_api_token": "r8_for_tests_only",
        "replicate_api_base_url": "http://127.0.0.1:9/v1",
        "auth_required": False,
        "storage_path": folder / "media",
        "log_dir": folder / "logs",
        "log_format": "json",
    }
