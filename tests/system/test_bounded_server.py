"""The prescribed command serves within the limits, with no option and no proxy."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from app.api.connection import HEAD_LIMIT
from app.processes import free_port
from tests.support.stack import API, Program
from tests.support.waiting import wait_for

Env = Callable[..., dict[str, str]]


@pytest.fixture
def start(
    child_env: Env, tmp_path: Path
) -> Iterator[Callable[..., tuple[Program, int]]]:
    """Start the API by its command line; end it and its children after the test."""
    programs: list[Program] = []

    def begin(options: Sequence[str] = ()) -> tuple[Program, int]:
        port = free_port()
        argv = ["uvicorn", API, "--port", str(port), *options]
        program = Program("api", argv, child_env(), tmp_path)
        program.start()
        programs.append(program)
        live = f"http://127.0.0.1:{port}/api/v1/health/live"

        def is_up() -> bool:
            try:
                return httpx.get(live).status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(is_up, within=40, what="the API")
        return program, port

    yield begin
    for program in programs:
        if not program.has_ended():
            family = psutil.Process(program.pid).children(recursive=True)
            program.end()
            psutil.wait_procs(family, timeout=20)


def answer_to(port: int, *parts: bytes) -> tuple[int, str]:
    """Send over a bare connection until there is an answer; give its status and code."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        for part in parts:
            wire.sendall(part)
        said = b""
        while piece := wire.recv(65_536):
            said += piece
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["code"]


@pytest.mark.parametrize("options", [(), ("--reload",), ("--workers", "2")])
def test_a_head_without_end_is_cut_off_however_the_server_was_started(
    start: Callable[..., tuple[Program, int]], options: Sequence[str]
) -> None:
    _, port = start(options)

    head = b"GET / HTTP/1.1\r\nX-Endless: "
    assert answer_to(port, head, b"x" * HEAD_LIMIT) == (431, "headers_too_large")


def test_a_body_that_trickles_does_not_hold_up_the_end(
    start: Callable[..., tuple[Program, int]],
) -> None:
    program, port = start()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as wire:
        wire.sendall(b"POST /api/v1/generate HTTP/1.1\r\nHost: x\r\n")
        wire.sendall(b"Content-Length: 1000\r\n\r\n{")
        httpx.get(f"http://127.0.0.1:{port}/api/v1/health/live")
        began = time.monotonic()
        program.send(signal.SIGTERM)
        said = b""
        while piece := wire.recv(65_536):
            said += piece
        program.wait(10)

    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"body_too_slow" in said
    assert time.monotonic() - began < 8
    assert "Exception in ASGI" not in program.said()
