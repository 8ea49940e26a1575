"""Palettes: chosen from the words of a prompt, else from its hash."""

from __future__ import annotations

import colorsys
import random
import re
from dataclasses import dataclass, replace

from sandbox.painting.canvas import RGB, mix


@dataclass(frozen=True, slots=True)
class Palette:
    """The colours of one picture, from the sky down."""

    top: RGB
    middle: RGB
    horizon: RGB
    light: RGB
    far: RGB
    near: RGB
    accents: tuple[RGB, RGB, RGB, RGB]
    night: bool = False


def _rgb(text: str) -> RGB:
    return (int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16))


def _palette(colours: str, *, night: bool = False) -> Palette:
    """Read ten colours: top, middle, horizon, light, far, near and four accents."""
    top, middle, horizon, light, far, near, one, two, three, four = map(
        _rgb, colours.split()
    )
    return Palette(
        top, middle, horizon, light, far, near, (one, two, three, four), night
    )


PALETTES = {
    "dawn": _palette(
        "5b7db1 c9a9c4 ffd9b8 fff1d6 b7a3bd 2f3450 e88873 f4c095 5f7fa8 3d405b"
    ),
    "day": _palette(
        "2f7fc4 8cc4e8 e9f4f2 fffbe8 a3c4d3 22453f e9a23b d95d39 3b8ea5 2d6a4f"
    ),
    "sunset": _palette(
        "2d2a55 b0486f ff9e5e ffe0a3 a3577a 1f1733 ff6b4a ffc15e 7a3e78 2f2350"
    ),
    "dusk": _palette(
        "1b2348 56508c e59a9b ffd8b5 7a6c9c 15172e e27d8a f2b880 5661a3 2a2c55"
    ),
    "night": _palette(
        "060b1f 10244a 2b4f74 e6f0ff 21395c 05080f 57e2b2 7b8cff c86bff f5d76e",
        night=True,
    ),
    "winter": _palette(
        "6d93b8 b4cde0 f3f4f4 fffaf0 c3d4e2 2b3d54 8fb8de e0a899 4c6f92 dfe8ef"
    ),
    "autumn": _palette(
        "8a9aa6 dcc8a6 f6dfb4 fff2cf bf9a78 3a2220 c8553d e9a13b 8f3b2e 588157"
    ),
    "spring": _palette(
        "8ec5d6 d6e8d4 fdeee4 fff9e8 b4d0bd 2e5144 f2a1b5 f7c59f 7fb685 4d8b8b"
    ),
    "ember": _palette(
        "220f1d 7c1f2c e8562f ffd58a 6d2531 12080f ff7b3d ffbd59 b3262e 4b1630"
    ),
    "mono": _palette(
        "6e747c b3b7bb ecebe7 ffffff b0b4b8 1d2024 8a8f96 d9d6cf 4a4f57 2d3136"
    ),
}

_WORDS = {
    "dawn": "dawn sunrise morning pastel soft gentle dream dreamy",
    "day": "day noon summer sunny blue-sky bright holiday",
    "sunset": "sunset evening golden-hour warm romantic",
    "dusk": "dusk twilight purple-hour mystic mysterious",
    "night": "night midnight moon moonlit moonlight star stars starry galaxy space aurora "
    "northern neon cyberpunk dark",
    "winter": "winter snow snowy ice icy frozen arctic glacier cold christmas",
    "autumn": "autumn fall october rust vintage harvest cosy cozy",
    "spring": "spring blossom cherry april fresh meadow",
    "ember": "fire ember lava volcano mars hell dragon burning",
    "mono": "monochrome grayscale greyscale black-and-white noir charcoal pencil ink",
}
_HUES = {
    "red": 358, "scarlet": 355, "crimson": 350, "coral": 12, "orange": 26, "amber": 38,
    "gold": 44, "golden": 44, "yellow": 50, "lime": 85, "green": 130, "emerald": 150,
    "mint": 158, "teal": 178, "turquoise": 176, "cyan": 188, "azure": 205, "blue": 216,
    "navy": 224, "indigo": 244, "violet": 268, "purple": 278, "lavender": 262,
    "magenta": 308, "pink": 334, "rose": 344,
}  # fmt: skip


def words_of(prompt: str) -> set[str]:
    """Return the words of a prompt, in small letters."""
    return set(_in_order(prompt))


def _in_order(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+", prompt.lower())


def choose_palette(prompt: str, rng: random.Random, usual: str) -> Palette:
    """Return the palette a prompt asks for, else one of the ``usual`` ones of the motif.

    A colour word tints the palette that the mood words chose.
    """
    words = words_of(prompt)
    hues = [_HUES[word] for word in _in_order(prompt) if word in _HUES]
    moods = [name for name, said in _WORDS.items() if words & set(said.split())]
    if hues and not moods:
        return _from_hue(hues[0], hues[-1] if len(hues) > 1 else None, rng)
    chosen = PALETTES[rng.choice(moods or usual.split())]
    if hues:
        tint = _hls(hues[0], 0.55, 0.7)
        chosen = replace(
            chosen,
            middle=mix(chosen.middle, tint, 0.5),
            horizon=mix(chosen.horizon, tint, 0.35),
            far=mix(chosen.far, tint, 0.4),
            accents=(tint, *chosen.accents[1:]),
        )
    return chosen


def _from_hue(hue: float, second: float | None, rng: random.Random) -> Palette:
    """Make a palette around one colour, with a warm or cool companion."""
    other = (
        second
        if second is not None
        else (hue + rng.choice((150, 180, 210, 40, -40))) % 360
    )
    return Palette(
        top=_hls(hue, 0.30, 0.55),
        middle=_hls(hue, 0.58, 0.50),
        horizon=mix(_hls(hue, 0.86, 0.55), _hls(other, 0.86, 0.6), 0.35),
        light=mix(_hls(other, 0.92, 0.8), (255, 250, 235), 0.5),
        far=_hls(hue, 0.62, 0.34),
        near=_hls(hue, 0.11, 0.45),
        accents=(
            _hls(hue, 0.52, 0.68),
            _hls(other, 0.60, 0.68),
            _hls(hue + 25, 0.40, 0.50),
            _hls(other - 25, 0.30, 0.45),
        ),
    )


def _hls(hue: float, lightness: float, saturation: float) -> RGB:
    red, green, blue = colorsys.hls_to_rgb((hue % 360) / 360, lightness, saturation)
    return (round(red * 255), round(green * 255), round(blue * 255))
