"""Pictures that come in: over real HTTP, whole, broken, too large, and somebody else's."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tracemalloc
from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.requests import Request

from app.api.bodies import Pace
from app.api.multipart import file_of
from app.domain.errors import NotFound
from app.services.housekeeping import REST, RemoveUnusedUploads
from app.services.media_store import is_key
from app.services.upload_rows import Upload
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON, People, keyed
from tests.api.served import Api, check_problem, working
from tests.support.drawings import draw, pixel_bomb
from tests.support.waiting import wait_for_async

UPLOADS = "/api/v1/uploads"
BOUNDARY = "a-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Sandbox:
    return shared_sandbox


@pytest.fixture
async def api(shared: Api, sandbox: Sandbox) -> Api:
    return await emptied(shared, sandbox)


@pytest.fixture
def database_url(shared: Api) -> str:
    """The API's database, so that `jobs` are its jobs."""
    return shared.settings.database_url.get_secret_value()


async def send(api: Api, content: bytes, **headers: str) -> httpx.Response:
    return await api.client.post(
        UPLOADS, files={"file": ("a.png", content, "image/png")}, headers=headers
    )


async def uploaded(api: Api, content: bytes, **headers: str) -> dict[str, Any]:
    answer = await send(api, content, **headers)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def part(content: bytes, *, name: str = "file", headers: bytes = b"") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="x"\r\n'
    head = f"--{BOUNDARY}\r\n{disposition}".encode()
    return head + headers + b"\r\n" + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


def files_of(api: Api) -> list[Path]:
    folder = api.settings.storage_path
    found = [path for path in folder.rglob("*.*") if path.is_file()]
    # Thumbnails come some time later, and are looked at elsewhere.
    return [path for path in found if is_key(str(path.relative_to(folder)))]


async def rows_of(api: Api) -> list[Any]:
    async with api.app.state.runtime.database.connect() as conn:
        found = await conn.exec_driver_sql("SELECT * FROM uploads ORDER BY id")
        return list(found)


async def age(api: Api, days: float) -> None:
    """Move the last use of every upload into the past."""
    async with api.app.state.runtime.database.begin() as conn:
        await conn.exec_driver_sql(
            f"UPDATE uploads SET used_at = used_at - interval '{days} days'"
        )


@pytest.fixture
async def people(serve: Serve, sandbox: Sandbox) -> AsyncIterator[People]:
    """Two owners of an API that demands keys."""
    async with keyed(await serve(sandbox, **KEYS_ON)) as found:
        yield found


# ------------------------------------------------------------------------------ accepted


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "AVIF"])
async def test_a_picture_is_kept_and_described(api: Api, kind: str) -> None:
    content = draw(1, side=40, kind=kind)

    answer = await send(api, content)

    body = answer.json()
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"{UPLOADS}/{body['upload_id']}"
    assert body["uri"] == f"upload:{body['upload_id']}"
    assert body["content_type"] == f"image/{kind.lower()}"
    assert (body["width"], body["height"]) == (40, 40)
    assert body["size_bytes"] == len(content)
    assert body["sha256"] == hashlib.sha256(content).hexdigest()
    (file,) = files_of(api)
    assert file.read_bytes() == content
    assert (await api.client.get(answer.headers["location"])).json() == body


async def test_the_bare_picture_is_as_good_as_a_form(api: Api) -> None:
    content = draw(2)

    form = await uploaded(api, content)
    bare = await api.client.post(
        UPLOADS, content=content, headers={"Content-Type": "image/png"}
    )

    assert bare.status_code == 201
    assert bare.json()["upload_id"] == form["upload_id"]


async def test_the_same_bytes_again_are_the_same_upload_used_anew(api: Api) -> None:
    first = await uploaded(api, draw(3))
    await age(api, 3)

    again = await uploaded(api, draw(3))

    assert again["upload_id"] == first["upload_id"]
    assert again["created_at"] == first["created_at"]
    assert again["expires_at"] >= first["expires_at"]
    assert len(await rows_of(api)) == len(files_of(api)) == 1


