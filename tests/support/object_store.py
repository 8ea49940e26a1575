"""A bucket to test against: a real S3 server in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp

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
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = _READY.search(log.read_text())
        if found:
            return found[1]
        await asyncio.sleep(0.05)
    raise AssertionError(f"moto's server did not start: {log.read_text()}")
