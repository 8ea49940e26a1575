"""Make small pictures of large ones, and say which colour they have on the whole.  Pure.

Takes tens of milliseconds of CPU: call it in a thread.  Time, pixels and memory are bounded, as
when a picture came in (`pictures`): a large one is taken in strips, and one at a time.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import IO, Final

from PIL import Image

from app.services.pictures import JPEG, opened, refuse_large, room_for

_QUALITY: Final = 80
_STRIP: Final = 4 * 1024 * 1024  # pixels
_LONGEST_PROFILE: Final = 16 * 1024  # bytes
# Not the one of `pictures`: what comes in must never wait for a thread that gives way to others.
_ONE_LARGE: Final = Lock()
_ORIENTATION: Final = 0x0112  # the tag of Exif
# What is raised for data about a picture that make no sense.
_NONSENSE: Final = (
    *(SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error),
)
_UPRIGHT: Final[Mapping[int, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Scaled:
    """Thumbnails by width, as WebP, and the mean colour as `#rrggbb`."""

    thumbnails: Mapping[int, bytes]
    colour: str


def scale_down(file: IO[bytes], widths: Sequence[int]) -> Scaled:
    """Make thumbnails that fit into squares of these sides; raise `OutputInvalid`.

    The first frame, upright, never enlarged, with its alpha and its colour profile.  Of a
    picture that is small already the thumbnail has the same size.
    """
    largest = max(widths)
    with opened(file) as (kind, picture):
        width, height = picture.size
        refuse_large(width, height)
        if kind is JPEG:
            # Decoded at a fraction of its size, never below what is needed.
            picture.draft("RGB", (largest, largest))
        with room_for(width, height, one=_ONE_LARGE):
            picture.load()
            small = _shrunk(picture, largest)
        turn = _UPRIGHT.get(_orientation(picture))
        profile = _profile(picture)
    if turn is not None:
        small = small.transpose(turn)
    made = {}
    for width in sorted(widths, reverse=True):
        small.thumbnail((width, width), Image.Resampling.LANCZOS)
        made[width] = _encoded(small, profile)
    return Scaled(made, _colour(small))


def _shrunk(picture: Image.Image, side: int) -> Image.Image:
    """Bring a picture down to about twice the side, in plain colours, strip by strip."""
    width, height = picture.size
    factor = max(width, height) // (2 * side)
    if factor < 2:
        return _plain(picture)
    rows = factor * max(1, _STRIP // (width * factor))
    strips = []
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(height, top + rows)))
        strips.append(_plain(strip).reduce(factor))
    whole = Image.new(strips[0].mode, (-(-width // factor), -(-height // factor)))
    for number, strip in enumerate(strips):
        whole.paste(strip, (0, number * rows // factor))
    return whole


def _plain(picture: Image.Image) -> Image.Image:
    """Give RGB, with alpha where anything can be seen through."""
    if picture.mode.startswith("I"):
        # 16 bits of grey; Pillow cuts them off instead of scaling them.
        picture = picture.point(lambda value: value / 256).convert("L")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _orientation(picture: Image.Image) -> int:
    try:
        found = picture.getexif().get(_ORIENTATION)
    except _NONSENSE:
        return 1  # data about the picture are broken, not the picture
    return found if isinstance(found, int) else 1


def _profile(picture: Image.Image) -> bytes | None:
    """Give the colour profile, where it still fits: colours are RGB now."""
    found = picture.info.get("icc_profile")
    if not isinstance(found, bytes) or not 128 <= len(found) <= _LONGEST_PROFILE:
        return None
    return found if found[16:20] == b"RGB " else None


def _encoded(picture: Image.Image, profile: bytes | None) -> bytes:
    out = io.BytesIO()
    # Nothing else goes along: who, where and when are in the file itself, or nowhere.
    picture.save(
        out, "WEBP", quality=_QUALITY, icc_profile=profile or b"", exif=b"", xmp=b""
    )
    return out.getvalue()


def _colour(picture: Image.Image) -> str:
    """Give the mean of what can be seen; white where nothing can."""
    seen = picture.convert("RGBA").resize((1, 1), Image.Resampling.BOX)
    red, green, blue, alpha = seen.tobytes()
    return f"#{red:02x}{green:02x}{blue:02x}" if alpha else "#ffffff"
