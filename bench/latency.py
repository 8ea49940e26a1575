"""Added latency: from the end of the prediction at the provider to a completed job.

    python -m bench.latency [--rate 100] [--seconds 20] [--rounds 2] [--run 2]
                            [--format jpeg] [--side 1024] [--kilobytes 100]

Two services on one machine, taking turns: one whose API the provider can reach with webhooks,
and one that has to look by itself.  Each gets `--rate` jobs a second; a prediction takes `--run`
seconds, a quarter more or less (looks come at fixed ages, and must not meet the ends), then
one picture is downloaded, checked and stored.  A short round of each warms up.

The provider says when a prediction ended.  "Written" is the job's `completed_at`, "committed"
the moment of the commit that makes it visible (`track_commit_timestamp`).  All clocks are one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import uvloop

from bench.figures import percentile, print_load, print_table
from bench.harness import Machine, Service
from bench.http_load import submit_jobs
from bench.provider import add_picture_options, picture_options

WARM_UP = 3  # seconds
SPREAD = 0.25
COMPLETED = """
SELECT a.handle, extract(epoch FROM j.completed_at)::float,
       extract(epoch FROM pg_xact_commit_timestamp(j.xmin))::float
FROM jobs j JOIN attempts a ON a.job_id = j.id AND a.state = 'succeeded'
WHERE j.created_at >= to_timestamp(%s)
"""


@dataclass(slots=True)
class Found:
    """What the rounds of one service came to, in seconds."""

    written: list[float] = field(default_factory=list)
    committed: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def run_round(service: Service, found: Found, *, rate: float, seconds: float) -> None:
    """Submit at the rate for so long, wait for all, and take their latencies down."""
    before, jobs = sum(service.finished().values()), round(rate * seconds)
    began = time.time()
    uvloop.run(submit_jobs(service.port, jobs, rate=rate))
    service.wait_for(before + jobs, within=120, every=0.5)
    ends: dict[str, float] = service.ask_provider("/control/ends")
    rows = service.rows(COMPLETED, began)
    assert len(rows) == jobs, f"{len(rows)} of {jobs} jobs are there"
    found.written += [written - ends[handle] for handle, written, _ in rows]
    found.committed += [committed - ends[handle] for handle, _, committed in rows]
    moments = sorted(committed for _, _, committed in rows)
    found.rates.append((jobs - 1) / (moments[-1] - moments[0]))


def main() -> None:
    """Run the rounds in turn and print percentiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--run", type=float, default=2, help="a prediction's seconds")
    add_picture_options(parser)
    options = parser.parse_args()
    provider = [f"--seconds={options.run}", f"--spread={SPREAD}"]
    provider += picture_options(options)
    with Machine(track_commit_timestamp="on") as machine:
        services = {
            "webhooks": Service(machine, "-webhooks", callbacks=True),
            "looking": Service(machine, "-looking"),
        }
        found = {name: Found() for name in services}
        for service in services.values():
            service.start(*provider)
            run_round(service, Found(), rate=options.rate, seconds=WARM_UP)
        for _ in range(options.rounds):
            for name, service in services.items():
                run_round(
                    service, found[name], rate=options.rate, seconds=options.seconds
                )
        stats = {n: s.ask_provider("/control/stats") for n, s in services.items()}
    rows = []
    for name, one in found.items():
        for what, values in (("written", one.written), ("committed", one.committed)):
            marks = [percentile(sorted(values), share) for share in (0.5, 0.9, 0.99, 1)]
            rate = sum(one.rates) / len(one.rates)
            rows.append((f"{name}, {what}", *(m * 1000 for m in marks), rate))
    print_table(
        ("added latency", "p50 ms", "p90 ms", "p99 ms", "most ms", "jobs/s"), rows
    )
    for name, said in stats.items():
        print(f"{name}: requests {said['requests']}, webhooks {said['webhooks']}")
    print_load()


if __name__ == "__main__":
    main()
