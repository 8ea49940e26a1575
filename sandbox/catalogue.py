"""The models of the sandbox: their schemas, and what an input asks for.

The data are in ``models.json``: names, types, ranges and defaults as the real models publish
them (schemas of April 2026); the version ids share their first 12 digits with real ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from importlib.resources import files
from typing import Any, Literal

JSON = dict[str, Any]
PictureFormat = Literal["webp", "jpeg", "png"]
SMALLEST_SIDE, LARGEST_SIDE = 16, 8192
EXTENSIONS: Mapping[PictureFormat, str] = {"webp": "webp", "jpeg": "jpg", "png": "png"}
CONTENT_TYPES: Mapping[PictureFormat, str] = {
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "png": "image/png",
}


@dataclass(frozen=True, slots=True)
class Complaint:
    """One reason why an input is refused, in the words of Replicate's validator.

    The kinds are those of gojsonschema: required, enum, invalid_type, number_gte, number_lte,
    multiple_of, format, additional_property_not_allowed.
    """

    kind: str
    field: str
    description: str

    def line(self) -> str:
        """Return the line of ``detail`` for this complaint."""
        return (
            f"- {self.field}: {self.description}"
            if self.field
            else f"- {self.description}"
        )


@dataclass(frozen=True, slots=True)
class PictureOrder:
    """What an input asks for: how many pictures, how large and in which format."""

    count: int
    width: int
    height: int
    format: PictureFormat
    quality: int
    transparent: bool = False


@dataclass(frozen=True)
class Model:
    """One model of the catalogue."""

    owner: str
    name: str
    description: str
    version: str
    official: bool
    hardware: str
    queue: timedelta
    run: timedelta
    rendering: JSON
    openapi_schema: JSON

    @property
    def ref(self) -> str:
        """Return ``owner/name``."""
        return f"{self.owner}/{self.name}"

    @cached_property
    def _fields(self) -> dict[str, JSON]:
        """The input's properties with their enumerations folded in."""
        schemas = self.openapi_schema["components"]["schemas"]
        fields = {}
        for name, given in schemas["Input"]["properties"].items():
            merged = dict(given)
            for part in given.get("allOf", []):
                merged.update(schemas[part["$ref"].rsplit("/", 1)[1]])
                merged.update({k: v for k, v in given.items() if k != "allOf"})
            fields[name] = merged
        return fields

    @property
    def has_seed(self) -> bool:
        """Tell whether the model lets a caller choose the seed."""
        return "seed" in self._fields

    @property
    def makes_list(self) -> bool:
        """Tell whether the output is a list of URIs; else it is a single URI."""
        output = self.openapi_schema["components"]["schemas"]["Output"]
        return bool(output["type"] == "array")

    def complaints(self, given: JSON) -> list[Complaint]:
        """Return why the input is refused, empty when it is acceptable.

        Unknown keys are ignored, as Replicate does (replicate/cog, PR 2943, April 2026).
        """
        required = self.openapi_schema["components"]["schemas"]["Input"].get(
            "required", []
        )
        found = [
            Complaint("required", "input", f"{name} is required")
            for name in required
            if name not in given
        ]
        for name, value in given.items():
            field = self._fields.get(name)
            if field is None or (value is None and field.get("nullable")):
                continue
            complaint = _complaint(f"input.{name}", value, field)
            if complaint is not None:
                found.append(complaint)
        return found

    def value(self, given: JSON, field: str) -> Any:
        """Return what the input says about a field, or the field's default."""
        value = given.get(field)
        return self._fields.get(field, {}).get("default") if value is None else value

    def order(self, given: JSON) -> PictureOrder:
        """Read an acceptable input as an order for pictures."""
        width, height = self._size(given)
        named = self.value(given, "output_format") or self.rendering.get(
            "format", "png"
        )
        quality = self.value(given, "output_quality")
        if quality is None:
            quality = self.value(given, "output_compression")
        return PictureOrder(
            count=self._count(given),
            width=width,
            height=height,
            format="jpeg" if named in ("jpg", "jpeg") else named,
            quality=90 if quality is None else int(quality),
            transparent=self.value(given, "background") == "transparent",
        )

    def steps(self, given: JSON) -> int:
        """Return how many steps the progress bar counts."""
        return max(1, int(self.value(given, "num_inference_steps") or 20))

    def _count(self, given: JSON) -> int:
        field = self.rendering.get("count_field")
        condition = self.rendering.get("count_when", {})
        if field is None or any(
            self.value(given, k) != v for k, v in condition.items()
        ):
            return 1
        return int(self.value(given, field) or 1)

    def _size(self, given: JSON) -> tuple[int, int]:
        rendering = self.rendering
        free = rendering.get("free")
        if free and all(self.value(given, k) == v for k, v in free["when"].items()):
            fallback = rendering.get("default", [1024, 1024])
            return (
                _side(self.value(given, "width") or fallback[0], 8),
                _side(self.value(given, "height") or fallback[1], 8),
            )
        literal = _parse_size(self.value(given, rendering.get("literal_field", "")))
        named = rendering["aspects"].get(self.value(given, "aspect_ratio"))
        if literal and (named is None or rendering.get("literal_first")):
            return literal
        base = rendering.get("default") or rendering["aspects"]["1:1"]
        width, height = named or base
        scale = rendering.get("scale")
        if scale is None:
            return int(width), int(height)
        factor = scale["factors"].get(self.value(given, scale["field"]), 1)
        multiple = scale.get("multiple", 8)
        return _side(width * factor, multiple), _side(height * factor, multiple)


