"""Event streams over a real socket: what is told, to whom, and when they end."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.core.patience import end
from app.api import streams
from app.domain import notices
from app.domain.events import Generated, Progressed, Started, Stored
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON, keyed
from tests.api.served import Api, check_problem, working
from tests.api.test_metrics import scrape, value
from tests.support.event_stream import Stream, Told, streaming
from tests.support.jobs import JobTable, new_job, stored_output
from tests.support.waiting import wait_for_async

SOON = 20.0  # seconds, on a busy machine
ALL = "/api/v1/events"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lost hints made up for soon: what tests write into the tables gives none."""
    monkeypatch.setattr("app.services.live.REREAD", 0.1)


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> AsyncIterator[Api]:
    yield await emptied(shared, shared_sandbox)
    shared.app.state.runtime.stopping.clear()


@pytest.fixture
async def jobs(api: Api) -> JobTable:
    return JobTable(api.app.state.runtime.database)


def path_of(job_id: UUID) -> str:
    return f"/api/v1/jobs/{job_id}/events"


async def log_of(jobs: JobTable, *job_ids: UUID) -> list[tuple[str, int]]:
    """Give the log of the jobs, each in its order."""
    return [
        (str(job_id), row.version)
        for job_id in job_ids
        for row in await jobs.events(job_id)
    ]


async def finish(jobs: JobTable, job_id: UUID) -> None:
    """Bring a new job to its end: six entries in all."""
    await jobs.look(job_id, Started("h-" + job_id.hex), Progressed(0.4), Generated())
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, Stored(1), outputs=[stored_output()])


# ------------------------------------------------------------------------- one job


async def test_a_job_is_told_from_its_birth_to_its_end(
    api: Api, jobs: JobTable
) -> None:
    job_id = (await api.generate("a mill by the river")).job_id
    async with asyncio.timeout(SOON), streaming(api.client, path_of(job_id)) as stream:
        first = await stream.next()
        await finish(jobs, job_id)
        told = [first, *await stream.all()]

    assert [one.place for one in told] == await log_of(jobs, job_id)
    assert [one.id for one in told] == [str(one.data["version"]) for one in told]
    assert [one.event for one in told] == [
        notices.CREATED,
        notices.STARTED,
        notices.UPDATED,
        notices.PROGRESS,
        notices.UPDATED,
        notices.COMPLETED,
    ]
    assert told[3].data["progress"] == 0.4
    assert told[-1].data["status"] == "completed"
    assert stream.retry == 2000