async def test_what_the_caller_says_of_the_file_is_not_believed(api: Api) -> None:
    files = {"file": ("../../etc/passwd", draw(4), "text/html")}

    answer = await api.client.post(UPLOADS, files=files)

    assert answer.status_code == 201
    assert answer.json()["content_type"] == "image/png"


async def test_a_large_picture_is_never_whole_in_memory(
    serve: Serve, tmp_path: Path
) -> None:
    api: Api = await serve()
    picture = tmp_path / "large.png"
    picture.write_bytes(draw(5, side=2600, compressed=False))
    size = picture.stat().st_size
    assert 20_000_000 < size < api.settings.max_upload_bytes

    async def body() -> AsyncIterator[bytes]:
        yield part(b"")[:-2]
        with picture.open("rb") as file:
            while chunk := file.read(64 * 1024):
                yield chunk
        yield b"\r\n" + END

    tracemalloc.start()
    try:
        answer = await api.client.post(
            UPLOADS, content=body(), headers=FORM, timeout=60
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert answer.status_code == 201, answer.text
    assert answer.json()["size_bytes"] == size
    assert peak < size / 4


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty"),
        (b"just text", "unknown kind"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (draw(6)[:-900], "damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "damaged"),
        (b"GIF89a" + draw(6)[6:], "damaged"),
        (pixel_bomb(), "pixels"),
    ],
    ids=["empty", "text", "svg", "cut", "hollow", "wrong magic", "bomb"],
)
async def test_what_is_no_picture_is_refused(
    api: Api, content: bytes, says: str
) -> None:
    answer = await send(api, content)

    problem = check_problem(answer)
    assert (answer.status_code, problem.code) == (422, "invalid_file")
    assert problem.error.param == "file"
    assert says in problem.detail
    assert files_of(api) == await rows_of(api) == []


def long_header(size: int) -> bytes:
    return b"X-Long: " + b"x" * size + b"\r\n"


PICTURE = draw(7)


@pytest.mark.parametrize(
    "body, status, code",
    [
        (part(PICTURE), 400, "bad_request"),
        (part(PICTURE)[:-40] + END[:5], 400, "bad_request"),
        (b"not a form at all", 400, "bad_request"),
        (part(PICTURE, headers=long_header(10_000)) + END, 400, "bad_request"),
        (part(PICTURE, headers=b"X: y\r\n" * 20) + END, 400, "bad_request"),
        (part(b"x" * 20_000, name="other") + END, 422, "invalid_request"),
        (part(PICTURE) + part(b"x", name="other") + END, 422, "invalid_request"),
        (part(PICTURE) + part(draw(8)) + END, 422, "invalid_request"),
        (END, 422, "invalid_request"),
        (part(PICTURE) + END + b"\r\n" + b"x" * 40_000, 400, "bad_request"),
    ],
    ids=(
        "no end,broken off,no form,huge header,many headers,other part,part too many,"
        "two files,no file,huge epilogue"
    ).split(","),
)
async def test_a_form_that_is_not_one_file_is_refused(
    api: Api, body: bytes, status: int, code: str
) -> None:
    answer = await api.client.post(UPLOADS, content=body, headers=FORM)

    assert (answer.status_code, check_problem(answer).code) == (status, code)
    assert files_of(api) == await rows_of(api) == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "application/json"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "nonsense"},
        {"Content-Type": "multipart/mixed; boundary=x"},
        {"Content-Type": "image/png", "Content-Encoding": "gzip"},
        {"Content-Type": 'multipart/form-data; boundary="' + ";" * 600},
    ],
    ids=lambda headers: str(headers)[:60],
)
async def test_other_media_types_are_not_taken(
    api: Api, headers: dict[str, str]
) -> None:
    answer = await api.client.post(UPLOADS, content=PICTURE, headers=headers)

    assert (answer.status_code, check_problem(answer).code) == (
        415,
        "unsupported_media_type",
    )


