"""Keep pictures under the hash of their bytes, in a folder or in a bucket.

A file is either absent or whole: it gets its name only after its bytes were checked, hashed and
(in a folder) written through to the disk.  The same bytes have the same key, so storing twice
costs nothing and a URL may be cached for ever.  Facts about files live in the database.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import re
import secrets
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Final, Literal
from urllib.parse import unquote, urlsplit

import obstore

from app.domain.errors import NotFound, OutputInvalid, StorageUnavailable
from app.services.blobs import WRITERS, Blobs, Bucket, Folder, in_thread, translated
from app.services.pictures import FORMATS, PictureFacts, inspect

_KEY: Final = re.compile(
    r"([0-9a-f]{2})/(\1[0-9a-f]{62})\.(png|jpg|webp|gif|avif)", re.ASCII
)
_IN_MEMORY: Final = 256 * 1024  # bytes of one download before it moves to a file
_READ_CHUNK: Final = 256 * 1024  # bytes per piece when reading back


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A picture that is in the store now; all facts come from its bytes."""

    key: str
    sha256: str
    size_bytes: int
    content_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class BlobMeta:
    """What can be said of a stored file without reading it; `etag` is a quoted SHA-256."""

    key: str
    size_bytes: int
    etag: str
    content_type: str
    last_modified: datetime


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A stored file being read.  `stream` yields the asked-for bytes once, in pieces."""

    meta: BlobMeta
    stream: AsyncIterator[bytes]


class MediaStore:
    """Put, read and delete pictures.  Make one with `open_media_store`, end it with `aclose`."""

    def __init__(self, blobs: Blobs, writers: ThreadPoolExecutor) -> None:
        self._blobs = blobs
        self._writers = writers
        self._checkers = ThreadPoolExecutor(os.cpu_count() or 1, "picture-check")

    async def put(self, stream: AsyncIterator[bytes], *, max_bytes: int) -> StoredFile:
        """Take in one picture and return only when it is stored for good.

        Reads the stream to its end or closes it; whatever it raises passes through.
        Raise `OutputInvalid` when the bytes exceed `max_bytes` or are no picture we accept,
        `StorageUnavailable` when they could not be kept; in each case nothing was stored.
        Safe to repeat: the same bytes give the same key.
        """
        staged = _Staged(self._writers)
        try:
            async for chunk in stream:
                if staged.size_bytes + len(chunk) > max_bytes:
                    raise OutputInvalid(f"The file has more than {max_bytes:,} bytes.")
                await staged.write(chunk)
            with translated("keep the file while it was checked"):
                file = await staged.finish()
                facts, sha256 = await in_thread(self._checkers, _check, file)
            key = f"{sha256[:2]}/{sha256}.{facts.extension}"
            with translated("write the file"):
                await self._blobs.write(key, file, facts.content_type)
        finally:
            staged.close()
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()  # now, so that its connection is free again
        return StoredFile(
            key,
            sha256,
            staged.size_bytes,
            facts.content_type,
            facts.width,
            facts.height,
        )

    async def head(self, key: str) -> BlobMeta:
        """Describe a stored file; raise `NotFound` for an unknown or impossible key."""
        name = _parse(key)
        with translated("look a file up", reading=True):
            found = await obstore.head_async(self._blobs.store, key)
        return _describe(key, name, found)

    async def open(self, key: str, range: ByteRange | None = None) -> StoredBlob:
        """Start reading a stored file, or the part of it; raise `NotFound` if there is none.

        A range must lie inside the file.  Memory use does not depend on the file's size.
        """
        name = _parse(key)
        options: obstore.GetOptions = {}
        if range is not None:
            options["range"] = (range.start, range.stop)
        with translated("open a file", reading=True):
            result = await obstore.get_async(self._blobs.store, key, options=options)
        return StoredBlob(_describe(key, name, result.meta), _read(result))

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove the files; missing ones are fine, an impossible key raises `NotFound`."""
        for key in keys:
            _parse(key)
        with translated("delete files"):
            for key in keys:
                with suppress(FileNotFoundError):
                    await obstore.delete_async(self._blobs.store, key)

    async def signed_url(
        self,
        key: str,
        expires: timedelta,
        *,
        method: Literal["GET", "HEAD"] = "GET",
    ) -> str | None:
        """Give a URL at the bucket that anybody may use until it expires.

        None where files must be served by ourselves.  Does not check that the file exists.
        A signature covers the method: a URL for GET answers 403 to HEAD.
        """
        _parse(key)
        with translated("sign a URL"):
            return await self._blobs.sign(method, key, expires)

    async def check_writable(
        self, *, timeout: timedelta = timedelta(seconds=5)
    ) -> None:
        """Return when a probe file was really written and deleted; else `StorageUnavailable`."""
        probe = asyncio.ensure_future(self._write_probe())
        try:
            # Not asyncio.timeout: a write that hangs in its thread ignores a cancellation.
            done, _ = await asyncio.wait([probe], timeout=timeout.total_seconds())
        finally:
            probe.cancel()
        if not done:
            raise StorageUnavailable(
                f"The picture store took no probe file within {timeout.total_seconds():g} "
                "seconds. Check that the disk or bucket named in STORAGE_URL responds."
            )
        probe.result()

    async def _write_probe(self) -> None:
        path = f"probe/{secrets.token_hex(16)}"
        with translated("write and delete a probe file"):
            await self._blobs.write(path, io.BytesIO(b"probe"), "text/plain")
            await obstore.delete_async(self._blobs.store, path)

    async def aclose(self) -> None:
        """Wait for running checks and writes, then end the threads."""
        for pool in (self._checkers, self._writers):
            await asyncio.to_thread(pool.shutdown)


