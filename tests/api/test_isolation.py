"""Two owners and every route: what is another's is as unknown as what does not exist."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from sqlalchemy import event, select

from app.services.job_records import ENDPOINTS, UPLOADS
from app.services.outbox import NOTIFICATIONS
from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.keyed import KEYS_ON, People, keyed
from tests.api.test_doors import PAGES
from tests.api.two_owners import (
    PLACES,
    RECIPES,
    Ask,
    Belongings,
    Values,
    filled,
    settle_in,
)
from tests.support.jobs import JobTable

PREFIX = "/api/v1"

# What differs between two answers to the same question.
_NAMES = (
    (re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}"), "<id>"),
    (re.compile(r'"request_id":"[^"]*"'), "<request>"),
    (re.compile(r'"seed":\d+'), "<seed>"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z"), "<moment>"),
    (re.compile(r'"latency_ms":[\d.]+'), "<latency>"),
    (re.compile(r'"[0-9a-f]{12}-1"'), "<etag>"),
)
_UNTOLD = re.compile(r"date:|x-request-id:|content-length:|(x-)?ratelimit|retry-after:")


@pytest.fixture
async def people(serve: Serve, sandbox: Sandbox) -> AsyncIterator[People]:
    async with keyed(await serve(sandbox, **KEYS_ON)) as people:
        yield people


def routes(people: People) -> list[tuple[str, str]]:
    """List the operations of the document, as (name in the table, path template)."""
    return [
        (f"{method.upper()} {path.removeprefix(PREFIX)}", path)
        for path, item in people.api.app.openapi()["paths"].items()
        for method in item
    ]


def asks(people: People) -> Iterator[tuple[str, str, Ask]]:
    """Give what to ask; what changes nothing first, what is gone afterwards last."""
    for name, path in sorted(routes(people), key=_rank):
        for place, value in PLACES.items():
            path = path.replace(place, value)
        for ask in RECIPES[name]:
            yield name, path, ask


def _rank(route: tuple[str, str]) -> int:
    return ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"].index(
        route[0].partition(" ")[0]
    )


async def send(
    client: httpx.AsyncClient, name: str, path: str, ask: Ask, values: Values
) -> httpx.Response:
    more: dict[str, Any] = {}
    if ask.json is not None:
        more["json"] = filled(ask.json, values)
    if ask.content is not None:
        more["content"] = ask.content
    return await client.request(
        name.partition(" ")[0],
        filled(path, values),
        params=filled(dict(ask.query), values),
        headers=filled(dict(ask.headers), values),
        **more,
    )


def told(answer: httpx.Response, sent: Values) -> tuple[int, str]:
    """Give all an answer says, with names for what was sent and for what always differs."""
    lines = [f"{name}: {value}" for name, value in sorted(answer.headers.items())]
    lines = [line for line in lines if not _UNTOLD.match(line)]
    text = "\n".join([*lines, answer.text])
    for place, one in sent.items():
        text = text.replace(one, place)
    for pattern, name in _NAMES:
        text = pattern.sub(name, text)
    return answer.status_code, text


# ------------------------------------------------------------------------- every route


async def test_somebody_thought_of_every_route(people: People) -> None:
    """Also of those the document does not show."""
    app = people.api.app
    unknown = [
        f"think about {name}" for name, _ in routes(people) if name not in RECIPES
    ]
    shown = set(app.openapi()["paths"])
    hidden = {
        re.sub(r":\w+}", "}", str(route.path))
        for route in iter_route_contexts(app.routes)
    }
    pages = {"/", "/docs", "/redoc", "/openapi.json", "/static", "/docs-files"}
    pages |= {"/docs/oauth2-redirect", "/favicon.ico"}
    # What people see: tests/web/test_isolation.py.
    pages |= {page.partition(" ")[2] for page in PAGES}
    unknown += [f"think about {path}" for path in sorted(hidden - shown - pages)]

    assert not unknown, unknown


async def test_no_route_tells_anything_of_another_owner(people: People) -> None:
    hers = await settle_in(people)
    before = await snapshot(people, hers)
    wrong: list[str] = []
    for name, path, ask in asks(people):
        for mine, nobodys in hers.values():
            with statements(people) as foreign:
                one = await send(people.bob, name, path, ask, mine)
            with statements(people) as unknown:
                other = await send(people.bob, name, path, ask, nobodys)
            what = f"{name} {dict(ask.query)} {dict(ask.headers)}"
            if one.status_code != ask.status:
                wrong.append(f"{what}: {one.status_code} {one.text}")
            places = f"{path} {ask}"
            first = told(one, {k: v for k, v in mine.items() if k in places})
            second = told(other, {k: v for k, v in nobodys.items() if k in places})
            if first != second:
                wrong.append(f"{what}: {first} {second}")
            if ask.status == 404 and foreign != unknown:
                wrong.append(f"{what}: {foreign} {unknown}")
            sent = f"{one.request.url} {dict(ask.headers)} {filled(ask.json, mine)}"
            said = one.text + str(dict(one.headers))
            leaked = [mark for mark in hers.marks if mark in said and mark not in sent]
            if leaked:
                wrong.append(f"{what}: tells {leaked}")

    assert not wrong, "\n".join(dict.fromkeys(wrong))
    assert await snapshot(people, hers) == before


async def test_the_questions_are_about_what_exists(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice herself is answered; so the test above could fail."""
    # There is no worker here that a test of an endpoint could be waited for.
    monkeypatch.setattr("app.api.webhooks.TEST_PATIENCE", timedelta(0))
    hers = await settle_in(people)
    first = dict(next(hers.values())[0]) | {"<job>": str(hers.jobs["completed"])}
    for name, path, ask in asks(people):
        is_hidden = ask.status == 404 or "<upload>" in str(ask.json)
        if is_hidden and "expires" not in ask.query:
            answer = await send(people.alice, name, path, ask, first)
            assert answer.status_code < 400, f"{name}: {answer.text}"


