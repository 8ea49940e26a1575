"""Common fields into a model's own words: nothing lost in silence, nothing invalid sent."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.errors import InvalidRequest, ProviderUnavailable
from app.domain.generation import JSON, ModelDescription
from app.services.catalogue import load_bundled_models
from app.services.translation import CommonRequest, PreparedInput, Translator

BUNDLED = load_bundled_models()
TRANSLATORS = {name: Translator(found) for name, found in BUNDLED.items()}
SEED = 12345

SCHNELL = "black-forest-labs/flux-schnell"
PRO = "black-forest-labs/flux-1.1-pro"
FLUX_2 = "black-forest-labs/flux-2-pro"
SDXL = "stability-ai/sdxl"
SEEDREAM = "bytedance/seedream-4"
RECRAFT = "recraft-ai/recraft-v3"
IMAGEN = "google/imagen-4-fast"
GPT = "openai/gpt-image-1.5"


def prepare(model: str, **given_fields: Any) -> PreparedInput:
    request = CommonRequest(model, **{"prompt": "a fox", **given_fields})
    return TRANSLATORS[model].prepare(request, choose_seed=lambda: SEED)


def sent(model: str, **given_fields: Any) -> dict[str, JSON]:
    """Give what is sent beside the prompt and the seed we chose."""
    found = dict(prepare(model, **given_fields).input)
    assert found.pop("prompt") == "a fox"
    if found.get("seed") == SEED:
        del found["seed"]
    return found


def test_fifteen_models_are_bundled_and_have_valid_schemas() -> None:
    assert len(BUNDLED) == 15
    for found in BUNDLED.values():
        jsonschema.Draft202012Validator.check_schema(dict(found.input_schema))
        for name, schema in found.properties.items():
            if "default" in schema:
                jsonschema.validate(schema["default"], schema), name


@pytest.mark.parametrize("model", BUNDLED)
def test_a_prompt_is_enough(model: str) -> None:
    prepared = prepare(model)

    expected: dict[str, JSON] = {"prompt": "a fox"}
    if "seed" in BUNDLED[model].properties:
        expected["seed"] = SEED
    assert prepared.input == expected
    assert (prepared.num_outputs, prepared.warnings) == (1, ())


ACCEPTED: list[tuple[str, dict[str, Any], dict[str, JSON], int]] = [
    # model, common request, the model's input, number of warnings
    (SCHNELL, {"num_outputs": 4}, {"num_outputs": 4}, 0),
    (GPT, {"num_outputs": 4}, {"number_of_images": 4}, 0),
    (
        SEEDREAM,
        {"num_outputs": 4},
        {"max_images": 4, "sequential_image_generation": "auto"},
        1,
    ),
    (SEEDREAM, {"num_outputs": 1}, {"max_images": 1}, 0),
    (IMAGEN, {"num_outputs": 1}, {}, 0),
    (SDXL, {"width": 768, "height": 512}, {"width": 768, "height": 512}, 0),
    (SDXL, {"width": 768}, {"width": 768, "height": 1024}, 0),
    (
        PRO,
        {"width": 512, "height": 768},
        {"width": 512, "height": 768, "aspect_ratio": "custom"},
        0,
    ),
    (
        FLUX_2,
        {"width": 512, "height": 768},
        {"width": 512, "height": 768, "aspect_ratio": "custom"},
        0,
    ),
    (
        SEEDREAM,
        {"height": 4096},
        {"width": 2048, "height": 4096, "size": "custom"},
        0,
    ),
    (
        RECRAFT,
        {"width": 1707, "height": 1024},
        {"size": "1707x1024", "aspect_ratio": "Not set"},
        0,
    ),
    (RECRAFT, {"width": 1600, "height": 900}, {"aspect_ratio": "16:9"}, 1),
    (SCHNELL, {"width": 1024, "height": 576}, {"aspect_ratio": "16:9"}, 1),
    (
        SCHNELL,
        {"width": 640, "height": 640, "aspect_ratio": "1:1"},
        {"aspect_ratio": "1:1"},
        1,
    ),
    (SCHNELL, {"aspect_ratio": "21:9"}, {"aspect_ratio": "21:9"}, 0),
    (SDXL, {"aspect_ratio": "16:9"}, {"width": 1344, "height": 768}, 1),
    (SDXL, {"aspect_ratio": "1:1"}, {"width": 1024, "height": 1024}, 1),
    (SDXL, {"negative_prompt": "rain"}, {"negative_prompt": "rain"}, 0),
    (SCHNELL, {"negative_prompt": "rain"}, {}, 1),
    (SCHNELL, {"seed": 0}, {"seed": 0}, 0),
    (IMAGEN, {"seed": 7}, {}, 1),
    (IMAGEN, {"output_format": "jpeg"}, {"output_format": "jpg"}, 0),
    (GPT, {"output_format": "jpg"}, {"output_format": "jpeg"}, 0),
    (SCHNELL, {"output_format": "PNG"}, {"output_format": "png"}, 0),
    (SDXL, {"output_format": "png"}, {}, 1),
    (SCHNELL, {"parameters": {"go_fast": False}}, {"go_fast": False}, 0),
    (SCHNELL, {"seed": 3, "parameters": {"seed": 3}}, {"seed": 3}, 0),
    (SCHNELL, {"parameters": {"seed": 3}}, {"seed": 3}, 0),
]


@pytest.mark.parametrize(("model", "common", "own", "warnings"), ACCEPTED)
def test_common_fields_become_the_models_own(
    model: str, common: dict[str, Any], own: dict[str, JSON], warnings: int
) -> None:
    assert sent(model, **common) == own
    assert len(prepare(model, **common).warnings) == warnings


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    # model, common request, the field to blame, words of the message
    (SCHNELL, {"num_outputs": 5}, "num_outputs", f"between 1 and 4 for {SCHNELL}"),
    (IMAGEN, {"num_outputs": 2}, "num_outputs", "send 2 jobs"),
    (SCHNELL, {"width": 1000, "height": 999}, "width", "16:9, 21:9"),
    (RECRAFT, {"width": 999, "height": 1000}, "width", "1365x1024"),
    (SCHNELL, {"width": 1024}, "height", "height is missing"),
    (PRO, {"height": 1024}, "width", "width is missing"),
    (PRO, {"width": 100, "height": 512}, "width", "between 256 and 1440"),
    (PRO, {"width": 500, "height": 512}, "width", "a multiple of 32"),
    (SCHNELL, {"aspect_ratio": "17:3"}, "aspect_ratio", "one of 1:1, 16:9"),
    (SDXL, {"aspect_ratio": "wide"}, "aspect_ratio", "look like 16:9"),
    (SDXL, {"aspect_ratio": "99:1"}, "aspect_ratio", "between 1:16 and 16:1"),
    (
        SDXL,
        {"width": 512, "height": 512, "aspect_ratio": "16:9"},
        "aspect_ratio",
        "contradicts width and height",
    ),
    (IMAGEN, {"output_format": "webp"}, "output_format", "one of jpg, png"),
    (SCHNELL, {"parameters": {"sede": 1}}, "parameters.sede", "mean seed"),
    (SCHNELL, {"parameters": {"zzz": 1}}, "parameters.zzz", "It takes: prompt, "),
    (
        SCHNELL,
        {"parameters": {"go_fast": "yes"}},
        "parameters.go_fast",
        "true or false",
    ),
    (
        SCHNELL,
        {"parameters": {"num_inference_steps": 5}},
        "parameters.num_inference_steps",
        "between 1 and 4",
    ),
    (
        SDXL,
        {"parameters": {"guidance_scale": 0.5}},
        "parameters.guidance_scale",
        "between 1 and 50",
    ),
    (
        FLUX_2,
        {"parameters": {"input_images": [1]}},
        "parameters.input_images",
        "unacceptable value",
    ),
    (SCHNELL, {"seed": 4, "parameters": {"seed": 3}}, "seed", "parameters.seed"),
    (
        GPT,
        {"num_outputs": 2, "parameters": {"number_of_images": 3}},
        "num_outputs",
        "parameters.number_of_images",
    ),
    (
        PRO,
        {"width": 512, "height": 512, "parameters": {"aspect_ratio": "1:1"}},
        "width",
        "parameters.aspect_ratio",
    ),
    (
        SEEDREAM,
        {"width": 2048, "height": 2048, "parameters": {"size": "4K"}},
        "width",
        "parameters.size",
    ),
    (SCHNELL, {"parameters": {"prompt": "a cat"}}, "prompt", "parameters.prompt"),
    (
        SCHNELL,
        {"parameters": {"num_outputs": True}},
        "parameters.num_outputs",
        "an int",
    ),
]


@pytest.mark.parametrize(("model", "common", "field", "words"), REFUSED)
def test_what_the_model_would_refuse_is_refused_by_name(
    model: str, common: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare(model, **common)

    assert caught.value.field == field
    assert words in str(caught.value)


def test_a_refusal_does_not_repeat_a_prompt() -> None:
    with pytest.raises(InvalidRequest) as caught:
        prepare(SCHNELL, prompt="secret plan", parameters={"prompt": "other secret"})

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "common", "count"),
    [
        (SCHNELL, {"parameters": {"num_outputs": 3}}, 3),
        (GPT, {"num_outputs": 5}, 5),
        (SEEDREAM, {"parameters": {"max_images": 6}}, 6),
        (IMAGEN, {"num_outputs": 1}, 1),
    ],
)
def test_it_is_known_how_many_files_to_expect(
    model: str, common: dict[str, Any], count: int
) -> None:
    assert prepare(model, **common).num_outputs == count


def test_enumerations_behind_references_are_understood() -> None:
    model = Translator(
        ModelDescription(
            "a/b",
            "",
            None,
            {
                "type": "object",
                "properties": {
                    "prompt": {"type": "string"},
                    "aspect_ratio": {
                        "allOf": [{"$ref": "#/$defs/ratio"}],
                        "default": "1:1",
                    },
                },
                "$defs": {"ratio": {"type": "string", "enum": ["1:1", "3:2"]}},
            },
        )
    )

    def ask(**common: Any) -> PreparedInput:
        request = CommonRequest("a/b", "a fox", **common)
        return model.prepare(request, choose_seed=lambda: SEED)

    assert ask(width=900, height=600).input["aspect_ratio"] == "3:2"
    with pytest.raises(InvalidRequest, match="must be one of 1:1, 3:2"):
        ask(aspect_ratio="4:3")


def test_a_model_without_a_prompt_is_refused() -> None:
    description = replace(
        BUNDLED[SCHNELL],
        input_schema={"type": "object", "properties": {"image": {"type": "string"}}},
    )
    with pytest.raises(InvalidRequest, match="takes no prompt") as caught:
        Translator(description).prepare(
            CommonRequest(SCHNELL, "a fox"), choose_seed=lambda: SEED
        )
    assert caught.value.field == "prompt"


def test_a_seed_of_ours_keeps_within_the_models_limits() -> None:
    schema: dict[str, JSON] = {
        "type": "object",
        "properties": {
            "prompt": {"type": "string"},
            "seed": {"type": "integer", "minimum": 1, "maximum": 10},
        },
    }
    model = Translator(ModelDescription("a/b", "", None, schema))

    for chosen in (0, 9, 10, 2**31 - 1):
        prepared = model.prepare(
            CommonRequest("a/b", "a fox"), choose_seed=lambda value=chosen: value
        )
        assert 1 <= int(str(prepared.input["seed"])) <= 10


@pytest.mark.parametrize(
    "schema",
    [
        {"type": 5},
        {"properties": {"a": {"$ref": "http://127.0.0.1:9/schema.json"}}},
        {"properties": {"a": {"$ref": "#/missing"}}},
    ],
)
def test_a_senseless_schema_is_the_providers_fault(schema: dict[str, JSON]) -> None:
    with pytest.raises(ProviderUnavailable, match="makes no sense"):
        Translator(ModelDescription("a/b", "", None, schema))


SIDES = st.none() | st.sampled_from([256, 512, 576, 768, 1000, 1024, 2048, 9999])
RATIOS = st.sampled_from([None, "1:1", "16:9", "2:3", "21:9", "1:30", "x"])


@given(
    st.builds(
        CommonRequest,
        model=st.sampled_from(sorted(BUNDLED)),
        prompt=st.text(min_size=1, max_size=20),
        negative_prompt=st.none() | st.text(max_size=5),
        width=SIDES,
        height=SIDES,
        aspect_ratio=RATIOS,
        num_outputs=st.none() | st.integers(1, 16),
        seed=st.none() | st.integers(0, 2**31 - 1),
        output_format=st.sampled_from([None, "png", "jpg", "jpeg", "webp", "bmp"]),
        parameters=st.dictionaries(
            st.sampled_from(["seed", "aspect_ratio", "size", "go_fast", "typo"]),
            st.sampled_from([1, True, "1:1", "4K", "custom"]),
            max_size=2,
        ),
    )
)
def test_whatever_is_accepted_is_valid_and_complete(request: CommonRequest) -> None:
    try:
        prepared = TRANSLATORS[request.model].prepare(request, choose_seed=lambda: SEED)
    except InvalidRequest as refused:
        names = {one.name for one in fields(CommonRequest)}
        assert refused.field is not None
        assert refused.field.split(".")[0] in names
        return

    # A second validator, not the one under test, has the last word.
    jsonschema.validate(dict(prepared.input), dict(BUNDLED[request.model].input_schema))
    assert prepared.input["prompt"] == request.prompt
    assert dict(request.parameters).items() <= dict(prepared.input).items()
    heard = " ".join(prepared.warnings)
    for name in ("negative_prompt", "seed", "output_format"):
        if getattr(request, name) is not None:
            assert name in prepared.input or name in heard
    if request.width is not None and "width" not in prepared.input:
        exact = f"{request.width}x{request.height}"
        assert exact in heard or exact in prepared.input.values()
    if request.num_outputs is not None:
        assert prepared.num_outputs == request.num_outputs


def test_a_secret_is_not_taken_where_it_would_be_shown() -> None:
    with pytest.raises(InvalidRequest) as refused:
        prepare(GPT, parameters={"openai_api_key": "sk-1"})

    assert refused.value.field == "parameters.openai_api_key"
    assert "sk-1" not in str(refused.value)
