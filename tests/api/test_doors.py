"""Who gets in where: every route with its scope, what is open, and how others are refused."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Route

from app.api.guard import GuardedRoute
from app.core.config import Settings
from app.domain.access import GRANTABLE, Scope
from app.web.door import PageRoute
from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.keyed import ADMIN_KEY, KEYS_ON, METRICS_TOKEN, People, keyed
from tests.api.served import Api, check_problem, create_app
from tests.api.test_outages import BUSY, PROMISE, RECOVERY, Outage, cut, wired
from tests.support.waiting import wait_for_async

BELIEVED = 1.0  # seconds a key is let in without asking

# Whoever comes may use these: they tell nothing of anybody's, or see for themselves who asks.
OPEN = {
    *("/", "/docs", "/redoc", "/openapi.json"),
    *("/docs-files", "/static"),
    *("/api/v1/health/live", "/api/v1/health/ready"),
    "/api/v1/callbacks/replicate/{attempt_id}",  # signed by the provider
    "/media/{key:path}",
}
# What each other route takes.  A new one goes into one of the two lists, or a test fails.
NEEDED = {
    "POST /api/v1/generate": Scope.GENERATE,
    "GET /api/v1/status/{job_id}": Scope.READ,
    "GET /api/v1/jobs": Scope.READ,
    "POST /api/v1/jobs/{job_id}/cancel": Scope.GENERATE,
    "POST /api/v1/jobs/{job_id}/retry": Scope.GENERATE,
    "DELETE /api/v1/jobs/{job_id}": Scope.GENERATE,
    "GET /api/v1/jobs/{job_id}/manifest": Scope.READ,
    "POST /api/v1/jobs/cancel": Scope.GENERATE,
    "POST /api/v1/jobs/retry": Scope.GENERATE,
    "POST /api/v1/jobs/delete": Scope.GENERATE,
    "POST /api/v1/jobs/download": Scope.READ,
    "GET /api/v1/models": Scope.READ,
    "GET /api/v1/jobs/{job_id}/events": Scope.READ,
    "GET /api/v1/events": Scope.READ,
    "POST /api/v1/uploads": Scope.GENERATE,
    "GET /api/v1/uploads/{upload_id}": Scope.READ,
    "DELETE /api/v1/uploads/{upload_id}": Scope.GENERATE,
    "GET /api/v1/usage": Scope.READ,
    "POST /api/v1/webhooks": Scope.GENERATE,
    "GET /api/v1/webhooks": Scope.READ,
    "GET /api/v1/webhooks/secret": Scope.GENERATE,
    "GET /api/v1/webhooks/deliveries": Scope.READ,
    "GET /api/v1/webhooks/deliveries/{delivery_id}": Scope.READ,
    "POST /api/v1/webhooks/deliveries/{delivery_id}/redeliver": Scope.GENERATE,
    "GET /api/v1/webhooks/{endpoint_id}": Scope.READ,
    "PATCH /api/v1/webhooks/{endpoint_id}": Scope.GENERATE,
    "DELETE /api/v1/webhooks/{endpoint_id}": Scope.GENERATE,
    "GET /api/v1/webhooks/{endpoint_id}/secret": Scope.GENERATE,
    "POST /api/v1/webhooks/{endpoint_id}/rotate": Scope.GENERATE,
    "POST /api/v1/webhooks/{endpoint_id}/test": Scope.GENERATE,
    "POST /api/v1/webhooks/{endpoint_id}/redeliver": Scope.GENERATE,
    "POST /api/v1/keys": Scope.ADMIN,
    "GET /api/v1/keys": Scope.ADMIN,
    "GET /api/v1/keys/{key_id}": Scope.ADMIN,
    "PATCH /api/v1/keys/{key_id}": Scope.ADMIN,
    "DELETE /api/v1/keys/{key_id}": Scope.ADMIN,
    "GET /api/v1/queue": Scope.READ,
    "POST /api/v1/queue/pause": Scope.ADMIN,
    "POST /api/v1/queue/resume": Scope.ADMIN,
    "GET /api/v1/audit": Scope.ADMIN,
    "GET /api/v1/health": Scope.MONITOR,
    "GET /metrics": Scope.MONITOR,
}
# The same for pages, which believe the cookie of who is signed in; None: open to all.
PAGES: dict[str, Scope | None] = {
    "GET /": Scope.READ,
    "HEAD /": Scope.READ,
    "GET /jobs/{job_id}": Scope.READ,
    "GET /ui/gallery": Scope.READ,
    "GET /ui/cards": Scope.READ,
    "GET /ui/events": Scope.READ,
    "GET /ui/jobs/{job_id}/panel": Scope.READ,
    "GET /ui/jobs/{job_id}/manifest": Scope.READ,
    "POST /ui/download": Scope.READ,
    "POST /ui/selection": Scope.GENERATE,
    "POST /ui/jobs/{job_id}/cancel": Scope.GENERATE,
    "POST /ui/jobs/{job_id}/retry": Scope.GENERATE,
    "POST /ui/jobs/{job_id}/vary": Scope.GENERATE,
    "POST /ui/jobs/{job_id}/delete": Scope.GENERATE,
    "POST /ui/jobs/{job_id}/download": Scope.READ,
    "GET /signin": None,
    "HEAD /signin": None,
    "POST /signin": None,
    "POST /signout": None,
    "GET /operations": Scope.ADMIN,
    "GET /ui/operations/now": Scope.ADMIN,
    "GET /ui/operations/failures": Scope.ADMIN,
    "GET /ui/operations/trends": Scope.ADMIN,
    "POST /ui/operations/pause": Scope.ADMIN,
    "POST /ui/operations/resume": Scope.ADMIN,
    "POST /ui/operations/retry": Scope.ADMIN,
    "POST /ui/form": Scope.GENERATE,
    "POST /ui/estimate": Scope.GENERATE,
    "POST /ui/jobs": Scope.GENERATE,
    "POST /ui/pictures": Scope.GENERATE,
    "GET /webhooks": Scope.READ,
    "GET /ui/webhooks/deliveries": Scope.READ,
    "POST /ui/webhooks": Scope.GENERATE,
    "POST /ui/webhooks/{endpoint_id}/rotate": Scope.GENERATE,
    "POST /ui/webhooks/{endpoint_id}/enable": Scope.GENERATE,
    "POST /ui/webhooks/{endpoint_id}/disable": Scope.GENERATE,
    "POST /ui/webhooks/{endpoint_id}/remove": Scope.GENERATE,
    "POST /ui/webhooks/{endpoint_id}/test": Scope.GENERATE,
    "POST /ui/webhooks/{endpoint_id}/redeliver": Scope.GENERATE,
    "POST /ui/deliveries/{delivery_id}/redeliver": Scope.GENERATE,
}


def routes_of(app: FastAPI) -> Iterator[tuple[str, BaseRoute]]:
    """Walk every route there is, documented or not, with its whole path."""
    for route in app.routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield getattr(route, "path", ""), route
            continue
        for inner in router.routes:
            assert isinstance(inner, Route | APIRoute), "walk nested routers, too"
            path = re.sub(r":(endpoint|job)}", "}", inner.path)
            yield route.include_context.prefix + path, inner


@pytest.fixture
async def people(serve: Serve, sandbox: Sandbox) -> AsyncIterator[People]:
    async with keyed(await serve(sandbox, **KEYS_ON)) as people:
        yield people


# ------------------------------------------------------------------------- every route


def test_every_route_is_guarded_or_open_on_purpose(
    settings: Callable[..., Settings],
) -> None:
    app = create_app(settings(database_url="postgresql://h/d", redis_url="redis://h"))
    guarded, others = set(), set()
    pages: dict[str, Scope | None] = {}
    for path, route in routes_of(app):
        if isinstance(route, GuardedRoute):
            guarded |= {f"{method} {path}" for method in route.methods}
        elif isinstance(route, PageRoute):
            pages |= {
                f"{method} {path}": route.needed_scope for method in route.methods
            }
        else:
            others.add(path)

    assert guarded == set(NEEDED)
    assert pages == PAGES
    assert others == OPEN


@pytest.mark.parametrize("scope", GRANTABLE)
async def test_a_key_opens_what_its_scope_says_and_no_more(
    people: People, scope: Scope
) -> None:
    made = await people.key("walker", scopes=[scope.value])
    theirs = await people.bearer(made.key)
    for route, needed in NEEDED.items():
        method, _, template = route.partition(" ")
        path = re.sub(r"\{\w+\}", str(uuid4()), template)

        at_once = {"wait": "0"}  # streams have no end of their own
        answer = await theirs.request(method, path, params=at_once)
        stranger = await people.nobody.request(method, path, params=at_once)

        may = scope in (needed, Scope.ADMIN)
        assert (answer.status_code != 403) == may, route
        assert answer.status_code != 401, route
        assert stranger.status_code == 401, route
        if not may:
            word = "admin" if needed is Scope.MONITOR else needed.value
            challenge = answer.headers["www-authenticate"]
            assert challenge == (
                'Bearer realm="mediagen", error="insufficient_scope", '
                f'scope="{word}"'
            ), route
            assert check_problem(answer).code == "forbidden"


async def test_the_document_says_what_takes_a_key(people: People) -> None:
    paths = (await people.nobody.get("/openapi.json")).json()["paths"]
    secured = {
        f"{method.upper()} {path}"
        for path, operations in paths.items()
        for method, operation in operations.items()
        if operation.get("security")
    }

    # A key opens private files; public ones and signed links need none.
    assert secured == set(NEEDED) | {"GET /media/{key}", "HEAD /media/{key}"}
    for route in NEEDED:
        method, _, path = route.partition(" ")
        answers = paths[path][method.lower()]["responses"]
        assert {"401", "403", "429", "503"} <= set(answers), route
    ill = paths["/api/v1/health"]["get"]["responses"]["503"]["content"]
    assert set(ill) == {"application/json", "application/problem+json"}


# ------------------------------------------------------------------------- being refused

MISSING = ("unauthorized", "Send an API key: Authorization: Bearer mgs_…", None)
INVALID = (
    "invalid_api_key",
    "The API key is unknown, expired or revoked.",
    "invalid_token",
)
TWO = ("unauthorized", "Two different keys were sent: send one of them.", None)
FORM = (
    "unauthorized",
    "Authorization must be: Bearer mgs_…  The key may also be sent as X-API-Key.",
    None,
)
STRANGER = "mgs_" + "A" * 43
REFUSED = [
    ([], MISSING),
    ([("X-API-Key", "")], MISSING),
    ([("Authorization", "Bearer")], MISSING),
    ([("Authorization", f"Bearer {STRANGER}")], INVALID),
    ([("X-API-Key", STRANGER)], INVALID),
    ([("Authorization", f"bearer {ADMIN_KEY[:-1]}")], INVALID),
    ([("Authorization", f"Bearer {ADMIN_KEY} {ADMIN_KEY}")], INVALID),
    ([("X-API-Key", "x" * 20_000)], INVALID),
    ([("X-API-Key", "ключ".encode())], INVALID),
    ([("Authorization", f"Basic {ADMIN_KEY}")], FORM),
    ([("Authorization", ADMIN_KEY)], FORM),
    ([("Authorization", "")], FORM),
    ([("Authorization", f"Bearer {ADMIN_KEY}"), ("X-API-Key", STRANGER)], TWO),
    ([("Authorization", f"Bearer {STRANGER}"), ("X-API-Key", ADMIN_KEY)], TWO),
    ([("X-API-Key", ADMIN_KEY), ("X-API-Key", STRANGER)], TWO),
]


async def test_a_refusal_says_how_to_come_in_and_nothing_else(people: People) -> None:
    texts = set()
    for headers, (code, detail, error) in REFUSED:
        answer = await people.nobody.get("/api/v1/jobs", headers=headers)

        assert answer.status_code == 401, headers
        problem = check_problem(answer)
        assert (problem.code, problem.detail) == (code, detail), headers
        challenge = 'Bearer realm="mediagen"'
        if error is not None:
            challenge += f', error="{error}"'
        assert answer.headers.get_list("www-authenticate") == [challenge], headers
        texts.add(problem.detail)
    assert len(texts) == 4


async def test_revoked_and_expired_are_refused_like_unknown(people: People) -> None:
    made = await people.key("acme")
    await people.admin.delete(f"/api/v1/keys/{made.key_id}")
    soon = datetime.now(UTC) + timedelta(milliseconds=300)
    brief = await people.key("acme", expires_at=soon.isoformat())

    async def refusal(secret: str) -> tuple[Any, ...] | None:
        answer = await people.nobody.get("/api/v1/jobs", headers={"X-API-Key": secret})
        if answer.status_code == 200:
            return None
        body = answer.json() | {"request_id": None}
        return answer.status_code, body, answer.headers["www-authenticate"]

    known = await refusal(STRANGER)
    for secret in (made.key, brief.key):
        found = await wait_for_async(
            partial(refusal, secret), within=3, what="the refusal"
        )
        assert found == known


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {ADMIN_KEY}"},
        {"authorization": f"BEARER   {ADMIN_KEY}"},
        {"X-API-Key": ADMIN_KEY},
        {"X-API-Key": ADMIN_KEY, "Authorization": f"Bearer {ADMIN_KEY}"},
    ],
)
async def test_a_key_may_come_in_either_header(
    people: People, headers: dict[str, str]
) -> None:
    answer = await people.nobody.get("/api/v1/jobs", headers=headers)

    assert answer.status_code == 200


async def test_a_stranger_is_refused_before_the_body_is_read(people: People) -> None:
    answer = await people.nobody.post("/api/v1/generate", content=b"x" * 300_000)
    unknown = await people.nobody.post("/api/v1/jobs/no-uuid/cancel")

    assert answer.status_code == unknown.status_code == 401


# -------------------------------------------------------------------------- an outage


@pytest.mark.parametrize("outage", ["refused", "silent"])
async def test_without_the_database_keys_cannot_be_checked(
    serve: Serve, sandbox: Sandbox, database_url: str, outage: Outage
) -> None:
    async with AsyncExitStack() as wires:
        wire, url = await wired(wires, database_url)
        api: Api = await serve(sandbox, database_url=url, **KEYS_ON)
        async with keyed(api) as people:
            await people.alice.get("/api/v1/models")
            await cut(wire, outage)
            cut_at = time.monotonic()

            async def is_unavailable() -> bool:
                return (await people.alice.get("/api/v1/models")).status_code == 503

            within = BELIEVED + PROMISE + BUSY
            await wait_for_async(is_unavailable, within=within, what="503")
            began = time.monotonic()
            assert began - cut_at < within
            stranger = await people.nobody.get(
                "/api/v1/models", headers={"X-API-Key": STRANGER}
            )
            took = time.monotonic() - began

            assert check_problem(stranger).code == "service_unavailable"
            assert took < PROMISE + BUSY
            # These need no table, and what cannot be a key is refused as ever.
            assert (await people.admin.get("/api/v1/models")).status_code == 200
            assert (await people.monitor.get("/metrics")).status_code == 200
            assert (await people.monitor.get("/api/v1/health")).status_code == 503
            nonsense = {"X-API-Key": "nonsense"}
            answer = await people.nobody.get("/api/v1/models", headers=nonsense)
            assert answer.status_code == 401

            await wire.restore()

            async def is_back() -> bool:
                return (await people.alice.get("/api/v1/models")).status_code == 200

            await wait_for_async(is_back, within=RECOVERY, what="the recovery")


# ------------------------------------------------------------------- figures and health


@pytest.mark.parametrize("path", ["/metrics", "/api/v1/health"])
async def test_figures_need_the_token_or_an_admin(people: People, path: str) -> None:
    statuses = {
        name: (await getattr(people, name).get(path)).status_code
        for name in ("nobody", "alice", "monitor", "admin")
    }

    assert statuses == {"nobody": 401, "alice": 403, "monitor": 200, "admin": 200}
    refused = await people.alice.get(path)
    assert "METRICS_TOKEN" in refused.json()["detail"]
    assert 'scope="admin"' in refused.headers["www-authenticate"]


@pytest.mark.parametrize("path", ["/api/v1/jobs", "/api/v1/keys", "/api/v1/models"])
async def test_the_metrics_token_opens_nothing_else(people: People, path: str) -> None:
    assert (await people.monitor.get(path)).status_code == 403


async def test_probes_are_open_and_say_little(people: People) -> None:
    live = await people.nobody.get("/api/v1/health/live")
    ready = await people.nobody.get("/api/v1/health/ready")

    assert (live.status_code, live.json()) == (200, {"status": "ok"})
    assert ready.status_code == 200
    assert set(ready.json()) == {"status", "version"}


async def test_a_probe_of_a_process_that_stops_says_little_too(people: People) -> None:
    runtime = people.api.app.state.runtime
    runtime.stopping.set()
    try:
        ready = await people.nobody.get("/api/v1/health/ready")
    finally:
        runtime.stopping.clear()

    assert (ready.status_code, ready.json()["status"]) == (503, "down")
    assert set(ready.json()) == {"status", "version"}


# ------------------------------------------------------------------------------- auth off


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic Zm9vOmJhcg=="},
        {"Authorization": "Bearer nonsense", "X-API-Key": "other nonsense"},
        {"Authorization": f"Bearer {METRICS_TOKEN}"},
    ],
)
async def test_with_auth_off_nobody_looks_at_keys(
    serve: Serve, sandbox: Sandbox, headers: dict[str, str]
) -> None:
    changes = KEYS_ON | {"auth_required": False}
    api: Api = await serve(sandbox, **changes)

    for path in ("/api/v1/jobs", "/api/v1/keys", "/metrics", "/api/v1/health"):
        assert (await api.client.get(path, headers=headers)).status_code == 200
    ready = (await api.client.get("/api/v1/health/ready", headers=headers)).json()
    assert set(ready["components"]) == {"database", "storage"}


async def test_debug_asks_for_no_key_unless_told_to(
    serve: Serve, sandbox: Sandbox
) -> None:
    lax: Api = await serve(sandbox, auth_required=None, debug=True)
    strict: Api = await serve(sandbox, auth_required=True, debug=True)

    assert (await lax.client.get("/api/v1/jobs")).status_code == 200
    assert (await strict.client.get("/api/v1/jobs")).status_code == 401
