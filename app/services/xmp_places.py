"""Where XMP packets are in the containers of pictures: found, and put there.

Nothing here decodes a picture.  A container is walked part by part, by its own lengths; what
does not add up is `Unmarkable`, and so is what may not be touched.  Sources: PNG 3rd edition;
XMP Specification Part 3 (2020) for JPEG and GIF; RFC 9649 for WebP; C2PA 2.2, section A.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from app.services.patched import Edit

_MOST_PARTS: Final = 20_000  # of a container; honest ones have a few hundred
_LONGEST_PACKET: Final = 1024 * 1024  # bytes

PNG_XMP: Final = b"XML:com.adobe.xmp\0"
JPEG_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
GIF_XMP: Final = b"XMP DataXMP"
# Read as blocks of a GIF, any byte of a packet leads into this, and this to its end.
GIF_TRAILER: Final = bytes([1, *range(255, -1, -1), 0])
_GIF_CREDENTIALS: Final = b"C2PA_GIF"
_JPEG_LONGEST: Final = 65_533  # bytes of a segment, without its length


class Unmarkable(Exception):
    """The container makes no sense, or must not be touched."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a container has, and how a packet gets into it, in place of the one it has."""

    packet: bytes | None
    has_credentials: bool
    put: Callable[[bytes], list[Edit]]


def _parts() -> Iterator[None]:
    """Count the parts of a container; raise when there are too many."""
    for _ in range(_MOST_PARTS):
        yield
    raise Unmarkable("too many parts")


def _number(data: memoryview, at: int, layout: str) -> int:
    size = struct.calcsize(layout)
    if at < 0 or at + size > len(data):
        raise Unmarkable("cut off")
    return int(struct.unpack_from(layout, data, at)[0])


# ---------------------------------------------------------------------------------- PNG


def png(data: memoryview) -> Place:
    """Find the packet among the chunks of a PNG; a new one comes right behind the header."""
    at, found, has_credentials = 8, None, False
    for _ in _parts():
        length, name = _number(data, at, ">I"), bytes(data[at + 4 : at + 8])
        body, stop = at + 8, at + 12 + length
        if stop > len(data):
            raise Unmarkable("cut off")
        has_credentials = has_credentials or name == b"caBX"
        start = bytes(data[body : body + len(PNG_XMP)])
        if name == b"iTXt" and start == PNG_XMP and found is None:
            found = (at, stop, _png_text(bytes(data[body : body + length])))
        if name == b"IEND":
            break
        at = stop
    header = 8 + 12 + _number(data, 8, ">I")
    first, last, packet = found or (header, header, None)
    return Place(
        packet, has_credentials, lambda new: [Edit(first, last, _png_chunk(new))]
    )


def _png_text(body: bytes) -> bytes:
    """Read the text of an iTXt chunk: keyword, compression, language, translation, text."""
    is_compressed = body[len(PNG_XMP) : len(PNG_XMP) + 1] == b"\1"
    *_, text = body[len(PNG_XMP) + 2 :].split(b"\0", 2)
    if not is_compressed:
        return text
    try:
        return zlib.decompressobj().decompress(text, _LONGEST_PACKET)
    except zlib.error as error:
        raise Unmarkable("a broken chunk") from error


def _png_chunk(packet: bytes) -> bytes:
    body = PNG_XMP + b"\0\0" + b"\0" + b"\0" + packet
    named = b"iTXt" + body
    return struct.pack(">I", len(body)) + named + struct.pack(">I", zlib.crc32(named))


# --------------------------------------------------------------------------------- JPEG


def jpeg(data: memoryview) -> Place:
    """Find the packet among the segments; a new one comes behind JFIF's and Exif's."""
    at, found, has_credentials = 2, None, False
    first, is_head = 2, True
    for _ in _parts():
        marker = _number(data, at, ">H")
        if marker == 0xFFFF:
            at += 1  # a marker may be filled up
            continue
        if marker < 0xFF00:
            raise Unmarkable("no marker")
        if marker in (0xFFDA, 0xFFD9):
            break
        stop = at + 2 + _number(data, at + 2, ">H")
        if stop > len(data):
            raise Unmarkable("cut off")
        body = bytes(data[at + 4 : min(stop, at + 100)])
        if marker == 0xFFE1 and body.startswith(JPEG_XMP) and found is None:
            found = (at, stop, bytes(data[at + 4 + len(JPEG_XMP) : stop]))
        if marker == 0xFFE2 and body.startswith(b"MPF\0"):
            # Several pictures in one file, which know each other's places.
            raise Unmarkable("more than one picture")
        if marker == 0xFFEB and body.startswith(b"JP") and b"c2pa" in body:
            has_credentials = True
        is_head = is_head and (
            marker == 0xFFE0 or marker == 0xFFE1 and body.startswith(b"Exif\0")
        )
        first = stop if is_head else first
        at = stop
    start, end, packet = found or (first, first, None)
    return Place(
        packet, has_credentials, lambda new: [Edit(start, end, _jpeg_segment(new))]
    )


