"""Reading, listing, cancelling, retrying and deleting jobs."""

from __future__ import annotations

import asyncio
import itertools
import time
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.domain.generation import GenerationRequest
from app.models import schemas
from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.served import Api, check_problem
from tests.support.jobs import JobTable, new_job
from tests.support.waiting import wait_for_async


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Sandbox:
    return shared_sandbox


@pytest.fixture
async def api(shared: Api, sandbox: Sandbox) -> Api:
    return await emptied(shared, sandbox)


@pytest.fixture
def database_url(shared: Api) -> str:
    """The API's database, so that `jobs` are its jobs."""
    return shared.settings.database_url.get_secret_value()


# ------------------------------------------------------------------------------ status


async def read(api: Api, job_id: UUID, **options: Any) -> httpx.Response:
    return await api.client.get(f"/api/v1/status/{job_id}", timeout=40, **options)


async def test_the_answer_to_a_submit_is_what_status_tells(api: Api) -> None:
    answer = await api.client.post(
        "/api/v1/generate",
        json={
            "prompt": "a mill by the river",
            "negative_prompt": "people and cars",
            "metadata": {"ü": [1, 2.5, None, {"a": "✓"}]},
            "priority": "high",
        },
    )

    stored = await api.client.get(answer.headers["location"])

    assert stored.json() == answer.json()
    assert stored.headers["etag"] == answer.headers["etag"]
    assert any("negative_prompt" in text for text in stored.json()["warnings"])
    assert isinstance(stored.json()["parameters"]["seed"], int)


