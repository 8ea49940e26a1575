"""Private files: sent to a signed link, to their owner's keys, and to nobody else."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import aiohttp
import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import event

from app.api import problems
from app.api.media import router
from app.core.links import LinkSigner
from app.runtime import Runtime, links_of
from app.services.media_links import MediaLinks
from app.services.media_store import open_media_store
from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.keyed import KEYS_ON, People, client_of, keyed
from tests.api.served import Api, working
from tests.api.two_owners import add_upload, completed_job, drawing, keep
from tests.support.jobs import JobTable
from tests.support.object_store import BUCKET, aws_environment, run_bucket

FILE = drawing(1)
IMMUTABLE = "public, max-age=31536000, immutable"


@pytest.fixture
async def people(serve: Serve, sandbox: Sandbox) -> AsyncIterator[People]:
    async with keyed(await serve(sandbox, **KEYS_ON)) as people:
        yield people


@dataclass(frozen=True, slots=True)
class Made:
    """A completed job and its one file."""

    job_id: UUID
    path: str


async def make(people: People, data: bytes = FILE, **fields: Any) -> Made:
    """Make alice a completed private job, or what the fields say."""
    runtime = runtime_of(people)
    file = await keep(runtime, data)
    fields = {"owner": "alice", "is_public": False} | fields
    job_id = await completed_job(JobTable(runtime.database), file, **fields)
    return Made(job_id, f"/media/{file.key}")


def runtime_of(people: People) -> Runtime:
    runtime: Runtime = people.api.app.state.runtime
    return runtime


async def told(client: httpx.AsyncClient, made: Made) -> dict[str, Any]:
    answer = await client.get(f"/api/v1/status/{made.job_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def link_of(people: People, made: Made) -> str:
    return str((await told(people.alice, made))["outputs"][0]["url"])


@contextmanager
def clock(people: People) -> Iterator[list[float]]:
    """Hold the clock of links; the caller moves it."""
    signer: Any = runtime_of(people).links._signer
    now, before = [float(int(time.time()))], signer._clock
    signer._clock = lambda: now[0]
    yield now
    signer._clock = before


# ---------------------------------------------------------------------------- who may


async def test_a_link_is_all_one_needs(people: People) -> None:
    made = await make(people)
    body = await told(people.alice, made)

    link = body["outputs"][0]["url"]
    assert body["visibility"] == "private"
    assert body["image_path"] == link and link.startswith(f"{made.path}?expires=")
    for client in (people.nobody, people.bob, people.alice):
        answer = await client.get(link)
        assert (answer.status_code, answer.content) == (200, FILE)
    head = await people.nobody.head(link)
    part = await people.nobody.get(link, headers={"Range": "bytes=0-3"})
    same = await people.nobody.get(
        link, headers={"If-None-Match": head.headers["etag"]}
    )
    assert (head.status_code, part.status_code, same.status_code) == (200, 206, 304)
    assert part.content == FILE[:4]
    listed = (await people.alice.get("/api/v1/jobs")).json()["items"][0]
    assert listed["outputs"][0]["url"] == link


async def test_a_link_asks_no_table(people: People) -> None:
    link = await link_of(people, await make(people))
    engine = runtime_of(people).database.sync_engine
    asked: list[str] = []

    def note(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        asked.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    assert (await people.nobody.get(link)).status_code == 200
    event.remove(engine, "before_cursor_execute", note)

    assert not [one for one in asked if "jobs" in one or "assets" in one]


async def test_a_key_of_its_owner_opens_a_file(people: People) -> None:
    made = await make(people)
    unknown = made.path[:-5] + ("0" if made.path[-5] != "0" else "1") + ".png"
    other = await people.bearer((await people.key("alice", scopes=["read"])).key)

    for client in (people.alice, other, people.admin):
        answer = await client.get(made.path)
        assert (answer.status_code, answer.content) == (200, FILE)
        assert answer.headers["cache-control"] == "private, no-cache"
        assert answer.headers["vary"] == "Authorization, X-API-Key"
        same = {"If-None-Match": answer.headers["etag"]}
        assert (await client.get(made.path, headers=same)).status_code == 304
        assert (await client.head(made.path)).status_code == 200
    for client in (people.nobody, people.bob):
        hidden, missing = await client.get(made.path), await client.get(unknown)
        assert hidden.status_code == missing.status_code == 404
        assert hidden.headers["cache-control"] == "no-store"
        one, two = hidden.json(), missing.json()
        assert one.pop("instance") != two.pop("instance")
        assert one.pop("request_id") != two.pop("request_id")
        assert one == two
        assert (await client.head(made.path)).status_code == 404


async def test_a_key_that_comes_along_must_be_good(people: People) -> None:
    made = await make(people, is_public=True)
    async with client_of(people.api, "mgs_" + "x" * 43) as stranger:
        assert (await stranger.get(made.path)).status_code == 401
    writer = await people.bearer((await people.key("alice", scopes=["generate"])).key)
    assert (await writer.get(made.path)).status_code == 403


async def test_a_public_jobs_file_is_anybodys(people: People) -> None:
    made = await make(people, is_public=True)
    body = await told(people.alice, made)

    assert body["visibility"] == "public"
    assert body["image_path"] == body["outputs"][0]["url"] == made.path
    for client in (people.nobody, people.bob, people.alice):
        answer = await client.get(made.path)
        assert (answer.status_code, answer.content) == (200, FILE)
        assert answer.headers["cache-control"] == IMMUTABLE
        assert "vary" not in answer.headers


async def test_an_uploads_file_is_its_owners(people: People) -> None:
    runtime = runtime_of(people)
    file = await keep(runtime, FILE)
    await add_upload(runtime, file, "alice")
    path = f"/media/{file.key}"

    assert (await people.alice.get(path)).status_code == 200
    assert (await people.bob.get(path)).status_code == 404
    assert (await people.nobody.get(path)).status_code == 404


async def test_nobody_finds_a_file_without_rows(people: People) -> None:
    path = f"/media/{(await keep(runtime_of(people), FILE)).key}"

    assert (await people.alice.get(path)).status_code == 404
    assert (await people.admin.get(path)).status_code == 200


@pytest.mark.parametrize("name", ["%00", "ab/%00", "..%2f..%2fetc%2fpasswd", "x" * 300])
async def test_odd_names_are_unknown(people: People, name: str) -> None:
    for client in (people.nobody, people.alice, people.admin):
        assert (await client.get(f"/media/{name}")).status_code == 404


async def test_equal_files_of_two_owners(people: People) -> None:
    """What one deletes the other keeps; a third one finds neither."""
    alices, bobs = await make(people), await make(people, owner="bob")
    assert alices.path == bobs.path
    carol = await people.bearer((await people.key("carol")).key)

    assert (await people.bob.get(alices.path)).status_code == 200
    gone = await people.bob.delete(f"/api/v1/jobs/{bobs.job_id}")

    assert gone.status_code == 204
    assert (await people.bob.get(alices.path)).status_code == 404
    assert (await people.alice.get(alices.path)).content == FILE
    assert (await carol.get(alices.path)).status_code == 404
    assert (
        await people.alice.delete(f"/api/v1/jobs/{alices.job_id}")
    ).status_code == 204
    assert (await people.admin.get(alices.path)).status_code == 404


async def test_a_deleted_job_leaves_its_file_to_an_upload(people: People) -> None:
    made = await make(people)
    runtime = runtime_of(people)
    await add_upload(runtime, await keep(runtime, FILE), "bob")

    assert (await people.alice.delete(f"/api/v1/jobs/{made.job_id}")).status_code == 204
    assert (await people.bob.get(made.path)).content == FILE


async def test_one_public_job_among_private_ones_opens_the_file(people: People) -> None:
    private, public = await make(people), await make(
        people, owner="bob", is_public=True
    )

    assert (await people.nobody.get(private.path)).status_code == 200
    await people.bob.delete(f"/api/v1/jobs/{public.job_id}")
    assert (await people.nobody.get(private.path)).status_code == 404
    assert (await people.alice.get(private.path)).status_code == 200


# ------------------------------------------------------------------------- how long


async def test_a_link_dies(people: People) -> None:
    made = await make(people)
    with clock(people) as now:
        link = await link_of(people, made)
        left = int(link.partition("expires=")[2].partition("&")[0]) - int(now[0])
        answer = await people.nobody.get(link)
        assert 3600 <= left <= 5400
        assert answer.headers["cache-control"] == f"private, max-age={left}, immutable"

        now[0] += left - 1
        answer = await people.nobody.get(link)
        assert answer.headers["cache-control"].startswith("private, max-age=")
        now[0] += 1
        dead = await people.nobody.get(link)

        assert dead.status_code == 404
        assert (await people.alice.get(link)).status_code == 200  # by her key
        fresh = await link_of(people, made)
        assert (await people.nobody.get(fresh)).status_code == 200


async def test_a_garbled_link_is_none(people: People) -> None:
    link = await link_of(people, await make(people))
    other = await link_of(people, await make(people, drawing(2)))
    query = other.partition("?")[2]
    forged = [link[:-1], link + "A", link.replace("expires=1", "expires=2")]
    forged += [f"{link.partition('?')[0]}?{query}", f"{link}&{query}"]

    for one in forged:
        assert (await people.nobody.get(one)).status_code == 404
    assert (await people.nobody.get(f"{link}&from=mail")).status_code == 200


async def test_the_etag_changes_when_the_links_do(people: People) -> None:
    made = await make(people)
    path = f"/api/v1/status/{made.job_id}"
    with clock(people) as now:
        first = await people.alice.get(path)
        known = {"If-None-Match": first.headers["etag"]}
        now[0] -= now[0] % 1800 - 1  # early in the window
        first = await people.alice.get(path)
        known = {"If-None-Match": first.headers["etag"]}
        now[0] += 1700
        assert (await people.alice.get(path, headers=known)).status_code == 304
        now[0] += 200
        later = await people.alice.get(path, headers=known, params={"wait": 5})

    assert later.status_code == 200
    assert later.headers["etag"] != first.headers["etag"]
    assert later.json()["version"] == first.json()["version"]
    assert later.json()["image_path"] != first.json()["image_path"]


async def test_the_etag_of_a_public_job_is_for_ever(people: People) -> None:
    made = await make(people, is_public=True)
    path = f"/api/v1/status/{made.job_id}"
    with clock(people) as now:
        first = await people.alice.get(path)
        now[0] += 100_000
        known = {"If-None-Match": first.headers["etag"]}
        assert (await people.alice.get(path, headers=known)).status_code == 304


# ------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("demands_keys", "asked", "expected"),
    [
        (True, None, "private"),
        (True, "private", "private"),
        (True, "public", "public"),
        (False, None, "public"),
        (False, "private", "private"),
        (False, "public", "public"),
    ],
)
async def test_a_job_is_as_visible_as_asked(
    serve: Serve, sandbox: Sandbox, demands_keys: bool, asked: str | None, expected: str
) -> None:
    api: Api = await serve(sandbox, **(KEYS_ON if demands_keys else {}))
    body = {"prompt": "a fence"} | ({"visibility": asked} if asked else {})
    async with keyed(api) if demands_keys else _plain(api) as people:
        made = await people.alice.post("/api/v1/generate", json=body)
        assert (made.status_code, made.json()["visibility"]) == (202, expected)
        read = await people.alice.get(made.headers["location"])
        assert (read.json()["visibility"], read.json()["owner"]) == (
            expected,
            "alice" if demands_keys else "default",
        )
        await people.alice.post(f"/api/v1/jobs/{made.json()['job_id']}/cancel")
        again = await people.alice.post(f"/api/v1/jobs/{made.json()['job_id']}/retry")
        assert (again.status_code, again.json()["visibility"]) == (202, expected)


@asynccontextmanager
async def _plain(api: Api) -> AsyncIterator[Any]:
    """Anybody, where no keys are demanded."""
    yield SimpleNamespace(alice=api.client)


async def test_without_keys_every_file_is_open(api: Api) -> None:
    """Also that of a job made while keys were demanded, or asked to be private."""
    runtime: Runtime = api.app.state.runtime
    file = await keep(runtime, FILE)
    job_id = await completed_job(
        JobTable(runtime.database), file, owner="alice", is_public=False
    )

    body = (await api.client.get(f"/api/v1/status/{job_id}")).json()
    answer = await api.client.get(f"/media/{file.key}")

    assert body["image_path"] == f"/media/{file.key}"
    assert answer.headers["cache-control"] == IMMUTABLE


async def test_a_link_is_neither_stored_nor_logged(people: People) -> None:
    async with working(people.api.settings):
        made = await people.alice.post("/api/v1/generate", json={"prompt": "a kite"})
        done = await people.alice.get(made.headers["location"], params={"wait": 20})
    link = done.json()["outputs"][0]["url"]
    signature = link.rpartition("=")[2]
    people.api.contract.said.add(signature)  # searched for in every log
    assert (await people.nobody.get(link)).status_code == 200
    await people.nobody.get(link.replace("expires=1", "expires=2"))

    async with runtime_of(people).database.connect() as conn:
        for table in ("jobs", "assets", "job_events", "attempts"):
            text = (
                f"SELECT count(*) FROM {table} t WHERE t::text LIKE '%%{signature}%%'"
            )
            assert (await conn.exec_driver_sql(text)).scalar_one() == 0


# ------------------------------------------------------------------------ keys, bucket


def test_the_provider_gets_an_address_that_lasts(settings: Any) -> None:
    common = {"database_url": "postgresql://x@127.0.0.1/x", "redis_url": "redis://x"}
    public = settings(**common, public_base_url="https://pictures.example")
    key = f"ab/{'ab' * 32}.png"

    link = links_of(public).link_of(key, timedelta(minutes=20))

    assert link is not None and link.startswith(
        f"https://pictures.example/media/{key}?"
    )
    query = [tuple(one.split("=")) for one in link.partition("?")[2].split("&")]
    left = links_of(public).seconds_left(key, query)  # type: ignore[arg-type]
    assert left in (1200, 1201)
    assert links_of(settings(**common)).link_of(key, timedelta(minutes=20)) is None


def test_signing_keys_come_from_settings_or_the_token(settings: Any) -> None:
    common = {"database_url": "postgresql://x@127.0.0.1/x", "redis_url": "redis://x"}
    old, new = "o" * 32, "n" * 32
    key = f"ab/{'ab' * 32}.png"

    def made(**changes: Any) -> MediaLinks:
        return links_of(settings(**common, auth_required=True, **changes))

    def opens(link: str, links: MediaLinks) -> bool:
        query = [tuple(one.split("=")) for one in link.partition("?")[2].split("&")]
        return links.seconds_left(key, query) is not None  # type: ignore[arg-type]

    derived = made().now().path(key, is_public=False)
    assert opens(derived, made())
    assert not opens(derived, made(replicate_api_token=SecretStr("r8_another")))
    assert not opens(derived, made(media_signing_keys=old))
    signed = made(media_signing_keys=old).now().path(key, is_public=False)
    assert opens(signed, made(media_signing_keys=f"{new},{old}"))
    assert not opens(signed, made(media_signing_keys=new))


@pytest.fixture(scope="session")
async def endpoint(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with run_bucket(tmp_path_factory.mktemp("moto")) as found:
        yield found


async def test_a_bucket_is_opened_no_longer_than_the_link(endpoint: str) -> None:
    with aws_environment(endpoint):
        bucket = open_media_store(f"s3://{BUCKET}/private")
    runtime: Any = SimpleNamespace(store=bucket)
    file = await keep(runtime, FILE)
    signer = LinkSigner([b"k"], timedelta(hours=1))
    runtime.links = MediaLinks(signer, public_base_url=None, is_guarded=True)
    app = FastAPI()
    app.state.runtime = runtime
    app.include_router(router)
    problems.install(app)
    transport = httpx.ASGITransport(app)
    path = f"/media/{file.key}"
    short, long = timedelta(seconds=90), timedelta(hours=2)
    try:
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://service") as client,
            aiohttp.ClientSession() as http,
        ):
            for life, seconds, cached in ((short, 90, 60), (long, 900, 600)):
                answer = await client.get(signer.sign_for(path, life))
                assert answer.status_code == 307
                link = answer.headers["location"]
                limit = int(link.partition("X-Amz-Expires=")[2].partition("&")[0])
                assert seconds - 2 <= limit <= seconds
                control = answer.headers["cache-control"]
                assert control.startswith("private, max-age=")
                assert cached - 2 <= int(control.rpartition("=")[2]) <= cached
                async with http.get(link) as found:
                    assert await found.read() == FILE
                    assert "public" not in found.headers.get("cache-control", "")
    finally:
        await bucket.aclose()
