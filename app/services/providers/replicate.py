"""Buys from Replicate over its HTTP API, without a vendor SDK.

The official clients repeat lost creates (measured: one lost answer became 3 and 6 paid
predictions) and send the token to download hosts; here a create is one POST and no more, and
its outcome is a value.  Sources of facts: replicate.com/docs/reference/http (2026-06) and
api.replicate.com/openapi.json (2026-03) unless said otherwise.

What aiohttp 3.14 does below us: it sends a request again on a dead pooled connection only
for idempotent methods (`IDEMPOTENT_METHODS` in aiohttp/client.py), never a POST.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Protocol

import aiohttp
import orjson
from yarl import URL

from app.domain.errors import (
    InvalidRequest,
    ModelNotFound,
    PredictionNotFound,
    ProviderThrottled,
    ProviderUnavailable,
)
from app.domain.generation import (
    CreateOutcome,
    Failure,
    GenerationRequest,
    InputFile,
    ModelDescription,
    Prediction,
    ProvidedFile,
    Refused,
    RefusalKind,
    Started,
    Unknown,
)
from app.services.providers import replicate_wire as wire
from app.services.providers.replicate_errors import (
    ACCOUNT_MESSAGE,
    UNREACHABLE,
    classify_refusal,
    read_retry_after,
)
from app.services.providers.replicate_files import upload_body, parse_file
from app.services.providers.transport import Downloader, OnRequest, ignore_request

_LARGEST_ANSWER = 64 * 1024 * 1024  # bytes; a page of 100 rows is some 100 kB

# "minimum 5 s" [openapi.json], "maximum 24 h" [docs/topics/predictions/create-a-prediction]
_SHORTEST_LIFE, _LONGEST_LIFE = 5, 86_400

_MODEL = re.compile(
    r"(?P<owner>[\w-][\w.-]*)/(?P<name>[\w-][\w.-]*)(:(?P<version>[\w-]+))?", re.ASCII
)

# These 4xx do not say that the request was refused, only that talking went wrong.
_NO_ANSWER = (408, 425)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long an API call may take: to connect, to get a connection at all, and in all.

    `upload` is how long one that carries a file may take in all.
    """

    connect: timedelta = timedelta(seconds=5)
    pool: timedelta = timedelta(seconds=10)
    total: timedelta = timedelta(seconds=30)
    upload: timedelta = timedelta(seconds=60)


class RequestGate(Protocol):
    """Who may ask the provider for something, and when."""

    async def admit(self, operation: str) -> None:
        """Return when a request other than a create may leave, or raise ProviderThrottled."""
        ...

    async def throttled(self, operation: str, retry_after: timedelta | None) -> None:
        """Learn that the provider answered 429 (or 409) to the operation."""
        ...


