"""A served API per test, its provider, and the promise that nothing private is logged."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.config import Settings
from app.embedded import Valkey
from sandbox.runner import Sandbox
from tests.api.served import TOKEN, Api, buying_from, provided, served, working
from tests.support.servers import DatabaseServer
from tests.support.waiting import wait_for_async

Serve = Callable[..., Any]
DEADLOCK = "40P01"


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A provider."""
    async with provided() as sandbox:
        yield sandbox


@pytest.fixture
async def serve(
    settings: Callable[..., Settings], tmp_path: Path
) -> AsyncIterator[Serve]:
    """Serve APIs until the end of the test; afterwards no log may hold anything private."""
    apis: list[Api] = []
    async with AsyncExitStack() as stack:

        async def start(*providers: Sandbox, **changes: Any) -> Api:
            bought = buying_from(providers[0]) if providers else {}
            api = await stack.enter_async_context(served(settings(**bought | changes)))
            apis.append(api)
            return api

        yield start
    for api in apis:
        assert_nothing_private(tmp_path, api)


@pytest.fixture(scope="module")
async def shared_sandbox() -> AsyncIterator[Sandbox]:
    """A provider for all tests of a module."""
    async with provided() as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def shared_changes() -> dict[str, Any]:
    """What the settings of `shared` have besides; for modules to override."""
    return {}


@pytest.fixture(scope="module")
async def shared(
    shared_sandbox: Sandbox,
    shared_changes: dict[str, Any],
    database_server: DatabaseServer,
    template_database: str,
    valkey: Valkey,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Api]:
    """An API for all tests of a module, on a database of its own: see `emptied`."""
    folder = tmp_path_factory.mktemp("shared")
    name = database_server.create(template=template_database)
    settings = Settings(
        database_url=SecretStr(database_server.url_of(name)),
        redis_url=SecretStr(valkey.url),
        replicate_api_token=SecretStr(TOKEN),
        auth_required=False,
        storage_path=folder / "media",
        log_dir=folder / "logs",
        log_format="json",
        **buying_from(shared_sandbox) | shared_changes,
    )
    async with served(settings) as api:
        yield api
    database_server.drop(name)
    assert_nothing_private(folder, api)


async def emptied(api: Api, sandbox: Sandbox) -> Api:
    """Give the shared API as if nobody had used it: no jobs, files, bells or purchases."""
    runtime = api.app.state.runtime
    await wait_for_async(
        partial(_wipe, runtime.database), within=20, what="the tables are empty"
    )
    await runtime.redis.flushall()
    for folder in api.settings.storage_path.glob("??"):
        shutil.rmtree(folder)
    async with httpx.AsyncClient(verify=False) as client:
        await client.post(f"{sandbox.url}/sandbox/reset")
    return api


async def _wipe(database: AsyncEngine) -> bool:
    """Empty the tables; not while a worker that goes on reads them in another order."""
    try:
        async with database.begin() as conn:
            await conn.exec_driver_sql(
                "TRUNCATE jobs, api_keys, owners, submissions, uploads, ledger_entries,"
                " endpoints, notifications CASCADE"
            )
            await conn.exec_driver_sql("DELETE FROM accounts WHERE name <> 'service'")
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != DEADLOCK:
            raise
        return False
    return True


@pytest.fixture
async def api(serve: Serve, sandbox: Sandbox) -> Api:
    """An API with its provider, and no worker."""
    found: Api = await serve(sandbox)
    return found


@pytest.fixture
async def worker(api: Api) -> AsyncIterator[None]:
    """What the worker runs, for `api`."""
    async with working(api.settings):
        yield


def assert_nothing_private(folder: Path, api: Api) -> None:
    """Search every log file of the test for what callers wrote and what opens doors."""
    password = urlsplit(api.settings.database_url.get_secret_value()).password
    private = {TOKEN, *api.contract.said} | ({password} if password else set())
    for file in folder.rglob("*.log*"):
        text = file.read_text()
        found = [one for one in private if one in text]
        assert not found, f"{file.name} holds {found}"
