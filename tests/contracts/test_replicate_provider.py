"""The provider client against a scripted server: outcomes, cursors, descriptions."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone

import aiohttp
import jsonschema
import pytest

from app.domain.errors import (
    ModelNotFound,
    PredictionNotFound,
    ProviderThrottled,
    ProviderUnavailable,
)
from app.domain.generation import (
    CreateOutcome,
    GenerationRequest,
    MediaClient,
    Phase,
    Refused,
    Started,
    Unknown,
)
from app.services.providers.addresses import OutputHosts
from app.services.providers.replicate import ReplicateClient, Timeouts
from app.services.providers.transport import Downloader, DownloadLimits
from tests.contracts.scripted_server import (
    Reaction,
    ScriptedServer,
    answer,
    answer_json,
    close,
    hang,
    html,
    raw,
    reset,
    then_close,
)

ID = "ufawqhfynnddngldkgtslldrkq"
TOKEN = "r8_not_a_real_token"
REQUEST = GenerationRequest("owner/name", {"prompt": "a fox", "seed": 7})
PINNED = GenerationRequest(f"owner/name:{'a' * 64}", REQUEST.input)
LIFE = timedelta(minutes=15)
QUICK = Timeouts(
    connect=timedelta(seconds=0.3),
    pool=timedelta(seconds=0.5),
    total=timedelta(seconds=0.5),
    upload=timedelta(seconds=0.5),
)
CREATED = {"id": ID, "status": "starting"}
HEAD = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n"


def make_client(base_url: str, **options: object) -> ReplicateClient:
    downloader = Downloader(OutputHosts.parse(()), DownloadLimits(max_bytes=1))
    options = {"timeouts": QUICK, **options}
    return ReplicateClient(
        base_url=base_url, token=TOKEN, downloader=downloader, **options
    )


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer() as running:
        yield running


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[ReplicateClient]:
    made = make_client(server.url + "/v1")
    yield made
    await made.aclose()


def test_the_client_keeps_the_contract() -> None:
    made: MediaClient = make_client("https://api.replicate.com/v1")
    assert made.name == "replicate"


# ------------------------------------------------------------------------------ create


def problem(status: int, **fields: object) -> Reaction:
    return answer_json(status, {"status": status, **fields})


def invalid(field: str, description: str) -> Reaction:
    row = {"type": "x", "field": field, "description": description}
    return problem(
        422,
        title="Input validation failed",
        detail=f"- {field}: {description}\n",
        invalid_fields=[row],
    )


def chunked(body: bytes) -> bytes:
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    return head + f"{len(body):x}\r\n".encode() + body + b"\r\n"


def summary(outcome: CreateOutcome) -> str:
    if isinstance(outcome, Started):
        return f"started {outcome.prediction.phase}"
    if isinstance(outcome, Refused):
        wait = outcome.retry_after
        seconds = "" if wait is None else f" {wait.total_seconds():g}"
        return f"{outcome.kind} {outcome.failure.code}{seconds}"
    return "unknown"


BAD_VERSION = {
    "title": "Invalid version or not permitted",
    "detail": "The specified version does not exist (or perhaps you don't have permission)",
}
THROTTLED = "Request was throttled. Your rate limit resets in ~12s."

CREATES: dict[str, tuple[Reaction, str]] = {
    "201": (answer_json(201, CREATED), "started queued"),
    "202 running": (
        answer_json(202, {"id": ID, "status": "processing"}),
        "started running",
    ),
    "200 finished": (
        answer_json(200, {"id": ID, "status": "succeeded"}),
        "started succeeded",
    ),
    "201 failed": (
        answer_json(201, {"id": ID, "status": "failed", "error": "x"}),
        "started failed",
    ),
    "201 new status": (
        answer_json(201, {"id": ID, "status": "dreaming"}),
        "started running",
    ),
    "201 no status": (answer_json(201, {"id": ID}), "started running"),
    "201 chunked": (
        raw(chunked(json.dumps(CREATED).encode()) + b"0\r\n\r\n"),
        "started queued",
    ),
    "201 then close": (then_close(answer_json(201, CREATED)), "started queued"),
    "201 no id": (answer_json(201, {"status": "starting"}), "unknown"),
    "201 odd id": (answer_json(201, {"id": "../x", "status": "starting"}), "unknown"),
    "201 list": (answer_json(201, [CREATED]), "unknown"),
    "201 empty": (answer(201), "unknown"),
    "204": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "unknown"),
    "201 html": (html(201), "unknown"),
    "200 html": (html(200), "unknown"),
    "201 broken json": (answer(201, b'{"id": "ufaw'), "unknown"),
    "201 cut short": (
        then_close(raw(HEAD + b'Content-Length: 99\r\n\r\n{"id": "uf')),
        "unknown",
    ),
    "201 cut chunked": (then_close(raw(chunked(b'{"id": "uf'))), "unknown"),
    "201 reset in body": (
        reset(HEAD + b'Content-Length: 99\r\n\r\n{"id": "uf'),
        "unknown",
    ),
    "201 false gzip": (
        answer(201, b"not gzip", {"Content-Encoding": "gzip"}),
        "unknown",
    ),
    "302": (answer(302, b"", {"Location": "/v1/predictions"}), "unknown"),
    "307": (answer(307, b"", {"Location": "/v1/predictions"}), "unknown"),
    "400": (problem(400, detail="malformed"), "permanent invalid_input"),
    "401": (problem(401, title="Unauthenticated"), "account provider_account"),
    "402": (
        problem(402, title="Insufficient credit", detail="Go buy credit"),
        "account provider_account",
    ),
    "403 html": (html(403), "account provider_forbidden"),
    "404": (problem(404, detail="Not found"), "permanent model_not_found"),
    "404 cut short": (
        then_close(raw(b"HTTP/1.1 404 No\r\nContent-Length: 9\r\n\r\n{")),
        "permanent model_not_found",
    ),
    "405": (problem(405), "permanent provider_rejected"),
    "408": (problem(408), "unknown"),
    "409": (problem(409), "throttled provider_throttled"),
    "413": (html(413), "permanent input_too_large"),
    "422 input": (
        invalid("input.num_outputs", "Must be at most 4"),
        "permanent invalid_input",
    ),
    "422 missing": (invalid("input", "prompt is required"), "permanent invalid_input"),
    "422 ours": (invalid("webhook", "Not a URI"), "permanent provider_rejected"),
    "422 version": (problem(422, **BAD_VERSION), "permanent model_not_found"),
    "422 version field": (
        invalid("version", "Does not match"),
        "permanent model_not_found",
    ),
    "429 header": (
        answer_json(429, {"retry_after": 3}, {"Retry-After": "9"}),
        "throttled provider_throttled 9",
    ),
    "429 body": (
        problem(429, detail=THROTTLED, retry_after=3.5),
        "throttled provider_throttled 3.5",
    ),
    "429 text": (
        problem(429, detail=THROTTLED),
        "throttled provider_throttled 12",
    ),
    "429 old date": (
        answer_json(429, {}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        "throttled provider_throttled 0",
    ),
    "429 nonsense": (
        answer_json(429, {"retry_after": "soon"}, {"Retry-After": "nan"}),
        "throttled provider_throttled",
    ),
    "429 html": (html(429), "throttled provider_throttled"),
    "500": (problem(500, detail="oops"), "unknown"),
    "502 html": (html(502), "unknown"),
    "503 created": (answer_json(503, CREATED), "unknown"),
    "504": (answer(504), "unknown"),
    "524": (html(524), "unknown"),
    "closed": (close(), "unknown"),
    "reset": (reset(), "unknown"),
    "not http": (then_close(raw(b"SSH-2.0-OpenSSH\r\n\r\n")), "unknown"),
    "silence": (hang(), "unknown"),
    "headers, then silence": (hang(HEAD + b"Content-Length: 9\r\n\r\n"), "unknown"),
}


@pytest.mark.parametrize("row", CREATES)
async def test_a_create_is_one_post_with_a_typed_outcome(
    server: ScriptedServer, client: ReplicateClient, row: str
) -> None:
    reaction, expected = CREATES[row]
    server.will(reaction)
    outcome = await client.create(PINNED, cancel_after=LIFE)
    assert summary(outcome) == expected
    assert [r.method for r in server.requests] == ["POST"]
    assert "credit" not in repr(outcome).lower()


NAMELESS = problem(422, title="Invalid version or not permitted", detail="No.")


async def test_a_community_model_is_bought_by_its_latest_version(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    described = answer_json(200, {"latest_version": {"id": "b" * 64}})
    created = answer_json(201, CREATED)
    server.will(NAMELESS, described, created, created)
    outcome = await client.create(REQUEST, cancel_after=LIFE)
    assert summary(outcome) == "started queued"
    await client.create(REQUEST, cancel_after=LIFE)
    bought = [r.json["version"] for r in server.requests if r.method == "POST"]
    pinned = f"owner/name:{'b' * 64}"
    assert bought == ["owner/name", pinned, pinned]


@pytest.mark.parametrize(
    "description", [problem(404), problem(500), answer_json(200, {})]
)
async def test_a_name_that_cannot_be_pinned_stays_refused(
    server: ScriptedServer, client: ReplicateClient, description: Reaction
) -> None:
    server.will(NAMELESS, description)
    outcome = await client.create(REQUEST, cancel_after=LIFE)
    assert isinstance(outcome, Refused)
    assert outcome.failure.code == "model_not_found"
    assert server.count("POST") == 1


async def test_a_create_sends_exactly_what_was_agreed(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(answer_json(201, CREATED))
    hook = "https://example.com/hook/1?token=2"
    await client.create(REQUEST, cancel_after=timedelta(seconds=1), webhook=hook)
    (sent,) = server.requests
    assert (sent.method, sent.target) == ("POST", "/v1/predictions")
    assert sent.headers["authorization"] == f"Bearer {TOKEN}"
    assert sent.headers["cancel-after"] == "5s"
    assert sent.headers["content-type"] == "application/json"
    assert "prefer" not in sent.headers
    assert sent.json == {
        "version": "owner/name",
        "input": {"prompt": "a fox", "seed": 7},
        "webhook": hook,
        "webhook_events_filter": ["start", "completed"],
    }


async def test_a_create_without_a_webhook_names_none(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(answer_json(201, CREATED))
    await client.create(REQUEST, cancel_after=timedelta(seconds=90.2))
    assert set(server.requests[0].json) == {"version", "input"}
    assert server.requests[0].headers["cancel-after"] == "91s"


@pytest.mark.parametrize("ending", [close(), reset()])
async def test_a_post_on_a_dying_pooled_connection_is_not_sent_again(
    server: ScriptedServer, client: ReplicateClient, ending: Reaction
) -> None:
    server.will(answer_json(200, {"type": "user"}))
    await client.ping()
    server.will(ending, answer_json(201, CREATED))
    outcome = await client.create(REQUEST, cancel_after=LIFE)
    assert isinstance(outcome, Unknown)
    # The pooled connection was used, and no second POST came on a new one.
    assert [r.connection for r in server.requests] == [1]


async def test_aiohttp_would_have_sent_a_get_again(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    """Proves that the test above looks at the right moment."""
    server.will(answer_json(200, {"type": "user"}))
    await client.ping()
    server.will(close(), answer_json(200, {"type": "user"}))
    await client.ping()
    assert [r.connection for r in server.requests] == [1, 2]


async def test_nothing_listening_never_left() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = make_client(f"http://127.0.0.1:{unused.getsockname()[1]}")
        outcome = await client.create(REQUEST, cancel_after=LIFE)
        await client.aclose()
    assert summary(outcome) == "unreachable provider_unavailable"


async def test_a_failed_tls_handshake_never_left(
    server: ScriptedServer,
) -> None:
    client = make_client(f"https://127.0.0.1:{server.port}")
    outcome = await client.create(REQUEST, cancel_after=LIFE)
    await client.aclose()
    assert summary(outcome) == "unreachable provider_unavailable"
    assert server.requests == []


async def test_a_connect_that_takes_too_long_never_left() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        client = make_client(f"http://127.0.0.1:{full.getsockname()[1]}")
        outcome = await client.create(REQUEST, cancel_after=LIFE)
        await client.aclose()
        for one in waiting:
            one.close()
    assert summary(outcome) == "unreachable provider_unavailable"


def test_a_name_that_does_not_resolve_counts_as_not_connected() -> None:
    assert issubclass(aiohttp.ClientConnectorDNSError, aiohttp.ClientConnectorError)


async def test_what_json_cannot_carry_never_leaves(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    request = GenerationRequest("owner/name", {"seed": 10**30})
    outcome = await client.create(request, cancel_after=LIFE)
    assert summary(outcome) == "permanent invalid_input"
    assert server.connections == 0


async def test_a_cancelled_create_stays_cancelled(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(hang())
    task = asyncio.create_task(client.create(REQUEST, cancel_after=LIFE))
    while not server.requests:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_closed_client_buys_nothing(server: ScriptedServer) -> None:
    client = make_client(server.url)
    await client.aclose()
    outcome = await client.create(REQUEST, cancel_after=LIFE)
    assert summary(outcome) == "unreachable provider_unavailable"
    with pytest.raises(ProviderUnavailable):
        await client.ping()


async def test_a_refusal_names_the_fields(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(invalid("input.num_outputs", "Must be less than or equal to 4"))
    outcome = await client.create(REQUEST, cancel_after=LIFE)
    assert isinstance(outcome, Refused)
    expected = (
        "the model refused the input: num_outputs: Must be less than or equal to 4"
    )
    assert outcome.failure.message == expected


async def test_fields_are_found_in_the_detail_alone(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    detail = "- input.width: Must be a multiple of 32\n- input: prompt is required\n"
    server.will(problem(422, title="Input validation failed", detail=detail))
    outcome = await client.create(REQUEST, cancel_after=LIFE)
    assert isinstance(outcome, Refused)
    assert "width: Must be a multiple of 32; input: prompt" in outcome.failure.message


# ------------------------------------------------------------------------------- reads


async def test_a_get_reads_the_prediction(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(answer_json(200, {"id": ID, "status": "processing"}))
    assert (await client.get(ID)).phase is Phase.RUNNING
    assert server.requests[0].target == f"/v1/predictions/{ID}"


READ_FAILURES = {
    "404": (problem(404), PredictionNotFound),
    "500": (problem(500), ProviderUnavailable),
    "502 html": (html(502), ProviderUnavailable),
    "200 html": (html(200), ProviderUnavailable),
    "200 no id": (answer_json(200, {"status": "failed"}), ProviderUnavailable),
    "301": (answer(301, b"", {"Location": "/elsewhere"}), ProviderUnavailable),
    "401": (problem(401), ProviderUnavailable),
    "429": (problem(429, retry_after=4), ProviderThrottled),
    "reset": (reset(), ProviderUnavailable),
    "silence": (hang(), ProviderUnavailable),
    "cut short": (
        then_close(raw(HEAD + b"Content-Length: 99\r\n\r\n{")),
        ProviderUnavailable,
    ),
}


@pytest.mark.parametrize("row", READ_FAILURES)
async def test_a_read_that_fails_says_how(
    server: ScriptedServer, client: ReplicateClient, row: str
) -> None:
    reaction, expected = READ_FAILURES[row]
    server.will(reaction)
    with pytest.raises(expected) as caught:
        await client.get(ID)
    assert type(caught.value) is expected
    if isinstance(caught.value, ProviderThrottled):
        assert caught.value.retry_after == timedelta(seconds=4)


@pytest.mark.parametrize("handle", ["", "..", "a/b", "a?b", "a b", "ä", "x" * 200])
async def test_what_is_no_handle_is_never_asked_for(
    server: ScriptedServer, client: ReplicateClient, handle: str
) -> None:
    with pytest.raises(PredictionNotFound):
        await client.get(handle)
    assert server.connections == 0


@pytest.mark.parametrize("status", [200, 422])
async def test_cancelling_what_is_over_is_harmless(
    server: ScriptedServer, client: ReplicateClient, status: int
) -> None:
    server.will(answer_json(status, {"id": ID, "status": "succeeded"}))
    await client.cancel(ID)
    (sent,) = server.requests
    assert (sent.method, sent.target) == ("POST", f"/v1/predictions/{ID}/cancel")
    assert sent.body == b""


async def test_cancelling_the_unknown_says_so(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(problem(404))
    with pytest.raises(PredictionNotFound):
        await client.cancel(ID)


async def test_the_webhook_secret_is_fetched(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(answer_json(200, {"key": "whsec_AAEC"}))
    assert await client.webhook_secret() == "whsec_AAEC"
    assert server.requests[0].target == "/v1/webhooks/default/secret"


async def test_a_secret_that_is_missing_is_no_secret(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(answer_json(200, {}))
    with pytest.raises(ProviderUnavailable):
        await client.webhook_secret()


async def test_every_request_is_reported(server: ScriptedServer) -> None:
    seen: list[tuple[str, str]] = []
    client = make_client(
        server.url, on_request=lambda operation, code, _: seen.append((operation, code))
    )
    server.will(answer_json(201, CREATED), close())
    await client.create(REQUEST, cancel_after=LIFE)
    await client.create(REQUEST, cancel_after=LIFE)
    await client.aclose()
    assert seen == [("create", "201"), ("create", "ServerDisconnectedError")]


# -------------------------------------------------------------------------------- list

MOMENT = datetime(2026, 11, 22, 10, 0, 0, 250_000, tzinfo=timezone.utc)


def row(number: int, created_at: str = "2026-11-22T10:00:01.5Z") -> dict[str, object]:
    return {"id": f"p{number}", "status": "processing", "created_at": created_at}


async def test_the_list_is_walked_by_its_cursors_verbatim(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    onward = f"{server.url}/v1/predictions?cursor=cD0yMDI2%2B%3D%3D&x=%7e"
    server.will(
        answer_json(
            200, {"next": onward, "results": [row(3), {"status": "x"}, row(2)]}
        ),
        answer_json(200, {"next": None, "previous": "x", "results": [row(1)]}),
    )
    pages = [page async for page in client.list_since(MOMENT)]
    assert [[p.handle for p in page] for page in pages] == [["p3", "p2"], ["p1"]]
    first, second = server.requests
    assert first.target.endswith("?created_after=2026-11-22T10:00:00.250000Z")
    assert second.target == "/v1/predictions?cursor=cD0yMDI2%2B%3D%3D&x=%7e"


async def test_older_rows_end_the_walk(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    onward = f"{server.url}/v1/predictions?cursor=2"
    results = [row(3), row(2, "2026-11-22T09:59:59.123456789Z")]
    server.will(answer_json(200, {"next": onward, "results": results}))
    pages = [page async for page in client.list_since(MOMENT)]
    assert [[p.handle for p in page] for page in pages] == [["p3"]]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "onward",
    [
        "https://evil.example/v1/predictions?cursor=2",
        "http://user@127.0.0.1:{port}/v1/predictions?cursor=2",
        "https://127.0.0.1:{port}/v1/predictions?cursor=2",
        "http://127.0.0.1:{other}/v1/predictions?cursor=2",
        "//127.0.0.1.evil.example/x",
        "http://[::1",
        "predictions?cursor=2",
    ],
)
async def test_a_cursor_elsewhere_is_not_followed(
    server: ScriptedServer, client: ReplicateClient, onward: str
) -> None:
    async with ScriptedServer() as stranger:
        stranger.will(answer_json(200, {"results": []}))
        onward = onward.replace("{port}", str(server.port))
        onward = onward.replace("{other}", str(stranger.port))
        server.will(answer_json(200, {"next": onward, "results": [row(1)]}))
        with pytest.raises(ProviderUnavailable):
            async for _ in client.list_since(MOMENT):
                pass
        assert stranger.connections == 0
    assert len(server.requests) == 1


async def test_a_cursor_in_a_circle_ends(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    onward = f"{server.url}/v1/predictions?cursor=2"
    server.will(answer_json(200, {"next": onward, "results": [row(1)]}))
    pages = [page async for page in client.list_since(MOMENT)]
    assert len(pages) == 2


# ---------------------------------------------------------------------------- describe

OPENAPI = {
    "openapi": "3.0.2",
    "components": {
        "schemas": {
            "Input": {
                "type": "object",
                "title": "Input",
                "required": ["prompt"],
                "properties": {
                    "prompt": {"type": "string", "x-order": 0},
                    "aspect_ratio": {
                        "allOf": [{"$ref": "#/components/schemas/aspect_ratio"}],
                        "default": "1:1",
                        "x-order": 1,
                    },
                },
            },
            "aspect_ratio": {"type": "string", "enum": ["1:1", "16:9"]},
            "Output": {"type": "array"},
        }
    },
}


async def test_a_described_model_validates_its_input(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    version = {"id": "c846a699", "openapi_schema": OPENAPI}
    model = {"description": "fast", "latest_version": version, "is_official": True}
    server.will(answer_json(200, model))
    found = await client.describe("owner/name")
    assert server.requests[0].target == "/v1/models/owner/name"
    assert (found.name, found.description) == ("owner/name", "fast")
    assert (found.version, found.labels) == ("c846a699", ("official",))
    assert found.properties["prompt"]["x-order"] == 0
    check = jsonschema.Draft202012Validator(dict(found.input_schema))
    check.check_schema(dict(found.input_schema))
    assert check.is_valid({"prompt": "x", "aspect_ratio": "16:9"})
    assert not check.is_valid({"prompt": "x", "aspect_ratio": "2:1"})
    assert not check.is_valid({"prompt": "x", "colour": "red"})
    assert not check.is_valid({})


async def test_a_version_is_described_by_its_own_route(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(answer_json(200, {"id": "abc123", "openapi_schema": OPENAPI}))
    found = await client.describe("owner/name:abc123")
    assert server.requests[0].target == "/v1/models/owner/name/versions/abc123"
    assert (found.name, found.version) == ("owner/name", "abc123")


@pytest.mark.parametrize("latest", [None, {"id": "hidden"}, {"id": None}, "x"])
async def test_a_hidden_version_is_none_and_takes_any_input(
    server: ScriptedServer, client: ReplicateClient, latest: object
) -> None:
    server.will(answer_json(200, {"latest_version": latest}))
    found = await client.describe("owner/name")
    assert found.version is None
    assert found.properties == {}
    assert jsonschema.Draft202012Validator(dict(found.input_schema)).is_valid({"a": 1})


async def test_an_unknown_model_is_named(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(problem(404))
    with pytest.raises(ModelNotFound, match="owner/none"):
        await client.describe("owner/none")


@pytest.mark.parametrize(
    "model", ["", "x", "a/b/c", "../x", "a/..", "a/b:c/d", "a/b?c"]
)
async def test_what_names_no_model_is_never_asked_for(
    server: ScriptedServer, client: ReplicateClient, model: str
) -> None:
    with pytest.raises(ModelNotFound):
        await client.describe(model)
    assert server.connections == 0
