"""The painter: turns a commission into the bytes of a picture, always the same ones."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from PIL import ExifTags, Image

from sandbox.catalogue import PictureFormat
from sandbox.painting import abstracts, landscapes, waterside
from sandbox.painting.canvas import Canvas
from sandbox.painting.palettes import Palette, choose_palette, words_of

#: Pictures are composed at about this many pixels and then enlarged; grain comes last.
COMPOSED_PIXELS = 1024 * 1024
GRAIN = 5
#: Every picture says in its EXIF data what it is.
LABEL = "Composed by the sandbox, a local Replicate; not made by the real model"


@dataclass(frozen=True, slots=True)
class Commission:
    """What is to be drawn.  Equal commissions give equal bytes.

    ``subject`` is whatever else of the input makes a picture its own.
    """

    prompt: str
    subject: str
    seed: int
    index: int
    width: int
    height: int
    format: PictureFormat
    quality: int
    transparent: bool = False

    def key(self) -> str:
        """Return a name for the bytes."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def dice(self) -> random.Random:
        """Return the source of every chance in this picture, size and format left out."""
        text = f"{self.subject}\n{self.prompt}\n{self.seed}\n{self.index}"
        return random.Random(hashlib.sha256(text.encode()).digest())


Motif = Callable[[Canvas, Palette], None]
#: Name: how it is drawn, the words that ask for it, its usual palettes.
MOTIFS: dict[str, tuple[Motif, str, str]] = {
    "aurora": (
        waterside.aurora,
        "aurora northern borealis stars starry galaxy cosmos space planet nebula night",
        "night",
    ),
    "sea": (
        waterside.sea,
        "sea ocean lighthouse boat ship beach coast wave waves harbour harbor island sailing "
        "whale fish water",
        "sunset dawn dusk day",
    ),
    "city": (
        waterside.city,
        "city skyline street urban tokyo york london paris neon cyberpunk building tower bridge "
        "car robot office architecture",
        "dusk night sunset dawn",
    ),
    "forest": (
        landscapes.forest,
        "forest tree trees wood woods jungle pine fir fog foggy fox bear deer owl wolf bird cabin",
        "dawn winter autumn day dusk",
    ),
    "desert": (
        landscapes.desert,
        "desert dune dunes sand sahara mars camel canyon egypt pyramid",
        "sunset dawn ember autumn dusk",
    ),
    "mountains": (
        landscapes.mountains,
        "mountain mountains alps peak peaks hill hills valley landscape snow glacier castle "
        "dragon eagle lake river winter japan fuji",
        "dawn sunset winter dusk day autumn",
    ),
    "botanical": (
        abstracts.botanical,
        "flower flowers plant plants botanical leaf leaves garden rose tulip fruit still bouquet "
        "butterfly orchid herb tea",
        "dawn spring autumn day",
    ),
    "geometry": (
        abstracts.geometry,
        "geometric geometry bauhaus logo icon poster shapes pattern minimal minimalist vector "
        "design flat sticker mosaic tiles",
        "dawn day sunset autumn spring dusk",
    ),
    "flow": (
        abstracts.flow,
        "abstract flow swirl swirls fluid music wind dream fire silk hair portrait painting van "
        "gogh expressionist smoke marble",
        "sunset dusk night ember spring dawn",
    ),
}


def choose_motif(prompt: str, rng: random.Random) -> str:
    """Name the motif with most of the prompt's words; the dice decide when none has any."""
    words = words_of(prompt)
    votes = {
        name: len(words & set(said.split())) for name, (_, said, _) in MOTIFS.items()
    }
    best = max(votes.values())
    return rng.choice([name for name, count in votes.items() if count == best])


def paint(commission: Commission) -> bytes:
    """Compose the picture and return its file."""
    rng = commission.dice()
    size = (commission.width, commission.height)
    canvas = Canvas(_composed_size(size), rng)
    motif, _, usual = MOTIFS[choose_motif(commission.prompt, rng)]
    motif(canvas, choose_palette(commission.prompt, rng, usual))
    canvas.vignette(0.35)
    canvas.image = _scaled(canvas.image, size)
    canvas.grain(GRAIN)
    return _encode(canvas.image, commission)


def paint_plain(commission: Commission) -> bytes:
    """Return a valid picture of the right size for next to nothing, unlike any other.

    The picture is one colour; the commission's hash rides in a chunk that viewers ignore.
    """
    digest = bytes.fromhex(commission.key())
    body = _one_colour(
        (commission.width, commission.height), commission.format, digest[0] % 16
    )
    match commission.format:
        case "png":
            head, tail = body[:-12], body[-12:]
            return (
                head + _png_chunk(b"tEXt", b"Comment\0" + digest.hex().encode()) + tail
            )
        case "jpeg":
            mark = digest.hex().encode()
            return (
                body[:2]
                + b"\xff\xfe"
                + struct.pack(">H", len(mark) + 2)
                + mark
                + body[2:]
            )
        case "webp":
            whole = body[8:] + b"SBOX" + struct.pack("<I", len(digest)) + digest
            return b"RIFF" + struct.pack("<I", len(whole)) + whole


def bomb(side: int) -> bytes:
    """Return a small PNG whose header claims a huge square, to test decoders' limits."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1024))
    return (
        b"\x89PNG\r\n\x1a\n"
        + _png_chunk(b"IHDR", header)
        + _png_chunk(b"IDAT", data)
        + _png_chunk(b"IEND", b"")
    )


def _composed_size(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    shrink = min(1.0, (COMPOSED_PIXELS / (width * height)) ** 0.5)
    return max(16, round(width * shrink)), max(16, round(height * shrink))


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the picture at another size, smoothly."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _encode(image: Image.Image, commission: Commission) -> bytes:
    if commission.transparent and commission.format != "jpeg":
        image = _cut_out(image)
    label = Image.Exif()
    label[ExifTags.Base.ImageDescription] = LABEL
    label[ExifTags.Base.Software] = "sandbox"
    buffer = io.BytesIO()
    quality = max(1, min(100, commission.quality))
    match commission.format:
        case "webp":
            image.save(buffer, "WEBP", quality=quality, method=1, exif=label)
        case "jpeg":
            image.save(buffer, "JPEG", quality=min(95, quality), exif=label)
        case "png":
            image.save(buffer, "PNG", compress_level=1, exif=label)
    return buffer.getvalue()


def _cut_out(image: Image.Image) -> Image.Image:
    """Return the picture fading out towards its corners."""
    edge = Image.radial_gradient("L").point(
        [max(0, min(255, round((0.70 - v / 255) * 1800))) for v in range(256)]
    )
    image = image.convert("RGBA")
    image.putalpha(edge.resize(image.size, Image.Resampling.BICUBIC))
    return image


@lru_cache(maxsize=256)
def _one_colour(size: tuple[int, int], kind: PictureFormat, shade: int) -> bytes:
    """Return a file of one colour; there are sixteen."""
    image = Image.new("RGB", size, (16 * shade, 255 - 12 * shade, 128 + 7 * shade))
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), quality=50)
    return buffer.getvalue()


def _png_chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
