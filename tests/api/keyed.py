"""An API that demands keys, and the people who have some.

    api = await serve(sandbox, **KEYS_ON)
    async with keyed(api) as people:
        await people.alice.post("/api/v1/generate", json={"prompt": "…"})

`alice` and `bob` may generate and read, each for an owner of the same name; `admin` has the
configured key, `monitor` METRICS_TOKEN, `nobody` none.  Every answer is checked against the
contract, and no key may be found in a log afterwards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from app.models.key_schemas import NewKey
from tests.api.served import Api

ADMIN_KEY = "the-configured-admin-key-of-these-tests"
METRICS_TOKEN = "the-configured-metrics-token-of-tests"
KEYS_ON: dict[str, Any] = {
    "auth_required": True,
    "admin_api_key": ADMIN_KEY,
    "metrics_token": METRICS_TOKEN,
}


@dataclass(slots=True)
class People:
    """Who may call an API, each with a client of their own."""

    api: Api
    stack: AsyncExitStack
    admin: httpx.AsyncClient
    monitor: httpx.AsyncClient
    nobody: httpx.AsyncClient
    alice: httpx.AsyncClient
    bob: httpx.AsyncClient
    keys: dict[str, NewKey] = field(default_factory=dict)

    async def key(self, owner: str, **fields: Any) -> NewKey:
        """Make a key."""
        return await make_key(self.api, self.admin, owner, **fields)

    async def bearer(self, secret: str) -> httpx.AsyncClient:
        """Give a client that sends the key with every request, until the end of the test."""
        return await self.stack.enter_async_context(client_of(self.api, secret))


async def make_key(
    api: Api, admin: httpx.AsyncClient, owner: str, **fields: Any
) -> NewKey:
    """Make a key with an administrator's client."""
    body = {"name": f"{owner}'s", "owner": owner} | fields
    answer = await admin.post("/api/v1/keys", json=body)
    assert answer.status_code == 201, answer.text
    made = NewKey.model_validate_json(answer.content)
    api.contract.said.add(made.key)
    return made


def client_of(api: Api, secret: str | None) -> httpx.AsyncClient:
    """Give a client that sends the key with every request; None: no key."""
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    contract = api.contract
    return httpx.AsyncClient(
        base_url=api.origin,
        headers=headers,
        verify=False,  # nothing here speaks TLS, and reading certificates takes time
        timeout=10,
        event_hooks={"request": [contract.listen], "response": [contract.check]},
    )


@asynccontextmanager
async def keyed(api: Api) -> AsyncIterator[People]:
    """Make keys for two owners of an API served with `KEYS_ON`."""
    api.contract.said |= {ADMIN_KEY, METRICS_TOKEN}
    async with AsyncExitStack() as stack:

        async def client(secret: str | None) -> httpx.AsyncClient:
            return await stack.enter_async_context(client_of(api, secret))

        admin = await client(ADMIN_KEY)
        made = {owner: await make_key(api, admin, owner) for owner in ("alice", "bob")}
        yield People(
            api,
            stack,
            admin=admin,
            monitor=await client(METRICS_TOKEN),
            nobody=await client(None),
            alice=await client(made["alice"].key),
            bob=await client(made["bob"].key),
            keys=made,
        )