class OpenGate:
    """Let everything through: for a single user of an account, and for tests."""

    async def admit(self, operation: str) -> None:
        """Admit at once."""

    async def throttled(self, operation: str, retry_after: timedelta | None) -> None:
        """Take no notice."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """A complete HTTP answer; `body` is None when it did not arrive whole."""

    status: int
    body: bytes | None
    retry_after: str | None

    @property
    def json(self) -> dict[str, Any] | None:
        return wire.parse_object(self.body) if self.body is not None else None


class ReplicateClient:
    """A `MediaClient` for Replicate.  Opens its connections on first use, in that loop."""

    name = "replicate"

    def __init__(
        self,
        *,
        base_url: str,
        token: str,
        downloader: Downloader,
        max_connections: int = 100,
        user_agent: str = "media-generation-service",
        on_request: OnRequest = ignore_request,
        gate: RequestGate | None = None,
        timeouts: Timeouts = Timeouts(),
    ) -> None:
        """Take `downloader` over: it is closed with the client."""
        self._base = URL(base_url.rstrip("/"))
        self._token = token
        self._downloader = downloader
        self._max_connections = max_connections
        self._user_agent = user_agent
        self._on_request = on_request
        self._gate = gate or OpenGate()
        self._timeouts = timeouts
        self._opened: aiohttp.ClientSession | None = None
        self._closed = False
        self._pinned: dict[str, str] = {}  # community models, by their plain names

    async def create(
        self,
        request: GenerationRequest,
        *,
        cancel_after: timedelta,
        webhook: str | None = None,
    ) -> CreateOutcome:
        """Buy once.

        `POST /predictions` takes official models (`owner/name`) and versions
        (`owner/name:version`) alike in `version`, but refuses community models by their
        name alone; nothing tells which is which beforehand.  So a refused plain name is
        sent once more with its latest version: a refusal created nothing.  There is no
        idempotency key: nothing else is ever sent twice, only what surely happened before
        a byte left is `Refused`, and every doubt is `Unknown`.
        """
        version = self._pinned.get(request.model, request.model)
        outcome = await self._post(version, request, cancel_after, webhook)
        if not _is_nameless(outcome) or ":" in request.model:
            return outcome
        pinned = await self._pin(request.model)
        if pinned is None or pinned == version:
            return outcome
        self._pinned[request.model] = pinned
        return await self._post(pinned, request, cancel_after, webhook)

    async def _pin(self, model: str) -> str | None:
        """Name the latest version of a model; None when that cannot be found out."""
        try:
            described = await self.describe(model)
        except (ModelNotFound, ProviderUnavailable):
            return None
        if described.version is None:
            return None
        return f"{model}:{described.version}"

    async def _post(
        self,
        version: str,
        request: GenerationRequest,
        cancel_after: timedelta,
        webhook: str | None,
    ) -> CreateOutcome:
        """Send one request to buy, exactly once, or none."""
        body: dict[str, object] = {"version": version, "input": request.input}
        if webhook is not None:
            body |= {
                "webhook": webhook,
                "webhook_events_filter": ["start", "completed"],
            }
        try:
            data = orjson.dumps(body)
        except TypeError as exc:
            message = f"the input cannot be written as JSON: {exc}"
            return Refused(
                RefusalKind.PERMANENT, Failure("invalid_input", message, False)
            )
        life = math.ceil(cancel_after.total_seconds())
        life = min(max(life, _SHORTEST_LIFE), _LONGEST_LIFE)
        headers = {"Content-Type": "application/json", "Cancel-After": f"{life}s"}
        try:
            answer = await self._send(
                "create", "POST", self._url("predictions"), headers=headers, data=data
            )
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError):
            # Name look-up, TCP or TLS failed: no byte of the request was sent.
            return Refused(RefusalKind.UNREACHABLE, UNREACHABLE)
        except (aiohttp.ClientError, OSError) as exc:
            # OSError includes TimeoutError.
            return Unknown(f"no answer: {type(exc).__name__}")
        except ProviderUnavailable:
            return Refused(RefusalKind.UNREACHABLE, UNREACHABLE)  # closed: nothing left
        outcome = _create_outcome(answer)
        if isinstance(outcome, Refused) and outcome.kind is RefusalKind.THROTTLED:
            await self._gate.throttled("create", outcome.retry_after)
        return outcome

    async def get(self, handle: str) -> Prediction:
        """Read one prediction.  Raise `PredictionNotFound` for an unknown handle."""
        _check_handle(handle)
        answer = await self._ask("get", self._url("predictions", handle))
        if answer.status == 404:
            raise PredictionNotFound("the provider does not know this prediction")
        prediction = wire.parse_prediction(_object(answer))
        if prediction is None:
            raise ProviderUnavailable("the provider's answer was not a prediction")
        return prediction

    async def list_since(
        self, created_after: datetime
    ) -> AsyncIterator[list[Prediction]]:
        """Walk the account's predictions made at or after the moment, newest first.

        100 a page.  Follows `next` verbatim, but only on the API's own origin.  Whether the
        cursor keeps the filter is not documented, so older rows end the walk here as well.
        """
        moment = created_after.astimezone(timezone.utc)
        text = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
        url = self._url("predictions").with_query(created_after=text)
        seen: set[str] = set()
        while True:
            seen.add(str(url))
            page = wire.parse_page(_object(await self._ask("list", url)))
            if page is None:
                raise ProviderUnavailable("the provider's answer was not a list")
            recent = [p for p in page.predictions if not _is_older(p, moment)]
            if recent:
                yield recent
            has_old = len(recent) < len(page.predictions)
            if has_old or page.next_url is None or page.next_url in seen:
                return
            url = self._own_url(page.next_url)

    async def cancel(self, handle: str) -> None:
        """Ask for the end of a prediction.  Harmless when it is over already.

        A finished prediction is answered unchanged (client documentation, unverified for
        2026); should the API refuse instead, that is no error either.
        """
        _check_handle(handle)
        url = self._url("predictions", handle, "cancel")
        answer = await self._ask("cancel", url, method="POST", harmless=(422,))
        if answer.status == 404:
            raise PredictionNotFound("the provider does not know this prediction")

    async def describe(self, model: str) -> ModelDescription:
        """Describe `owner/name` or `owner/name:version`.  Raise `ModelNotFound`."""
        match = _MODEL.fullmatch(model)
        if match is None:
            raise ModelNotFound("a model is named owner/name or owner/name:version")
        path = ["models", match["owner"], match["name"]]
        if match["version"] is not None:
            path += ["versions", match["version"]]
        answer = await self._ask("describe", self._url(*path))
        if answer.status == 404:
            raise ModelNotFound(f"the provider has no model {model}")
        name, found = f"{match['owner']}/{match['name']}", _object(answer)
        if match["version"] is not None:
            return wire.describe_version(name, found)
        return wire.describe_model(name, found)

    async def webhook_secret(self) -> str:
        """Fetch the account's signing secret (`whsec_…`).  Safe to repeat; cache it."""
        answer = await self._ask(
            "webhook_secret", self._url("webhooks", "default", "secret")
        )
        key = _object(answer).get("key")
        if not isinstance(key, str) or not key:
            raise ProviderUnavailable("the provider's answer had no webhook secret")
        return key

    async def ping(self) -> None:
        """Return when the provider answers an authenticated read."""
        _object(await self._ask("ping", self._url("account")))

    async def upload(self, file: InputFile) -> ProvidedFile:
        """Put a file where models of the provider can read it, for a day as a rule.

        Tried twice: a file nobody uses costs nothing and goes away by itself.
        """
        try:
            return await self._upload(file)
        except ProviderThrottled:
            raise
        except ProviderUnavailable:
            return await self._upload(file)

    async def _upload(self, file: InputFile) -> ProvidedFile:
        body = upload_body(file)
        answer = await self._ask(
            "upload",
            self._url("files"),
            method="POST",
            harmless=(413,),
            headers=body.headers,
            data=body.write(),
            within=self._timeouts.upload,
        )
        if answer.status == 413:
            raise InvalidRequest("The picture is too large for the provider.")
        return parse_file(_object(answer))

    def download(self, url: str) -> AsyncIterator[bytes]:
        """Stream one output file.  Raise `OutputError`s; never sends our token along."""
        return self._downloader.download(url)

    async def aclose(self) -> None:
        """Close all connections; later calls fail as if the provider were unreachable."""
        self._closed = True
        if self._opened is not None:
            await self._opened.close()
        await self._downloader.aclose()

    async def _ask(
        self,
        operation: str,
        url: URL,
        *,
        method: str = "GET",
        harmless: tuple[int, ...] = (),
        headers: Mapping[str, str] | None = None,
        data: AsyncIterator[bytes] | None = None,
        within: timedelta | None = None,
    ) -> _Answer:
        """Ask once; return 2xx, 404 and `harmless` answers, raise for all others."""
        await self._gate.admit(operation)
        try:
            answer = await self._send(
                operation, method, url, headers=headers, data=data, within=within
            )
        except (aiohttp.ClientError, OSError) as exc:
            raise ProviderUnavailable(
                f"the provider did not answer: {type(exc).__name__}"
            ) from exc
        status = answer.status
        if 200 <= status < 300 or status == 404 or status in harmless:
            return answer
        if status in (409, 429):
            wait = read_retry_after(answer.retry_after, answer.json)
            await self._gate.throttled(operation, wait)
            raise ProviderThrottled(
                "the provider asks us to slow down", retry_after=wait
            )
        if status in (401, 402, 403):
            raise ProviderUnavailable(ACCOUNT_MESSAGE)
        raise ProviderUnavailable(f"the provider answered {status}")

    async def _send(
        self,
        operation: str,
        method: str,
        url: URL,
        *,
        headers: Mapping[str, str] | None = None,
        data: bytes | AsyncIterator[bytes] | None = None,
        within: timedelta | None = None,
    ) -> _Answer:
        """Send one request with the token and read the answer; follow no redirect."""
        limit = within or self._timeouts.total
        own = {"Authorization": f"Bearer {self._token}", **(headers or {})}
        started, code = time.perf_counter(), "CancelledError"
        try:
            response = await self._session().request(
                method,
                url,
                headers=own,
                data=data,
                allow_redirects=False,
                timeout=self._patience(limit),
            )
            code = str(response.status)
            try:
                body = await _read_whole(response)
            except (aiohttp.ClientError, OSError) as exc:
                # The status did arrive, and may say enough.
                body, code = None, type(exc).__name__
            finally:
                # Not `async with`: leaving that waits for the upload and may raise, which
                # would lose an answer already read.  A whole answer is in the pool already.
                response.close()
            return _Answer(response.status, body, response.headers.get("Retry-After"))
        except (aiohttp.ClientError, OSError) as exc:
            code = type(exc).__name__
            raise
        finally:
            self._on_request(operation, code, time.perf_counter() - started)

    def _session(self) -> aiohttp.ClientSession:
        if self._closed:
            raise ProviderUnavailable("the provider client is closed")
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": self._user_agent},
            )
        return self._opened

    def _patience(self, total: timedelta) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(
            total=total.total_seconds(),
            connect=self._timeouts.pool.total_seconds(),
            sock_connect=self._timeouts.connect.total_seconds(),
        )

    def _url(self, *segments: str) -> URL:
        """Build an API URL; the segments have been checked to be safe in a path."""
        return URL("/".join((str(self._base), *segments)), encoded=True)

    def _own_url(self, text: str) -> URL:
        """Read a cursor's URL.  Raise when it points elsewhere: the token stays at home."""
        try:
            url = URL(text, encoded=True)
            is_own = url.origin() == self._base.origin() and url.user is None
        except ValueError:
            is_own = False
        if not is_own:
            raise ProviderUnavailable("the provider's list continues on a foreign host")
        return url