@pytest.mark.parametrize(
    "boundary",
    [
        *("", "; boundary=", f"; boundary={'x' * 300}"),
        # Pieces that the library cannot put in order.
        "; boundary*=a; boundary*0=b",
    ],
    ids=lambda boundary: boundary[:30],
)
async def test_a_form_needs_a_boundary(api: Api, boundary: str) -> None:
    headers = {"Content-Type": f"multipart/form-data{boundary}"}

    answer = await api.client.post(UPLOADS, content=END, headers=headers)

    assert answer.status_code == 400


@pytest.mark.parametrize("is_form", [True, False], ids=["form", "bare"])
@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "chunked"])
async def test_more_than_the_limit_is_too_large(
    serve: Serve, is_form: bool, is_declared: bool
) -> None:
    api: Api = await serve(max_upload_bytes=20_000)
    content = draw(9, side=100)
    assert len(content) > 20_000
    body = part(content) + END if is_form else content

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 4096):
            yield body[start : start + 4096]

    answer = await api.client.post(
        UPLOADS,
        content=body if is_declared else chunks(),
        headers=FORM if is_form else {"Content-Type": "image/png"},
    )

    assert (answer.status_code, check_problem(answer).code) == (413, "body_too_large")
    assert files_of(api) == await rows_of(api) == []


async def test_a_part_with_an_odd_name_is_refused(api: Api) -> None:
    odd = b'Content-Disposition: form-data; name*=a; name*0="b"\r\n\r\n'
    body = f"--{BOUNDARY}\r\n".encode() + odd + PICTURE + b"\r\n" + END

    answer = await api.client.post(UPLOADS, content=body, headers=FORM)

    assert (answer.status_code, check_problem(answer).code) == (422, "invalid_request")


async def test_a_picture_of_just_the_limit_is_taken(serve: Serve) -> None:
    content = draw(10, side=100)
    api: Api = await serve(max_upload_bytes=len(content))

    assert (await send(api, content)).status_code == 201


async def test_a_client_that_goes_away_leaves_nothing(api: Api) -> None:
    parts = urlsplit(api.origin)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"POST {UPLOADS} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    writer.write(
        f"{head}Content-Length: {len(PICTURE)}\r\n\r\n".encode() + PICTURE[:50]
    )
    await writer.drain()
    writer.write_eof()
    writer.close()

    async def is_counted() -> bool:
        await asyncio.sleep(0)
        return '"/api/v1/uploads"' in (await api.client.get("/metrics")).text

    await wait_for_async(is_counted, within=10, what="the request ended", every=0.2)
    assert files_of(api) == await rows_of(api) == []


@given(cuts=st.lists(st.integers(0, 20_000), max_size=40))
@settings(max_examples=60)
def test_a_form_is_read_alike_however_it_is_cut(cuts: list[int]) -> None:
    content = b"\r\n--a-bound\r\n" * 20 + draw(14, side=40) + b"\r\n--"
    body = part(content, headers=b"Content-Type: image/png\r\n") + END
    ends = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    pieces = [body[a:b] for a, b in pairwise(ends)]

    async def read() -> bytes:
        scope = {
            "app": an_app(),
            "type": "http",
            "headers": [(b"content-type", FORM["Content-Type"].encode())],
        }
        request = Request(scope, _Slow(*pieces, is_whole=True).receive)
        return b"".join([piece async for piece in file_of(request, max_bytes=10_000)])

    with asyncio.Runner() as runner:
        assert runner.run(read()) == content


async def test_many_at_once_with_the_same_picture_get_the_same_upload(
    api: Api,
) -> None:
    answers = await asyncio.gather(*(uploaded(api, PICTURE) for _ in range(20)))

    assert len({answer["upload_id"] for answer in answers}) == 1
    assert len(await rows_of(api)) == len(files_of(api)) == 1


def an_app(**limits: timedelta) -> SimpleNamespace:
    """What a body asks of the application: how long to wait, and whether it stops."""
    runtime = SimpleNamespace(stopping=asyncio.Event())
    return SimpleNamespace(state=SimpleNamespace(pace=Pace(**limits), runtime=runtime))


