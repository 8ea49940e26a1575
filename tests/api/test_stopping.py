"""A process that was asked to stop: what it still answers, and that it keeps nobody."""

from __future__ import annotations

import asyncio
import time

from tests.api.served import Api


async def test_who_waits_for_a_job_is_answered_at_once(api: Api) -> None:
    job = await api.generate("a slow picture, for nobody makes it")
    waiting = asyncio.create_task(api.job(job.job_id, wait=60))
    await api.job(job.job_id)
    assert not waiting.done()

    began = time.monotonic()
    api.app.state.runtime.stopping.set()
    told = await waiting

    assert time.monotonic() - began < 1
    assert (told.job_id, told.status) == (job.job_id, "pending")


async def test_who_waits_for_news_hears_that_there_are_none(api: Api) -> None:
    job = await api.generate("nothing changes")
    path = f"/api/v1/status/{job.job_id}"
    etag = (await api.client.get(path)).headers["etag"]
    api.app.state.runtime.stopping.set()
    answer = await api.client.get(
        path, params={"wait": 60}, headers={"If-None-Match": etag}
    )
    assert answer.status_code == 304


async def test_a_job_is_still_accepted_and_the_connection_closed(api: Api) -> None:
    before = await api.client.get("/api/v1/jobs")
    api.app.state.runtime.stopping.set()
    answer = await api.client.post("/api/v1/generate", json={"prompt": "the last one"})
    assert "connection" not in before.headers
    assert answer.status_code == 202
    assert answer.headers["connection"] == "close"


async def test_it_is_alive_and_not_ready(api: Api) -> None:
    assert (await api.client.get("/api/v1/health/ready")).status_code == 200
    api.app.state.runtime.stopping.set()
    ready = await api.client.get("/api/v1/health/ready")
    live = await api.client.get("/api/v1/health/live")
    assert ready.status_code == 503
    assert ready.json()["status"] == "down"
    assert ready.json()["components"]["process"]["detail"] == "stopping"
    assert live.status_code == 200
