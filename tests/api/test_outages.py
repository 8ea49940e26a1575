"""What callers meet while a part is down: a quick, clear answer, and recovery by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Literal
from urllib.parse import urlsplit

import pytest

from app.models import schemas
from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.served import Api, check_problem, working
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for_async

Outage = Literal["refused", "silent"]
PROMISE = 2.0  # seconds to an answer without the database
BUSY = 0.6  # seconds a shared machine adds to eleven requests, client and server as one
SUBMIT_PROMISE = 0.6  # seconds to an accepted job without the broker
RECOVERY = 10.0


@pytest.fixture
async def wires() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def wired(wires: AsyncExitStack, url: str) -> tuple[TcpProxy, str]:
    """Put a wire in front of a server; give it and the address that leads through it."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    wire = await wires.enter_async_context(TcpProxy(parts.hostname, parts.port))
    login = parts.netloc.rpartition("@")[0]
    netloc = f"{login}@127.0.0.1:{wire.port}" if login else f"127.0.0.1:{wire.port}"
    return wire, parts._replace(netloc=netloc).geturl()


async def cut(wire: TcpProxy, outage: Outage) -> None:
    if outage == "refused":
        await wire.refuse()
    else:
        await wire.fall_silent()


GENERATE = {"json": {"prompt": "a mill by the river"}}


@pytest.fixture
async def database_wire(
    wires: AsyncExitStack, database_url: str
) -> tuple[TcpProxy, str]:
    return await wired(wires, database_url)


@pytest.fixture
async def broker_wire(wires: AsyncExitStack, redis_url: str) -> tuple[TcpProxy, str]:
    return await wired(wires, redis_url)


# --------------------------------------------------------------------------- database


@pytest.mark.parametrize("outage", ["refused", "silent"])
@pytest.mark.parametrize("pool", ["cold", "warm"])
async def test_without_the_database_every_door_says_503_and_opens_again(
    serve: Serve,
    sandbox: Sandbox,
    database_wire: tuple[TcpProxy, str],
    outage: Outage,
    pool: str,
) -> None:
    wire, url = database_wire
    api: Api = await serve(sandbox, database_url=url)
    job_id = (await api.generate("a mill by the river")).job_id
    if pool == "warm":
        await asyncio.gather(*(api.listed() for _ in range(6)))
    else:
        await api.app.state.runtime.database.dispose()
    requests = {
        "generate": ("POST", "/api/v1/generate", GENERATE),
        "status": ("GET", f"/api/v1/status/{job_id}", {}),
        "waiting": ("GET", f"/api/v1/status/{job_id}?wait=30", {}),
        "jobs": ("GET", "/api/v1/jobs", {}),
        "cancel": ("POST", f"/api/v1/jobs/{job_id}/cancel", {}),
        "retry": ("POST", f"/api/v1/jobs/{job_id}/retry", {}),
        "delete": ("DELETE", f"/api/v1/jobs/{job_id}", {}),
        "health": ("GET", "/api/v1/health", {}),
        "ready": ("GET", "/api/v1/health/ready", {}),
        "live": ("GET", "/api/v1/health/live", {}),
        "metrics": ("GET", "/metrics", {}),
    }

    await cut(wire, outage)
    answers = dict(
        zip(
            requests,
            await asyncio.gather(
                *(
                    api.client.request(m, path, **more)
                    for m, path, more in requests.values()
                )
            ),
            strict=True,
        )
    )

    took = {name: answer.elapsed.total_seconds() for name, answer in answers.items()}
    assert max(took.values()) < PROMISE + BUSY, took
    assert answers.pop("live").status_code == 200
    assert "mgs_http_requests" in answers.pop("metrics").text
    for name in ("health", "ready"):
        answer = answers.pop(name)
        assert answer.status_code == 503
        health = schemas.Health.model_validate_json(answer.content)
        assert health.status == health.components["database"].status == "down"
        assert health.components["storage"].status == "ok"
    for name, answer in answers.items():
        assert answer.status_code == 503, name
        problem = check_problem(answer)
        assert problem.retryable
        assert problem.code == "service_unavailable"
        assert int(answer.headers["retry-after"]) >= 1

    await wire.restore()

    async def is_back() -> bool:
        answers = await asyncio.gather(
            api.client.get(f"/api/v1/status/{job_id}"),
            api.client.get("/api/v1/jobs"),
            api.client.get("/api/v1/health/ready"),
            api.client.post("/api/v1/generate", **GENERATE),
        )
        return [answer.status_code for answer in answers] == [200, 200, 200, 202]

    await wait_for_async(is_back, within=RECOVERY, what="recovery", every=0.1)
    assert (await api.job(job_id)).status in ("pending", "cancelled")


async def test_a_short_outage_is_not_noticed_by_a_submit(
    serve: Serve, sandbox: Sandbox, database_wire: tuple[TcpProxy, str]
) -> None:
    """After a restart every pooled connection is dead; a caller must not pay for that."""
    wire, url = database_wire
    api: Api = await serve(sandbox, database_url=url)
    job = await api.generate("a mill by the river")
    await asyncio.gather(*(api.listed() for _ in range(6)))

    await wire.refuse()
    await wire.restore()

    assert (await api.job(job.job_id)).status == "pending"
    await wire.refuse()
    await wire.restore()
    assert (await api.generate("another mill by the river")).status == "pending"