async def test_what_a_worker_does_is_told_at_its_hints(
    api: Api, jobs: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.live.REREAD", 3600.0)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(working(api.settings))
        await stack.enter_async_context(asyncio.timeout(SOON))
        job_id = (await api.generate("a mill by the river")).job_id
        stream = await stack.enter_async_context(streaming(api.client, path_of(job_id)))
        told = await stream.all()
    assert [one.place for one in told] == await log_of(jobs, job_id)
    assert told[-1].event == notices.COMPLETED


@pytest.mark.parametrize("after", [1, 3, 5])
async def test_a_finished_job_goes_on_after_what_was_heard(
    api: Api, jobs: JobTable, after: int
) -> None:
    (job_id,) = await jobs.submit()
    await finish(jobs, job_id)
    rest = (await log_of(jobs, job_id))[after:]
    async with asyncio.timeout(SOON):
        async with streaming(api.client, path_of(job_id), last_id=f"{after}") as one:
            assert [told.place for told in await one.all()] == rest
        async with streaming(api.client, path_of(job_id), after=after) as other:
            assert [told.place for told in await other.all()] == rest


async def test_who_heard_the_end_is_told_to_stay_away(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await finish(jobs, job_id)
    answer = await api.client.get(path_of(job_id), headers={"Last-Event-ID": "6"})
    assert (answer.status_code, answer.content) == (204, b"")


async def test_a_version_of_the_future_is_a_reset(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    async with asyncio.timeout(SOON):
        async with streaming(api.client, path_of(job_id), last_id="99") as stream:
            assert (await stream.next()).event == "reset"
            assert (await stream.next()).place == (str(job_id), 1)


async def test_an_unknown_job_has_no_stream(api: Api) -> None:
    answer = await api.client.get(path_of(uuid4()))
    assert answer.status_code == 404
    assert check_problem(answer).code == "not_found"


# ------------------------------------------------------------------------ all jobs


async def test_all_jobs_are_told_from_now_on(api: Api, jobs: JobTable) -> None:
    async with asyncio.timeout(SOON), streaming(api.client, ALL) as stream:
        await started(api, 1)
        made = [(await api.generate(f"picture number {n}")).job_id for n in range(3)]
        told = [await stream.next() for _ in made]
    assert [one.place for one in told] == await log_of(jobs, *made)
    row = (await jobs.events(made[0]))[0]
    assert told[0].id == f"{row.xid}.{row.id}"


async def test_the_place_is_told_before_there_is_any_event(
    api: Api, jobs: JobTable
) -> None:
    """Or what happens while a new client is cut off would be lost."""
    async with asyncio.timeout(SOON), streaming(api.client, ALL, wait=0) as stream:
        assert await stream.all() == []
    assert stream.last_id is not None
    (job_id,) = await jobs.submit()
    async with asyncio.timeout(SOON):
        async with streaming(api.client, ALL, last_id=stream.last_id) as again:
            assert (await again.next()).place == (str(job_id), 1)


async def test_a_stream_that_is_cut_again_and_again_tells_the_whole_log_once(
    api: Api, jobs: JobTable
) -> None:
    told: list[Told] = []
    last_id: str | None = None
    made: list[UUID] = []
    is_done = asyncio.Event()

    async def work() -> None:
        async with working(api.settings):
            for number in range(12):
                made.append((await api.generate(f"picture number {number}")).job_id)
                await asyncio.sleep(0.05)
            for job_id in made:
                await api.finished(job_id)
        is_done.set()

    async with asyncio.timeout(3 * SOON), asyncio.TaskGroup() as group:
        cuts = 0
        async with streaming(api.client, ALL, wait=0) as stream:
            assert await stream.all() == []
        last_id = stream.last_id
        group.create_task(work())
        while not is_done.is_set() or len(told) < len(await log_of(jobs, *made)):
            async with streaming(api.client, ALL, last_id=last_id) as stream:
                try:
                    async with asyncio.timeout(0.2):
                        async for one in stream:
                            told.append(one)
                except TimeoutError:
                    cuts += 1  # the connection is closed by us, in the middle
            last_id = stream.last_id

    assert cuts >= 3
    places = [one.place for one in told]
    assert len(places) == len(set(places))
    assert sorted(places) == sorted(await log_of(jobs, *made))
    for job_id in made:
        versions = [version for one, version in places if one == str(job_id)]
        assert versions == sorted(versions)


async def test_a_position_of_the_future_is_a_reset(api: Api, jobs: JobTable) -> None:
    async with asyncio.timeout(SOON):
        async with streaming(api.client, ALL, last_id=f"{10**17}.3") as stream:
            told = await stream.next()
            assert (told.event, told.data["reason"]) == ("reset", "unknown_position")
            (job_id,) = await jobs.submit()
            assert (await stream.next()).place == (str(job_id), 1)


@pytest.mark.parametrize("path", [ALL, path_of(UUID(int=1))])
@pytest.mark.parametrize("header", [True, False])
async def test_what_is_no_position_is_refused_by_name(
    api: Api, path: str, header: bool
) -> None:
    name = "Last-Event-ID" if header else "after"
    sent: dict[str, Any] = (
        {"headers": {name: "x"}} if header else {"params": {name: "x"}}
    )
    answer = await api.client.get(path, **sent)
    assert answer.status_code == 400
    problem = check_problem(answer)
    assert problem.code == "invalid_position"
    assert problem.error.param == name


# -------------------------------------------------------------------- how they go on


async def started(api: Api, number: int) -> None:
    """Wait until so many streams are open."""

    async def are_open() -> bool:
        return bool(api.app.state.streams.count == number)

    await wait_for_async(are_open, within=SOON, what=f"{number} open streams")


async def test_a_quiet_stream_says_that_it_is_there(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT", timedelta(seconds=0.05))
    async with asyncio.timeout(SOON), streaming(api.client, ALL, wait=1) as stream:
        assert await stream.all() == []
    assert stream.comments >= 3


async def test_streams_are_counted_and_are_no_slow_answers(api: Api) -> None:
    before = await scrape(api)
    async with asyncio.timeout(SOON), AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(streaming(api.client, ALL))
        await started(api, 3)
        await asyncio.sleep(1.0)
        assert value(await scrape(api), "mgs_event_streams") == 3
    await started(api, 0)  # clients that leave are noticed
    found = await scrape(api)
    assert value(found, "mgs_event_streams") == 0
    name, labels = "mgs_http_request_seconds", {"route": ALL, "method": "GET"}
    count, seconds = (
        value(found, f"{name}_{part}", **labels)
        - value(before, f"{name}_{part}", **labels)
        for part in ("count", "sum")
    )
    assert count == 3
    assert seconds < 3.0  # each was open for a second


async def test_all_streams_end_when_the_process_stops(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    async with asyncio.timeout(SOON), AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(streaming(api.client, path))
            for path in (ALL, path_of(job_id))
        ]
        await opened[1].next()
        await started(api, 2)
        began = time.monotonic()
        api.app.state.runtime.stopping.set()
        for stream in opened:
            assert await stream.all() == []
        assert time.monotonic() - began < 10  # not the minute they had left


async def test_a_process_has_an_end_to_its_streams(api: Api) -> None:
    api.app.state.streams.most = 2
    try:
        async with streaming(api.client, ALL), streaming(api.client, ALL):
            await started(api, 2)
            answer = await api.client.get(ALL)
    finally:
        api.app.state.streams.most = api.settings.max_event_streams
    assert answer.status_code == 503
    assert check_problem(answer).code == "streams_full"


async def test_a_client_that_does_not_read_costs_little_and_misses_nothing(
    api: Api, jobs: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.listeners.ROOM", 50)
    async with asyncio.timeout(3 * SOON):
        async with streaming(api.client, ALL, wait=0) as stream:
            await stream.all()
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect(("127.0.0.1", httpx.URL(api.origin).port))
        reader, writer = await asyncio.open_connection(sock=narrow, limit=1024)
        writer.write(
            f"GET {ALL} HTTP/1.1\r\nHost: x\r\n"
            f"Last-Event-ID: {stream.last_id}\r\n\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        await started(api, 1)
        (live,) = api.app.state.runtime.live._followers[None]
        made: list[UUID] = []
        while not live._is_behind:  # until the buffers between us are full, and its own
            made += await jobs.submit(*(new_job() for _ in range(100)))
            api.app.state.runtime.ledger._on_events()
        assert len(live._queue) <= 50
        text = b""
        while text.count(b"event: job.created") < len(made):
            text += await reader.read(65536)
        writer.close()
    for job_id in made:
        assert text.count(str(job_id).encode()) == 1


# ------------------------------------------------------------------------------- Redis


async def test_without_redis_it_takes_time_and_nothing_else(
    serve: Serve, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.live.REREAD", 2.0)
    api: Api = await serve(sandbox, redis_url="redis://127.0.0.1:9/0")
    jobs = JobTable(api.app.state.runtime.database)
    async with asyncio.timeout(2 * SOON), streaming(api.client, ALL) as stream:
        mine = await api.generate("a mill by the river")
        assert (await stream.next()).place == (str(mine.job_id), 1)
        (others,) = await jobs.submit()  # as another process would
        assert (await stream.next()).place == (str(others), 1)
        waiting = asyncio.create_task(api.job(others, wait=30))
        await finish(jobs, others)
        assert (await waiting).status == "completed"


async def test_those_who_come_together_are_not_let_in_together(api: Api) -> None:
    """Each waits for the log to be read, and none of them is open as yet."""
    api.app.state.streams.most = 2
    try:
        async with asyncio.timeout(SOON):
            answers = await asyncio.gather(
                *(api.client.get(ALL, params={"wait": 1}) for _ in range(8))
            )
    finally:
        api.app.state.streams.most = api.settings.max_event_streams
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) == 2
    assert codes.count(503) == 6


# ------------------------------------------------------------------------------ owners


async def test_owners_hear_of_their_own(serve: Serve, sandbox: Sandbox) -> None:
    api: Api = await serve(sandbox, **KEYS_ON, max_event_streams_per_key=2)
    async with keyed(api) as people, asyncio.timeout(2 * SOON):
        jobs = JobTable(api.app.state.runtime.database)
        async with AsyncExitStack() as stack:

            async def listen(client: httpx.AsyncClient, **params: Any) -> Stream:
                return await stack.enter_async_context(streaming(client, ALL, **params))

            hers, his = await listen(people.alice), await listen(people.bob)
            every = await listen(people.admin)
            of_alice = await listen(people.admin, owner="alice")
            await listen(people.alice)
            full = await people.alice.get(ALL)
            alices, bobs = new_job(owner="alice"), new_job(owner="bob")
            await jobs.submit(bobs)
            await jobs.submit(alices)
            assert (await hers.next()).place == (str(alices.id), 1)
            assert (await of_alice.next()).place == (str(alices.id), 1)
            assert (await his.next()).place == (str(bobs.id), 1)
            both = [(await every.next()).place for _ in range(2)]
            assert both == [(str(bobs.id), 1), (str(alices.id), 1)]
            hidden = await people.bob.get(path_of(alices.id))
            foreign = await people.bob.get(ALL, params={"owner": "alice"})
        assert full.status_code == 429
        assert check_problem(full).code == "too_many_streams"
        assert (hidden.status_code, foreign.status_code) == (404, 403)


async def test_a_revoked_key_ends_its_streams_and_no_others(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox, **KEYS_ON)
    async with keyed(api) as people, asyncio.timeout(2 * SOON):
        job = await people.alice.post("/api/v1/generate", json={"prompt": "a mill"})
        job_id = UUID(job.json()["job_id"])
        async with (
            streaming(people.alice, ALL) as hers,
            streaming(people.alice, path_of(job_id)) as of_job,
            streaming(people.bob, ALL) as his,
        ):
            await of_job.next()
            key = people.keys["alice"].key_id
            await people.admin.delete(f"/api/v1/keys/{key}")
            assert await hers.all() == []
            assert await of_job.all() == []
            other = await people.bob.post("/api/v1/generate", json={"prompt": "a hut"})
            assert (await his.next()).place == (other.json()["job_id"], 1)


async def test_a_revoked_key_ends_its_streams_also_while_many_keys_are_wrong(
    serve: Serve, sandbox: Sandbox
) -> None:
    """Whoever may try no more keys is no reason to go on telling them things."""
    api: Api = await serve(sandbox, **KEYS_ON)
    async with keyed(api) as people, asyncio.timeout(SOON):
        stranger = await people.bearer("no-key-of-ours")

        async def guess() -> int:
            return (await stranger.get("/api/v1/jobs")).status_code

        async def guess_on() -> None:
            while True:
                await guess()

        async with streaming(people.alice, ALL) as hers:
            while await guess() != 429:
                pass
            guessing = asyncio.create_task(guess_on())
            await people.admin.delete(f"/api/v1/keys/{people.keys['alice'].key_id}")

            try:
                assert await hers.all() == []
            finally:
                await end(guessing)


async def test_a_key_that_is_no_administrators_any_more_hears_no_others(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox, **KEYS_ON)
    async with keyed(api) as people, asyncio.timeout(2 * SOON):
        made = await people.key("carol", scopes=["admin"])
        carol = await people.bearer(made.key)
        async with streaming(carol, ALL) as stream:
            body = {"scopes": ["read"]}
            answer = await people.admin.patch(f"/api/v1/keys/{made.key_id}", json=body)
            assert answer.status_code == 200, answer.text
            assert await stream.all() == []
