"""Keep the pictures callers give us, as inputs of models, until nobody has needed them for a week.

Files are shared with the outputs of jobs (docs/adr/0010): the row of an upload makes it a user of
its file, and goes before the file does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar
from uuid import UUID

import structlog
from uuid_utils.compat import uuid7

from app.core.patience import within
from app.domain.errors import InvalidRequest, NotFound, OutputInvalid, Unavailable
from app.services import file_locks, upload_rows
from app.services.ledger import PATIENCE, Ledger
from app.services.media_store import MediaStore, StoredFile
from app.services.upload_rows import NewUpload, Upload

T = TypeVar("T")

log = structlog.get_logger("app.uploads")

LIFETIME: Final = timedelta(days=7)
AT_ONCE: Final = 64  # pictures on their way in, a process; half of them one owner's
_REMOVED_AT_ONCE: Final = 50


class Uploads:
    """Take in, find and remove uploads.  Every verb returns after its commit."""

    def __init__(
        self,
        ledger: Ledger,
        store: MediaStore,
        *,
        max_bytes: int,
        lifetime: timedelta = LIFETIME,
        at_once: int = AT_ONCE,
    ) -> None:
        self.max_bytes = max_bytes
        self._ledger = ledger
        self._store = store
        self._lifetime = lifetime
        self._room = at_once
        self._share = max(1, at_once // 2)
        self._incoming: Counter[str] = Counter()  # by owner

    def expiry_of(self, upload: Upload) -> datetime:
        """Say when it may be removed, unless it is used before."""
        return upload.used_at + self._lifetime

    async def take_in(
        self, owner: str, stream: AsyncIterator[bytes], *, field: str
    ) -> Upload:
        """Store a picture for the owner; the same bytes again are the same upload.

        Whatever the stream raises passes through.  Raise `InvalidRequest` naming the field for
        bytes that are no picture we accept, `Unavailable` when there is no room for another.
        """
        if self._room <= 0 or self._incoming[owner] >= self._share:
            raise Unavailable(
                "Too many pictures are on their way in at the moment.",
                retry_after=timedelta(seconds=2),
            )
        self._room -= 1
        self._incoming[owner] += 1
        try:
            stored = await self._store.put(stream, max_bytes=self.max_bytes)
        except OutputInvalid as error:
            raise InvalidRequest(
                f"{field} cannot be used: {error}", field=field, code="invalid_file"
            ) from error
        finally:
            self._room += 1
            self._incoming[owner] -= 1
            if not self._incoming[owner]:
                del self._incoming[owner]
        return await self._record(owner, stored)

    async def _record(self, owner: str, stored: StoredFile) -> Upload:
        new = NewUpload(
            id=uuid7(),
            owner=owner,
            key=stored.key,
            sha256=stored.sha256,
            content_type=stored.content_type,
            size_bytes=stored.size_bytes,
            width=stored.width,
            height=stored.height,
        )
        upload = await _promptly(self._write(new))
        if not await self._is_there(upload.key):
            # Found "already there", it was removed before the row was written.
            await self._withdraw(upload)
            raise Unavailable(
                "The same picture was being removed. Send it again.",
                retry_after=timedelta(seconds=1),
            )
        log.info(
            "upload.stored", upload_id=str(upload.id), size_bytes=upload.size_bytes
        )
        return upload

    async def _write(self, new: NewUpload) -> Upload:
        async with self._ledger.transaction() as conn:
            await file_locks.share(conn, [new.key])
            return await upload_rows.record(conn, new)

    async def _is_there(self, key: str) -> bool:
        try:
            await self._store.head(key)
        except NotFound:
            return False
        return True

    async def _withdraw(self, upload: Upload) -> None:
        """Remove the row of a missing file, unless somebody has brought the file since."""
        async with (
            self._ledger.reading() as conn,
            file_locks.alone(conn, [upload.key]),
        ):
            if not await self._is_there(upload.key):
                await upload_rows.forget(conn, upload.id)

    async def find(self, upload_id: UUID) -> Upload:
        """Read an upload, whoever's it is; raise `NotFound`."""
        found = await _promptly(self._find(upload_id))
        if found is None:
            raise NotFound("There is no such upload.")
        return found

    async def _find(self, upload_id: UUID) -> Upload | None:
        async with self._ledger.reading() as conn:
            return await upload_rows.find(conn, upload_id)

    async def use(self, owner: str, ids: Sequence[UUID]) -> dict[UUID, Upload]:
        """Read those of the uploads that are the owner's; each is kept for a while from now."""
        return await _promptly(self._use(owner, ids)) if ids else {}

    async def _use(self, owner: str, ids: Sequence[UUID]) -> dict[UUID, Upload]:
        async with self._ledger.transaction() as conn:
            return await upload_rows.use(conn, owner, ids)

    async def delete(self, upload: Upload) -> None:
        """Remove an upload, and its file unless somebody else has the same one."""
        await _promptly(self._forget(upload.id))
        await self._remove_files([upload.key])

    async def _forget(self, upload_id: UUID) -> None:
        async with self._ledger.transaction() as conn:
            await upload_rows.forget(conn, upload_id)

    async def remove_unused(self) -> bool:
        """Remove some of the uploads nobody needed for long; tell whether there may be more."""
        async with self._ledger.transaction() as conn:
            keys = await upload_rows.forget_unused(
                conn, age=self._lifetime, limit=_REMOVED_AT_ONCE
            )
        await self._remove_files(keys)
        if keys:
            log.info("uploads.removed", count=len(keys))
        return len(keys) == _REMOVED_AT_ONCE

    async def _remove_files(self, keys: Sequence[str]) -> None:
        async with self._ledger.removing(keys) as orphans:
            await self._store.delete(orphans)


async def _promptly(work: Coroutine[Any, Any, T]) -> T:
    try:
        return await within(PATIENCE, work)
    except TimeoutError as error:
        raise Unavailable("The database does not answer in time.") from error
