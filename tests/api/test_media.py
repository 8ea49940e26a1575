"""Stored files over HTTP: cached for ever, resumable, harmless."""

from __future__ import annotations

import hashlib
import io
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from random import Random
from types import SimpleNamespace

import aiohttp
import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from app.api import media_access, problems
from app.api.media import router
from app.core.links import LinkSigner
from app.services.media_links import MediaLinks
from app.services.media_store import MediaStore, open_media_store
from tests.support.object_store import BUCKET, aws_environment, run_bucket


def draw(side: int = 40) -> bytes:
    out = io.BytesIO()
    pixels = Random(1).randbytes(side * side * 3)
    Image.frombytes("RGB", (side, side), pixels).save(out, "PNG")
    return out.getvalue()


DATA = draw()
SIZE = len(DATA)
ETAG = f'"{hashlib.sha256(DATA).hexdigest()}"'
UNKNOWN = f"/media/ab/ab{'0' * 62}.png"


def serve(store: MediaStore) -> httpx.AsyncClient:
    app = FastAPI()
    links = MediaLinks(
        LinkSigner([b"unused"], timedelta(hours=1)),
        public_base_url=None,
        is_guarded=False,
    )
    app.state.runtime = SimpleNamespace(store=store, links=links)
    app.include_router(router)
    problems.install(app)
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://service")


async def keep(store: MediaStore, data: bytes) -> str:
    async def stream() -> AsyncIterator[bytes]:
        yield data

    return f"/media/{(await store.put(stream(), max_bytes=10**8)).key}"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[MediaStore]:
    found = open_media_store(f"file://{tmp_path}")
    yield found
    await found.aclose()


@pytest.fixture
async def client(store: MediaStore) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(store) as found:
        yield found


@pytest.fixture
async def url(store: MediaStore) -> str:
    return await keep(store, DATA)


async def test_a_file_is_sent_whole_with_every_header(
    client: httpx.AsyncClient, url: str
) -> None:
    answer = await client.get(url)

    assert (answer.status_code, answer.content) == (200, DATA)
    headers = dict(answer.headers)
    assert headers.pop("last-modified").endswith("GMT")
    assert headers == {
        "content-type": "image/png",
        "content-length": str(SIZE),
        "etag": ETAG,
        "cache-control": "public, max-age=31536000, immutable",
        "accept-ranges": "bytes",
        "x-content-type-options": "nosniff",
        "content-disposition": "inline",
        "content-security-policy": "default-src 'none'; sandbox",
        "cross-origin-resource-policy": "cross-origin",
    }


async def test_head_says_the_same_without_the_bytes(
    client: httpx.AsyncClient, url: str
) -> None:
    got, head = await client.get(url), await client.head(url)

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers == got.headers


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=100-", 100, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
        (f"bytes=5-{SIZE * 2}", 5, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("Bytes=0-4", 0, 5),
    ],
)
async def test_one_range_is_served(
    client: httpx.AsyncClient, url: str, asked: str, start: int, stop: int
) -> None:
    answer = await client.get(url, headers={"Range": asked})

    assert (answer.status_code, answer.content) == (206, DATA[start:stop])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)
    assert answer.headers["etag"] == ETAG


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-1,5-6", "bytes=-", "bytes=9-3", "items=0-1", "bytes=a-b", "bytes", ""],
)
async def test_other_ranges_get_the_whole_file(
    client: httpx.AsyncClient, url: str, asked: str
) -> None:
    answer = await client.get(url, headers={"Range": asked})

    assert (answer.status_code, answer.content) == (200, DATA)


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", "bytes=-0", "bytes=99999999-"])
async def test_a_range_behind_the_end_is_refused(
    client: httpx.AsyncClient, url: str, asked: str
) -> None:
    answer = await client.get(url, headers={"Range": asked})

    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "range_not_satisfiable"


async def test_a_range_of_another_version_gets_the_whole_file(
    client: httpx.AsyncClient, url: str
) -> None:
    date = (await client.head(url)).headers["last-modified"]
    for condition, status in (
        (ETAG, 206),
        (date, 206),
        ('"other"', 200),
        (f"W/{ETAG}", 200),
    ):
        headers = {"Range": "bytes=0-9", "If-Range": condition}
        assert (await client.get(url, headers=headers)).status_code == status


@pytest.mark.parametrize("condition", [ETAG, f"W/{ETAG}", f'"x", {ETAG}', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_known_file_is_not_sent_again(
    client: httpx.AsyncClient, url: str, method: str, condition: str
) -> None:
    headers = {"If-None-Match": condition}
    answer = await client.request(method, url, headers=headers)

    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == ETAG
    assert "content-length" not in answer.headers


async def test_another_file_is_sent(client: httpx.AsyncClient, url: str) -> None:
    answer = await client.get(url, headers={"If-None-Match": '"other"'})

    assert (answer.status_code, answer.content) == (200, DATA)


@pytest.mark.parametrize(
    "path", [UNKNOWN, "/media/", "/media/..%2f..%2fetc%2fpasswd", "/media/x.png"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_unknown_names_are_not_found(
    client: httpx.AsyncClient, path: str, method: str
) -> None:
    answer = await client.request(method, path, headers={"If-None-Match": "*"})

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


async def test_a_large_file_is_sent_in_pieces(store: MediaStore) -> None:
    data = draw(800)
    key = (await keep(store, data)).removeprefix("/media/")

    blob = await store.open(key)
    pieces = [piece async for piece in blob.stream]

    assert b"".join(pieces) == data
    assert len(pieces) > 4 and max(map(len, pieces)) < 1_000_000


async def test_the_api_document_describes_it(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]["/media/{key}"]

    for method in ("get", "head"):
        assert paths[method]["tags"] == ["media"]
        assert paths[method]["summary"]
    assert {"200", "206", "304", "307", "404", "416"} <= set(paths["get"]["responses"])
    assert "image/webp" in paths["get"]["responses"]["200"]["content"]


@pytest.fixture(scope="session")
async def endpoint(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with run_bucket(tmp_path_factory.mktemp("moto")) as found:
        yield found


async def test_files_in_a_bucket_are_fetched_from_there(endpoint: str) -> None:
    with aws_environment(endpoint):
        bucket = open_media_store(f"s3://{BUCKET}/media")
    url = await keep(bucket, DATA)
    try:
        async with serve(bucket) as client, aiohttp.ClientSession() as http:
            for method, body in (("GET", DATA), ("HEAD", b"")):
                answer = await client.request(method, url)
                assert answer.status_code == 307
                assert answer.headers["cache-control"] == "private, max-age=600"
                link = answer.headers["location"]
                assert f"X-Amz-Expires={15 * 60}" in link
                async with http.request(method, link) as found:
                    assert found.status == 200
                    assert await found.read() == body

            assert (await client.get(UNKNOWN)).status_code == 404
    finally:
        await bucket.aclose()


@pytest.mark.parametrize("left", [1, 2, 60, 900, 5400])
def test_the_link_outlives_the_redirect_in_a_cache(left: int) -> None:
    for admission in (media_access._OPEN, media_access._by_link(left)):
        cached = admission.redirect_headers["Cache-Control"].rpartition("=")[2]
        assert timedelta(seconds=int(cached)) < admission.bucket_link
    assert media_access._by_link(left).bucket_link <= timedelta(seconds=left)
