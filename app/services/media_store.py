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
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Final, Literal, Protocol
from urllib.parse import unquote, urlsplit

import obstore
import structlog

from app.domain.errors import NotFound, OutputInvalid, StorageUnavailable
from app.domain.provenance import Provenance, SourceType
from app.services.blobs import WRITERS, Blobs, Bucket, Folder, in_thread, translated
from app.services.pictures import FORMATS, WEBP, PictureFacts, inspect
from app.services.provenance import Marked, mark

log = structlog.get_logger("app.store")

_KEY: Final = re.compile(
    r"([0-9a-f]{2})/(\1[0-9a-f]{62})\.(png|jpg|webp|gif|avif)", re.ASCII
)
_IN_MEMORY: Final = 256 * 1024  # bytes of one download before it moves to a file
_READ_CHUNK: Final = 256 * 1024  # bytes per piece when reading back

WIDTHS: Final = (256, 768)
"""The sizes of thumbnails: each fits into a square of so many pixels."""


class Signing(Protocol):
    """Puts credentials into pictures that were made here."""

    async def announce(self, key: str) -> None:
        """Note that a file is about to be stored that no other put would give again."""
        ...

    def sign(self, file: IO[bytes], content_type: str, source: SourceType) -> IO[bytes]:
        """Give a signed copy, the caller's to close; raise `ValueError` where none can be."""
        ...


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A picture that is in the store now; all facts come from its bytes.

    `provenance` says what it tells of its origin; None: nobody asked.
    """

    key: str
    sha256: str
    size_bytes: int
    content_type: str
    width: int
    height: int
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class BlobMeta:
    """What can be said of a stored file without reading it.

    `etag` is the quoted SHA-256 of the file, of a thumbnail with its width.
    """

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
        self._signing: Signing | None = None
        self._checkers = ThreadPoolExecutor(os.cpu_count() or 1, "picture-check")

    def sign_with(self, signing: Signing) -> None:
        """Have every picture signed from now on that is put with its origin."""
        self._signing = signing

    async def put(
        self,
        stream: AsyncIterator[bytes],
        *,
        max_bytes: int,
        origin: SourceType | None = None,
    ) -> StoredFile:
        """Take in one picture and return only when it is stored for good.

        With an `origin` the file is made to tell of it, and perhaps signed; else it is stored
        byte for byte.  Reads the stream to its end or closes it; whatever it raises passes
        through.
        Raise `OutputInvalid` when the bytes exceed `max_bytes` or are no picture we accept,
        `StorageUnavailable` when they could not be kept; in each case nothing was stored.
        Safe to repeat: the same bytes give the same key, unless they are signed.
        """
        staged = _Staged(self._writers)
        checked: _Checked | None = None
        try:
            async for chunk in stream:
                if staged.size_bytes + len(chunk) > max_bytes:
                    raise OutputInvalid(f"The file has more than {max_bytes:,} bytes.")
                await staged.write(chunk)
            with translated("keep the file while it was checked"):
                file = await staged.finish()
                checked = await in_thread(
                    self._checkers, _check, file, origin, self._signing
                )
            facts, sha256 = checked.facts, checked.sha256
            key = f"{sha256[:2]}/{sha256}.{facts.extension}"
            if self._signing is not None and checked.provenance is Provenance.SIGNED:
                await self._signing.announce(key)
            with translated("write the file"):
                await self._blobs.write(key, checked.file, facts.content_type)
        finally:
            if checked is not None:
                checked.file.close()
            staged.close()
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()  # now, so that its connection is free again
        return StoredFile(
            key,
            sha256,
            checked.size_bytes,
            facts.content_type,
            facts.width,
            facts.height,
            checked.provenance,
        )

    async def head(self, key: str, *, width: int | None = None) -> BlobMeta:
        """Describe a stored file, or its thumbnail of that width, if there is one.

        Raise `NotFound` for an unknown or impossible key, and a thumbnail not made yet.
        """
        name, path = _parse(key), _path(key, width)
        with translated("look a file up", reading=True):
            found = await obstore.head_async(self._blobs.store, path)
        return _describe(key, name, found, width)

    async def open(
        self, key: str, range: ByteRange | None = None, *, width: int | None = None
    ) -> StoredBlob:
        """Start reading a stored file, the part of it, or its thumbnail; else `NotFound`.

        A range must lie inside the file.  Memory use does not depend on the file's size.
        """
        name, path = _parse(key), _path(key, width)
        options: obstore.GetOptions = {}
        if range is not None:
            options["range"] = (range.start, range.stop)
        with translated("open a file", reading=True):
            result = await obstore.get_async(self._blobs.store, path, options=options)
        return StoredBlob(_describe(key, name, result.meta, width), _read(result))

    @asynccontextmanager
    async def fetched(self, key: str) -> AsyncIterator[IO[bytes]]:
        """Give a stored file to work on, all of it, until the end; raise `NotFound`."""
        staged = _Staged(self._writers)
        try:
            blob = await self.open(key)
            async for chunk in blob.stream:
                await staged.write(chunk)
            yield await staged.finish()
        finally:
            staged.close()

    async def keep_thumbnail(self, key: str, width: int, content: bytes) -> None:
        """Store a thumbnail beside its file.

        The caller keeps the file from being removed meanwhile, for `delete` takes both.
        """
        _parse(key)
        with translated("write a thumbnail"):
            file = io.BytesIO(content)
            await self._blobs.write(_path(key, width), file, WEBP.content_type)

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove the files with their thumbnails; missing ones are fine.

        The thumbnails go first, so that none is left without its file, wherever this ends.
        An impossible key raises `NotFound`.
        """
        for key in keys:
            _parse(key)
        with translated("delete files"):
            for key in keys:
                await asyncio.gather(
                    *(self._remove(_path(key, width)) for width in WIDTHS)
                )
                await self._remove(key)

    async def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            await obstore.delete_async(self._blobs.store, path)

    async def signed_url(
        self,
        key: str,
        expires: timedelta,
        *,
        method: Literal["GET", "HEAD"] = "GET",
        width: int | None = None,
    ) -> str | None:
        """Give a URL at the bucket that anybody may use until it expires.

        None where files must be served by ourselves.  Does not check that the file exists.
        A signature covers the method: a URL for GET answers 403 to HEAD.
        """
        _parse(key)
        with translated("sign a URL"):
            return await self._blobs.sign(method, _path(key, width), expires)

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


