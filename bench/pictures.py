"""Pictures for load: few are drawn, and each prediction gets a file of its own all the same.

The store keeps equal bytes once, so equal files would be free.  The prediction's id rides in a
part of the file that decoders skip.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image

from sandbox.painter import Commission, paint

Kind = Literal["jpeg", "webp", "png"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CONTENT_TYPES = {"jpeg": "image/jpeg", "webp": "image/webp", "png": "image/png"}
EXTENSIONS = {"jpeg": "jpg", "webp": "webp", "png": "png"}
MARK = 26  # bytes of a prediction's id


@dataclass(frozen=True, slots=True)
class Album:
    """Some pictures, cut where the mark goes."""

    kind: Kind
    cut: list[tuple[bytes, bytes]]

    def file(self, number: int, mark: bytes) -> bytes:
        """Give the file of a prediction; `mark` has `MARK` bytes."""
        head, tail = self.cut[number % len(self.cut)]
        return b"".join((head, _chunk(self.kind, mark), tail))

    @property
    def size_bytes(self) -> float:
        """How large a file is on average."""
        sizes = (len(self.file(i, bytes(MARK))) for i in range(len(self.cut)))
        return sum(sizes) / len(self.cut)


def draw(kind: Kind, *, count: int, side: int, kilobytes: int) -> Album:
    """Draw pictures of about the size wanted; a PNG is as large as its pixels make it."""
    drawn = []
    for number in range(count):
        commission = Commission(
            f"fox {number}", "", number, 0, side, side, "png", quality=100
        )
        body = paint(commission)
        if kind != "png":
            with Image.open(io.BytesIO(body)) as picture:
                body = _encoded(picture.convert("RGB"), kind, kilobytes * 1000)
        drawn.append(_cut(kind, body))
    return Album(kind, drawn)


def _encoded(picture: Image.Image, kind: Kind, size_bytes: int) -> bytes:
    """Encode with the highest quality that fits, 95 at most, 5 at least."""
    low, high = 5, 95
    while low < high:
        middle = (low + high + 1) // 2
        if len(_saved(picture, kind, middle)) <= size_bytes:
            low = middle
        else:
            high = middle - 1
    return _saved(picture, kind, low)


def _saved(picture: Image.Image, kind: Kind, quality: int) -> bytes:
    buffer = io.BytesIO()
    if kind == "webp":
        picture.save(buffer, "WEBP", quality=quality, method=1)
    else:
        picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _cut(kind: Kind, body: bytes) -> tuple[bytes, bytes]:
    match kind:
        case "jpeg":
            return body[:2], body[2:]
        case "png":
            return body[:-12], body[-12:]
        case "webp":
            length = len(body) - 8 + len(_chunk(kind, bytes(MARK)))
            return b"RIFF" + struct.pack("<I", length) + body[8:], b""


def _chunk(kind: Kind, mark: bytes) -> bytes:
    match kind:
        case "jpeg":
            return b"\xff\xfe" + struct.pack(">H", len(mark) + 2) + mark
        case "png":
            body = b"tEXtComment\0" + mark
            size = struct.pack(">I", len(body) - 4)
            return size + body + struct.pack(">I", zlib.crc32(body))
        case "webp":
            return b"MARK" + struct.pack("<I", len(mark)) + mark
