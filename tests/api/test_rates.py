"""Requests a minute and wrong keys, as clients see them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi import APIRouter
from pydantic import SecretStr

from app.api.guard import GuardedRoute
from app.domain.access import Caller, Limits, Scope
from app.domain.errors import (
    BudgetExceeded,
    Conflict,
    Forbidden,
    InProgress,
    OverLimit,
    ServiceError,
    Unauthorized,
    Unavailable,
)
from app.services.attempts import BURST
from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.served import Api, check_problem
from tests.api.test_metrics import scrape, value
from tests.support.tcp_proxy import TcpProxy

ADMIN = "an-administrators-key-of-these-tests"
FIELDS = (
    *("ratelimit", "ratelimit-policy", "x-ratelimit-limit-requests"),
    *("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
)


@dataclass(frozen=True, slots=True)
class OneKey:
    """A gatekeeper that knows one caller."""

    caller: Caller
    demands_keys: bool = False

    async def identify(self, secret: str | None, address: str) -> Caller:
        return self.caller


def limit(api: Api, per_minute: int | None, **changes: Any) -> UUID:
    """Let everybody in with one key of this limit; give the key's id."""
    key_id = uuid4()
    limits = Limits(requests_per_minute=per_minute)
    caller = Caller(key_id=key_id, limits=limits, **changes)
    state = api.app.state
    state.runtime = replace(state.runtime, gatekeeper=OneKey(caller))
    return key_id


def told(answer: httpx.Response) -> tuple[int, int, int, int]:
    """Read limit, window, rest and reset; every way of saying it says the same."""
    fields = answer.headers
    policy = re.fullmatch(r'"requests";q=(\d+);w=(\d+)', fields["ratelimit-policy"])
    state = re.fullmatch(r'"requests";r=(\d+);t=(\d+)', fields["ratelimit"])
    assert policy and state, fields
    for name in FIELDS:
        assert len(fields.get_list(name)) == 1
    assert fields["x-ratelimit-limit-requests"] == policy[1]
    assert fields["x-ratelimit-remaining-requests"] == state[1]
    assert fields["x-ratelimit-reset-requests"] == f"{state[2]}s"
    return int(policy[1]), int(policy[2]), int(state[1]), int(state[2])


# ------------------------------------------------------------------ requests a minute


async def test_every_answer_tells_how_the_quota_stands(api: Api) -> None:
    limit(api, 10)
    requests = [
        ("POST", "/api/v1/generate", 202, {"json": {"prompt": "a mill at dawn"}}),
        ("GET", "/api/v1/jobs", 200, {}),
        ("GET", f"/api/v1/status/{uuid4()}", 404, {}),
        ("GET", "/api/v1/status/x", 400, {}),
        ("POST", "/api/v1/generate", 422, {"json": {}}),
        ("POST", "/api/v1/generate", 413, {"content": b" " * 300_000}),
    ]
    for number, (method, path, status, options) in enumerate(requests, 1):
        answer = await api.client.request(method, path, **options)
        assert answer.status_code == status
        most, window, left, reset = told(answer)
        assert (most, window, left) == (10, 60, 10 - number)
        assert reset == 6 * number


async def test_one_too_many_is_told_when_to_come_back(api: Api) -> None:
    limit(api, 2)
    for _ in range(2):
        await api.listed()

    answer = await api.client.get("/api/v1/jobs")

    assert answer.status_code == 429
    found = check_problem(answer)
    assert (found.code, found.retryable) == ("rate_limited", True)
    assert found.error.type == "rate_limit_error"
    assert told(answer) == (2, 60, 0, 60)
    # Thirty seconds to the next one.
    assert 25 <= int(answer.headers["retry-after"]) <= 30
    assert 25_000 < int(answer.headers["retry-after-ms"]) <= 30_000


async def test_a_refused_submit_accepts_nothing(api: Api) -> None:
    limit(api, 1)
    await api.generate("a mill at dawn")

    answer = await api.client.post("/api/v1/generate", json={"prompt": "another mill"})

    assert answer.status_code == 429
    limit(api, None)
    assert len(await api.listed()) == 1


async def test_a_key_that_may_not_is_told_too(api: Api) -> None:
    limit(api, 5, scopes=frozenset({Scope.READ}))

    answer = await api.client.post("/api/v1/generate", json={"prompt": "a mill"})

    assert answer.status_code == 403
    assert check_problem(answer).error.type == "permission_error"
    assert told(answer)[2] == 4


async def test_a_crash_is_told_too(api: Api) -> None:
    async def crash() -> None:
        raise RuntimeError("broken on purpose")

    router = APIRouter(route_class=GuardedRoute)
    router.add_api_route("/crash", crash, include_in_schema=False)
    api.app.include_router(router)
    limit(api, 5)

    answer = await api.client.get("/crash")

    assert answer.status_code == 500
    assert told(answer)[2] == 4


async def test_without_a_limit_nothing_is_said_or_counted(api: Api) -> None:
    limit(api, None)

    answer = await api.client.get("/api/v1/jobs")

    assert not any(name in answer.headers for name in FIELDS)
    assert not [k async for k in api.app.state.runtime.redis.scan_iter("throttle:key*")]


