"""Submits and status reads per second, against the bare floor, in one run, in turn.

    python -m bench.submit_status [--rounds 5] [--requests 4000] [--connections 32]

Starts a PostgreSQL (fsync on) and a Valkey from wheels, a floor server and ours, one uvicorn
process each, and loads them in turn.  Quote the ratios: the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orjson
import uvloop

from app.embedded import Postgres, Valkey
from app.processes import free_port
from bench.http_load import Measure, get, load, post

ROOT = Path(__file__).resolve().parents[1]
BODY = orjson.dumps({"prompt": "a lighthouse at dusk, gentle waves", "num_outputs": 2})


def serve(app: str, port: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start one uvicorn process of the app."""
    command = ["uvicorn", app, "--port", str(port), "--no-access-log"]
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )


async def wait_for(port: int) -> None:
    """Wait until somebody listens."""
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise SystemExit(f"nobody listens on {port}")


async def submit(port: int, path: str, options: argparse.Namespace) -> Measure:
    """One round of POSTs."""
    request = post(path, BODY)
    return await load(
        port,
        lambda number: request,
        requests=options.requests,
        connections=options.connections,
        keep=True,
    )


async def read(
    port: int, prefix: str, ids: Sequence[str], options: argparse.Namespace
) -> Measure:
    """One round of GETs of random jobs."""
    wanted = [get(prefix + random.choice(ids)) for _ in range(options.requests)]
    return await load(
        port,
        wanted.__getitem__,
        requests=options.requests,
        connections=options.connections,
    )


async def measure(floor: int, ours: int, options: argparse.Namespace) -> None:
    """Run the rounds in turn and print rates and ratios."""
    await asyncio.gather(wait_for(floor), wait_for(ours))
    rounds: dict[str, list[Measure]] = {}
    for number in range(options.rounds + 1):
        found = {
            "submit floor": await submit(floor, "/jobs", options),
            "submit ours": await submit(ours, "/api/v1/generate", options),
        }
        floor_ids = [orjson.loads(b)["job_id"] for b in found["submit floor"].bodies]
        our_ids = [orjson.loads(b)["job_id"] for b in found["submit ours"].bodies]
        found["status floor"] = await read(floor, "/jobs/", floor_ids, options)
        found["status ours"] = await read(ours, "/api/v1/status/", our_ids, options)
        if number > 0:  # the first round warms up
            for name, one in found.items():
                rounds.setdefault(name, []).append(one)
    print(f"{'':14}{'per second':>12}{'p50 ms':>9}{'p99 ms':>9}   (median of rounds)")
    for name, measures in rounds.items():
        rate = statistics.median(m.rate for m in measures)
        p50, p99 = (
            statistics.median(m.percentile(share) for m in measures) * 1000
            for share in (0.5, 0.99)
        )
        print(f"{name:14}{rate:12.0f}{p50:9.2f}{p99:9.2f}")
    for what in ("submit", "status"):
        pairs = zip(rounds[f"{what} ours"], rounds[f"{what} floor"], strict=True)
        ratios = sorted(ours.rate / floor.rate for ours, floor in pairs)
        print(
            f"{what}: ours / floor = {statistics.median(ratios):.2f}"
            f" (from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def main() -> None:
    """Start everything, measure, stop everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()
    floor, ours = free_port(), free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Postgres(folder / "pg") as postgres, Valkey(folder / "valkey") as valkey:
            env = os.environ | {
                "DATABASE_URL": postgres.url,
                "REDIS_URL": valkey.url,
                "REPLICATE_API_TOKEN": "r8_bench",
                "REPLICATE_API_BASE_URL": "http://127.0.0.1:9/v1",
                "STORAGE_PATH": str(folder / "media"),
                "LOG_DIR": "",
            }
            alembic = [sys.executable, "-m", "alembic", "upgrade", "head"]
            subprocess.run(alembic, cwd=ROOT, env=env, check=True)
            servers = [
                serve("bench.floor:app", floor, env),
                serve("app.main:app", ours, env),
            ]
            try:
                uvloop.run(measure(floor, ours, options))
            finally:
                for server in servers:
                    server.terminate()
                for server in servers:
                    server.wait()


if __name__ == "__main__":
    main()
