"""APIs whose pages are visited: one without keys, one that demands them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from pydantic import SecretStr

from app.core.config import Settings
from app.embedded import Valkey
from sandbox.runner import Sandbox
from tests.api.conftest import (  # noqa: F401 - fixtures of these tests, too
    assert_nothing_private,
    sandbox,
    serve,
    shared,
    shared_sandbox,
)
from tests.api.keyed import ADMIN_KEY, METRICS_TOKEN, People, keyed
from tests.api.served import TOKEN, buying_from, served
from tests.support.servers import DatabaseServer


@pytest.fixture(scope="module")
async def people(
    shared_sandbox: Sandbox,  # noqa: F811
    database_server: DatabaseServer,
    template_database: str,
    valkey: Valkey,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[People]:
    """People with keys, for all tests of a module."""
    folder = tmp_path_factory.mktemp("guarded")
    name = database_server.create(template=template_database)
    settings = Settings(
        database_url=SecretStr(database_server.url_of(name)),
        redis_url=SecretStr(valkey.url),
        replicate_api_token=SecretStr(TOKEN),
        auth_required=True,
        admin_api_key=SecretStr(ADMIN_KEY),
        metrics_token=SecretStr(METRICS_TOKEN),
        storage_path=folder / "media",
        log_dir=folder / "logs",
        log_format="json",
        **buying_from(shared_sandbox),
    )
    async with served(settings) as api, keyed(api) as people:
        yield people
    database_server.drop(name)
    assert_nothing_private(folder, api)
