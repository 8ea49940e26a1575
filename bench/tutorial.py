"""The same work by the design of most tutorials and by ours: end-to-end time of both.

    python -m bench.tutorial [--jobs 500] [--run 2] [--processes 10] [--webhooks]
                             [--format jpeg] [--side 1024] [--kilobytes 100]

All jobs are submitted at once; every prediction takes `--run` seconds.  The tutorial's worker
(`bench/tutorial_worker.py`) is Celery's prefork pool with the vendor's client, one task per job,
which waits for the picture.  Celery's default is one process for each core; `--processes` is how
many it gets here.  It is spared the HTTP API: rows and messages are written directly.  Ours is
one API and one worker process, as `celery -A worker.celery_app worker` starts it.
"""

from __future__ import annotations

import argparse
import os
import time

import psycopg
import uvloop

from bench.figures import print_load, print_table, usage
from bench.harness import Machine, Service
from bench.http_load import submit_jobs
from bench.provider import add_picture_options, picture_options


def run_tutorial(
    machine: Machine, provider: Service, jobs: int, processes: int
) -> tuple[float, float]:
    """Give the seconds until all jobs are completed, and the worker's PSS in MiB."""
    database, broker = machine.create_database()
    media = machine.folder / "media-tutorial"
    media.mkdir()
    env = machine.environment() | {
        "DATABASE_URL": database,
        "REDIS_URL": broker,
        "STORAGE_PATH": str(media),
        "TUTORIAL_PROVIDER": f"http://127.0.0.1:{provider.provider_port}",
    }
    os.environ |= env  # for the import: the module is made by its environment
    from bench.tutorial_worker import TABLE, generate

    celery = ["celery", "-A", "bench.tutorial_worker", "worker", "--loglevel=warning"]
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(TABLE.encode())
        pid = machine.start("tutorial", [*celery, f"--concurrency={processes}"], env)
        machine.wait_until(
            lambda: generate.app.control.ping(timeout=0.5),
            within=60,
            what="the tutorial's worker is ready",
        )
        began = time.monotonic()
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO tutorial_jobs (id, status, prompt) VALUES (%s, 'pending', %s)",
                [(number, f"a lighthouse, number {number}") for number in range(jobs)],
            )
        for number in range(jobs):
            generate.delay(number)

        def is_done() -> bool:
            row = connection.execute(
                "SELECT count(*) FROM tutorial_jobs WHERE status = 'completed'"
            ).fetchone()
            return row is not None and row[0] >= jobs

        machine.wait_until(is_done, within=1800, what="the tutorial is through")
        seconds = time.monotonic() - began
        memory = usage(pid).pss
    machine.stop("tutorial")
    return seconds, memory


def run_ours(service: Service, jobs: int) -> tuple[float, float]:
    """Give the seconds until all jobs are completed, and the worker's PSS in MiB."""
    began = time.monotonic()
    uvloop.run(submit_jobs(service.port, jobs))
    service.wait_for(jobs, within=300, every=0.05)
    return time.monotonic() - began, usage(service.pids["worker"]).pss


def main() -> None:
    """Run one after the other and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--run", type=float, default=2, help="a prediction's seconds")
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--webhooks", action="store_true")
    add_picture_options(parser)
    options = parser.parse_args()
    with Machine() as machine:
        service = Service(machine, callbacks=options.webhooks)
        service.start(f"--seconds={options.run}", *picture_options(options))
        ours, our_memory = run_ours(service, options.jobs)
        service.stop_worker()
        theirs, their_memory = run_tutorial(
            machine, service, options.jobs, options.processes
        )
    print(f"{options.jobs} jobs of {options.run:g} s, all at once")
    print_table(
        ("", "seconds", "jobs/s", "worker MiB (PSS)"),
        [
            ("ours", ours, options.jobs / ours, our_memory),
            (
                f"tutorial, {options.processes} processes",
                theirs,
                options.jobs / theirs,
                their_memory,
            ),
        ],
    )
    print(f"tutorial / ours = {theirs / ours:.1f}")
    print_load()


if __name__ == "__main__":
    main()
