"""The contract of the picture store, kept by a folder and by a bucket alike."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import aiohttp
import pytest
from PIL import Image

from app.domain.errors import (
    NotFound,
    OutputInterrupted,
    OutputInvalid,
    StorageUnavailable,
)
from app.services import media_store
from app.services.media_store import ByteRange, MediaStore, open_media_store
from app.services.pictures import PictureFacts, inspect
from tests.support.object_store import BUCKET, aws_environment, run_bucket

MAX_BYTES = 20_000_000
UNKNOWN = f"ab/ab{'0' * 62}.png"


def draw(seed: int, *, side: int = 32, kind: str = "PNG") -> bytes:
    """Draw a picture that no other seed gives."""
    out = io.BytesIO()
    pixels = Random(seed).randbytes(side * side * 3)
    Image.frombytes("RGB", (side, side), pixels).save(out, kind)
    return out.getvalue()


async def stream(data: bytes, *, chunk: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), chunk):
        yield data[start : start + chunk]


async def read(
    store: MediaStore, key: str, byte_range: ByteRange | None = None
) -> bytes:
    blob = await store.open(key, byte_range)
    return b"".join([piece async for piece in blob.stream])


def list_files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )


@pytest.fixture(scope="session")
async def endpoint(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with run_bucket(tmp_path_factory.mktemp("moto")) as found:
        yield found


@pytest.fixture
async def folder_store(tmp_path: Path) -> AsyncIterator[MediaStore]:
    store = open_media_store(f"file://{tmp_path}/media")
    yield store
    await store.aclose()


@pytest.fixture
async def bucket_store(endpoint: str, tmp_path: Path) -> AsyncIterator[MediaStore]:
    with aws_environment(endpoint):
        store = open_media_store(f"s3://{BUCKET}/{tmp_path.name}/deep")
    yield store
    await store.aclose()


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest) -> MediaStore:
    found: MediaStore = request.getfixturevalue(f"{request.param}_store")
    return found


class TestContract:
    """What both kinds of store promise."""

    async def test_a_picture_comes_back_byte_for_byte(self, store: MediaStore) -> None:
        data = draw(1)

        stored = await store.put(stream(data), max_bytes=MAX_BYTES)

        sha256 = hashlib.sha256(data).hexdigest()
        assert stored.key == f"{sha256[:2]}/{sha256}.png"
        assert (stored.sha256, stored.size_bytes) == (sha256, len(data))
        assert (stored.content_type, stored.width, stored.height) == (
            "image/png",
            32,
            32,
        )
        assert await read(store, stored.key) == data

    @pytest.mark.parametrize(
        ("kind", "extension", "content_type"),
        [
            ("JPEG", "jpg", "image/jpeg"),
            ("WEBP", "webp", "image/webp"),
            ("GIF", "gif", "image/gif"),
            ("AVIF", "avif", "image/avif"),
        ],
    )
    async def test_the_key_tells_the_real_format(
        self, store: MediaStore, kind: str, extension: str, content_type: str
    ) -> None:
        stored = await store.put(stream(draw(2, kind=kind)), max_bytes=MAX_BYTES)

        assert stored.key.endswith(f".{extension}")
        assert (await store.head(stored.key)).content_type == content_type

    async def test_a_picture_larger_than_memory_allows_is_kept(
        self, store: MediaStore
    ) -> None:
        data = draw(3, side=900)
        assert len(data) > 2_000_000

        stored = await store.put(stream(data, chunk=70_001), max_bytes=MAX_BYTES)

        assert await read(store, stored.key) == data

    async def test_the_same_bytes_twice_are_one_file(self, store: MediaStore) -> None:
        data = draw(4)

        first = await store.put(stream(data), max_bytes=MAX_BYTES)
        before = await store.head(first.key)
        second = await store.put(stream(data, chunk=7), max_bytes=MAX_BYTES)

        assert first == second
        assert await store.head(first.key) == before

    async def test_many_may_store_the_same_at_once(self, store: MediaStore) -> None:
        data = draw(5)

        stored = await asyncio.gather(
            *(store.put(stream(data), max_bytes=MAX_BYTES) for _ in range(20))
        )

        assert len(set(stored)) == 1
        assert await read(store, stored[0].key) == data

    async def test_a_description_needs_no_reading(self, store: MediaStore) -> None:
        data = draw(6)
        stored = await store.put(stream(data), max_bytes=MAX_BYTES)

        meta = await store.head(stored.key)

        assert meta.size_bytes == len(data)
        assert meta.etag == f'"{stored.sha256}"'
        assert abs(datetime.now(UTC) - meta.last_modified) < timedelta(minutes=1)

    @pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 100), (1000, 1001)])
    async def test_a_part_can_be_read(
        self, store: MediaStore, start: int, stop: int
    ) -> None:
        data = draw(7)
        stored = await store.put(stream(data), max_bytes=MAX_BYTES)

        assert await read(store, stored.key, ByteRange(start, stop)) == data[start:stop]

    async def test_a_file_over_the_limit_is_refused(self, store: MediaStore) -> None:
        data = draw(8)
        await store.put(stream(data), max_bytes=len(data))

        with pytest.raises(OutputInvalid, match="more than"):
            await store.put(stream(draw(9)), max_bytes=len(draw(9)) - 1)
        with pytest.raises(NotFound):
            await store.head(key_of(draw(9)))

    @pytest.mark.parametrize(
        "data", [b"", b"<html>no</html>", draw(10)[:-200], b"PK\x03\x04"]
    )
    async def test_what_is_no_picture_is_not_stored(
        self, store: MediaStore, data: bytes
    ) -> None:
        with pytest.raises(OutputInvalid):
            await store.put(stream(data), max_bytes=MAX_BYTES)
        with pytest.raises(NotFound):
            await store.head(key_of(data))

    async def test_an_interrupted_download_stays_an_interruption(
        self, store: MediaStore
    ) -> None:
        data = draw(11)

        async def break_off() -> AsyncIterator[bytes]:
            yield data[: len(data) // 2]
            raise OutputInterrupted("The connection broke.")

        with pytest.raises(OutputInterrupted):
            await store.put(break_off(), max_bytes=MAX_BYTES)
        with pytest.raises(NotFound):
            await store.head(key_of(data))

    async def test_a_refused_stream_is_closed_at_once(self, store: MediaStore) -> None:
        closed = False

        async def endless() -> AsyncIterator[bytes]:
            nonlocal closed
            try:
                while True:
                    yield bytes(1000)
            finally:
                closed = True

        with pytest.raises(OutputInvalid):
            await store.put(endless(), max_bytes=10_000)
        assert closed

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "nope",
            "../../etc/passwd",
            f"ab/ab{'0' * 62}.svg",
            f"ab/cd{'0' * 62}.png",
            f"AB/AB{'0' * 62}.png",
            f"ab/ab{'0' * 61}.png",
            f"ab/ab{'0' * 62}.png\n",
            f"ab/../ab/ab{'0' * 62}.png",
            f"/ab/ab{'0' * 62}.png",
            f"ab/ab{'٠' * 62}.png",
            UNKNOWN,
        ],
    )
    async def test_no_other_name_reaches_a_file(
        self, store: MediaStore, key: str
    ) -> None:
        for verb in (store.head, store.open):
            with pytest.raises(NotFound):
                await verb(key)
        if key != UNKNOWN:
            with pytest.raises(NotFound):
                await store.delete([key])

    async def test_deleting_is_repeatable(self, store: MediaStore) -> None:
        kept = await store.put(stream(draw(12)), max_bytes=MAX_BYTES)
        gone = await store.put(stream(draw(13)), max_bytes=MAX_BYTES)

        await store.delete([gone.key, UNKNOWN])
        await store.delete([gone.key])

        with pytest.raises(NotFound):
            await store.open(gone.key)
        assert await read(store, kept.key) == draw(12)

    async def test_a_deleted_picture_can_be_stored_again(
        self, store: MediaStore
    ) -> None:
        stored = await store.put(stream(draw(14)), max_bytes=MAX_BYTES)
        await store.delete([stored.key])

        assert await store.put(stream(draw(14)), max_bytes=MAX_BYTES) == stored
        assert await read(store, stored.key) == draw(14)

    async def test_a_healthy_store_is_writable(self, store: MediaStore) -> None:
        await store.check_writable()


def key_of(data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    return f"{sha256[:2]}/{sha256}.png"


class TestFolder:
    """What holds for files on a local disk."""

    async def test_only_whole_files_are_in_it(
        self, folder_store: MediaStore, tmp_path: Path
    ) -> None:
        stored = await folder_store.put(stream(draw(20)), max_bytes=MAX_BYTES)
        with pytest.raises(OutputInvalid):
            await folder_store.put(stream(draw(21)[:-50]), max_bytes=MAX_BYTES)
        await folder_store.check_writable()

        assert list_files(tmp_path / "media") == [stored.key]

    async def test_a_name_is_given_only_after_the_bytes_are_on_the_disk(
        self,
        folder_store: MediaStore,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        events: list[str] = []
        fsync, link = os.fsync, os.link

        def record_fsync(handle: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            events.append("folder" if path.is_dir() else "bytes")
            fsync(handle)

        def record_link(source: Path, target: Path) -> None:
            events.append("name")
            link(source, target)

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "link", record_link)

        await folder_store.put(stream(draw(22)), max_bytes=MAX_BYTES)
        await folder_store.put(stream(draw(22)), max_bytes=MAX_BYTES)

        # The store's root, for the new folder; then the new folder, for the name.
        assert events == [
            "bytes",
            "folder",
            "name",
            "folder",
            "bytes",
            "name",
            "folder",
        ]

    async def test_no_signed_links_to_a_folder(self, folder_store: MediaStore) -> None:
        assert await folder_store.signed_url(UNKNOWN, timedelta(minutes=1)) is None

    async def test_a_disk_that_refuses_is_named_with_a_remedy(
        self, folder_store: MediaStore, tmp_path: Path
    ) -> None:
        staging = tmp_path / "media" / ".staging"
        staging.rmdir()
        staging.write_text("in the way")

        for attempt in (
            folder_store.put(stream(draw(23)), max_bytes=MAX_BYTES),
            folder_store.check_writable(),
        ):
            with pytest.raises(StorageUnavailable, match="STORAGE_URL") as caught:
                await attempt
            assert str(tmp_path) not in str(caught.value)
            assert caught.value.retryable

    async def test_an_impossible_folder_is_refused_when_opened(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")

        with pytest.raises(StorageUnavailable, match="not a directory"):
            open_media_store(f"file://{tmp_path}/file/media")

    async def test_a_write_that_hangs_is_not_waited_for(
        self, folder_store: MediaStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release = threading.Event()
        fsync = os.fsync

        def hang(handle: int) -> None:
            release.wait(30)
            fsync(handle)

        monkeypatch.setattr(os, "fsync", hang)
        try:
            with pytest.raises(StorageUnavailable, match="within"):
                await folder_store.check_writable(timeout=timedelta(milliseconds=50))
        finally:
            release.set()

    async def test_a_cancelled_put_stores_nothing_and_breaks_nothing(
        self, folder_store: MediaStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started, release = threading.Event(), threading.Event()
        fsync = os.fsync

        def wait_first(handle: int) -> None:
            started.set()
            release.wait(30)
            fsync(handle)

        monkeypatch.setattr(os, "fsync", wait_first)
        data = draw(24)
        putting = asyncio.create_task(
            folder_store.put(stream(data), max_bytes=MAX_BYTES)
        )
        await asyncio.to_thread(started.wait, 30)
        putting.cancel()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await putting

        # The write could not be stopped any more: it is there, and whole.
        assert await read(folder_store, key_of(data)) == data

    async def test_leftovers_of_killed_processes_are_removed(
        self, tmp_path: Path
    ) -> None:
        staging = tmp_path / "media" / ".staging"
        staging.mkdir(parents=True)
        long_ago = time.time() - 7200
        (staging / "old").write_bytes(b"half")
        os.utime(staging / "old", (long_ago, long_ago))
        (staging / "young").write_bytes(b"half")

        await open_media_store(f"file://{tmp_path}/media").aclose()

        assert list_files(tmp_path) == ["media/.staging/young"]

    async def test_a_killed_process_leaves_no_half_file(self, tmp_path: Path) -> None:
        """Kill a process in the middle of its writes, again and again."""
        folder = tmp_path / "media"
        for round_number in range(3):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _STORE_FOR_EVER,
                str(folder),
                str(round_number),
                stdout=subprocess.PIPE,
            )
            assert process.stdout is not None
            for _ in range(4):
                assert await asyncio.wait_for(process.stdout.readline(), 30)
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()

        names = [name for name in list_files(folder) if not name.startswith(".")]
        assert len(names) >= 12
        for name in names:
            assert key_of((folder / name).read_bytes()) == name


_STORE_FOR_EVER = """
import asyncio, sys
from tests.services.test_media_store import draw, stream, open_media_store

