"""Motifs on land: mountains, forest, desert."""

from __future__ import annotations

import math

from sandbox.painting.canvas import Canvas, Points, gradient, mix
from sandbox.painting.palettes import Palette
from sandbox.painting.scenery import pines, ridge_outline, sky, sun


def mountains(canvas: Canvas, palette: Palette) -> None:
    """Paint ranges behind ranges, with mist between them and a sun or moon."""
    rng = canvas.rng
    sky(canvas, palette, 0.72)
    x, y = rng.uniform(0.22, 0.78), rng.uniform(0.16, 0.40)
    sun(canvas, palette, x, y, rng.uniform(0.045, 0.085))
    layers = rng.randint(5, 6)
    for layer in range(layers):
        near = layer / (layers - 1)
        base = 0.44 + 0.46 * near**1.15
        tall = 0.17 * (1 - near) + 0.08
        line = ridge_outline(
            canvas, base, tall, octaves=7, roughness=0.47, sharp=near < 0.7
        )
        colour = mix(palette.far, palette.near, near**0.9)
        foot = mix(colour, palette.horizon, 0.55 * (1 - near))
        top = min(height for _, height in line)
        paint = gradient(
            canvas.image.size,
            [(0, colour), (top, colour), (top + 0.3, foot), (1, foot)],
        )
        canvas.shape([line], paint)
        if near < 0.9:
            canvas.mist(
                palette.horizon,
                top=base - 0.02,
                bottom=base + 0.2,
                strength=0.55 * (1 - near * 0.6),
            )
    pines(canvas, palette.near, base=0.985, tall=0.13, count=16)


def forest(canvas: Canvas, palette: Palette) -> None:
    """Paint rows of firs that fade into the mist, with light from behind."""
    rng = canvas.rng
    canvas.wash(
        [
            (0, mix(palette.middle, palette.top, 0.55)),
            (0.5, palette.horizon),
            (1, palette.horizon),
        ]
    )
    x, y = rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.36)
    canvas.glow(x, y, 0.75, palette.light, strength=0.75)
    canvas.disc(x, y, 0.05, mix(palette.light, (255, 255, 255), 0.4), opacity=0.9)
    rows = 5
    for row in range(rows):
        near = row / (rows - 1)
        base = 0.56 + 0.50 * near
        tall = 0.13 + 0.52 * near**1.7
        colour = mix(mix(palette.far, palette.horizon, 0.35), palette.near, near**0.8)
        hill = ridge_outline(canvas, base - 0.02, 0.05, octaves=4, roughness=0.45)
        canvas.shape([hill], colour)
        pines(canvas, colour, base=base, tall=tall, count=round(44 - 35 * near))
        if near < 1:
            canvas.mist(
                mix(palette.horizon, palette.light, 0.4),
                top=base - tall * 0.5,
                bottom=base + 0.2,
                strength=0.9 - 0.35 * near,
            )


def desert(canvas: Canvas, palette: Palette) -> None:
    """Paint dunes with a lit and a shaded side under a big sun."""
    rng = canvas.rng
    sky(canvas, palette, 0.6)
    x = rng.uniform(0.25, 0.75)
    sun(canvas, palette, x, rng.uniform(0.24, 0.42), rng.uniform(0.08, 0.13))
    sand = mix(palette.accents[1], palette.light, 0.25)
    for layer in range(5):
        near = layer / 4
        base = 0.56 + 0.33 * near
        lit = mix(mix(sand, palette.horizon, 0.5), sand, near**0.7)
        lit = mix(lit, palette.accents[0], 0.32 * near)
        shade = mix(lit, mix(palette.near, palette.accents[3], 0.4), 0.38 + 0.32 * near)
        line = ridge_outline(canvas, base, 0.10 + 0.05 * near, octaves=3, roughness=0.3)
        top = min(y for _, y in line)
        paint = gradient(
            canvas.image.size,
            [(0, lit), (top, lit), (top + 0.35, mix(lit, shade, 0.6)), (1, shade)],
        )
        canvas.shape([line], paint)
        canvas.shape([_lee_side(canvas, line)], shade, opacity=0.75)
        if layer < 3:
            canvas.mist(palette.horizon, top=base, bottom=base + 0.16, strength=0.35)


def _lee_side(canvas: Canvas, line: Points) -> Points:
    """Return the shaded side of a dune: from its crest down to a slanting lower edge."""
    crest = line[:-2]
    width = canvas.rng.uniform(0.45, 0.75)
    start = canvas.rng.uniform(-0.15, 1.0 - width)
    part = [
        (x, y, (x - start) / width) for x, y in crest if start <= x <= start + width
    ]
    depth = canvas.rng.uniform(0.16, 0.26)
    lower = [(x, y + depth * math.sin(math.pi * share**1.7)) for x, y, share in part]
    return [(x, y) for x, y, _ in part] + lower[::-1]
