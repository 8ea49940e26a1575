"""Motifs without a horizon: flowing strokes, geometry, plants."""

from __future__ import annotations

import math

from PIL import ImageDraw

from sandbox.painting.canvas import OVERSAMPLING, RGB, Canvas, Points, mix
from sandbox.painting.palettes import Palette


def flow(canvas: Canvas, palette: Palette) -> None:
    """Paint long strokes that follow a field of slow waves."""
    rng = canvas.rng
    back = mix(palette.top, palette.near, 0.65)
    canvas.wash(
        [
            (0, back),
            (0.6, mix(back, palette.middle, 0.35)),
            (1, mix(back, palette.accents[2], 0.3)),
        ]
    )
    waves = [
        (rng.uniform(0.8, 3.2), rng.uniform(0.8, 3.2), rng.uniform(0, 6.28))
        for _ in range(4)
    ]
    lean = rng.uniform(0, 6.28)
    sheet = canvas.image.resize(
        (canvas.width * OVERSAMPLING, canvas.height * OVERSAMPLING)
    )
    draw = ImageDraw.Draw(sheet)
    scale = canvas.unit * OVERSAMPLING
    wide, high = sheet.size
    colours = (*palette.accents, palette.light, palette.horizon)
    centre = rng.random()
    for number in range(850):
        x, y = rng.uniform(-0.1, 1.1) * wide, rng.uniform(-0.1, 1.1) * high
        path = [(x, y)]
        for _ in range(rng.randint(12, 30)):
            angle = lean
            for across, down, phase in waves:
                angle += 0.75 * math.sin(
                    across * x / scale * 2.2 + down * y / scale * 2.2 + phase
                )
            x += math.cos(angle) * scale * 0.014
            y += math.sin(angle) * scale * 0.014
            path.append((x, y))
        place = (x / wide + y / high) / 2
        pick = int((place + centre + rng.gauss(0, 0.13)) * len(colours)) % len(colours)
        colour = mix(colours[pick], back, rng.uniform(0.0, 0.45) * (1 - number / 850))
        thick = round(scale * rng.choice((0.0012, 0.002, 0.0035, 0.006, 0.009)))
        draw.line(path, fill=colour, width=max(2, thick), joint="curve")
    canvas.image = sheet.reduce(OVERSAMPLING)


def geometry(canvas: Canvas, palette: Palette) -> None:
    """Paint a calm grid of circles, arcs and bars."""
    rng = canvas.rng
    paper = mix(palette.light, (245, 238, 224), 0.65)
    canvas.wash([(0, paper), (1, mix(paper, palette.horizon, 0.18))])
    cells = rng.choice((3, 4, 4, 5))
    short = min(canvas.width, canvas.height)
    side = short * 0.86 / cells
    across = max(1, int(canvas.width * 0.90 / side))
    down = max(1, int(canvas.height * 0.90 / side))
    left, top = (canvas.width - across * side) / 2, (canvas.height - down * side) / 2
    sheet = canvas.image.resize(
        (canvas.width * OVERSAMPLING, canvas.height * OVERSAMPLING)
    )
    draw = ImageDraw.Draw(sheet)
    inks = [*palette.accents, palette.near, mix(palette.near, palette.accents[2], 0.5)]
    last = -1
    for row in range(down):
        for column in range(across):
            box = (
                (left + column * side) * OVERSAMPLING,
                (top + row * side) * OVERSAMPLING,
                side * OVERSAMPLING,
            )
            ground, ink, third = rng.sample(inks, 3)
            kind = rng.choice([k for k in range(9) if k != last])
            last = kind
            _tile(draw, box, kind, ground, ink, third, rng.randrange(4))
    canvas.image = sheet.reduce(OVERSAMPLING)


def _tile(
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float],
    kind: int,
    ground: RGB,
    ink: RGB,
    third: RGB,
    turn: int,
) -> None:
    """Draw one cell; ``turn`` quarter-turns it."""
    x, y, s = box
    draw.rectangle((x, y, x + s, y + s), fill=ground)
    corner_x, corner_y = (x, x + s, x + s, x)[turn], (y, y, y + s, y + s)[turn]

    def round_at(
        cx: float, cy: float, radius: float, fill: RGB, start: int = 0, end: int = 360
    ) -> None:
        draw.pieslice(
            (cx - radius, cy - radius, cx + radius, cy + radius), start, end, fill=fill
        )

    quarter = (turn * 90, turn * 90 + 90)
    match kind:
        case 0:
            round_at(x + s / 2, y + s / 2, s * 0.40, ink)
            round_at(x + s / 2, y + s / 2, s * 0.16, third)
        case 1 | 2:
            for share, fill in ((1.0, ink), (0.66, ground), (0.33, third)):
                round_at(corner_x, corner_y, s * share, fill, *quarter)
        case 3:
            round_at(x + s / 2, y + s / 2, s * 0.5, ink, turn * 90, turn * 90 + 180)
            round_at(
                x + s / 2, y + s / 2, s * 0.22, third, turn * 90 + 180, turn * 90 + 360
            )
        case 4:
            for bar in range(4):
                at = s * bar / 4
                sides = (
                    (x + at, y, x + at + s / 8, y + s)
                    if turn % 2
                    else (x, y + at, x + s, y + at + s / 8)
                )
                draw.rectangle(sides, fill=ink)
        case 5:
            corners = [(x, y), (x + s, y), (x + s, y + s), (x, y + s)]
            del corners[turn]
            draw.polygon(corners, fill=ink)
        case 6:
            round_at(x + s / 4, y + s / 4, s * 0.19, ink)
            round_at(x + s * 3 / 4, y + s / 4, s * 0.19, third)
            round_at(x + s / 4, y + s * 3 / 4, s * 0.19, third)
            round_at(x + s * 3 / 4, y + s * 3 / 4, s * 0.19, ink)
        case 7:
            round_at(x, y + s / 2, s / 2, ink, 270, 450)
            round_at(x + s, y + s / 2, s / 2, third, 90, 270)
        case _:
            round_at(corner_x, corner_y, s, ink, *quarter)


