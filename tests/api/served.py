"""The real application behind a real socket, with every answer checked against the contract."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest import mock
from urllib.parse import quote, quote_plus, urlsplit
from uuid import UUID

import httpx
import structlog
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from app.api.connection import BoundedConnection
from app.core.config import Settings, get_settings
from app.models import (
    key_schemas,
    manifest_schemas,
    money_schemas,
    queue_schemas,
    schemas,
    webhook_schemas,
)
from app.worker_runtime import WorkerRuntime, open_worker
from sandbox.config import SandboxConfig
from sandbox.runner import Sandbox
from tests.support.endings import sure_to_end
from tests.support.servers import ROOT
from tests.support.waiting import wait_for_async

TOKEN = "r8_for_tests_only"
FLUX = "black-forest-labs/flux-schnell"
NO_DRAIN = timedelta(0)


def _load_create_app() -> Callable[[Settings], FastAPI]:
    """Import the composition root, which reads its settings when it is imported."""
    needed = {
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none",
        "REDIS_URL": "redis://127.0.0.1:9/0",
        "REPLICATE_API_TOKEN": TOKEN,
    }
    with mock.patch.dict(os.environ, needed):
        get_settings.cache_clear()
        from app.main import create_app
    get_settings.cache_clear()
    return create_app


create_app = _load_create_app()


class StrictProblem(schemas.Problem):
    """A problem document with nothing in it that is not documented."""

    model_config = ConfigDict(extra="forbid")


# What a route promises, by method, path template below the prefix, and status.
_BODIES: Mapping[tuple[str, str, int], type[BaseModel]] = {
    ("POST", "/generate", 202): schemas.Job,
    ("POST", "/generate", 200): schemas.Estimate,
    ("GET", "/status/{job_id}", 200): schemas.Job,
    ("GET", "/jobs", 200): schemas.JobPage,
    ("POST", "/jobs/{job_id}/cancel", 200): schemas.Job,
    ("POST", "/jobs/{job_id}/retry", 202): schemas.Job,
    ("GET", "/jobs/{job_id}/manifest", 200): manifest_schemas.Manifest,
    ("POST", "/jobs/cancel", 200): schemas.JobResults,
    ("POST", "/jobs/retry", 200): schemas.JobResults,
    ("POST", "/jobs/delete", 200): schemas.JobResults,
    ("GET", "/models", 200): schemas.ModelList,
    ("POST", "/keys", 201): key_schemas.NewKey,
    ("GET", "/keys", 200): key_schemas.KeyPage,
    ("GET", "/keys/{key_id}", 200): key_schemas.Key,
    ("PATCH", "/keys/{key_id}", 200): key_schemas.Key,
    ("GET", "/queue", 200): queue_schemas.QueueStatus,
    ("POST", "/queue/pause", 200): queue_schemas.QueueStatus,
    ("POST", "/queue/resume", 200): queue_schemas.QueueStatus,
    ("GET", "/audit", 200): key_schemas.AuditPage,
    ("GET", "/usage", 200): money_schemas.Usage,
    ("POST", "/uploads", 201): schemas.Upload,
    ("GET", "/uploads/{upload_id}", 200): schemas.Upload,
    ("POST", "/webhooks", 201): webhook_schemas.NewEndpoint,
    ("GET", "/webhooks", 200): webhook_schemas.EndpointPage,
    ("GET", "/webhooks/secret", 200): webhook_schemas.Secrets,
    ("GET", "/webhooks/deliveries", 200): webhook_schemas.DeliveryPage,
    ("GET", "/webhooks/deliveries/{delivery_id}", 200): webhook_schemas.Delivery,
    (
        "POST",
        "/webhooks/deliveries/{delivery_id}/redeliver",
        202,
    ): webhook_schemas.Delivery,
    ("GET", "/webhooks/{endpoint_id}", 200): webhook_schemas.Endpoint,
    ("PATCH", "/webhooks/{endpoint_id}", 200): webhook_schemas.Endpoint,
    ("GET", "/webhooks/{endpoint_id}/secret", 200): webhook_schemas.Secrets,
    ("POST", "/webhooks/{endpoint_id}/rotate", 200): webhook_schemas.NewEndpoint,
    ("POST", "/webhooks/{endpoint_id}/test", 200): webhook_schemas.Delivery,
    ("POST", "/webhooks/{endpoint_id}/test", 202): webhook_schemas.Delivery,
    ("POST", "/webhooks/{endpoint_id}/redeliver", 202): webhook_schemas.Redelivered,
    ("GET", "/health", 200): schemas.Health,
    ("GET", "/health", 503): schemas.Health,
    ("GET", "/health/ready", 200): schemas.Health,
    ("GET", "/health/ready", 503): schemas.Health,
}


# In no answer, whatever it is about: what is inside of us.
_NEVER_TOLD = ("Traceback (most", "site-packages", "sqlalchemy.", TOKEN, str(ROOT))

_DOCUMENTED: dict[str, Mapping[str, Any]] = {}


@dataclass(slots=True)
class Contract:
    """Checks every answer, and remembers what must not be found in a log."""

    app: FastAPI
    prefix: str
    said: set[str] = field(default_factory=set)

    async def listen(self, request: httpx.Request) -> None:
        """Remember what the caller wrote."""
        searched = request.url.params.get("q", "")
        for said in (searched, quote(searched), quote_plus(searched)):
            self._remember(said)
        body = request.stream
        if isinstance(body, httpx.ByteStream):
            try:
                sent = json.loads(b"".join(body))
            except (ValueError, RecursionError):
                return
            if isinstance(sent, dict):
                self._remember(sent.get("prompt"))
                self._remember(sent.get("negative_prompt"))

    def _remember(self, text: object) -> None:
        if isinstance(text, str) and len(text.strip()) > 8:
            self.said.add(text[:200])

    async def check(self, response: httpx.Response) -> None:
        """Fail for an answer that is not as documented."""
        assert response.headers.get_list("x-request-id"), response
        check_safe(response)
        path, method = response.request.url.path, response.request.method
        template = self._template(path)
        if template is not None:
            documented = self._paths()[template].get(method.lower())
            if documented is not None:
                assert str(response.status_code) in documented["responses"], (
                    f"{method} {template} answered {response.status_code}, "
                    f"which is not documented"
                )
        kind = response.headers.get("content-type", "")
        if kind == "text/event-stream":
            assert response.headers["cache-control"] == "no-store"
            assert response.headers["x-accel-buffering"] == "no"
            return  # it goes on: see tests/support/event_stream.py
        await response.aread()
        if method == "HEAD":
            assert response.content == b""
            return
        if kind.startswith(("application/", "text/plain")) and template is not None:
            told = [one for one in _NEVER_TOLD if one in response.text]
            assert not told, f"an answer tells {told}: {response.text}"
        if kind.startswith("application/problem+json"):
            if method != "HEAD":
                check_problem(response)
            return
        assert response.status_code < 400 or "/health" in path, response.text
        if template is None:
            return
        route = template.removeprefix(self.prefix)
        body = _BODIES.get((method, route, response.status_code))
        if body is not None:
            assert kind == "application/json"
            assert response.headers["cache-control"] == "no-store"
            body.model_validate_json(response.content)

    def _paths(self) -> Mapping[str, Any]:
        """Give the documented routes: the same for every API with this prefix."""
        if self.prefix not in _DOCUMENTED:
            _DOCUMENTED[self.prefix] = self.app.openapi()["paths"]
        return _DOCUMENTED[self.prefix]

    def _template(self, path: str) -> str | None:
        for template in self._paths():
            pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template))
            if re.fullmatch(pattern, path):
                return str(template)
        return None


def check_safe(response: httpx.Response) -> None:
    """Fail for an answer a browser could do something odd with."""
    headers = response.headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    # Pages tell themselves where their forms come from, and nobody else.
    assert headers["referrer-policy"] in ("no-referrer", "same-origin")
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert "cross-origin-resource-policy" in headers
    assert "permissions-policy" in headers
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["content-security-policy"].startswith("default-src 'none';")
    for name in set(headers) - {"set-cookie", "vary"}:
        assert len(headers.get_list(name)) == 1, name


_ERROR_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
}


def check_problem(response: httpx.Response) -> StrictProblem:
    """Read a problem document; every answer of this kind has all of it."""
    body = response.json()
    found = StrictProblem.model_validate(body)
    assert found.status == response.status_code
    assert found.type == f"urn:mediagen:problem:{found.code}"
    assert found.instance == response.request.url.path
    assert found.request_id == response.headers["x-request-id"]
    assert found.error.code == found.code
    assert found.error.message == found.detail
    assert set(body["error"]) == {"message", "type", "param", "code"}
    expected = "server_error" if found.status >= 500 else "invalid_request_error"
    assert found.error.type == _ERROR_TYPES.get(found.status, expected)
    assert response.headers["cache-control"] == "no-store"
    is_to_wait = found.status in (429, 503) or found.code == "idempotency_in_progress"
    assert is_to_wait == ("retry-after" in response.headers)
    if is_to_wait:
        seconds = int(response.headers["retry-after"])
        assert seconds >= 1
        exact = int(response.headers["retry-after-ms"])
        assert seconds - 1 < exact / 1000 <= seconds
    for secret in ("Traceback", "SELECT", "INSERT", "sqlalchemy", "asyncpg", TOKEN):
        assert secret not in response.text
    return found


@dataclass(frozen=True, slots=True)
class Api:
    """A running API, and the verbs tests use on it."""

    app: FastAPI
    settings: Settings
    contract: Contract
    client: httpx.AsyncClient
    origin: str

    async def generate(self, prompt: str, **fields: Any) -> schemas.Job:
        """Submit a job."""
        answer = await self.client.post(
            "/api/v1/generate", json={"prompt": prompt, **fields}
        )
        assert answer.status_code == 202, answer.text
        return schemas.Job.model_validate_json(answer.content)

    async def job(self, job_id: UUID, *, wait: float = 0) -> schemas.Job:
        """Read a job."""
        answer = await self.client.get(
            f"/api/v1/status/{job_id}", params={"wait": wait}, timeout=wait + 10
        )
        assert answer.status_code == 200, answer.text
        return schemas.Job.model_validate_json(answer.content)

    async def finished(self, job_id: UUID) -> schemas.Job:
        """Wait for the end of a job."""
        job = await self.job(job_id, wait=20)
        assert job.completed_at is not None, f"{job.status}, {job.stage}"
        return job

    async def listed(self, **params: Any) -> list[UUID]:
        """List one page of jobs."""
        answer = await self.client.get("/api/v1/jobs", params=params)
        assert answer.status_code == 200, answer.text
        page = schemas.JobPage.model_validate_json(answer.content)
        return [job.job_id for job in page.items]

    async def health(self) -> tuple[int, schemas.Health]:
        """Ask how every part is."""
        answer = await self.client.get("/api/v1/health")
        return answer.status_code, schemas.Health.model_validate_json(answer.content)


class _Server(uvicorn.Server):
    """Leaves the test runner's signals alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _logging_as_before() -> Iterator[None]:
    """Give the test runner its log handlers back: a served API takes over the root logger."""
    names = (None, "app.database")
    before = {
        name: (list(logger.handlers), logger.level)
        for name in names
        for logger in (logging.getLogger(name),)
    }
    was_configured, configuration = structlog.is_configured(), structlog.get_config()
    yield
    for name, (handlers, level) in before.items():
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(level)
    structlog.reset_defaults()
    if was_configured:
        structlog.configure(**configuration)
    structlog.contextvars.clear_contextvars()


