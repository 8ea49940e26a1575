"""Keys: who gets in, what they may do, and what is never told."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.keyed import KEYS_ON, People, keyed


@pytest.fixture
async def people(serve: Serve, sandbox: Sandbox) -> AsyncIterator[People]:
    async with keyed(await serve(sandbox, **KEYS_ON)) as people:
        yield people


async def test_a_key_lets_its_owner_in(people: People) -> None:
    answer = await people.alice.post("/api/v1/generate", json={"prompt": "a quiet bay"})

    assert answer.status_code == 202
    assert (await people.nobody.get("/api/v1/jobs")).status_code == 401
