"""Decide whether bytes are a picture we accept, and what kind.

Nothing from outside is believed: neither a name nor a `Content-Type`.  The first bytes name the
format, the header gives the size before anything is decoded, and all data are decoded once.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from threading import Lock
from typing import IO, Final, cast

from PIL import Image, features

from app.domain.errors import OutputInvalid

MAX_PIXELS: Final = 8192 * 8192
"""The most pixels we decode, all frames of an animation together.

Four times the largest output known to us (seedream-4 makes 4096 x 4096: replicate-api.md
section 13); decoded it takes 256 MiB of memory as RGBA, and a JPEG in several scans 400.
"""

CPU_TIME: Final = timedelta(seconds=10)
"""The most computing one picture may take; the dearest honest ones take some three seconds.

A file of a million tiny parts keeps the readers busy for minutes.  The clock is the thread's
own: a machine that is busy with other things does not make a picture worse.
"""

SNIFFED_BYTES: Final = 32
"""How many of the first bytes `sniff` wants to see."""

# What Pillow's readers raise for bytes they cannot make sense of.  The bomb warning is an
# exception only where warnings are errors; the size is checked by ourselves in any case.
_BROKEN: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_LARGE: Final = 4096 * 4096  # pixels, 64 MiB of memory
_ONE_LARGE: Final = Lock()  # decoded at a time: kilobytes can demand 400 MiB

_BOMB: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class PictureFormat:
    """One format we accept: Pillow's name, the wire's name, and the file name's ending."""

    pillow_name: str
    content_type: str
    extension: str


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What a picture turned out to be.  Width and height are in pixels, before rotation."""

    content_type: str
    extension: str
    width: int
    height: int


PNG: Final = PictureFormat("PNG", "image/png", "png")
JPEG: Final = PictureFormat("JPEG", "image/jpeg", "jpg")
WEBP: Final = PictureFormat("WEBP", "image/webp", "webp")
GIF: Final = PictureFormat("GIF", "image/gif", "gif")
AVIF: Final = PictureFormat("AVIF", "image/avif", "avif")

FORMATS: Final = {one.extension: one for one in (PNG, JPEG, WEBP, GIF, AVIF)}

_LOOKALIKES: Final = (
    (b"<svg", "SVG, which may carry scripts and is not accepted"),
    (b"<?xml", "XML or SVG"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"%pdf", "a PDF document"),
    (b"{", "JSON"),
)


def sniff(head: bytes) -> PictureFormat | None:
    """Name the format by its magic number; None for everything we do not accept.

    `head` are the first `SNIFFED_BYTES` bytes, or all when there are fewer.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if head.startswith(b"\xff\xd8\xff"):
        return JPEG
    if head.startswith((b"GIF87a", b"GIF89a")):
        return GIF
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return WEBP
    # ISO base media: a box "ftyp" whose major brand is AVIF (still) or AVIS (sequence).
    if head[4:12] in (b"ftypavif", b"ftypavis") and features.check("avif"):
        return AVIF
    return None


def inspect(file: IO[bytes]) -> PictureFacts:
    """Check the whole file and say what it is; raise `OutputInvalid` if it is no good.

    Decodes all data of every frame, so it takes milliseconds of CPU (most of them outside
    the interpreter lock): call it in a thread.  Leaves the file open, at any position.
    Bytes after the end of the picture are allowed: cameras and HDR pictures have them, and
    files are served so that nobody takes them for something else.
    """
    with opened(file) as (found, picture):
        width, height = picture.size
        _decode(picture)
    return PictureFacts(found.content_type, found.extension, width, height)


@contextmanager
def opened(file: IO[bytes]) -> Iterator[tuple[PictureFormat, Image.Image]]:
    """Give the picture to work on, not decoded yet, with all guards; call it in a thread.

    `OutputInvalid` says what is wrong with it, whether that shows here or inside.  The file
    stays open, at any position.
    """
    file.seek(0)
    head = file.read(SNIFFED_BYTES)
    if not head:
        raise OutputInvalid("The file is empty.")
    found = sniff(head)
    if found is None:
        raise OutputInvalid(f"The file is {_name(head)}, not a picture we accept.")
    file.seek(0)
    try:
        # Only the one reader is tried: the others are not exposed to foreign bytes.
        watched = cast(IO[bytes], _Watched(file))
        with Image.open(watched, formats=[found.pillow_name]) as picture:
            yield found, picture
    except _BOMB as exc:
        raise OutputInvalid(_too_large()) from exc
    except _BROKEN as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise  # The disk, not the picture.
        raise OutputInvalid(
            f"The {found.extension} file is damaged or cut off."
        ) from exc


def _decode(picture: Image.Image) -> None:
    """Decode all frames, counting pixels before each, never more than `MAX_PIXELS`."""
    pixels = 0
    for width, height in _frame_sizes(picture):
        pixels += width * height
        if pixels > MAX_PIXELS:
            raise OutputInvalid(_too_large())
        if picture.format == JPEG.pillow_name:
            # A JPEG is decoded at an eighth of its size.  That reads every code of every
            # block, which is all that can be wrong with one, and leaves out the transform
            # into pixels, which cannot fail and takes more than half of the time
            # (libjpeg-turbo 3.2, src/jdhuff.c and src/jdphuff.c).
            picture.draft(None, (max(1, width // 8), max(1, height // 8)))
        # Of its whole size: a JPEG in several scans keeps all its codes until the last one.
        with room_for(width, height, one=_ONE_LARGE):
            picture.load()


def room_for(width: int, height: int, *, one: Lock) -> AbstractContextManager[object]:
    """Wait until the memory for so many pixels may be taken; `one` large has it at a time."""
    return one if width * height > _LARGE else nullcontext()


class _Watched:
    """A file that stops to be read when its picture has taken too much computing.

    Pillow's readers ask for every part of a file by itself, so they always come by here.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._end = time.thread_time() + CPU_TIME.total_seconds()
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read on; raise `OutputInvalid` when the time is up."""
        if time.thread_time() > self._end:
            raise OutputInvalid("The picture takes too long to decode.")
        return self._file.read(size)


def _frame_sizes(picture: Image.Image) -> Iterator[tuple[int, int]]:
    """Walk through the frames; the picture stands at each in turn, not yet decoded."""
    yield picture.size
    if not getattr(picture, "is_animated", False):
        return
    frame = 1
    while True:
        try:
            picture.seek(frame)
        except EOFError:
            return
        yield picture.size
        frame += 1


def refuse_large(width: int, height: int) -> None:
    """Raise `OutputInvalid` for more pixels than we decode."""
    if width * height > MAX_PIXELS:
        raise OutputInvalid(_too_large())


def _too_large() -> str:
    return f"The picture has more than {MAX_PIXELS:,} pixels."


def _name(head: bytes) -> str:
    """Say in words what the first bytes look like."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for prefix, words in _LOOKALIKES:
        if start.startswith(prefix):
            return words
    return "of an unknown kind"
