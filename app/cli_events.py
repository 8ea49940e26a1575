"""`mediagen events`: what happens to jobs, line by line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli_session import (
    FAILED,
    INTERRUPTED,
    JsonOption,
    KeyOption,
    UrlOption,
    talking,
)

if TYPE_CHECKING:
    from app.client import Event


def events(
    job_id: Annotated[
        str | None, typer.Argument(metavar="[JOB_ID]", help="Default: all jobs.")
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Begin after this event: a version of the job's, or an id.",
        ),
    ] = None,
    owner: Annotated[
        str | None, typer.Option(help="Whose jobs; for administrators.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for an API that went away.")
    ] = 60,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what happens to jobs as it happens; one job's up to its end."""
    from app.terminal import say

    status = None
    try:
        with talking(url, key, patience=patience) as client:
            for event in client.events(job_id, after=after, owner=owner):
                if as_json:
                    print(json.dumps(event), flush=True)
                elif "reason" in event:
                    say(event["message"], style="yellow")
                else:
                    print(_line(event), flush=True)
                status = event.get("status")
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if status in ("failed", "cancelled"):
        raise typer.Exit(FAILED)


def _line(event: Event) -> str:
    from app.terminal import plain

    progress = event["progress"]
    words = [
        *(event["at"], f"{event['type']:<13}", event["job_id"]),
        event["stage"] or event["status"],
        "" if progress is None else f"{progress:.0%}",
    ]
    return plain("  ".join(words)).rstrip()
