"""Keys as a person sees them on a terminal; see `terminal`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from app.terminal import console, plain

Key = Mapping[str, Any]  # as `models/key_schemas.py` describes it


def show_keys(keys: Sequence[Key]) -> None:
    """Print keys as a table, in their order; ids are whole, to be copied."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("key", no_wrap=True, min_width=36)
    for name in ("begins", "state", "owner"):
        table.add_column(name, no_wrap=True)
    table.add_column("scopes", no_wrap=True)
    table.add_column("used", no_wrap=True)
    table.add_column("name", no_wrap=True)
    for key in keys:
        table.add_row(
            plain(key["key_id"]),
            plain(key["prefix"]),
            _state(key),
            plain(key["owner"]),
            plain(",".join(key["scopes"])),
            _moment(key["last_used_at"]),
            Text(plain(key["name"]), overflow="ellipsis"),
        )
    console().print(table)


def show_key(key: Key) -> None:
    """Print a key, one line for each thing that is known of it."""
    facts: dict[str, object] = {
        "key": key["key_id"],
        "name": key["name"],
        "owner": f"{key['owner']}, weight {key['weight']}",
        "begins": key["prefix"],
        "state": _state(key),
        "scopes": ", ".join(key["scopes"]),
        "created": _moment(key["created_at"]),
        "expires": _moment(key["expires_at"]),
        "used": _moment(key["last_used_at"]),
    }
    bounds = {**key["limits"], **key["budget"]}
    facts |= {name: value for name, value in bounds.items() if value is not None}
    out = console()
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else value
        out.print(f"{name:<19} {plain(text)}", soft_wrap=True)


def _state(key: Key) -> str:
    if key["revoked_at"] is not None:
        return "revoked"
    expires = key["expires_at"]
    if expires is not None and datetime.fromisoformat(expires) <= datetime.now(UTC):
        return "expired"
    return "live"


def _moment(moment: str | None) -> str:
    if moment is None:
        return "never"
    return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M}"
