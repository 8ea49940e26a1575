"""`mediagen webhooks`: the same from a terminal."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from typer.testing import Result

from tests.api.served import Api
from tests.api.test_webhooks import (  # noqa: F401
    NO,
    OK,
    all_in,
    api,
    arrived,
    finished_job,
    receiver,
    register,
    shared_changes,
)
from tests.contracts.scripted_server import ScriptedServer
from tests.support.command_line import run
from tests.support.hooks import verified


async def webhooks(api: Api, *words: str) -> Result:  # noqa: F811
    """Run `mediagen webhooks …` against the API."""
    return await asyncio.to_thread(run, "webhooks", *words, "--url", api.origin)


def squeezed(result: Result) -> list[str]:
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


async def test_add_prints_the_secret_alone_and_list_does_not(
    api: Api, receiver: ScriptedServer  # noqa: F811
) -> None:
    url = f"{receiver.url}/hook"

    added = await webhooks(api, "add", url, "--event", "job.failed")
    listed = await webhooks(api, "list")

    secret = added.stdout.strip()
    assert added.exit_code == 0 and secret.startswith("whsec_")
    assert f"Registered {url}; its id is " in added.stderr
    assert secret not in added.stderr + listed.output
    (row,) = squeezed(listed)[2:]
    assert row.endswith(f"enabled failed {url}")
    shown = await webhooks(api, "secret", row.split()[0])
    assert shown.stdout == added.stdout


async def test_rotate_prints_the_new_secret(api: Api) -> None:  # noqa: F811
    made = await register(api, "https://hooks.example/")

    turned = await webhooks(api, "rotate", str(made.endpoint_id))
    both = await webhooks(api, "secret", str(made.endpoint_id), "--json")

    assert json.loads(both.stdout) == {
        "secret": turned.stdout.strip(),
        "also_valid": [made.secret],
    }


async def test_the_secret_of_ones_own_url(
    api: Api, receiver: ScriptedServer  # noqa: F811
) -> None:
    await finished_job(api, webhook_url=f"{receiver.url}/own")
    (request,) = await arrived(receiver, 1)

    result = await webhooks(api, "secret")

    assert verified(request, result.stdout.strip())["type"] == "job.completed"


async def test_a_test_is_shown_and_its_failure_is_an_exit_code(
    api: Api, receiver: ScriptedServer  # noqa: F811
) -> None:
    made = await register(api, f"{receiver.url}/hook")
    receiver.will(OK, NO)

    good = await webhooks(api, "test", str(made.endpoint_id))
    bad = await webhooks(api, "test", str(made.endpoint_id))

    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert {"state delivered", "type webhook.test"} <= set(squeezed(good))
    assert any(line.startswith("try 1 It answered 500. (") for line in squeezed(bad))


async def test_disable_enable_and_bring_what_was_missed(
    api: Api, receiver: ScriptedServer  # noqa: F811
) -> None:
    made = await register(api, f"{receiver.url}/hook", "job.completed")
    endpoint = str(made.endpoint_id)
    since = datetime.now(UTC).isoformat()

    off = await webhooks(api, "disable", endpoint)
    await finished_job(api)
    (dropped,) = await all_in(api, "dropped", 1)
    refused = await webhooks(api, "redeliver", str(dropped.delivery_id))
    on = await webhooks(api, "enable", endpoint)
    words = ["redeliver", "--endpoint", endpoint, "--since", since]
    done = await webhooks(api, *words)
    await all_in(api, "delivered", 1)
    nothing = await webhooks(api, *words)
    everything = await webhooks(api, *words, "--all")

    assert f"Disabled {receiver.url}/hook" in off.stderr
    assert f"Enabled {receiver.url}/hook" in on.stderr
    assert refused.exit_code == 2 and "enable it first" in refused.stderr
    said = [one.stderr.strip() for one in (done, nothing, everything)]
    assert said == ["1 are sent again", "0 are sent again", "1 are sent again"]
    await arrived(receiver, 2)


async def test_the_log_is_a_table_and_one_of_it_is_sent_again(
    api: Api, receiver: ScriptedServer  # noqa: F811
) -> None:
    job_id = await finished_job(api, webhook_url=f"{receiver.url}/own")
    await all_in(api, "delivered", 1)

    table = await webhooks(api, "deliveries", "--state", "delivered")
    (row,) = squeezed(table)[2:]
    again = await webhooks(api, "redeliver", row.split()[0])
    empty = await webhooks(api, "deliveries", "--job", str(uuid4()))

    assert f"job.completed {job_id} It answered 204." in row
    assert again.exit_code == 0 and "state pending" in squeezed(again)
    first, second = await arrived(receiver, 2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert "There are no such webhooks." in empty.stderr


async def test_remove_is_for_good(api: Api) -> None:  # noqa: F811
    made = await register(api, "https://hooks.example/")

    gone = await webhooks(api, "remove", str(made.endpoint_id))
    again = await webhooks(api, "remove", str(made.endpoint_id))
    listed = await webhooks(api, "list")

    assert (gone.exit_code, again.exit_code) == (0, 2)
    assert "There are no endpoints." in listed.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["some-id", "--endpoint", "another"],
        ["some-id", "--all"],
        ["--endpoint", "some-id"],
    ],
)
def test_redeliver_wants_one_or_a_range(words: list[str]) -> None:
    result = run("webhooks", "redeliver", *words, "--url", "http://127.0.0.1:9")

    assert result.exit_code == 2
