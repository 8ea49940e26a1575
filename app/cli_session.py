"""What every command that talks to an API has: its options, and how trouble ends it.

What is slow to import is imported where it is used, as in `cli`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

if TYPE_CHECKING:
    from app.client import Client

FAILED, REFUSED, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130  # exit codes: see `cli`

_FALLBACK_URL = "http://127.0.0.1:8000"
_PREFIX = "/api/v1"
_REMEDIES = {
    401: "Set MEDIAGEN_API_KEY to a valid key, or pass --key.",
    403: "Use another key: MEDIAGEN_API_KEY, or --key.",
}

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="MEDIAGEN_URL",
        help="The API. Default: the one `mediagen up` runs in this folder, else "
        f"{_FALLBACK_URL}. A path is taken as the prefix of its routes.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the API's JSON instead.")
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="MEDIAGEN_API_KEY",
        help="The API key. Default: the ADMIN_API_KEY of the system `mediagen up` runs in "
        "this folder. The variable is safer: other users can see arguments.",
    ),
]
DataDirOption = Annotated[
    Path,
    typer.Option(
        "--data-dir", envvar="MEDIAGEN_DATA_DIR", help="Where `mediagen up` keeps all."
    ),
]


def running_system(data_dir: Path) -> dict[str, str]:
    """Read the environment of the system `mediagen up` keeps running on this data directory.

    It is asked of the processes whose ids are recorded there; empty when none of them lives
    or they belong to another user.
    """
    try:
        noted = json.loads((data_dir / "run.json").read_text())
        known = [(int(one["pid"]), float(one["started"])) for one in noted]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    import psutil

    from app.processes import Identity

    for pid, started in known:
        process = Identity(pid, started).find()
        try:
            environment = process.environ() if process is not None else {}
        except (psutil.Error, OSError):
            continue
        if environment.get("PORT"):
            return environment
    return {}


@contextmanager
def talking(
    url: str | None, key: str | None, *, patience: float = 0
) -> Iterator[Client]:
    """Open the API; trouble with it becomes one clear block and an exit code."""
    import httpx

    from app.client import NotOurs, Refused
    from app.terminal import plain, say

    client = _client(url, key, patience)
    try:
        with client:
            yield client
        return
    except Refused as error:
        said = f"{error} {_REMEDIES.get(error.status, '')}".rstrip()
        say(f"The API refused ({error.status}): {plain(said)}", style="red")
        for name, detail in error.fields:
            if len(error.fields) == 1 and detail in said:
                continue
            say(f"  {plain(name) or 'the body'}: {plain(detail)}")
        raise typer.Exit(REFUSED) from None
    except (httpx.ConnectError, httpx.ConnectTimeout):
        what = "No API answers at"
    except httpx.TransportError as error:
        what = f"The connection broke ({type(error).__name__}) to"
    except NotOurs:
        what = "Something other than this service answers at"
    remedy = "start it with `mediagen up`, or name another one with --url"
    say(f"{what} {client.url}: {remedy}", style="red")
    raise typer.Exit(UNREACHABLE)


def _client(url: str | None, key: str | None, patience: float) -> Client:
    import httpx

    from app.client import BadKey, Client
    from app.terminal import say

    prefix = _PREFIX
    if not url:
        data_dir = Path(os.environ.get("MEDIAGEN_DATA_DIR") or ".data")
        running = running_system(data_dir)
        url = f"http://127.0.0.1:{running['PORT']}" if running else _FALLBACK_URL
        prefix = running.get("API_V1_PREFIX") or _PREFIX
        key = key or running.get("ADMIN_API_KEY")
    elif "://" not in url:
        url = f"http://{url}"
    try:
        if urlsplit(url).path.strip("/"):
            prefix = ""
        return Client(url, prefix, key=key or None, patience=patience, say=say)
    except BadKey as error:
        raise typer.BadParameter(str(error), param_hint="--key") from None
    except (ValueError, httpx.InvalidURL) as error:
        raise typer.BadParameter(f"{url}: {error}", param_hint="--url") from None
