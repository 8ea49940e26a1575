"""Many jobs in one request: cancelled, run again, deleted, downloaded."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any
from uuid import UUID, uuid4

import pytest

from app.models import schemas
from app.services.archive import MANIFEST
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON, keyed
from tests.api.served import Api, check_problem
from tests.api.two_owners import completed_job, drawing, keep
from tests.support.jobs import JobTable

PROMPT = "seven boats on a quiet lake"


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    return await emptied(shared, shared_sandbox)


async def ask(
    api: Api, verb: str, *job_ids: UUID, **options: Any
) -> list[schemas.JobResult]:
    body = {"job_ids": [str(one) for one in job_ids]}
    answer = await api.client.post(f"/api/v1/jobs/{verb}", json=body, **options)
    assert answer.status_code == 200, answer.text
    return schemas.JobResults.model_validate_json(answer.content).results


def codes(results: list[schemas.JobResult]) -> list[str | None]:
    return [one.error.code if one.error else one.outcome for one in results]


async def completed(api: Api, seed: int, **fields: Any) -> tuple[UUID, bytes]:
    """Make a completed job with a picture of its own."""
    runtime, data = api.app.state.runtime, drawing(seed)
    jobs = JobTable(runtime.database)
    return await completed_job(jobs, await keep(runtime, data), **fields), data


async def zipped(api: Api, *job_ids: UUID) -> zipfile.ZipFile:
    body = {"job_ids": [str(one) for one in job_ids]}
    answer = await api.client.post("/api/v1/jobs/download", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"].startswith("attachment; filename=")
    found = zipfile.ZipFile(io.BytesIO(answer.content))
    assert found.testzip() is None
    return found


# ------------------------------------------------------------------------------- cancel


async def test_many_are_cancelled_and_each_is_told(api: Api) -> None:
    waiting = [(await api.generate(PROMPT)).job_id for _ in range(2)]
    (done, _), nobodys = await completed(api, 1), uuid4()

    results = await ask(api, "cancel", *waiting, nobodys, done, waiting[0])

    assert [one.job_id for one in results] == [*waiting, nobodys, done]
    assert codes(results) == ["cancelled", "cancelled", "not_found", "unchanged"]
    assert (await api.job(waiting[1])).status == "cancelled"
    assert (await api.job(done)).status == "completed"


# ---------------------------------------------------------------------------- run again


async def test_many_are_run_again_and_what_forbids_one_is_told(api: Api) -> None:
    (first, _), (second, _) = await completed(api, 1), await completed(api, 2)
    live = (await api.generate(PROMPT)).job_id

    results = await ask(api, "retry", first, live, second)

    assert codes(results) == ["accepted", "conflict", "accepted"]
    made = results[0].new_job_id
    assert made is not None
    assert (await api.job(made)).retry_of == first


async def test_a_repeat_with_the_same_key_buys_nothing_twice(api: Api) -> None:
    (first, _), (second, _) = await completed(api, 1), await completed(api, 2)
    headers = {"Idempotency-Key": "again-and-again"}

    one = await ask(api, "retry", first, headers=headers)
    other = await ask(api, "retry", second, first, headers=headers)

    assert other[1].new_job_id == one[0].new_job_id
    assert other[0].new_job_id not in (None, one[0].new_job_id)
    assert len(await api.listed()) == 4


# ------------------------------------------------------------------------------- delete


async def test_many_are_deleted_with_files_nobody_else_has(api: Api) -> None:
    (first, data), (twin, _) = await completed(api, 1), await completed(api, 1)
    other, _ = await completed(api, 2)
    live = (await api.generate(PROMPT)).job_id
    paths = [(await api.job(one)).image_path for one in (first, other)]

    results = await ask(api, "delete", first, live, other, first)

    assert codes(results) == ["deleted", "conflict", "deleted"]
    assert set(await api.listed()) == {twin, live}
    statuses = [(await api.client.get(str(path))).status_code for path in paths]
    assert statuses == [200, 404]  # the twin has the first one's file


# ----------------------------------------------------------------------------- download


async def test_pictures_come_in_one_zip_with_where_they_came_from(api: Api) -> None:
    (first, one), (second, other) = await completed(api, 1), await completed(api, 2)
    unknown = uuid4()

    bundle = await zipped(api, second, first, unknown)

    names = bundle.namelist()
    manifest = json.loads(bundle.read(MANIFEST))
    assert [bundle.read(name) for name in names[:-1]] == [other, one]
    assert names[-1] == MANIFEST
    assert all(info.compress_type == zipfile.ZIP_STORED for info in bundle.infolist())
    job = await api.job(first)
    assert names[1] == f"{job.created_at:%Y-%m-%d}-painter-{first.hex[-12:]}-0.png"
    told = manifest["files"][1]
    assert (told["file"], told["job_id"], told["index"]) == (names[1], str(first), 0)
    assert (told["prompt"], told["model"]) == (job.prompt, "acme/painter")
    assert told["parameters"] == job.parameters
    assert told["sha256"] == job.outputs[0].sha256
    assert [one["job_id"] for one in manifest["missing"]] == [str(unknown)]


async def test_a_file_that_is_gone_does_not_break_the_rest(api: Api) -> None:
    (first, _), (second, data) = await completed(api, 1), await completed(api, 2)
    path = (await api.job(first)).image_path or ""
    await api.app.state.runtime.store.delete([path.removeprefix("/media/")])

    bundle = await zipped(api, first, second)

    files = json.loads(bundle.read(MANIFEST))["files"]
    assert len(bundle.namelist()) == 2
    assert bundle.read(files[1]["file"]) == data
    assert files[0]["error"] and "error" not in files[1]


async def test_there_is_no_zip_without_pictures(api: Api) -> None:
    live = (await api.generate(PROMPT)).job_id
    for job_id, status in ((live, 409), (uuid4(), 404)):
        answer = await api.client.post(
            "/api/v1/jobs/download", json={"job_ids": [str(job_id)]}
        )
        assert answer.status_code == status
        check_problem(answer)


# ------------------------------------------------------------------------- in common


@pytest.mark.parametrize("verb", ["cancel", "retry", "delete", "download"])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"job_ids": []},
        {"job_ids": ["no-uuid"]},
        {"job_ids": [str(uuid4()) for _ in range(101)]},
        {"job_ids": [str(uuid4())], "force": True},
    ],
)
async def test_a_selection_is_checked(
    api: Api, verb: str, body: dict[str, object]
) -> None:
    answer = await api.client.post(f"/api/v1/jobs/{verb}", json=body)

    assert answer.status_code == 422
    check_problem(answer)


async def test_only_ones_own_jobs_are_touched(serve: Serve, sandbox: Sandbox) -> None:
    api: Api = await serve(sandbox, **KEYS_ON)
    async with keyed(api) as people:
        mine, data = await completed(api, 1, owner="alice", is_public=False)
        theirs, _ = await completed(api, 2, owner="bob", is_public=False)
        body = {"job_ids": [str(mine), str(theirs)]}

        download = await people.alice.post("/api/v1/jobs/download", json=body)
        again = await people.alice.post("/api/v1/jobs/retry", json=body)
        deleted = await people.alice.post("/api/v1/jobs/delete", json=body)
        left = await people.admin.get("/api/v1/jobs")

    bundle = zipfile.ZipFile(io.BytesIO(download.content))
    names = bundle.namelist()
    assert [bundle.read(name) for name in names[:-1]] == [data]
    for answer, outcome in ((again, "accepted"), (deleted, "deleted")):
        found = schemas.JobResults.model_validate_json(answer.content).results
        assert codes(found) == [outcome, "not_found"]
    kept = schemas.JobPage.model_validate_json(left.content).items
    assert theirs in [job.job_id for job in kept]
