"""`mediagen queue`: how the queue is, and holding it still for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from app.cli_session import JsonOption, KeyOption, UrlOption, talking

app = typer.Typer(
    help="See how the queue is; pause and resume it (with an admin's key).",
    no_args_is_help=True,
)


@app.command()
def show(
    url: UrlOption = None, key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """Show whether jobs start, and how many wait."""
    _ask_and_show("GET", "/queue", {}, url, key, as_json)


@app.command()
def pause(
    reason: Annotated[str, typer.Argument(help="Why; other operators read it.")],
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start nothing any more; what is under way goes on, and jobs are accepted."""
    body = {"json": {"reason": reason}}
    _ask_and_show("POST", "/queue/pause", body, url, key, as_json)


@app.command()
def resume(
    url: UrlOption = None, key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """Let jobs start again; their deadlines move by the length of the pause."""
    # Many deadlines take a while to move.
    _ask_and_show("POST", "/queue/resume", {"timeout": 150}, url, key, as_json)


def _ask_and_show(
    method: str,
    path: str,
    options: dict[str, Any],
    url: str | None,
    key: str | None,
    as_json: bool,
) -> None:
    from app.terminal import print_json

    with talking(url, key) as client:
        found = client.ask(method, path, **options).json()
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(queue: Mapping[str, Any]) -> None:
    from app.terminal import console, plain

    facts: dict[str, object] = {
        "state": queue["state"],
        "since": queue["since"],
        "reason": queue["reason"],
        "paused by": queue["paused_by"],
        "pending": queue["pending"],
        "in flight": queue["in_flight"],
        "oldest": queue["oldest_pending_at"],
    }
    out = console()
    for name, value in facts.items():
        if value is not None:
            out.print(f"{name:<10} {plain(str(value))}", soft_wrap=True)
