"""A bucket to test against: a real S3 server in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp

from tests.support.waiting import wait_for_async

BUCKET = "pictures"
_READY = re.compile(r"Running on (http://[\w.:]+)")
_PATIENCE_SECONDS = 30.0


@asynccontextmanager
async def run_bucket(folder: Path) -> AsyncIterator[str]:
    """Start moto's server, make the bucket, give the endpoint; end it by its process id."""
    log = folder / "moto.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        endpoint = await _read_endpoint(log, process)
        async with (
            aiohttp.ClientSession() as http,
            http.put(f"{endpoint}/{BUCKET}") as answer,
        ):
            answer.raise_for_status()
        yield endpoint
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(_PATIENCE_SECONDS)


@contextmanager
def aws_environment(endpoint: str) -> Iterator[None]:
    """Set the standard variables, which is all a bucket is configured with."""
    ours = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def _read_endpoint(log: Path, process: subprocess.Popen[bytes]) -> str:
    async def look() -> str | None:
        assert process.poll() is None, f"moto's server ended: {log.read_text()}"
        found = _READY.search(log.read_text())
        return found[1] if found else None

    found = await wait_for_async(look, within=_PATIENCE_SECONDS, what="moto's server")
    assert found is not None
    return found