async def test_the_api_starts_without_a_database(
    serve: Serve, sandbox: Sandbox, database_wire: tuple[TcpProxy, str]
) -> None:
    wire, url = database_wire
    await wire.refuse()

    api: Api = await serve(sandbox, database_url=url)
    assert (await api.health())[0] == 503
    await wire.restore()

    assert (await api.generate("a mill by the river")).status == "pending"


async def test_missing_migrations_are_named(
    serve: Serve, sandbox: Sandbox, empty_database_url: str
) -> None:
    api: Api = await serve(sandbox, database_url=empty_database_url)

    answer = await api.client.get("/api/v1/health/ready")

    assert answer.status_code == 503
    health = schemas.Health.model_validate_json(answer.content)
    assert "alembic upgrade head" in (health.components["database"].detail or "")


# ----------------------------------------------------------------------------- broker


@pytest.mark.parametrize(
    ("outage", "since"), [("refused", "start"), ("silent", "later")]
)
async def test_without_the_broker_jobs_are_accepted_at_once_and_run_when_it_is_back(
    serve: Serve,
    sandbox: Sandbox,
    broker_wire: tuple[TcpProxy, str],
    outage: Outage,
    since: str,
) -> None:
    wire, url = broker_wire
    if since == "start":
        await cut(wire, outage)
    api: Api = await serve(sandbox, redis_url=url)
    # What the first job of a process needs to know about its model is asked for once.
    accepted = [await api.generate("a mill by the river")]
    if since == "later":
        await cut(wire, outage)

    for number in range(5):
        began = time.perf_counter()
        accepted.append(await api.generate(f"mill number {number} by the river"))
        assert time.perf_counter() - began < SUBMIT_PROMISE
    code, health = await api.health()
    assert (code, health.status) == (200, "degraded")
    assert health.components["broker"].status == "degraded"
    assert health.components["workers"].status == "degraded"
    assert health.components["database"].status == "ok"
    assert (await api.client.get("/api/v1/health/ready")).status_code == 200
    metrics = await api.client.get("/metrics")
    assert metrics.elapsed.total_seconds() < PROMISE
    assert "mgs_jobs{" in metrics.text

    await wire.restore()
    async with working(api.settings):
        for job in accepted:
            assert (await api.finished(job.job_id)).status == "completed"

        async def is_well() -> bool:
            return (await api.health())[1].status == "ok"

        await wait_for_async(is_well, within=RECOVERY, what="health", every=0.1)


# -------------------------------------------------------------------- the other parts


async def test_with_everything_up_health_is_ok(api: Api, worker: None) -> None:
    async def answer() -> schemas.Health | None:
        code, health = await api.health()
        assert code == 200
        return health if health.status == "ok" else None

    health = await wait_for_async(answer, within=5, what="health")

    assert health is not None
    assert set(health.components) == {
        *("database", "broker", "workers", "queue", "storage", "provider")
    }
    for name, part in health.components.items():
        assert part.status == "ok", name
        assert part.latency_ms is not None and part.latency_ms >= 0
    assert health.components["workers"].figures["seen"] == 1
    assert health.components["database"].figures["size"] >= 1
    assert health.components["broker"].figures == {"waiting_bells": 0}
    assert health.components["queue"].figures == {
        "state": "running",
        "pending": 0,
        "in_flight": 0,
        "oldest_due_seconds": 0,
    }
    ready = await api.client.get("/api/v1/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "ok")
    assert set(ready.json()["components"]) == {"database", "storage"}
    assert (await api.client.get("/api/v1/health/live")).json() == {"status": "ok"}


async def test_without_a_worker_jobs_wait(api: Api) -> None:
    await api.generate("a mill by the river")

    code, health = await api.health()

    assert (code, health.status) == (200, "degraded")
    assert health.components["workers"].status == "degraded"
    assert "no worker" in (health.components["workers"].detail or "")
    assert health.components["queue"].figures["pending"] == 1
    assert (await api.client.get("/api/v1/health/ready")).json()["status"] == "ok"


async def test_without_the_provider_jobs_are_accepted_and_wait(serve: Serve) -> None:
    api: Api = await serve()

    code, health = await api.health()
    known = await api.generate("a mill by the river")
    unknown = await api.client.post(
        "/api/v1/generate", json={"prompt": "a mill by the river", "model": "a/b"}
    )

    assert (code, health.status) == (200, "degraded")
    assert health.components["provider"].status == "degraded"
    assert known.status == "pending", "its description comes with the package"
    assert unknown.status_code == 503
    assert check_problem(unknown).retryable
    assert len(await api.listed()) == 1


async def test_a_store_that_cannot_be_written_is_down(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox)
    folder = api.settings.storage_path
    folder.rename(folder.with_name("gone"))
    folder.touch()

    for path in ("/api/v1/health", "/api/v1/health/ready"):
        answer = await api.client.get(path)
        assert answer.status_code == 503
        health = schemas.Health.model_validate_json(answer.content)
        assert health.status == health.components["storage"].status == "down"
        assert str(folder) not in answer.text
    assert (await api.client.get("/api/v1/health/live")).status_code == 200
