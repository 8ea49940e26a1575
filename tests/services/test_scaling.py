"""Small pictures of large ones: fitting, upright, see-through where they were, and bounded."""

from __future__ import annotations

import io
import threading
from random import Random
from typing import Any

import pytest
from PIL import Image, ImageCms

from app.domain.errors import OutputInvalid
from app.services import scaling
from app.services.pictures import inspect
from app.services.scaling import Scaled, scale_down
from tests.support.drawings import pixel_bomb

WIDTHS = (256, 768)
RED, GREEN, BLUE = (220, 30, 20), (20, 200, 40), (30, 40, 210)


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> io.BytesIO:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out


def quarters(width: int, height: int) -> Image.Image:
    """Paint a picture whose top left is red, its top right green, and the rest blue."""
    found = Image.new("RGB", (width, height), BLUE)
    found.paste(RED, (0, 0, width // 2, height // 2))
    found.paste(GREEN, (width // 2, 0, width, height // 2))
    return found


def opened(scaled: Scaled, width: int) -> Image.Image:
    found = Image.open(io.BytesIO(scaled.thumbnails[width]))
    assert found.format == "WEBP"
    return found


def is_like(found: Any, wanted: tuple[int, ...], by: int = 24) -> bool:
    return all(abs(one - other) <= by for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "AVIF"])
@pytest.mark.parametrize(
    ("size", "small", "large"),
    [
        ((1600, 1200), (256, 192), (768, 576)),
        ((900, 1800), (128, 256), (384, 768)),
        ((500, 300), (256, 154), (500, 300)),
        ((40, 30), (40, 30), (40, 30)),
        ((3000, 3), (256, 1), (768, 1)),
    ],
)
def test_it_fits_and_is_never_enlarged(
    kind: str, size: tuple[int, int], small: tuple[int, int], large: tuple[int, int]
) -> None:
    scaled = scale_down(saved(quarters(*size), kind), WIDTHS)

    for width, wanted in ((256, small), (768, large)):
        found = opened(scaled, width)
        assert is_like(found.size, wanted, by=1)
        if min(found.size) > 20:
            at_left, at_right = found.width // 4, 3 * found.width // 4
            rgb = found.convert("RGB")
            assert is_like(rgb.getpixel((at_left, found.height // 4)), RED)
            assert is_like(rgb.getpixel((at_right, found.height // 4)), GREEN)
            assert is_like(rgb.getpixel((at_left, 3 * found.height // 4)), BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_it_stands_upright(kind: str, orientation: int) -> None:
    turns: dict[int, Image.Transpose] = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    seen = quarters(400, 200)
    kept = seen.transpose(turns[orientation]) if orientation in turns else seen
    exif = Image.Exif()
    exif[0x0112] = orientation

    found = opened(scale_down(saved(kept, kind, exif=exif), WIDTHS), 256)

    assert found.size == (256, 128)
    assert is_like(found.convert("RGB").getpixel((64, 32)), RED)
    assert is_like(found.convert("RGB").getpixel((192, 32)), GREEN)
    assert not found.getexif(), "nothing goes along that would turn it again"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_broken_words_about_a_picture_do_not_matter(exif: bytes) -> None:
    assert scale_down(saved(quarters(80, 60), "JPEG", exif=exif), WIDTHS).thumbnails


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("side", [300, 4000])
def test_what_can_be_seen_through_stays_so(
    kind: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "_STRIP", 100_000)
    picture = Image.new("RGBA", (side, side // 2), (*RED, 0))
    picture.paste((*GREEN, 255), (0, 0, side // 2, side // 2))

    scaled = scale_down(saved(picture, kind), WIDTHS)

    found = opened(scaled, 256)
    assert found.mode == "RGBA"
    assert is_like(found.getpixel((64, 64)), (*GREEN, 255))
    assert found.getpixel((192, 64))[3] < 16  # type: ignore[index]
    assert is_like(
        bytes.fromhex(scaled.colour[1:]), GREEN
    ), "what is not seen counts not"


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_may_have_a_hole(kind: str) -> None:
    picture = quarters(60, 60).quantize(4)
    hole = picture.getpixel((5, 5))

    found = opened(scale_down(saved(picture, kind, transparency=hole), WIDTHS), 256)

    assert found.convert("RGBA").getpixel((15, 15))[3] < 16  # type: ignore[index]
    assert found.convert("RGBA").getpixel((45, 15))[3] > 240  # type: ignore[index]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "AVIF"])
def test_of_an_animation_it_is_the_first_frame(kind: str) -> None:
    first, then = Image.new("RGB", (90, 60), RED), Image.new("RGB", (90, 60), BLUE)
    file = saved(first, kind, save_all=True, append_images=[then, then], duration=90)

    scaled = scale_down(file, WIDTHS)

    found = opened(scaled, 256)
    assert getattr(found, "n_frames", 1) == 1
    assert is_like(found.convert("RGB").getpixel((45, 30)), RED)
    assert is_like(bytes.fromhex(scaled.colour[1:]), RED)


@pytest.mark.parametrize(
    ("picture", "grey"),
    [
        (Image.new("I;16", (50, 40), 128 * 256), 128),
        (Image.new("L", (50, 40), 77), 77),
        (Image.new("1", (50, 40), 1), 255),
    ],
)
def test_shades_of_grey_stay_what_they_are(picture: Image.Image, grey: int) -> None:
    scaled = scale_down(saved(picture), WIDTHS)

    assert is_like(bytes.fromhex(scaled.colour[1:]), (grey, grey, grey), by=3)


def test_four_colours_become_three() -> None:
    scaled = scale_down(
        saved(Image.new("CMYK", (50, 40), (0, 255, 255, 0)), "JPEG"), WIDTHS
    )

    assert is_like(bytes.fromhex(scaled.colour[1:]), (255, 0, 0))


def test_a_profile_of_colours_goes_along_where_it_fits() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wide = scale_down(saved(quarters(90, 60), icc_profile=profile), WIDTHS)
    grey = scale_down(
        saved(
            Image.new("L", (90, 60), 9),
            icc_profile=profile[:16] + b"GRAY" + profile[20:],
        ),
        WIDTHS,
    )

    assert opened(wide, 256).info["icc_profile"] == profile
    assert "icc_profile" not in opened(grey, 256).info


def test_the_colour_is_the_mean() -> None:
    half = Image.new("RGB", (100, 100), (200, 0, 0))
    half.paste((0, 0, 100), (0, 0, 100, 50))

    assert is_like(
        bytes.fromhex(scale_down(saved(half), WIDTHS).colour[1:]), (100, 0, 50), by=4
    )
    unseen = Image.new("RGBA", (9, 9), (1, 2, 3, 0))
    assert scale_down(saved(unseen), WIDTHS).colour == "#ffffff"


def test_strips_give_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.frombytes("RGB", (41, 31), Random(1).randbytes(41 * 31 * 3))
    file = saved(noise.resize((2050, 1555), Image.Resampling.BICUBIC))
    whole = scale_down(file, (64,))
    for strip in (3000, 70_000):
        monkeypatch.setattr(scaling, "_STRIP", strip)
        assert scale_down(file, (64,)) == whole


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"progressive": True})]
)
def test_large_ones_are_taken_one_at_a_time_and_hold_up_nothing_that_comes_in(
    kind: str, options: dict[str, Any]
) -> None:
    large = saved(Image.new("L", (4096, 4097)), kind, **options)
    done = threading.Event()

    def scale() -> None:
        scale_down(large, WIDTHS)
        done.set()

    with scaling._ONE_LARGE:
        thread = threading.Thread(target=scale)
        thread.start()
        scale_down(saved(quarters(900, 600)), WIDTHS)  # small ones go on
        inspect(io.BytesIO(large.getvalue()))
        assert not done.wait(0.5)
    assert done.wait(20)
    thread.join()


def test_what_is_too_large_is_not_decoded() -> None:
    with pytest.raises(OutputInvalid, match="more than"):
        scale_down(io.BytesIO(pixel_bomb()), WIDTHS)


@pytest.mark.parametrize("cut", [100, 200])
def test_a_broken_picture_is_said_to_be_broken(cut: int) -> None:
    noise = Image.frombytes("RGB", (40, 40), Random(1).randbytes(4800))
    with pytest.raises(OutputInvalid, match="damaged"):
        scale_down(io.BytesIO(saved(noise).getvalue()[:-cut]), WIDTHS)
