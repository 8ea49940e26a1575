"""How lists and status reads slow down as the tables grow: 1,000 jobs against 1,000,000.

    python -m bench.growth [--small 1000] [--large 1000000] [--rounds 20] [--requests 25]
                           [--connections 4]

Two databases on one PostgreSQL (its default settings, fsync on), one API process each.  The rows
come straight from SQL: jobs of a month in the proportions of a healthy service, with their
attempts, files and events, the youngest still under way.  Short rounds ask both in turn, so
that a slow minute of the machine hits both; the first round warms up.  Quote the ratios.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

import psycopg
import uvloop

from app.api.deps import write_cursor
from bench.figures import percentile, print_load, print_table
from bench.harness import Machine, Service
from bench.http_load import get, load

# Shares in the hundred of a job's fate, by its number; the youngest hundredth is under way.
_JOBS = """
INSERT INTO jobs (id, version, status, stage, progress, is_cancel_requested, attempts,
    look_failures, provider, model, prompt, input, num_outputs, priority, metadata,
    request_id, warnings, error_code, error_message, error_retryable, cost_usd, due_at,
    deadline_at, created_at, started_at, generated_at, completed_at)
SELECT id, CASE fate WHEN 'pending' THEN 1 WHEN 'processing' THEN 3 ELSE 5 END, fate,
    CASE fate WHEN 'pending' THEN 'queued' WHEN 'processing' THEN 'generating' END,
    CASE fate WHEN 'completed' THEN 1 END, false, CASE fate WHEN 'pending' THEN 0 ELSE 1 END,
    0, 'replicate',
    CASE WHEN n %% 10 < 7 THEN 'black-forest-labs/flux-schnell'
         WHEN n %% 10 < 9 THEN 'black-forest-labs/flux-dev' ELSE 'stability-ai/sdxl' END,
    prompt, jsonb_build_object('prompt', prompt, 'seed', n, 'num_outputs', 1),
    1, 0, '{}', md5(n::text), '[]',
    CASE fate WHEN 'failed' THEN 'provider_error' END,
    CASE fate WHEN 'failed' THEN 'The generation failed.' END,
    CASE fate WHEN 'failed' THEN true END,
    CASE fate WHEN 'completed' THEN 0.003 END,
    CASE WHEN fate IN ('pending', 'processing') THEN now() + interval '1 day' END,
    at + interval '15 minutes', at,
    CASE WHEN fate <> 'pending' THEN at + interval '1 second' END,
    CASE fate WHEN 'completed' THEN at + interval '3 seconds' END,
    CASE WHEN fate NOT IN ('pending', 'processing') THEN at + interval '4 seconds' END
FROM (
    SELECT n, id, uuid_extract_timestamp(id) AS at, $prompt AS prompt,
        CASE WHEN n > %(jobs)s * 0.995 THEN 'pending'
             WHEN n > %(jobs)s * 0.99 THEN 'processing'
             WHEN n %% 25 = 7 THEN 'failed'
             WHEN n %% 100 = 3 THEN 'cancelled' ELSE 'completed' END AS fate
    FROM (
        SELECT n, uuidv7(interval '30 days' * (n - %(jobs)s) / %(jobs)s) AS id
        FROM generate_series(1, %(jobs)s) AS n
    ) AS numbered
) AS fated
"""
_PROMPT = "'a lighthouse at dusk, number ' || n || ', gentle waves, oil on canvas'"
_GIVEN_PROMPT = "(SELECT prompt FROM given WHERE number = n)"
_ATTEMPTS = """
INSERT INTO attempts (id, job_id, number, state, handle, fingerprint, token, sent_at, closed_at)
SELECT gen_random_uuid(), id, 1,
    CASE status WHEN 'completed' THEN 'succeeded' WHEN 'processing' THEN 'running'
        ELSE status END,
    replace(id::text, '-', ''), md5(id::text) || md5(id::text),
    left(md5(random()::text), 32), started_at, completed_at
FROM jobs WHERE status <> 'pending'
"""
_ASSETS = """
INSERT INTO assets (job_id, index, key, sha256, content_type, size_bytes, width, height,
    created_at)
SELECT id, 0, left(hash, 2) || '/' || hash || '.webp', hash, 'image/webp', 98765, 1024, 1024,
    completed_at
