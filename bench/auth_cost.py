"""What keys, limits and budgets cost a submit: the same load with and without, in turn.

    python -m bench.auth_cost [--rounds 5] [--requests 4000] [--connections 32]

Three APIs of one uvicorn process each, on databases of their own: without keys; with a key that
is limited in requests a minute; and with one that has every limit and a budget besides, which
takes a price and reserves it for each job.  Quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import urllib.request
from typing import Any

import orjson
import uvloop

from bench.figures import print_load, print_table
from bench.harness import Machine, Service
from bench.http_load import Measure, load, post

BODY = orjson.dumps({"prompt": "a lighthouse at dusk, gentle waves", "num_outputs": 2})
ADMIN = "an-admin-key-for-this-benchmark"
PRICES = """
version = "bench"

[[price]]
model = "black-forest-labs/flux-schnell"
since = 2026-01-01
per_image_usd = 0.003
"""
MANY = 1_000_000_000
RATE = {"requests_per_minute": 60_000_000}
EVERYTHING = RATE | {
    "concurrent_jobs": MANY,
    "jobs_per_day": MANY,
    "models": ["black-forest-labs/flux-schnell"],
    "max_outputs": 4,
    "max_pixels": MANY,
}
BUDGET = {"job_usd": "1", "day_usd": "1000000", "month_usd": "1000000"}


def make_key(service: Service, **fields: Any) -> str:
    """Make a key and give its secret."""
    request = urllib.request.Request(
        f"{service.url}/api/v1/keys",
        data=json.dumps({"name": "bench", **fields}).encode(),
        headers={
            "Authorization": f"Bearer {ADMIN}",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["key"])


async def measure(
    requests: dict[str, tuple[int, bytes]], options: argparse.Namespace
) -> None:
    """Run the rounds in turn and print rates and ratios."""
    rounds: dict[str, list[Measure]] = {name: [] for name in requests}
    for number in range(options.rounds + 1):
        for name, (port, request) in requests.items():
            found = await load(
                port,
                lambda number: request,
                requests=options.requests,
                connections=options.connections,
            )
            if number > 0:  # the first round warms up
                rounds[name].append(found)
    rows = []
    for name, measures in rounds.items():
        marks = (
            statistics.median(m.percentile(share) for m in measures) * 1000
            for share in (0.5, 0.99)
        )
        rows.append((name, statistics.median(m.rate for m in measures), *marks))
    print_table(("median of rounds", "per second", "p50 ms", "p99 ms"), rows)
    without, *others = rounds
    for name in others:
        pairs = zip(rounds[name], rounds[without], strict=True)
        ratios = sorted(one.rate / bare.rate for one, bare in pairs)
        print(
            f"{name}: {statistics.median(ratios):.2f} of the rate without"
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
    guarded = {
        "AUTH_REQUIRED": "true",
        "ADMIN_API_KEY": ADMIN,
        "MAX_PENDING_JOBS": str(MANY),
    }
    with Machine() as machine:
        prices = machine.folder / "prices.toml"
        prices.write_text(PRICES)
        bare = Service(machine, "bare", MAX_PENDING_JOBS=str(MANY))
        keyed = Service(machine, "keyed", **guarded)
        limited = Service(machine, "limited", **guarded, PRICE_FILE=str(prices))
        for service in (bare, keyed, limited):
            service.start_api()
        path = "/api/v1/generate"
        bearer = {
            "keyed": make_key(keyed, limits=RATE),
            "limited": make_key(limited, limits=EVERYTHING, budget=BUDGET),
        }
        requests = {
            "without keys": (bare.port, post(path, BODY)),
            "a key": (
                keyed.port,
                post(path, BODY, Authorization=f"Bearer {bearer['keyed']}"),
            ),
            "a key, all limits, a budget": (
                limited.port,
                post(path, BODY, Authorization=f"Bearer {bearer['limited']}"),
            ),
        }
        uvloop.run(measure(requests, options))


if __name__ == "__main__":
    main()