async def main(folder, seed):
    store = open_media_store(f"file://{folder}")
    while True:
        await store.put(stream(draw(seed, side=300)), max_bytes=10**9)
        print(seed, flush=True)
        seed += 1

asyncio.run(main(sys.argv[1], 1000 * (1 + int(sys.argv[2]))))
"""


class TestBucket:
    """What holds for files in a bucket."""

    async def test_a_signed_link_gives_the_file_with_its_type(
        self, bucket_store: MediaStore
    ) -> None:
        stored = await bucket_store.put(stream(draw(30)), max_bytes=MAX_BYTES)

        url = await bucket_store.signed_url(stored.key, timedelta(minutes=5))
        head = await bucket_store.signed_url(
            stored.key, timedelta(minutes=5), method="HEAD"
        )

        assert url is not None and "X-Amz-Expires=300" in url and url != head
        async with aiohttp.ClientSession() as http, http.get(url) as answer:
            assert await answer.read() == draw(30)
            assert answer.headers["Content-Type"] == "image/png"
            assert "immutable" in answer.headers["Cache-Control"]
            assert answer.headers["Content-Disposition"] == "inline"

    async def test_a_bucket_without_conditions_is_good_enough(
        self, endpoint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
        with aws_environment(endpoint):
            store = open_media_store(f"s3://{BUCKET}/plain")
        try:
            first = await store.put(stream(draw(31)), max_bytes=MAX_BYTES)
            assert await store.put(stream(draw(31)), max_bytes=MAX_BYTES) == first
            assert await read(store, first.key) == draw(31)
        finally:
            await store.aclose()

    async def test_a_missing_bucket_is_named_with_a_remedy(self, endpoint: str) -> None:
        with aws_environment(endpoint):
            store = open_media_store("s3://no-such-bucket/x")
        try:
            for attempt in (
                store.put(stream(draw(32)), max_bytes=MAX_BYTES),
                store.check_writable(),
            ):
                with pytest.raises(StorageUnavailable, match="no such .* bucket"):
                    await attempt
        finally:
            await store.aclose()

    async def test_an_unreachable_bucket_does_not_hold_a_check_up(self) -> None:
        with aws_environment("http://127.0.0.1:9"):
            store = open_media_store(f"s3://{BUCKET}/x")
        try:
            with pytest.raises(StorageUnavailable) as caught:
                await store.check_writable(timeout=timedelta(seconds=2))
            assert "127.0.0.1" not in str(caught.value)
        finally:
            await store.aclose()


@pytest.mark.parametrize(
    "url",
    ["", "media", "/srv/media", "file://", "file://host/x", "s3://", "ftp://a/b"],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="STORAGE_URL"):
        open_media_store(url)


async def test_no_more_pictures_are_decoded_at_once_than_there_are_processors(
    folder_store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = threading.Lock()
    running, seen = 0, []

    def count(file: io.BytesIO) -> PictureFacts:
        nonlocal running
        with lock:
            running += 1
            seen.append(running)
        try:
            return inspect(file)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(media_store, "inspect", count)
    await asyncio.gather(
        *(
            folder_store.put(stream(draw(seed, side=200)), max_bytes=MAX_BYTES)
            for seed in range(100, 130)
        )
    )

    assert len(seen) == 30
    assert max(seen) <= (os.cpu_count() or 1)
