"""Say our common request in a model's own words, and refuse what the model would refuse.

Pure: a description and a request in, the model's input out.  Nothing a caller sent is lost in
silence: it is passed on, or answered with a warning, or refused with the name of the field.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

import jsonschema_rs

from app.domain.errors import InvalidRequest, ProviderUnavailable
from app.domain.generation import JSON, ModelDescription
from app.services.file_inputs import FileInput, file_inputs
from app.services.input_schema import flatten, read_limits, say_violation

# Inputs that say how many pictures to make; a model has one of them at most.
COUNT_INPUTS: Final = ("num_outputs", "number_of_images", "max_images")
_SIZE_INPUTS: Final = ("size", "resolution")
_SIZE: Final = re.compile(r"([1-9]\d{1,4})x([1-9]\d{1,4})")
_RATIO: Final = re.compile(r"([1-9]\d{0,4}):([1-9]\d{0,4})")
_SECRET: Final = re.compile(r"(api_?key|token|secret|password)$", re.IGNORECASE)
_MEGAPIXEL: Final = 1024 * 1024
_GRID: Final = 64  # pixels; every model with free sizes takes multiples of 64
_STEEPEST: Final = 16  # the longest side over the shortest, when we choose a size
_SEED_LIMIT: Final = 2**31  # seeds of 31 bits are accepted by every model known to us


@dataclass(frozen=True, slots=True)
class CommonRequest:
    """What to generate, in words that fit every model.

    None means "not given".  `width` and `height` are in pixels, `aspect_ratio` is `"16:9"`;
    `parameters` are the model's own inputs, by its own names.
    """

    model: str
    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    aspect_ratio: str | None = None
    num_outputs: int | None = None
    seed: int | None = None
    output_format: str | None = None
    parameters: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreparedInput:
    """A purchase the model's schema accepts.

    `input` is exactly what goes to the provider; `num_outputs` is how many files it asks for;
    `warnings` are sentences for the caller about what was changed or left out; `files` are the
    inputs the model takes files for, whose addresses are still the caller's own.
    """

    model: str
    input: Mapping[str, JSON]
    num_outputs: int
    warnings: tuple[str, ...]
    files: Mapping[str, FileInput] = field(default_factory=dict)


class Translator:
    """Translate requests for one model.  Compiling takes a while: make one per description.

    Raise `ProviderUnavailable` for a description whose schema is no JSON Schema.
    """

    def __init__(self, description: ModelDescription) -> None:
        self.description = description
        self.properties: Mapping[str, Mapping[str, JSON]] = {
            name: flatten(schema, description.input_schema)
            for name, schema in description.properties.items()
        }
        self.ratios = _by_ratio(self.choices("aspect_ratio"), _RATIO)
        self._files = file_inputs(description.input_schema)
        self._validator = _compile(description)

    def prepare(
        self, request: CommonRequest, *, choose_seed: Callable[[], int]
    ) -> PreparedInput:
        """Translate and validate; raise `InvalidRequest` naming the caller's own field.

        `choose_seed` gives a seed for a model that takes one when the caller sent none.
        """
        draft = _Draft(self, request.parameters)
        draft.assign("prompt", request.prompt, "prompt")
        _translate_shape(draft, request)
        _translate_count(draft, request)
        _translate_extras(draft, request)
        if "seed" in self.properties and "seed" not in draft.input:
            draft.assign("seed", self._fit_seed(choose_seed()), "seed")
        self._validate(draft)
        return PreparedInput(
            request.model,
            draft.input,
            self._count_outputs(draft.input),
            tuple(draft.warnings),
            self._files,
        )

    def choices(self, name: str) -> Sequence[str]:
        """List the values of an enumerated text input; empty when it is none."""
        values = self.properties.get(name, {}).get("enum")
        if not isinstance(values, list):
            return ()
        return tuple(value for value in values if isinstance(value, str))

    def default(self, name: str) -> JSON:
        """Give the model's own default of an input, or None."""
        return self.properties.get(name, {}).get("default")

    def refuse(self, field: str, message: str) -> NoReturn:
        """Refuse the request because of one of its fields."""
        raise InvalidRequest(f"{message} ({self.description.name}).", field=field)

    def _count_outputs(self, model_input: Mapping[str, JSON]) -> int:
        for name in COUNT_INPUTS:
            if name in self.properties:
                count = model_input.get(name, self.default(name))
                return count if isinstance(count, int) else 1
        return 1

    def _fit_seed(self, seed: int) -> int:
        low, high = read_limits(self.properties["seed"])
        first = int(low) if low is not None and low > 0 else 0
        last = min(int(high), _SEED_LIMIT - 1) if high is not None else _SEED_LIMIT - 1
        return first + seed % max(1, last - first + 1)

    def _validate(self, draft: _Draft) -> None:
        if self._validator.is_valid(draft.input):
            return
        for error in self._validator.iter_errors(draft.input):
            name, text = say_violation(error, self.properties)
            field = draft.sources.get(name, f"parameters.{name}")
            if name == "prompt":
                field = "prompt"
            raise InvalidRequest(
                f"{field} {text} for {self.description.name}.", field=field
            )