def _jpeg_segment(packet: bytes) -> bytes:
    body = JPEG_XMP + packet
    if len(body) > _JPEG_LONGEST:
        raise Unmarkable("no room")
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


# --------------------------------------------------------------------------------- WebP

_HAS_XMP: Final = 0x04
_HAS_ALPHA: Final = 0x10


def webp(data: memoryview) -> Place:
    """Find the packet among the chunks; a new one comes last, and VP8X tells of it."""
    end = 8 + _number(data, 4, "<I")
    if end > len(data) or end % 2:
        raise Unmarkable("cut off")
    at, found, has_credentials = 12, None, False
    for _ in _parts():
        if at >= end:
            break
        name, length = bytes(data[at : at + 4]), _number(data, at + 4, "<I")
        stop = at + 8 + length + length % 2
        if stop > end:
            raise Unmarkable("cut off")
        has_credentials = has_credentials or name == b"C2PA"
        if name == b"XMP " and found is None:
            found = (at, stop, bytes(data[at + 8 : at + 8 + length]))
        at = stop
    heads = _webp_head(data)
    start, stop, packet = found or (end, end, None)

    def put(new: bytes) -> list[Edit]:
        chunk = b"XMP " + struct.pack("<I", len(new)) + new + b"\0" * (len(new) % 2)
        edits = [*heads, Edit(start, stop, chunk)]
        size = end - 8 + sum(len(one.new) - (one.stop - one.start) for one in edits)
        return [Edit(4, 8, struct.pack("<I", size)), *edits]

    return Place(packet, has_credentials, put)


def _webp_head(data: memoryview) -> list[Edit]:
    """Have VP8X tell of a packet; where there is none yet, make it from the picture's head."""
    name = bytes(data[12:16])
    if name == b"VP8X":
        flags = _number(data, 20, "<B")
        return [Edit(20, 21, bytes([flags | _HAS_XMP]))]
    flags = _HAS_XMP
    if name == b"VP8L":
        bits = _number(data, 21, "<I")
        if data[20] != 0x2F:
            raise Unmarkable("no picture")
        width, height = bits & 0x3FFF, bits >> 14 & 0x3FFF  # both less one, as in VP8X
        flags |= _HAS_ALPHA if bits >> 28 & 1 else 0
    elif name == b"VP8 ":
        if bytes(data[23:26]) != b"\x9d\x01\x2a":
            raise Unmarkable("no picture")
        width = (_number(data, 26, "<H") & 0x3FFF) - 1
        height = (_number(data, 28, "<H") & 0x3FFF) - 1
    else:
        raise Unmarkable("no picture")
    if width < 0 or height < 0:
        raise Unmarkable("no picture")
    sides = width.to_bytes(3, "little") + height.to_bytes(3, "little")
    head = b"VP8X" + struct.pack("<IB", 10, flags) + b"\0\0\0" + sides
    return [Edit(12, 12, head)]


# ---------------------------------------------------------------------------------- GIF


def gif(data: memoryview) -> Place:
    """Find the packet among the extensions; a new one comes before the first picture."""
    flags = _number(data, 10, "<B")
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    first, found, has_credentials, is_head = at, None, False, True
    for _ in _parts():
        kind = _number(data, at, "<B")
        if kind == 0x3B:
            break
        start = at
        if kind == 0x21:
            is_application = data[at + 1] == 0xFF
            name = bytes(data[at + 3 : at + 14]) if is_application else b""
            at = _gif_blocks(data, at + 2)
            has_credentials = has_credentials or name.startswith(_GIF_CREDENTIALS)
            if name == GIF_XMP and found is None:
                found = (start, at, _gif_packet(bytes(data[start + 14 : at])))
            is_head = is_head and is_application
            first = at if is_head else first
        elif kind == 0x2C:
            flags, is_head = _number(data, at + 9, "<B"), False
            at += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
            at = _gif_blocks(data, at + 1)
        else:
            raise Unmarkable("an unknown block")
    begin, stop, packet = found or (first, first, None)

    def put(new: bytes) -> list[Edit]:
        extension = b"\x21\xff\x0b" + GIF_XMP + new + GIF_TRAILER
        # 87a knows no extensions; apart from them the two are the same.
        return [Edit(4, 5, b"9"), Edit(begin, stop, extension)]

    return Place(packet, has_credentials, put)


def _gif_blocks(data: memoryview, at: int) -> int:
    """Skip blocks up to and with the empty one; say where that is."""
    try:
        while length := data[at]:
            at += length + 1
    except IndexError:
        raise Unmarkable("cut off") from None
    return at + 1


def _gif_packet(rest: bytes) -> bytes:
    if not rest.endswith(GIF_TRAILER):
        raise Unmarkable("a packet without its end")
    return rest[: -len(GIF_TRAILER)]
