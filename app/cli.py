"""`mediagen`: the service from a terminal.

`up` and `doctor` work on this machine; the other commands talk to a running API over HTTP, here
or elsewhere.  What a script wants is on stdout (paths, ids, tables, JSON), what a person wants
to know meanwhile on stderr.

Exit codes: 0 done.  1 the job failed or was cancelled, a file arrived damaged or could not be
written, or `doctor` found something broken.  2 wrong usage, or the API refused.  3 no API to
talk to.  130 Ctrl-C.

What is slow to import is imported where it is used: `mediagen --help` answers at once.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import cli_keys, cli_webhooks
from app.cli_session import (
    FAILED,
    INTERRUPTED,
    DataDirOption,
    JsonOption,
    KeyOption,
    UrlOption,
    running_system,
    talking,
)

if TYPE_CHECKING:
    from app.client import Client, Job

_MARK_STYLES = {"✓": "green", "!": "yellow", "✗": "bold red"}
_REQUIRED = ("DATABASE_URL", "REDIS_URL", "REPLICATE_API_TOKEN")
_STATUSES = "pending, processing, completed, failed or cancelled"

app = typer.Typer(
    help="Make pictures from prompts, and look after the service that makes them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show values, and so perhaps secrets
)
app.add_typer(cli_keys.app, name="keys")
app.add_typer(cli_webhooks.app, name="webhooks")

JobArgument = Annotated[str, typer.Argument(metavar="JOB_ID")]


# ------------------------------------------------------------------------------ this machine


@app.command()
def up(
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Of the API; default: 8000 or the next."),
    ] = None,
    data_dir: DataDirOption = Path(".data"),
) -> None:
    """Run the whole system on this machine until Ctrl-C."""
    from app.up import up as run

    raise typer.Exit(run(port, data_dir))


@app.command()
def doctor(data_dir: DataDirOption = Path(".data")) -> None:
    """Check everything the service depends on, and say what to do.

    Uses the settings of the environment and `.env`; when those are incomplete, the ones of
    the system `mediagen up` runs in this folder.
    """
    from app.core.config import Settings, load_settings
    from app.doctor import Mark, examine
    from app.terminal import console, plain, say

    running = {}
    if not all(os.environ.get(name) for name in _REQUIRED):
        running = running_system(data_dir)
    if running:
        say(f"Settings: those of the system running in {data_dir}")
    names = {name.upper(): name for name in Settings.model_fields}
    values: dict[str, Any] = {
        names[name]: value for name, value in running.items() if name in names
    }
    findings = examine(lambda: load_settings(lambda: Settings(**values)))
    out = console()
    for one in findings:
        took = f"{one.seconds * 1000:.0f} ms"
        out.print(one.mark, style=_MARK_STYLES[one.mark], end=" ")
        out.print(f"{one.name:<12} {took:>7}  {plain(one.text)}", soft_wrap=True)
    raise typer.Exit(FAILED if any(one.mark is Mark.BROKEN for one in findings) else 0)


# -------------------------------------------------------------------------------- over HTTP


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where files go.")
    ] = Path("."),
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="owner/name[:version].")
    ] = None,
    num_outputs: Annotated[int | None, typer.Option("--num-outputs", "-n")] = None,
    aspect_ratio: Annotated[str | None, typer.Option(help="Such as 16:9.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", help="png, jpg, webp or avif.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An input of the model; JSON or text. KEY=@FILE uploads a picture.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="A picture to start from, for the model's first input that takes one.",
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for the files.")
    ] = True,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for an API that went away.")
    ] = 60,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make pictures and save them in a folder."""
    from app.attachments import attach
    from app.terminal import plain, print_json, say

    parameters, files = _parameters(param or [])
    attached = [(None, path) for path in image or []] + files
    wanted: dict[str, Any] = {
        "prompt": prompt,
        "model": model,
        "num_outputs": num_outputs,
        "aspect_ratio": aspect_ratio,
        "width": width,
        "height": height,
        "seed": seed,
        "output_format": output_format,
        "parameters": parameters or None,
    }
    if wait:
        _make_folder(folder)  # before anything is bought
    with talking(url, key, patience=patience) as client:
        if attached:
            wanted["parameters"] = parameters | attach(client, model, attached)
        given = {name: value for name, value in wanted.items() if value is not None}
        accepted = client.generate(given)
        job = accepted.json()
        for warning in job["warnings"]:
            say(f"Note: {plain(warning)}")
        if wait:
            etag = accepted.headers.get("etag")
            with _leaving(job, url):
                _see_through(client, job, etag, folder, as_json)
            return
    if as_json:
        print_json(job)
    else:
        print(job["job_id"])
        say(f"Accepted; see it with: {_look_at(job, url)}")


