"""Thumbnails over HTTP: who gets them, where they are kept, and that they go with their file."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from PIL import Image

from app.domain.errors import NotFound, StorageUnavailable
from app.runtime import Runtime
from app.services import file_locks, thumbnails
from app.services.media_store import MediaStore, StoredFile, is_key
from app.services.scaling import Scaled
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON, People, keyed
from tests.api.served import Api, check_problem, working
from tests.api.two_owners import add_upload, completed_job, keep
from tests.support.drawings import draw
from tests.support.jobs import JobTable
from tests.support.object_store import BUCKET, aws_environment, run_bucket
from tests.support.waiting import wait_for_async

IMMUTABLE = "public, max-age=31536000, immutable"


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    """The module's API, and nothing in it."""
    return await emptied(shared, shared_sandbox)


def runtime_of(api: Api) -> Runtime:
    runtime: Runtime = api.app.state.runtime
    return runtime


async def made(api: Api, data: bytes, **fields: Any) -> tuple[UUID, StoredFile]:
    """Make a completed job with a picture of this test's own."""
    runtime = runtime_of(api)
    file = await keep(runtime, data)
    return await completed_job(JobTable(runtime.database), file, **fields), file


def beside(api: Api, file: StoredFile) -> list[str]:
    """Name what lies in the store of a file, the file included."""
    folder = api.settings.storage_path / file.key[:2]
    return sorted(path.name for path in folder.glob(f"{file.sha256}*"))


async def colour_of(api: Api, job_id: UUID) -> str | None:
    return (await api.job(job_id)).outputs[0].colour


# ------------------------------------------------------------------------------ what is sent


async def test_a_job_names_its_thumbnails_and_they_are_made_when_asked_for(
    api: Api,
) -> None:
    job_id, file = await made(api, draw(101, side=900))
    before = await api.client.get(f"/api/v1/status/{job_id}")
    output = before.json()["outputs"][0]
    assert output["thumbnails"] == {
        "256": f"/media/{file.key}?w=256",
        "768": f"/media/{file.key}?w=768",
    }
    assert output["colour"] is None
    assert beside(api, file) == [f"{file.sha256}.png"]

    for width in (256, 768):
        answer = await api.client.get(output["thumbnails"][str(width)])
        assert answer.status_code == 200
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert (picture.format, picture.size) == ("WEBP", (width, width))
        headers = answer.headers
        assert headers["content-type"] == "image/webp"
        assert headers["etag"] == f'"{file.sha256}-w{width}"'
        assert headers["cache-control"] == IMMUTABLE
        assert headers["accept-ranges"] == "none"
        assert headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert headers["x-content-type-options"] == "nosniff"
        head = await api.client.head(output["thumbnails"][str(width)])
        assert (head.status_code, head.content) == (200, b"")
        own = {"date": "", "x-request-id": ""}
        assert {**head.headers} | own == {**headers} | own

    assert beside(api, file) == [
        f"{file.sha256}.png{end}" for end in ("", ".w256.webp", ".w768.webp")
    ]
    after = await api.client.get(f"/api/v1/status/{job_id}")
    colour = after.json()["outputs"][0]["colour"]
    assert colour is not None and len(colour) == 7
    assert after.headers["etag"] == before.headers["etag"]
    assert after.json()["version"] == before.json()["version"]


async def test_a_known_thumbnail_is_not_sent_again(api: Api) -> None:
    _, file = await made(api, draw(102))
    path = f"/media/{file.key}?w=256"
    etag = f'"{file.sha256}-w256"'
    for method in ("GET", "HEAD"):
        for condition in (etag, f"W/{etag}", "*"):
            answer = await api.client.request(
                method, path, headers={"If-None-Match": condition}
            )
            assert (answer.status_code, answer.content) == (304, b"")
        for condition in (f'"{file.sha256}"', f'"{file.sha256}-w768"'):
            answer = await api.client.request(
                method, path, headers={"If-None-Match": condition}
            )
            assert answer.status_code == 200


async def test_a_range_of_a_thumbnail_is_all_of_it(api: Api) -> None:
    _, file = await made(api, draw(103))
    path = f"/media/{file.key}?w=256"
    whole = await api.client.get(path)

    part = await api.client.get(path, headers={"Range": "bytes=0-3"})

    assert (part.status_code, part.content) == (200, whole.content)


