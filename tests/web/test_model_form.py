"""A model's schema as a form, and what is typed there as the model's input."""

from __future__ import annotations

import re
from typing import Any

import pytest

from app.domain.generation import JSON, ModelDescription
from app.services.catalogue import load_bundled_models
from app.services.translation import CommonRequest, Translator
from app.web.model_form import Field, Kind, Unreadable, fields_of, read

MODELS = load_bundled_models()
SECRET = re.compile(r"api_key|token|secret|password")


def model_of(properties: dict[str, Any], **rest: Any) -> ModelDescription:
    schema = {"type": "object", "properties": properties} | rest
    return ModelDescription("somebody/model", "", None, schema)


def field_of(schema: dict[str, Any], name: str = "thing") -> Field:
    (found,) = fields_of(model_of({name: schema}))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_bundled_model_becomes_a_form(name: str) -> None:
    model = MODELS[name]

    fields = fields_of(model)

    hidden = {one for one in model.properties if SECRET.search(one)} | {"prompt"}
    assert {one.name for one in fields} == set(model.properties) - hidden
    ranks = [model.properties[one.name].get("x-order") for one in fields]
    assert ranks == sorted(
        ranks, key=lambda rank: rank if isinstance(rank, int) else 99
    )
    for one in fields:
        assert one.label and one.label[0].isupper() and "_" not in one.label
        if one.kind in (Kind.CHOICE, Kind.RATIO):
            offered = [choice.text for choice in one.choices]
            assert one.default in ("", *offered), one.name


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_alone_is_left_to_the_model(name: str) -> None:
    model = MODELS[name]

    typed = {one.name: read(one, one.default) for one in fields_of(model)}

    assert set(typed.values()) <= {None}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_form_offers_the_model_takes(name: str) -> None:
    """Every choice, both ends of every slider, each switch turned."""
    model = MODELS[name]
    translator = Translator(model)
    for one in fields_of(model):
        texts = [choice.text for choice in one.choices]
        if one.kind is Kind.NUMBER and one.low is not None and one.high is not None:
            texts = [str(one.low), str(one.high)]
        if one.kind is Kind.SWITCH:
            texts = ["true", "false"]
        for text in texts:
            value = read(one, text)
            own = {} if value is None else {one.name: value}
            request = CommonRequest(name, "a picture", parameters=own)
            translator.prepare(request, choose_seed=lambda: 7)


@pytest.mark.parametrize(
    ("schema", "name", "kind"),
    [
        ({"type": "boolean"}, "fast", Kind.SWITCH),
        ({"type": "integer"}, "steps", Kind.NUMBER),
        ({"type": "string"}, "style", Kind.TEXT),
        ({"type": "string"}, "negative_prompt", Kind.LONG_TEXT),
        ({"type": "string", "enum": ["a", "b"]}, "size", Kind.CHOICE),
        ({"type": "string", "enum": ["1:1", "16:9"]}, "aspect_ratio", Kind.RATIO),
        ({"type": "string", "enum": ["square"]}, "aspect_ratio", Kind.CHOICE),
        ({"type": "string", "format": "uri"}, "image", Kind.PICTURE),
        ({"type": "string", "format": "uri"}, "weights", Kind.TEXT),
        (
            {"type": "array", "items": {"type": "string", "format": "uri"}},
            "images",
            Kind.PICTURES,
        ),
        ({"type": "array", "items": {"type": "number"}}, "scales", Kind.LINES),
        ({"type": "array", "items": {"type": "object"}}, "boxes", Kind.JSON),
        ({"type": "object"}, "extra", Kind.JSON),
        ({}, "anything", Kind.JSON),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "seed", Kind.NUMBER),
        ({"allOf": [{"enum": ["x"], "type": "string"}]}, "mode", Kind.CHOICE),
    ],
)
def test_each_kind_of_input_has_its_control(
    schema: dict[str, Any], name: str, kind: Kind
) -> None:
    assert field_of(schema, name).kind is kind


NUMBER = {"type": "number", "minimum": 0, "maximum": 1, "default": 0.8}
WHOLE = {"type": "integer", "default": 4}


@pytest.mark.parametrize(
    ("schema", "typed", "value"),
    [
        *((NUMBER, "0.8", None), (NUMBER, "", None), (NUMBER, "0,25", 0.25)),
        *((NUMBER, " 1 ", 1), (NUMBER, "2", 2), (WHOLE, "5", 5), (WHOLE, "-5", -5)),
        ({"type": "integer"}, "9223372036854775807", 9223372036854775807),
        ({"type": "boolean", "default": True}, "false", False),
        ({"type": "boolean", "default": True}, "true", None),
        ({"type": "boolean"}, "true", True),
        ({"type": "integer", "enum": [1, 2], "default": 1}, "2", 2),
        ({"type": "string", "enum": ["1", "2"], "default": "1"}, "2", "2"),
        ({"type": "string", "enum": ["a"]}, "forged", "forged"),
        ({"type": "string", "default": " "}, "", None),
        ({"type": "array", "items": {"type": "string"}}, "a\r\n\r\n b ", ["a", "b"]),
        ({"type": "array", "items": {"type": "number"}}, "1\n0.5", [1, 0.5]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
    ],
)
def test_what_is_typed_becomes_the_value(
    schema: dict[str, Any], typed: str, value: JSON
) -> None:
    found = read(field_of(schema), typed)

    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("schema", "typed", "words"),
    [
        (NUMBER, "much", "must be a number"),
        (NUMBER, "nan", "must be a number"),
        (NUMBER, "1e999", "must be a number"),
        (WHOLE, "1.5", "must be a whole number"),
        ({"type": "array", "items": {"type": "integer"}}, "1\nx", "must be a number"),
        ({"type": "object"}, "{", "must be written as JSON"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    schema: dict[str, Any], typed: str, words: str
) -> None:
    with pytest.raises(Unreadable, match=words):
        read(field_of(schema), typed)


@pytest.mark.parametrize(
    ("schema", "slider", "step", "limits"),
    [
        (NUMBER, True, "0.01", "0 to 1"),
        ({"type": "number", "minimum": 1, "maximum": 50}, False, "1", "1 to 50"),
        (
            {"type": "integer", "minimum": 16, "multipleOf": 32},
            False,
            "32",
            "at least 16",
        ),
        ({"type": "integer", "maximum": 9, "default": 1}, False, "1", "at most 9"),
        ({"type": "number"}, False, "any", ""),
    ],
)
def test_numbers_know_their_ends(
    schema: dict[str, Any], slider: bool, step: str, limits: str
) -> None:
    found = field_of(schema)

    assert (found.has_slider, found.step, found.limits) == (slider, step, limits)


def test_an_input_that_must_be_given_is_shown_at_once() -> None:
    properties = {"a": {"type": "string"}, "b": {"type": "string"}}
    first, second = fields_of(model_of(properties, required=["b", "prompt"]))

    assert (first.is_required, first.is_foremost) == (False, False)
    assert (second.is_required, second.is_foremost) == (True, True)


def test_ratios_are_drawn() -> None:
    schema = {"type": "string", "enum": ["1:1", "16:9", "1:8", "custom"]}
    found = field_of(schema, "aspect_ratio")

    drawn = {choice.text: (choice.width, choice.height) for choice in found.choices}
    assert drawn["1:1"] == (18, 18)
    assert drawn["16:9"] == (18, 10)
    assert drawn["1:8"] == (4, 18)
    assert drawn["custom"] == (0, 0)