@asynccontextmanager
async def served(
    settings: Settings, connection: type[BoundedConnection] = BoundedConnection
) -> AsyncIterator[Api]:
    """Serve the application on a free port, as `uvicorn app.main:app` would."""
    with _logging_as_before():
        serving = _served(settings, connection)
        async with sure_to_end(serving, what="an API") as api:
            yield api


@asynccontextmanager
async def _served(
    settings: Settings, connection: type[BoundedConnection]
) -> AsyncIterator[Api]:
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        port=0,
        http=connection,
        log_config=None,
        lifespan="on",
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    contract = Contract(app, settings.api_v1_prefix)

    async def is_up() -> bool:
        assert not task.done(), "the API ended at start"
        return server.started

    try:
        await wait_for_async(is_up, within=10, what="the API", every=0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        origin = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(
            base_url=origin,
            verify=False,  # nothing here speaks TLS, and reading certificates takes time
            timeout=10,
            event_hooks={"request": [contract.listen], "response": [contract.check]},
        ) as client:
            yield Api(app, settings, contract, client, origin)
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[WorkerRuntime]:
    """Run what the worker runs, in this process."""
    opened = open_worker(settings, drain=NO_DRAIN)
    async with sure_to_end(opened, what="a worker") as worker:
        yield worker


@asynccontextmanager
async def provided(**changes: Any) -> AsyncIterator[Sandbox]:
    """Run a provider whose pictures are plain and ready at once."""
    config = SandboxConfig(**{"pictures": "plain", "speed": 0.0} | changes)
    async with Sandbox(config) as sandbox:
        yield sandbox


def buying_from(sandbox: Sandbox) -> dict[str, Any]:
    """Give the settings that make this sandbox the provider."""
    return {
        "replicate_api_base_url": f"{sandbox.url}/v1",
        "output_hosts": (urlsplit(sandbox.url).netloc,),
    }
