"""What a purchase may cost at worst, and what one really cost.  Pure.

The provider has no API for prices: they are lines of a table, each from some day on.  A price
that nobody knows is None everywhere, never 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import ROUND_CEILING, Decimal
from enum import StrEnum
from typing import Final, assert_never

from app.domain.generation import JSON, GenerationRequest

MICRODOLLAR: Final = Decimal("0.000001")  # the ledger's last place

# Assumed, for nothing is published: a megapixel is a million pixels, and counts in fractions.
MEGAPIXEL: Final = 1_000_000

# Sides are rounded by models to their grid; the widest known to us is 32 (flux).
_GRID: Final = 32
# A named size is nominal: 1K in 16:9 is 1376x768 with some, 0.8 % above 1024x1024.
_NAMED_MEGAPIXEL: Final = 1024 * 1024
_NAMED_MARGIN: Final = Decimal(1) / 16

# Past its deadline a prediction is ended by `Cancel-After`, which cannot be shorter than this
# (replicate.com/docs/topics/predictions/lifecycle).
_OVERRUN: Final = timedelta(seconds=5)
_LONGEST: Final = 30 * 86_400.0  # seconds; whoever says more has no idea

# More than any job: of such a sum nobody knows whether it is meant, and the ledger, which has
# room for sums of many, could not hold it.
_MOST: Final = Decimal(100_000)

_SHAPE_INPUTS: Final = ("size", "resolution", "megapixels", "image_size")
_EXACT: Final = re.compile(r"(\d{2,5})\s*[x*×]\s*(\d{2,5})", re.ASCII)
_THOUSANDS: Final = re.compile(r"(\d{1,2})\s*K", re.ASCII | re.IGNORECASE)
_MEGAPIXELS: Final = re.compile(
    r"(\d{1,3}(?:\.\d{1,3})?)\s*(?:MP)?", re.ASCII | re.IGNORECASE
)
_NOTHING_SAID: Final = ("custom", "Not set", "None")
_PICTURE: Final = ("http://", "https://", "data:", "upload:")


class Basis(StrEnum):
    """What is counted.  Of the first two, only outputs that were made are billed."""

    IMAGE = "image"
    MEGAPIXEL = "megapixel"
    SECOND = "second"  # of hardware: billed also when the prediction failed


@dataclass(frozen=True, slots=True)
class Price:
    """One line of the table: from the UTC day `since` on, until a later line.

    `model` is `owner/name`, for all versions, or `owner/name:version`.  `max_megapixels` is the
    largest picture the model makes; without it nobody knows the worst case of an input that
    does not settle the size.
    """

    model: str
    since: date
    basis: Basis
    usd: Decimal
    max_megapixels: Decimal | None = None


@dataclass(frozen=True, slots=True)
class CostRange:
    """What a job costs: `low` is the least of one that completes, `high` the worst case."""

    low: Decimal
    high: Decimal


class PriceTable:
    """Prices by model and day.  Never changes."""

    def __init__(self, prices: Iterable[Price], version: str) -> None:
        self.version = version
        self._by_model: dict[str, list[Price]] = {}
        for price in sorted(prices, key=lambda one: one.since, reverse=True):
            self._by_model.setdefault(price.model, []).append(price)

    def price_of(self, model: str, day: date) -> Price | None:
        """Give the price of a UTC day; the exact version's wins over its name's."""
        for name in (model, model.partition(":")[0]):
            for price in self._by_model.get(name, ()):
                if price.since <= day:
                    return price
        return None

    def estimate(
        self,
        request: GenerationRequest,
        num_outputs: int,
        *,
        day: date,
        deadline: timedelta,
        attempts: int,
    ) -> CostRange | None:
        """Say what a job may cost: `high` is what all its attempts together cost at worst.

        None when nobody knows, or when it is absurd.  Attempts follow one another, and all of
        them end with the deadline, so hardware is paid for that long at most.  Of the others
        one at most makes pictures, and the failed ones are free.
        """
        price = self.price_of(request.model, day)
        if price is None:
            return None
        match price.basis:
            case Basis.IMAGE:
                return _range(price.usd, price.usd * num_outputs)
            case Basis.MEGAPIXEL:
                size = size_of(request.input, price.max_megapixels)
                if size is None:
                    return None
                per_pixel = price.usd / MEGAPIXEL
                return _range(
                    per_pixel * size.least, per_pixel * size.most * num_outputs
                )
            case Basis.SECOND:
                seconds = Decimal(str((deadline + _OVERRUN).total_seconds()))
                # The cost of every attempt is rounded up by itself.
                rounding = MICRODOLLAR * (attempts - 1)
                return _range(Decimal(0), price.usd * seconds + rounding)
            case _:
                assert_never(price.basis)

    def actual(
        self,
        model: str,
        day: date,
        *,
        pixels: Sequence[int | None],
        predict_seconds: float | None,
    ) -> Decimal | None:
        """Say what one prediction cost; None when nobody knows.

        `pixels` is width times height of each output that was made, None where it is not known
        yet, empty for a prediction that failed; `predict_seconds` is how long the hardware was
        busy, 0 if it never started.
        """
        price = self.price_of(model, day)
        if price is None:
            return None
        match price.basis:
            case Basis.IMAGE:
                return _bounded(price.usd * len(pixels))
            case Basis.MEGAPIXEL:
                known = [one for one in pixels if one is not None]
                if len(known) < len(pixels):
                    return None
                return _bounded(price.usd * sum(known) / MEGAPIXEL)
            case Basis.SECOND:
                if predict_seconds is None or not 0 <= predict_seconds <= _LONGEST:
                    return None
                return _bounded(price.usd * Decimal(str(predict_seconds)))
            case _:
                assert_never(price.basis)


# -------------------------------------------------------------------------------- sizes


@dataclass(frozen=True, slots=True)
class Size:
    """How many pixels one output has, at least and at most."""

    least: int
    most: int


def size_of(
    model_input: Mapping[str, JSON], max_megapixels: Decimal | None
) -> Size | None:
    """Bound the size of one output by what the model's own input says; None: nobody knows.

    An input is believed when it says the size in one way.  Where it says nothing, or several
    things of which the model may heed any, or names a picture whose size the model may take
    over, the largest of them and the model's largest picture counts.
    """
    said = list(_sizes(model_input))
    if len(said) == 1 and not _may_be_ignored(model_input):
        return said[0]
    if max_megapixels is None:
        return None
    largest = int(max_megapixels * MEGAPIXEL)
    return Size(0, max([largest, *(size.most for size in said)]))


def _sizes(model_input: Mapping[str, JSON]) -> Iterator[Size]:
    """Read every size the input speaks of."""
    width, height = model_input.get("width"), model_input.get("height")
    if _is_count(width) and _is_count(height):
        yield _exact(int(str(width)), int(str(height)))
    for name in _SHAPE_INPUTS:
        value = model_input.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            found = _named(str(value).strip())
            if found is not None:
                yield found


def _is_count(value: JSON) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _exact(width: int, height: int) -> Size:
    grid = [-(-side // _GRID) * _GRID for side in (width, height)]
    return Size(width * height, grid[0] * grid[1])


def _named(text: str) -> Size | None:
    """Read `1024x1365`, `2K`, `0.5 MP`, `0.25`."""
    if found := _EXACT.fullmatch(text):
        return _exact(int(found[1]), int(found[2]))
    if found := _THOUSANDS.fullmatch(text):
        megapixels = Decimal(int(found[1]) ** 2)
    elif found := _MEGAPIXELS.fullmatch(text):
        megapixels = Decimal(found[1])
    else:
        return None
    pixels = megapixels * _NAMED_MEGAPIXEL
    margin = pixels * _NAMED_MARGIN
    return Size(int(pixels - margin), int(pixels + margin))


def _may_be_ignored(model_input: Mapping[str, JSON]) -> bool:
    """Tell whether the model may make another size than the one the input speaks of.

    Width and height count with many models only where something else says `custom`; where a
    ratio is given, or nothing at all, the model may look at that.
    """
    if any(_names_a_picture(value) for value in model_input.values()):
        return True
    ratio = model_input.get("aspect_ratio")
    if ratio == "match_input_image":
        return True
    shapes = [ratio, *(model_input.get(name) for name in _SHAPE_INPUTS)]
    if "width" in model_input or "height" in model_input:
        return "custom" not in shapes
    exact = any(isinstance(one, str) and _EXACT.fullmatch(one) for one in shapes)
    return exact and ratio is not None and ratio not in _NOTHING_SAID


def _names_a_picture(value: JSON) -> bool:
    if isinstance(value, list):
        return any(map(_names_a_picture, value))
    return isinstance(value, str) and value.lower().startswith(_PICTURE)


def _range(low: Decimal, high: Decimal) -> CostRange | None:
    """Give both ends as the ledger holds them; None for what cannot be."""
    if not 0 <= low <= high <= _MOST:
        return None
    return CostRange(_round(low), _round(high))


def _bounded(usd: Decimal) -> Decimal | None:
    return _round(usd) if usd <= _MOST else None


def _round(usd: Decimal) -> Decimal:
    """Round up to what the ledger can hold."""
    return usd.quantize(MICRODOLLAR, rounding=ROUND_CEILING)