@pytest.mark.parametrize(
    "wrong", ["0", "255", "0256", "256.0", "", "large", "-1", "٢٥٦"]
)
async def test_other_widths_are_refused(api: Api, wrong: str) -> None:
    _, file = await made(api, draw(104))
    for method in ("GET", "HEAD"):
        answer = await api.client.request(
            method, f"/media/{file.key}", params={"w": wrong}
        )
        assert answer.status_code == 400
    answer = await api.client.get(f"/media/{file.key}", params={"w": wrong})
    problem = check_problem(answer)
    assert problem.code == "invalid_parameter"
    assert problem.detail == "w must be 256 or 768."
    assert problem.error.param == "w"
    twice = await api.client.get(f"/media/{file.key}?w=256&w=256")
    assert twice.status_code == 400
    assert beside(api, file) == [f"{file.sha256}.png"]


async def test_a_thumbnail_has_no_address_of_its_own(api: Api) -> None:
    _, file = await made(api, draw(105))
    assert (await api.client.get(f"/media/{file.key}?w=256")).status_code == 200
    name = f"{file.key}.w256.webp"

    assert not is_key(name)
    for path in (name, f"{name}?w=256", f"{file.key}.w999.webp"):
        assert (await api.client.get(f"/media/{path}")).status_code == 404
    for key in (name, f"../{file.key}"):
        with pytest.raises(NotFound):
            await runtime_of(api).store.head(key)
    with pytest.raises(NotFound):
        await runtime_of(api).store.head(file.key, width=999)


async def test_of_no_file_there_is_no_thumbnail(api: Api) -> None:
    for method in ("GET", "HEAD"):
        for key in (f"ab/ab{'0' * 62}.png", "nothing", "ab/../ab.png"):
            answer = await api.client.request(
                method, f"/media/{key}?w=256", headers={"If-None-Match": "*"}
            )
            assert answer.status_code == 404


