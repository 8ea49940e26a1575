"""Read a model's input schema, and say what is wrong with an input in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import jsonschema_rs

from app.domain.generation import JSON

_TYPES: Final = {
    "integer": "an integer",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_DEPTH: Final = 8  # references behind references; real schemas have one


def flatten(
    schema: Mapping[str, JSON], root: Mapping[str, JSON], depth: int = _DEPTH
) -> dict[str, JSON]:
    """Merge what a property says itself with what its `$ref` and `allOf` point to.

    Cog writes enumerations as `{"allOf": [{"$ref": …}], "default": …}` (replicate-api.md
    section 13).  The property's own words win.  Unresolvable references add nothing.
    """
    merged: dict[str, JSON] = {}
    if depth == 0:
        return merged
    parts: list[JSON] = []
    reference = schema.get("$ref")
    if isinstance(reference, str):
        parts.append(_follow(reference, root))
    all_of = schema.get("allOf")
    if isinstance(all_of, list):
        parts.extend(all_of)
    for part in parts:
        if isinstance(part, dict):
            merged |= flatten(part, root, depth - 1)
    own = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
    return merged | own


def read_limits(schema: Mapping[str, JSON]) -> tuple[float | None, float | None]:
    """Give the smallest and the largest allowed number; None where there is no limit."""
    low, high = schema.get("minimum"), schema.get("maximum")
    return (
        low if isinstance(low, int | float) else None,
        high if isinstance(high, int | float) else None,
    )


def say_violation(
    error: jsonschema_rs.ValidationError, properties: Mapping[str, Mapping[str, JSON]]
) -> tuple[str, str]:
    """Name the input that is wrong, and complete the sentence "<input> … for <model>".

    Never quotes the value itself: it may be a prompt or a secret.
    """
    if not error.instance_path:
        name = getattr(error.kind, "property", None)
        if isinstance(name, str):
            return name.strip('"'), "is required"
        return "input", "is not what the model accepts"
    name = str(error.instance_path[0])
    if len(error.instance_path) > 1:
        where = "".join(f"[{step!r}]" for step in error.instance_path[1:])
        return name, f"has an unacceptable value at {where}"
    return name, _say_rule(error.kind.name, properties.get(name, {}))


def _say_rule(rule: str, schema: Mapping[str, JSON]) -> str:
    low, high = read_limits(schema)
    choices, kind = schema.get("enum"), schema.get("type")
    match rule:
        case "minimum" | "maximum" if low is not None and high is not None:
            return f"must be between {_number(low)} and {_number(high)}"
        case "minimum" if low is not None:
            return f"must be at least {_number(low)}"
        case "maximum" if high is not None:
            return f"must be at most {_number(high)}"
        case "multipleOf":
            return f"must be a multiple of {schema.get('multipleOf')}"
        case "minLength" | "maxLength" | "minItems" | "maxItems":
            return f"has a bad length ({rule} is {schema.get(rule)})"
        case "enum" | "type" if isinstance(choices, list):
            return f"must be one of {', '.join(_show(choices))}"
        case "type" if isinstance(kind, str):
            return f"must be {_TYPES.get(kind, kind)}"
    return "is not what the model accepts"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _show(values: Sequence[JSON]) -> list[str]:
    return [value if isinstance(value, str) else repr(value) for value in values]


def _follow(reference: str, root: Mapping[str, JSON]) -> JSON:
    """Find the target of a reference inside the document; None when there is none."""
    if not reference.startswith("#/"):
        return None
    found: JSON = dict(root)
    for step in reference[2:].split("/"):
        if not isinstance(found, dict):
            return None
        found = found.get(step.replace("~1", "/").replace("~0", "~"))
    return found
