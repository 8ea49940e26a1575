"""What is wrong is refused with a clear answer that names it, and nothing is stored."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.api.bodies import BODY_LIMIT
from sandbox.runner import Sandbox
from tests.api.served import FLUX, Api, check_problem

PROMPT = "a walled garden at noon"
PRO = "black-forest-labs/flux-1.1-pro"


# The same in every process that collects these tests.
NOBODY = UUID(int=7)


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> AsyncIterator[Api]:
    """The API; afterwards there must be no job, and no purchase."""
    yield shared
    assert await shared.listed() == []
    async with httpx.AsyncClient(verify=False) as client:
        stats = (await client.get(f"{shared_sandbox.url}/sandbox/stats")).json()
    assert stats["purchases"] == 0


def asking(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, **fields}


# fields of the body · field that is named · pointer to it · a word of the explanation
BODIES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no prompt": ({}, "prompt", "/prompt", "is required"),
    "an empty prompt": ({"prompt": ""}, "prompt", "/prompt", "at least 1"),
    "a blank prompt": ({"prompt": " \n\t "}, "prompt", "/prompt", "blank"),
    "an endless prompt": ({"prompt": "x" * 20_000}, "prompt", "/prompt", "10000"),
    "a number as prompt": ({"prompt": 5}, "prompt", "/prompt", "string"),
    "null as prompt": ({"prompt": None}, "prompt", "/prompt", "string"),
    "U+0000 in the prompt": ({"prompt": "a\0b"}, "prompt", "/prompt", "U+0000"),
    "U+0000 in metadata": (
        *(asking(metadata={"deep": ["a\0b"]}), "metadata", "/metadata", "U+0000"),
    ),
    "U+0000 in a metadata key": (
        *(asking(metadata={"a\0b": 1}), "metadata", "/metadata", "U+0000"),
    ),
    "U+0000 in a parameter": (
        *(asking(parameters={"a": "a\0b"}), "parameters", "/parameters", "U+0000"),
    ),
    "U+0000 in the negative prompt": (
        asking(negative_prompt="\0"),
        *("negative_prompt", "/negative_prompt", "U+0000"),
    ),
    "a malformed model": (asking(model="flux"), "model", "/model", "pattern"),
    "a path as model": (asking(model="../../etc"), "model", "/model", "pattern"),
    "an odd character in the model": (
        *(asking(model="a/b c"), "model", "/model", "pattern"),
    ),
    "a parameter beyond the model's range": (
        asking(parameters={"num_inference_steps": 5}),
        *("parameters.num_inference_steps", "/parameters/num_inference_steps", "4"),
    ),
    "a parameter of the wrong type": (
        asking(parameters={"go_fast": "yes"}),
        *("parameters.go_fast", "/parameters/go_fast", "true or false"),
    ),
    "an unknown parameter of the model": (
        asking(parameters={"num_inference_step": 4}),
        *("parameters.num_inference_step", "/parameters/num_inference_step"),
        "num_inference_steps",
    ),
    "a parameter that contradicts a field": (
        asking(num_outputs=2, parameters={"num_outputs": 3}),
        *("num_outputs", "/num_outputs", "contradict"),
    ),
    "an unknown field": (asking(promt="typo"), "promt", "/promt", "not a field"),
    "an unknown field with a slash": (
        *(asking(**{"a/b~c": 1}), "a/b~c", "/a~1b~0c", "not a field"),
    ),
    "no outputs": (asking(num_outputs=0), "num_outputs", "/num_outputs", "greater"),
    "99 outputs": (asking(num_outputs=99), "num_outputs", "/num_outputs", "less"),
    "more outputs than the model makes": (
        *(asking(num_outputs=5), "num_outputs", "/num_outputs", "4"),
    ),
    "several outputs of a model that makes one": (
        *(asking(model=PRO, num_outputs=2), "num_outputs", "/num_outputs", "one"),
    ),
    "a width of nothing": (asking(width=0), "width", "/width", "greater"),
    "a width nobody has": (asking(width=10**6), "width", "/width", "less"),
    "a width the model does not allow": (
        *(asking(model=PRO, width=300, height=512), "width", "/width", "32"),
    ),
    "a size of no ratio the model has": (
        *(asking(width=1000, height=999), "width", "/width", "16:9"),
    ),
    "words as width": (asking(width="wide"), "width", "/width", "integer"),
    "a fraction as width": (asking(width=1.5), "width", "/width", "integer"),
    "a ratio the model does not have": (
        *(asking(aspect_ratio="7:1"), "aspect_ratio", "/aspect_ratio", "16:9"),
    ),
    "an unknown format": (
        *(asking(output_format="bmp"), "output_format", "/output_format", "png"),
    ),
    "a format the model does not have": (
        *(asking(output_format="avif"), "output_format", "/output_format", "webp"),
    ),
    "a negative seed": (asking(seed=-1), "seed", "/seed", "greater"),
    "a huge seed": (asking(seed=10**30), "seed", "/seed", "9223372036854775807"),
    "a huge number in parameters": (
        *(asking(parameters={"seed": 10**30}), "parameters", "/parameters", "64 bits"),
    ),
    "a list as parameters": (
        *(asking(parameters=[1]), "parameters", "/parameters", "object"),
    ),
    "too many parameters": (
        asking(parameters={"style": "x" * 70_000}),
        *("parameters", "/parameters", "65536"),
    ),
    "too much metadata": (
        *(asking(metadata={"a": "x" * 16_384}), "metadata", "/metadata", "16384"),
    ),
    "a list as metadata": (
        *(asking(metadata=["a"]), "metadata", "/metadata", "object"),
    ),
    "an unknown priority": (
        *(asking(priority="urgent"), "priority", "/priority", "normal"),
    ),
    "a webhook that is no URL": (
        *(asking(webhook_url="ftp://a"), "webhook_url", "/webhook_url", "http"),
    ),
}


@pytest.mark.parametrize("case", BODIES)
async def test_a_wrong_body_is_refused_by_name(api: Api, case: str) -> None:
    body, param, pointer, word = BODIES[case]

    answer = await api.client.post("/api/v1/generate", json=body)

    assert answer.status_code == 422, answer.text
    problem = check_problem(answer)
    assert problem.code == "invalid_request"
    assert problem.retryable is False
    assert problem.error.param == param
    assert problem.errors is not None
    assert problem.errors[0].pointer == pointer
    assert word in problem.detail
    assert PROMPT not in answer.text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b'{"prompt": ', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"prompt=a+lighthouse", "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
        (b'{"prompt": "a", "metadata": ' + b'{"a":' * 5000, "not valid JSON"),
        (b'["a lighthouse"]', "object"),
        (b"null", "object"),
        (b'"a lighthouse"', "object"),
    ],
    ids=lambda value: str(value)[:24],
)
async def test_what_is_no_json_object_is_refused(
    api: Api, content: bytes, word: str
) -> None:
    answer = await api.client.post("/api/v1/generate", content=content)

    assert answer.status_code == 422, answer.text
    problem = check_problem(answer)
    assert word in problem.detail
    assert problem.error.param is None
    assert problem.errors is not None
    assert problem.errors[0].pointer == ""


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["metadata", "parameters", "width"])
async def test_numbers_json_does_not_have_are_refused(
    api: Api, number: str, field: str
) -> None:
    value = number if field == "width" else '{"a": [%s]}' % number
    content = '{"prompt": "%s", "%s": %s}' % (PROMPT, field, value)

    answer = await api.client.post("/api/v1/generate", content=content)

    assert answer.status_code == 422
    problem = check_problem(answer)
    assert problem.error.param == field


async def test_every_wrong_field_is_told_at_once(api: Api) -> None:
    body = {"prompt": "", "width": "wide", "colour": "red"}

    answer = await api.client.post("/api/v1/generate", json=body)

    problem = check_problem(answer)
    assert [one.pointer for one in problem.errors or ()] == [
        "/prompt",
        "/width",
        "/colour",
    ]


async def test_an_answer_is_never_much_larger_than_the_question(api: Api) -> None:
    body = json.dumps({f"f{number}": 1 for number in range(15_000)})

    answer = await api.client.post("/api/v1/generate", content=body)

    problem = check_problem(answer)
    assert len(problem.errors or ()) == 20
    assert len(answer.content) < 10_000


@pytest.mark.parametrize(
    "model", ["nobody/nothing", f"{FLUX}:{'0' * 64}", "ü/ü", "_/_"]
)
async def test_an_unknown_model_is_not_found(api: Api, model: str) -> None:
    answer = await api.client.post("/api/v1/generate", json=asking(model=model))

    assert answer.status_code == 404
    problem = check_problem(answer)
    assert problem.code == "model_not_found"
    assert problem.error.param == "model"
    assert problem.errors is not None
    assert problem.errors[0].pointer == "/model"


# ------------------------------------------------------------------- path and query


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("cursor=nonsense", "cursor"),
        ("cursor=", "cursor"),
        ("cursor=%C3%BC%C3%BC%C3%BC", "cursor"),
        ("cursor=" + "A" * 65, "cursor"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=many", "limit"),
        ("status=done", "status"),
        ("created_after=yesterday", "created_after"),
        ("created_before=2026-13-01T00:00:00Z", "created_before"),
        ("q=" + "x" * 201, "q"),
        ("model=" + "x" * 301, "model"),
        ("size=large", "size"),
        ("size=1024", "size"),
        ("size=0x768", "size"),
        ("size=1024x768x3", "size"),
        ("size=1024X768", "size"),
        ("size=1000000x768", "size"),
    ],
)
async def test_a_wrong_query_is_refused_by_name(
    api: Api, query: str, param: str
) -> None:
    answer = await api.client.get(f"/api/v1/jobs?{query}")

    assert answer.status_code == 400
    problem = check_problem(answer)
    assert problem.error.param == param
    assert problem.errors is not None
    assert problem.errors[0].pointer == param
    assert param in problem.detail


@pytest.mark.parametrize("wait", ["61", "-1", "soon", "nan", "inf"])
async def test_a_wrong_wait_is_refused(api: Api, wait: str) -> None:
    answer = await api.client.get(f"/api/v1/status/{uuid4()}?wait={wait}")

    assert answer.status_code == 400
    assert check_problem(answer).error.param == "wait"


JOB_ROUTES = [
    ("GET", "/status/{}"),
    ("POST", "/jobs/{}/cancel"),
    ("POST", "/jobs/{}/retry"),
    ("DELETE", "/jobs/{}"),
]


@pytest.mark.parametrize(("method", "route"), JOB_ROUTES)
async def test_what_is_no_uuid_is_refused(api: Api, method: str, route: str) -> None:
    answer = await api.client.request(method, f"/api/v1{route.format('42')}")

    assert answer.status_code == 400
    problem = check_problem(answer)
    assert problem.error.param == "job_id"
    assert [one.pointer for one in problem.errors or ()] == ["job_id"]


@pytest.mark.parametrize(("method", "route"), JOB_ROUTES)
async def test_an_unknown_job_is_not_found(api: Api, method: str, route: str) -> None:
    answer = await api.client.request(method, f"/api/v1{route.format(uuid4())}")

    assert answer.status_code == 404
    assert check_problem(answer).code == "not_found"


@pytest.mark.parametrize(
    "moment",
    [
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59-14:00",
        "1969-12-31T23:59:59Z",
    ],
)
async def test_moments_at_the_end_of_the_calendar_are_moments(
    api: Api, moment: str
) -> None:
    for name in ("created_after", "created_before"):
        answer = await api.client.get("/api/v1/jobs", params={name: moment})

        assert answer.status_code == 200


# --------------------------------------------------------------------- size and route


async def test_a_body_over_the_limit_is_refused(api: Api) -> None:
    body = json.dumps(asking(parameters={"a": "x" * BODY_LIMIT}))

    answer = await api.client.post("/api/v1/generate", content=body)

    assert answer.status_code == 413
    assert check_problem(answer).code == "body_too_large"


async def test_a_body_that_hides_its_length_is_refused_as_well(api: Api) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(BODY_LIMIT // 1024 + 1):
            yield b"x" * 1024

    answer = await api.client.post("/api/v1/generate", content=trickle())

    assert answer.status_code == 413
    problem = check_problem(answer)
    assert problem.code == "body_too_large"
    assert str(BODY_LIMIT) in problem.detail


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/api/v1/generate", "POST"),
        ("PUT", "/api/v1/jobs", "GET"),
        ("POST", f"/api/v1/status/{NOBODY}", "GET"),
        ("PUT", "/media/ab/cd.png", "GET, HEAD"),
        ("PUT", f"/api/v1/keys/{NOBODY}", "DELETE, GET, PATCH"),
    ],
)
async def test_a_wrong_method_is_told_the_right_one(
    api: Api, method: str, path: str, allowed: str
) -> None:
    answer = await api.client.request(method, path, headers={"x-request-id": "me"})

    assert answer.status_code == 405
    assert check_problem(answer).code == "method_not_allowed"
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/nothing", "/api/v1/", "/api/v2/generate"])
async def test_an_unknown_route_is_not_found(api: Api, path: str) -> None:
    answer = await api.client.get(path)

    assert answer.status_code == 404
    assert check_problem(answer).code == "not_found"
