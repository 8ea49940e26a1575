"""XMP packets in AVIF, whose file is a tree of boxes (ISO/IEC 14496-12 and 23008-12).

A packet is an item of its own, at the end of the file.  Three lists must know of it, and as
they grow, all that is behind them moves: the places of the other items are written anew.
Sequences, and files that keep their items in other ways, are left alone.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Final

from app.services.patched import Edit
from app.services.xmp_places import LONGEST_PACKET, Place, Unmarkable

_MOST_BOXES: Final = 1000
_LONGEST_META: Final = 1024 * 1024  # bytes
_CREDENTIALS: Final = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
_STILL: Final = (b"ftyp", b"meta", b"mdat", b"free", b"skip", b"uuid")
_XMP: Final = b"application/rdf+xml"
_MARKER_NAME: Final = b"XMP\0"


@dataclass(frozen=True, slots=True)
class _Box:
    """One box: its content is from `body` up to `stop`."""

    name: bytes
    start: int
    body: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Location:
    """Where an item's bytes are: `method` 0 counts from the start of the file."""

    item: int
    method: int
    reference: int
    base: int
    extents: tuple[tuple[int, int, int], ...]  # index, offset, length


@dataclass(frozen=True, slots=True)
class _Locations:
    """The box `iloc`: its version, the sizes of its fields, its entries."""

    version: int
    offset_size: int
    length_size: int
    base_size: int
    index_size: int
    entries: tuple[_Location, ...]


def avif(data: memoryview) -> Place:
    """Find credentials, and the packet; where there is one already, none is put."""
    top = _boxes(data, 0, len(data))
    has_credentials = any(
        box.name == b"uuid" and bytes(data[box.body : box.body + 16]) == _CREDENTIALS
        for box in top
    )
    metas = [box for box in top if box.name == b"meta"]
    if len(metas) != 1 or any(box.name not in _STILL for box in top):
        return Place(None, has_credentials, _refuse)
    meta = metas[0]
    if meta.stop - meta.start > _LONGEST_META or meta.body - meta.start != 8:
        return Place(None, has_credentials, _refuse)
    old = bytes(data[meta.start : meta.stop])
    parts = _parts_of(old)
    locations = _read_locations(parts[b"iloc"])
    found = _find_packet(parts[b"iinf"])
    if found is not None:
        return Place(_bytes_of(data, locations, found), has_credentials, _refuse)
    size = len(data)

    def put(packet: bytes) -> list[Edit]:
        """Rewrite the lists, and put the packet behind everything."""
        new = _grown(parts, locations, meta.stop, 0, size, packet)
        growth = len(new) - len(old)
        new = _grown(parts, locations, meta.stop, growth, size, packet)
        return [
            Edit(meta.start, meta.stop, new),
            Edit(size, size, _box(b"mdat", packet)),
        ]

    return Place(None, has_credentials, put)


def _refuse(packet: bytes) -> list[Edit]:
    raise Unmarkable("no still picture with lists we know, or with a packet already")


def _boxes(data: memoryview, start: int, stop: int) -> list[_Box]:
    found: list[_Box] = []
    while start < stop:
        if len(found) >= _MOST_BOXES or start + 8 > stop:
            raise Unmarkable("too many boxes, or half a box")
        size, name = struct.unpack_from(">I4s", data, start)
        body = start + 8
        if size == 1 and start + 16 <= stop:
            size, body = struct.unpack_from(">Q", data, body)[0], start + 16
        if not body - start <= size <= stop - start:
            raise Unmarkable("a box without an end")
        found.append(_Box(name, start, body, start + size))
        start += size
    return found


def _parts_of(meta: bytes) -> dict[bytes, bytes]:
    """Take the lists apart, in order: each box whole, by its name."""
    view = memoryview(meta)
    boxes = _boxes(view, 12, len(meta))
    parts = {box.name: meta[box.start : box.stop] for box in boxes}
    needed = {b"iloc", b"iinf", b"pitm"} - parts.keys()
    plain = all(box.body - box.start == 8 for box in boxes)
    if needed or len(parts) != len(boxes) or not plain:
        raise Unmarkable("lists are missing, or there twice")
    return parts


# ------------------------------------------------------------------------ where items are


