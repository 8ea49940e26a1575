"""What several motifs share: sky, sun, ridges, firs."""

from __future__ import annotations

from sandbox.painting.canvas import RGB, Canvas, Points, mix, ridge
from sandbox.painting.palettes import Palette


def sky(canvas: Canvas, palette: Palette, horizon: float) -> None:
    """Wash the sky, with stars by night and soft clouds by day."""
    canvas.wash(
        [
            (0, palette.top),
            (horizon * 0.55, palette.middle),
            (horizon, palette.horizon),
            (1, palette.horizon),
        ]
    )
    if palette.night:
        canvas.stars(320, below=horizon * 0.9, colour=(238, 244, 255))
    else:
        canvas.mist(
            mix(palette.light, palette.horizon, 0.3),
            top=-0.1,
            bottom=horizon,
            strength=0.4,
            cell=0.22,
        )


def sun(canvas: Canvas, palette: Palette, x: float, y: float, radius: float) -> None:
    """Draw the sun or the moon in its halo; the radius is a share of the unit."""
    canvas.glow(x, y, radius * 8, palette.light, strength=0.35)
    canvas.glow(x, y, radius * 3, palette.light, strength=0.55)
    canvas.disc(x, y, radius, mix(palette.light, (255, 255, 255), 0.35), opacity=0.96)


def ridge_outline(
    canvas: Canvas,
    base: float,
    tall: float,
    *,
    octaves: int,
    roughness: float,
    sharp: bool = False,
) -> Points:
    """Return the outline of a range: its ridge, closed along the bottom edge."""
    count = max(64, canvas.width // 4)
    heights = ridge(canvas.rng, count, octaves=octaves, roughness=roughness)
    if sharp:
        heights = [0.55 - 1.5 * abs(h) for h in heights]
    line = [(i / (count - 1), base - tall * h) for i, h in enumerate(heights)]
    return [*line, (1.0, 1.02), (0.0, 1.02)]


def pines(canvas: Canvas, colour: RGB, *, base: float, tall: float, count: int) -> None:
    """Draw a row of firs of different heights."""
    rng = canvas.rng
    outlines = []
    for index in range(count):
        x = (index + rng.uniform(-0.4, 0.4) + 0.5) / count
        height = tall * rng.uniform(0.45, 1.0)
        outlines.append(_pine(canvas, x, base + rng.uniform(0, 0.02), height))
    canvas.shape(outlines, colour)


def _pine(canvas: Canvas, x: float, base: float, height: float) -> Points:
    rng = canvas.rng
    half = height * rng.uniform(0.15, 0.21) / canvas.aspect
    tiers = 11
    left: Points = []
    right: Points = []
    for tier in range(tiers):
        low = (tier + 1) / tiers
        y = base - height * 0.94 * (1 - low)
        reach = half * low**0.85
        for side, points in ((-1, left), (1, right)):
            out = reach * rng.uniform(0.82, 1.12)
            points.append((x + side * out, y + height * 0.015))
            points.append((x + side * out * 0.62, y - height * 0.008))
    trunk = [(x + half * 0.12, base + 0.08), (x - half * 0.12, base + 0.08)]
    return [(x, base - height), *right, *trunk, *left[::-1]]
