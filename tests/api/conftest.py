"""A served API per test, its provider, and the promise that nothing private is logged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.core.config import Settings
from sandbox.runner import Sandbox
from tests.api.served import TOKEN, Api, buying_from, provided, served, working

Serve = Callable[..., Any]


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