class _Slow:
    """A client that sends some chunks and then nothing for ever, unless that was all."""

    def __init__(self, *chunks: bytes, is_whole: bool = False) -> None:
        self._chunks = list(chunks)
        self._is_whole = is_whole

    async def receive(self) -> dict[str, Any]:
        if not self._chunks:
            await asyncio.Event().wait()
        body = self._chunks.pop(0)
        is_last = self._is_whole and not self._chunks
        return {"type": "http.request", "body": body, "more_body": not is_last}


@pytest.mark.parametrize(
    "limits",
    [{"longest_pause": timedelta(seconds=0.05)}, {"free": timedelta(seconds=0.05)}],
    ids=str,
)
async def test_a_body_that_comes_too_slowly_is_given_up(
    limits: dict[str, timedelta],
) -> None:
    scope = {
        "app": an_app(**limits),
        "type": "http",
        "headers": [(b"content-type", b"image/png")],
    }
    request = Request(scope, _Slow(b"a", b"b").receive)

    found = []
    with pytest.raises(HTTPException) as refused:
        async for chunk in file_of(request, max_bytes=100):
            found.append(chunk)

    assert (refused.value.status_code, found) == (408, [b"a", b"b"])


async def test_too_many_pictures_at_once_are_asked_to_come_again(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.app.state.runtime.uploads, "_room", 0)

    answer = await send(api, PICTURE)

    assert answer.status_code == 503
    assert answer.headers["retry-after"]


async def test_one_owner_does_not_take_all_the_room(people: People) -> None:
    api, (alice, bob) = people.api, keys_of(people)
    uploads = api.app.state.runtime.uploads
    enough = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield PICTURE[:20]
        await enough.wait()

    sending = [
        asyncio.create_task(uploads.take_in("alice", endless(), field="file"))
        for _ in range(40)
    ]
    await asyncio.sleep(0)
    refused = await send(api, PICTURE, **alice)
    taken = await send(api, PICTURE, **bob)
    enough.set()
    await asyncio.gather(*sending, return_exceptions=True)

    assert (refused.status_code, taken.status_code) == (503, 201)
    assert (await send(api, PICTURE, **alice)).status_code == 201


# -------------------------------------------------------------------- whose, and how long


async def test_an_upload_is_its_owners_alone(people: People) -> None:
    api, (alice, bob) = people.api, keys_of(people)
    mine = await uploaded(api, PICTURE, **alice)
    path = f"{UPLOADS}/{mine['upload_id']}"

    for verb in ("GET", "DELETE"):
        answer = await api.client.request(verb, path, headers=bob)
        assert answer.status_code == 404
    theirs = await uploaded(api, PICTURE, **bob)

    assert theirs["upload_id"] != mine["upload_id"]
    assert theirs["sha256"] == mine["sha256"]
    assert len(files_of(api)) == 1
    assert (await api.client.get(path, headers=alice)).json() == mine


async def test_a_deleted_upload_takes_its_file_along_only_if_nobody_has_it(
    people: People,
) -> None:
    api = people.api
    paths = [
        f"{UPLOADS}/{(await uploaded(api, PICTURE, **key))['upload_id']}"
        for key in keys_of(people)
    ]

    for path, key, left in zip(paths, keys_of(people), (1, 0), strict=True):
        assert (await api.client.delete(path, headers=key)).status_code == 204
        assert (await api.client.get(path, headers=key)).status_code == 404
        assert len(files_of(api)) == left


def keys_of(people: People) -> list[dict[str, str]]:
    return [{"X-API-Key": people.keys[name].key} for name in ("alice", "bob")]


