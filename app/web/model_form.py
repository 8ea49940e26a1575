"""A model's own input schema as fields of a form, and what was typed there as its input.  Pure.

The prompt is not among the fields: it is the same for every model.  What a reader leaves as it
is is not sent: the model's own default applies, and what depends on others may follow them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import orjson

from app.domain.generation import JSON, ModelDescription
from app.services.file_inputs import FileInput, file_inputs
from app.services.input_schema import flatten, read_limits
from app.services.translation import COUNT_INPUTS, is_secret

_PROMPT: Final = "prompt"
# Shown at once; the rest is behind "More options".
_FOREMOST: Final = frozenset(
    ("aspect_ratio", "size", "resolution", "negative_prompt", "style", *COUNT_INPUTS)
)
_LONG_TEXTS: Final = frozenset(("negative_prompt", "system_prompt", "caption"))
_RATIO: Final = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")
_MOST_STEPS: Final = 200  # that a slider of a real number has


class Kind(StrEnum):
    """How a field looks, and what it gives."""

    CHOICE = "choice"
    RATIO = "ratio"
    NUMBER = "number"
    SWITCH = "switch"
    TEXT = "text"
    LONG_TEXT = "long-text"
    LINES = "lines"  # a list of texts or numbers, one a line
    PICTURE = "picture"
    PICTURES = "pictures"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several values.  `width` and `height` draw a ratio; 0 where it is none."""

    text: str
    value: JSON
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Field:
    """One input of a model.  `default` is as it stands in the form; "" when there is none."""

    name: str
    label: str
    kind: Kind
    hint: str
    default: str
    is_required: bool
    is_foremost: bool
    choices: Sequence[Choice] = ()
    low: float | None = None
    high: float | None = None
    step: str = "any"
    item: str = "string"  # type of the items of a list
    is_whole: bool = False

    @property
    def id(self) -> str:
        """Give a name that selectors can hold."""
        return slug(self.name)

    @property
    def has_slider(self) -> bool:
        """Tell whether a slider helps: both ends are known, and some value to begin with."""
        return self.default != "" and self.low is not None and self.high is not None

    @property
    def limits(self) -> str:
        """Write the allowed numbers, as far as there are limits."""
        if self.low is not None and self.high is not None:
            return f"{_plain(self.low)} to {_plain(self.high)}"
        if self.low is not None:
            return f"at least {_plain(self.low)}"
        return "" if self.high is None else f"at most {_plain(self.high)}"


def slug(name: str) -> str:
    """Write the name of an input so that it can be part of an id."""
    return re.sub(r"[^\w-]", "-", name, flags=re.ASCII)


class Unreadable(ValueError):
    """What was typed cannot be what the field takes; says what it takes."""