def open_media_store(
    url: str, *, environ: Mapping[str, str] = os.environ
) -> MediaStore:
    """Open the store at `file:///folder` (made if missing) or `s3://bucket/prefix`.

    A bucket takes credentials, region and endpoint from the standard `AWS_*` variables,
    `AWS_ENDPOINT_URL` and `AWS_ALLOW_HTTP` included.  Raise `ValueError` for any other URL,
    `StorageUnavailable` when the folder cannot be made.  Does not talk to the bucket yet:
    `check_writable` does.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        writers = ThreadPoolExecutor(WRITERS, "media-store")
        return MediaStore(Folder(Path(unquote(parts.path)), writers), writers)
    if parts.scheme == "s3" and parts.netloc:
        writers = ThreadPoolExecutor(WRITERS, "media-store")
        return MediaStore(Bucket(url, environ, writers), writers)
    raise ValueError("STORAGE_URL must look like file:///folder or s3://bucket/prefix")


def _check(file: IO[bytes]) -> tuple[PictureFacts, str]:
    """See what the picture is, and hash it; both take CPU, so not in the event loop."""
    facts, digest = inspect(file), hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_READ_CHUNK):
        digest.update(chunk)
    return facts, digest.hexdigest()


class _Staged:
    """Bytes on their way in: in memory while few, in a nameless file once many."""

    def __init__(self, writers: ThreadPoolExecutor) -> None:
        self.size_bytes = 0
        self._buffer = bytearray()
        self._file: IO[bytes] | None = None
        self._writers = writers

    async def write(self, chunk: bytes) -> None:
        """Append; touches the disk, in a thread, only when the buffer is full."""
        self.size_bytes += len(chunk)
        self._buffer += chunk
        if len(self._buffer) >= _IN_MEMORY:
            await self._flush()

    async def finish(self) -> IO[bytes]:
        """Give all bytes as one file, which stays ours to close."""
        if self._file is None:
            self._file = io.BytesIO(self._buffer)
        elif self._buffer:
            await self._flush()
        return self._file

    def close(self) -> None:
        """Forget the bytes."""
        if self._file is not None:
            self._file.close()

    async def _flush(self) -> None:
        full, self._buffer = self._buffer, bytearray()
        with translated("keep a download"):
            if self._file is None:
                self._file = await in_thread(self._writers, _nameless_file)
            await in_thread(self._writers, self._file.write, full)


def _nameless_file() -> IO[bytes]:
    return tempfile.TemporaryFile()


@dataclass(frozen=True, slots=True)
class _Name:
    sha256: str
    extension: str


def is_key(text: str) -> bool:
    """Tell whether a file could have the key."""
    return _KEY.fullmatch(text) is not None


def _parse(key: str) -> _Name:
    """Take a key apart; whatever is not exactly a key of ours is `NotFound`."""
    matched = _KEY.fullmatch(key)
    if matched is None:
        raise NotFound("There is no such file.")
    return _Name(matched[2], matched[3])


def _describe(key: str, name: _Name, found: obstore.ObjectMeta) -> BlobMeta:
    return BlobMeta(
        key,
        found["size"],
        f'"{name.sha256}"',
        FORMATS[name.extension].content_type,
        found["last_modified"],
    )


async def _read(result: obstore.GetResult) -> AsyncIterator[bytes]:
    with translated("read a file", reading=True):
        async for chunk in result.stream(min_chunk_size=_READ_CHUNK):
            yield bytes(chunk)
