"""The Files API against a scripted server: what is sent, how often, and what comes of it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from app.domain.errors import InvalidRequest, ProviderThrottled, ProviderUnavailable
from app.domain.generation import InputFile, ProvidedFile
from app.services.providers.replicate import ReplicateClient
from tests.contracts.scripted_server import (
    Reaction,
    ScriptedServer,
    answer,
    answer_json,
    close,
    hang,
    reset,
)
from tests.contracts.test_replicate_provider import TOKEN, make_client, problem

CONTENT = b"\r\n--not a boundary\r\n" + bytes(range(256)) * 40
# The fields of a recorded exchange (replicate-api.md section 12).
KEPT = {
    "id": "MWNjYjRk",
    "name": "ab.png",
    "content_type": "image/png",
    "size": len(CONTENT),
    "etag": "f3e1",
    "checksums": {"sha256": "00", "md5": "00"},
    "metadata": {},
    "created_at": "2024-05-14T12:26:51.234Z",
    "expires_at": "2024-05-15T12:26:51.234Z",
    "urls": {"get": "https://api.replicate.com/v1/files/MWNjYjRk"},
}


def a_file() -> InputFile:
    async def read() -> AsyncIterator[bytes]:
        for start in range(0, len(CONTENT), 1000):
            yield CONTENT[start : start + 1000]

    return InputFile("ab.png", "image/png", len(CONTENT), read)


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer() as running:
        yield running


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[ReplicateClient]:
    made = make_client(server.url + "/v1")
    yield made
    await made.aclose()


async def test_a_file_is_sent_as_one_part_of_known_length(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(answer_json(201, KEPT))

    found = await client.upload(a_file())

    end = datetime(2024, 5, 15, 12, 26, 51, 234_000, tzinfo=UTC)
    assert found == ProvidedFile("https://api.replicate.com/v1/files/MWNjYjRk", end)
    (request,) = server.requests
    assert (request.method, request.target) == ("POST", "/v1/files")
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert int(request.headers["content-length"]) == len(request.body)
    assert "transfer-encoding" not in request.headers
    kind = request.headers["content-type"]
    matched = re.fullmatch(r"multipart/form-data; boundary=([0-9a-f]{32})", kind)
    assert matched
    boundary = matched[1].encode()
    assert request.body == (
        b"--" + boundary + b"\r\n"
        b'Content-Disposition: form-data; name="content"; filename="ab.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + CONTENT + b"\r\n--" + boundary + b"--\r\n"
    )


@pytest.mark.parametrize(
    "trouble", [problem(500), problem(503), close(), reset(), answer(201, b"{")]
)
async def test_trouble_is_tried_once_more(
    server: ScriptedServer, client: ReplicateClient, trouble: Reaction
) -> None:
    server.will(trouble, answer_json(201, KEPT))

    found = await client.upload(a_file())

    assert found.url == KEPT["urls"]["get"]  # type: ignore[index]
    assert server.count("POST") == 2
    first, second = (len(request.body) for request in server.requests)
    assert first == second


@pytest.mark.parametrize(
    "reaction",
    [
        problem(500),
        problem(404),
        problem(401),
        answer_json(201, {}),
        answer_json(201, {"urls": {}}),
        answer_json(201, {"urls": {"get": "file:///etc/passwd"}}),
        answer_json(201, {"urls": {"get": 7}}),
        answer_json(201, []),
        hang(),
    ],
)
async def test_without_an_address_the_provider_is_unavailable(
    reaction: Reaction, server: ScriptedServer
) -> None:
    server.will(reaction)
    client = make_client(server.url + "/v1")

    with pytest.raises(ProviderUnavailable):
        await client.upload(a_file())

    await client.aclose()
    assert server.count("POST") <= 2


async def test_a_request_to_slow_down_is_heard(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(problem(429, retry_after=3))

    with pytest.raises(ProviderThrottled):
        await client.upload(a_file())

    assert server.count("POST") == 1


async def test_a_file_too_large_for_the_provider_is_the_callers_trouble(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(problem(413))

    with pytest.raises(InvalidRequest, match="too large"):
        await client.upload(a_file())

    assert server.count("POST") == 1


async def test_an_end_that_is_not_told_is_not_known(
    server: ScriptedServer, client: ReplicateClient
) -> None:
    server.will(answer_json(201, {**KEPT, "expires_at": None}))

    assert (await client.upload(a_file())).expires_at is None
