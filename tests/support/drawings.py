"""Pictures for tests, drawn on the spot: no two seeds give the same."""

from __future__ import annotations

import io
import struct
import zlib
from random import Random

from PIL import Image


def draw(
    seed: int, *, side: int = 32, kind: str = "PNG", compressed: bool = True
) -> bytes:
    """Draw noise; uncompressed, a PNG has three bytes for each of its pixels."""
    out = io.BytesIO()
    pixels = Random(seed).randbytes(side * side * 3)
    options = {} if compressed else {"compress_level": 0}
    Image.frombytes("RGB", (side, side), pixels).save(out, kind, **options)
    return out.getvalue()


def pixel_bomb(side: int = 60_000) -> bytes:
    """Give a small file that says it is a huge picture."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
