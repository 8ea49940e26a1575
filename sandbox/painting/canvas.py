"""Tools of the painter: gradients, soft light, ridges, mist, grain.

Coordinates are shares of the canvas: x of its width, y of its height, from 0 to 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]
SMOOTH = Image.Resampling.BICUBIC
#: Shapes are drawn this much larger and shrunk, which smooths their edges.
OVERSAMPLING = 2


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """Return a colour between two: 0 is the first, 1 the second."""
    share = max(0.0, min(1.0, share))
    red, green, blue = (
        round(a + (b - a) * share) for a, b in zip(first, second, strict=True)
    )
    return (red, green, blue)


def gradient(size: tuple[int, int], stops: Sequence[tuple[float, RGB]]) -> Image.Image:
    """Return a vertical gradient through the stops (height share, colour)."""
    steps = 256
    column = Image.new("RGB", (1, steps))
    for step in range(steps):
        column.putpixel((0, step), _colour_at(step / (steps - 1), stops))
    return column.resize(size, SMOOTH)


def _colour_at(height: float, stops: Sequence[tuple[float, RGB]]) -> RGB:
    for (low, first), (high, second) in zip(stops, stops[1:], strict=False):
        if height <= high:
            return mix(first, second, (height - low) / max(1e-6, high - low))
    return stops[-1][1]


def ridge(
    rng: random.Random, count: int, *, octaves: int, roughness: float
) -> list[float]:
    """Return a line of ``count`` heights, about -1 to 1: smooth noise in octaves."""
    line = [0.0] * count
    reach, cells = 1.0, 3
    total = 0.0
    for _ in range(octaves):
        knots = [rng.uniform(-1, 1) for _ in range(cells + 2)]
        for index in range(count):
            place = index / count * cells
            cell = int(place)
            ease = (1 - math.cos((place - cell) * math.pi)) / 2
            line[index] += reach * (knots[cell] * (1 - ease) + knots[cell + 1] * ease)
        total += reach
        reach *= roughness
        cells *= 2
    return [height / total * 1.6 for height in line]


class Canvas:
    """A picture in the making."""

    def __init__(self, size: tuple[int, int], rng: random.Random) -> None:
        self.width, self.height = size
        self.image = Image.new("RGB", size)
        self.rng = rng
        #: The length that thicknesses are shares of, whatever the shape of the picture.
        self.unit = math.sqrt(self.width * self.height)

    @property
    def aspect(self) -> float:
        """Return width divided by height."""
        return self.width / self.height

    def wash(self, stops: Sequence[tuple[float, RGB]]) -> None:
        """Cover the canvas with a vertical gradient."""
        self.image = gradient(self.image.size, stops)

    def shape(
        self,
        outlines: Sequence[Points],
        paint: RGB | Image.Image,
        *,
        opacity: float = 1.0,
    ) -> None:
        """Fill polygons with a colour, or with a picture of the canvas's size."""
        tops = [y for outline in outlines for _, y in outline]
        if not tops:
            return
        top = max(0, int(min(tops) * self.height) - 1)
        bottom = min(self.height, int(max(tops) * self.height) + 2)
        if bottom <= top:
            return
        scale = OVERSAMPLING
        mask = Image.new("L", (self.width * scale, (bottom - top) * scale))
        draw = ImageDraw.Draw(mask)
        for outline in outlines:
            points = [
                (x * self.width * scale, (y * self.height - top) * scale)
                for x, y in outline
            ]
            draw.polygon(points, fill=round(255 * opacity))
        self._paste(paint, mask.reduce(scale), top)

    def disc(
        self,
        x: float,
        y: float,
        radius: float,
        paint: RGB | Image.Image,
        *,
        opacity: float = 1.0,
    ) -> None:
        """Fill a circle; the radius is a share of the unit."""
        self.shape([self.circle(x, y, radius)], paint, opacity=opacity)

    def circle(
        self, x: float, y: float, radius: float, *, start: float = 0, turn: float = 1
    ) -> Points:
        """Return a circle's outline, or ``turn`` of it from ``start`` (both in turns)."""
        steps = 72
        return [
            (
                x
                + radius
                * self.unit
                / self.width
                * math.cos(2 * math.pi * (start + turn * i / steps)),
                y
                + radius
                * self.unit
                / self.height
                * math.sin(2 * math.pi * (start + turn * i / steps)),
            )
            for i in range(steps + 1)
        ]

    def _paste(self, paint: RGB | Image.Image, mask: Image.Image, top: int) -> None:
        if isinstance(paint, Image.Image):
            paint = paint.crop((0, top, self.width, top + mask.height))
            self.image.paste(paint, (0, top), mask)
        else:
            self.image.paste(paint, (0, top, self.width, top + mask.height), mask)

    def glow(
        self,
        x: float,
        y: float,
        radius: float,
        colour: RGB,
        *,
        strength: float,
        flat: float = 1,
    ) -> None:
        """Add soft light around a point; ``flat`` above 1 makes it wider than high."""
        wide, high = int(radius * self.unit * 2 * flat), int(radius * self.unit * 2)
        if wide < 2 or high < 2:
            return
        fall = Image.radial_gradient("L").point(
            [
                round(255 * strength * max(0.0, 1 - v / 255 * 1.42) ** 2)
                for v in range(256)
            ]
        )
        light = Image.new("L", self.image.size)
        corner = (int(x * self.width - wide / 2), int(y * self.height - high / 2))
        light.paste(fall.resize((wide, high), SMOOTH), corner)
        self.add_light(light, colour)

    def add_light(self, light: Image.Image, colour: RGB) -> None:
        """Screen a colour over the canvas, as bright as the grey picture says."""
        bands = [light.point([v * part // 255 for v in range(256)]) for part in colour]
        self.image = ImageChops.screen(self.image, Image.merge("RGB", bands))

    def mist(
        self,
        colour: RGB,
        *,
        top: float,
        bottom: float,
        strength: float,
        cell: float = 0.2,
        stretch: float = 4,
    ) -> None:
        """Draw drifting mist that is thickest in the middle between two heights."""
        drift = self.clouds(cell, stretch=stretch)
        steps = Image.new("L", (1, 64))
        middle, reach = (top + bottom) / 2, max(1e-6, (bottom - top) / 2)
        for step in range(64):
            away = abs((step + 0.5) / 64 - middle) / reach
            steps.putpixel((0, step), round(255 * strength * max(0.0, 1 - away**2)))
        band = steps.resize(self.image.size, SMOOTH)
        self.image.paste(colour, (0, 0), ImageChops.multiply(drift, band))

    def clouds(self, cell: float, *, stretch: float = 1) -> Image.Image:
        """Return grey noise like clouds; ``cell`` is the size of the largest puffs."""
        whole: Image.Image | None = None
        coarse = (max(2, self.width // 4), max(2, self.height // 4))
        share = 0.55
        for octave in range(3):
            size = cell * self.unit / 2**octave
            wide = max(2, round(self.width / size / stretch))
            high = max(2, round(self.height / size))
            raw = Image.frombytes("L", (wide, high), self.rng.randbytes(wide * high))
            layer = raw.resize(coarse, SMOOTH)
            whole = (
                layer
                if whole is None
                else Image.blend(whole, layer, share / (octave + 1))
            )
        assert whole is not None
        return whole.resize(self.image.size, Image.Resampling.BILINEAR)

    def stars(self, count: int, *, below: float, colour: RGB) -> None:
        """Sprinkle stars over the upper part, thinner towards its lower edge."""
        draw = ImageDraw.Draw(self.image)
        for _ in range(count):
            x = self.rng.uniform(0, self.width)
            y = self.rng.random() ** 1.3 * below * self.height
            size = self.rng.choice((0.5, 0.5, 0.5, 0.8, 0.8, 1.3)) * self.unit / 1024
            under = self.image.getpixel((min(int(x), self.width - 1), int(y)))
            assert isinstance(under, tuple)
            shade = mix(
                (under[0], under[1], under[2]), colour, self.rng.uniform(0.25, 0.95)
            )
            draw.ellipse((x - size, y - size, x + size, y + size), fill=shade)

    def mirror(self, horizon: float, *, tint: RGB, depth: float) -> None:
        """Turn everything below the horizon into water that mirrors what is above it."""
        edge = round(horizon * self.height)
        below = self.height - edge
        source = self.image.crop((0, max(0, edge - below), self.width, edge))
        source = source.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        small = source.resize(
            (max(2, self.width // 3), max(2, below // 14)), Image.Resampling.BOX
        )
        soft = small.resize((self.width, below), SMOOTH).filter(
            ImageFilter.GaussianBlur(3)
        )
        plain = source.resize((self.width, below), SMOOTH)
        water = Image.blend(plain, soft, 0.7)
        shade = Image.new("L", (1, 64))
        for step in range(64):
            shade.putpixel((0, step), round(255 * (0.12 + depth * (step / 63))))
        water.paste(tint, (0, 0), shade.resize(water.size, SMOOTH))
        self.image.paste(water, (0, edge))
        self._ripple(edge, below)

    def _ripple(self, edge: int, below: int) -> None:
        """Draw fine bright lines on the water, longer the nearer they are."""
        light = Image.new("L", self.image.size)
        draw = ImageDraw.Draw(light)
        for _ in range(150):
            near = self.rng.random() ** 1.8
            y = edge + 2 + near * (below - 3)
            half = (0.008 + 0.07 * near) * self.width * self.rng.uniform(0.4, 1.3)
            x = self.rng.uniform(0, self.width)
            thick = max(1, round(near * 2.6 * self.unit / 1024))
            draw.line(
                (x - half, y, x + half, y), fill=self.rng.randint(14, 46), width=thick
            )
        self.add_light(
            light.filter(ImageFilter.GaussianBlur(self.unit / 800)), (255, 255, 255)
        )

    def vignette(self, strength: float) -> None:
        """Darken the corners a little."""
        fall = Image.radial_gradient("L").point(
            [
                round(255 * strength * max(0.0, v / 255 - 0.35) ** 1.5)
                for v in range(256)
            ]
        )
        self.image.paste((0, 0, 0), (0, 0), fall.resize(self.image.size, SMOOTH))

    def grain(self, amount: int) -> None:
        """Add light film grain, which also hides the steps of gradients."""
        size = self.image.size
        noise = Image.frombytes("L", size, self.rng.randbytes(size[0] * size[1]))
        noise = noise.point([round(128 + (v - 128) * amount / 128) for v in range(256)])
        self.image = ImageChops.add(
            self.image, Image.merge("RGB", [noise] * 3), 1, -128
        )