async def test_processes_share_a_keys_limit(serve: Serve, sandbox: Sandbox) -> None:
    one, other = await serve(sandbox), await serve(sandbox)
    limit(one, 6)
    other.app.state.runtime = replace(
        other.app.state.runtime, gatekeeper=one.app.state.runtime.gatekeeper
    )

    statuses = [
        (await api.client.get("/api/v1/jobs")).status_code
        for api in (one, other, other, one, other, one, other, one)
    ]

    assert statuses == [200] * 6 + [429] * 2


async def test_without_redis_a_share_of_the_limit_is_left(
    serve: Serve, sandbox: Sandbox, wire: TcpProxy, redis_url: str
) -> None:
    password = redis_url.partition("@")[0]
    api: Api = await serve(
        sandbox, redis_url=SecretStr(f"{password}@127.0.0.1:{wire.port}/0")
    )
    limit(api, 40)
    assert told(await api.client.get("/api/v1/jobs"))[2] == 39

    await wire.refuse()

    answers = [await api.client.get("/api/v1/jobs") for _ in range(15)]
    passed = [one for one in answers if one.status_code == 200]
    assert 9 <= len(passed) <= 11
    for answer in answers:
        assert told(answer)[0] == 40
    await wire.restore()


@pytest.fixture
async def wire(redis_url: str) -> AsyncIterator[TcpProxy]:
    parts = httpx.URL(redis_url)
    async with TcpProxy(parts.host, parts.port or 6379) as wire:
        yield wire


@pytest.mark.parametrize(
    ("error", "status", "kind", "wait"),
    [
        (InProgress("wait"), 409, "invalid_request_error", "1"),
        (Conflict("no"), 409, "invalid_request_error", None),
        (BudgetExceeded("no", {"budget": "key"}), 402, "insufficient_quota", None),
        (Forbidden("no"), 403, "permission_error", None),
        (Unauthorized("no"), 401, "authentication_error", None),
        (
            OverLimit("no", retry_after=timedelta(hours=1)),
            429,
            "rate_limit_error",
            "3600",
        ),
        (OverLimit("no", retry_after=timedelta(0)), 429, "rate_limit_error", "1"),
        (Unavailable("no"), 503, "server_error", "2"),
        (
            Unavailable("no", retry_after=timedelta(milliseconds=3100)),
            *(503, "server_error", "4"),
        ),
    ],
)
async def test_an_error_says_whose_it_is_and_when_to_come_back(
    api: Api, error: ServiceError, status: int, kind: str, wait: str | None
) -> None:
    async def refuse() -> None:
        raise error

    api.app.add_api_route("/refuse", refuse, include_in_schema=False)

    answer = await api.client.get("/refuse")

    assert answer.status_code == status
    assert check_problem(answer).error.type == kind
    assert answer.headers.get("retry-after") == wait


# -------------------------------------------------------------------------- wrong keys


@pytest.fixture
async def locked(serve: Serve, sandbox: Sandbox) -> Api:
    """An API that demands a key."""
    found: Api = await serve(
        sandbox, auth_required=True, admin_api_key=SecretStr(ADMIN)
    )
    return found


def wrong(number: int) -> str:
    """Make up a key."""
    return f"mgs_{number:043}"


async def knock(api: Api, secret: str, address: str) -> httpx.Response:
    """Come with a key from an address, as a proxy would tell it."""
    headers = {"authorization": f"Bearer {secret}", "x-forwarded-for": address}
    return await api.client.get("/api/v1/jobs", headers=headers)


async def test_wrong_keys_are_refused_and_then_not_listened_to(locked: Api) -> None:
    answers = [
        await knock(locked, wrong(number), "198.51.100.7")
        for number in range(BURST + 3)
    ]

    assert [one.status_code for one in answers] == [401] * BURST + [429] * 3
    assert check_problem(answers[BURST]).code == "too_many_attempts"
    assert check_problem(answers[0]).error.type == "authentication_error"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 3


async def test_a_right_key_from_the_same_address_is_let_in(locked: Api) -> None:
    for number in range(BURST + 3):
        await knock(locked, wrong(number), "198.51.100.7")

    assert (await knock(locked, ADMIN, "198.51.100.7")).status_code == 200
    assert (await knock(locked, wrong(1000), "198.51.100.8")).status_code == 401
    assert (await knock(locked, wrong(1000), "198.51.100.7")).status_code == 429


async def test_neighbours_of_one_network_are_one(locked: Api) -> None:
    for number in range(BURST):
        await knock(locked, wrong(number), f"2001:db8:1:2::{number + 1:x}")

    assert (await knock(locked, wrong(1000), "2001:db8:1:2:ffff::1")).status_code == 429
    assert (await knock(locked, wrong(1000), "2001:db8:1:3::1")).status_code == 401


async def test_refusals_and_failures_are_counted_without_names(locked: Api) -> None:
    for number in range(BURST + 2):
        await knock(locked, wrong(number), "198.51.100.7")
    headers = {"authorization": f"Bearer {ADMIN}"}
    locked.client.headers.update(headers)
    limit(locked, 1)
    for _ in range(2):
        await locked.client.get("/api/v1/jobs")
    limit(locked, None)

    found = await scrape(locked)

    # The one that finds the bucket empty is looked up and counted, the next is neither.
    assert value(found, "mgs_auth_failures_total") == BURST + 1
    name = "mgs_rate_limited_total"
    assert value(found, name, reason="too_many_attempts") == 2
    assert value(found, name, reason="rate_limited") == 1
    labels = [set(one.labels) for one in found["mgs_rate_limited"].samples]
    assert labels == [{"reason"}] * 2