class _Cursor:
    """Reads numbers one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, size: int) -> int:
        """Read a number of so many bytes; of none it is 0."""
        found = self._data[self._at : self._at + size]
        if len(found) != size:
            raise Unmarkable("a list without an end")
        self._at += size
        return int.from_bytes(found, "big")


def _read_locations(box: bytes) -> _Locations:
    cursor = _Cursor(box[8:])
    version, _ = cursor.number(1), cursor.number(3)
    sizes, others = cursor.number(1), cursor.number(1)
    offset_size, length_size = sizes >> 4, sizes & 15
    base_size, index_size = others >> 4, others & 15 if version else 0
    wide = 4 if version == 2 else 2
    if version > 2 or not {offset_size, length_size} <= {4, 8}:
        raise Unmarkable("items are kept in another way")
    entries = []
    for _ in range(_bounded(cursor.number(wide))):
        item = cursor.number(wide)
        method = cursor.number(2) & 15 if version else 0
        reference, base = cursor.number(2), cursor.number(base_size)
        extents = tuple(
            (
                cursor.number(index_size),
                cursor.number(offset_size),
                cursor.number(length_size),
            )
            for _ in range(_bounded(cursor.number(2)))
        )
        entries.append(_Location(item, method, reference, base, extents))
    return _Locations(
        version, offset_size, length_size, base_size, index_size, tuple(entries)
    )


def _bounded(count: int) -> int:
    if count > _MOST_BOXES:
        raise Unmarkable("too many items")
    return count


def _write_locations(all_of: _Locations) -> bytes:
    wide = 4 if all_of.version == 2 else 2
    sizes = [
        all_of.offset_size << 4 | all_of.length_size,
        all_of.base_size << 4 | all_of.index_size,
    ]
    out = bytearray([all_of.version, 0, 0, 0, *sizes])
    out += _bytes(len(all_of.entries), wide)
    for one in all_of.entries:
        out += _bytes(one.item, wide)
        out += _bytes(one.method, 2) if all_of.version else b""
        out += _bytes(one.reference, 2) + _bytes(one.base, all_of.base_size)
        out += _bytes(len(one.extents), 2)
        for index, offset, length in one.extents:
            out += _bytes(index, all_of.index_size)
            out += _bytes(offset, all_of.offset_size)
            out += _bytes(length, all_of.length_size)
    return _box(b"iloc", bytes(out))


def _moved(one: _Location, behind: int, by: int, base_size: int) -> _Location:
    """Give the place of an item when all that is behind a point has moved."""
    if one.reference != 0:
        raise Unmarkable("an item in another file")
    if one.method != 0 or not one.extents:
        return one
    starts = [one.base + offset for _, offset, _ in one.extents]
    if min(starts) < behind:
        raise Unmarkable("an item before the lists")
    if base_size:
        return replace(one, base=one.base + by)
    moved = tuple((index, at + by, length) for index, at, length in one.extents)
    return replace(one, extents=moved)


def _bytes_of(data: memoryview, all_of: _Locations, item: int) -> bytes:
    """Read an item; nothing when it is kept in another way."""
    for one in all_of.entries:
        if one.item == item and one.method == 0 and one.reference == 0:
            if sum(length for *_, length in one.extents) > LONGEST_PACKET:
                raise Unmarkable("a packet that is too long")
            pieces = [
                bytes(data[one.base + offset : one.base + offset + length])
                for _, offset, length in one.extents
            ]
            return b"".join(pieces)
    return b""


# ---------------------------------------------------------------------- what items there are


def _infos(box: bytes) -> tuple[int, list[bytes]]:
    """Read `iinf`: its version, and a box for each item."""
    version = box[8]
    start = 14 if version == 0 else 16
    inner = _boxes(memoryview(box), start, len(box))
    # Readers go by the count: what is beyond it must not come to life.
    count = int.from_bytes(box[12:start], "big")
    if len(inner) != count or any(one.name != b"infe" for one in inner):
        raise Unmarkable("a list of something else")
    return version, [box[one.start : one.stop] for one in inner]


def _identity(info: bytes) -> tuple[int, bytes]:
    """Read the id of an item, and its type with what follows."""
    version = info[8]
    if version == 2:
        return int.from_bytes(info[12:14], "big"), info[16:]
    if version == 3:
        return int.from_bytes(info[12:16], "big"), info[18:]
    raise Unmarkable("an item of another kind")


def _find_packet(iinf: bytes) -> int | None:
    for info in _infos(iinf)[1]:
        item, rest = _identity(info)
        # The type, a name that ends with NUL, and of "mime" what it is.
        if rest.startswith(b"mime") and rest[4:].partition(b"\0")[2].startswith(_XMP):
            return item
    return None


def _grown(
    parts: dict[bytes, bytes],
    locations: _Locations,
    behind: int,
    growth: int,
    end: int,
    packet: bytes,
) -> bytes:
    """Write the box of all lists with one item more, where `growth` is by how much it grows."""
    version, infos = _infos(parts[b"iinf"])
    item = max((_identity(info)[0] for info in infos), default=0) + 1
    if item >= 1 << 16:
        raise Unmarkable("no number left")
    body = b"mime" + _MARKER_NAME + _XMP + b"\0"
    infos = [*infos, _box(b"infe", b"\2\0\0\0" + _bytes(item, 2) + b"\0\0" + body)]
    count = _bytes(len(infos), 2 if version == 0 else 4)
    iinf = _box(b"iinf", bytes([version, 0, 0, 0]) + count + b"".join(infos))
    place = (0, end + growth + 8, len(packet))
    moved = [
        _moved(one, behind, growth, locations.base_size) for one in locations.entries
    ]
    entries = (*moved, _Location(item, 0, 0, 0, (place,)))
    iloc = _write_locations(replace(locations, entries=entries))
    new = parts | {b"iinf": iinf, b"iloc": iloc}
    new[b"iref"] = _referring(parts.get(b"iref"), item, _primary(parts[b"pitm"]))
    return _box(b"meta", b"\0\0\0\0" + b"".join(new.values()))


def _primary(box: bytes) -> int:
    return int.from_bytes(box[12:14] if box[8] == 0 else box[12:16], "big")


def _referring(iref: bytes | None, item: int, primary: int) -> bytes:
    """Say that the item describes the picture."""
    content = b"\0\0\0\0" if iref is None else iref[8:]
    wide = 2 if content[0] == 0 else 4
    said = _bytes(item, wide) + b"\0\1" + _bytes(primary, wide)
    return _box(b"iref", content + _box(b"cdsc", said))


def _box(name: bytes, content: bytes) -> bytes:
    return _bytes(len(content) + 8, 4) + name + content


def _bytes(number: int, size: int) -> bytes:
    try:
        return number.to_bytes(size, "big")
    except OverflowError as error:
        raise Unmarkable("a number that does not fit") from error
