"""Jobs as a person sees them on a terminal, and as plain lines in a pipe or a file.

Somebody else's text (prompts, messages) is always shown as text: never as markup, never as
control codes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Job = Mapping[str, Any]  # as `models/schemas.py` describes it

_PIPE_WIDTH = 200
_WIDE_ENOUGH = 110
_STYLES = {
    "pending": "yellow",
    "processing": "cyan",
    "completed": "green",
    "failed": "red",
    "cancelled": "dim",
}


def console(*, err: bool = False) -> Console:
    """Give stdout or stderr as it is now: NO_COLOR honoured, no codes when not a terminal."""
    made = Console(stderr=err, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _PIPE_WIDTH
    return made


def say(line: str, style: str = "") -> None:
    """Tell the person, on stderr."""
    console(err=True).print(line, style=style, soft_wrap=True)


def print_json(value: object) -> None:
    """Print JSON for a program, readable for a person."""
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not is_unicode))


def plain(text: object) -> str:
    """Make somebody's text one line that cannot steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


@contextmanager
def progress() -> Iterator[Callable[[Job], None]]:
    """Show on stderr how a job gets on: a bar on a terminal, a line per stage elsewhere."""
    out = console(err=True)
    if out.is_terminal:
        with _bar(out) as tell:
            yield tell
        return
    seen: list[str] = []

    def tell_in_lines(job: Job) -> None:
        word = _word(job)
        if seen[-1:] != [word]:
            seen.append(word)
            out.print(word)

    yield tell_in_lines


@contextmanager
def _bar(out: Console) -> Iterator[Callable[[Job], None]]:
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<11}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out, transient=True) as bars:
        bar = bars.add_task("queued", total=None)

        def tell(job: Job) -> None:
            done = job["progress"]
            bars.update(
                bar,
                description=_word(job),
                total=None if done is None else 1.0,
                completed=done or 0.0,
            )

        yield tell


def _word(job: Job) -> str:
    """Say in a word how a job is, and in a sentence why it cannot start."""
    word = str(job["stage"] or job["status"])
    waiting = job.get("waiting_for")
    return f"{word}: {plain(waiting['message'])}" if waiting else word


def show_job(job: Job, addresses: Sequence[str]) -> None:
    """Print a job; `addresses` are the absolute URLs of its outputs."""
    out = console()
    rows = _rows(job)
    if out.is_terminal:
        grid = Table.grid(padding=(0, 2))
        for name, value in rows:
            grid.add_row(name, value)
        out.print(Panel(grid, title=job["job_id"], title_align="left", expand=False))
    else:
        for name, value in [("job", Text(job["job_id"])), *rows]:
            out.print(f"{name:<9} {value}", soft_wrap=True)
    # Whole and outside any frame, so that they can be copied.
    for address in addresses:
        out.print(f"{'output':<9} {address}", soft_wrap=True)


def _rows(job: Job) -> list[tuple[str, Text]]:
    spans = [f"{n} {s:g} s" for n, s in job["timings"].items() if s is not None]
    error, waiting = job["error"], job.get("waiting_for")
    values: dict[str, object] = {
        "stage": job["stage"],
        "waiting": waiting and f"{waiting['code']}: {waiting['message']}",
        "progress": None if job["progress"] is None else f"{job['progress']:.0%}",
        "model": job["model"],
        "prompt": job["prompt"],
        "created": _local(job["created_at"]).strftime("%Y-%m-%d %H:%M:%S"),
        "timings": ", ".join(spans),
        "attempts": job["attempts"],
        "cost": job["cost_usd"] and f"{job['cost_usd']} USD",
        "retry of": job["retry_of"],
        "warnings": "; ".join(job["warnings"]),
        "error": error and f"{error['code']}: {error['message']}",
    }
    return [
        ("status", _status(job)),
        *((name, Text(plain(value))) for name, value in values.items() if value),
    ]


def show_table(jobs: Sequence[Job]) -> None:
    """Print jobs as a table, in their order; ids are whole, to be copied."""
    out = console()
    is_narrow = out.width < _WIDE_ENOUGH
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("time", no_wrap=True, min_width=8)
    table.add_column("job", no_wrap=True, min_width=36)
    table.add_column("status", no_wrap=True, min_width=10)
    if not is_narrow:
        table.add_column("model", no_wrap=True, max_width=30)
        table.add_column("s", no_wrap=True, min_width=5, justify="right")
        table.add_column("files", no_wrap=True, min_width=5, justify="right")
    table.add_column("prompt", no_wrap=True, max_width=80)
    for job in jobs:
        took = job["timings"]["total"]
        wide = (
            Text(plain(job["model"]), overflow="ellipsis"),
            "" if took is None else f"{took:.1f}",
            str(len(job["outputs"]) or ""),
        )
        table.add_row(
            _moment(job["created_at"]),
            job["job_id"],
            _status(job),
            *(() if is_narrow else wide),
            Text(plain(job["prompt"]), overflow="ellipsis"),
        )
    out.print(table)


def _status(job: Job) -> Text:
    return Text(plain(job["status"]), style=_STYLES.get(job["status"], ""))


def _moment(moment: str) -> str:
    local = _local(moment)
    is_today = local.date() == datetime.now(local.tzinfo).date()
    return local.strftime("%H:%M:%S" if is_today else "%b %d %H:%M")


def _local(moment: str) -> datetime:
    return datetime.fromisoformat(moment).astimezone()