@contextmanager
def statements(people: People) -> Iterator[list[str]]:
    """Collect what the API asks its tables: as much for an unknown id as for a foreign one."""
    engine = people.api.app.state.runtime.database.sync_engine
    found: list[str] = []

    def note(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "pg_current_snapshot" in statement:
            return  # the log is read for all listeners, beside the requests
        if re.search(r"\b(jobs|assets|uploads|endpoints|notifications)\b", statement):
            found.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield found
    event.remove(engine, "before_cursor_execute", note)


async def snapshot(people: People, hers: Belongings) -> Mapping[str, Any]:
    """Read every row of alice's, and which of her files are there."""
    runtime = people.api.app.state.runtime
    jobs = JobTable(runtime.database)
    found: dict[str, Any] = {
        status: await jobs.snapshot(job_id) for status, job_id in hers.jobs.items()
    }
    async with runtime.database.connect() as conn:
        mine = select(UPLOADS).where(UPLOADS.c.owner == "alice")
        found["uploads"] = [tuple(row) for row in await conn.execute(mine)]
        for table in (ENDPOINTS, NOTIFICATIONS):
            hers_alone = select(table).where(table.c.owner == "alice")
            rows = await conn.execute(hers_alone.order_by(table.c.id))
            found[table.name] = [tuple(row) for row in rows]
            assert found[table.name]
    assert len(found["uploads"]) == 1
    found["files"] = [await runtime.store.head(file) for file in hers.files]
    return found


# ---------------------------------------------------------------------------- the list


async def test_a_list_holds_ones_own(people: People) -> None:
    hers = await settle_in(people)

    async def listed(client: httpx.AsyncClient, **query: Any) -> set[str]:
        answer = await client.get("/api/v1/jobs", params={"limit": 100} | query)
        assert answer.status_code == 200, answer.text
        return {job["job_id"] for job in answer.json()["items"]}

    alices = {str(job_id) for job_id in hers.jobs.values()}
    bobs = await listed(people.bob)
    assert await listed(people.alice) == alices
    assert await listed(people.alice, owner="alice") == alices
    assert len(bobs) == 2 and not bobs & alices
    assert await listed(people.admin) == alices | bobs
    assert await listed(people.admin, owner="alice") == alices
    assert await listed(people.admin, owner="alice", status="completed") == {
        str(hers.jobs["completed"])
    }
    assert await listed(people.admin, owner="nobody") == set()


async def test_administrators_act_for_others(people: People) -> None:
    """A retry stays whose the job was, whoever asks for it."""
    hers = await settle_in(people)
    old = hers.jobs["failed"]

    seen = await people.admin.get(f"/api/v1/status/{old}")
    again = await people.admin.post(f"/api/v1/jobs/{old}/retry")
    ended = await people.admin.post(f"/api/v1/jobs/{hers.jobs['pending']}/cancel")
    gone = await people.admin.delete(f"/api/v1/jobs/{hers.jobs['cancelled']}")

    assert (seen.status_code, seen.json()["owner"]) == (200, "alice")
    assert (again.status_code, again.json()["owner"]) == (202, "alice")
    assert again.json()["visibility"] == "private"
    assert (ended.status_code, ended.json()["status"]) == (200, "cancelled")
    assert gone.status_code == 204
    new = again.json()["job_id"]
    assert (await people.alice.get(f"/api/v1/status/{new}")).status_code == 200
    assert (await people.bob.get(f"/api/v1/status/{new}")).status_code == 404


async def test_keys_of_one_owner_see_the_same_jobs(people: People) -> None:
    hers = await settle_in(people)
    other = await people.bearer((await people.key("alice")).key)

    for job_id in hers.jobs.values():
        assert (await other.get(f"/api/v1/status/{job_id}")).status_code == 200