@dataclass(frozen=True, slots=True)
class _Checked:
    """A picture that may be stored, and the bytes it is stored as."""

    file: IO[bytes]
    facts: PictureFacts
    sha256: str
    size_bytes: int
    provenance: Provenance | None


def _check(
    file: IO[bytes], origin: SourceType | None, signing: Signing | None
) -> _Checked:
    """See what the picture is, mark it, and hash it; it takes CPU, so not in the loop."""
    facts, digest, size = inspect(file), hashlib.sha256(), 0
    provenance = None
    if origin is not None:
        marked = _told(file, facts, origin, signing)
        file, provenance = marked.file, marked.provenance
    file.seek(0)
    while chunk := file.read(_READ_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return _Checked(file, facts, digest.hexdigest(), size, provenance)


def _told(
    file: IO[bytes], facts: PictureFacts, origin: SourceType, signing: Signing | None
) -> Marked:
    """Have the picture tell of its origin, as far as it can be made to."""
    marked = mark(file, facts.extension, origin)
    if signing is None or marked.provenance is Provenance.CREDENTIALS:
        return marked
    marked.file.seek(0)
    try:
        signed = signing.sign(marked.file, facts.content_type, origin)
    except ValueError as error:
        # A picture without a signature is better than none.
        log.error("file.unsigned", reason=str(error))
        return marked
    return Marked(signed, Provenance.SIGNED)


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


def _path(key: str, width: int | None) -> str:
    """Say where a file is, or its thumbnail, whose name is no key."""
    if width is None:
        return key
    if width not in WIDTHS:
        raise NotFound("There is no such file.")
    return f"{key}.w{width}.{WEBP.extension}"


def _describe(
    key: str, name: _Name, found: obstore.ObjectMeta, width: int | None
) -> BlobMeta:
    kind = FORMATS[name.extension] if width is None else WEBP
    return BlobMeta(
        key,
        found["size"],
        thumbnail_etag(key, width) if width else f'"{name.sha256}"',
        kind.content_type,
        found["last_modified"],
    )


def thumbnail_etag(key: str, width: int) -> str:
    """Give the validator of a thumbnail, made or not."""
    return f'"{_parse(key).sha256}-w{width}"'


async def _read(result: obstore.GetResult) -> AsyncIterator[bytes]:
    with translated("read a file", reading=True):
        async for chunk in result.stream(min_chunk_size=_READ_CHUNK):
            yield bytes(chunk)
