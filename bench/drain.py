"""Jobs per second from pending to completed: one worker, a provider that takes no time.

    python -m bench.drain [--jobs 2000] [--format jpeg] [--side 1024] [--kilobytes 100]
                          [--rounds 3] [--webhooks]

The jobs are submitted while the worker's process is stopped, so all are pending when it goes
on; the clock runs from the first claim to the last completion, as the rows tell.  Every picture
is downloaded, decoded and stored like any other.  The first round warms up.  Also tells the
CPU milliseconds that each process spent for one job: with all on one machine they share its
cores.
"""

from __future__ import annotations

import argparse
import statistics
import time

import uvloop

from bench.figures import print_load, print_table, usage
from bench.harness import Machine, Service
from bench.http_load import submit_jobs
from bench.provider import add_picture_options, picture_options

SPAN = """
SELECT extract(epoch FROM max(completed_at) - min(started_at))::float
FROM jobs WHERE created_at >= to_timestamp(%s)
"""


def drain(service: Service, jobs: int) -> tuple[float, dict[str, float]]:
    """Pile up the jobs and let them go: the rate, and the CPU ms of each process per job."""
    before = sum(service.finished().values())
    began = time.time()
    with service.frozen_worker():
        uvloop.run(submit_jobs(service.port, jobs))
        used = {name: usage(pid).cpu for name, pid in service.pids.items()}
    service.wait_for(before + jobs, within=60 + jobs / 5)
    cpu = {
        name: (usage(pid).cpu - used[name]) / jobs * 1000
        for name, pid in service.pids.items()
    }
    ((seconds,),) = service.rows(SPAN, began)
    return jobs / seconds, cpu


def main() -> None:
    """Measure the rounds and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--webhooks", action="store_true")
    add_picture_options(parser)
    options = parser.parse_args()
    with Machine() as machine:
        service = Service(machine, callbacks=options.webhooks)
        service.start(*picture_options(options))
        assert machine.postgres.pid and machine.valkey.pid
        service.pids |= {
            "postgres": machine.postgres.pid,
            "valkey": machine.valkey.pid,
        }
        drain(service, min(options.jobs, 200))
        rounds = [drain(service, options.jobs) for _ in range(options.rounds)]
        stats = service.ask_provider("/control/stats")
    rates = sorted(rate for rate, _ in rounds)
    print(
        f"{options.format}, {stats['file_bytes'] / 1000:.0f} kB, side {options.side}:"
        f" {statistics.median(rates):.0f} jobs/s (from {rates[0]:.0f} to {rates[-1]:.0f})"
    )
    print_table(
        ("CPU", "ms per job"),
        [
            (name, statistics.median(cpu[name] for _, cpu in rounds))
            for name in rounds[0][1]
        ],
    )
    done = options.jobs * options.rounds + min(options.jobs, 200)
    asked = {name: round(n / done, 2) for name, n in stats["requests"].items()}
    print(f"requests to the provider per job: {asked}; webhooks: {stats['webhooks']}")
    print_load()


if __name__ == "__main__":
    main()