class _Draft:
    """A model's input while it is written, with the caller's field behind every value."""

    def __init__(self, model: Translator, parameters: Mapping[str, JSON]) -> None:
        self.model = model
        self.input: dict[str, JSON] = dict(parameters)
        self.sources = {name: f"parameters.{name}" for name in parameters}
        self.warnings: list[str] = []
        for name in parameters:
            if name not in model.properties:
                _refuse_unknown(model, name)
            if is_secret(name, model.properties[name]):
                raise InvalidRequest(
                    f"{name} is a secret: it would be stored and shown with the job."
                    " Leave it out.",
                    field=f"parameters.{name}",
                )

    def assign(self, name: str, value: JSON, source: str) -> None:
        """Set an input; refuse when the caller has already set it to something else."""
        if name not in self.model.properties:
            self.model.refuse(source, f"The model takes no {name}")
        if name in self.input and not _same(self.input[name], value):
            other = self.sources[name]
            # What the caller wrote is not repeated: it may be a prompt.
            needs = "" if source == name else f" ({source} needs {name}={value!r})"
            raise InvalidRequest(
                f"{source} and {other} contradict each other{needs}. "
                "Send one of the two.",
                field=source,
            )
        self.input[name] = value
        self.sources.setdefault(name, source)

    def warn(self, text: str) -> None:
        """Tell the caller, without refusing."""
        self.warnings.append(f"{text} ({self.model.description.name}).")


def _compile(description: ModelDescription) -> jsonschema_rs.Validator:
    try:
        return jsonschema_rs.validator_for(
            dict(description.input_schema), retriever=_fetch_nothing
        )
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as exc:
        raise ProviderUnavailable(
            f"The provider's description of {description.name} makes no sense."
        ) from exc


def _fetch_nothing(uri: str) -> NoReturn:
    """Keep the validator from following a foreign schema's references into the network."""
    raise ValueError("input schemas must be self-contained")


def is_secret(name: str, schema: Mapping[str, JSON]) -> bool:
    """Tell an input that is somebody's key: by the model's word (cog's secrets), or by name."""
    if schema.get("x-cog-secret") is True or schema.get("format") == "password":
        return True
    return _SECRET.search(name) is not None


def _refuse_unknown(model: Translator, name: str) -> NoReturn:
    known = list(model.properties)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise InvalidRequest(
        f"{model.description.name} has no input {name!r}.{hint} "
        f"It takes: {', '.join(known) or 'nothing'}.",
        field=f"parameters.{name}",
    )


def _translate_shape(draft: _Draft, request: CommonRequest) -> None:
    """Translate width, height and aspect_ratio, which all say the same thing."""
    width, height, ratio = request.width, request.height, request.aspect_ratio
    if width is None and height is None:
        if ratio is not None:
            _translate_ratio(draft, ratio)
        return
    if ratio is not None:
        same = width and height and _reduce(width, height) == _parse_ratio(ratio)
        if not same:
            draft.model.refuse(
                "aspect_ratio",
                "aspect_ratio contradicts width and height; send either the ratio or both "
                "sides",
            )
    _translate_size(draft, *_complete(draft.model, width, height))


def _complete(
    model: Translator, width: int | None, height: int | None
) -> tuple[int, int]:
    """Fill in the side that was not given with the model's default."""
    return (
        _default_side(model, "width") if width is None else width,
        _default_side(model, "height") if height is None else height,
    )


def _default_side(model: Translator, name: str) -> int:
    default = model.default(name)
    if not isinstance(default, int):
        model.refuse(name, f"{name} is missing: send width and height together")
    return default


def _translate_size(draft: _Draft, width: int, height: int) -> None:
    """Use the first way the model has to say a size, from exact to approximate."""
    model = draft.model
    if "width" in model.properties and "height" in model.properties:
        draft.assign("width", width, "width")
        draft.assign("height", height, "height")
        # Such models look at the two only when told so (replicate-api.md section 13).
        for name in ("aspect_ratio", *_SIZE_INPUTS):
            if "custom" in model.choices(name):
                draft.assign(name, "custom", "width")
        return
    exact = f"{width}x{height}"
    for name in _SIZE_INPUTS:
        if exact in model.choices(name):
            draft.assign(name, exact, "width")
            if "Not set" in model.choices("aspect_ratio"):
                draft.assign("aspect_ratio", "Not set", "width")
            return
    ratio = model.ratios.get(_reduce(width, height))
    if ratio is not None:
        draft.assign("aspect_ratio", ratio, "width")
        draft.warn(
            f"The model chooses the exact size: {width}x{height} was sent as aspect "
            f"ratio {ratio}"
        )
        return
    _refuse_size(model, width, height)


