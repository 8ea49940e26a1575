"""The catalogue: what is accepted, what is refused, and what is then drawn."""

import pytest

from sandbox.catalogue import Catalogue

CATALOGUE = Catalogue.bundled()
ASKED_FOR = [
    "black-forest-labs/flux-schnell",
    "black-forest-labs/flux-dev",
    "black-forest-labs/flux-1.1-pro",
    "black-forest-labs/flux-1.1-pro-ultra",
    "black-forest-labs/flux-2-pro",
    "black-forest-labs/flux-kontext-pro",
    "stability-ai/sdxl",
    "stability-ai/stable-diffusion-3.5-large",
    "stability-ai/stable-diffusion-3.5-large-turbo",
    "google/imagen-4-fast",
    "google/nano-banana-2",
    "bytedance/seedream-4",
    "bytedance/seedream-4.5",
    "recraft-ai/recraft-v3",
    "ideogram-ai/ideogram-v3-turbo",
    "openai/gpt-image-1.5",
    "qwen/qwen-image",
]


@pytest.mark.parametrize("ref", ASKED_FOR)
def test_every_model_is_there_and_says_what_it_is(ref):
    model = CATALOGUE.find(ref)

    assert model is not None
    assert "sandbox" in model.description.lower()
    assert len(model.version) == 64 and int(model.version, 16)


@pytest.mark.parametrize("ref", ASKED_FOR)
def test_every_default_and_every_choice_is_acceptable(ref):
    model = CATALOGUE.find(ref)
    schemas = model.openapi_schema["components"]["schemas"]
    orders = [field["x-order"] for field in schemas["Input"]["properties"].values()]
    assert orders == list(range(len(orders)))
    for name, field in schemas["Input"]["properties"].items():
        values = [field["default"]] if "default" in field else []
        for part in field.get("allOf", []):
            values += schemas[part["$ref"].rsplit("/", 1)[1]]["enum"]
        for value in values:
            given = {"prompt": "a fox", name: value}
            assert model.complaints(given) == []
            order = model.order(given)
            assert 16 <= order.width <= 8192 and 16 <= order.height <= 8192
            assert order.format in ("webp", "jpeg", "png") and order.count >= 1


@pytest.mark.parametrize(
    "ref, given, count, size, kind",
    [
        ("black-forest-labs/flux-schnell", {}, 1, (1024, 1024), "webp"),
        (
            "black-forest-labs/flux-schnell",
            {"aspect_ratio": "16:9", "num_outputs": 4, "output_format": "jpg"},
            4,
            (1344, 768),
            "jpeg",
        ),
        ("black-forest-labs/flux-dev", {"megapixels": "0.25"}, 1, (512, 512), "webp"),
        (
            "black-forest-labs/flux-1.1-pro",
            {"aspect_ratio": "custom", "width": 320, "height": 1440},
            1,
            (320, 1440),
            "webp",
        ),
        ("black-forest-labs/flux-1.1-pro", {"width": 320}, 1, (1024, 1024), "webp"),
        (
            "black-forest-labs/flux-2-pro",
            {"resolution": "4 MP"},
            1,
            (2048, 2048),
            "webp",
        ),
        ("stability-ai/sdxl", {"width": 768, "height": 512}, 1, (768, 512), "png"),
        ("google/nano-banana-2", {"resolution": "2K"}, 1, (2048, 2048), "jpeg"),
        ("bytedance/seedream-4", {"max_images": 3}, 1, (2048, 2048), "jpeg"),
        (
            "bytedance/seedream-4",
            {"max_images": 3, "sequential_image_generation": "auto", "size": "1K"},
            3,
            (1024, 1024),
            "jpeg",
        ),
        ("recraft-ai/recraft-v3", {"size": "1365x1024"}, 1, (1365, 1024), "webp"),
        (
            "ideogram-ai/ideogram-v3-turbo",
            {"resolution": "512x1536"},
            1,
            (512, 1536),
            "png",
        ),
        ("openai/gpt-image-1.5", {"number_of_images": 2}, 2, (1024, 1024), "webp"),
    ],
)
def test_an_input_is_an_order_for_pictures(ref, given, count, size, kind):
    order = CATALOGUE.find(ref).order({"prompt": "a fox", **given})

    assert (order.count, (order.width, order.height), order.format) == (
        count,
        size,
        kind,
    )


@pytest.mark.parametrize(
    "given, kind, field",
    [
        ({}, "required", "input"),
        ({"prompt": 3}, "invalid_type", "input.prompt"),
        ({"prompt": None}, "invalid_type", "input.prompt"),
        ({"prompt": "a", "num_outputs": 0}, "number_gte", "input.num_outputs"),
        ({"prompt": "a", "num_outputs": 5}, "number_lte", "input.num_outputs"),
        ({"prompt": "a", "num_outputs": True}, "invalid_type", "input.num_outputs"),
        ({"prompt": "a", "num_outputs": 1.5}, "invalid_type", "input.num_outputs"),
        ({"prompt": "a", "megapixels": "2"}, "enum", "input.megapixels"),
        ({"prompt": "a", "go_fast": 1}, "invalid_type", "input.go_fast"),
    ],
)
def test_a_bad_input_is_refused_in_the_words_of_the_validator(given, kind, field):
    [complaint] = CATALOGUE.find("black-forest-labs/flux-schnell").complaints(given)

    assert (complaint.kind, complaint.field) == (kind, field)
    assert complaint.line().startswith(f"- {field}: ")


def test_unknown_and_null_inputs_are_ignored():
    model = CATALOGUE.find("black-forest-labs/flux-schnell")

    assert model.complaints({"prompt": "a", "colour": "red", "seed": None}) == []


def test_the_items_of_a_list_are_checked():
    model = CATALOGUE.find("bytedance/seedream-4")
    good, bad = ["https://example.com/a.png"], ["not an address"]

    assert model.complaints({"prompt": "a", "image_input": good}) == []
    [complaint] = model.complaints({"prompt": "a", "image_input": bad})
    assert complaint.field == "input.image_input.0"


def test_three_spellings_of_version():
    schnell = CATALOGUE.find("black-forest-labs/flux-schnell")
    sdxl = CATALOGUE.find("stability-ai/sdxl")

    assert CATALOGUE.by_version(schnell.ref) is schnell
    assert CATALOGUE.by_version(f"{schnell.ref}:{schnell.version}") is schnell
    assert CATALOGUE.by_version(schnell.version) is schnell
    assert CATALOGUE.by_version(f"{sdxl.ref}:{sdxl.version}") is sdxl
    assert CATALOGUE.by_version(sdxl.ref) is None, "community models need a version"
    assert CATALOGUE.by_version(f"{schnell.ref}:latest") is None
