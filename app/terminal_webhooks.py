"""Webhooks as a person sees them on a terminal; see `terminal`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from app.terminal import console, plain

Endpoint = Mapping[str, Any]  # as `models/webhook_schemas.py` describes it
Delivery = Mapping[str, Any]


def show_endpoints(endpoints: Sequence[Endpoint]) -> None:
    """Print endpoints as a table, in their order; ids are whole, to be copied."""
    table = _table("endpoint", "state", "events")
    table.add_column("url", no_wrap=True)
    for one in endpoints:
        events = ",".join(word.removeprefix("job.") for word in one["events"])
        table.add_row(
            plain(one["endpoint_id"]),
            _state(one),
            plain(events or "all"),
            Text(plain(one["url"]), overflow="ellipsis"),
        )
    console().print(table)


def show_deliveries(deliveries: Sequence[Delivery]) -> None:
    """Print webhooks as a table, in their order."""
    table = _table("delivery", "state", "tries", "made", "type", "job")
    table.add_column("last", no_wrap=True)
    for one in deliveries:
        table.add_row(
            plain(one["delivery_id"]),
            plain(one["state"]),
            str(one["attempts"]),
            _moment(one["created_at"]),
            plain(one["type"]),
            plain(one["job_id"] or ""),
            Text(_last(one), overflow="ellipsis"),
        )
    console().print(table)


def show_delivery(delivery: Delivery) -> None:
    """Print a webhook, one line for each thing that is known of it."""
    facts: dict[str, object] = {
        "delivery": delivery["delivery_id"],
        "webhook-id": delivery["webhook_id"],
        "type": delivery["type"],
        "state": delivery["state"],
        "to": delivery["url"] or "an endpoint that was removed",
        "next": _moment(delivery["next_try_at"]),
    }
    out = console()
    for name, value in facts.items():
        if value:
            out.print(f"{name:<11} {plain(value)}", soft_wrap=True)
    for one in delivery["tries"]:
        out.print(f"{'try ' + str(one['number']):<11} {_try(one)}", soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.padding = (0, 1, 0, 0)
    for name in columns:
        width = 36 if name in ("endpoint", "delivery") else None
        table.add_column(name, no_wrap=True, min_width=width)
    return table


def _state(endpoint: Endpoint) -> str:
    if not endpoint["enabled"]:
        return plain(endpoint["disabled_reason"] or "disabled")
    return "failing" if endpoint["failing_since"] else "enabled"


def _last(delivery: Delivery) -> str:
    return _try(delivery["tries"][-1]) if delivery["tries"] else ""


def _try(one: Mapping[str, Any]) -> str:
    said = one["error"] or f"It answered {one['status_code']}."
    return plain(f"{said} ({one['seconds']:.2f} s)")


def _moment(moment: str | None) -> str:
    if moment is None:
        return ""
    return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M}"