async def test_what_nothing_can_be_made_of_is_told_and_not_tried_again(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = await made(api, draw(106))
    (api.settings.storage_path / file.key).write_bytes(draw(106)[:300])
    tried = []
    scale_down = thumbnails.scale_down

    def counting(*given: Any) -> Scaled:
        tried.append(given)
        return scale_down(*given)

    monkeypatch.setattr(thumbnails, "scale_down", counting)
    for _ in range(3):
        answer = await api.client.get(f"/media/{file.key}?w=256")
        problem = check_problem(answer)
        assert (answer.status_code, problem.code) == (422, "no_thumbnail")
        assert "damaged" in problem.detail
    assert len(tried) == 1
    assert beside(api, file) == [f"{file.sha256}.png"]


async def test_many_who_ask_at_once_have_it_made_once(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = await made(api, draw(107, side=400))
    tried = []
    scale_down = thumbnails.scale_down

    def counting(*given: Any) -> Scaled:
        tried.append(given)
        return scale_down(*given)

    monkeypatch.setattr(thumbnails, "scale_down", counting)
    answers = await asyncio.gather(
        *(api.client.get(f"/media/{file.key}?w={width}") for width in (256, 768) * 6)
    )

    assert {one.status_code for one in answers} == {200}
    assert len({one.content for one in answers}) == 2
    assert len(tried) == 1


async def test_too_many_at_once_are_asked_to_come_again(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thumbnails, "_ASKED", 0)
    _, file = await made(api, draw(108))

    answer = await api.client.get(f"/media/{file.key}?w=256")

    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1


async def test_who_asks_for_no_file_takes_nobodys_place(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thumbnails, "_ASKED", 0)

    answer = await api.client.get(f"/media/ab/ab{'0' * 62}.png?w=256")

    assert answer.status_code == 404


async def test_without_a_place_to_keep_it_it_is_sent_all_the_same(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = await made(api, draw(109))

    async def refuse(*given: Any) -> None:
        raise StorageUnavailable("The disk is full.")

    monkeypatch.setattr(MediaStore, "keep_thumbnail", refuse)
    path = f"/media/{file.key}?w=256"
    answer, head = await api.client.get(path), await api.client.head(path)

    assert answer.status_code == head.status_code == 200
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert picture.size == (32, 32)
    assert answer.headers["cache-control"] == IMMUTABLE
    assert head.headers["content-length"] == str(len(answer.content))
    assert beside(api, file) == [f"{file.sha256}.png"]
    etag = {"If-None-Match": answer.headers["etag"]}
    assert (await api.client.get(path, headers=etag)).status_code == 304


# ------------------------------------------------------------------------------ the worker


async def test_the_worker_makes_them_after_the_job_is_done(
    serve: Serve, sandbox: Sandbox
) -> None:
    api = await serve(sandbox)
    async with working(api.settings):
        job = await api.finished((await api.generate("a quiet harbour")).job_id)
        key = job.outputs[0].url.removeprefix("/media/")

        async def is_there() -> bool:
            found = sorted(
                path.name for path in api.settings.storage_path.rglob("*.w[27]*.webp")
            )
            colour = await colour_of(api, job.job_id)
            return len(found) == 2 and colour is not None

        await wait_for_async(is_there, within=20, what="the thumbnails")
        # An equal picture of another job is not worked on again, and gets its colour.
        times = _times(api)
        answer = await api.client.post(f"/api/v1/jobs/{job.job_id}/retry")
        again = await api.finished(UUID(answer.json()["job_id"]))
        assert again.outputs[0].url == f"/media/{key}"

        async def is_known() -> bool:
            return await colour_of(api, again.job_id) is not None

        await wait_for_async(is_known, within=20, what="the colour")
        assert _times(api) == times


def _times(api: Api) -> dict[str, int]:
    found = api.settings.storage_path.rglob("*.w[27]*.webp")
    return {path.name: path.stat().st_mtime_ns for path in found}


async def test_what_is_too_much_for_the_queue_is_left_out(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thumbnails, "_QUEUE", 2)
    runtime = runtime_of(api)
    files = [(await made(api, draw(seed)))[1] for seed in (110, 111, 112)]
    late = thumbnails.Thumbnails(runtime.ledger, runtime.store)
    late.offer([file.key for file in files])
    late.start()

    async def two_are() -> bool:
        return [len(beside(api, file)) for file in files] == [3, 3, 1]

    await wait_for_async(two_are, within=20, what="two files' thumbnails")
    await late.aclose()
    assert (await api.client.get(f"/media/{files[2].key}?w=256")).status_code == 200


async def test_a_file_that_is_gone_or_broken_does_not_end_the_work(api: Api) -> None:
    runtime = runtime_of(api)
    _, broken = await made(api, draw(113))
    (api.settings.storage_path / broken.key).write_bytes(b"GIF89a no more")
    _, whole = await made(api, draw(114))
    late = thumbnails.Thumbnails(runtime.ledger, runtime.store)
    late.start()
    late.offer([f"ab/ab{'0' * 62}.png", broken.key, whole.key])

    async def is_made() -> bool:
        return len(beside(api, whole)) == 3

    await wait_for_async(is_made, within=20, what="the thumbnails")
    await late.aclose()


# ------------------------------------------------------------------------------ deletion


async def test_they_go_with_their_job_and_stay_with_another(api: Api) -> None:
    one, file = await made(api, draw(115))
    other, _ = await made(api, draw(115))
    assert (await api.client.get(f"/media/{file.key}?w=256")).status_code == 200

    assert (await api.client.delete(f"/api/v1/jobs/{one}")).status_code == 204
    assert len(beside(api, file)) == 3
    assert (await api.client.delete(f"/api/v1/jobs/{other}")).status_code == 204
    assert beside(api, file) == []
    assert (await api.client.get(f"/media/{file.key}?w=256")).status_code == 404


async def test_they_go_with_an_upload(api: Api) -> None:
    runtime = runtime_of(api)
    file = await keep(runtime, draw(116))
    upload_id = await add_upload(runtime, file, "default")
    assert (await api.client.get(f"/media/{file.key}?w=768")).status_code == 200

    gone = await api.client.delete(f"/api/v1/uploads/{upload_id}")

    assert gone.status_code == 204
    assert beside(api, file) == []


async def test_a_file_removed_while_they_are_made_leaves_none(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is removed after it was read, before anything was written."""
    job_id, file = await made(api, draw(117))
    together = file_locks.together
    gone = []

    def after_the_deletion(*given: Any) -> Any:
        stack = AsyncExitStack()

        class Late:
            async def __aenter__(self) -> None:
                answer = await api.client.delete(f"/api/v1/jobs/{job_id}")
                gone.append(answer.status_code)
                await stack.enter_async_context(together(*given))

            async def __aexit__(self, *raised: Any) -> bool | None:
                return await stack.__aexit__(*raised)

        return Late()

    monkeypatch.setattr(file_locks, "together", after_the_deletion)
    answer = await api.client.get(f"/media/{file.key}?w=256")

    assert gone == [204]
    assert answer.status_code == 404
    assert beside(api, file) == []


async def test_a_removal_waits_for_what_is_being_written(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, file = await made(api, draw(118))
    keep_thumbnail = MediaStore.keep_thumbnail
    writing, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(store: MediaStore, key: str, width: int, content: bytes) -> None:
        writing.set()
        await go_on.wait()
        await keep_thumbnail(store, key, width, content)

    monkeypatch.setattr(MediaStore, "keep_thumbnail", slowly)
    asked = asyncio.create_task(api.client.get(f"/media/{file.key}?w=256"))
    await writing.wait()
    deleting = asyncio.create_task(api.client.delete(f"/api/v1/jobs/{job_id}"))
    done, _ = await asyncio.wait([deleting], timeout=0.3)
    assert not done
    go_on.set()

    assert (await deleting).status_code == 204
    await asked
    assert beside(api, file) == []


async def test_a_removal_that_is_cut_off_leaves_no_thumbnail_alone(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = await made(api, draw(119))
    assert (await api.client.get(f"/media/{file.key}?w=256")).status_code == 200
    remove = MediaStore._remove

    async def break_off(store: MediaStore, path: str) -> None:
        if is_key(path):
            raise StorageUnavailable("The disk is gone.")
        await remove(store, path)

    monkeypatch.setattr(MediaStore, "_remove", break_off)
    with pytest.raises(StorageUnavailable):
        await runtime_of(api).store.delete([file.key])

    assert beside(api, file) == [f"{file.sha256}.png"]


# ------------------------------------------------------------------------------ whose


@pytest.fixture
async def people(serve: Serve, sandbox: Sandbox) -> AsyncIterator[People]:
    async with keyed(await serve(sandbox, **KEYS_ON)) as people:
        yield people


async def test_what_opens_a_file_opens_its_thumbnails(people: People) -> None:
    runtime = runtime_of(people.api)
    file = await keep(runtime, draw(120))
    job_id = await completed_job(
        JobTable(runtime.database), file, owner="alice", is_public=False
    )
    told = (await people.alice.get(f"/api/v1/status/{job_id}")).json()["outputs"][0]
    link = told["thumbnails"]["256"]
    assert link == f"{told['url']}&w=256"

    for client in (people.nobody, people.bob):
        answer = await client.get(link)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "image/webp"
        assert answer.headers["cache-control"].startswith("private, max-age=")
        for bare in (f"/media/{file.key}?w=256", f"/media/{file.key}?w=768"):
            assert (await client.get(bare)).status_code == 404
            assert (await client.head(bare)).status_code == 404
    signature = link.split("signature=")[1].split("&")[0]
    forged = link.replace(signature, signature[::-1])
    assert (await people.nobody.get(forged)).status_code == 404
    assert (await people.nobody.get(link.replace("w=256", "w=257"))).status_code == 400
    by_key = await people.alice.get(f"/media/{file.key}?w=768")
    assert by_key.status_code == 200
    assert by_key.headers["cache-control"] == "private, no-cache"
    assert by_key.headers["vary"] == "Authorization, X-API-Key"


# ------------------------------------------------------------------------------ a bucket


async def test_those_in_a_bucket_are_fetched_from_there(
    serve: Serve, tmp_path: Path
) -> None:
    async with run_bucket(tmp_path) as endpoint, aiohttp.ClientSession() as http:
        with aws_environment(endpoint):
            api = await serve(storage_url=f"s3://{BUCKET}/media")
        job_id, file = await made(api, draw(121, side=300))
        path = f"/media/{file.key}?w=256"

        for method in ("GET", "HEAD"):
            answer = await api.client.request(method, path)
            assert answer.status_code == 307
            assert answer.headers["cache-control"] == "private, max-age=600"
            async with http.request(method, answer.headers["location"]) as found:
                assert found.status == 200
                assert found.headers["content-type"] == "image/webp"
                content = await found.read()
            if method == "GET":
                with Image.open(io.BytesIO(content)) as picture:
                    assert picture.size == (256, 256)

        location = answer.headers["location"]
        assert (await api.client.delete(f"/api/v1/jobs/{job_id}")).status_code == 204
        async with http.head(location) as found:
            assert found.status == 404
        assert (await api.client.get(path)).status_code == 404
