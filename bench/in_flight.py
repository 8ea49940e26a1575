"""Memory with many jobs in flight: one worker and one API process hold them all open.

    python -m bench.in_flight [--jobs 50000] [--over 60] [--webhooks]
                              [--format jpeg] [--side 256] [--kilobytes 10]

The provider holds every prediction until all are started, and then ends them evenly over
`--over` seconds.  Every job must be completed.  Memory is looked at once a second: RSS, and
PSS, which counts what processes share once.  The pictures are small, for the disk's sake.
"""

from __future__ import annotations

import argparse
import time

import uvloop

from bench.figures import Sampler, print_load, print_table, usage
from bench.harness import Machine, Service
from bench.http_load import submit_jobs
from bench.provider import add_picture_options, picture_options

SETTLE = 10  # seconds with everything in flight, for the memory's peak
OPEN = "SELECT count(*) FROM attempts WHERE state = 'running'"


def hold(machine: Machine, service: Service, jobs: int) -> tuple[float, float]:
    """Bring all jobs in flight: the seconds until all are accepted, and all are started."""
    began = time.monotonic()
    uvloop.run(submit_jobs(service.port, jobs))
    accepted = time.monotonic() - began
    machine.wait_until(
        lambda: service.rows(OPEN)[0][0] >= jobs,
        within=60 + jobs / 50,
        what=f"{jobs} jobs are in flight",
        every=0.5,
    )
    return accepted, time.monotonic() - began


def let_go(service: Service, jobs: int, over: float) -> float:
    """End the predictions and give the seconds until every job is completed."""
    began = time.monotonic()
    service.ask_provider(f"/control/release?over={over}", data=b"")
    service.wait_for(jobs, within=over + 60 + jobs / 20, every=0.5)
    return time.monotonic() - began


def main() -> None:
    """Fill, hold, drain; print memory and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--over", type=float, default=60, help="seconds of the ends")
    parser.add_argument("--webhooks", action="store_true")
    add_picture_options(parser, side=256, kilobytes=10)
    options = parser.parse_args()
    with Machine() as machine:
        service = Service(
            machine, callbacks=options.webhooks, JOB_DEADLINE_SECONDS="7200"
        )
        service.start("--hold", *picture_options(options))
        pids = {name: service.pids[name] for name in ("worker", "api")}
        idle = {name: usage(pid) for name, pid in pids.items()}
        with Sampler(pids) as filling:
            accepted, started = hold(machine, service, options.jobs)
        with Sampler(pids) as holding:
            time.sleep(SETTLE)
        with Sampler(pids) as draining:
            drained = let_go(service, options.jobs, options.over)
        stats = service.ask_provider("/control/stats")
    print(f"{options.jobs:,} jobs in flight on one worker")
    head = ("MiB", "idle", "filling", "holding", "draining", "PSS, most")
    phases = (filling, holding, draining)
    print_table(
        head,
        [
            (
                name,
                idle[name].rss,
                *(phase.peaks[name].rss for phase in phases),
                max(phase.peaks[name].pss for phase in phases),
            )
            for name in pids
        ],
    )
    print(
        f"accepted in {accepted:.1f} s ({options.jobs / accepted:.0f}/s), all started"
        f" after {started:.1f} s ({options.jobs / started:.0f}/s), ended over"
        f" {options.over:g} s, drained in {drained:.1f} s ({options.jobs / drained:.0f}/s)"
    )
    print(
        f"requests to the provider: {stats['requests']}; webhooks: {stats['webhooks']}"
    )
    print_load()


if __name__ == "__main__":
    main()
