"""Make bytes appear whole and for good, in a folder or in a bucket.

Knows nothing of pictures.  Reading and deleting are obstore's, through `Blobs.store`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Literal, Protocol, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import LocalStore, S3Store

from app.domain.errors import NotFound, StorageUnavailable

if TYPE_CHECKING:
    from obstore.store import ClientConfig  # exists for type checkers only

T = TypeVar("T")

WRITERS: Final = 16
"""Threads and uploads at once: they mostly wait for the disk or the bucket."""

_COPY_CHUNK: Final = 1024 * 1024  # bytes
_STAGING: Final = ".staging"
_LEFTOVER_AGE: Final = timedelta(hours=1)
# A bucket is read through links that end: what they open is not for a shared cache.
_IMMUTABLE: Final = "private, max-age=31536000, immutable"


class Blobs(Protocol):
    """What differs between a folder and a bucket."""

    @property
    def store(self) -> LocalStore | S3Store:
        """Give the obstore handle for reading and deleting."""
        ...

    async def write(self, path: str, file: IO[bytes], content_type: str) -> None:
        """Make the bytes appear at once and for good.  Present already is success."""
        ...

    async def sign(
        self, method: Literal["GET", "HEAD"], path: str, expires: timedelta
    ) -> str | None:
        """Give a URL that works without credentials, or None."""
        ...


class Folder:
    """A folder on a local disk.

    obstore 0.12.1 (object_store 0.14.2) gives a file its name before the bytes are on the
    disk, and its Python binding cannot ask for the crate's `with_fsync` (traced with strace,
    2026-11-23; apache/arrow-rs-object-store#643).  After a power cut such a file may be there,
    empty, under its final name, and create-only writing would keep it for ever.  So writing
    is done here; reading is obstore's.
    """

    def __init__(self, root: Path, writers: ThreadPoolExecutor) -> None:
        self._root = root
        self._staging = root / _STAGING
        self._writers = writers
        self._lasting: set[Path] = set()  # folders whose own entry is on the disk
        with translated("open its folder"):
            self._staging.mkdir(parents=True, exist_ok=True)
            self.store = LocalStore(root.resolve())
            self._sweep()

    async def write(self, path: str, file: IO[bytes], content_type: str) -> None:
        """Write through to the disk, then give the name; durable when this returns."""
        await in_thread(self._writers, self._publish, self._root / path, file)

    async def sign(
        self, method: Literal["GET", "HEAD"], path: str, expires: timedelta
    ) -> None:
        """Answer None: files in a folder are served by ourselves."""
        return None

    def _publish(self, target: Path, file: IO[bytes]) -> None:
        staged = self._staging / secrets.token_hex(16)
        try:
            with staged.open("xb") as out:
                file.seek(0)
                shutil.copyfileobj(file, out, _COPY_CHUNK)
                out.flush()
                os.fsync(out.fileno())
            self._make_lasting(target.parent)
            # A link, unlike a rename, never replaces what is there.
            with suppress(FileExistsError):
                os.link(staged, target)
            _sync_folder(target.parent)
        finally:
            staged.unlink(missing_ok=True)

    def _make_lasting(self, folder: Path) -> None:
        """Create the folder when missing and make sure its entry is on the disk."""
        try:
            folder.mkdir()
        except FileExistsError:
            if folder in self._lasting:
                return
        _sync_folder(folder.parent)
        self._lasting.add(folder)

    def _sweep(self) -> None:
        """Remove what killed processes left half-written."""
        oldest = time.time() - _LEFTOVER_AGE.total_seconds()
        for leftover in self._staging.iterdir():
            with suppress(FileNotFoundError):
                if leftover.stat().st_mtime < oldest:
                    leftover.unlink()


class Bucket:
    """A bucket that speaks S3.  An upload becomes visible whole or not at all."""

    def __init__(
        self, url: str, environ: Mapping[str, str], writers: ThreadPoolExecutor
    ) -> None:
        options: ClientConfig = {
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(seconds=60),
            # obstore 0.12.1 forgets AWS_ALLOW_HTTP when other client options are given.
            "allow_http": environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1"),
        }
        with translated("open its bucket"):
            self.store = S3Store.from_url(
                url,
                client_options=options,
                retry_config={
                    "max_retries": 3,
                    "retry_timeout": timedelta(seconds=30),
                },
            )
        self._writers = writers
        self._uploads = asyncio.Semaphore(WRITERS)

    async def write(self, path: str, file: IO[bytes], content_type: str) -> None:
        """Upload unless present already; at most `WRITERS` files are in memory at once."""
        async with self._uploads:
            payload = await in_thread(self._writers, _read_all, file)
            try:
                await self._upload(path, payload, content_type, "create")
            except AlreadyExistsError:
                return
            except (NotSupportedError, NotImplementedError):
                # No conditional put here (AWS_CONDITIONAL_PUT=disabled).  Overwriting a
                # file with the same bytes is as good, only not free.
                await self._upload(path, payload, content_type, "overwrite")

    async def sign(
        self, method: Literal["GET", "HEAD"], path: str, expires: timedelta
    ) -> str | None:
        """Sign a URL for the bucket itself."""
        return await obstore.sign_async(self.store, method, path, expires)

    async def _upload(
        self,
        path: str,
        payload: bytes,
        content_type: str,
        mode: Literal["create", "overwrite"],
    ) -> None:
        await obstore.put_async(
            self.store,
            path,
            payload,
            mode=mode,
            use_multipart=False,
            attributes={
                "Content-Type": content_type,
                "Cache-Control": _IMMUTABLE,
                "Content-Disposition": "inline",
            },
        )


def _read_all(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _sync_folder(folder: Path) -> None:
    """Write a folder's list of names through to the disk (fsync(2), NOTES)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def in_thread(
    pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: object
) -> T:
    """Run in the pool.  A cancelled caller still waits for the end.

    A thread cannot be stopped, and the file it works on must not be closed under it.
    """
    running = asyncio.get_running_loop().run_in_executor(pool, function, *arguments)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # seen, so that asyncio does not report it
        raise


@contextmanager
def translated(action: str, *, reading: bool = False) -> Iterator[None]:
    """Turn what the disk and obstore raise into our errors, without paths or addresses."""
    try:
        yield
    except (OSError, BaseError, NotImplementedError) as exc:
        if reading and isinstance(exc, FileNotFoundError):
            raise NotFound("There is no such file.") from exc
        raise StorageUnavailable(
            f"The picture store could not {action} ({_reason(exc)}). Check STORAGE_URL, "
            "the free space, and the rights or credentials it is used with."
        ) from exc


def _reason(exc: Exception) -> str:
    """Name the kind of trouble in a few words that give nothing away."""
    if isinstance(exc, TimeoutError):
        return "it took too long"
    if isinstance(exc, OSError) and exc.errno is not None:
        return os.strerror(exc.errno).lower()
    if isinstance(exc, FileNotFoundError):
        return "no such folder or bucket"
    return type(exc).__name__.removesuffix("Error").lower()