@app.command()
def status(
    job_id: JobArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a job stands."""
    with talking(url, key) as client:
        _show(client, client.status(job_id).json(), as_json)


@app.command()
def jobs(
    status: Annotated[str | None, typer.Option(help=f"{_STATUSES}.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m")] = None,
    q: Annotated[str | None, typer.Option("-q", help="Part of the prompt.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    cursor: Annotated[
        str | None, typer.Option(help="Where the last page ended.")
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    from app.terminal import print_json, say, show_table

    wanted = {
        "status": status,
        "model": model,
        "q": q,
        "limit": limit,
        "cursor": cursor,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    with talking(url, key) as client:
        page = client.ask("GET", "/jobs", params=given).json()
    if as_json:
        print_json(page)
    elif page["items"]:
        show_table(page["items"])
        if page["next_cursor"]:
            say(f"More: the same command with --cursor {page['next_cursor']}")
    else:
        say("There are no such jobs.")


@app.command()
def cancel(
    job_id: JobArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a job early.  A finished one stays as it is."""
    from app.terminal import say

    with talking(url, key) as client:
        job = client.verb(job_id, "cancel")
        _show(client, job, as_json)
    if job["stage"] is not None:
        say("Asked for; the job ends as soon as the provider agrees.")


@app.command()
def retry(
    job_id: JobArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a finished job again, as a new job."""
    with talking(url, key) as client:
        _show(client, client.verb(job_id, "retry"), as_json)


@app.command()
def usage(
    by: Annotated[
        str,
        typer.Option(help="day, model, key or owner; several with commas between."),
    ] = "day",
    first: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="DAY", help="First UTC day; 30 days by default."
        ),
    ] = None,
    last: Annotated[
        str | None,
        typer.Option("--to", metavar="DAY", help="Last UTC day; today by default."),
    ] = None,
    owner: Annotated[
        str | None, typer.Option(help="Whose jobs; for administrators.")
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was made, what it cost, and what budgets have left."""
    from app.terminal import print_json
    from app.terminal_usage import show_usage

    wanted = {"by": by, "from": first, "to": last, "owner": owner}
    given = {name: value for name, value in wanted.items() if value is not None}
    with talking(url, key) as client:
        found = client.ask("GET", "/usage", params=given).json()
    if as_json:
        print_json(found)
    else:
        show_usage(found)


def _see_through(
    client: Client, job: Job, etag: str | None, folder: Path, as_json: bool
) -> None:
    """Follow a job to its end and save its files; anything less is `FAILED`."""
    from app.terminal import plain, print_json, progress, say

    with progress() as tell:
        job = client.follow(job, etag, tell)
    if as_json:
        print_json(job)
    if job["status"] != "completed":
        error = job["error"]
        why = f": {plain(error['message'])} ({error['code']})" if error else ""
        what = "failed" if job["status"] == "failed" else "was cancelled"
        say(f"The job {what}{why}", style="red")
        raise typer.Exit(FAILED)
    is_whole = True
    try:
        for path, output in client.download(job, folder):
            if path is not None:
                print(path, file=sys.stderr if as_json else sys.stdout)
                continue
            is_whole = False
            say(
                f"Output {output['index']} arrived damaged twice and was thrown away: size "
                f"or sha256 are not as announced: {client.address_of(output)}",
                style="red",
            )
    except OSError as error:
        say(f"Cannot write to {folder}: {error.strerror}", style="red")
        raise typer.Exit(FAILED) from None
    if not is_whole:
        raise typer.Exit(FAILED)


@contextmanager
def _leaving(job: Job, url: str | None) -> Iterator[None]:
    """On Ctrl-C, say that only we end."""
    from app.terminal import say

    try:
        yield
    except KeyboardInterrupt:
        say(f"The job goes on without us; see it with: {_look_at(job, url)}")
        raise typer.Exit(INTERRUPTED) from None


def _show(client: Client, job: Job, as_json: bool) -> None:
    from app.terminal import print_json, show_job

    if as_json:
        print_json(job)
    else:
        show_job(job, [client.address_of(output) for output in job["outputs"]])


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"{folder} cannot be made: {error.strerror}"
        raise typer.BadParameter(text, param_hint="--output") from None


def _parameters(
    words: list[str],
) -> tuple[dict[str, Any], list[tuple[str | None, Path]]]:
    """Read KEY=VALUE words: values (what is not JSON is text), and the files of KEY=@FILE."""
    found: dict[str, Any] = {}
    files: list[tuple[str | None, Path]] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{word} is not KEY=VALUE", param_hint="--param")
        if value.startswith("@"):
            path = Path(value[1:])
            if not path.is_file() or not os.access(path, os.R_OK):
                text = f"{path} is no file that can be read"
                raise typer.BadParameter(text, param_hint="--param")
            files.append((name, path))
            continue
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found, files


def _look_at(job: Job, url: str | None) -> str:
    return f"mediagen status {job['job_id']}" + (f" --url {url}" if url else "")


def main() -> None:
    """Run the command line; the console script's entry."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ✓
    try:
        app()
    except SystemExit as end:
        _leave_stuck_threads(end)
        raise


def _leave_stuck_threads(end: SystemExit) -> None:
    """End at once when a check was given up while its thread hangs in a system call.

    Python would wait for that thread before it ends.
    """
    others = (thread for thread in threading.enumerate() if not thread.daemon)
    if any(thread is not threading.main_thread() for thread in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else FAILED)


if __name__ == "__main__":
    main()
