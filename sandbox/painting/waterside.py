"""Motifs by the water: aurora over a lake, lighthouse, skyline."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFilter

from sandbox.painting.canvas import RGB, Canvas, Points, mix, ridge
from sandbox.painting.palettes import Palette
from sandbox.painting.scenery import pines, ridge_outline, sky, sun


def aurora(canvas: Canvas, palette: Palette) -> None:
    """Paint northern lights over a still lake."""
    rng = canvas.rng
    deep = mix(palette.top, (4, 8, 24), 0.82)
    canvas.wash(
        [
            (0, deep),
            (0.45, mix(deep, palette.middle, 0.35)),
            (1, mix(deep, palette.middle, 0.6)),
        ]
    )
    canvas.stars(420, below=0.62, colour=(240, 246, 255))
    colours = [
        palette.accents[0],
        mix(palette.accents[0], palette.accents[1], 0.6),
        palette.accents[2],
    ]
    for colour in colours:
        canvas.add_light(_curtain(canvas), mix(colour, (120, 255, 190), 0.25))
    horizon = rng.uniform(0.66, 0.74)
    for near in (0.15, 0.55, 1.0):
        line = ridge_outline(
            canvas,
            horizon - 0.035 * (1 - near),
            0.09 * (1.15 - near),
            octaves=7,
            roughness=0.5,
        )
        canvas.shape(
            [line],
            mix(mix(deep, palette.middle, 0.32), mix(deep, (2, 4, 10), 0.7), near),
        )
    pines(
        canvas, mix(deep, (1, 2, 6), 0.75), base=horizon + 0.004, tall=0.055, count=46
    )
    canvas.mirror(horizon, tint=mix(deep, (1, 3, 10), 0.5), depth=0.55)


def sea(canvas: Canvas, palette: Palette) -> None:
    """Paint the sea under a large sky, with a lighthouse on its rock."""
    rng = canvas.rng
    horizon = rng.uniform(0.56, 0.66)
    sky(canvas, palette, horizon)
    canvas.mist(
        mix(palette.light, palette.horizon, 0.4),
        top=0.02,
        bottom=horizon,
        strength=0.75,
        cell=0.16,
    )
    left = rng.random() < 0.5
    sun_x = rng.uniform(0.58, 0.8) if left else rng.uniform(0.2, 0.42)
    sun(canvas, palette, sun_x, horizon - rng.uniform(0.05, 0.16), 0.055)
    line = ridge_outline(canvas, horizon - 0.012, 0.05, octaves=5, roughness=0.5)
    canvas.shape([line], mix(palette.far, palette.horizon, 0.35))
    canvas.mirror(horizon, tint=mix(palette.top, palette.near, 0.35), depth=0.62)
    _glitter(canvas, palette, sun_x, horizon)
    _lighthouse(
        canvas,
        palette,
        rng.uniform(0.14, 0.26) if left else rng.uniform(0.74, 0.86),
        horizon,
    )
    for _ in range(rng.randint(3, 7)):
        _gull(canvas, palette, horizon)


def city(canvas: Canvas, palette: Palette) -> None:
    """Paint a skyline in three depths with lit windows, mirrored in a river."""
    rng = canvas.rng
    horizon = 0.80
    sky(canvas, palette, horizon)
    if palette.night:
        canvas.stars(160, below=0.5, colour=(240, 244, 255))
    sun(canvas, palette, rng.uniform(0.2, 0.8), rng.uniform(0.22, 0.5), 0.07)
    canvas.glow(0.5, horizon, 0.6, palette.accents[1], strength=0.5, flat=2)
    for depth in (0.0, 0.5, 1.0):
        dark = mix(mix(palette.far, palette.horizon, 0.25), palette.near, depth)
        _skyline(canvas, palette, horizon, depth, dark)
        if depth < 1:
            canvas.mist(
                palette.horizon, top=horizon - 0.3, bottom=horizon + 0.1, strength=0.55
            )
    canvas.mirror(horizon, tint=palette.near, depth=0.5)


def _curtain(canvas: Canvas) -> Image.Image:
    """Return the light of one curtain: rays that stand on a winding line."""
    rng = canvas.rng
    wide, high = max(8, canvas.width // 4), max(8, canvas.height // 4)
    light = Image.new("L", (wide, high))
    draw = ImageDraw.Draw(light)
    foot = ridge(rng, wide, octaves=3, roughness=0.45)
    rays = ridge(rng, wide, octaves=7, roughness=0.85)
    level = rng.uniform(0.36, 0.56)
    for x in range(wide):
        y = (level + 0.13 * foot[x]) * high
        length = high * (0.20 + 0.20 * (1 + rays[x]) / 2)
        bright = 70 + 110 * max(0.0, min(1.0, 0.55 + 0.7 * rays[x]))
        for step in range(12):
            upper = y - length * (step + 1) / 12
            fade = (1 - step / 12) ** 1.6
            draw.line((x, upper, x, y - length * step / 12), fill=round(bright * fade))
        draw.line((x, y, x, y + high * 0.012), fill=round(bright * 0.5))
    soft = light.filter(ImageFilter.GaussianBlur(max(1.0, canvas.unit / 700)))
    return soft.resize(canvas.image.size, Image.Resampling.BICUBIC)


def _glitter(canvas: Canvas, palette: Palette, x: float, horizon: float) -> None:
    """Lay the sun's path on the water."""
    rng = canvas.rng
    light = Image.new("L", canvas.image.size)
    draw = ImageDraw.Draw(light)
    for _ in range(260):
        near = rng.random() ** 1.3
        y = (horizon + 0.004 + near * (1 - horizon)) * canvas.height
        spread = (0.012 + 0.10 * near) * canvas.width
        centre = x * canvas.width + rng.gauss(0, 1) * spread
        half = (0.004 + 0.022 * near) * canvas.width
        thick = max(1, round((0.6 + 2.4 * near) * canvas.unit / 1024))
        draw.line(
            (centre - half, y, centre + half, y), fill=rng.randint(70, 200), width=thick
        )
    canvas.add_light(
        light.filter(ImageFilter.GaussianBlur(canvas.unit / 900)), palette.light
    )