def botanical(canvas: Canvas, palette: Palette) -> None:
    """Paint leaves and blossoms before a pale disc."""
    rng = canvas.rng
    paper = mix(palette.light, palette.horizon, 0.35)
    canvas.wash([(0, paper), (1, mix(paper, palette.horizon, 0.55))])
    x, y = rng.uniform(0.36, 0.64), rng.uniform(0.34, 0.48)
    canvas.disc(
        x, y, rng.uniform(0.24, 0.32), mix(palette.accents[1], paper, 0.35), opacity=0.9
    )
    greens = [
        mix(palette.near, (58, 120, 84), 0.45),
        mix(palette.accents[3], (40, 96, 76), 0.45),
        mix(palette.accents[2], (96, 150, 110), 0.4),
    ]
    for depth in range(3):
        tint = mix(greens[depth], paper, 0.55 - 0.27 * depth)
        stems = 4 if depth < 2 else 3
        for stem in range(stems):
            place = (stem + rng.uniform(0.2, 0.8)) / stems
            _stem(canvas, place, tint, depth, palette)
    canvas.mist(paper, top=0.8, bottom=1.2, strength=0.5)


def _stem(
    canvas: Canvas, place: float, colour: RGB, depth: int, palette: Palette
) -> None:
    """Draw one bending stem with its leaves, and a blossom on some."""
    rng = canvas.rng
    x, y = place, 1.04
    heading = -math.pi / 2 + rng.uniform(-0.35, 0.35) + (0.5 - x) * 0.5
    bend = rng.uniform(-0.05, 0.05)
    steps = rng.randint(8, 13)
    pace = rng.uniform(0.052, 0.072) * (1.1 - 0.12 * depth)
    leaf = pace * rng.uniform(1.5, 2.5)
    slim = rng.uniform(0.16, 0.30)
    paired = rng.random() < 0.6
    path: Points = [(x, y)]
    leaves: list[Points] = []
    for step in range(steps):
        x += math.cos(heading) * pace / canvas.aspect
        y += math.sin(heading) * pace
        heading += bend + rng.uniform(-0.03, 0.03)
        path.append((x, y))
        size = leaf * math.sin(math.pi * (step + 2.5) / (steps + 3))
        for side in (-1, 1) if paired else (1 - 2 * (step % 2),):
            turn = heading + side * rng.uniform(0.7, 1.05)
            leaves.append(_leaf(canvas, x, y, turn, size, slim))
    leaves.append(_leaf(canvas, x, y, heading, leaf * 0.6, slim))
    thread = [(px - 0.0016, py) for px, py in path] + [
        (px + 0.0016, py) for px, py in path[::-1]
    ]
    canvas.shape([thread, *leaves], colour)
    veins = [
        _leaf(canvas, *outline[0], _heading(canvas, outline), leaf * 0.62, 0.02)
        for outline in leaves[::2]
    ]
    canvas.shape(veins, mix(colour, palette.light, 0.4), opacity=0.45)
    if depth and rng.random() < 0.75:
        _blossom(canvas, x, y, pace * rng.uniform(1.0, 1.6), palette)


def _heading(canvas: Canvas, outline: Points) -> float:
    """Return where a leaf points."""
    tip = outline[len(outline) // 2]
    return math.atan2(tip[1] - outline[0][1], (tip[0] - outline[0][0]) * canvas.aspect)


def _leaf(
    canvas: Canvas, x: float, y: float, heading: float, length: float, slim: float
) -> Points:
    """Return a leaf's outline from its stalk round its tip and back."""
    points: Points = []
    steps = 12
    for side in (1, -1):
        for step in range(steps + 1):
            share = step / steps if side == 1 else 1 - step / steps
            along = length * share
            out = side * length * slim * math.sin(math.pi * share**0.8)
            px = math.cos(heading) * along - math.sin(heading) * out
            py = math.sin(heading) * along + math.cos(heading) * out
            points.append((x + px / canvas.aspect, y + py))
    return points


def _blossom(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    rng = canvas.rng
    colour = rng.choice((palette.accents[0], palette.accents[1], palette.accents[0]))
    petals = rng.choice((5, 6, 8, 11))
    start = rng.uniform(0, 6.28)
    for ring, shade in ((1.0, 0.0), (0.66, 0.3)):
        outlines = [
            _leaf(
                canvas,
                x,
                y,
                start + ring + 2 * math.pi * petal / petals,
                size * ring,
                0.9 / petals + 0.12,
            )
            for petal in range(petals)
        ]
        for outline in outlines[::2]:
            canvas.shape([outline], mix(colour, palette.light, shade))
        for outline in outlines[1::2]:
            canvas.shape(
                [outline], mix(mix(colour, palette.light, shade), palette.near, 0.10)
            )
    canvas.disc(x, y, size * 0.16, mix(palette.accents[1], palette.near, 0.35))