def _create_outcome(answer: _Answer) -> CreateOutcome:
    status = answer.status
    if 200 <= status < 300:
        prediction = wire.parse_prediction(answer.json)
        if prediction is None:
            return Unknown(f"HTTP {status} with an unreadable body")
        return Started(prediction)
    if 400 <= status < 500 and status not in _NO_ANSWER:
        return classify_refusal(status, answer.retry_after, answer.json)
    return Unknown(f"HTTP {status}")


def _is_nameless(outcome: CreateOutcome) -> bool:
    """Tell a refusal of the model's name from all other outcomes."""
    return isinstance(outcome, Refused) and outcome.failure.code == "model_not_found"


async def _read_whole(response: aiohttp.ClientResponse) -> bytes:
    """Read the body, refusing to hold more than `_LARGEST_ANSWER` in memory."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _LARGEST_ANSWER:
            raise aiohttp.ClientPayloadError("the answer is too large")
    return bytes(body)


def _object(answer: _Answer) -> dict[str, Any]:
    found = answer.json if answer.status != 404 else None
    if found is None:
        raise ProviderUnavailable("the provider's answer could not be read")
    return found


def _check_handle(handle: str) -> None:
    if not wire.is_handle(handle):
        raise PredictionNotFound("this is not the id of a prediction")


def _is_older(prediction: Prediction, moment: datetime) -> bool:
    return prediction.created_at is not None and prediction.created_at < moment