def _lighthouse(canvas: Canvas, palette: Palette, x: float, horizon: float) -> None:
    """Draw a banded tower on a rock at the canvas's lower edge, its lamp lit."""
    dark, wide = palette.near, 1 / canvas.aspect
    _rock(canvas, dark, x, horizon)
    canvas.mist(
        mix(dark, palette.far, 0.5),
        top=horizon + 0.02,
        bottom=horizon + 0.3,
        strength=0.25,
    )
    foot, head, bands = horizon + 0.06, horizon - 0.235, 5
    chalk = mix((246, 240, 230), dark, 0.10)
    stripe = mix(palette.accents[0], dark, 0.18)
    for band in range(bands):
        low, high = band / bands, (band + 1) / bands
        sides = (0.030 * wide * (1 - 0.42 * low), 0.030 * wide * (1 - 0.42 * high))
        ends = (foot + (head - foot) * low, foot + (head - foot) * high)
        canvas.shape([_block(x, sides, ends)], chalk if band % 2 else stripe)
        shaded = [(max(x, corner), y) for corner, y in _block(x, sides, ends)]
        canvas.shape([shaded], dark, opacity=0.28)
    cabin = 0.017 * wide
    lamp = mix(palette.light, (255, 236, 170), 0.6)
    roof = mix(palette.accents[0], dark, 0.35)
    canvas.shape([_block(x, (cabin * 1.5, cabin * 1.5), (head, head - 0.008))], dark)
    canvas.shape([_block(x, (cabin, cabin), (head - 0.008, head - 0.038))], lamp)
    canvas.shape([_block(x, (cabin * 1.3, 0), (head - 0.038, head - 0.066))], roof)
    canvas.glow(x, head - 0.023, 0.16, (255, 236, 180), strength=0.6)


