"""The stream an open page listens to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from app.domain.events import Progressed, Started
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON, keyed
from tests.api.served import Api
from tests.support.waiting import wait_for_async
from tests.support.jobs import JobTable, new_job
from tests.web.visitor import Visitor, visiting

Heard = AsyncIterator[tuple[str, str, dict[str, Any]]]


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    return await emptied(shared, shared_sandbox)


@asynccontextmanager
async def listening(visitor: Visitor, after: str | None = None) -> AsyncIterator[Heard]:
    """Open the stream; give (event, id, data) one after the other."""
    headers = {} if after is None else {"Last-Event-ID": after}
    async with visitor.client.stream(
        "GET", "/ui/events", headers=headers, timeout=30
    ) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield _events(answer)


async def _events(answer: httpx.Response) -> Heard:
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
            continue
        if "event" in fields:
            yield fields["event"], fields.get("id", ""), json.loads(fields["data"])
        fields = {}


async def test_small_events_name_the_job_and_say_where_it_stands(api: Api) -> None:
    jobs = JobTable(api.app.state.runtime.database)
    async with visiting(api) as visitor, listening(visitor) as heard:
        (job_id,) = await jobs.submit(new_job())
        await jobs.look(job_id, Started("handle"), Progressed(0.5))
        told = [(await anext(heard))[2] for _ in range(4)]

    assert {one["job"] for one in told} == {str(job_id)}
    assert [one["version"] for one in told] == [1, 2, 3, 4]
    assert (told[0]["name"], told[3]["name"]) == ("job.created", "job.progress")
    said = [one["words"] for one in told]
    assert said == ["waiting", "sending", "drawing", "drawing"]
    assert told[3]["progress"] == 0.5


async def test_whoever_comes_back_hears_what_was_missed(api: Api) -> None:
    jobs = JobTable(api.app.state.runtime.database)
    async with visiting(api) as visitor:
        async with listening(visitor) as heard:
            (first,) = await jobs.submit(new_job())
            _, position, _ = await anext(heard)
        (second,) = await jobs.submit(new_job())
        async with listening(visitor, after=position) as heard:
            kind, _, news = await anext(heard)

    assert (kind, news["job"]) == ("job", str(second))


async def test_a_position_nobody_gave_resets_the_page(api: Api) -> None:
    jobs = JobTable(api.app.state.runtime.database)
    async with visiting(api) as visitor, listening(visitor, after="yesterday") as heard:
        assert (await anext(heard))[0] == "reset"
        (job_id,) = await jobs.submit(new_job())
        while (told := await anext(heard))[2].get("job") != str(job_id):
            pass

    assert told[0] == "job"


async def test_one_hears_of_ones_own_and_only_while_the_key_is_valid(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox, **KEYS_ON)
    jobs = JobTable(api.app.state.runtime.database)
    async with keyed(api) as people, visiting(api) as bob:
        await bob.sign_in(people.keys["bob"].key)
        heard: list[str] = []
        async with listening(bob) as events:
            await jobs.submit(new_job(owner="alice"))
            (own,) = await jobs.submit(new_job(owner="bob"))
            heard.append((await anext(events))[2]["job"])
            await people.admin.delete(f"/api/v1/keys/{people.keys['bob'].key_id}")
            await jobs.submit(new_job(owner="bob"))
            # What comes within a second of the revocation may still be told.
            heard += [news["job"] async for _, _, news in events]

        assert heard[0] == str(own)
        assert (await bob.get("/ui/events")).status_code == 303


async def test_open_pages_are_counted_and_bounded_as_all_streams(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox, **KEYS_ON, max_event_streams_per_key=1)
    async with keyed(api) as people, visiting(api) as bob:
        await bob.sign_in(people.keys["bob"].key)
        async with listening(bob):
            assert api.app.state.streams.count == 1
            assert (await bob.get("/ui/events")).status_code == 429
            # The key's, wherever it listens.
            there = await people.bob.get("/api/v1/events")
            assert there.status_code == 429

        async def is_closed() -> bool:
            return bool(api.app.state.streams.count == 0)

        await wait_for_async(is_closed, within=20, what="the stream is closed")
        async with listening(bob):
            pass


async def test_equal_headers_of_a_page_and_a_program_are_not_one_caller(
    serve: Serve, sandbox: Sandbox
) -> None:
    """A page believes the cookie, the API the key: one must not keep the other alive."""
    api: Api = await serve(sandbox, **KEYS_ON)
    async with keyed(api) as people, visiting(api) as browser:
        await browser.sign_in(people.keys["alice"].key)
        browser.client.headers["Authorization"] = f"Bearer {people.keys['bob'].key}"
        both = [
            browser.client.stream("GET", path, timeout=30)
            for path in ("/ui/events", "/api/v1/events")
        ]
        async with both[0] as of_alice, both[1] as of_bob:
            assert (of_alice.status_code, of_bob.status_code) == (200, 200)
            await people.admin.delete(f"/api/v1/keys/{people.keys['bob'].key_id}")
            async with asyncio.timeout(20):
                async for _ in of_bob.aiter_raw():
                    pass
            assert api.app.state.streams.count == 1
