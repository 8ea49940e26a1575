"""Running a sandbox: in the running loop, or in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self

from aiohttp import web

from sandbox.config import SandboxConfig
from sandbox.server import create_app

#: Graceful stop: open requests, for example of `Prefer: wait`, get this many seconds.
STOP_SECONDS = 0.3


class Sandbox:
    """A sandbox in the running event loop: ``async with Sandbox(config) as sandbox``.

    ``port`` 0 takes a free one; ``url`` tells which.  Raises OSError when the port is busy.
    """

    def __init__(
        self,
        config: SandboxConfig | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.app = create_app(config)
        self._runner = web.AppRunner(
            self.app,
            access_log=None,
            shutdown_timeout=STOP_SECONDS,
            handle_signals=False,
        )
        self._host = host
        self._port = port

    @property
    def url(self) -> str:
        """Return ``http://host:port``, without ``/v1``; known once it runs."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def start(self) -> None:
        """Listen."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, backlog=1024)
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop within a second; may be repeated."""
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()


class ThreadedSandbox:
    """The same for code without an event loop: ``with ThreadedSandbox(config) as sandbox``."""

    def __init__(self, config: SandboxConfig | None = None, *, port: int = 0) -> None:
        self._config = config
        self._port = port
        self._ready = threading.Event()
        self._failure: OSError | None = None
        self._loop = asyncio.new_event_loop()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="sandbox", daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        sandbox = Sandbox(self._config, port=self._port)
        try:
            await sandbox.start()
        except OSError as exc:
            self._failure = exc
            self._ready.set()
            return
        self.url = sandbox.url
        self._ready.set()
        await self._done.wait()
        await sandbox.stop()