def _refuse_size(model: Translator, width: int, height: int) -> NoReturn:
    sizes = [
        value
        for name in _SIZE_INPUTS
        for value in model.choices(name)
        if _SIZE.fullmatch(value)
    ]
    allowed = []
    if sizes:
        allowed.append(f"one of the sizes {', '.join(sizes)}")
    if model.ratios:
        allowed.append(
            f"a size with one of the ratios {', '.join(model.ratios.values())}"
        )
    words = ", or ".join(allowed) or "no width and height at all"
    model.refuse("width", f"{width}x{height} is not possible; send {words}")


def _translate_ratio(draft: _Draft, ratio: str) -> None:
    model = draft.model
    if "aspect_ratio" in model.properties:
        draft.assign("aspect_ratio", ratio, "aspect_ratio")
        return
    if "width" not in model.properties or "height" not in model.properties:
        model.refuse("aspect_ratio", "The model takes neither a ratio nor a size")
    reduced = _parse_ratio(ratio)
    if reduced is None or not 1 / _STEEPEST <= reduced[0] / reduced[1] <= _STEEPEST:
        model.refuse(
            "aspect_ratio",
            f"aspect_ratio must look like 16:9 and lie between 1:{_STEEPEST} and "
            f"{_STEEPEST}:1",
        )
    height = math.sqrt(_MEGAPIXEL * reduced[1] / reduced[0])
    width = height * reduced[0] / reduced[1]
    sides = {"width": _to_grid(width), "height": _to_grid(height)}
    for name, value in sides.items():
        draft.assign(name, value, "aspect_ratio")
    draft.warn(
        f"The model takes no aspect ratio: {ratio} was sent as "
        f"{sides['width']}x{sides['height']}"
    )


def _translate_count(draft: _Draft, request: CommonRequest) -> None:
    wanted = request.num_outputs
    if wanted is None:
        return
    model = draft.model
    name = next((one for one in COUNT_INPUTS if one in model.properties), None)
    if name is None:
        if wanted > 1:
            model.refuse(
                "num_outputs",
                f"The model makes one picture per job; send {wanted} jobs instead",
            )
        return
    draft.assign(name, wanted, "num_outputs")
    if wanted > 1 and "auto" in model.choices("sequential_image_generation"):
        draft.assign("sequential_image_generation", "auto", "num_outputs")
        draft.warn(f"{wanted} is an upper limit: the model may make fewer pictures")


def _translate_extras(draft: _Draft, request: CommonRequest) -> None:
    """Translate what a picture can do without: a model that lacks it gets a warning."""
    model = draft.model
    if request.output_format is not None:
        if "output_format" in model.properties:
            value = _find_format(request.output_format, model.choices("output_format"))
            draft.assign("output_format", value, "output_format")
        else:
            draft.warn("output_format was ignored: the model has only one format")
    if request.negative_prompt is not None:
        if "negative_prompt" in model.properties:
            draft.assign("negative_prompt", request.negative_prompt, "negative_prompt")
        else:
            draft.warn("negative_prompt was ignored: the model does not take one")
    if request.seed is not None:
        if "seed" in model.properties:
            draft.assign("seed", request.seed, "seed")
        else:
            draft.warn("seed was ignored: the model does not take one")


def _find_format(wanted: str, choices: Sequence[str]) -> str:
    """Spell a format as the model does; an unknown one is left for validation to refuse."""
    lowered = wanted.lower()
    names = ("jpg", "jpeg") if lowered in ("jpg", "jpeg") else (lowered,)
    return next((one for one in choices if one.lower() in names), wanted)


def _same(one: JSON, other: JSON) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _to_grid(pixels: float) -> int:
    return max(_GRID, round(pixels / _GRID) * _GRID)


def _reduce(width: int, height: int) -> tuple[int, int]:
    divisor = math.gcd(width, height) or 1
    return width // divisor, height // divisor


def _parse_ratio(text: str) -> tuple[int, int] | None:
    matched = _RATIO.fullmatch(text)
    return _reduce(int(matched[1]), int(matched[2])) if matched else None


def _by_ratio(
    values: Sequence[str], pattern: re.Pattern[str]
) -> dict[tuple[int, int], str]:
    found: dict[tuple[int, int], str] = {}
    for value in values:
        matched = pattern.fullmatch(value)
        if matched:
            found.setdefault(_reduce(int(matched[1]), int(matched[2])), value)
    return found
