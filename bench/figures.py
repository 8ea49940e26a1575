"""Figures and how they are shown: percentiles, memory and CPU of processes, a table."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

MEBIBYTE = 1024 * 1024


def percentile(ordered: Sequence[float], share: float) -> float:
    """Give the value that this share of the ordered values does not exceed; NaN for none."""
    if not ordered:
        return float("nan")
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a small table: the first column is words, the others are figures."""
    lines = [head, *([_written(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        first = line[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))
        print("  ".join((first, *rest)).rstrip())


def _written(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    digits = 0 if abs(cell) >= 1000 else 1 if abs(cell) >= 10 else 2
    return f"{cell:,.{digits}f}"


def print_load() -> None:
    """Say how busy the machine was: figures of a busy one are not to be believed."""
    load, _, _ = os.getloadavg()
    print(f"{os.cpu_count()} cores, load average {load:.1f} at the end")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its descendants use; memory in MiB, CPU in seconds since it began.

    `pss` counts memory that processes share once, `rss` once for each.
    """

    cpu: float
    rss: float
    pss: float


def usage(pid: int) -> Usage:
    """Look at a process and its descendants, those that ended included in `cpu`."""
    main = psutil.Process(pid)
    cpu = rss = pss = 0.0
    for one in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times, memory = one.cpu_times(), one.memory_full_info()
            cpu += times.user + times.system
            cpu += times.children_user + times.children_system
            rss += memory.rss / MEBIBYTE
            pss += getattr(memory, "pss", memory.rss) / MEBIBYTE
    return Usage(cpu, rss, pss)


class Sampler:
    """Looks at processes every second while it is entered, and remembers the peaks."""

    def __init__(self, pids: Mapping[str, int], *, every: float = 1.0) -> None:
        self._pids = dict(pids)
        self._every = every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sampler")
        self.peaks = {name: usage(pid) for name, pid in self._pids.items()}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            for name, pid in self._pids.items():
                with contextlib.suppress(psutil.NoSuchProcess):
                    now, peak = usage(pid), self.peaks[name]
                    self.peaks[name] = Usage(
                        max(now.cpu, peak.cpu),
                        max(now.rss, peak.rss),
                        max(now.pss, peak.pss),
                    )
