"""The command line and keys: which one is sent, where to, and `mediagen keys`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.keyed import ADMIN_KEY, KEYS_ON, People, keyed
from tests.support.command_line import Stub, a_problem, recorded_run, run, stub_api
from tests.test_cli import GENERATE, JOB_ID, MEDIA, PICTURE, a_completed_job, an_output

KEY = "mgs_0123456789012345678901234567890123456789abc"
BEARER = f"Bearer {KEY}"
JOBS = "GET /api/v1/jobs"
EMPTY = {"items": [], "next_cursor": None}


@pytest.fixture
def api() -> Iterator[Stub]:
    with stub_api() as server:
        yield server


@pytest.fixture
def elsewhere() -> Iterator[Stub]:
    """A server of somebody else: a bucket, for example."""
    with stub_api() as server:
        yield server


def sent(server: Stub) -> list[str | None]:
    return [headers.get("Authorization") for _, _, headers, _ in server.seen]


# ---------------------------------------------------------------------- which key, and where to


def test_the_key_of_the_environment_is_sent(api: Stub) -> None:
    api.on(JOBS, EMPTY)

    result = run("jobs", "--url", api.url, MEDIAGEN_API_KEY=KEY)

    assert result.exit_code == 0
    assert sent(api) == [BEARER]
    assert KEY not in result.output


def test_the_key_of_the_command_wins(api: Stub) -> None:
    api.on(JOBS, EMPTY)

    run("jobs", "--url", api.url, "--key", KEY, MEDIAGEN_API_KEY="another")

    assert sent(api) == [BEARER]


@pytest.mark.parametrize("given", [{}, {"MEDIAGEN_API_KEY": ""}])
def test_without_a_key_none_is_sent(api: Stub, given: dict[str, str]) -> None:
    api.on(JOBS, EMPTY)

    run("jobs", "--url", api.url, **given)

    assert sent(api) == [None]


@pytest.mark.parametrize("key", ["a b", "ключ", "a\nX-Evil: 1"])
def test_what_cannot_be_a_key_is_wrong_usage(api: Stub, key: str) -> None:
    result = run("jobs", "--url", api.url, "--key", key)

    assert result.exit_code == 2
    assert "--key" in result.stderr and key not in result.stderr
    assert api.seen == []


def test_the_system_of_this_folder_lends_its_key(api: Stub, tmp_path: Path) -> None:
    api.on(JOBS, EMPTY)
    there = {"PORT": str(api.server_port), "ADMIN_API_KEY": ADMIN_KEY}
    here = {"MEDIAGEN_DATA_DIR": str(tmp_path)}
    with recorded_run(tmp_path, **there):
        run("jobs", **here)
        run("jobs", **here, MEDIAGEN_API_KEY=KEY)
        run("jobs", "--url", api.url, **here)

    # An address that was named gets no key that was not.
    assert sent(api) == [f"Bearer {ADMIN_KEY}", BEARER, None]


@pytest.mark.parametrize("way", ["link", "redirect"])
def test_no_key_goes_to_another_origin(
    api: Stub, elsewhere: Stub, tmp_path: Path, way: str
) -> None:
    there = f"{elsewhere.url}/media/ab/abcdef0.png"
    output = an_output(url=there) if way == "link" else an_output()
    api.on(GENERATE, (202, a_completed_job(output)))
    api.on(MEDIA, (307, b"", {"Location": there}))
    elsewhere.on(MEDIA, PICTURE)

    words = ["generate", "x", "-o", str(tmp_path), "--url", api.url, "--key", KEY]
    result = run(*words)

    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.iterdir())) == 1
    assert sent(elsewhere) == [None]
    assert set(sent(api)) == {BEARER}


def test_a_file_of_the_api_itself_is_asked_for_with_the_key(
    api: Stub, tmp_path: Path
) -> None:
    api.on(GENERATE, (202, a_completed_job()))
    api.on(MEDIA, PICTURE)

    run("generate", "x", "-o", str(tmp_path), "--url", api.url, "--key", KEY)

    assert sent(api) == [BEARER, BEARER]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_one_line_with_the_remedy(api: Stub, status: int) -> None:
    api.on(JOBS, a_problem(status, "This key is not good."))

    result = run("jobs", "--url", api.url, "--key", KEY)

    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"The API refused ({status}): This key is not good. ")
    assert "MEDIAGEN_API_KEY" in line and "--key" in line
    assert KEY not in result.output


# ------------------------------------------------------------------------------ mediagen keys


@pytest.fixture
async def people(serve: Serve, sandbox: Sandbox) -> AsyncIterator[People]:  # noqa: F811
    async with keyed(await serve(sandbox, **KEYS_ON)) as people:
        yield people


async def keys(people: People, *words: str, key: str = ADMIN_KEY) -> Result:
    """Run `mediagen keys …` against the API."""
    address = ["--url", people.api.origin, "--key", key]
    return await asyncio.to_thread(run, "keys", *words, *address)


async def made(people: People, *words: str) -> dict[str, Any]:
    result = await keys(people, "create", *words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    people.api.contract.said.add(found["key"])
    return found


async def test_create_prints_the_key_alone(people: People) -> None:
    result = await keys(people, "create", "gallery", "--owner", "acme")

    secret = result.stdout.strip()
    people.api.contract.said.add(secret)
    assert result.exit_code == 0 and result.stdout == f"{secret}\n"
    assert "Made gallery of acme (generate, read); its id is " in result.stderr
    assert "not shown again" in result.stderr and secret not in result.stderr
    theirs = await asyncio.to_thread(
        run, "jobs", "--url", people.api.origin, "--key", secret
    )
    assert theirs.exit_code == 0
    assert "There are no such jobs." in theirs.stderr


async def test_create_sends_everything_that_was_said(people: People) -> None:
    options = (
        "--owner acme --scope read --scope admin --expires-at 2130-01-31T00:00:00Z "
        "--requests-per-minute 60 --concurrent-jobs 2 --jobs-per-day 3 --model a/b "
        "--model c/d --max-outputs 4 --max-pixels 5 --job-usd 0.1 --day-usd 2 "
        "--month-usd 3.5 --weight 7"
    )

    found = await made(people, "intern", *options.split())

    assert found["limits"] == {
        "requests_per_minute": 60,
        "concurrent_jobs": 2,
        "jobs_per_day": 3,
        "models": ["a/b", "c/d"],
        "max_outputs": 4,
        "max_pixels": 5,
    }
    assert found["budget"] == {"job_usd": "0.1", "day_usd": "2", "month_usd": "3.5"}
    assert found["expires_at"] == "2130-01-31T00:00:00Z"
    assert (found["name"], found["owner"], found["weight"]) == ("intern", "acme", 7)
    assert found["scopes"] == ["read", "admin"]


async def test_list_and_show_tell_everything_but_the_key(people: People) -> None:
    found = await made(people, "intern", "--owner", "acme", "--max-outputs", "4")

    table = await keys(people, "list", "--owner", "acme")
    shown = await keys(people, "show", found["key_id"])

    (row,) = table.stdout.splitlines()[2:]
    for text in (found["key_id"], found["prefix"], "live", "acme", "never", "intern"):
        assert text in row
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert {"owner acme, weight 1", "state live", "max_outputs 4"} <= set(lines)
    secret = found["key"].removeprefix(found["prefix"])
    assert secret not in table.output + shown.output
    nothing = await keys(people, "list", "--owner", "nobody")
    assert "There are no such keys." in nothing.stderr


async def test_update_changes_what_is_named(people: People) -> None:
    found = await made(people, "x", "--max-outputs", "4", "--day-usd", "2")

    options = "--name y --clear max_outputs --clear day_usd --jobs-per-day 9 --json"
    result = await keys(people, "update", found["key_id"], *options.split())

    changed = json.loads(result.stdout)
    assert changed["name"] == "y"
    assert changed["limits"] == found["limits"] | {
        "max_outputs": None,
        "jobs_per_day": 9,
    }
    assert changed["budget"]["day_usd"] is None


@pytest.mark.parametrize("words", [[], ["--clear", "owner"]])
async def test_update_with_nothing_to_do_is_wrong_usage(
    people: People, words: list[str]
) -> None:
    result = await keys(people, "update", JOB_ID, *words)

    assert result.exit_code == 2


async def test_a_revoked_key_is_shown_as_such(people: People) -> None:
    found = await made(people, "x")

    result = await keys(people, "revoke", found["key_id"])
    again = await keys(people, "revoke", found["key_id"])
    shown = await keys(people, "show", found["key_id"])

    assert (result.exit_code, again.exit_code) == (0, 0)
    assert f"Revoked {found['key_id']}" in result.stderr
    assert "revoked" in shown.stdout


async def test_a_key_without_the_scope_is_told_so(people: People) -> None:
    result = await keys(people, "list", key=people.keys["alice"].key)

    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "(403): This needs a key with the scope admin." in line
