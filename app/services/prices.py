"""Read price tables: the one that comes with the package, and the operator's own.

A wrong file is `UnusablePrices`, one sentence that names the entry.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from app.domain.pricing import Basis, Price, PriceTable


def _as_decimal(value: object) -> object:
    """Take a whole number for a decimal one; a truth value is neither."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    return value


# Strict: a text is no number and no day.  0 is a price like others: what is known to be free.
_Dollars = Annotated[
    Decimal,
    BeforeValidator(_as_decimal),
    Field(ge=0, le=10_000, max_digits=14, decimal_places=10),
]
_Megapixels = Annotated[Decimal, BeforeValidator(_as_decimal), Field(gt=0, le=10_000)]
_MODEL: Final = r"^[\w.-]+/[\w.-]+(:[\w.-]+)?$"
_BASES: Final = {
    "per_image_usd": Basis.IMAGE,
    "per_megapixel_usd": Basis.MEGAPIXEL,
    "per_second_usd": Basis.SECOND,
}


class UnusablePrices(ValueError):
    """A price file cannot be read, or one of its entries makes no sense."""


class _Entry(BaseModel):
    """One `[[price]]`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(pattern=_MODEL)]
    since: date
    per_image_usd: _Dollars | None = None
    per_megapixel_usd: _Dollars | None = None
    per_second_usd: _Dollars | None = None
    hardware: str | None = None
    max_megapixels: _Megapixels | None = None


class _File(BaseModel):
    """A whole file; its entries are looked at one by one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[str, Field(min_length=1, max_length=100)]
    hardware: dict[str, _Dollars] = {}
    price: list[dict[str, Any]] = []


@dataclass(frozen=True, slots=True)
class _Prices:
    """What a file says.  `hardware` is in dollars per second."""

    version: str
    hardware: Mapping[str, Decimal]
    prices: tuple[Price, ...]


def load_prices(price_file: Path | None = None) -> PriceTable:
    """Give the built-in prices, with those of the file before them.

    A model that the file names is priced by the file alone, on every day; a name stands for its
    versions.  Raise `UnusablePrices`.
    """
    ours = _parse(_bundled(), source="the built-in prices", hardware={})
    if price_file is None:
        return PriceTable(ours.prices, ours.version)
    try:
        text = price_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = getattr(exc, "strerror", None) or "it is no UTF-8 text"
        raise UnusablePrices(f"{price_file} cannot be read: {reason}") from exc
    theirs = _parse(text, source=str(price_file), hardware=ours.hardware)
    named = {price.model for price in theirs.prices}
    kept = [
        price
        for price in ours.prices
        if price.model not in named and price.model.partition(":")[0] not in named
    ]
    return PriceTable([*kept, *theirs.prices], f"{ours.version}+{theirs.version}")


def _bundled() -> str:
    return resources.files("app.services").joinpath("prices.toml").read_text("utf-8")


def _parse(text: str, *, source: str, hardware: Mapping[str, Decimal]) -> _Prices:
    """Read a file.  `hardware` is known besides what it says itself."""
    try:
        raw = tomllib.loads(text, parse_float=Decimal)
    except ValueError as exc:
        raise UnusablePrices(f"{source} is no TOML: {exc}") from exc
    try:
        found = _File.model_validate(raw)
    except ValidationError as exc:
        raise UnusablePrices(f"{source}: {_say(exc)}") from exc
    known = {**hardware, **found.hardware}
    prices: dict[tuple[str, date], Price] = {}
    for number, entry in enumerate(found.price, 1):
        place = f"{source}, entry {number} ({entry.get('model', 'no model')})"
        price = _price(entry, place, known)
        if (price.model, price.since) in prices:
            raise UnusablePrices(f"{place}: another entry has the same model and since")
        prices[price.model, price.since] = price
    return _Prices(found.version, known, tuple(prices.values()))


def _price(
    raw: Mapping[str, Any], place: str, hardware: Mapping[str, Decimal]
) -> Price:
    try:
        entry = _Entry.model_validate(raw)
    except ValidationError as exc:
        raise UnusablePrices(f"{place}: {_say(exc)}") from exc
    given = {
        basis: usd
        for name, basis in _BASES.items()
        if (usd := getattr(entry, name)) is not None
    }
    if len(given) + (entry.hardware is not None) != 1:
        names = ", ".join([*_BASES, "hardware"])
        raise UnusablePrices(f"{place}: it takes exactly one of {names}")
    if entry.hardware is not None:
        if entry.hardware not in hardware:
            raise UnusablePrices(
                f"{place}: hardware {entry.hardware!r} has no price;"
                f" known are {', '.join(hardware)}"
            )
        given = {Basis.SECOND: hardware[entry.hardware]}
    ((basis, usd),) = given.items()
    if entry.max_megapixels is not None and basis is not Basis.MEGAPIXEL:
        raise UnusablePrices(
            f"{place}: max_megapixels belongs to per_megapixel_usd only"
        )
    return Price(entry.model, entry.since, basis, usd, entry.max_megapixels)


def _say(error: ValidationError) -> str:
    """Say the first thing that is wrong in a sentence."""
    problem = error.errors(include_input=False, include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "missing":
            return f"{name} is missing"
        case "extra_forbidden":
            return f"{name} is not known here"
    return f"{name}: {problem['msg']}"
