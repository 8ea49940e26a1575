"""Pausing the queue over HTTP: what operators do, and what callers see of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from app.domain.state import Status
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON, keyed
from tests.api.served import Api, check_problem, working
from tests.support.command_line import run
from tests.support.jobs import JobTable
from tests.support.waiting import wait_for_async

QUEUE = "/api/v1/queue"
WHY = {"reason": "moving the database"}
BODY = {"prompt": "a lighthouse that waits for the tide"}


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> AsyncIterator[Api]:
    """The module's API, without jobs, and running before and after."""
    api = await emptied(shared, shared_sandbox)
    yield api
    await api.client.post(f"{QUEUE}/resume")


async def read(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get(QUEUE)
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    return body


async def pause(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.post(f"{QUEUE}/pause", json=WHY)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_an_empty_queue_runs(api: Api) -> None:
    assert await read(api.client) == {
        "state": "running",
        "since": None,
        "reason": None,
        "paused_by": None,
        "pending": 0,
        "in_flight": 0,
        "oldest_pending_at": None,
    }


async def test_a_paused_queue_says_since_when_and_why(api: Api) -> None:
    paused = await pause(api.client)

    assert paused["state"] == "paused"
    assert (paused["reason"], paused["paused_by"]) == (WHY["reason"], "anybody")
    assert paused["since"] is not None
    assert await read(api.client) == paused


async def test_pausing_and_resuming_twice_change_nothing(api: Api) -> None:
    first = await pause(api.client)
    again = await api.client.post(f"{QUEUE}/pause", json={"reason": "another"})
    assert again.json() == first

    for _ in range(2):
        resumed = await api.client.post(f"{QUEUE}/resume")
        assert (resumed.status_code, resumed.json()["state"]) == (200, "running")


@pytest.mark.parametrize(
    "body", [{}, {"reason": ""}, {"reason": "a" * 201}, {"reason": "a\nb"}]
)
async def test_a_pause_needs_a_reason(api: Api, body: dict[str, str]) -> None:
    answer = await api.client.post(f"{QUEUE}/pause", json=body)

    assert answer.status_code == 422
    assert check_problem(answer).error.param == "reason"
    assert (await read(api.client))["state"] == "running"


async def test_jobs_are_accepted_while_paused_and_say_what_they_wait_for(
    api: Api,
) -> None:
    paused = await pause(api.client)
    accepted = await api.client.post("/api/v1/generate", json=BODY)
    assert accepted.status_code == 202
    job_id = accepted.json()["job_id"]
    told = await api.client.get(f"/api/v1/status/{job_id}")
    (listed,) = (await api.client.get("/api/v1/jobs")).json()["items"]

    for job in (accepted.json(), told.json(), listed):
        assert job["waiting_for"]["code"] == "paused"
        assert job["waiting_for"]["since"] == paused["since"]
        assert WHY["reason"] not in job["waiting_for"]["message"]
    found = await read(api.client)
    assert found["pending"] == 1
    assert found["oldest_pending_at"] == accepted.json()["created_at"]


async def test_after_the_pause_jobs_wait_for_nothing_and_complete(api: Api) -> None:
    await pause(api.client)
    accepted = await api.client.post("/api/v1/generate", json=BODY)
    job_id = accepted.json()["job_id"]
    async with working(api.settings):
        waited = await api.client.get(f"/api/v1/status/{job_id}", params={"wait": 2})
        assert waited.json()["status"] == "pending"
        await api.client.post(f"{QUEUE}/resume")
        told = await api.client.get(f"/api/v1/status/{job_id}")
        assert told.json()["waiting_for"] is None

        async def is_completed() -> bool:
            told = await api.client.get(f"/api/v1/status/{job_id}", params={"wait": 5})
            return bool(told.json()["status"] == "completed")

        await wait_for_async(is_completed, within=30, what="the job completes")


async def test_an_estimate_says_that_nothing_starts(api: Api) -> None:
    for is_paused in (False, True):
        if is_paused:
            await pause(api.client)
        answer = await api.client.post(
            "/api/v1/generate", params={"dry_run": True}, json=BODY
        )
        assert answer.json()["queue"]["is_paused"] is is_paused


async def test_health_is_degraded_and_metrics_tell(api: Api) -> None:
    await pause(api.client)

    health = await api.client.get("/api/v1/health")
    assert (health.status_code, health.json()["status"]) == (200, "degraded")
    queue = health.json()["components"]["queue"]
    assert queue["status"] == "degraded"
    assert queue["figures"]["state"] == "paused"
    assert WHY["reason"] in queue["detail"]
    assert (await api.client.get("/api/v1/health/ready")).json()["status"] == "ok"
    metrics = (await api.client.get("/metrics")).text
    assert "mgs_queue_paused 1.0" in metrics


async def test_only_administrators_pause_and_see_why_and_how_many(
    serve: Serve, sandbox: Sandbox
) -> None:
    api = await serve(sandbox, **KEYS_ON)
    async with keyed(api) as people:
        await pause(people.admin)
        for client, count in ((people.alice, 2), (people.bob, 1)):
            for _ in range(count):
                await client.post("/api/v1/generate", json=BODY)

        alices = await read(people.alice)
        assert (alices["state"], alices["pending"]) == ("paused", 2)
        assert (alices["reason"], alices["paused_by"]) == (None, None)
        everybodys = await read(people.admin)
        assert (everybodys["pending"], everybodys["reason"]) == (3, WHY["reason"])
        for act in ("pause", "resume"):
            refused = await people.alice.post(f"{QUEUE}/{act}", json=WHY)
            assert refused.status_code == 403
        assert (await read(people.admin))["state"] == "paused"

        await people.admin.post(f"{QUEUE}/resume")
        listed = (await people.admin.get("/api/v1/audit")).json()["items"]
        acts = [act for act in listed if act["target"] == "queue"]
        assert [act["action"] for act in acts] == ["queue.resumed", "queue.paused"]
        assert (acts[1]["actor"], acts[1]["details"]) == ("ADMIN_API_KEY", WHY)
        assert acts[0]["details"].keys() == {"paused_seconds", "jobs"}


async def test_cancelling_works_while_paused(api: Api) -> None:
    await pause(api.client)
    accepted = await api.client.post("/api/v1/generate", json=BODY)
    job_id = accepted.json()["job_id"]

    answer = await api.client.post(f"/api/v1/jobs/{job_id}/cancel")

    assert answer.json()["status"] == Status.CANCELLED
    jobs = JobTable(api.app.state.runtime.database)
    assert (await jobs.state(accepted.json()["job_id"])).attempts == 0


async def test_the_command_line_shows_pauses_and_resumes(api: Api) -> None:
    async def mediagen(*words: str) -> str:
        result = await asyncio.to_thread(run, "queue", *words, "--url", api.origin)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    await api.client.post("/api/v1/generate", json=BODY)
    assert "state running pending 1 in flight 0" in await mediagen("show")
    paused = await mediagen("pause", WHY["reason"])
    assert "state paused" in paused
    assert f"reason {WHY['reason']} paused by anybody" in paused
    assert json.loads(await mediagen("show", "--json"))["state"] == "paused"
    assert "state running" in await mediagen("resume")


async def test_the_command_line_tells_why_it_was_refused(api: Api) -> None:
    result = await asyncio.to_thread(run, "queue", "pause", "", "--url", api.origin)

    assert result.exit_code == 2
    assert "reason" in result.output