class Catalogue:
    """Every model of the sandbox, found by reference or version."""

    def __init__(self, models: list[Model]) -> None:
        self._by_ref = {model.ref: model for model in models}
        self._by_version = {model.version: model for model in models}

    @classmethod
    def bundled(cls) -> Catalogue:
        """Read the catalogue that comes with the sandbox."""
        text = files("sandbox").joinpath("models.json").read_text(encoding="utf-8")
        return cls([_model(entry) for entry in json.loads(text)])

    def __iter__(self) -> Iterator[Model]:
        return iter(self._by_ref.values())

    def find(self, ref: str) -> Model | None:
        """Return the model called ``owner/name``, if there is one."""
        return self._by_ref.get(ref)

    def named(self, name: str) -> Model | None:
        """Return the first model with this name, whoever owns it."""
        return next((model for model in self if model.name == name), None)

    def by_version(self, spelling: str) -> Model | None:
        """Return the model that ``version`` of POST /v1/predictions means, if any.

        Three spellings: ``owner/name`` for official models, ``owner/name:64hex``, ``64hex``
        (Replicate's OpenAPI document, 2026-03).
        """
        if "/" not in spelling:
            return self._by_version.get(spelling)
        ref, colon, version = spelling.partition(":")
        model = self._by_ref.get(ref)
        if model is None:
            return None
        if colon:
            return model if model.version == version else None
        return model if model.official else None


def _model(entry: JSON) -> Model:
    timing = entry["timing"]
    return Model(
        owner=entry["owner"],
        name=entry["name"],
        description=entry["description"],
        version=entry["version"],
        official=entry["official"],
        hardware=entry["hardware"],
        queue=timedelta(seconds=timing["queue_seconds"]),
        run=timedelta(seconds=timing["run_seconds"]),
        rendering=entry["rendering"],
        openapi_schema=entry["openapi_schema"],
    )


def _side(pixels: float, multiple: int) -> int:
    """Round to a multiple and keep within what the painter will draw."""
    rounded = int(round(pixels / multiple)) * multiple
    return max(SMALLEST_SIDE, min(LARGEST_SIDE, rounded))


def _parse_size(text: Any) -> tuple[int, int] | None:
    width, cross, height = str(text or "").partition("x")
    return (
        (int(width), int(height))
        if cross and width.isdigit() and height.isdigit()
        else None
    )


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
}


def _type_name(value: Any) -> str:
    for kind, name in (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list, "array"),
        (dict, "object"),
    ):
        if isinstance(value, kind):
            return name
    return "null"


def _complaint(path: str, value: Any, field: JSON) -> Complaint | None:
    """Return the first thing wrong with one value, or None."""
    expected = field.get("type", "string")
    given = _type_name(value)
    whole = given == "number" and float(value).is_integer() and expected == "integer"
    fits = isinstance(value, _TYPES[expected]) and (given == "boolean") == (
        expected == "boolean"
    )
    if not (fits or whole):
        text = f"Invalid type. Expected: {expected}, given: {given}"
        return Complaint("invalid_type", path, text)
    if "enum" in field and value not in field["enum"]:
        allowed = ", ".join(json.dumps(choice) for choice in field["enum"])
        return Complaint(
            "enum", path, f"{path} must be one of the following: {allowed}"
        )
    if "minimum" in field and value < field["minimum"]:
        text = f"Must be greater than or equal to {field['minimum']}"
        return Complaint("number_gte", path, text)
    if "maximum" in field and value > field["maximum"]:
        text = f"Must be less than or equal to {field['maximum']}"
        return Complaint("number_lte", path, text)
    if "multipleOf" in field and value % field["multipleOf"]:
        return Complaint(
            "multiple_of", path, f"Must be a multiple of {field['multipleOf']}"
        )
    if field.get("format") == "uri" and not _is_uri(value):
        return Complaint("format", path, "Does not match format 'uri'")
    if expected == "array":
        for index, item in enumerate(value):
            inner = _complaint(f"{path}.{index}", item, field.get("items", {}))
            if inner is not None:
                return inner
    return None


def _is_uri(text: str) -> bool:
    return text.startswith(("http://", "https://", "data:"))
