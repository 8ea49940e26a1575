"""Manifests: how pictures came about, and how to make the same ones again."""

from __future__ import annotations

import hashlib
import io
from typing import Any
from uuid import UUID

import httpx
import pytest
from PIL import Image

from app import __version__
from app.models.manifest_schemas import Manifest
from app.services.upload_rows import Upload
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.served import Api, check_problem, working
from tests.api.two_owners import completed_job, keep
from tests.support.drawings import draw
from tests.support.jobs import JobTable, new_job

MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
OF_PICTURES = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
KONTEXT = "black-forest-labs/flux-kontext-pro"


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    """The module's API, and nothing in it."""
    return await emptied(shared, shared_sandbox)


async def read(api: Api, job_id: UUID, **headers: str) -> httpx.Response:
    return await api.client.get(f"/api/v1/jobs/{job_id}/manifest", headers=headers)


async def manifest_of(api: Api, job_id: UUID) -> dict[str, Any]:
    answer = await read(api, job_id)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def cancelled(api: Api, job_id: UUID) -> UUID:
    answer = await api.client.post(f"/api/v1/jobs/{job_id}/cancel")
    assert answer.json()["status"] == "cancelled"
    return job_id


async def test_a_manifest_tells_how_a_picture_came_about(
    serve: Serve, sandbox: Sandbox
) -> None:
    api = await serve(sandbox)
    async with working(api.settings):
        job = await api.finished(
            (await api.generate("a quiet harbour", num_outputs=2, seed=7)).job_id
        )
    answer = await read(api, job.job_id)
    found = Manifest.model_validate_json(answer.content)

    assert found.job_id == job.job_id and found.retry_of is None
    assert (found.status, found.attempts, found.seed) == ("completed", 1, 7)
    assert found.input == job.parameters
    assert (found.model, found.model_version) == (job.model, None)
    assert found.provider == job.provider and found.provider.prediction_id
    assert found.times.created_at == job.created_at
    assert found.times.completed_at == job.completed_at
    assert found.times.started_at is not None and found.times.generated_at is not None
    assert found.digital_source_type == MADE
    assert found.software.model_dump() == {"name": "mediagen", "version": __version__}
    assert [one.index for one in found.outputs] == [0, 1]
    for told, output in zip(found.outputs, job.outputs, strict=True):
        content = (await api.client.get(output.url)).content
        assert hashlib.sha256(content).hexdigest() == told.sha256 == output.sha256
        assert len(content) == told.size_bytes
        assert told.provenance == output.provenance == "marked"
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            assert MADE.encode() in picture.info["xmp"]
    again = await api.client.post(f"/api/v1/jobs/{job.job_id}/retry")
    retried = await cancelled(api, UUID(again.json()["job_id"]))
    assert (await manifest_of(api, retried))["retry_of"] == str(job.job_id)
    assert (await manifest_of(api, retried))["fingerprint"] == found.fingerprint


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_outputs": 3, "aspect_ratio": "16:9", "output_format": "jpg", "seed": 1},
        {"parameters": {"num_inference_steps": 2, "go_fast": False}},
        {"model": "bytedance/seedream-4", "num_outputs": 2, "width": 1024},
        {"model": KONTEXT, "parameters": {"safety_tolerance": 1}},
        {"model": "black-forest-labs/flux-1.1-pro", "width": 768, "height": 512},
    ],
)
async def test_what_a_manifest_asks_for_is_the_same_again(
    api: Api, asked: dict[str, Any]
) -> None:
    answer = await api.client.post(
        "/api/v1/generate", json={"prompt": "a mill – by the river"} | asked
    )
    assert answer.status_code == 202, answer.text
    first = await manifest_of(api, await cancelled(api, answer.json()["job_id"]))

    repeated = await api.client.post("/api/v1/generate", json=first["request"])

    assert repeated.status_code == 202, repeated.text
    second = await manifest_of(api, await cancelled(api, repeated.json()["job_id"]))
    assert second["fingerprint"] == first["fingerprint"]
    for name in ("input", "request", "model", "seed"):
        assert second[name] == first[name]


async def test_pictures_among_the_inputs_are_named_and_not_linked(api: Api) -> None:
    sent = await api.client.post(
        "/api/v1/uploads", content=draw(7), headers={"Content-Type": "image/png"}
    )
    uri = sent.json()["uri"]
    body = {"prompt": "at night", "model": KONTEXT, "parameters": {"input_image": uri}}
    answer = await api.client.post("/api/v1/generate", json=body)
    assert answer.status_code == 202, answer.text
    assert answer.json()["parameters"]["input_image"] != uri

    first = await manifest_of(api, await cancelled(api, answer.json()["job_id"]))
    assert first["input"]["input_image"] == uri
    assert first["digital_source_type"] == OF_PICTURES
    repeated = await api.client.post("/api/v1/generate", json=first["request"])
    second = await manifest_of(api, await cancelled(api, repeated.json()["job_id"]))
    assert second["fingerprint"] == first["fingerprint"]


async def test_a_live_job_has_none_yet(api: Api) -> None:
    job_id = (await api.generate("a mill by the river")).job_id

    answer = await read(api, job_id)

    assert (answer.status_code, check_problem(answer).code) == (409, "conflict")


async def test_a_manifest_that_is_known_is_not_sent_again(api: Api) -> None:
    job_id = await cancelled(api, (await api.generate("a mill by the river")).job_id)
    answer = await read(api, job_id)
    etag = answer.headers["etag"]

    same = await read(api, job_id, **{"If-None-Match": etag})

    assert (same.status_code, same.content) == (304, b"")
    assert same.headers["etag"] == etag
    assert answer.headers["cache-control"] == "no-store"
    status = await api.client.get(f"/api/v1/status/{job_id}")
    assert status.headers["etag"] != etag
    assert (await read(api, job_id, **{"If-None-Match": '"x"'})).status_code == 200


async def test_a_pinned_version_is_told_apart(api: Api) -> None:
    runtime = api.app.state.runtime
    file = await keep(runtime, draw(8))
    request = new_job().request
    pinned = type(request)(f"{request.model}:abc123", request.input)
    job_id = await completed_job(JobTable(runtime.database), file, request=pinned)

    found = await manifest_of(api, job_id)

    assert (found["model"], found["model_version"]) == ("acme/painter", "abc123")
    assert found["request"]["model"] == "acme/painter:abc123"
    assert found["outputs"][0]["provenance"] is None, "it was never asked"


async def test_a_picture_made_of_pictures_says_so(
    serve: Serve, sandbox: Sandbox
) -> None:
    api = await serve(sandbox)
    async with working(api.settings):
        upload: Upload = await api.app.state.runtime.uploads.take_in(
            "default", _stream(draw(9)), field="file"
        )
        body = {"input_image": f"upload:{upload.id}"}
        accepted = await api.generate("at night", model=KONTEXT, parameters=body)
        job = await api.finished(accepted.job_id)
    content = (await api.client.get(job.outputs[0].url)).content

    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        assert OF_PICTURES.encode() in picture.info["xmp"]
    kept = await api.client.get(f"/media/{upload.key}")
    assert kept.content == draw(9), "what came in stays as it came"


async def _stream(data: bytes) -> Any:
    yield data
