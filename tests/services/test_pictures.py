"""Bytes from strangers: what passes for a picture, and what does not."""

from __future__ import annotations

import io
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from app.domain.errors import OutputInvalid
from app.services import pictures
from app.services.pictures import FORMATS, inspect, sniff

FORMAT_NAMES = sorted(FORMATS)


def draw(extension: str, *, size: tuple[int, int] = (48, 32), frames: int = 1) -> bytes:
    """Draw a small picture that compresses badly."""
    pillow_name = FORMATS[extension].pillow_name
    random = Random(7)
    noise = [
        Image.frombytes("RGB", size, random.randbytes(size[0] * size[1] * 3))
        for _ in range(frames)
    ]
    out = io.BytesIO()
    more: dict[str, object] = {}
    if frames > 1:
        more = {"save_all": True, "append_images": noise[1:], "duration": 100}
    noise[0].save(out, pillow_name, **more)
    return out.getvalue()


def make_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("picture.png", draw("png"))
    return out.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """Write a PNG whose header promises any size, with next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("extension", FORMAT_NAMES)
def test_a_real_picture_is_named_by_its_bytes(extension: str) -> None:
    facts = inspect(io.BytesIO(draw(extension)))

    assert (facts.width, facts.height) == (48, 32)
    assert facts.extension == extension
    assert facts.content_type == FORMATS[extension].content_type


@pytest.mark.parametrize("extension", ["png", "gif", "webp", "avif"])
def test_an_animation_is_a_picture(extension: str) -> None:
    facts = inspect(io.BytesIO(draw(extension, frames=3)))

    assert (facts.width, facts.height) == (48, 32)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "html": (lambda: b"<!DOCTYPE html><html>502 Bad Gateway</html>", "a web page"),
    "html after blanks": (lambda: b"\r\n  <html></html>", "a web page"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "svg with declaration": (lambda: b'<?xml version="1.0"?><svg/>', "XML or SVG"),
    "zip": (make_zip, "ZIP"),
    "json": (lambda: b'{"detail": "not found"}', "JSON"),
    "bmp": (lambda: b"BM" + bytes(200), "unknown kind"),
    "only a magic number": (lambda: b"\x89PNG\r\n\x1a\n", "damaged"),
    "a WAVE in a RIFF": (lambda: b"RIFF\x24\x00\x00\x00WAVEfmt ", "unknown kind"),
    "a video in a box": (lambda: b"\x00\x00\x00\x20ftypisom" + bytes(99), "unknown"),
    "png with a jpeg inside": (lambda: b"\x89PNG\r\n\x1a\n" + draw("jpg"), "damaged"),
    "bomb": (lambda: png_claiming(50_000, 50_000), "more than"),
    "just too large": (lambda: png_claiming(8193, 8192), "more than"),
    "absurd header": (lambda: png_claiming(2**31 - 1, 2**31 - 1), "more than"),
    "zero width": (lambda: png_claiming(0, 10), "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_bytes_are_refused(name: str) -> None:
    make, words = BAD[name]

    with pytest.raises(OutputInvalid, match=words):
        inspect(io.BytesIO(make()))


@pytest.mark.parametrize("extension", FORMAT_NAMES)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.98])
def test_a_cut_off_picture_is_refused(extension: str, part: float) -> None:
    whole = draw(extension, size=(200, 200))

    with pytest.raises(OutputInvalid):
        inspect(io.BytesIO(whole[: int(len(whole) * part)]))


def test_a_header_is_believed_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("decoded a picture that is too large")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)

    with pytest.raises(OutputInvalid, match="more than"):
        inspect(io.BytesIO(png_claiming(9000, 9000)))


def test_the_frames_of_an_animation_count_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 2 * 48 * 32)

    inspect(io.BytesIO(draw("gif", frames=2)))
    with pytest.raises(OutputInvalid, match="more than"):
        inspect(io.BytesIO(draw("gif", frames=3)))


@pytest.mark.parametrize("extension", ["png", "jpg", "gif"])
def test_bytes_behind_the_picture_do_no_harm(extension: str) -> None:
    facts = inspect(io.BytesIO(draw(extension) + make_zip()))

    assert facts.extension == extension


def tiny_frames(count: int) -> bytes:
    """Write a GIF of a single pixel that is drawn again and again."""
    screen = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0\0\0\0\xff\xff\xff"
    frame = b"\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0"
    return screen + frame * count + b";"


def tiny_segments(count: int) -> bytes:
    """Write a JPEG whose camera data come in pieces, which Pillow joins one by one."""
    picture = draw("jpg")
    segment = b"\xff\xe1\x00\x16Exif\0\0" + bytes(14)
    return picture[:2] + segment * count + picture[2:]


@pytest.mark.parametrize(
    "content",
    [tiny_frames(60_000), tiny_segments(60_000)],
    ids=["frames", "segments"],
)
def test_a_picture_of_tiny_parts_is_given_up_in_time(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "CPU_TIME", timedelta(milliseconds=100))
    began = time.thread_time()

    with pytest.raises(OutputInvalid, match="too long"):
        inspect(io.BytesIO(content))

    assert time.thread_time() - began < 0.4


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"progressive": True})]
)
def test_large_pictures_are_decoded_one_at_a_time(
    kind: str, options: dict[str, Any]
) -> None:
    """Each takes up to 400 MiB, and a few kilobytes can demand it."""
    content = io.BytesIO()
    Image.new("L", (4096, 4097)).save(content, kind, **options)
    done = threading.Event()

    def check() -> None:
        inspect(content)
        done.set()

    with pictures._ONE_LARGE:
        thread = threading.Thread(target=check)
        thread.start()
        inspect(io.BytesIO(draw("png")))  # small ones go on
        assert not done.wait(0.5)
    assert done.wait(20)
    thread.join()


def test_trouble_with_the_disk_is_not_blamed_on_the_picture() -> None:
    class BrokenDisk(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 0:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(OSError, match="Input/output") as caught:
        inspect(BrokenDisk(draw("png")))
    assert not isinstance(caught.value, OutputInvalid)


# Pillow warns about damage that it works around.
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damage_is_refused_or_harmless_but_never_a_crash(data: st.DataObject) -> None:
    extension = data.draw(st.sampled_from(FORMAT_NAMES))
    whole = bytearray(draw(extension, size=(16, 16)))
    for _ in range(data.draw(st.integers(1, 8))):
        where = data.draw(st.integers(0, len(whole) - 1))
        whole[where] = data.draw(st.integers(0, 255))

    try:
        facts = inspect(io.BytesIO(bytes(whole)))
    except OutputInvalid:
        return
    assert facts.extension in FORMATS


@given(st.binary(max_size=64))
def test_sniffing_takes_any_bytes(head: bytes) -> None:
    found = sniff(head)
    assert found is None or found in FORMATS.values()
