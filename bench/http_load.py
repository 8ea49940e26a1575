"""A load generator that costs little: prepared requests over kept-open raw connections.

A comfortable HTTP client costs more CPU per request than the servers measured here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import orjson

from bench.figures import percentile

RequestMaker = Callable[[int], bytes]
GENERATE = "/api/v1/generate"
BODY = orjson.dumps({"prompt": "a lighthouse at dusk, gentle waves"})


@dataclass(frozen=True, slots=True)
class Measure:
    """What one round came to.  Latencies are in seconds, sorted."""

    requests: int
    seconds: float
    latencies: list[float]
    bodies: list[bytes]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    def percentile(self, share: float) -> float:
        """The latency that this share of the requests did not exceed."""
        return percentile(self.latencies, share)


class _Connection(asyncio.Protocol):
    """One connection with one request at a time under way."""

    def __init__(
        self, next_request: Callable[[], tuple[float, bytes] | None], keep: bool
    ) -> None:
        self._next_request = next_request
        self._keep = keep
        self._buffer = b""
        self._sent_at = 0.0
        self.latencies: list[float] = []
        self.bodies: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has its own class
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if len(rest) < length:
            return
        if head[9:10] != b"2":
            raise RuntimeError(f"unexpected answer: {head[:200]!r} {rest[:300]!r}")
        self.latencies.append(time.perf_counter() - self._sent_at)
        if self._keep:
            self.bodies.append(rest[:length])
        self._buffer = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("closed by the server"))

    def _send(self) -> None:
        request = self._next_request()
        if request is None:
            if not self.done.done():
                self.done.set_result(None)
            self._transport.close()
            return
        due, content = request
        delay = due - time.perf_counter()
        if delay > 0:
            asyncio.get_running_loop().call_later(delay, self._write, content)
        else:
            self._write(content)

    def _write(self, content: bytes) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(content)


async def load(
    port: int,
    make: RequestMaker,
    *,
    requests: int,
    connections: int,
    rate: float | None = None,
    keep: bool = False,
) -> Measure:
    """Send so many requests over so many connections, `rate` a second or as answers come.

    `make` gets the request's number.  An answer that is not 2xx ends the round.
    """
    numbers = iter(range(requests))
    loop = asyncio.get_running_loop()
    began = time.perf_counter()

    def next_request() -> tuple[float, bytes] | None:
        number = next(numbers, None)
        if number is None:
            return None
        due = 0.0 if rate is None else began + number / rate
        return due, make(number)

    protocols = []
    for _ in range(connections):
        _, protocol = await loop.create_connection(
            lambda: _Connection(next_request, keep), "127.0.0.1", port
        )
        protocols.append(protocol)
    await asyncio.gather(*(protocol.done for protocol in protocols))
    seconds = time.perf_counter() - began
    latencies = sorted(t for p in protocols for t in p.latencies)
    bodies = [body for p in protocols for body in p.bodies]
    return Measure(len(latencies), seconds, latencies, bodies)


def get(path: str) -> bytes:
    """Prepare a GET."""
    return f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()


def post(path: str, body: bytes, **headers: str) -> bytes:
    """Prepare a POST of JSON."""
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"{more}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def submit_jobs(
    port: int, jobs: int, *, connections: int = 32, rate: float | None = None
) -> Measure:
    """Submit so many equal jobs; the model's seed makes each input its own."""
    request = post(GENERATE, BODY)
    return await load(
        port,
        lambda number: request,
        requests=jobs,
        connections=min(connections, jobs),
        rate=rate,
    )
