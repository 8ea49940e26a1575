"""An HTTP/1.1 server on loopback that does to its client what a test says, byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType

LINGER_OFF = struct.pack("ii", 1, 0)  # close() then sends RST instead of FIN


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived; `connection` counts connections from 1."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    connection: int

    @property
    def json(self) -> dict[str, object]:
        """Read the body."""
        return json.loads(self.body)


Reaction = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


class HangUp(Exception):
    """Raised by a reaction that has ended the connection."""


@dataclass
class ScriptedServer:
    """Answer each request with the next reaction; the last one answers all that follow."""

    reactions: list[Reaction] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0

    async def __aenter__(self) -> ScriptedServer:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def will(self, *reactions: Reaction) -> None:
        """Set what happens to the next requests, and forget the earlier ones."""
        self.reactions = list(reactions)
        self.requests.clear()

    def count(self, method: str) -> int:
        """Count the requests with this method that arrived."""
        return sum(request.method == method for request in self.requests)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        number = self.connections
        try:
            while (request := await _read_request(reader, number)) is not None:
                self.requests.append(request)
                reactions = self.reactions
                reaction = reactions.pop(0) if len(reactions) > 1 else reactions[0]
                await reaction(request, writer)
        except (HangUp, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


async def _read_request(reader: asyncio.StreamReader, number: int) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, target, headers, body, number)


def raw(data: bytes) -> Reaction:
    """Send exactly these bytes and keep the connection."""

    async def react(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return react


def answer(
    status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> Reaction:
    """Send a complete answer."""
    own = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = "".join(f"{k}: {v}\r\n" for k, v in {**own, **(headers or {})}.items())
    return raw(f"HTTP/1.1 {status} Scripted\r\n{lines}\r\n".encode() + body)


def answer_json(
    status: int, value: object, headers: Mapping[str, str] | None = None
) -> Reaction:
    """Send a complete JSON answer."""
    return answer(status, json.dumps(value).encode(), headers)


def html(status: int) -> Reaction:
    """Send the kind of page a proxy makes."""
    page = b"<!doctype html><html><title>oops</title></html>"
    return answer(status, page, {"Content-Type": "text/html"})


def then_close(reaction: Reaction) -> Reaction:
    """React, then end the connection in an orderly way."""

    async def react(request: Request, writer: asyncio.StreamWriter) -> None:
        await reaction(request, writer)
        raise HangUp

    return react


def close() -> Reaction:
    """End the connection without an answer."""
    return then_close(raw(b""))


def reset(after: bytes = b"") -> Reaction:
    """Send some bytes, then reset the connection."""

    async def react(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(after)
        await writer.drain()
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_OFF)
        writer.transport.abort()
        raise HangUp

    return react


def hang(after: bytes = b"") -> Reaction:
    """Send some bytes, then nothing more for ever."""

    async def react(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(after)
        await writer.drain()
        await asyncio.Event().wait()

    return react


def drip(after: bytes, piece: bytes, pause: float) -> Reaction:
    """Send some bytes, then a piece at a time for ever."""

    async def react(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(after)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return react


def echo_host() -> Reaction:
    """Answer with the Host header, to see which server was asked."""

    async def react(request: Request, writer: asyncio.StreamWriter) -> None:
        await answer(200, request.headers["host"].encode())(request, writer)

    return react
