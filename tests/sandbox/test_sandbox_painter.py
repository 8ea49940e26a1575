"""The pictures: always the same, always different, right size, right format, soon done."""

import io
from dataclasses import replace

import pytest
from PIL import Image

from sandbox.painter import (
    LABEL,
    MOTIFS,
    Commission,
    bomb,
    choose_motif,
    paint,
    paint_plain,
)
from sandbox.painting.palettes import PALETTES, choose_palette

SMALL = Commission(
    prompt="a lighthouse in a storm",
    subject="black-forest-labs/flux-schnell []",
    seed=7,
    index=0,
    width=320,
    height=192,
    format="webp",
    quality=80,
)
PAINTERS = pytest.mark.parametrize("draw", [paint, paint_plain])


def opened(body: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(body))
    image.load()
    return image


@PAINTERS
def test_the_same_commission_gives_the_same_bytes(draw):
    assert draw(SMALL) == draw(replace(SMALL))


@PAINTERS
@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"index": 1}, {"prompt": "a lighthouse"}, {"subject": "other"}],
    ids=lambda change: next(iter(change)),
)
def test_another_commission_gives_another_picture(draw, change):
    assert draw(SMALL) != draw(replace(SMALL, **change))


@PAINTERS
@pytest.mark.parametrize("kind", ["webp", "jpeg", "png"])
@pytest.mark.parametrize("size", [(320, 192), (192, 320), (256, 256), (16, 700)])
def test_a_picture_has_the_size_and_format_asked_for(draw, kind, size):
    image = opened(draw(replace(SMALL, format=kind, width=size[0], height=size[1])))

    assert image.size == size
    assert image.format == kind.upper()


@pytest.mark.parametrize("motif", sorted(MOTIFS))
def test_every_motif_is_a_picture_and_not_a_plain_area(motif):
    prompt = MOTIFS[motif][1].split()[0]
    image = opened(paint(replace(SMALL, prompt=prompt, format="png"))).convert("L")

    low, high = image.getextrema()
    assert high - low > 80


@pytest.mark.parametrize("palette", sorted(PALETTES))
def test_every_palette_can_be_painted_with(palette):
    words = {"dawn": "sunrise", "mono": "noir", "ember": "lava"}
    image = opened(paint(replace(SMALL, prompt=f"hills {words.get(palette, palette)}")))

    assert image.size == (320, 192)


def test_a_picture_larger_than_it_is_composed_has_its_full_size():
    image = opened(paint(replace(SMALL, width=1600, height=1200, format="jpeg")))

    assert image.size == (1600, 1200)


@pytest.mark.parametrize("kind", ["webp", "jpeg", "png"])
def test_a_picture_says_that_no_real_model_made_it(kind):
    exif = opened(paint(replace(SMALL, format=kind))).getexif()

    assert exif[0x010E] == LABEL


def test_a_transparent_background_is_transparent_at_the_corners():
    image = opened(paint(replace(SMALL, transparent=True, format="png")))

    assert image.mode == "RGBA"
    assert image.getpixel((0, 0))[3] == 0
    assert image.getpixel((160, 96))[3] == 255


@pytest.mark.parametrize(
    "prompt, motif",
    [
        ("a lighthouse by the ocean", "sea"),
        ("Tokyo skyline", "city"),
        ("northern lights, aurora", "aurora"),
        ("a bauhaus poster", "geometry"),
        ("an orchid in a garden", "botanical"),
    ],
)
def test_words_choose_the_motif(prompt, motif):
    assert choose_motif(prompt, SMALL.dice()) == motif


def test_colour_words_choose_the_palette():
    def middle(prompt):
        return choose_palette(prompt, SMALL.dice(), "dawn").middle

    red, _, blue = middle("crimson")
    assert red > blue
    red, _, blue = middle("a blue thing")
    assert blue > red
    assert middle("a cat at night") == PALETTES["night"].middle
    assert middle("a cat") == PALETTES["dawn"].middle


def test_the_bomb_claims_to_be_huge_and_is_small():
    body = bomb(60_000)

    assert len(body) < 200
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(OSError):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000 * 60_000 - 1)
            opened(body)
