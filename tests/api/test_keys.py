"""Keys over HTTP: made, shown once, changed, revoked, and what is never told."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import select

from app.models.key_schemas import AuditPage, Key, KeyPage
from app.services.keys import FORM, KEYS, OWNERS, digest
from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.keyed import KEYS_ON, People, client_of, keyed
from tests.api.served import Api, check_problem
from tests.support.drawings import draw
from tests.support.waiting import wait_for_async

EFFECTIVE = 1.0  # seconds until everybody knows
BUSY = 0.5  # seconds a shared machine may add


@pytest.fixture
async def people(serve: Serve, sandbox: Sandbox) -> AsyncIterator[People]:
    async with keyed(await serve(sandbox, **KEYS_ON)) as people:
        yield people


async def log_of(api: Api) -> list[dict[str, Any]]:
    assert api.settings.log_dir is not None
    text = (api.settings.log_dir / "api.log").read_text()
    return [json.loads(line) for line in text.splitlines()]


async def listed(client: httpx.AsyncClient, **params: Any) -> KeyPage:
    answer = await client.get("/api/v1/keys", params=params)
    assert answer.status_code == 200, answer.text
    return KeyPage.model_validate_json(answer.content)


async def acts(people: People) -> list[tuple[str, str, str]]:
    page = AuditPage.model_validate_json(
        (await people.admin.get("/api/v1/audit")).content
    )
    return [(one.actor, one.action, one.target) for one in page.items]


# --------------------------------------------------------------------------------- making


async def test_a_key_is_shown_once_and_lets_its_owner_in(people: People) -> None:
    answer = await people.admin.post(
        "/api/v1/keys", json={"name": "gallery", "owner": "acme"}
    )

    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    people.api.contract.said.add(made["key"])
    assert FORM.fullmatch(made["key"])
    assert made["key"].startswith(made["prefix"]) and len(made["prefix"]) == 10
    assert (made["scopes"], made["weight"]) == (["generate", "read"], 1)
    shown = await people.admin.get(answer.headers["location"])
    assert shown.json() == {k: v for k, v in made.items() if k != "key"}
    theirs = await people.bearer(made["key"])
    assert (await theirs.get("/api/v1/jobs")).status_code == 200
    assert (
        await theirs.post("/api/v1/generate", json={"prompt": "x" * 9})
    ).status_code == 202


async def test_the_table_has_no_key_and_no_answer_has_its_hash(people: People) -> None:
    made = await people.key("acme")
    runtime = people.api.app.state.runtime

    async with runtime.ledger.reading() as conn:
        rows = (await conn.execute(select(KEYS))).all()
    (row,) = [row for row in rows if row.id == made.key_id]
    answers = [
        (await people.admin.get(path)).text
        for path in ("/api/v1/keys", f"/api/v1/keys/{made.key_id}", "/api/v1/audit")
    ]

    assert row.hash == digest(made.key)
    secret = made.key.removeprefix(made.prefix)
    forms = (made.key, secret, row.hash.hex(), base64.b64encode(row.hash).decode())
    for text in (str(rows), *answers):
        assert made.key not in text and secret not in text
    log = str(await log_of(people.api))
    for text in (log, *answers):
        assert not any(form in text for form in forms)


FULL: dict[str, Any] = {
    "name": "intern",
    "owner": "acme",
    "scopes": ["read"],
    "expires_at": "2130-01-31T12:00:00+02:00",
    "limits": {
        "requests_per_minute": 60,
        "concurrent_jobs": 2,
        "jobs_per_day": 100,
        "models": ["b/c:1", "a/b"],
        "max_outputs": 4,
        "max_pixels": 1024 * 1024,
    },
    "budget": {"job_usd": 0.1, "day_usd": "2.50", "month_usd": "10.000001"},
    "weight": 7,
}


async def test_everything_that_was_asked_for_is_kept(people: People) -> None:
    made = await people.key(**FULL)

    shown = (await people.admin.get(f"/api/v1/keys/{made.key_id}")).json()

    assert {name: shown[name] for name in ("name", "owner", "scopes", "weight")} == {
        name: FULL[name] for name in ("name", "owner", "scopes", "weight")
    }
    assert shown["expires_at"] == "2130-01-31T10:00:00Z"
    assert shown["limits"] == FULL["limits"] | {"models": ["a/b", "b/c:1"]}
    assert shown["budget"] == {
        "job_usd": "0.1",
        "day_usd": "2.5",
        "month_usd": "10.000001",
    }
    assert shown["revoked_at"] is shown["last_used_at"] is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"nmae": "x"}, "/nmae"),
    ({"limits": {"jobs": 1}}, "/limits/jobs"),
    ({"budget": {"year_usd": 1}}, "/budget/year_usd"),
    ({"key": "mgs_mine"}, "/key"),
    ({"name": ""}, "/name"),
    ({"name": "a\nb"}, "/name"),
    ({"name": "x" * 101}, "/name"),
    ({"owner": "Acme"}, "/owner"),
    ({"owner": "-a"}, "/owner"),
    ({"owner": "a" * 65}, "/owner"),
    ({"owner": "a\n"}, "/owner"),
    ({"scopes": []}, "/scopes"),
    ({"scopes": ["read", "read"]}, "/scopes"),
    ({"scopes": ["root"]}, "/scopes/0"),
    ({"scopes": ["monitor"]}, "/scopes/0"),
    ({"expires_at": "2001-01-01T00:00:00Z"}, "/expires_at"),
    ({"expires_at": "2130-01-01T00:00:00"}, "/expires_at"),
    ({"expires_at": "9999-12-31T23:59:59-14:00"}, "/expires_at"),
    ({"limits": {"requests_per_minute": 0}}, "/limits/requests_per_minute"),
    ({"limits": {"jobs_per_day": 2**40}}, "/limits/jobs_per_day"),
    ({"limits": {"models": []}}, "/limits/models"),
    ({"limits": {"models": ["nameless"]}}, "/limits/models/0"),
    ({"limits": {"max_outputs": 17}}, "/limits/max_outputs"),
    ({"budget": {"day_usd": -1}}, "/budget/day_usd"),
    ({"budget": {"day_usd": "0.0000001"}}, "/budget/day_usd"),
    ({"budget": {"day_usd": "NaN"}}, "/budget/day_usd"),
    ({"budget": {"day_usd": 1e12}}, "/budget/day_usd"),
    ({"weight": 0}, "/weight"),
    ({"weight": 1001}, "/weight"),
]


async def test_a_wrong_field_is_named(people: People) -> None:
    path = f"/api/v1/keys/{people.keys['alice'].key_id}"
    before = (await people.admin.get(path)).json()
    for body, pointer in WRONG:
        made = await people.admin.post("/api/v1/keys", json={"name": "x"} | body)

        assert made.status_code == 422, body
        assert [one["pointer"] for one in made.json()["errors"]] == [pointer], body
        changed = await people.admin.patch(path, json=body)
        assert changed.status_code == 422, body
    assert len((await listed(people.admin)).items) == 2
    assert (await people.admin.get(path)).json() == before


async def test_an_unknown_field_of_an_object_is_told_that_objects_fields(
    people: People,
) -> None:
    answer = await people.admin.post("/api/v1/keys", json={"limits": {"jobs": 1}})

    assert "known are requests_per_minute, concurrent_jobs" in answer.json()["detail"]


# ------------------------------------------------------------------------------- changing


async def test_a_change_leaves_what_it_does_not_name(people: People) -> None:
    made = await people.key(**FULL)

    answer = await people.admin.patch(
        f"/api/v1/keys/{made.key_id}",
        json={
            "name": "grown up",
            "expires_at": None,
            "limits": {"concurrent_jobs": None, "max_outputs": 1},
            "budget": {"day_usd": "0"},
            "weight": 9,
        },
    )

    assert answer.status_code == 200
    changed = answer.json()
    before = json.loads(made.model_dump_json(exclude={"key"}))
    assert changed["limits"] == before["limits"] | {
        "concurrent_jobs": None,
        "max_outputs": 1,
    }
    assert changed["budget"] == {
        "job_usd": "0.1",
        "day_usd": "0",
        "month_usd": "10.000001",
    }
    assert (changed["name"], changed["expires_at"]) == ("grown up", None)
    assert (changed["scopes"], changed["owner"]) == (["read"], "acme")
    # The weight is the owner's: another key of theirs shows it, too.
    assert changed["weight"] == 9
    assert (await people.key("acme")).weight == 9


async def test_an_empty_change_changes_nothing(people: People) -> None:
    made = await people.key(**FULL)

    answer = await people.admin.patch(f"/api/v1/keys/{made.key_id}", json={})

    assert answer.status_code == 200
    assert Key.model_validate_json(answer.content) == Key.model_validate(
        made.model_dump(exclude={"key"})
    )


@pytest.mark.parametrize("name", ["name", "scopes", "limits", "budget", "weight"])
async def test_null_is_for_bounds_only(people: People, name: str) -> None:
    path = f"/api/v1/keys/{people.keys['alice'].key_id}"

    answer = await people.admin.patch(path, json={name: None})

    assert answer.status_code == 422
    assert check_problem(answer).error.param == name


async def test_a_revoked_key_cannot_be_changed(people: People) -> None:
    path = f"/api/v1/keys/{people.keys['alice'].key_id}"
    await people.admin.delete(path)

    answer = await people.admin.patch(path, json={"weight": 5, "name": "back"})

    assert answer.status_code == 409
    assert (await people.admin.get(path)).json()["name"] == "alice's"
    runtime = people.api.app.state.runtime
    async with runtime.ledger.reading() as conn:
        assert (await conn.execute(select(OWNERS))).all() == []


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_a_key_that_does_not_exist(people: People, method: str) -> None:
    body = {"json": {}} if method == "PATCH" else {}

    unknown = await people.admin.request(method, f"/api/v1/keys/{uuid4()}", **body)
    wrong = await people.admin.request(method, "/api/v1/keys/mine", **body)

    assert (unknown.status_code, check_problem(unknown).code) == (404, "not_found")
    assert (wrong.status_code, check_problem(wrong).code) == (400, "invalid_parameter")


# -------------------------------------------------------------------------------- listing


async def test_keys_are_listed_newest_first_in_pages(people: People) -> None:
    made = [await people.key("acme", name=str(n)) for n in range(5)]
    cursor, seen = None, []
    while True:
        params = {"limit": 2, "owner": "acme"} | ({"cursor": cursor} if cursor else {})
        page = await listed(people.admin, **params)
        assert len(page.items) <= 2
        seen += [key.key_id for key in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break

    assert seen == [key.key_id for key in reversed(made)]
    everybodys = await listed(people.admin)
    assert {key.owner for key in everybodys.items} == {"acme", "alice", "bob"}


@pytest.mark.parametrize(
    "params", ["owner=Acme", "cursor=nonsense", "limit=0", "limit=101", "owner="]
)
async def test_a_wrong_parameter_of_the_list(people: People, params: str) -> None:
    assert (await people.admin.get(f"/api/v1/keys?{params}")).status_code == 400


# ------------------------------------------------------------------------------- revoking


async def test_a_revoked_key_is_refused_everywhere_within_a_second(
    serve: Serve, sandbox: Sandbox
) -> None:
    here: Api = await serve(sandbox, **KEYS_ON)
    there: Api = await serve(sandbox, **KEYS_ON)
    async with (
        keyed(here) as people,
        client_of(there, people.keys["alice"].key) as elsewhere,
    ):

        async def let_in(client: httpx.AsyncClient) -> bool:
            return (await client.get("/api/v1/models")).status_code == 200

        for client in (people.alice, elsewhere, people.alice, elsewhere):
            assert await let_in(client)
        await people.admin.delete(f"/api/v1/keys/{people.keys['alice'].key_id}")
        revoked = time.monotonic()

        async def nobody_is_let_in() -> bool:
            return not any(
                [await let_in(client) for client in (people.alice, elsewhere)]
            )

        within = EFFECTIVE + BUSY
        await wait_for_async(nobody_is_let_in, within=within, what="the revocation")
        took = time.monotonic() - revoked
        assert took < within
        answer = await elsewhere.get("/api/v1/models")

    assert check_problem(answer).code == "invalid_api_key"


async def test_revoking_again_changes_nothing(people: People) -> None:
    path = f"/api/v1/keys/{people.keys['alice'].key_id}"

    first = await people.admin.delete(path)
    once = (await people.admin.get(path)).json()
    second = await people.admin.delete(path)

    assert (first.status_code, second.status_code) == (204, 204)
    assert first.content == b""
    assert once["revoked_at"] is not None
    assert (await people.admin.get(path)).json() == once
    assert [act[1] for act in await acts(people)].count("key.revoked") == 1


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("keys", "application/json", b'{"owner": "mallory", "scopes": ["admin"]}'),
        ("generate", "application/json", b'{"prompt": "after the key was revoked"}'),
        ("uploads", "image/png", draw(1)),
    ],
    ids=["keys", "generate", "uploads"],
)
async def test_a_slow_body_does_not_outlive_its_key(
    people: People, path: str, kind: str, body: bytes
) -> None:
    made = await people.key("mallory", scopes=["generate", "read", "admin"])
    revoked = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:10]
        await revoked.wait()
        yield body[10:]

    async with client_of(people.api, made.key) as client:
        headers = {"Content-Type": kind}
        sending = asyncio.create_task(
            client.post(f"/api/v1/{path}", content=slowly(), headers=headers)
        )
        await asyncio.sleep(0.1)  # let in
        assert (await client.get("/api/v1/jobs")).status_code == 200
        await revoke(people, client, made.key_id)
        revoked.set()
        answer = await sending

    assert (answer.status_code, check_problem(answer).code) == (401, "invalid_api_key")
    assert (await people.admin.get("/api/v1/jobs")).json()["items"] == []
    assert len((await listed(people.admin, owner="mallory")).items) == 1


async def test_a_wait_does_not_outlive_its_key(people: People) -> None:
    made = await people.key("alice")
    job = (await people.alice.post("/api/v1/generate", json={"prompt": "a"})).json()

    async with client_of(people.api, made.key) as client:
        path = f"/api/v1/status/{job['job_id']}"
        waiting = asyncio.create_task(client.get(path, params={"wait": 30}))
        await asyncio.sleep(0.1)  # let in
        await revoke(people, client, made.key_id)
        await people.alice.post(f"/api/v1/jobs/{job['job_id']}/cancel")
        answer = await waiting

    assert answer.status_code == 401


async def revoke(people: People, client: httpx.AsyncClient, key_id: UUID) -> None:
    """Revoke a key, and wait until it is refused."""
    answer = await people.admin.delete(f"/api/v1/keys/{key_id}")
    assert answer.status_code == 204

    async def is_refused() -> bool:
        return (await client.get("/api/v1/jobs")).status_code == 401

    await wait_for_async(is_refused, within=3, what="the key to be dead")


async def test_a_key_ends_when_it_expires(people: People) -> None:
    end = datetime.now(UTC) + timedelta(seconds=1)
    made = await people.key("acme", expires_at=end.isoformat())
    theirs = await people.bearer(made.key)

    async def is_over() -> bool:
        now = datetime.now(UTC)
        status = (await theirs.get("/api/v1/models")).status_code
        assert (status == 200) or now >= end - timedelta(seconds=BUSY)
        return status == 401

    await wait_for_async(is_over, within=1 + EFFECTIVE + BUSY, what="the expiry")


async def test_its_last_use_is_shown(people: People) -> None:
    path = f"/api/v1/keys/{people.keys['alice'].key_id}"
    assert (await people.admin.get(path)).json()["last_used_at"] is None

    await people.alice.get("/api/v1/models")

    async def is_noted() -> bool:
        return (await people.admin.get(path)).json()["last_used_at"] is not None

    await wait_for_async(is_noted, within=5, what="the last use")
    assert (await people.admin.get("/api/v1/keys")).status_code == 200


# ------------------------------------------------------------------- nobody is locked out


async def test_an_admins_key_can_do_what_the_configured_one_can(people: People) -> None:
    made = await people.key("ops", scopes=["admin"])
    theirs = await people.bearer(made.key)

    other = await theirs.post("/api/v1/keys", json={"name": "of an admin's"})
    people.api.contract.said.add(other.json()["key"])
    answer = await theirs.delete(f"/api/v1/keys/{made.key_id}")

    assert (other.status_code, answer.status_code) == (201, 204)
    assert (await people.admin.get("/api/v1/keys")).status_code == 200


async def test_the_log_tells_when_nobody_can_make_keys_any_more(
    serve: Serve, sandbox: Sandbox
) -> None:
    open_api: Api = await serve(sandbox)
    made = (
        await open_api.client.post("/api/v1/keys", json={"scopes": ["admin"]})
    ).json()
    closed: Api = await serve(sandbox, auth_required=True)
    closed.contract.said.add(made["key"])
    async with client_of(closed, made["key"]) as admin:
        answer = await admin.delete(f"/api/v1/keys/{made['key_id']}")

    assert answer.status_code == 204
    warnings = [
        line for line in await log_of(closed) if line["event"] == "auth.no_admin_key"
    ]
    assert "ADMIN_API_KEY" in warnings[-1]["remedy"]


@pytest.mark.parametrize("has_one", [False, True])
async def test_the_log_tells_at_start_when_nobody_can_make_keys(
    serve: Serve, sandbox: Sandbox, has_one: bool
) -> None:
    if has_one:
        open_api: Api = await serve(sandbox)
        await open_api.client.post("/api/v1/keys", json={"scopes": ["admin"]})

    api: Api = await serve(sandbox, auth_required=True)

    async def is_known() -> bool:
        if has_one:  # nothing will be said; when it was asked, all is known
            return await api.app.state.runtime.gatekeeper._knows_admin()
        return "auth.no_admin_key" in str(await log_of(api))

    await wait_for_async(is_known, within=5, what="the warning")
    events = [line["event"] for line in await log_of(api)]
    assert events.count("auth.no_admin_key") == (0 if has_one else 1)


# ---------------------------------------------------------------------------------- audit


async def test_every_act_of_an_administrator_is_written_down(people: People) -> None:
    made = await people.key("ops", scopes=["admin"], name="the night shift")
    theirs = await people.bearer(made.key)
    path = f"/api/v1/keys/{people.keys['bob'].key_id}"
    await theirs.patch(path, json={"weight": 3}, headers={"X-Request-ID": "find-me"})
    await theirs.delete(path)

    answer = await people.admin.get("/api/v1/audit")
    found = AuditPage.model_validate_json(answer.content)

    assert [(one.actor, one.action, one.target) for one in found.items] == [
        (f"key:{made.key_id}", "key.revoked", str(people.keys["bob"].key_id)),
        (f"key:{made.key_id}", "key.changed", str(people.keys["bob"].key_id)),
        ("ADMIN_API_KEY", "key.created", str(made.key_id)),
        ("ADMIN_API_KEY", "key.created", str(people.keys["bob"].key_id)),
        ("ADMIN_API_KEY", "key.created", str(people.keys["alice"].key_id)),
    ]
    changed, created = found.items[1], found.items[2]
    assert changed.details == {"weight": 3}
    assert (changed.address, changed.request_id) == ("127.0.0.1", "find-me")
    assert created.details == {
        "prefix": made.prefix,
        "name": "the night shift",
        "owner": "ops",
        "scopes": ["admin"],
    }
    told = [line for line in await log_of(people.api) if line["event"] == "admin.acted"]
    assert len(told) == 5
    assert told[3]["request_id"] == "find-me"
    assert (told[3]["action"], told[3]["actor"]) == (changed.action, changed.actor)


async def test_what_cannot_be_written_down_is_not_done(people: People) -> None:
    path = f"/api/v1/keys/{people.keys['alice'].key_id}"
    before = (await people.admin.get("/api/v1/keys")).json()
    async with people.api.app.state.runtime.database.begin() as conn:
        await conn.exec_driver_sql("ALTER TABLE audit_events RENAME TO gone")

    # A 500 is in no document: this client does not look it up there.
    origin, headers = people.api.origin, people.admin.headers
    async with httpx.AsyncClient(base_url=origin, headers=headers) as admin:
        for method, at, body in (
            ("POST", "/api/v1/keys", {"name": "x", "weight": 3}),
            ("PATCH", path, {"name": "x", "weight": 3}),
            ("DELETE", path, None),
        ):
            answer = await admin.request(method, at, json=body)
            assert answer.status_code == 500, method

    assert (await people.admin.get("/api/v1/keys")).json() == before


async def test_what_is_refused_is_no_act(people: People) -> None:
    before = await acts(people)

    await people.admin.post("/api/v1/keys", json={"owner": "NO"})
    await people.admin.patch(f"/api/v1/keys/{uuid4()}", json={"weight": 5})
    await people.admin.delete(f"/api/v1/keys/{uuid4()}")
    await people.alice.post("/api/v1/keys", json={"name": "mine"})

    assert await acts(people) == before


async def test_the_audit_log_comes_in_pages(people: People) -> None:
    for n in range(3):
        await people.key("acme", name=str(n))
    cursor, seen = None, []
    while True:
        params: dict[str, Any] = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        answer = await people.admin.get("/api/v1/audit", params=params)
        page = AuditPage.model_validate_json(answer.content)
        seen += [one.id for one in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break

    assert len(seen) == 5 and seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("cursor", ["x", "AAAA", "_" * 11, "", "ü"])
async def test_a_cursor_nobody_gave(people: People, cursor: str) -> None:
    answer = await people.admin.get("/api/v1/audit", params={"cursor": cursor})

    assert (answer.status_code, check_problem(answer).code) == (400, "invalid_cursor")