def fields_of(model: ModelDescription) -> list[Field]:
    """Give the fields of a model in the order it shows them (`x-order`)."""
    files = file_inputs(model.input_schema)
    required = model.input_schema.get("required")
    needed = set(required) if isinstance(required, list) else set()
    found: list[tuple[int, Field]] = []
    for name, raw in model.properties.items():
        schema = _unwrap(flatten(raw, model.input_schema), model.input_schema)
        if name == _PROMPT or is_secret(name, schema):
            continue
        order = schema.get("x-order")
        rank = order if isinstance(order, int) else len(model.properties)
        found.append((rank, _field(name, schema, files.get(name), name in needed)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def read(field: Field, typed: str) -> JSON:
    """Give the value that was typed; None for what is to be left to the model.

    Raises `Unreadable`.
    """
    text = typed if field.kind is Kind.LONG_TEXT else typed.strip()
    if _same(text, field.default) or (text == "" and field.default == ""):
        return None
    match field.kind:
        case Kind.SWITCH:
            return text == "true"
        case Kind.NUMBER:
            return None if text == "" else _number(text, is_whole=field.is_whole)
        case Kind.CHOICE | Kind.RATIO:
            values = [one.value for one in field.choices if one.text == text]
            return values[0] if values else text
        case Kind.LINES:
            return [
                _item(line, field.item) for line in text.splitlines() if line.strip()
            ]
        case Kind.JSON:
            return _json(text)
    return text


def _same(text: str, default: str) -> bool:
    """Compare as a browser may have written it: with its own ends of lines."""
    return text.replace("\r\n", "\n") == default


def _field(
    name: str,
    schema: Mapping[str, JSON],
    file: FileInput | None,
    is_required: bool,
) -> Field:
    kind = _kind(name, schema, file)
    low, high = read_limits(schema)
    items = schema.get("items")
    item = items.get("type") if isinstance(items, dict) else None
    is_whole = schema.get("type") == "integer"
    default = _default(schema.get("default"), kind)
    return Field(
        name=name,
        label=_label(name, schema.get("title")),
        kind=kind,
        hint=str(schema.get("description") or ""),
        default=default,
        is_required=is_required and default == "",
        is_foremost=name in _FOREMOST
        or kind in (Kind.PICTURE, Kind.PICTURES)
        or (is_required and default == ""),
        choices=_choices(schema),
        low=low,
        high=high,
        step=_step(schema, low, high, is_whole=is_whole),
        item=item if isinstance(item, str) else "string",
        is_whole=is_whole,
    )


def _unwrap(schema: dict[str, JSON], root: Mapping[str, JSON]) -> dict[str, JSON]:
    """Read "this or null" as this: a field that is left empty is not sent anyway."""
    for word in ("anyOf", "oneOf"):
        alternatives = schema.get(word)
        if "type" in schema or not isinstance(alternatives, list):
            continue
        for one in alternatives:
            if isinstance(one, dict):
                found = flatten(one, root)
                if found.get("type") != "null":
                    return found | {k: v for k, v in schema.items() if k != word}
    return schema


def _kind(name: str, schema: Mapping[str, JSON], file: FileInput | None) -> Kind:
    if file is not None and file.is_picture and file.is_sure:
        return Kind.PICTURES if file.is_list else Kind.PICTURE
    if isinstance(schema.get("enum"), list):
        has_ratio = any(one.width for one in _choices(schema))
        return Kind.RATIO if name == "aspect_ratio" and has_ratio else Kind.CHOICE
    match schema.get("type"):
        case "boolean":
            return Kind.SWITCH
        case "integer" | "number":
            return Kind.NUMBER
        case "array":
            return Kind.LINES if _has_plain_items(schema) else Kind.JSON
        case "string":
            return Kind.LONG_TEXT if name in _LONG_TEXTS else Kind.TEXT
    return Kind.JSON


def _has_plain_items(schema: Mapping[str, JSON]) -> bool:
    items = schema.get("items")
    kind = items.get("type") if isinstance(items, dict) else None
    return kind in ("string", "integer", "number")


def _label(name: str, title: JSON) -> str:
    """Name an input for people: as the model does, else by its name in plain words."""
    if name in COUNT_INPUTS:
        return "Pictures of each job"
    words = name.replace("_", " ").strip()
    given = title.replace("_", " ").strip() if isinstance(title, str) else ""
    if given and given.lower() != words.lower():
        return given
    return words[:1].upper() + words[1:]


def _choices(schema: Mapping[str, JSON]) -> tuple[Choice, ...]:
    values = schema.get("enum")
    if not isinstance(values, list):
        return ()
    return tuple(_choice(value) for value in values if value is not None)


def _choice(value: JSON) -> Choice:
    text = _default(value, Kind.CHOICE)
    ratio = _RATIO.fullmatch(text)
    if ratio is None:
        return Choice(text, value)
    width, height = int(ratio[1]), int(ratio[2])
    scale = 18 / max(width, height)
    return Choice(
        text, value, max(4, round(width * scale)), max(4, round(height * scale))
    )


def _default(value: JSON, kind: Kind) -> str:
    """Write a value as it stands in a field."""
    match value:
        case None:
            return "false" if kind is Kind.SWITCH else ""
        case bool():
            return "true" if value else "false"
        case str():
            return value if kind is Kind.LONG_TEXT else value.strip()
        case int() | float():
            return _plain(value)
        case list() if kind in (Kind.PICTURES, Kind.PICTURE):
            return ""
        case list() if kind is Kind.LINES:
            return "\n".join(str(one) for one in value)
    return orjson.dumps(value).decode()


def _step(
    schema: Mapping[str, JSON],
    low: float | None,
    high: float | None,
    *,
    is_whole: bool,
) -> str:
    """Say which numbers a browser may offer; what is typed is the model's to judge."""
    multiple = schema.get("multipleOf")
    if isinstance(multiple, int | float) and multiple > 0:
        return _plain(multiple)
    if is_whole:
        return "1"
    if low is None or high is None or high <= low:
        return "any"
    power = math.floor(math.log10((high - low) / _MOST_STEPS)) + 1
    return _plain(10.0 ** min(power, 0))


def _number(text: str, *, is_whole: bool) -> JSON:
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        raise Unreadable("must be a number") from None
    if not math.isfinite(value):
        raise Unreadable("must be a number")
    if value != int(value):
        if is_whole:
            raise Unreadable("must be a whole number")
        return value
    # Through a float, large seeds would lose their last digits.
    return int(text) if re.fullmatch(r"[+-]?\d{1,30}", text, re.ASCII) else int(value)


def _item(line: str, kind: str) -> JSON:
    if kind == "string":
        return line.strip()
    return _number(line.strip(), is_whole=kind == "integer")


def _json(text: str) -> JSON:
    try:
        value: JSON = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Unreadable("must be written as JSON") from None
    return value


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.10f}".rstrip("0")