async def test_deleting_a_job_leaves_an_upload_of_the_same_bytes(
    api: Api, worker: None
) -> None:
    """And the other way round: the output of a job outlives an upload."""
    job = await api.finished((await api.generate("a quiet harbour")).job_id)
    url = job.outputs[0].url
    content = (await api.client.get(url)).content
    kept = await uploaded(api, content)

    assert (await api.client.delete(f"/api/v1/jobs/{job.job_id}")).status_code == 204
    (file,) = files_of(api)
    assert file.read_bytes() == content
    again = await api.finished((await api.generate("another harbour")).job_id)
    other = await uploaded(api, (await api.client.get(again.outputs[0].url)).content)
    for upload in (kept, other):
        path = f"{UPLOADS}/{upload['upload_id']}"
        assert (await api.client.delete(path)).status_code == 204
    assert (await api.client.get(again.outputs[0].url)).status_code == 200
    assert len(files_of(api)) == 1


@pytest.mark.parametrize("text", ["nonsense", "0", "%00"])
async def test_an_id_that_is_none_is_said_to_be_so(api: Api, text: str) -> None:
    answer = await api.client.get(f"{UPLOADS}/{text}")

    assert (answer.status_code, check_problem(answer).code) == (
        400,
        "invalid_parameter",
    )


async def test_an_upload_nobody_has_is_not_found(api: Api) -> None:
    assert (await api.client.get(f"{UPLOADS}/{uuid4()}")).status_code == 404


async def test_what_nobody_used_for_a_week_is_removed(api: Api) -> None:
    old = await uploaded(api, draw(11))
    await age(api, 7.1)
    young = await uploaded(api, draw(12))
    await age(api, 6.9)
    used = await uploaded(api, draw(13))
    await age(api, 0)
    duty = RemoveUnusedUploads(api.app.state.runtime.uploads)

    assert await duty.perform() == REST

    found = [str(row.id) for row in await rows_of(api)]
    assert found == [young["upload_id"], used["upload_id"]]
    assert old["sha256"] not in {file.stem for file in files_of(api)}
    assert len(files_of(api)) == 2


async def test_the_leading_worker_removes_what_is_unused(api: Api) -> None:
    await uploaded(api, PICTURE)
    await age(api, 8)

    async def is_gone() -> bool:
        return not await rows_of(api) and not files_of(api)

    async with working(api.settings):
        await wait_for_async(is_gone, within=10, what="the old upload is removed")


async def test_a_file_removed_before_it_was_recorded_is_asked_for_again(
    api: Api,
) -> None:
    """The second put finds the file there; the first upload is deleted before the row."""
    first = await uploaded(api, PICTURE)
    uploads, store = api.app.state.runtime.uploads, api.app.state.runtime.store
    put = store.put

    async def put_then_lose(stream: Any, **options: Any) -> Any:
        stored = await put(stream, **options)
        store.put = put
        path = f"{UPLOADS}/{first['upload_id']}"
        assert (await api.client.delete(path)).status_code == 204
        return stored

    store.put = put_then_lose
    lost = await send(api, PICTURE)

    assert lost.status_code == 503
    assert await rows_of(api) == []
    again = await uploaded(api, PICTURE)
    assert len(files_of(api)) == 1
    assert isinstance(await uploads.find(again["upload_id"]), Upload)
    with pytest.raises(NotFound):
        await uploads.find(first["upload_id"])


async def test_the_form_is_documented(api: Api) -> None:
    document = json.loads((await api.client.get("/openapi.json")).content)

    content = document["paths"][UPLOADS]["post"]["requestBody"]["content"]
    assert set(content) == {"multipart/form-data", "image/*"}
    assert content["multipart/form-data"]["schema"]["required"] == ["file"]


async def test_a_form_of_a_common_client_is_understood(
    api: Api, sandbox: Sandbox
) -> None:
    """aiohttp writes forms its own way: other headers, another boundary."""
    import aiohttp

    form = aiohttp.FormData()
    form.add_field("file", PICTURE, filename="ä.png", content_type="image/png")
    async with (
        aiohttp.ClientSession() as client,
        client.post(api.origin + UPLOADS, data=form) as answer,
    ):
        assert answer.status == 201, await answer.text()