def _rock(canvas: Canvas, colour: RGB, x: float, horizon: float) -> None:
    steps = 90
    outline: Points = []
    for step, bump in enumerate(ridge(canvas.rng, steps, octaves=6, roughness=0.6)):
        side = step / (steps - 1) * 2 - 1
        fall = (
            0.16 * abs(side) + 0.30 * abs(side) ** 3 - 0.03 * bump * (0.25 + abs(side))
        )
        outline.append((x + side * 0.42, horizon + 0.045 + fall))
    canvas.shape([[*outline, (x + 0.46, 1.02), (x - 0.46, 1.02)]], colour)


def _block(x: float, sides: tuple[float, float], ends: tuple[float, float]) -> Points:
    """Return an upright block: half widths and heights of its foot and its head."""
    (low, high), (foot, head) = sides, ends
    return [(x - low, foot), (x + low, foot), (x + high, head), (x - high, head)]


def _gull(canvas: Canvas, palette: Palette, horizon: float) -> None:
    rng = canvas.rng
    x, y = rng.uniform(0.1, 0.9), rng.uniform(0.12, horizon - 0.2)
    span = rng.uniform(0.010, 0.022)
    wings: list[Points] = []
    for side in (-1, 1):
        tip = x + side * span / canvas.aspect
        middle = (x + tip) / 2
        wings.append(
            [
                (x, y),
                (middle, y - span * 0.45),
                (tip, y - span * 0.15),
                (middle, y - span * 0.28),
            ]
        )
    canvas.shape(wings, palette.near, opacity=0.8)


def _skyline(
    canvas: Canvas, palette: Palette, horizon: float, depth: float, dark: RGB
) -> None:
    """Draw one row of buildings and light some of its windows."""
    rng = canvas.rng
    draw = ImageDraw.Draw(canvas.image)
    lamps = [mix(palette.light, (255, 214, 130), 0.55)]
    if palette.night:
        lamps += [lamps[0], palette.accents[0], palette.accents[2]]
    x = -rng.uniform(0, 0.05)
    while x < 1:
        wide = (
            rng.uniform(0.035, 0.085)
            * (0.7 + 0.6 * depth)
            / max(1.0, canvas.aspect) ** 0.5
        )
        centre = 1 - abs(x + wide / 2 - 0.5) * 1.1
        tall = rng.uniform(0.10, 0.30) + 0.30 * (1 - depth) * centre * rng.random()
        box = (x, horizon - tall, x + wide, horizon + 0.01)
        px = [
            round(v * (canvas.width if i % 2 == 0 else canvas.height))
            for i, v in enumerate(box)
        ]
        draw.rectangle((px[0], px[1], px[2], px[3]), fill=dark)
        _roof(canvas, draw, (px[0], px[1], px[2]), dark)
        _windows(
            canvas,
            draw,
            (px[0], px[1], px[2], px[3]),
            mix(dark, rng.choice(lamps), 0.35 + 0.6 * depth),
            depth,
        )
        x += wide + (rng.uniform(0, 0.012) if depth else 0)


def _roof(
    canvas: Canvas, draw: ImageDraw.ImageDraw, top: tuple[int, int, int], dark: RGB
) -> None:
    left, y, right = top
    middle, rise = (left + right) // 2, round(
        canvas.height * canvas.rng.uniform(0.015, 0.07)
    )
    match canvas.rng.randrange(5):
        case 0:
            draw.line(
                (middle, y, middle, y - rise),
                fill=dark,
                width=max(1, round(canvas.unit / 500)),
            )
        case 1:
            step = (right - left) // 5
            draw.rectangle((left + step, y - rise // 2, right - step, y), fill=dark)
        case 2:
            draw.polygon([(left, y), (right, y), (middle, y - rise)], fill=dark)


def _windows(
    canvas: Canvas,
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    lamp: RGB,
    depth: float,
) -> None:
    rng = canvas.rng
    size = max(2, round(canvas.unit / 1024 * (3 + 2.5 * depth)))
    lit = rng.uniform(0.12, 0.5)
    left, top, right, bottom = box
    for y in range(top + size * 2, bottom - size, size * 3):
        for x in range(left + size, right - size, round(size * 2.2)):
            if rng.random() < lit:
                draw.rectangle((x, y, x + size - 1, y + round(size * 1.3)), fill=lamp)
