"""How long it takes to choose whose jobs start next, by who is waiting.

    python -m bench.turns [--repeats 15]

One PostgreSQL with the service's tables.  The rows come straight from SQL; each choice is made
in a transaction that is rolled back, so that all choose among the same jobs.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import time
from dataclasses import dataclass

import structlog
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.database import open_engine
from app.domain.policy import Policy
from app.services import turns
from app.services.ledger import LEASE
from bench.figures import print_load, print_table
from bench.harness import Machine, Service

_FILL = text("""
INSERT INTO jobs (id, version, owner, status, stage, is_cancel_requested, attempts, look_failures,
    provider, model, prompt, input, num_outputs, priority, metadata, warnings, due_at,
    deadline_at, created_at)
SELECT uuidv7(), 1, 'owner-' || lpad((n % :owners)::text, 4, '0'), 'pending', 'queued', false, 0,
    0, 'replicate', 'black-forest-labs/flux-schnell', 'a lighthouse at dusk',
    jsonb_build_object('prompt', 'a lighthouse at dusk', 'seed', n), 1, 0, '{}', '[]',
    now() - interval '1 minute', now() + interval '1 hour', now() - interval '1 minute'
FROM generate_series(1, :jobs) AS n
""")


@dataclass(frozen=True, slots=True)
class _Scene:
    """Who is waiting, and how many may start."""

    title: str
    owners: int
    jobs: int
    limit: int


SCENES = (
    _Scene("100,000 jobs of one owner, one to choose", 1, 100_000, 1),
    _Scene("1,000 owners with 100 each, one to choose", 1000, 100_000, 1),
    _Scene("199 owners with 500 each, 100 to choose", 199, 99_500, 100),
)


async def choose(engine: AsyncEngine, limit: int) -> tuple[float, float]:
    """Choose once; give the milliseconds of the choice, and of starting what was chosen."""
    async with engine.connect() as conn:
        async with conn.begin() as transaction:
            began = time.perf_counter()
            await turns._pick(conn, limit=limit + 1, passed=())
            chosen = time.perf_counter()
            await turns.start(conn, limit=limit, lease=LEASE, policy=Policy())
            started = time.perf_counter()
            await transaction.rollback()
    return (chosen - began) * 1000, (started - chosen) * 1000


async def measure(database: str, repeats: int) -> None:
    """Fill the tables for each scene, choose, and print the medians."""
    engine = open_engine(SecretStr(database), name="bench", pool_size=1)
    rows = []
    for scene in SCENES:
        async with engine.begin() as conn:
            await conn.execute(text("TRUNCATE jobs, owners CASCADE"))
            await conn.execute(_FILL, {"owners": scene.owners, "jobs": scene.jobs})
        async with engine.connect() as conn:
            await conn.execution_options(isolation_level="AUTOCOMMIT")
            await conn.execute(text("VACUUM ANALYZE jobs"))
        found = [await choose(engine, scene.limit) for _ in range(repeats + 1)][1:]
        picks, starts = zip(*found, strict=True)
        rows.append((scene.title, statistics.median(picks), statistics.median(starts)))
    await engine.dispose()
    print_table(("waiting", "choose, ms", "choose and claim, ms"), rows)
    print_load()


def main() -> None:
    """Start a PostgreSQL, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    quiet = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure(wrapper_class=quiet)  # a line for every job that is claimed
    with Machine() as machine:
        service = Service(machine)
        asyncio.run(measure(service.database, options.repeats))


if __name__ == "__main__":
    main()
