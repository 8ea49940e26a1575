"""Requests that are sent again make no second job: by a key, and by an SDK's own retries."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import text

from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.served import Api, check_problem, served, working
from tests.support.tcp_proxy import TcpProxy

BODY = {"prompt": "a bridge in the fog", "num_outputs": 1}


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Sandbox:
    return shared_sandbox


@pytest.fixture
async def api(shared: Api, sandbox: Sandbox) -> Api:
    return await emptied(shared, sandbox)


async def submit(
    api: Api, key: str | None = None, body: Any = None, **headers: str
) -> httpx.Response:
    if key is not None:
        headers["Idempotency-Key"] = key
    return await api.client.post("/api/v1/generate", json=body or BODY, headers=headers)


async def submit_at_last(api: Api, key: str, refusals: list[str]) -> httpx.Response:
    """Submit as a client does, that comes again while it is told to; note with what code."""
    async with asyncio.timeout(90):
        while (answer := await submit(api, key)).status_code in (409, 503):
            refusals.append(check_problem(answer).code)
            await asyncio.sleep(0.2)
    return answer


async def count_jobs(api: Api) -> int:
    async with api.app.state.runtime.ledger.reading() as conn:
        return int(await conn.scalar(text("SELECT count(*) FROM jobs")))


# ------------------------------------------------------------------------- with a key


async def test_a_repeat_gets_the_first_answer_again(api: Api) -> None:
    first = await submit(api, '"8e03978e"')

    again = await submit(api, '"8e03978e"')

    assert first.status_code == again.status_code == 202
    assert first.json() == again.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["x-mgs-deduped"] == "key"
    assert again.headers["location"] == first.headers["location"]
    assert await count_jobs(api) == 1


async def test_a_repeat_after_the_end_still_gets_the_first_answer(api: Api) -> None:
    first = await submit(api, "done")
    async with working(api.settings):
        done = await api.finished(first.json()["job_id"])
    assert done.status == "completed"

    again = await submit(api, "done")

    assert again.json() == first.json()
    assert await count_jobs(api) == 1


async def test_a_bare_key_and_a_quoted_one_are_the_same(api: Api) -> None:
    first = await submit(api, "k-1")
    again = await submit(api, '"k-1"')

    assert again.json() == first.json()


async def test_the_order_of_fields_and_spelt_out_defaults_do_not_matter(
    api: Api,
) -> None:
    await submit(api, "k")

    again = await submit(
        api, "k", {"priority": "normal", "num_outputs": 1, "prompt": BODY["prompt"]}
    )

    assert again.headers["idempotency-replayed"] == "true"


async def test_another_request_with_the_same_key_is_refused(api: Api) -> None:
    await submit(api, "k")

    other = await submit(api, "k", {"prompt": "a bridge in the sun"})

    assert other.status_code == 422
    problem = check_problem(other)
    assert problem.code == "idempotency_key_reused"
    assert problem.error.param == "Idempotency-Key"
    assert await count_jobs(api) == 1


@pytest.mark.parametrize(
    "key",
    ["", '""', '"open', "with space", '"a"b', "é", "x" * 256, '"' + "x" * 256 + '"'],
)
async def test_a_key_that_is_none_is_refused(api: Api, key: str) -> None:
    answer = await api.client.post(
        "/api/v1/generate",
        json=BODY,
        headers=[(b"Idempotency-Key", key.encode("latin-1"))],
    )

    assert answer.status_code == 400
    assert check_problem(answer).code == "invalid_idempotency_key"


async def test_two_keys_in_one_request_are_refused(api: Api) -> None:
    answer = await api.client.post(
        "/api/v1/generate",
        json=BODY,
        headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")],
    )

    assert answer.status_code == 400


async def test_50_at_once_make_one_job_in_two_processes(api: Api) -> None:
    refusals: list[str] = []
    async with served(api.settings) as other:
        answers = await asyncio.gather(
            *(
                submit_at_last((api, other)[n % 2], "at-once", refusals)
                for n in range(50)
            )
        )

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    replayed = Counter("idempotency-replayed" in a.headers for a in answers)
    # On a busy machine the first may have been told too early that there is no answer.
    was_silent = "service_unavailable" in refusals
    assert replayed[False] == 1 or was_silent and replayed[False] == 0
    assert set(refusals) <= {"idempotency_in_progress", "service_unavailable"}
    assert await count_jobs(api) == 1


async def test_while_the_first_is_being_accepted_the_next_is_told_so(api: Api) -> None:
    runtime = api.app.state.runtime
    async with runtime.database.connect() as blocker:
        # The first one waits for the table, holding its key.
        await blocker.execute(text("LOCK TABLE job_events IN ACCESS EXCLUSIVE MODE"))
        first = asyncio.create_task(submit(api, "slow"))
        await _somebody_waits_for(blocker, "job_events")

        second = await submit(api, "slow")

        assert second.status_code == 409
        assert check_problem(second).code == "idempotency_in_progress"
        assert second.headers["retry-after"] == "1"
        await blocker.rollback()
    assert (await first).status_code == 202
    assert (await submit(api, "slow")).headers["idempotency-replayed"] == "true"
    assert await count_jobs(api) == 1


async def _somebody_waits_for(conn: Any, table: str) -> None:
    query = text(
        "SELECT count(*) FROM pg_locks WHERE NOT granted"
        " AND relation = CAST(:name AS regclass)"
    )
    for _ in range(200):
        if await conn.scalar(query, {"name": table}):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


async def test_a_refused_request_leaves_its_key_free(api: Api) -> None:
    wrong = await submit(api, "k", {"prompt": "x", "parameters": {"nonsense": 1}})
    assert wrong.status_code == 422

    assert (await submit(api, "k")).status_code == 202


async def test_a_key_counts_for_a_day(api: Api) -> None:
    first = await submit(api, "old")
    async with api.app.state.runtime.database.begin() as conn:
        await conn.execute(
            text("UPDATE submissions SET created_at = created_at - interval '25 hours'")
        )

    later = await submit(api, "old", {"prompt": "another picture"})

    assert later.status_code == 202
    assert later.json()["job_id"] != first.json()["job_id"]
    assert (await submit(api, "old", {"prompt": "another picture"})).headers[
        "idempotency-replayed"
    ] == "true"


async def test_the_key_of_a_deleted_job_makes_no_new_one(api: Api) -> None:
    first = await submit(api, "gone")
    job_id = first.json()["job_id"]
    await api.client.post(f"/api/v1/jobs/{job_id}/cancel")
    assert (await api.client.delete(f"/api/v1/jobs/{job_id}")).status_code == 204

    again = await submit(api, "gone")

    assert again.status_code == 409
    assert check_problem(again).code == "idempotent_job_deleted"
    assert await count_jobs(api) == 0


async def test_a_retry_of_a_job_is_once_too(api: Api) -> None:
    job_id = (await submit(api)).json()["job_id"]
    await api.client.post(f"/api/v1/jobs/{job_id}/cancel")
    path, headers = f"/api/v1/jobs/{job_id}/retry", {"Idempotency-Key": "again"}

    first = await api.client.post(path, headers=headers)
    second = await api.client.post(path, headers=headers)

    assert first.status_code == second.status_code == 202
    assert first.json() == second.json()
    assert first.json()["retry_of"] == job_id
    assert await count_jobs(api) == 2


async def test_a_dry_run_uses_no_key_up(api: Api) -> None:
    dry = await api.client.post(
        "/api/v1/generate?dry_run=true", json=BODY, headers={"Idempotency-Key": "k"}
    )
    assert dry.status_code == 200

    assert "idempotency-replayed" not in (await submit(api, "k")).headers


# ---------------------------------------------------------------------------- by an SDK


async def sdk_call(url: str, body: Any, tries: int = 3) -> tuple[httpx.Response, int]:
    """Do as the SDKs of one family do: number the tries, and repeat a broken connection."""
    async with httpx.AsyncClient(base_url=url, verify=False, timeout=10) as client:
        for number in range(tries):
            headers = {"x-stainless-retry-count": str(number)}
            try:
                answer = await client.post(
                    "/api/v1/generate", json=body, headers=headers
                )
                return answer, number + 1
            except httpx.TransportError:
                continue
    raise AssertionError("no answer at all")


async def test_an_sdk_whose_answers_are_lost_makes_one_job_and_one_purchase(
    api: Api, sandbox: Sandbox
) -> None:
    parts = urlsplit(api.origin)
    assert parts.hostname and parts.port
    async with working(api.settings), TcpProxy(parts.hostname, parts.port) as wire:
        wire.lose_answers(2)
        answer, posts = await sdk_call(f"http://127.0.0.1:{wire.port}", BODY)
        job = await api.finished(answer.json()["job_id"])

    assert posts == 3
    assert answer.status_code == 202
    assert answer.headers["x-mgs-deduped"] == "retry"
    assert job.status == "completed"
    assert await count_jobs(api) == 1
    async with httpx.AsyncClient(base_url=sandbox.url, verify=False) as client:
        bought = await client.get(
            "/v1/predictions", headers={"Authorization": "Bearer r8_x"}
        )
    assert len(bought.json()["results"]) == 1


async def test_later_tries_at_the_same_moment_make_one_job(api: Api) -> None:
    answers = await asyncio.gather(
        *(submit(api, **{"x-stainless-retry-count": str(n)}) for n in (1, 1, 2, 2))
    )

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    assert await count_jobs(api) == 1


async def test_first_tries_are_jobs_of_their_own(api: Api) -> None:
    first = await submit(api, **{"x-stainless-retry-count": "0"})
    second = await submit(api, **{"x-stainless-retry-count": "0"})
    retried = await submit(api, **{"x-stainless-retry-count": "1"})

    assert first.json()["job_id"] != second.json()["job_id"]
    assert retried.json()["job_id"] == second.json()["job_id"]


async def test_a_retry_mark_on_another_body_joins_nothing(api: Api) -> None:
    await submit(api, **{"x-stainless-retry-count": "0"})

    other = await submit(
        api, body={"prompt": "else"}, **{"x-stainless-retry-count": "1"}
    )

    assert "x-mgs-deduped" not in other.headers
    assert await count_jobs(api) == 2


async def test_a_late_retry_is_a_new_call(api: Api) -> None:
    first = await submit(api, **{"x-stainless-retry-count": "0"})
    async with api.app.state.runtime.database.begin() as conn:
        await conn.execute(
            text("UPDATE submissions SET created_at = created_at - interval '1 hour'")
        )

    later = await submit(api, **{"x-stainless-retry-count": "1"})

    assert later.json()["job_id"] != first.json()["job_id"]


async def test_without_a_mark_equal_requests_are_jobs_of_their_own(api: Api) -> None:
    await asyncio.gather(*(submit(api) for _ in range(3)))

    assert await count_jobs(api) == 3
