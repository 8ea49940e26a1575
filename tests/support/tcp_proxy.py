"""A wire that can be cut: a TCP proxy in the running loop, in front of a real server."""

from __future__ import annotations

import asyncio
from typing import Self


class TcpProxy:
    """Passes bytes to a server until told otherwise: `async with TcpProxy(host, port) as wire`.

    `refuse()` is a server that is down: connections are reset, new ones refused.
    `fall_silent()` is a lost host: connections are taken, and nothing is ever answered.
    `lose_answers(n)` lets requests through and resets the next n connections that are answered.
    `restore()` ends the first two; connections of the silence are reset, as a rebooted host would.
    """

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._listener: asyncio.Server | None = None
        self._is_open = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers_to_lose = 0
        self.port = 0

    def lose_answers(self, number: int) -> None:
        """Reset the connections of the next answers instead of passing them on."""
        self._answers_to_lose = number

    async def refuse(self) -> None:
        """Close the door and reset whoever is inside."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._reset()

    async def fall_silent(self) -> None:
        """Stop passing bytes on, in both directions; go on taking connections."""
        self._is_open.clear()
        await self._listen()

    async def restore(self) -> None:
        """Work again, on the same port."""
        if not self._is_open.is_set():
            self._reset()
        self._is_open.set()
        await self._listen()

    async def __aenter__(self) -> Self:
        await self.restore()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.refuse()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(
                self._accept, "127.0.0.1", self.port
            )
            self.port = self._listener.sockets[0].getsockname()[1]

    def _reset(self) -> None:
        for writer in tuple(self._writers):
            writer.transport.abort()

    def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        # A plain function: what it starts is ours to end, and to wait for.
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writers.add(writer)
        pair = [writer]
        try:
            await self._is_open.wait()
            back, forth = await asyncio.open_connection(*self._upstream)
            self._writers.add(forth)
            pair.append(forth)
            pumps = {
                asyncio.create_task(self._pump(reader, forth)),
                asyncio.create_task(self._pump(back, writer, are_answers=True)),
            }
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the server is not there: the client sees a reset, below
        finally:
            for one in pair:
                self._writers.discard(one)
                one.transport.abort()

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        *,
        are_answers: bool = False,
    ) -> None:
        while data := await source.read(65536):
            if are_answers and self._answers_to_lose:
                self._answers_to_lose -= 1
                return
            await self._is_open.wait()
            sink.write(data)
            await sink.drain()
