"""Small charts, drawn here: the numbers become the paths and boxes of an SVG.

A chart is `WIDTH` by `HEIGHT` units and stretches to its place; what is to be read (the scale,
the hours) is text beside it.  `chart.html` draws it, with the same numbers as a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

WIDTH: Final = 480
HEIGHT: Final = 120
_STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)

Colour = Literal["accent", "soft", "bad"]


@dataclass(frozen=True, slots=True)
class Series:
    """A row of numbers, one for each place on the axis; None where there is nothing to say."""

    name: str
    values: Sequence[float | None]
    colour: Colour = "accent"


@dataclass(frozen=True, slots=True)
class Box:
    """A bar; or the place of one, to be pointed at."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What `chart.html` draws: `lines` and `dots` are (colour, path), `rows` the table."""

    id: str
    title: str
    summary: str
    unit: str
    top: str
    first: str
    last: str
    legend: Sequence[tuple[Colour, str]]
    lines: Sequence[tuple[Colour, str]]
    dots: Sequence[tuple[Colour, str]]
    bars: Sequence[Box]
    colour: Colour
    places: Sequence[Box]
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    is_empty: bool


def line_chart(
    id: str,
    title: str,
    axis: Sequence[str],
    series: Sequence[Series],
    write: Callable[[float], str],
    *,
    unit: str,
    summary: str,
) -> Chart:
    """Draw lines over one axis, the last series in front; `write` words a number."""
    top = nice_top(series)
    lines = [(one.colour, line(one.values, top)) for one in series]
    dots = [(one.colour, lonely(one.values, top)) for one in series]
    return _chart(
        id, title, axis, series, write, top, unit, summary, lines=lines, dots=dots
    )


def bar_chart(
    id: str,
    title: str,
    axis: Sequence[str],
    series: Series,
    write: Callable[[float], str],
    *,
    unit: str,
    summary: str,
    least_top: float = 0.0,
) -> Chart:
    """Draw a bar for each place on the axis; the scale reaches `least_top` at least."""
    top = max(nice_top([series]), least_top)
    step = WIDTH / max(len(axis), 1)
    bars = []
    for number, (place, value) in enumerate(zip(axis, series.values, strict=True)):
        height = HEIGHT * (value or 0) / top
        if height:
            # What is there at all is seen.
            height = max(height, 1.5)
            text = f"{place}: {write(value or 0)}"
            box = Box(
                number * step + step * 0.14, HEIGHT - height, step * 0.72, height, text
            )
            bars.append(_rounded(box))
    return _chart(id, title, axis, [series], write, top, unit, summary, bars=bars)


def nice_top(series: Sequence[Series]) -> float:
    """Give a round number no smaller than all of the values, for the upper end of the scale."""
    most = max((v for one in series for v in one.values if v is not None), default=0.0)
    if most <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(most))
    return next(step * size for step in _STEPS if step * size >= most * (1 - 1e-9))


def line(values: Sequence[float | None], top: float) -> str:
    """Write the path of a line, interrupted where there is no value."""
    parts: list[str] = []
    for number, (x, y) in _points(values, top):
        if _is_alone(values, number):
            continue
        is_down = number > 0 and values[number - 1] is not None
        parts.append(f"{'L' if is_down else 'M'}{x:g} {y:g}")
    return "".join(parts)


def lonely(values: Sequence[float | None], top: float) -> str:
    """Write a path of dots for values without neighbours, which make no line."""
    alone = [
        point for number, point in _points(values, top) if _is_alone(values, number)
    ]
    return "".join(f"M{x:g} {y:g}h.01" for x, y in alone)


def _points(
    values: Sequence[float | None], top: float
) -> Iterator[tuple[int, tuple[float, float]]]:
    step = WIDTH / max(len(values) - 1, 1)
    for number, value in enumerate(values):
        if value is not None:
            y = HEIGHT - HEIGHT * value / top
            yield number, (round(number * step, 1), round(y, 1))


def _is_alone(values: Sequence[float | None], number: int) -> bool:
    return all(
        one is None
        for one in (
            *values[max(number - 1, 0) : number],
            *values[number + 1 : number + 2],
        )
    )


def _chart(
    id: str,
    title: str,
    axis: Sequence[str],
    series: Sequence[Series],
    write: Callable[[float], str],
    top: float,
    unit: str,
    summary: str,
    *,
    lines: Sequence[tuple[Colour, str]] = (),
    dots: Sequence[tuple[Colour, str]] = (),
    bars: Sequence[Box] = (),
) -> Chart:
    worded = [
        ["–" if value is None else write(value) for value in one.values]
        for one in series
    ]
    rows = [
        (place, [words[number] for words in worded])
        for number, place in enumerate(axis)
    ]
    step = WIDTH / max(len(axis), 1)
    places = [
        _rounded(Box(number * step, 0, step, HEIGHT, _say(place, series, words)))
        for number, (place, words) in enumerate(rows)
    ]
    return Chart(
        id=id,
        title=title,
        summary=summary,
        unit=unit,
        top=write(top),
        first=axis[0] if axis else "",
        last=axis[-1] if axis else "",
        legend=[(one.colour, one.name) for one in series] if len(series) > 1 else [],
        lines=lines,
        dots=dots,
        bars=bars,
        colour=series[0].colour,
        places=places,
        columns=[one.name for one in series],
        rows=rows,
        is_empty=all(value is None for one in series for value in one.values),
    )


def _say(place: str, series: Sequence[Series], words: Sequence[str]) -> str:
    said = ", ".join(f"{one.name} {word}" for one, word in zip(series, words))
    return f"{place}: {said}"


def _rounded(box: Box) -> Box:
    return Box(
        round(box.x, 2),
        round(box.y, 2),
        round(box.width, 2),
        round(box.height, 2),
        box.text,
    )
