"""Submits and status reads per second, against the bare floor, in one run, in turn.

    python -m bench.submit_status [--rounds 5] [--requests 4000] [--connections 32]

Starts a PostgreSQL (fsync on) and a Valkey from wheels, a floor server and ours, one uvicorn
process each, and loads them in turn.  Quote the ratios: the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence

import orjson
import uvloop

from app.processes import free_port, is_free
from bench.figures import print_load, print_table
from bench.harness import Machine, Service
from bench.http_load import Measure, get, load, post

BODY = orjson.dumps({"prompt": "a lighthouse at dusk, gentle waves", "num_outputs": 2})


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
    rows = []
    for name, measures in rounds.items():
        rate = statistics.median(m.rate for m in measures)
        marks = (
            statistics.median(m.percentile(share) for m in measures) * 1000
            for share in (0.5, 0.99)
        )
        rows.append((name, rate, *marks))
    print_table(("median of rounds", "per second", "p50 ms", "p99 ms"), rows)
    for what in ("submit", "status"):
        pairs = zip(rounds[f"{what} ours"], rounds[f"{what} floor"], strict=True)
        ratios = sorted(ours.rate / floor.rate for ours, floor in pairs)
        print(
            f"{what}: ours / floor = {statistics.median(ratios):.2f}"
            f" (from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    print_load()


def main() -> None:
    """Start everything, measure, stop everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()
    with Machine() as machine:
        service = Service(machine)
        database, _ = machine.create_database()
        floor = free_port()
        uvicorn = ["uvicorn", "bench.floor:app", "--port", str(floor)]
        machine.start(
            "floor",
            [*uvicorn, "--no-access-log"],
            machine.environment() | {"DATABASE_URL": database},
        )
        machine.wait_until(
            lambda: not is_free(floor), within=30, what="the floor listens"
        )
        service.start_api()
        uvloop.run(measure(floor, service.port, options))


if __name__ == "__main__":
    main()
