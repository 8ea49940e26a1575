"""Which of a model's inputs are files, and which files are pictures."""

from __future__ import annotations

from typing import Any

import pytest

from app.services.catalogue import load_bundled_models
from app.services.file_inputs import FileInput, file_inputs

URI = {"type": "string", "format": "uri"}


def found(**properties: Any) -> list[FileInput]:
    return list(file_inputs({"type": "object", "properties": properties}).values())


@pytest.mark.parametrize(
    "schema, is_list",
    [
        (URI, False),
        (URI | {"nullable": True}, False),
        ({"anyOf": [URI, {"type": "null"}]}, False),
        ({"oneOf": [{"type": "null"}, URI]}, False),
        ({"allOf": [URI], "default": None}, False),
        ({"type": "array", "items": URI}, True),
        ({"anyOf": [{"type": "array", "items": URI}, {"type": "null"}]}, True),
    ],
)
def test_a_uri_is_found_however_it_is_said(
    schema: dict[str, Any], is_list: bool
) -> None:
    assert found(image=schema) == [FileInput("image", is_list, is_picture=True)]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": "string", "enum": ["a", "b"]},
        {"type": "string", "format": "date"},
        {"type": "array", "items": {"type": "string"}},
        {},
        True,
    ],
)
def test_what_is_no_file_is_none(schema: Any) -> None:
    assert found(image_size=schema) == []
    assert found(caption={"type": "string"}) == []


@pytest.mark.parametrize(
    "name, words, is_picture",
    [
        ("image", "", True),
        ("input_images", "", True),
        ("inpaint_mask", "", True),
        ("start_frame", "", True),
        ("input_image2", "", True),
        ("imageUrl", "", True),
        ("input", "The picture to start from", True),
        ("input", "", False),
        ("input", "A file", False),
        ("audio", "Sound for the image", False),
        ("lora_weights", "Weights trained on images", False),
        ("input", "A zip archive of images", False),
        ("reference_video", "", False),
    ],
)
def test_words_tell_a_picture(name: str, words: str, is_picture: bool) -> None:
    (one,) = found(**{name: URI | {"description": words}})

    assert one.is_picture is is_picture


def test_a_plain_text_named_like_a_picture_may_be_one() -> None:
    (one,) = found(input_image={"type": "string", "nullable": True})

    assert one == FileInput("input_image", False, is_picture=True, is_sure=False)


def test_the_first_is_the_one_the_model_shows_first() -> None:
    names = [
        one.name for one in found(mask=URI | {"x-order": 3}, image=URI | {"x-order": 2})
    ]

    assert names == ["image", "mask"]


def test_every_picture_input_of_the_bundled_models_is_known() -> None:
    inputs = {
        one.name: one.is_picture
        for model in load_bundled_models().values()
        for one in file_inputs(model.input_schema).values()
    }

    assert inputs == dict.fromkeys(
        ("image", "mask", "image_prompt", "input_image", "input_images", "image_input"),
        True,
    )