async def test_a_job_that_did_not_change_is_304(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    etag = (await read(api, job_id)).headers["etag"]

    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = await read(api, job_id, headers={"if-none-match": known})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
        assert answer.headers["cache-control"] == "no-store"

    await jobs.claim_one(job_id)
    answer = await read(api, job_id, headers={"if-none-match": etag})
    assert answer.status_code == 200
    assert answer.headers["etag"] != etag


async def test_two_jobs_never_share_an_etag(api: Api, jobs: JobTable) -> None:
    ids = await jobs.submit(new_job(), new_job())

    first, second = [(await read(api, job_id)).headers["etag"] for job_id in ids]

    assert first != second


async def test_waiting_ends_with_the_job(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    waiting = asyncio.create_task(read(api, job_id, params={"wait": 30}))
    await read(api, job_id)
    assert not waiting.done()

    await api.client.post(f"/api/v1/jobs/{job_id}/cancel")
    ended = time.monotonic()
    answer = await waiting

    assert answer.json()["status"] == "cancelled"
    assert time.monotonic() - ended < 1.5


async def test_waiting_goes_on_while_the_job_only_changes(
    api: Api, jobs: JobTable
) -> None:
    (job_id,) = await jobs.submit()
    known = {"if-none-match": (await read(api, job_id)).headers["etag"]}
    waiting = asyncio.create_task(read(api, job_id, params={"wait": 60}))
    watching = asyncio.create_task(
        read(api, job_id, params={"wait": 60}, headers=known)
    )
    listeners = api.app.state.runtime.live._of_jobs

    async def both_wait() -> bool:
        return len(listeners.get(job_id, ())) == 2

    await wait_for_async(both_wait, within=30, what="both wait")
    await jobs.claim_one(job_id)
    assert (await watching).json()["status"] == "processing"
    await read(api, job_id)
    assert not waiting.done()

    waiting.cancel()
    began = time.monotonic()
    answer = await read(api, job_id, params={"wait": 0.3})
    assert answer.json()["status"] == "processing"
    assert time.monotonic() - began >= 0.3


async def test_whoever_knows_the_job_waits_for_any_change(
    api: Api, jobs: JobTable
) -> None:
    (job_id,) = await jobs.submit()
    headers = {"if-none-match": (await read(api, job_id)).headers["etag"]}
    waiting = asyncio.create_task(
        read(api, job_id, params={"wait": 30}, headers=headers)
    )
    await read(api, job_id)
    assert not waiting.done()

    await api.app.state.runtime.ledger.claim([job_id], starts=1)
    changed = time.monotonic()
    answer = await waiting

    assert answer.json()["status"] == "processing"
    assert time.monotonic() - changed < 1.5


async def test_waiting_in_vain_ends_in_time(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    etag = (await read(api, job_id)).headers["etag"]
    began = time.monotonic()

    plain = await read(api, job_id, params={"wait": 0.3})
    known = await read(
        api, job_id, params={"wait": 0.3}, headers={"if-none-match": etag}
    )

    assert (plain.status_code, known.status_code) == (200, 304)
    assert 0.6 <= time.monotonic() - began < 2


async def test_a_finished_job_is_not_waited_for(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.cancel(job_id)
    etag = (await read(api, job_id)).headers["etag"]
    began = time.monotonic()

    await read(api, job_id, params={"wait": 30})
    await read(api, job_id, params={"wait": 30}, headers={"if-none-match": etag})

    assert time.monotonic() - began < 1


async def test_a_job_deleted_meanwhile_is_not_found(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    waiting = asyncio.create_task(
        api.client.get(f"/api/v1/status/{job_id}", params={"wait": 30})
    )
    await read(api, job_id)
    async with jobs.engine.begin() as conn:
        await conn.exec_driver_sql("DELETE FROM jobs")

    assert (await waiting).status_code == 404


# ---------------------------------------------------------------------------- listing


async def test_an_empty_list_is_a_list(api: Api) -> None:
    answer = await api.client.get("/api/v1/jobs")

    assert answer.json() == {"items": [], "next_cursor": None}


async def test_a_listed_job_is_the_job(api: Api, worker: None) -> None:
    done = await api.finished((await api.generate("a mill by the river")).job_id)

    answer = await api.client.get("/api/v1/jobs")

    assert schemas.JobPage.model_validate_json(answer.content).items == [done]


async def walk(api: Api, jobs: JobTable | None = None, **params: Any) -> list[UUID]:
    """Follow the cursors to the end; with `jobs`, a new job arrives before every page."""
    found: list[UUID] = []
    cursor: dict[str, str] = {}
    while True:
        answer = await api.client.get("/api/v1/jobs", params={**params, **cursor})
        assert answer.status_code == 200
        page = schemas.JobPage.model_validate_json(answer.content)
        assert 0 < len(page.items) <= params["limit"]
        found += [job.job_id for job in page.items]
        if page.next_cursor is None:
            return found
        cursor = {"cursor": page.next_cursor}
        if jobs is not None:
            await jobs.submit()


@pytest.mark.parametrize("limit", [1, 4, 5, 12, 100])
async def test_every_job_is_on_one_page(api: Api, jobs: JobTable, limit: int) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(12)))

    assert await walk(api, jobs, limit=limit) == sorted(ids, reverse=True)


async def test_a_cursor_survives_the_end_of_its_job(api: Api, jobs: JobTable) -> None:
    ids = sorted(await jobs.submit(*(new_job() for _ in range(6))), reverse=True)
    page = (await api.client.get("/api/v1/jobs", params={"limit": 3})).json()
    await jobs.cancel(ids[2])
    await api.client.delete(f"/api/v1/jobs/{ids[2]}")

    rest = await api.listed(limit=3, cursor=page["next_cursor"])

    assert rest == ids[3:]


async def test_the_last_page_says_so(api: Api, jobs: JobTable) -> None:
    await jobs.submit(*(new_job() for _ in range(4)))

    answer = await api.client.get("/api/v1/jobs", params={"limit": 4})

    assert len(answer.json()["items"]) == 4
    assert answer.json()["next_cursor"] is None


async def test_filters_narrow_alone_and_together(api: Api, jobs: JobTable) -> None:
    """Four filters on sixteen jobs, every combination against the plain definition."""
    made: list[tuple[UUID, str, str, str]] = []
    for half in range(2):
        for model, prompt, status in itertools.product(
            ("acme/painter", "acme/sketcher"),
            ("a Lighthouse at dusk", "a mill by the river"),
            ("pending", "cancelled"),
        ):
            request = GenerationRequest(model, {"prompt": prompt, "n": len(made)})
            (job_id,) = await jobs.submit(new_job(request=request, prompt=prompt))
            if status == "cancelled":
                await jobs.cancel(job_id)
            made.append((job_id, model, prompt, status))
    times = {one[0]: (await api.job(one[0])).created_at for one in made}
    middle = times[made[8][0]]

    for model, text, status, side in itertools.product(
        (None, "acme/painter", "acme/paint"),
        (None, "lightHOUSE", "mill by"),
        (None, "pending", "cancelled", "completed"),
        (None, "created_after", "created_before"),
    ):
        params: dict[str, Any] = {"model": model, "q": text, "status": status}
        if side is not None:
            params[side] = middle.isoformat()
        expected = [
            job_id
            for job_id, its_model, its_prompt, its_status in made
            if (model is None or its_model == model)
            and (text is None or text.lower() in its_prompt.lower())
            and (status is None or its_status == status)
            and (side != "created_after" or times[job_id] >= middle)
            and (side != "created_before" or times[job_id] < middle)
        ]
        given = {name: value for name, value in params.items() if value is not None}
        found = await api.listed(limit=100, **given)
        assert found == sorted(expected, reverse=True), given


async def test_a_filter_holds_over_all_pages(api: Api, jobs: JobTable) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(10)))
    for job_id in ids[::2]:
        await jobs.cancel(job_id)

    found = await walk(api, jobs, limit=2, status="cancelled")

    assert found == sorted(ids[::2], reverse=True)


async def test_created_after_is_inclusive_and_created_before_is_not(
    api: Api, jobs: JobTable
) -> None:
    ids = [(await jobs.submit())[0] for _ in range(3)]
    moment = (await api.job(ids[1])).created_at

    assert await api.listed(created_after=moment.isoformat()) == [ids[2], ids[1]]
    assert await api.listed(created_before=moment.isoformat()) == [ids[0]]
    elsewhere = moment.isoformat().replace("+00:00", "")
    assert await api.listed(created_before=elsewhere) == [ids[0]], "no zone is UTC"
    later = (moment + timedelta(microseconds=1)).isoformat()
    assert await api.listed(created_after=later) == [ids[2]]


@pytest.mark.parametrize(
    ("text", "prompt", "lookalike"),
    [
        ("0% w", "100% wool socks", "100 or wool socks"),
        ("e_c", "a snake_case sign", "a snakeXcase sign"),
        ("k\\s", "a back\\slash sign", "a backslash sign"),
        ("/_%", "paths /_% everywhere", "paths /x everywhere"),
        ("日本", "日本の庭園、雨の日", "Japan: a garden in rain"),
    ],
)
async def test_search_is_literal(
    api: Api, jobs: JobTable, text: str, prompt: str, lookalike: str
) -> None:
    (wanted,) = await jobs.submit(new_job(prompt=prompt))
    await jobs.submit(new_job(prompt=lookalike))

    assert await api.listed(q=text) == [wanted]


async def test_a_search_wants_every_word_and_phrases_as_they_stand(
    api: Api, jobs: JobTable
) -> None:
    one, other = await jobs.submit(
        new_job(prompt="Oil on canvas: a lighthouse"),
        new_job(prompt="a canvas bag on the lighthouse's oily floor"),
    )

    assert await api.listed(q="canvas oil LIGHT") == [other, one]
    assert await api.listed(q='"oil on canvas"') == [one]
    assert await api.listed(q="canvas sea") == []


async def test_jobs_are_found_by_the_size_of_their_pictures(
    api: Api, worker: None
) -> None:
    wide = await api.generate("a mill by the river", aspect_ratio="16:9")
    high = await api.generate("a mill by the river", aspect_ratio="9:16", num_outputs=2)
    first, second = [await api.finished(job.job_id) for job in (wide, high)]
    sizes = [
        f"{one.outputs[0].width}x{one.outputs[0].height}" for one in (first, second)
    ]

    assert await api.listed(size=sizes[0]) == [wide.job_id]
    assert await api.listed(size=sizes[1], q="mill") == [high.job_id]
    assert await api.listed(size=sizes[1], q="lake") == []
    assert await api.listed(size="7x7") == []


async def test_a_search_for_what_cannot_be_stored_finds_nothing(
    api: Api, jobs: JobTable
) -> None:
    await jobs.submit()

    assert await api.listed(q="\0") == []
    assert await api.listed(model="a\0b") == []


# ----------------------------------------------------------------------------- cancel


async def cancel(api: Api, job_id: UUID) -> schemas.Job:
    answer = await api.client.post(f"/api/v1/jobs/{job_id}/cancel")
    assert answer.status_code == 200
    assert answer.headers["etag"]
    return schemas.Job.model_validate_json(answer.content)


async def test_a_waiting_job_is_cancelled_at_once(api: Api) -> None:
    accepted = await api.generate("a mill by the river")

    job = await cancel(api, accepted.job_id)

    assert (job.status, job.stage, job.attempts) == ("cancelled", None, 0)
    assert job.completed_at is not None
    assert job == await api.job(accepted.job_id)


async def test_a_finished_job_stays_as_it_is(api: Api, worker: None) -> None:
    done = await api.finished((await api.generate("a mill by the river")).job_id)

    assert await cancel(api, done.job_id) == done
    assert await cancel(api, done.job_id) == done


async def test_cancelling_twice_is_cancelling_once(api: Api) -> None:
    accepted = await api.generate("a mill by the river")

    first, second = await asyncio.gather(
        cancel(api, accepted.job_id), cancel(api, accepted.job_id)
    )

    assert first == second


async def stats(sandbox: Sandbox) -> dict[str, Any]:
    async with httpx.AsyncClient(verify=False) as client:
        found = await client.get(f"{sandbox.url}/sandbox/stats")
    return dict(found.json())


async def test_a_job_under_way_is_cancelled_at_the_provider(
    api: Api, sandbox: Sandbox, worker: None
) -> None:
    async with httpx.AsyncClient(verify=False) as client:
        await client.put(
            f"{sandbox.url}/sandbox/faults",
            json=[{"fault": "prediction.stuck_processing"}],
        )
    job_id = (await api.generate("a mill by the river")).job_id

    async def is_generating() -> bool:
        return (await api.job(job_id)).stage == "generating"

    await wait_for_async(is_generating, within=10, what="generating")
    asked = await cancel(api, job_id)
    assert asked.status in ("processing", "cancelled")
    done = await api.finished(job_id)

    assert (done.status, done.error, done.outputs) == ("cancelled", None, [])
    found = await stats(sandbox)
    assert found["by_status"] == {"canceled": 1}


# ------------------------------------------------------------------------------ retry


async def test_a_live_job_is_not_retried(api: Api, jobs: JobTable) -> None:
    waiting, working = await jobs.submit(new_job(), new_job())
    await jobs.claim_one(working)

    for job_id, word in ((waiting, "pending"), (working, "processing")):
        answer = await api.client.post(f"/api/v1/jobs/{job_id}/retry")
        assert answer.status_code == 409
        problem = check_problem(answer)
        assert (problem.code, problem.error.param) == ("conflict", None)
        assert word in problem.detail and "cancel" in problem.detail
    assert len(await api.listed()) == 2


async def test_a_retry_is_a_new_job_with_the_same_input(api: Api, worker: None) -> None:
    accepted = await api.generate(
        "a mill by the river",
        num_outputs=2,
        output_format="png",
        metadata={"campaign": "winter"},
        priority="high",
    )
    old = await api.finished(accepted.job_id)

    answer = await api.client.post(f"/api/v1/jobs/{old.job_id}/retry")

    assert answer.status_code == 202
    new = schemas.Job.model_validate_json(answer.content)
    assert answer.headers["location"] == f"/api/v1/status/{new.job_id}"
    assert new.job_id != old.job_id
    assert new.retry_of == old.job_id
    same = ("parameters", "prompt", "model", "num_outputs", "metadata")
    for name in same:
        assert getattr(new, name) == getattr(old, name)
    assert "seed" in new.parameters
    done = await api.finished(new.job_id)
    assert done.status == "completed"
    assert [one.sha256 for one in done.outputs] == [one.sha256 for one in old.outputs]
    assert without_colours(await api.job(old.job_id)) == without_colours(old)


def without_colours(job: schemas.Job) -> schemas.Job:
    """Leave out what is told of pictures some time after the end."""
    outputs = [one.model_copy(update={"colour": None}) for one in job.outputs]
    return job.model_copy(update={"outputs": outputs})


async def test_a_retry_may_be_retried(api: Api) -> None:
    job_id = (await api.generate("a mill by the river")).job_id
    for _ in range(2):
        await cancel(api, job_id)
        answer = await api.client.post(f"/api/v1/jobs/{job_id}/retry")
        assert answer.json()["retry_of"] == str(job_id)
        job_id = UUID(answer.json()["job_id"])


# ----------------------------------------------------------------------------- delete


async def test_a_live_job_is_not_deleted(api: Api) -> None:
    job_id = (await api.generate("a mill by the river")).job_id

    answer = await api.client.delete(f"/api/v1/jobs/{job_id}")

    assert answer.status_code == 409
    assert "cancel" in check_problem(answer).detail
    assert (await api.job(job_id)).status == "pending"


async def test_a_deleted_job_is_gone(api: Api) -> None:
    job_id = (await api.generate("a mill by the river")).job_id
    await cancel(api, job_id)

    answer = await api.client.delete(f"/api/v1/jobs/{job_id}")

    assert (answer.status_code, answer.content) == (204, b"")
    assert (await read(api, job_id)).status_code == 404
    again = await api.client.delete(f"/api/v1/jobs/{job_id}")
    assert again.status_code == 404
    assert await api.listed() == []


async def test_a_file_stays_until_its_last_job_is_deleted(
    api: Api, worker: None
) -> None:
    accepted = [await api.generate("a mill by the river", seed=7) for _ in range(2)]
    first, second = [await api.finished(job.job_id) for job in accepted]
    assert first.image_path is not None
    assert first.image_path == second.image_path

    await api.client.delete(f"/api/v1/jobs/{first.job_id}")
    assert (await api.client.get(first.image_path)).status_code == 200
    await api.client.delete(f"/api/v1/jobs/{second.job_id}")
    assert (await api.client.get(first.image_path)).status_code == 404


async def test_a_retry_outlives_the_job_it_repeats(api: Api) -> None:
    old = (await api.generate("a mill by the river")).job_id
    await cancel(api, old)
    new = (await api.client.post(f"/api/v1/jobs/{old}/retry")).json()["job_id"]

    answer = await api.client.delete(f"/api/v1/jobs/{old}")

    assert answer.status_code == 204
    assert (await api.job(UUID(new))).status == "pending"


# ----------------------------------------------------------------------------- models


async def test_every_listed_model_takes_a_job(api: Api) -> None:
    found = schemas.ModelList.model_validate_json(
        (await api.client.get("/api/v1/models")).content
    )

    names = [model.name for model in found.items]
    assert found.default in names
    assert len(names) > 10
    for model in found.items:
        assert "prompt" in model.input_schema["properties"]
        assert model.price_per_output_usd is None, "a sandbox has no prices"
        job = await api.generate("a mill by the river", model=model.name)
        assert job.model == model.name
        assert job.parameters["prompt"] == "a mill by the river"


async def test_an_id_of_nobody_is_not_found(api: Api) -> None:
    answer = await read(api, uuid4())

    assert answer.status_code == 404
    assert check_problem(answer).retryable is False


async def test_a_retry_tells_the_same_webhook(api: Api, jobs: JobTable) -> None:
    fields = {"webhook_url": "https://example.com/hook"}
    job = await api.generate("a mill by the river", **fields)
    await api.client.post(f"/api/v1/jobs/{job.job_id}/cancel")

    again = await api.client.post(f"/api/v1/jobs/{job.job_id}/retry")

    assert again.json()["warnings"] == job.warnings == []
    assert (await jobs.row(again.json()["job_id"])).webhook_url == fields["webhook_url"]
