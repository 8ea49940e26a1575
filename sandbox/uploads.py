"""The Files API: what a client uploads to use as a model's input."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import BodyPartReader, web

from sandbox import answers
from sandbox.config import SandboxConfig
from sandbox.prediction import new_id

JSON = dict[str, Any]
#: Replicate's limit for one upload (OpenAPI document, 2026-03).
LARGEST_FILE = 100 * 1024 * 1024

routes = web.RouteTableDef()


@dataclass(frozen=True, slots=True)
class Upload:
    """One uploaded file."""

    id: str
    name: str
    content_type: str
    metadata: JSON
    content: bytes
    created_at: float
    expires_at: float

    def as_json(self, base_url: str) -> JSON:
        """Return the object of the Files API."""
        sha256 = hashlib.sha256(self.content).hexdigest()
        return {
            "id": self.id,
            "name": self.name,
            "content_type": self.content_type,
            "size": len(self.content),
            "etag": sha256[:32],
            "checksums": {
                "sha256": sha256,
                "md5": hashlib.md5(self.content, usedforsecurity=False).hexdigest(),
            },
            "metadata": self.metadata,
            "created_at": _stamp(self.created_at),
            "expires_at": _stamp(self.expires_at),
            "urls": {"get": f"{base_url}/v1/files/{self.id}"},
        }


class UploadShelf:
    """The uploaded files; the oldest give way when there is no room."""

    def __init__(self, config: SandboxConfig) -> None:
        self._room = config.files_bytes
        self._retention = config.files_retention.total_seconds()
        self._by_id: dict[str, Upload] = {}
        self._used = 0

    def add(
        self, name: str, content_type: str, metadata: JSON, content: bytes
    ) -> Upload:
        """Keep a file until it expires."""
        now = time.time()
        upload = Upload(
            new_id(), name, content_type, metadata, content, now, now + self._retention
        )
        self._by_id[upload.id] = upload
        self._used += len(content)
        while self._used > self._room and len(self._by_id) > 1:
            self.remove(next(iter(self._by_id)))
        return upload

    def find(self, file_id: str) -> Upload | None:
        """Return a file that has not expired."""
        upload = self._by_id.get(file_id)
        if upload is not None and upload.expires_at <= time.time():
            self.remove(file_id)
            return None
        return upload

    def remove(self, file_id: str) -> bool:
        """Delete a file; False when there is none."""
        upload = self._by_id.pop(file_id, None)
        if upload is None:
            return False
        self._used -= len(upload.content)
        return True

    def newest_first(self) -> list[Upload]:
        """Return every file that has not expired."""
        found = [self.find(file_id) for file_id in reversed(list(self._by_id))]
        return [upload for upload in found if upload is not None]

    def clear(self) -> None:
        """Delete all."""
        self._by_id.clear()
        self._used = 0


SHELF: web.AppKey[UploadShelf] = web.AppKey("uploads", UploadShelf)


@routes.post("/v1/files")
async def create_file(request: web.Request) -> web.Response:
    """Take a multipart upload: ``content``, and optionally filename, type and metadata."""
    if not request.content_type.startswith("multipart/"):
        return answers.problem(
            400, "Send multipart/form-data with a part named content"
        )
    content: bytes | None = None
    name, content_type, said = "file", "application/octet-stream", {}
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader):
            continue
        if part.name == "content":
            name = part.filename or name
            content_type = part.headers.get("Content-Type", content_type)
            content = await _read_part(part)
            if content is None:
                return answers.problem(413, "File too large", title="Content too large")
        elif part.name in ("filename", "type", "metadata"):
            said[part.name] = (await part.read(decode=True)).decode("utf-8", "replace")
    if content is None:
        return answers.problem(400, "Missing content", title="Bad request")
    try:
        metadata = json.loads(said.get("metadata") or "{}")
    except ValueError:
        return answers.problem(400, "metadata must be JSON", title="Bad request")
    upload = request.app[SHELF].add(
        said.get("filename", name), said.get("type", content_type), metadata, content
    )
    return answers.reply(upload.as_json(answers.base_url(request)), 201)


@routes.get("/v1/files")
async def list_files(request: web.Request) -> web.Response:
    """Answer all files, newest first."""
    base = answers.base_url(request)
    results = [upload.as_json(base) for upload in request.app[SHELF].newest_first()]
    return answers.reply({"previous": None, "next": None, "results": results})


@routes.get("/v1/files/{id}")
async def get_file(request: web.Request) -> web.Response:
    """Answer what is known about a file."""
    upload = request.app[SHELF].find(request.match_info["id"])
    if upload is None:
        return _file_not_found()
    return answers.reply(upload.as_json(answers.base_url(request)))


@routes.delete("/v1/files/{id}")
async def delete_file(request: web.Request) -> web.Response:
    """Delete a file: 204, and 404 from then on."""
    if not request.app[SHELF].remove(request.match_info["id"]):
        return _file_not_found()
    return web.Response(status=204)


@routes.get("/v1/files/{id}/download")
async def download_file(request: web.Request) -> web.Response:
    """Answer the content.

    A token is enough.  The signature of Replicate's form is checked when one is given: base64
    HMAC-SHA256 over "owner id expiry"; here the webhook secret is the signing secret.
    """
    upload = request.app[SHELF].find(request.match_info["id"])
    if upload is None:
        return _file_not_found()
    if "signature" in request.query and not _signed(request, upload.id):
        return answers.problem(401, "Invalid signature", title="Unauthenticated")
    return web.Response(
        body=upload.content,
        headers={"Content-Type": upload.content_type},
    )


def _signed(request: web.Request, file_id: str) -> bool:
    owner, expiry = request.query.get("owner", ""), request.query.get("expiry", "")
    if not expiry.isdigit() or int(expiry) < time.time():
        return False
    secret = request.app[answers.CONFIG].webhook_secret.encode()
    digest = hmac.new(
        secret, f"{owner} {file_id} {expiry}".encode(), hashlib.sha256
    ).digest()
    return hmac.compare_digest(
        base64.b64encode(digest).decode(), request.query["signature"]
    )


async def _read_part(part: BodyPartReader) -> bytes | None:
    """Return the content of a part, None when it is larger than allowed."""
    content = bytearray()
    while chunk := await part.read_chunk(256 * 1024):
        content.extend(chunk)
        if len(content) > LARGEST_FILE:
            return None
    return bytes(content)


def _file_not_found() -> web.Response:
    return answers.problem(404, "File not found", title="Not found")


def _stamp(moment: float) -> str:
    return (
        datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    )
