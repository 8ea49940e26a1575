"""The sandbox as a web application."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Callable

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from sandbox import account, answers, control, create, downloads, reading, uploads
from sandbox.catalogue import Catalogue
from sandbox.config import SandboxConfig
from sandbox.control import COURIER
from sandbox.create import BOOK, CATALOGUE, FAULTS
from sandbox.faults import FaultBoard
from sandbox.gallery import GALLERY, Gallery
from sandbox.limits import TokenBucket
from sandbox.prediction import Event, Prediction
from sandbox.predictions import PredictionBook
from sandbox.uploads import SHELF, UploadShelf
from sandbox.webhooks import Courier

#: Room for an upload and its multipart dress.
LARGEST_BODY = uploads.LARGEST_FILE + 1024 * 1024


def create_app(config: SandboxConfig | None = None) -> web.Application:
    """Build a sandbox; nothing runs until the application is started."""
    config = config or SandboxConfig()
    app = web.Application(
        middlewares=[_problems, _guard(config), _limit(config)],
        client_max_size=LARGEST_BODY,
    )
    app[answers.CONFIG] = config
    app[CATALOGUE] = Catalogue.bundled()
    app[FAULTS] = FaultBoard()
    app[GALLERY] = Gallery(config)
    app[SHELF] = UploadShelf(config)
    app[COURIER] = Courier(config.webhook_secret, config.webhook_window, app[FAULTS])
    app[BOOK] = PredictionBook(
        config, clock=time.time, announce=_announcer(app[COURIER])
    )
    for part in (create, reading, account, uploads, downloads, control):
        app.add_routes(part.routes)
    app.cleanup_ctx.append(_life)
    return app


async def _life(app: web.Application) -> AsyncIterator[None]:
    await app[COURIER].open()
    yield
    app[BOOK].close()
    await app[COURIER].close()
    app[GALLERY].close()


def _announcer(courier: Courier) -> Callable[[Prediction, Event, float], None]:
    """Return what turns an event into a webhook when somebody asked for it."""

    def announce(prediction: Prediction, event: Event, moment: float) -> None:
        if prediction.webhook is None or event not in prediction.events:
            return
        body = prediction.as_json(prediction.base_url, moment)
        courier.post(prediction, event, orjson.dumps(body))

    return announce


@web.middleware
async def _problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer unknown routes and methods in the provider's form."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return answers.not_found()
    except web.HTTPMethodNotAllowed as exc:
        text = f'Method "{request.method}" not allowed.'
        return answers.problem(405, text, headers={"Allow": exc.headers["Allow"]})
    except web.HTTPRequestEntityTooLarge:
        return answers.problem(413, "The request body is too large")


def _guard(config: SandboxConfig) -> Middleware:
    """Return a middleware that refuses /v1 without a valid token."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith("/v1/"):
            return await handler(request)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        token = token.strip()
        known = scheme.lower() in ("bearer", "token") and bool(token)
        if known and config.token is not None:
            known = hmac.compare_digest(token.encode(), config.token.encode())
        return await handler(request) if known else answers.unauthenticated()

    return guard


def _limit(config: SandboxConfig) -> Middleware:
    """Return a middleware that keeps the two rate limits of /v1."""

    def bucket(per_minute: int, burst: int | None) -> TokenBucket | None:
        if not per_minute:
            return None
        return TokenBucket(per_minute, burst=burst, clock=time.monotonic)

    creates = bucket(config.creates_per_minute, config.burst)
    others = bucket(config.requests_per_minute, None)

    @web.middleware
    async def limit(request: web.Request, handler: Handler) -> web.StreamResponse:
        path = request.path
        if not path.startswith("/v1/"):
            return await handler(request)
        is_create = request.method == "POST" and path.endswith("/predictions")
        chosen = creates if is_create else others
        if chosen is None:
            return await handler(request)
        allowance = chosen.take()
        if allowance.retry_after is not None:
            return answers.throttled(allowance.retry_after, allowance.headers())
        response = await handler(request)
        if not response.prepared:
            response.headers.update(allowance.headers())
        return response

    return limit
