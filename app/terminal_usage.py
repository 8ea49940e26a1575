"""Usage as a person sees it on a terminal; see `terminal`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from app.terminal import console, plain, say

Usage = Mapping[str, Any]  # as `models/money_schemas.py` describes it

_COUNTS = ("jobs", "completed", "failed", "cancelled", "outputs")
_MEMBERS = {"key": "key_id"}  # of a row, where it is not the group's own name


def show_usage(usage: Usage) -> None:
    """Print the groups and their sum as a table, and below it what budgets have left."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.padding = (0, 1, 0, 0)
    for name in usage["by"]:
        table.add_column(name, no_wrap=True)
    for name in (*_COUNTS, "USD", "unpriced"):
        table.add_column(name, no_wrap=True, justify="right")
    for row in usage["rows"]:
        groups = (row[_MEMBERS.get(name, name)] for name in usage["by"])
        table.add_row(*(plain(one or "none") for one in groups), *_sums(row))
    empty = [""] * (len(usage["by"]) - 1)
    table.add_row("total", *empty, *_sums(usage["totals"]), style="bold")
    console().print(table)
    if usage["has_more"]:
        say("There are more groups than these; the total counts them too.")
    for whose, standing in usage["budget"].items():
        _show_budget(whose, standing)


def _sums(row: Mapping[str, Any]) -> tuple[str, ...]:
    cost = "unknown" if row["cost_usd"] is None else row["cost_usd"]
    counts = (str(row[name]) for name in _COUNTS)
    return (*counts, plain(cost), str(row["unpriced_jobs"] or ""))


def _show_budget(whose: str, standing: Mapping[str, Any] | None) -> None:
    """Tell of the periods that have a limit."""
    for name in ("day", "month"):
        period = standing and standing[name]
        if period and period["limit_usd"] is not None:
            console().print(
                f"{whose}, this {name}: {period['left_usd']} USD left of"
                f" {period['limit_usd']} ({period['spent_usd']} spent,"
                f" {period['reserved_usd']} held for jobs under way)",
                soft_wrap=True,
            )
