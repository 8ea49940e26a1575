"""The API's composition root: `uvicorn app.main:app`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from app import __version__
from app.api import (
    audit,
    callbacks,
    documentation,
    endpoints,
    keys,
    media,
    ops,
    problems,
    uploads,
    usage,
)
from app.api.guard import SECURITY_SCHEMES
from app.api.middleware import Envelope
from app.api.safe_headers import RawHeaders, safe_headers
from app.core.config import Settings, get_settings
from app.core.stopping import told_by_signals
from app.core.telemetry import configure_logging
from app.models import key_schemas, schemas
from app.runtime import (
    open_runtime,
    prices_of,
    settle_memory,
    signing_keys_of,
)
from app.web import create, refusals, session
from app.web.door import prepare
from app.web.sessions import Sessions
from app.web.static_files import PREFIX, STATIC, VersionedFiles

if sys.platform != "win32":  # where the server has its fast parser
    from app.api.connection import bound_connections

log = structlog.get_logger("app.main")

REF = "#/components/schemas/{model}"
REF_PROBLEM = REF.format(model="Problem")

DESCRIPTION = """
One POST makes a picture, one GET tells how it stands.

* `POST {prefix}/generate` accepts a job: what was answered with 202 is never lost.
* `GET {prefix}/status/{{job_id}}?wait=30` answers when it is finished.
* Errors are `application/problem+json`; switch on `code`.
"""


def create_app(settings: Settings) -> FastAPI:
    """Build the API.  Its parts are opened when it starts serving, and closed after."""
    prices_of(
        settings
    )  # a wrong file is told here: the server would make a traceback of it

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging(
            "api",
            log_dir=settings.log_dir,
            log_format=settings.log_format,
            debug=settings.debug,
        )
        async with open_runtime(settings) as runtime:
            app.state.runtime = runtime
            if sys.platform != "win32":
                bound_connections()
            settle_memory()
            log.info("api.ready", version=__version__)
            with told_by_signals(runtime.stopping):
                async with runtime.gatekeeper.looking_for_admin():
                    yield
        log.info("api.stopped")

    app = FastAPIOffline(  # its files instead of a CDN; the pages are ours
        docs_url=None,
        redoc_url=None,
        static_url=documentation.FILES,
        title=settings.project_name,
        version=__version__,
        description=DESCRIPTION.format(prefix=settings.api_v1_prefix),
        lifespan=lifespan,
        debug=False,  # a traceback never leaves in an answer; DEBUG makes logs wordy
    )
    app.include_router(endpoints.router, prefix=settings.api_v1_prefix)
    app.include_router(keys.router, prefix=settings.api_v1_prefix)
    app.include_router(audit.router, prefix=settings.api_v1_prefix)
    app.include_router(usage.router, prefix=settings.api_v1_prefix)
    app.include_router(uploads.router, prefix=settings.api_v1_prefix)
    app.include_router(callbacks.router, prefix=settings.api_v1_prefix)
    app.include_router(ops.health_router, prefix=settings.api_v1_prefix)
    app.include_router(ops.probes_router, prefix=settings.api_v1_prefix)
    app.include_router(ops.metrics_router)
    app.include_router(media.router)
    app.mount(PREFIX, VersionedFiles(directory=STATIC), name="static")
    app.include_router(documentation.router)
    app.include_router(documentation.machines)
    for pages in (create, session):
        app.include_router(pages.router)
    app.state.sessions = Sessions(signing_keys_of(settings))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=[
                *("ETag", "Location", "Retry-After", "Retry-After-Ms", "X-Request-ID"),
                *("RateLimit", "RateLimit-Policy", "WWW-Authenticate"),
            ],
        )
    _wrap(app, safe_headers(settings.public_base_url))
    problems.install(app)
    refusals.install(app, prepare)
    _describe_bodies(app)
    return app


def _wrap(app: FastAPI, headers: RawHeaders) -> None:
    """Put the envelope around everything, the framework's answers to crashes included.

    What is added as a middleware sits within those.
    """
    build = app.build_middleware_stack

    def wrapped() -> ASGIApp:
        return Envelope(build(), headers)

    app.build_middleware_stack = wrapped  # type: ignore[method-assign]


def _drop_foreign_errors(document: dict[str, Any]) -> None:
    """Remove the framework's own 422: wrong parameters are answered with a 400 problem."""
    for route in document["paths"].values():
        for operation in route.values():
            answer = operation["responses"].get("422", {})
            if "application/json" in answer.get("content", {}):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _describe_limits(document: dict[str, Any]) -> None:
    """Add the refusals that any route may answer with, before it is asked."""
    problem = {"application/problem+json": {"schema": {"$ref": REF_PROBLEM}}}
    always = {"414": "The address is too long.", "431": "The headers are too large."}
    with_body = {
        "408": "The body arrived too slowly.",
        "413": "The body is too large.",
    }
    for route in document["paths"].values():
        for operation in route.values():
            texts = always | (with_body if "requestBody" in operation else {})
            for code, text in texts.items():
                described = {"description": text, "content": problem}
                operation["responses"].setdefault(code, described)


_DESCRIBED = (
    schemas.GenerateRequest,
    schemas.Problem,
    key_schemas.KeyRequest,
    key_schemas.KeyChange,
)


def _describe_bodies(app: FastAPI) -> None:
    """Put the schemas of bodies we write and parse ourselves into the OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            known = document.setdefault("components", {}).setdefault("schemas", {})
            for model in _DESCRIBED:
                schema = model.model_json_schema(ref_template=REF)
                known |= schema.pop("$defs", {})
                known[model.__name__] = schema
            document["components"]["securitySchemes"] = SECURITY_SCHEMES
            _drop_foreign_errors(document)
            _describe_limits(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


app = create_app(get_settings())
