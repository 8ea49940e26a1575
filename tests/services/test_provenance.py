"""Pictures that say what they are: the marker goes in, and not a pixel changes."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import tempfile
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from app.domain.provenance import Provenance, SourceType
from app.services import xmp_places
from app.services.media_store import open_media_store
from app.services.patched import Edit, patched
from app.services.pictures import FORMATS, inspect
from app.services.provenance import mark, packet_for

MADE, OF_PICTURES = SourceType.MADE, SourceType.MADE_OF_PICTURES
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
PROPERTY = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
OLD = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF'
    b' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
    b' rdf:about="uuid:7" xmlns:dc="http://purl.org/dc/elements/1.1/" dc:format="x"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


def picture(mode: str = "RGB", side: int = 24, seed: int = 3) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (side, side), Random(seed).randbytes(side**2 * bands))


def saved(kind: str, *, mode: str = "RGB", frames: int = 1, **options: object) -> bytes:
    """Write a picture as an ordinary program would."""
    out = io.BytesIO()
    if frames > 1:
        more = [picture(mode, seed=number) for number in range(frames - 1)]
        options |= {"save_all": True, "append_images": more, "duration": 90, "loop": 0}
    picture(mode, seed=99).save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


SAMPLES: dict[str, tuple[str, bytes]] = {
    "png": ("png", saved("PNG")),
    "png, see-through": ("png", saved("PNG", mode="RGBA", exif=turned())),
    "png, palette": ("png", saved("PNG", mode="P")),
    "png, animated": ("png", saved("PNG", frames=3)),
    "jpeg": ("jpg", saved("JPEG")),
    "jpeg, turned, with a profile": (
        "jpg",
        saved("JPEG", exif=turned(), icc_profile=b"x" * 70_000),
    ),
    "jpeg, progressive": ("jpg", saved("JPEG", progressive=True, comment=b"hi")),
    "jpeg, four colours": ("jpg", saved("JPEG", mode="CMYK")),
    "webp": ("webp", saved("WEBP")),
    "webp, see-through": ("webp", saved("WEBP", mode="RGBA")),
    "webp, lossless": ("webp", saved("WEBP", lossless=True)),
    "webp, lossless, see-through": ("webp", saved("WEBP", mode="RGBA", lossless=True)),
    "webp, animated": ("webp", saved("WEBP", frames=3)),
    "webp, with a profile": ("webp", saved("WEBP", icc_profile=b"x" * 301)),
    "gif": ("gif", saved("GIF")),
    "gif, animated": ("gif", saved("GIF", frames=3)),
    "avif": ("avif", saved("AVIF")),
    "avif, see-through": ("avif", saved("AVIF", mode="RGBA", exif=turned())),
}
# With a packet of somebody's.
WITH_PACKET = {
    "jpg": saved("JPEG", xmp=OLD),
    "webp": saved("WEBP", xmp=OLD),
    "avif": saved("AVIF", xmp=OLD),
}


def chunk(name: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png_with(*chunks: bytes) -> bytes:
    """Put chunks before the last one."""
    data = saved("PNG")
    return data[:-12] + b"".join(chunks) + data[-12:]


def frames_of(data: bytes) -> list[tuple[object, bytes]]:
    """Decode everything that is to be seen."""
    with Image.open(io.BytesIO(data)) as found:
        exif = found.getexif().get(0x0112)
        return [
            (
                (frame.info.get("duration"), found.info.get("icc_profile"), exif),
                frame.convert("RGBA").tobytes(),
            )
            for frame in ImageSequence.Iterator(found)
        ]


def packet_in(extension: str, data: bytes) -> bytes | None:
    """Read the packet: as Pillow finds it, where it looks for one."""
    if extension == "gif":
        return xmp_places.gif(memoryview(data)).packet
    with Image.open(io.BytesIO(data)) as found:
        found.load()
        packet = found.info.get("xmp")
        return packet if packet is None else bytes(packet)


def source_types(packet: bytes) -> list[str]:
    """Read the property as any XML parser does."""
    root = ElementTree.fromstring(packet.decode())
    abouts = {one.get(f"{RDF}about") for one in root.iter(f"{RDF}Description")}
    assert len(abouts) == 1, "all descriptions are of one thing"
    return [one.text or "" for one in root.iter(PROPERTY)]


def marked(data: bytes, extension: str, source: SourceType = MADE) -> bytes:
    result = mark(io.BytesIO(data), extension, source)
    assert result.provenance is Provenance.MARKED
    return result.file.read()


# ----------------------------------------------------------------------------- the marker


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("source", SourceType)
def test_a_marked_picture_says_so_and_looks_the_same(
    name: str, source: SourceType
) -> None:
    extension, data = SAMPLES[name]

    found = marked(data, extension, source)

    packet = packet_in(extension, found)
    assert packet is not None and source_types(packet) == [source.value]
    assert frames_of(found) == frames_of(data)
    assert inspect(io.BytesIO(found)) == inspect(io.BytesIO(data))


@pytest.mark.parametrize("name", SAMPLES)
def test_marking_twice_changes_nothing(name: str) -> None:
    extension, data = SAMPLES[name]
    once = marked(data, extension)

    again = mark(io.BytesIO(once), extension, OF_PICTURES)

    assert again.provenance is Provenance.PRESENT
    assert again.file.read() == once


def test_the_same_picture_gives_the_same_file() -> None:
    for extension, data in SAMPLES.values():
        assert marked(data, extension) == marked(data, extension)


def test_a_file_on_the_disk_is_marked_as_one_in_memory() -> None:
    for extension, data in SAMPLES.values():
        with tempfile.TemporaryFile() as file:
            file.write(data)
            result = mark(file, extension, MADE)
            assert result.file.read() == marked(data, extension)
            result.file.close()
            assert not file.closed


def test_the_header_of_a_simple_webp_is_made_of_the_pictures() -> None:
    for mode, options, flags in (
        ("RGB", {}, 0x04),
        ("RGB", {"lossless": True}, 0x04),
        ("RGBA", {"lossless": True}, 0x14),
    ):
        data = saved("WEBP", mode=mode, **options)
        found = marked(data, "webp")
        if data[12:16] != b"VP8X":
            assert found[12:16] == b"VP8X"
        assert found[20] == flags
        assert found[24:30] == (23).to_bytes(3, "little") * 2
        assert struct.unpack("<I", found[4:8])[0] == len(found) - 8


# ------------------------------------------------------------------- what is there already


@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_a_packet_is_extended_and_not_doubled(extension: str) -> None:
    data = WITH_PACKET[extension]

    found = marked(data, extension)

    packet = packet_in(extension, found)
    assert packet is not None
    assert source_types(packet) == [MADE.value]
    assert b'dc:format="x"' in packet and packet.count(b'rdf:about="uuid:7"') == 2
    assert found.count(b"<x:xmpmeta") == 1
    assert frames_of(found) == frames_of(data)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_packet_in_a_png_is_extended(is_compressed: bool) -> None:
    text = zlib.compress(OLD) if is_compressed else OLD
    head = xmp_places.PNG_XMP + (b"\1\0" if is_compressed else b"\0\0") + b"en\0XMP\0"
    data = png_with(chunk(b"iTXt", head + text))

    found = marked(data, "png")

    packet = packet_in("png", found)
    assert packet is not None and source_types(packet) == [MADE.value]
    assert b'dc:format="x"' in packet and found.count(b"<x:xmpmeta") == 1
    assert frames_of(found) == frames_of(data)


def test_a_packet_in_a_gif_is_extended() -> None:
    _, data = SAMPLES["gif, animated"]
    place = xmp_places.gif(memoryview(data))
    edits = place.put(OLD)
    with_old = patched(io.BytesIO(data), len(data), edits).read()
    assert xmp_places.gif(memoryview(with_old)).packet == OLD

    found = marked(with_old, "gif")

    packet = packet_in("gif", found)
    assert packet is not None and source_types(packet) == [MADE.value]
    assert frames_of(found) == frames_of(data)


def test_a_packet_in_an_avif_is_left_alone() -> None:
    result = mark(io.BytesIO(WITH_PACKET["avif"]), "avif", MADE)

    assert result.provenance is Provenance.NONE
    assert result.file.read() == WITH_PACKET["avif"]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize(
    "said",
    [
        b'<Iptc4xmpExt:DigitalSourceType rdf:resource="x"/>',
        b"<e:DigitalSourceType>a-camera</e:DigitalSourceType>",
        b'<rdf:Description e:DigitalSourceType = "x"/>',
    ],
)
def test_whoever_said_it_first_is_believed(kind: str, said: bytes) -> None:
    data = saved(kind, xmp=OLD.replace(b"</rdf:RDF>", said + b"</rdf:RDF>"))
    extension = next(e for e, one in FORMATS.items() if one.pillow_name == kind)

    result = mark(io.BytesIO(data), extension, MADE)

    assert result.provenance is Provenance.PRESENT
    assert result.file.read() == data


def test_a_prompt_that_speaks_of_it_is_no_statement() -> None:
    old = OLD.replace(b"/>", b"/><!-- DigitalSourceType=none -->", 1)

    assert source_types(packet_for(MADE, old)) == [MADE.value]
    assert marked(saved("JPEG", xmp=old), "jpg")


@pytest.mark.parametrize("packet", [b"", b"no XML", b"<x:xmpmeta/>", b"\xff\xfe<\0"])
def test_a_packet_that_makes_no_sense_stays(packet: bytes) -> None:
    data = saved("JPEG", xmp=packet) if packet else saved("WEBP")
    result = mark(io.BytesIO(data), "jpg" if packet else "webp", MADE)

    assert result.provenance is (Provenance.NONE if packet else Provenance.MARKED)


@pytest.mark.parametrize("kind", ["png", "png, compressed", "webp"])
def test_a_packet_without_measure_is_not_looked_into(kind: str) -> None:
    long = OLD + b" " * xmp_places.LONGEST_PACKET
    head = xmp_places.PNG_XMP + (b"\1\0" if "," in kind else b"\0\0") + b"\0\0"
    text = zlib.compress(long) if "," in kind else long
    data = saved("WEBP", xmp=long)
    if kind != "webp":
        data = png_with(chunk(b"iTXt", head + text))
    result = mark(io.BytesIO(data), kind.partition(",")[0], MADE)

    assert result.provenance is Provenance.NONE
    assert result.file.read() == data


def test_a_compressed_packet_that_is_cut_off_stays() -> None:
    head = xmp_places.PNG_XMP + b"\1\0\0\0"
    data = png_with(chunk(b"iTXt", head + zlib.compress(OLD + b"<p/>" * 99)[:-9]))

    assert mark(io.BytesIO(data), "png", MADE).provenance is Provenance.NONE


def test_a_long_packet_has_no_room_in_a_jpeg() -> None:
    long = OLD.replace(b"</rdf:RDF>", b" " * 65_000 + b"</rdf:RDF>")
    data = saved("JPEG", xmp=long)

    assert mark(io.BytesIO(data), "jpg", MADE).provenance is Provenance.NONE


# ---------------------------------------------------------------------------- credentials


def credentialed() -> dict[str, tuple[str, bytes]]:
    """Give files as signers make them, as far as a look at the container goes."""
    jpeg = saved("JPEG")
    jumbf = b"JP\0\1\0\0\0\1\0\0\0\x40jumb\0\0\0\x1ejumdc2pa" + b"\0" * 20
    app11 = b"\xff\xeb" + struct.pack(">H", len(jumbf) + 2) + jumbf
    webp = saved("WEBP") + b"C2PA" + struct.pack("<I", 4) + b"abcd"
    webp = webp[:4] + struct.pack("<I", len(webp) - 8) + webp[8:]
    uuid = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
    box = struct.pack(">I", 32) + b"uuid" + uuid + b"\0" * 8
    gif = saved("GIF")
    extension = b"\x21\xff\x0bC2PA_GIF\1\0\0\4jumb\0"
    return {
        "png": ("png", png_with(chunk(b"caBX", b"jumb"))),
        "jpeg": ("jpg", jpeg[:2] + app11 + jpeg[2:]),
        "webp": ("webp", webp),
        "avif": ("avif", saved("AVIF") + box),
        "gif": ("gif", gif[:-1] + extension + gif[-1:]),
    }


@pytest.mark.parametrize("name", credentialed())
def test_credentials_are_kept_to_the_byte(name: str) -> None:
    extension, data = credentialed()[name]
    inspect(io.BytesIO(data))

    result = mark(io.BytesIO(data), extension, MADE)

    assert result.provenance is Provenance.CREDENTIALS
    assert result.file.read() == data


def test_other_boxes_in_a_jpeg_are_no_credentials() -> None:
    data = saved("JPEG")
    other = b"\xff\xeb" + struct.pack(">H", 40) + b"JP\0\1" + b"jumd360" + b"\0" * 27

    marked(data[:2] + other + data[2:], "jpg")


# -------------------------------------------------------------------------------- odd files


def test_pictures_that_know_each_others_places_are_left_alone() -> None:
    out = io.BytesIO()
    one = picture()
    one.save(out, "MPO", save_all=True, append_images=[picture(seed=4)])

    assert mark(out, "jpg", MADE).provenance is Provenance.NONE


def test_a_sequence_in_avif_is_left_alone() -> None:
    data = saved("AVIF", frames=3)
    result = mark(io.BytesIO(data), "avif", MADE)

    assert result.provenance is Provenance.NONE
    assert result.file.read() == data


def test_an_avif_with_parts_in_other_files_is_left_alone() -> None:
    data = bytearray(SAMPLES["avif"][1])
    at = data.index(b"iloc") + 15  # the reference of the first item; readers ignore it
    assert data[at - 3 : at + 1] == b"\0\1\0\0"
    data[at] = 1
    inspect(io.BytesIO(data))

    assert mark(io.BytesIO(data), "avif", MADE).provenance is Provenance.NONE


def test_items_beyond_their_count_in_an_avif_are_not_brought_to_life() -> None:
    data = bytearray(SAMPLES["avif, see-through"][1])
    count = data.index(b"iinf") + 9
    assert data[count] > 1
    data[count] = 1

    assert mark(io.BytesIO(data), "avif", MADE).provenance is Provenance.NONE


def test_no_part_of_an_avif_of_very_many_is_left_out() -> None:
    """An item in 1,001 pieces, of which each has a place of its own."""
    old = SAMPLES["avif"][1]
    meta, start = old.index(b"meta") - 4, old.index(b"iloc") - 4
    stop = start + int.from_bytes(old[start : start + 4], "big")
    at = int.from_bytes(old[start + 22 : start + 26], "big") + 1000 * 8
    place = at.to_bytes(4, "big") + (1).to_bytes(4, "big")
    pieces = old[start + 8 : start + 20] + (1001).to_bytes(2, "big") + place * 1001
    box = (len(pieces) + 8).to_bytes(4, "big") + b"iloc" + pieces
    size = int.from_bytes(old[meta : meta + 4], "big") + len(box) - (stop - start)
    lists = size.to_bytes(4, "big") + old[meta + 4 : start] + box
    data = old[:meta] + lists + old[stop:]

    assert mark(io.BytesIO(data), "avif", MADE).provenance is Provenance.NONE


def test_what_comes_after_a_picture_stays_after_it() -> None:
    for extension, data in SAMPLES.values():
        if extension != "avif":
            found = marked(data + b"more of it", extension)
            assert found.endswith(b"more of it")
            assert frames_of(found) == frames_of(data)


def test_a_container_of_very_many_parts_is_left_alone() -> None:
    data = png_with(*[chunk(b"tEXt", b"a\0b")] * 20_000)

    assert mark(io.BytesIO(data), "png", MADE).provenance is Provenance.NONE


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(SAMPLES)),
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), max_size=6),
)
def test_no_container_makes_it_fail(
    name: str, cut: int, flips: list[tuple[int, int]]
) -> None:
    extension, data = SAMPLES[name]
    broken = bytearray(data[: len(data) - cut])
    for at, value in flips:
        if at < len(broken):
            broken[at] = value

    result = mark(io.BytesIO(broken), extension, MADE)
    found = result.file.read()

    if result.provenance is not Provenance.MARKED:
        assert found == bytes(broken)
    elif not cut and _decodes(bytes(broken)):
        assert frames_of(found) == frames_of(bytes(broken))


def _decodes(data: bytes) -> bool:
    try:
        inspect(io.BytesIO(data))
        return bool(frames_of(data))
    except Exception:
        return False


@given(
    data=st.binary(max_size=60),
    spans=st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 60), st.binary(max_size=9)),
        max_size=4,
    ),
    reads=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 30)), max_size=5),
)
def test_a_patched_file_reads_like_one_that_was_written(
    data: bytes,
    spans: list[tuple[int, int, bytes]],
    reads: list[tuple[int, int]],
) -> None:
    edits, expected, position = [], b"", 0
    for start, length, new in sorted(spans, key=lambda one: one[0]):
        start = min(max(start, position), len(data))
        stop = min(start + length, len(data))
        edits.append(Edit(start, stop, new))
        expected += data[position:start] + new
        position = stop
    expected += data[position:]

    file = patched(io.BytesIO(data), len(data), edits)

    assert file.read() == expected
    assert file.seek(0, io.SEEK_END) == len(expected)
    for at, size in reads:
        file.seek(at)
        assert file.read(size) == expected[at : at + size]


def test_edits_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError):
        patched(io.BytesIO(b"abcdef"), 6, [Edit(0, 4, b""), Edit(3, 5, b"")])


# -------------------------------------------------------------------------------- the store


async def test_what_a_model_made_is_stored_marked_and_what_came_in_is_not(
    tmp_path: Path,
) -> None:
    async def stream(data: bytes) -> AsyncIterator[bytes]:
        yield data

    data = SAMPLES["png"][1]
    store = open_media_store(tmp_path.as_uri())
    made = await store.put(stream(data), max_bytes=10**6, origin=MADE)
    came_in = await store.put(stream(data), max_bytes=10**6)
    again = await store.put(stream(data), max_bytes=10**6, origin=MADE)
    await store.aclose()

    assert again == made
    assert (made.provenance, came_in.provenance) == (Provenance.MARKED, None)
    content = (tmp_path / made.key).read_bytes()
    assert content == marked(data, "png")
    assert hashlib.sha256(content).hexdigest() == made.sha256
    assert made.size_bytes == len(content)
    assert (tmp_path / came_in.key).read_bytes() == data
    assert re.fullmatch(rf"{made.sha256[:2]}/{made.sha256}\.png", made.key)