FROM (SELECT *, md5(id::text) || md5(prompt) AS hash FROM jobs WHERE status = 'completed')
"""
_EVENTS = """
INSERT INTO job_events (job_id, version, name, data, status, stage, at)
SELECT id, version, name, '{}', job_status, job_stage, created_at + version * interval '1 s'
FROM (
    SELECT j.id, j.created_at, step.version,
        (ARRAY['Submitted', 'Intended', 'Started', 'Generated', 'Stored'])[step.version]
            AS name,
        CASE step.version WHEN 1 THEN 'pending' WHEN 5 THEN j.status ELSE 'processing' END
            AS job_status,
        (ARRAY['queued', 'submitting', 'generating', 'storing', NULL])[step.version]
            AS job_stage
    FROM jobs j, LATERAL generate_series(1, j.version) AS step (version)
) AS steps
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request: its name and the paths to choose from."""

    name: str
    paths: Sequence[str]


def fill(service: Service, jobs: int, prompts: Sequence[str] = ()) -> None:
    """Insert the rows, with equal prompts unless some are given, one for each job.

    Foreign keys are not checked, and the index of prompts is made afterwards: both take most of
    the time.
    """
    began = time.monotonic()
    with psycopg.connect(service.database, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("SET maintenance_work_mem = '512MB'")
        (made,) = connection.execute(
            "SELECT pg_get_indexdef('ix_jobs_prompt_parts'::regclass)"
        ).fetchall()
        connection.execute("DROP INDEX ix_jobs_prompt_parts")
        connection.execute(
            "CREATE TEMP TABLE given (number int PRIMARY KEY, prompt text)"
        )
        with connection.cursor().copy("COPY given FROM STDIN") as copy:
            for number, prompt in enumerate(prompts, 1):
                copy.write_row((number, prompt))
        prompt = _GIVEN_PROMPT if prompts else _PROMPT
        connection.execute(_JOBS.replace("$prompt", prompt).encode(), {"jobs": jobs})
        for statement in (_ATTEMPTS, _ASSETS, _EVENTS, made[0]):
            connection.execute(statement.encode())
        connection.execute("VACUUM (ANALYZE)")
    size = service.rows("SELECT pg_database_size(current_database())")[0][0]
    print(
        f"{jobs:,} jobs: {size / 1e6:,.0f} MB, filled in {time.monotonic() - began:.0f} s"
    )


def kinds(service: Service) -> list[Kind]:
    """Choose what is asked: single jobs anywhere, and pages from the top or anywhere."""
    ids = [row[0] for row in service.rows("SELECT id FROM jobs ORDER BY id DESC")]
    # Behind every cursor there are pages enough, in the small one too.
    cursors = [
        f"&cursor={write_cursor(job_id)}"
        for job_id in random.sample(ids[: len(ids) // 2], 500)
    ]
    ids = random.sample(ids, 500)
    dev = "model=" + quote("black-forest-labs/flux-dev", safe="")
    prefix = "/api/v1/jobs?limit=20"
    return [
        Kind("status", [f"/api/v1/status/{job_id}" for job_id in ids]),
        Kind("first page", [prefix]),
        Kind("page by cursor", [prefix + cursor for cursor in cursors]),
        Kind("status=completed", [f"{prefix}&status=completed"]),
        Kind("status=failed", [f"{prefix}&status=failed"]),
        Kind("status=failed, cursor", [f"{prefix}&status=failed{c}" for c in cursors]),
        Kind("model", [f"{prefix}&{dev}"]),
        Kind("model, cursor", [f"{prefix}&{dev}{cursor}" for cursor in cursors]),
        Kind("owner, cursor", [f"{prefix}&owner=default{c}" for c in cursors]),
        Kind("owner and status", [f"{prefix}&owner=default&status=failed"]),
        Kind("owner and model", [f"{prefix}&owner=default&{dev}"]),
        Kind("status and model", [f"{prefix}&status=failed&{dev}"]),
    ]


def ask(service: Service, kind: Kind, options: argparse.Namespace) -> list[float]:
    """Send the requests of one round and give their latencies."""
    chosen = [get(random.choice(kind.paths)) for _ in range(options.requests)]
    measured = uvloop.run(
        load(
            service.port,
            chosen.__getitem__,
            requests=options.requests,
            connections=options.connections,
        )
    )
    return measured.latencies


def main() -> None:
    """Fill both, ask both in turn, print latencies and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=25)
    parser.add_argument("--connections", type=int, default=4)
    options = parser.parse_args()
    with Machine(max_wal_size="8GB") as machine:
        small, large = Service(machine, "-small"), Service(machine, "-large")
        for service, jobs in ((small, options.small), (large, options.large)):
            fill(service, jobs)
            service.start_api()
        pairs = list(zip(kinds(small), kinds(large), strict=True))
        found: dict[str, tuple[list[float], list[float]]] = {
            kind.name: ([], []) for kind, _ in pairs
        }
        for number in range(options.rounds + 1):
            for kind, grown in pairs:
                latencies = ask(small, kind, options), ask(large, grown, options)
                if number > 0:  # the first round warms up
                    found[kind.name][0].extend(latencies[0])
                    found[kind.name][1].extend(latencies[1])
    print_table(
        ("ms", "p50 small", "large", "ratio", "p99 small", "large", "ratio"),
        [(name, *_compared(*both)) for name, both in found.items()],
    )
    print_load()


def _compared(small: list[float], large: list[float]) -> list[float]:
    small, large = sorted(small), sorted(large)
    cells = []
    for share in (0.5, 0.99):
        little, much = percentile(small, share), percentile(large, share)
        cells += [little * 1000, much * 1000, much / little]
    return cells


if __name__ == "__main__":
    main()
