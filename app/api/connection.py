"""Connections that are bounded in time and size, below everything an application sees.

The server itself waits for ever for the rest of a request's head, keeps as much of it as
comes, and waits for ever for a client that does not read.
"""

from __future__ import annotations

import asyncio
import signal
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Final

import orjson
import structlog
import uvicorn
from uuid_utils.compat import uuid7
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.problems import MEDIA_TYPE, document
from app.api.safe_headers import safe_headers

log = structlog.get_logger("app.api")

HEAD_LIMIT: Final = 64 * 1024  # bytes of a head that is not finished


class BoundedConnection(HttpToolsProtocol):
    """The server's own protocol, with an end to its patience."""

    # From the first byte of a head, or from the connection, to the head's end.
    head_patience = timedelta(seconds=10)
    # For a client to take what is buffered for it: some 50 KiB.
    reading_patience = timedelta(seconds=60)
    # The same, of one that is slow when the process is asked to stop: it holds the end up.
    last_patience = timedelta(seconds=5)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._reading_timer: asyncio.TimerHandle | None = None

    # --------------------------------------------------------------------- what comes in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Read on, but no head without end."""
        if self._is_reading_body():
            super().data_received(data)
            return
        self._head_size += len(data)
        super().data_received(data)
        if self._head_size == 0 or self.transport.is_closing():
            return
        if self._head_size > HEAD_LIMIT:
            self._refuse(
                431, code="headers_too_large", detail="The headers are too large."
            )
        else:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """A head is whole; it may be refused yet, for what it says."""
        self._head_size = 0
        _cancel(self._head_timer)
        self._head_timer = None
        super().on_headers_complete()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _is_unanswered(self) -> bool:
        return self.cycle.more_body and not self.cycle.response_started

    def _is_reading_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(
                self.head_patience.total_seconds(), self._lose_patience
            )

    def _lose_patience(self) -> None:
        self._head_timer = None
        if self._is_answering():
            # A head that was begun behind a request still being answered.
            self.cycle.keep_alive = False
        elif self._head_size == 0:
            self.transport.close()
        elif not self.transport.is_closing():
            self._refuse(
                408, code="head_too_slow", detail="The request arrived too slowly."
            )

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the form of every other refusal."""
        detail = "This is no HTTP request that we understand."
        self._refuse(400, code="bad_request", detail=detail)

    def _refuse(self, status: int, *, code: str, detail: str) -> None:
        if self._is_answering() and not self._is_unanswered():
            # A request behind another one: ours would pass for the answer to that.
            self._part()
            return
        title, request_id = HTTPStatus(status).phrase, uuid7().hex
        body = orjson.dumps(
            document(
                status,
                code=code,
                title=title,
                detail=detail,
                instance="",  # nobody knows what was asked for
                request_id=request_id,
                retryable=status == HTTPStatus.REQUEST_TIMEOUT,
            )
        )
        headers = [
            *self.server_state.default_headers,
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
            *_HEADERS,
        ]
        lines = [b"HTTP/1.1 %d %s" % (status, title.encode())]
        lines += [b"%s: %s" % pair for pair in headers]
        self.transport.write(b"\r\n".join((*lines, b"", body)))
        self._part()

    def _part(self) -> None:
        """Close, with an end to the wait for what the client has not taken yet."""
        self.transport.close()
        self._expect_reading()

    # --------------------------------------------------------------------- what goes out

    def pause_writing(self) -> None:
        """The client is slower than we are: begin to wait for it."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """The client took what was waiting."""
        super().resume_writing()
        _cancel(self._reading_timer)
        self._reading_timer = None

    def on_response_complete(self) -> None:
        """An answer is out, or at least in the buffer."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_reading()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; what it has not read by then, it must read now."""
        super().timeout_keep_alive_handler()
        self._expect_reading()

    def shutdown(self) -> None:
        """End with the answer under way; who does not take it is not waited for long."""
        super().shutdown()
        if self._reading_timer is not None:
            _cancel(self._reading_timer)
            self._reading_timer = self.loop.call_later(
                self.last_patience.total_seconds(), self.transport.abort
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        _cancel(self._head_timer)
        _cancel(self._reading_timer)
        super().connection_lost(exc)

    def _expect_reading(self) -> None:
        if self._reading_timer is None:
            self._reading_timer = self.loop.call_later(
                self.reading_patience.total_seconds(), self.transport.abort
            )


_HEADERS = safe_headers(None)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def bound_connections() -> None:
    """Have the server that runs this application make `BoundedConnection`s.

    To be called while it starts, before it listens.  The command `uvicorn app.main:app` has
    no place to say so; but its server handles the process's signals, and can be found by
    that.  A server that is none of uvicorn's, or speaks through another parser, is left alone.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(server, uvicorn.Server):
        log.info("connections.unbounded", remedy="put a proxy in front")
        return
    if server.config.http_protocol_class is HttpToolsProtocol:
        server.config.http_protocol_class = BoundedConnection
