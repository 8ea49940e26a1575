"""`mediagen keys`: make, look at, change and revoke API keys, with an admin's key."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli_session import JsonOption, KeyOption, UrlOption, talking

app = typer.Typer(
    help="Make, look at, change and revoke API keys (with an admin's key).",
    no_args_is_help=True,
)

_CLEARABLE = (
    "expires_at",
    *("requests_per_minute", "concurrent_jobs", "jobs_per_day"),
    *("models", "max_outputs", "max_pixels", "job_usd", "day_usd", "month_usd"),
)

KeyArgument = Annotated[str, typer.Argument(metavar="KEY_ID")]
OwnerOption = Annotated[
    str | None, typer.Option(help="Whom its jobs belong to; default: default.")
]
ScopeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--scope",
        metavar="generate|read|admin",
        help="What it may do; may be repeated. Default: generate and read.",
    ),
]
ExpiresOption = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Such as 2027-01-31T00:00:00Z; default: never."),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model", help="A model it may use; may be repeated."),
]
RequestsOption = Annotated[int | None, typer.Option(help="At most.")]
ConcurrentOption = Annotated[
    int | None, typer.Option(help="At most, not finished at once.")
]
JobsOption = Annotated[int | None, typer.Option(help="At most, in a UTC day.")]
OutputsOption = Annotated[int | None, typer.Option(help="In one job.")]
PixelsOption = Annotated[int | None, typer.Option(help="Width times height.")]
JobDollars = Annotated[
    str | None, typer.Option("--job-usd", help="What one job may cost at worst.")
]
DayDollars = Annotated[
    str | None, typer.Option("--day-usd", help="What it may spend in a UTC day.")
]
MonthDollars = Annotated[
    str | None, typer.Option("--month-usd", help="What it may spend in a UTC month.")
]
WeightOption = Annotated[
    int | None, typer.Option(help="The owner's share when owners compete, 1 to 1000.")
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    owner: OwnerOption = None,
    scope: ScopeOption = None,
    expires_at: ExpiresOption = None,
    requests_per_minute: RequestsOption = None,
    concurrent_jobs: ConcurrentOption = None,
    jobs_per_day: JobsOption = None,
    model: ModelOption = None,
    max_outputs: OutputsOption = None,
    max_pixels: PixelsOption = None,
    job_usd: JobDollars = None,
    day_usd: DayDollars = None,
    month_usd: MonthDollars = None,
    weight: WeightOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it: this is the only time it is shown."""
    from app.terminal import plain, print_json, say

    limits = _limits(
        requests_per_minute, concurrent_jobs, jobs_per_day, model, max_outputs
    )
    wanted = _given(name=name, owner=owner, scopes=scope, expires_at=expires_at)
    wanted |= _given(weight=weight, limits=limits | _given(max_pixels=max_pixels))
    wanted |= _given(budget=_budget(job_usd, day_usd, month_usd))
    with talking(url, key) as client:
        made = client.ask("POST", "/keys", json=wanted).json()
    if as_json:
        print_json(made)
        return
    print(made["key"])
    what = f"{plain(made['name'])} of {made['owner']} ({', '.join(made['scopes'])})"
    say(f"Made {what}; its id is {made['key_id']}")
    say("Keep the key: it is not shown again.")


@app.command("list")
def list_keys(
    owner: Annotated[str | None, typer.Option(help="Of this owner only.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    cursor: Annotated[
        str | None, typer.Option(help="Where the last page ended.")
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """List keys, newest first, revoked ones included."""
    from app.terminal import print_json, say
    from app.terminal_keys import show_keys

    wanted = _given(owner=owner, cursor=cursor) | {"limit": limit}
    with talking(url, key) as client:
        page = client.ask("GET", "/keys", params=wanted).json()
    if as_json:
        print_json(page)
    elif page["items"]:
        show_keys(page["items"])
        if page["next_cursor"]:
            say(f"More: the same command with --cursor {page['next_cursor']}")
    else:
        say("There are no such keys.")


@app.command()
def show(
    key_id: KeyArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show everything about a key but the key itself."""
    _ask_and_show("GET", key_id, {}, url, key, as_json)


@app.command()
def update(
    key_id: KeyArgument,
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    scope: ScopeOption = None,
    expires_at: ExpiresOption = None,
    requests_per_minute: RequestsOption = None,
    concurrent_jobs: ConcurrentOption = None,
    jobs_per_day: JobsOption = None,
    model: ModelOption = None,
    max_outputs: OutputsOption = None,
    max_pixels: PixelsOption = None,
    job_usd: JobDollars = None,
    day_usd: DayDollars = None,
    month_usd: MonthDollars = None,
    weight: WeightOption = None,
    clear: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Take a bound away; may be repeated: {', '.join(_CLEARABLE)}.",
        ),
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what is named and leave the rest."""
    limits = _limits(
        requests_per_minute, concurrent_jobs, jobs_per_day, model, max_outputs
    )
    limits |= _given(max_pixels=max_pixels)
    budget = _budget(job_usd, day_usd, month_usd)
    wanted = _given(name=name, scopes=scope, expires_at=expires_at, weight=weight)
    for word in clear or []:
        if word not in _CLEARABLE:
            text = f"{word} is none of {', '.join(_CLEARABLE)}"
            raise typer.BadParameter(text, param_hint="--clear")
        is_top, is_money = word == "expires_at", word.endswith("_usd")
        target = wanted if is_top else budget if is_money else limits
        target[word] = None
    wanted |= _given(limits=limits, budget=budget)
    if not wanted:
        raise typer.BadParameter("Say what to change: see --help.")
    _ask_and_show("PATCH", key_id, {"json": wanted}, url, key, as_json)


@app.command()
def revoke(key_id: KeyArgument, url: UrlOption = None, key: KeyOption = None) -> None:
    """End a key's life, for good.  Its jobs go on."""
    from app.client import segment
    from app.terminal import plain, say

    with talking(url, key) as client:
        client.ask("DELETE", f"/keys/{segment(key_id)}")
    say(f"Revoked {plain(key_id)}: within a second nobody lets it in")


def _ask_and_show(
    method: str,
    key_id: str,
    options: dict[str, Any],
    url: str | None,
    key: str | None,
    as_json: bool,
) -> None:
    from app.client import segment
    from app.terminal import print_json
    from app.terminal_keys import show_key

    with talking(url, key) as client:
        found = client.ask(method, f"/keys/{segment(key_id)}", **options).json()
    if as_json:
        print_json(found)
    else:
        show_key(found)


def _limits(
    requests_per_minute: int | None,
    concurrent_jobs: int | None,
    jobs_per_day: int | None,
    models: list[str] | None,
    max_outputs: int | None,
) -> dict[str, Any]:
    return _given(
        requests_per_minute=requests_per_minute,
        concurrent_jobs=concurrent_jobs,
        jobs_per_day=jobs_per_day,
        models=models,
        max_outputs=max_outputs,
    )


def _budget(job: str | None, day: str | None, month: str | None) -> dict[str, Any]:
    return _given(job_usd=job, day_usd=day, month_usd=month)


def _given(**values: Any) -> dict[str, Any]:
    """Keep what was said; an option that was not given is None, or empty."""
    return {
        name: value for name, value in values.items() if value not in (None, [], {})
    }
