"""What one request may carry, and how long it may take: too much is refused, not suffered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta

import httpx
import pytest

from app.api.bodies import PACE, Pace
from app.api.connection import HEAD_LIMIT, BoundedConnection
from app.api.middleware import ADDRESS_LIMIT, HEADERS_LIMIT, MOST_HEADERS
from app.core.config import Settings
from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.served import Api, check_problem, served
from tests.support.waiting import wait_for_async

LIVE = "/api/v1/health/live"
POST = b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n"


class Impatient(BoundedConnection):
    """Waits as long as a test likes to."""

    head_patience = timedelta(seconds=0.3)
    reading_patience = timedelta(seconds=0.3)


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> AsyncIterator[Api]:
    """An API that is as patient as the real one, unless its test says otherwise."""
    yield await emptied(shared, shared_sandbox)
    shared.app.state.pace = PACE


@pytest.fixture
async def impatient(settings: Callable[..., Settings]) -> AsyncIterator[Api]:
    """An API that soon parts with a slow client."""
    async with served(settings(), Impatient) as api:
        yield api


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back over a bare connection."""

    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["code"])


class Wire:
    """A connection without a client library: it sends what no library would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> Answer:
        """Read one answer."""
        async with asyncio.timeout(10):
            head = await self._reader.readuntil(b"\r\n\r\n")
            line, *rest = head.decode().strip().split("\r\n")
            pairs = (one.partition(":") for one in rest)
            headers = httpx.Headers([(name, value.strip()) for name, _, value in pairs])
            length = int(headers.get("content-length", 0))
            body = await self._reader.readexactly(length)
        return Answer(int(line.split()[1]), headers, body)

    async def is_closed(self) -> bool:
        """Wait for the end of the connection."""
        async with asyncio.timeout(10):
            try:
                return await self._reader.read(1) == b""
            except ConnectionError:
                return True


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[Api], asyncio.Future[Wire]]]:
    """Open bare connections, and close them after the test."""
    opened: list[Wire] = []

    async def open_one(api: Api) -> Wire:
        host, port = api.origin.removeprefix("http://").split(":")
        wire = Wire(*await asyncio.open_connection(host, int(port)))
        opened.append(wire)
        return wire

    yield open_one  # type: ignore[misc]
    for wire in opened:
        wire.writer.close()


Connect = Callable[..., "asyncio.Future[Wire]"]


# ------------------------------------------------------------------- address and headers


async def test_an_address_may_be_long_but_not_endless(api: Api) -> None:
    fits = ADDRESS_LIMIT - len(LIVE) - len("a=")

    allowed = await api.client.get(f"{LIVE}?a={'x' * fits}")
    refused = await api.client.get(f"{LIVE}?a={'x' * (fits + 1)}")

    assert allowed.status_code == 200
    assert refused.status_code == 414
    assert check_problem(refused).code == "address_too_long"
    assert refused.headers["connection"] == "close"


async def test_headers_may_be_many_but_not_countless(api: Api) -> None:
    async def ask(count: int) -> httpx.Response:
        given = len(api.client.headers) + 1  # and Host
        extra = {f"x-{number}": "1" for number in range(count - given)}
        return await api.client.get(LIVE, headers=extra)

    assert (await ask(MOST_HEADERS)).status_code == 200
    refused = await ask(MOST_HEADERS + 1)
    assert refused.status_code == 431
    assert check_problem(refused).code == "headers_too_large"


async def test_headers_may_be_large_but_not_huge(api: Api) -> None:
    allowed = await api.client.get(LIVE, headers={"x-long": "x" * 30_000})
    refused = await api.client.get(LIVE, headers={"x-long": "x" * HEADERS_LIMIT})

    assert allowed.status_code == 200
    assert refused.status_code == 431
    assert check_problem(refused).code == "headers_too_large"


async def test_a_head_without_end_is_cut_off(api: Api, connect: Connect) -> None:
    wire = await connect(api)
    await wire.send(b"GET / HTTP/1.1\r\nHost: x\r\nX-Endless: ")
    await wire.send(b"x" * HEAD_LIMIT)

    answer = await wire.answer()

    assert (answer.status, answer.code) == (431, "headers_too_large")
    assert await wire.is_closed()


async def test_a_head_without_end_behind_another_request_is_cut_off(
    api: Api, connect: Connect
) -> None:
    job = await api.generate("nobody makes it")
    wire = await connect(api)
    waiting = f"GET /api/v1/status/{job.job_id}?wait=60 HTTP/1.1\r\nHost: x\r\n\r\n"
    await wire.send(waiting.encode() + b"GET / HTTP/1.1\r\nX-Endless: ")
    await api.job(job.job_id)  # by then that has been read
    await wire.send(b"x" * (HEAD_LIMIT + 1))

    # Without a word: what was answered here would pass for the first answer.
    assert await wire.is_closed()


# ------------------------------------------------------------------------- slow clients


async def test_a_head_that_does_not_come_is_not_waited_for(
    impatient: Api, connect: Connect
) -> None:
    wire = await connect(impatient)
    await wire.send(b"GET / HTTP/1.1\r\nHos")

    answer = await wire.answer()

    assert (answer.status, answer.code) == (408, "head_too_slow")
    assert await wire.is_closed()


async def test_a_trickling_head_gains_no_time(impatient: Api, connect: Connect) -> None:
    wire = await connect(impatient)

    async def trickle() -> None:
        while True:
            await wire.send(b"x: y\r\n")
            await asyncio.sleep(0.05)

    await wire.send(b"GET / HTTP/1.1\r\n")
    trickling = asyncio.create_task(trickle())
    answer = await wire.answer()

    trickling.cancel()
    assert answer.status == 408


async def test_a_second_head_is_not_waited_for_either(
    impatient: Api, connect: Connect
) -> None:
    wire = await connect(impatient)
    await wire.send(f"GET {LIVE} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (await wire.answer()).status == 200
    await wire.send(b"GET ")

    assert (await wire.answer()).status == 408


async def test_a_connection_that_says_nothing_is_closed(
    impatient: Api, connect: Connect
) -> None:
    wire = await connect(impatient)

    assert await wire.is_closed()


async def test_a_client_that_does_not_read_is_left(
    impatient: Api, connect: Connect
) -> None:
    wire = await connect(impatient)
    wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
    large = b"GET /docs-files/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    await wire.send(large * 20)

    async def is_lost() -> bool:
        wire.writer.write(b"GET")
        return wire.writer.transport.is_closing()

    await wait_for_async(is_lost, within=20, what="the end of the connection")


class Remembered(BoundedConnection):
    """Can be found by a test."""

    last_patience = timedelta(seconds=0.2)
    slow: BoundedConnection | None = None

    def pause_writing(self) -> None:
        """Note whose client does not read."""
        super().pause_writing()
        type(self).slow = self


async def test_a_client_that_does_not_read_does_not_hold_the_end_up(
    settings: Callable[..., Settings], connect: Connect
) -> None:
    async with served(settings(), Remembered) as patient:
        wire = await connect(patient)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        large = b"GET /docs-files/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
        await wire.send(large * 20)

        sizes = [0]

        async def is_slow() -> bool:
            if Remembered.slow is not None and Remembered.slow.flow.write_paused:
                sizes.append(Remembered.slow.transport.get_write_buffer_size())
            return sizes[-1] > 0 and sizes[-10:] == sizes[-1:] * 10

        await wait_for_async(is_slow, within=20, what="buffers that are full")
        assert Remembered.slow is not None
        Remembered.slow.shutdown()  # as the server does with all when it is to end

        async def is_lost() -> bool:
            wire.writer.write(b"GET")
            return wire.writer.transport.is_closing()

        await wait_for_async(is_lost, within=20, what="the end of the connection")


async def test_a_body_that_pauses_is_not_waited_for(api: Api, connect: Connect) -> None:
    api.app.state.pace = Pace(longest_pause=timedelta(seconds=0.2))
    wire = await connect(api)
    await wire.send(POST + b'{"prompt"')

    answer = await wire.answer()

    assert (answer.status, answer.code) == (408, "body_too_slow")
    assert json.loads(answer.body)["retryable"] is True
    assert answer.headers.get_list("connection") == ["close"]
    assert await wire.is_closed()


async def test_a_trickling_body_must_keep_up(api: Api, connect: Connect) -> None:
    api.app.state.pace = Pace(free=timedelta(seconds=0.3), bytes_per_second=1000)
    wire = await connect(api)
    await wire.send(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\n")
    await wire.send(b"Content-Length: 100000\r\n\r\n")

    async def trickle() -> None:
        while True:
            await wire.send(b" ")
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    answer = await wire.answer()

    trickling.cancel()
    assert (answer.status, answer.code) == (408, "body_too_slow")


async def test_a_body_that_keeps_up_may_take_longer(api: Api, connect: Connect) -> None:
    api.app.state.pace = Pace(free=timedelta(seconds=0.2), bytes_per_second=10)
    wire = await connect(api)
    body = b'{"prompt": "a slow train", "metadata": {"a": "%s"}}' % (b"x" * 400)
    await wire.send(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\n")
    await wire.send(b"Content-Length: %d\r\n\r\n" % len(body))
    for part in range(0, len(body), 100):
        await wire.send(body[part : part + 100])
        await asyncio.sleep(0.1)

    assert (await wire.answer()).status == 202


async def test_a_body_ends_soon_when_the_process_stops(
    impatient: Api, connect: Connect
) -> None:
    impatient.app.state.pace = Pace(when_stopping=timedelta(seconds=0.1))
    wire = await connect(impatient)
    await wire.send(POST + b'{"prompt"')
    assert (await impatient.client.get(LIVE)).status_code == 200
    began = time.monotonic()
    impatient.app.state.runtime.stopping.set()

    answer = await wire.answer()

    assert time.monotonic() - began < 2
    assert (answer.status, answer.code) == (408, "body_too_slow")
    assert "stops" in json.loads(answer.body)["detail"]


# ------------------------------------------------------------------- bodies nobody reads


async def test_a_short_body_nobody_reads_costs_no_connection(
    api: Api, connect: Connect
) -> None:
    wire = await connect(api)
    request = f"GET {LIVE} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}"
    for _ in range(2):
        await wire.send(request.encode())
        answer = await wire.answer()
        assert answer.status == 200
        assert "connection" not in answer.headers


async def test_a_huge_body_nobody_reads_is_not_swallowed(
    api: Api, connect: Connect
) -> None:
    wire = await connect(api)
    head = f"GET {LIVE} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    await wire.send(head.encode())
    sent = 0

    async def pour() -> None:
        nonlocal sent
        while True:
            await wire.send(b"x" * 65_536)
            sent += 65_536

    pouring = asyncio.create_task(pour())
    answer = await wire.answer()
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(10):
            await pouring

    assert answer.status == 200
    assert answer.headers["connection"] == "close"
    assert sent < 20_000_000


async def test_a_body_over_the_limit_is_answered_and_not_swallowed(
    api: Api, connect: Connect
) -> None:
    wire = await connect(api)
    await wire.send(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\n")
    await wire.send(b"Content-Length: 1000000000\r\n\r\n" + b"x" * 400_000)

    answer = await wire.answer()

    assert (answer.status, answer.code) == (413, "body_too_large")
    assert answer.headers["connection"] == "close"
    assert await wire.is_closed()


async def test_a_client_that_asks_first_is_refused_before_it_sends(
    api: Api, connect: Connect
) -> None:
    wire = await connect(api)
    await wire.send(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\n")
    await wire.send(b"Expect: 100-continue\r\nContent-Length: 1000000000\r\n\r\n")

    assert (await wire.answer()).status == 413


# ------------------------------------------------------------------------------ no HTTP


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        b"Content-Length: 5, 6\r\n\r\nhello",
        b"Content-Length: -5\r\n\r\nhello",
        b"Content-Length: 0x5\r\n\r\nhello",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"Content-Length : 5\r\n\r\nhello",
        b"X-Folded: a\r\n b\r\n\r\n",
        b"X-Null: a\0b\r\n\r\n",
        b"no colon\r\n\r\n",
    ],
)
async def test_what_two_servers_could_read_differently_is_refused(
    api: Api, connect: Connect, head: bytes
) -> None:
    wire = await connect(api)
    await wire.send(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\n" + head)

    answer = await wire.answer()

    assert (answer.status, answer.code) == (400, "bad_request")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"]
    assert await wire.is_closed()


@pytest.mark.parametrize(
    "line",
    [
        *(b"nonsense", b"GET", b"GET / HTTP/9.9", b"FOO / HTTP/1.1"),
        *(b"GET http://[::1 HTTP/1.1", b"GET /\xff\xfe HTTP/1.1", b"\x16\x03\x01\x02"),
    ],
)
async def test_what_is_no_request_is_refused(
    api: Api, connect: Connect, line: bytes
) -> None:
    wire = await connect(api)
    await wire.send(line + b"\r\nHost: x\r\n\r\n")

    answer = await wire.answer()

    assert (answer.status, answer.code) == (400, "bad_request")


async def test_a_body_nested_too_deeply_is_refused(api: Api) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = opening * 50_000 + "1" + closing * 50_000
        body = '{"prompt": "a", "parameters": {"a": %s}}' % deep
        answer = await api.client.post("/api/v1/generate", content=body.encode())
        assert answer.status_code in (413, 422)
        deep = opening * 5_000 + "1" + closing * 5_000
        body = '{"prompt": "a", "parameters": {"a": %s}}' % deep
        answer = await api.client.post("/api/v1/generate", content=body.encode())
        assert answer.status_code == 422
        assert "not valid JSON" in check_problem(answer).detail


async def test_a_body_as_deep_as_allowed_is_kept_and_shown(api: Api) -> None:
    deep = '{"a":' * 150 + "1" + "}" * 150
    body = '{"prompt": "a well", "metadata": %s}' % deep

    answer = await api.client.post("/api/v1/generate", content=body.encode())
    shown = await api.client.get(answer.headers["location"])

    assert answer.status_code == 202
    assert shown.json()["metadata"] == json.loads(deep)
