"""Event streams: many listeners on one API process, its memory, and how late events reach them.

    python -m bench.live [--listeners 2000] [--rate 3] [--seconds 20]

Every listener hears of every job, which is the most work there can be.  Jobs are submitted at an
even rate, and nobody makes them: each is one event.  An event is as old as its job when the
client has it.  Every listener must hear every event once.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

import httpx
import uvloop

from bench.figures import Sampler, percentile, print_load, print_table, usage
from bench.harness import Machine, Service

AT_ONCE = 50  # connections being opened
LAST_WORDS = 5.0  # seconds for the last events to arrive
CREATED = re.compile(rb'"type":"job\.created","job_id":"([^"]+)"')
REQUEST = b"GET /api/v1/events HTTP/1.1\r\nHost: bench\r\n\r\n"


class Listener(asyncio.Protocol):
    """One client: notes when it heard of which job."""

    def __init__(self) -> None:
        self.heard: list[tuple[bytes, float]] = []
        self.opened = asyncio.Event()
        self.is_lost = False
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        cast(asyncio.Transport, transport).write(REQUEST)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Note what came; an event may come in pieces."""
        now = time.time()
        if not self.opened.is_set():
            assert data.startswith(b"HTTP/1.1 200"), data[:200]
            self.opened.set()
        text = self._rest + data
        end = 0
        for found in CREATED.finditer(text):
            self.heard.append((found[1], now))
            end = found.end()
        self._rest = text[max(end, len(text) - 100) :]

    def connection_lost(self, error: Exception | None) -> None:
        """Nobody should end before the benchmark does."""
        self.is_lost = True


async def open_all(port: int, number: int) -> list[Listener]:
    """Open all streams."""
    loop, seats = asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)

    async def open_one() -> Listener:
        async with seats:
            _, one = await loop.create_connection(Listener, "127.0.0.1", port)
            await asyncio.wait_for(one.opened.wait(), 60)
            return one

    return await asyncio.gather(*(open_one() for _ in range(number)))


async def submit(url: str, rate: float, seconds: float) -> dict[bytes, float]:
    """Submit jobs at an even rate; say when each was born, by the database's clock."""
    born: dict[bytes, float] = {}
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        began = time.monotonic()
        for number in range(int(rate * seconds)):
            pause = began + number / rate - time.monotonic()
            await asyncio.sleep(max(pause, 0))
            answer = await client.post(
                "/api/v1/generate", json={"prompt": f"picture number {number}"}
            )
            job = answer.raise_for_status().json()
            moment = datetime.fromisoformat(job["created_at"])
            born[job["job_id"].encode()] = moment.timestamp()
    return born


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured, in seconds; CPU of the API."""

    opening: float
    opening_cpu: float
    telling_cpu: float
    delays: Sequence[float]  # in order


async def listen(service: Service, number: int, rate: float, seconds: float) -> Found:
    """Open the streams, and have things happen."""
    api = service.pids["api"]
    began, idle = time.monotonic(), usage(api).cpu
    listeners = await open_all(service.port, number)
    opening, opened = time.monotonic() - began, usage(api).cpu
    born = await submit(service.url, rate, seconds)
    await asyncio.sleep(LAST_WORDS)
    delays: list[float] = []
    for one in listeners:
        assert not one.is_lost, "a stream ended"
        assert Counter(job for job, _ in one.heard) == Counter(
            list(born)
        ), "not all, once"
        delays += [at - born[job] for job, at in one.heard]
    return Found(opening, opened - idle, usage(api).cpu - opened, sorted(delays))


def main() -> None:
    """Open, tell, measure; print memory and delays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listeners", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=3, help="events a second")
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with Machine() as machine:
        service = Service(machine, MAX_EVENT_STREAMS=str(options.listeners))
        service.start_provider()
        service.start_api()
        api = service.pids["api"]
        idle = usage(api)
        with Sampler({"api": api}) as sampler:
            found = uvloop.run(
                listen(service, options.listeners, options.rate, options.seconds)
            )
    delays = found.delays
    print(
        f"{options.listeners:,} listeners, opened in {found.opening:.1f} s;"
        f" {len(delays):,} events delivered, each once"
    )
    print_table(
        ("MiB", "idle", "most", "a listener, KiB"),
        [
            (
                "API",
                idle.rss,
                sampler.peaks["api"].rss,
                (sampler.peaks["api"].rss - idle.rss) * 1024 / options.listeners,
            )
        ],
    )
    print_table(
        ("ms", "p50", "p95", "p99", "most"),
        [
            (
                "event to client",
                *(1000 * percentile(delays, share) for share in (0.5, 0.95, 0.99)),
                1000 * delays[-1],
            )
        ],
    )
    print(
        f"CPU of the API: {found.opening_cpu:.1f} s to open, {found.telling_cpu:.1f} s to"
        f" tell, {1e6 * found.telling_cpu / len(delays):.0f} µs a delivery"
    )
    print_load()


if __name__ == "__main__":
    main()
