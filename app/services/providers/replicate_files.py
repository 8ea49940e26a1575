"""What goes over the wire when Replicate is to keep a file (replicate-api.md section 12)."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.domain.errors import ProviderUnavailable
from app.domain.generation import InputFile, ProvidedFile
from app.services.providers.replicate_wire import parse_moment


@dataclass(frozen=True, slots=True)
class UploadBody:
    """A multipart body with one part, `content`, of known length and never whole in memory."""

    headers: Mapping[str, str]
    write: Callable[[], AsyncIterator[bytes]]


def upload_body(file: InputFile) -> UploadBody:
    """Wrap the file.  Its name is ours: nothing in it needs quoting."""
    boundary = secrets.token_hex(16)
    head = (
        f"--{boundary}\r\n"
        f'Content-Disposition: form-data; name="content"; filename="{file.name}"\r\n'
        f"Content-Type: {file.content_type}\r\n\r\n"
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()

    async def write() -> AsyncIterator[bytes]:
        yield head
        async for chunk in file.read():
            yield chunk
        yield tail

    return UploadBody(
        {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            # Known beforehand: nobody has to like chunked requests.
            "Content-Length": str(len(head) + file.size_bytes + len(tail)),
        },
        write,
    )


def parse_file(answer: Mapping[str, Any]) -> ProvidedFile:
    """Read what the provider says of a file; raise `ProviderUnavailable` when it has no URL."""
    urls = answer.get("urls")
    url = urls.get("get") if isinstance(urls, dict) else None
    if not isinstance(url, str) or not url.startswith(("https://", "http://")):
        raise ProviderUnavailable("the provider's answer was not a file")
    return ProvidedFile(url, parse_moment(answer.get("expires_at")))
