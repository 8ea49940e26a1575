"""`mediagen webhooks`: who is told of one's jobs, how that went, and telling it again."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli_session import FAILED, JsonOption, KeyOption, UrlOption, talking

app = typer.Typer(
    help="Have receivers told of jobs by webhook, and see what became of that.",
    no_args_is_help=True,
)

EndpointArgument = Annotated[str, typer.Argument(metavar="ENDPOINT_ID")]
LimitOption = Annotated[int, typer.Option(min=1, max=100)]
CursorOption = Annotated[str | None, typer.Option(help="Where the last page ended.")]


@app.command("list")
def list_endpoints(
    limit: LimitOption = 20,
    cursor: CursorOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List endpoints, newest first."""
    from app.terminal import print_json, say
    from app.terminal_webhooks import show_endpoints

    wanted = _given(cursor=cursor) | {"limit": limit}
    with talking(url, key) as client:
        page = client.ask("GET", "/webhooks", params=wanted).json()
    if as_json:
        print_json(page)
    elif page["items"]:
        show_endpoints(page["items"])
        _say_more(page)
    else:
        say("There are no endpoints.")


@app.command()
def add(
    receiver: Annotated[
        str, typer.Argument(metavar="URL", help="https, of a public host.")
    ],
    event: Annotated[
        list[str] | None,
        typer.Option(
            metavar="job.created|job.started|job.completed|job.failed|job.cancelled",
            help="What to tell of; may be repeated. Default: everything.",
        ),
    ] = None,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Register an endpoint and print its signing secret."""
    wanted = _given(url=receiver, events=event, description=description)
    made = _ask("POST", "", url, key, json=wanted)
    _tell_secret(made, "Registered", as_json)


@app.command()
def rotate(
    endpoint_id: EndpointArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a new secret and print it; the one before signs too, for 24 hours."""
    made = _ask("POST", _at(endpoint_id, "/rotate"), url, key)
    _tell_secret(made, "A new secret for", as_json)


@app.command()
def secret(
    endpoint_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[ENDPOINT_ID]",
            help="Default: the secret of what goes to jobs' own webhook_url.",
        ),
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the secret to check signatures with."""
    from app.terminal import print_json, say

    at = "/secret" if endpoint_id is None else _at(endpoint_id, "/secret")
    found = _ask("GET", at, url, key)
    if as_json:
        print_json(found)
        return
    print(found["secret"])
    if found["also_valid"]:
        say("Another one signs too, for a while; --json shows it.")


@app.command()
def test(
    endpoint_id: EndpointArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send a test and say what came of it; exit code 1 when it did not arrive."""
    from app.terminal import print_json
    from app.terminal_webhooks import show_delivery

    found = _ask("POST", _at(endpoint_id, "/test"), url, key)
    if as_json:
        print_json(found)
    else:
        show_delivery(found)
    if found["state"] in ("failed", "dropped"):
        raise typer.Exit(FAILED)


@app.command()
def enable(
    endpoint_id: EndpointArgument, url: UrlOption = None, key: KeyOption = None
) -> None:
    """Tell an endpoint again.  What it missed: `webhooks redeliver --endpoint`."""
    _switch(endpoint_id, True, url, key)


@app.command()
def disable(
    endpoint_id: EndpointArgument, url: UrlOption = None, key: KeyOption = None
) -> None:
    """Tell an endpoint nothing more, until it is enabled."""
    _switch(endpoint_id, False, url, key)


@app.command()
def remove(
    endpoint_id: EndpointArgument, url: UrlOption = None, key: KeyOption = None
) -> None:
    """Remove an endpoint, for good."""
    from app.terminal import plain, say

    with talking(url, key) as client:
        client.ask("DELETE", f"/webhooks{_at(endpoint_id)}")
    say(f"Removed {plain(endpoint_id)}")


@app.command()
def deliveries(
    endpoint: Annotated[
        str | None, typer.Option(metavar="ENDPOINT_ID", help="To this one only.")
    ] = None,
    job: Annotated[
        str | None, typer.Option(metavar="JOB_ID", help="About this one only.")
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(metavar="pending|delivered|failed|dropped", help="Of this only."),
    ] = None,
    limit: LimitOption = 20,
    cursor: CursorOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List webhooks of the last 30 days, newest first."""
    from app.terminal import print_json, say
    from app.terminal_webhooks import show_deliveries

    wanted = _given(endpoint_id=endpoint, job_id=job, state=state, cursor=cursor)
    with talking(url, key) as client:
        answer = client.ask(
            "GET", "/webhooks/deliveries", params=wanted | {"limit": limit}
        )
    page = answer.json()
    if as_json:
        print_json(page)
    elif page["items"]:
        show_deliveries(page["items"])
        _say_more(page)
    else:
        say("There are no such webhooks.")


@app.command()
def redeliver(
    delivery_id: Annotated[
        str | None, typer.Argument(metavar="[DELIVERY_ID]", help="One of them.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="ENDPOINT_ID", help="All it missed, with --since."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Such as 2027-01-31T00:00:00Z."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Default: now.")
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Also what was delivered.")
    ] = False,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send one webhook again, or all that an endpoint missed in a time."""
    from app.client import segment
    from app.terminal import print_json, say
    from app.terminal_webhooks import show_delivery

    if (delivery_id is None) == (endpoint is None):
        raise typer.BadParameter("Name a DELIVERY_ID, or --endpoint with --since.")
    if endpoint is None:
        if since or until or all_:
            raise typer.BadParameter("--since, --until and --all go with --endpoint.")
        at = f"/deliveries/{segment(str(delivery_id))}/redeliver"
        found = _ask("POST", at, url, key)
        print_json(found) if as_json else show_delivery(found)
        return
    if since is None:
        raise typer.BadParameter("is needed with --endpoint", param_hint="--since")
    wanted = _given(since=since, until=until, all=all_)
    done = _ask("POST", _at(endpoint, "/redeliver"), url, key, json=wanted)
    if as_json:
        print_json(done)
        return
    say(f"{done['count']} are sent again")
    if done["next_since"]:
        say(f"More: the same command with --since {done['next_since']}")


def _switch(endpoint_id: str, enabled: bool, url: str | None, key: str | None) -> None:
    from app.terminal import plain, say

    found = _ask("PATCH", _at(endpoint_id), url, key, json={"enabled": enabled})
    word = "Enabled" if found["enabled"] else "Disabled"
    say(f"{word} {plain(found['url'])}")


def _ask(
    method: str, at: str, url: str | None, key: str | None, **options: Any
) -> dict[str, Any]:
    with talking(url, key) as client:
        found: dict[str, Any] = client.ask(method, f"/webhooks{at}", **options).json()
    return found


def _at(endpoint_id: str, more: str = "") -> str:
    from app.client import segment

    return f"/{segment(endpoint_id)}{more}"


def _tell_secret(made: dict[str, Any], what: str, as_json: bool) -> None:
    from app.terminal import plain, print_json, say

    if as_json:
        print_json(made)
        return
    print(made["secret"])
    say(f"{what} {plain(made['url'])}; its id is {made['endpoint_id']}")


def _say_more(page: dict[str, Any]) -> None:
    from app.terminal import say

    if page["next_cursor"]:
        say(f"More: the same command with --cursor {page['next_cursor']}")


def _given(**values: Any) -> dict[str, Any]:
    """Keep what was said; an option that was not given is None, empty or False."""
    return {name: value for name, value in values.items() if value}
