"""Pictures of many jobs as one zip file, sent while it is made.

Pictures do not get smaller by compression, so they are kept as they are; memory use depends
neither on their size nor on their number.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import IO, Any, cast

import orjson
import structlog

from app.domain.errors import NotFound, StorageUnavailable
from app.services.job_queries import JobRecord
from app.services.media_store import MediaStore

log = structlog.get_logger("app.archive")

MANIFEST = "manifest.json"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_MODEL_LENGTH = 40


def file_name(record: JobRecord, output: Mapping[str, Any]) -> str:
    """Name a picture so that people find it: when, by which model, of which job."""
    row = record.row
    model = row.model.partition(":")[0].rpartition("/")[2]
    model = _UNSAFE.sub("-", model)[:_MODEL_LENGTH].strip("-.") or "model"
    extension = output["key"].rpartition(".")[2]
    day = row.created_at.astimezone(UTC).date().isoformat()
    # The end of a UUIDv7 is random, its beginning is the time.
    return f"{day}-{model}-{row.id.hex[-12:]}-{output['index']}.{extension}"


class _Sink:
    """Takes bytes in at one end and gives them out at the other; cannot go back."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def drain(self) -> bytes:
        """Give what came in since the last time."""
        data = b"".join(self._parts)
        self._parts.clear()
        return data


async def archive(
    store: MediaStore,
    records: Sequence[JobRecord],
    missing: Sequence[Mapping[str, Any]],
) -> AsyncIterator[bytes]:
    """Give a zip of the pictures of the jobs, with a manifest, piece by piece.

    `missing` goes into the manifest: jobs that were asked for and are not there.  A picture
    that cannot be read is named there, too, and does not end the rest.
    """
    sink = _Sink()
    files: list[dict[str, Any]] = []
    with zipfile.ZipFile(cast(IO[bytes], sink), "w", zipfile.ZIP_STORED) as bundle:
        for record, output in _pictures(records):
            entry = _describe(record, output)
            files.append(entry)
            try:
                blob = await store.open(output["key"])
                info = _info(entry["file"], record.row.completed_at)
                info.file_size = blob.meta.size_bytes
                with bundle.open(info, "w") as target:
                    async for chunk in blob.stream:
                        target.write(chunk)
                        yield sink.drain()
            except (NotFound, StorageUnavailable) as error:
                log.warning("archive.file_missing", job_id=entry["job_id"])
                entry["error"] = str(error)
            yield sink.drain()
        manifest = {"files": files, "missing": list(missing)}
        options = orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z
        bundle.writestr(
            _info(MANIFEST, datetime.now(UTC)), orjson.dumps(manifest, option=options)
        )
    yield sink.drain()


def _pictures(
    records: Sequence[JobRecord],
) -> Iterator[tuple[JobRecord, Mapping[str, Any]]]:
    for record in records:
        for output in record.outputs:
            yield record, output


def _info(name: str, at: datetime) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, at.astimezone(UTC).timetuple()[:6])
    info.external_attr = 0o644 << 16
    return info


def _describe(record: JobRecord, output: Mapping[str, Any]) -> dict[str, Any]:
    row = record.row
    return {
        "file": file_name(record, output),
        "job_id": str(row.id),
        "index": output["index"],
        "prompt": row.prompt,
        "model": row.model,
        "parameters": row.input,
        "created_at": row.created_at,
        "completed_at": row.completed_at,
        "content_type": output["content_type"],
        "width": output["width"],
        "height": output["height"],
        "sha256": output["sha256"],
    }
