"""Webhooks out, as their owners meet them: register, be told, look at the log, ask again."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from app.core.guarded_http import GuardedSessions
from app.models.webhook_schemas import Delivery, EndpointPage, NewEndpoint
from app.services import outbound
from app.services.gatekeeper import BELIEVED
from app.services.receivers import MOST_ENDPOINTS
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON, keyed
from tests.api.served import Api, check_problem, working
from tests.api.test_metrics import scrape, value
from tests.contracts.scripted_server import Request, ScriptedServer, answer, hang
from tests.support.hooks import Hooks, ids_of, verified
from tests.support.waiting import wait_for_async

HOOKS = "/api/v1/webhooks"
LOG = "/api/v1/webhooks/deliveries"
PROMPT = "a mill by the river"
OK, NO = answer(204), answer(500)
NPM = Path(__file__).parents[1] / "contracts" / "npm"


@pytest.fixture(scope="module")
async def receiver() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer([OK]) as server:
        yield server


@pytest.fixture(scope="module")
def shared_changes(receiver: ScriptedServer) -> dict[str, Any]:
    return {"outbound_hosts": (f"127.0.0.1:{receiver.port}",)}


@pytest.fixture
async def api(
    shared: Api, shared_sandbox: Sandbox, receiver: ScriptedServer
) -> AsyncIterator[Api]:
    """The shared API, emptied, and then a worker."""
    receiver.will(OK)
    api = await emptied(shared, shared_sandbox)
    async with working(api.settings):
        yield api


@pytest.fixture
def hooks(api: Api) -> Hooks:
    return Hooks(api.app.state.runtime.database)


async def register(api: Api, url: str, *events: str, **more: Any) -> NewEndpoint:
    body = {"url": url, "events": events} | more
    answered = await api.client.post(HOOKS, json=body)
    assert answered.status_code == 201, answered.text
    return NewEndpoint.model_validate_json(answered.content)


async def arrived(receiver: ScriptedServer, count: int) -> list[Request]:
    async def are() -> bool:
        return len(receiver.requests) >= count

    await wait_for_async(are, within=20, what=f"{count} webhooks")
    return receiver.requests


async def logged(api: Api, **query: Any) -> list[Delivery]:
    answered = await api.client.get(LOG, params=query)
    assert answered.status_code == 200, answered.text
    return [Delivery.model_validate(one) for one in answered.json()["items"]]


async def all_in(api: Api, state: str, count: int) -> list[Delivery]:
    """Wait until so many webhooks are in a state, and give all of these."""

    async def are() -> list[Delivery] | None:
        found = await logged(api, state=state, limit=100)
        return found if len(found) == count else None

    return await wait_for_async(are, within=20, what=f"{count} {state}")


async def finished_job(api: Api, **fields: Any) -> UUID:
    """Make a job and wait for its end."""
    job = await api.generate(PROMPT, **fields)
    await api.finished(job.job_id)
    return job.job_id


# ------------------------------------------------------------------------------ endpoints


async def test_an_endpoint_is_registered_read_changed_and_removed(api: Api) -> None:
    made = await register(
        api, "https://hooks.example/a?b=%20", "job.failed", description="the shop"
    )
    at = f"{HOOKS}/{made.endpoint_id}"

    read = (await api.client.get(at)).json()
    changed = await api.client.patch(
        at, json={"events": [], "enabled": False, "url": "https://other.example/"}
    )
    again = await api.client.patch(at, json={"description": "shut"})
    gone = await api.client.delete(at)

    assert made.secret.startswith("whsec_") and len(made.secret) > 40
    assert (made.url, made.events) == ("https://hooks.example/a?b=%20", ["job.failed"])
    assert (made.owner, made.enabled, made.description) == ("default", True, "the shop")
    assert made.secret not in json.dumps(read) and read["url"] == made.url
    assert (changed.json()["enabled"], changed.json()["events"]) == (False, [])
    assert again.json()["url"] == "https://other.example/"
    assert again.json()["description"] == "shut"
    assert gone.status_code == 204
    for method in ("GET", "PATCH", "DELETE"):
        body = {"json": {}} if method == "PATCH" else {}
        assert (await api.client.request(method, at, **body)).status_code == 404


@pytest.mark.parametrize("name", ["secret", "deliveries"])
async def test_the_neighbours_of_endpoints_are_none(api: Api, name: str) -> None:
    answered = await api.client.patch(f"{HOOKS}/{name}", json={"enabled": False})

    assert (answered.status_code, answered.headers["allow"]) == (405, "GET")


async def test_the_answer_says_where_it_is(api: Api) -> None:
    answered = await api.client.post(HOOKS, json={"url": "https://hooks.example/"})

    found = await api.client.get(answered.headers["location"])
    assert found.json()["endpoint_id"] == answered.json()["endpoint_id"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "url"),
        ({"url": "ftp://hooks.example/"}, "url"),
        ({"url": "http://hooks.example/"}, "url"),
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": "https://user:pass@hooks.example/"}, "url"),
        ({"url": "https://hooks.example/" + "x" * 3000}, "url"),
        ({"url": "https://hooks.example/", "events": ["job.progress"]}, "events"),
        ({"url": "https://hooks.example/", "events": ["job.failed"] * 2}, "events"),
        ({"url": "https://hooks.example/", "description": "x" * 201}, "description"),
        ({"url": "https://hooks.example/", "secret": "whsec_mine"}, "secret"),
    ],
)
async def test_what_cannot_be_registered_is_refused_by_name(
    api: Api, body: dict[str, Any], param: str
) -> None:
    answered = await api.client.post(HOOKS, json=body)

    assert answered.status_code == 422
    assert check_problem(answered).error.param == param
    assert (await api.client.get(HOOKS)).json()["items"] == []


async def test_a_change_is_checked_like_a_registration(api: Api) -> None:
    made = await register(api, "https://hooks.example/")
    at = f"{HOOKS}/{made.endpoint_id}"

    for body in (
        {"url": "https://127.0.0.1/"},
        {"url": None},
        {"enabled": None},
        {"enabled": 0},
        {"events": ["job.other"]},
        {"owner": "somebody"},
    ):
        assert (await api.client.patch(at, json=body)).status_code == 422, body
    assert (await api.client.get(at)).json()["url"] == made.url


class SlowNames(AbstractResolver):
    """A caller's name server, which answers when the caller likes."""

    def __init__(self) -> None:
        self.is_asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def resolve(self, host: str, *more: Any) -> list[ResolveResult]:
        self.is_asked.set()
        await self.may_answer.wait()
        raise OSError

    async def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("is_new", [True, False])
async def test_a_key_that_is_revoked_while_a_name_is_looked_up_changes_nothing(
    serve: Serve, sandbox: Sandbox, is_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "LOOKUP_PATIENCE", timedelta(seconds=30))
    api: Api = await serve(sandbox, **KEYS_ON)
    names = SlowNames()
    async with keyed(api) as people, asyncio.timeout(40):
        body = {"url": "https://93.184.216.34/hook"}
        made = await people.alice.post(HOOKS, json=body)
        at = f"{HOOKS}/{made.json()['endpoint_id']}"
        sessions = GuardedSessions(max_connections=1, resolver=names)
        api.app.state.runtime.outbound.sessions = sessions
        change = {"url": "https://slow.example.com/hook"}
        ask = people.alice.post(HOOKS, json=change)
        if not is_new:
            ask.close()
            ask = people.alice.patch(at, json=change)
        asking = asyncio.create_task(ask)
        await names.is_asked.wait()
        await people.admin.delete(f"/api/v1/keys/{people.keys['alice'].key_id}")
        await asyncio.sleep(BELIEVED.total_seconds())
        names.may_answer.set()

        assert (await asking).status_code == 401

        found = (await people.admin.get(HOOKS)).json()["items"]
        assert [one["url"] for one in found] == [body["url"]]


async def test_endpoints_are_listed_page_by_page_newest_first(api: Api) -> None:
    made = [await register(api, f"https://hooks.example/{n}") for n in range(5)]

    pages, cursor = [], None
    while True:
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        answered = await api.client.get(HOOKS, params=query)
        page = EndpointPage.model_validate_json(answered.content)
        pages.append([one.endpoint_id for one in page.items])
        if (cursor := page.next_cursor) is None:
            break

    newest = [one.endpoint_id for one in reversed(made)]
    assert pages == [newest[:2], newest[2:4], newest[4:]]


async def test_there_are_fifty_endpoints_and_no_more(api: Api, hooks: Hooks) -> None:
    for _ in range(MOST_ENDPOINTS - 1):
        await hooks.register("https://hooks.example/")

    both = await asyncio.gather(
        *(
            api.client.post(HOOKS, json={"url": "https://hooks.example/"})
            for _ in range(2)
        )
    )

    assert sorted(one.status_code for one in both) == [201, 409]
    refused = max(both, key=lambda one: one.status_code)
    assert check_problem(refused).code == "too_many_endpoints"


async def test_a_secret_is_rotated_and_both_are_told_for_a_day(api: Api) -> None:
    made = await register(api, "https://hooks.example/")
    at = f"{HOOKS}/{made.endpoint_id}"
    before = (await api.client.get(f"{at}/secret")).json()

    turned = NewEndpoint.model_validate_json(
        (await api.client.post(f"{at}/rotate")).content
    )
    after = (await api.client.get(f"{at}/secret")).json()

    assert before == {"secret": made.secret, "also_valid": []}
    assert after == {"secret": turned.secret, "also_valid": [made.secret]}
    assert turned.previous_secret_until is not None
    ahead = turned.previous_secret_until - datetime.now(UTC)
    assert timedelta(hours=23) < ahead <= timedelta(hours=24)


# ------------------------------------------------------------------------- being told


async def test_a_job_is_told_of_from_its_birth_to_its_picture(
    api: Api, receiver: ScriptedServer
) -> None:
    endpoint = await register(api, f"{receiver.url}/hook")
    job = await api.generate(PROMPT, metadata={"order": 7})
    done = await api.finished(job.job_id)

    bodies = [
        verified(request, endpoint.secret) for request in await arrived(receiver, 3)
    ]

    by_type = {body["type"]: body["data"] for body in bodies}
    assert set(by_type) == {"job.created", "job.started", "job.completed"}
    versions = [by_type[name]["version"] for name in sorted(by_type)]
    assert by_type["job.created"]["version"] == 1
    assert max(versions) == by_type["job.completed"]["version"] == done.version
    told = by_type["job.completed"]
    assert told["status"] == "completed" and told["metadata"] == {"order": 7}
    assert told["job_id"] == str(job.job_id)
    status = await api.client.get(told["links"]["status"])
    assert status.json()["version"] == told["version"]
    (output,) = told["outputs"]
    picture = await api.client.get(output["url"])
    assert picture.status_code == 200
    assert len(picture.content) == output["size_bytes"]
    assert PROMPT not in str(bodies)
    assert all(one.state == "delivered" for one in await logged(api))


async def test_webhook_url_is_called_at_the_end_and_signed_for_its_owner(
    api: Api, receiver: ScriptedServer
) -> None:
    job = await api.generate(PROMPT, webhook_url=f"{receiver.url}/own?to=me")
    assert job.warnings == []
    await api.finished(job.job_id)

    (request,) = await arrived(receiver, 1)

    secrets = (await api.client.get(f"{HOOKS}/secret")).json()
    body = verified(request, secrets["secret"])
    assert (body["type"], request.target) == ("job.completed", "/own?to=me")
    (found,) = await all_in(api, "delivered", 1)
    assert (found.endpoint_id, found.url) == (None, f"{receiver.url}/own?to=me")
    assert found.job_id == job.job_id


async def test_slow_receivers_keep_no_picture_waiting(
    api: Api, receiver: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.courier.PATIENCE", timedelta(seconds=3))
    receiver.will(hang())
    for number in range(2):
        await register(api, f"{receiver.url}/{number}")
    for _ in range(4):
        await api.generate(PROMPT)
    await arrived(receiver, 8)

    job = await api.finished((await api.generate(PROMPT)).job_id)

    assert job.status == "completed"
    assert await logged(api, state="delivered") == []


async def test_a_test_says_what_came_of_it(api: Api, receiver: ScriptedServer) -> None:
    made = await register(api, f"{receiver.url}/hook", "job.failed")
    receiver.will(OK, NO)

    good = await api.client.post(f"{HOOKS}/{made.endpoint_id}/test")
    bad = await api.client.post(f"{HOOKS}/{made.endpoint_id}/test")

    assert (good.status_code, good.json()["state"]) == (200, "delivered")
    assert [one["status_code"] for one in good.json()["tries"]] == [204]
    assert (bad.status_code, bad.json()["state"]) == (200, "failed")
    (tried,) = bad.json()["tries"]
    assert (tried["status_code"], tried["error"]) == (500, "It answered 500.")
    body = verified(receiver.requests[0], made.secret)
    assert body["type"] == good.json()["type"] == "webhook.test"
    assert receiver.requests[0].headers["webhook-id"] == good.json()["webhook_id"]


async def test_a_test_that_takes_long_is_on_its_way(
    api: Api, receiver: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.webhooks.TEST_PATIENCE", timedelta(milliseconds=1))
    monkeypatch.setattr("app.services.courier.PATIENCE", timedelta(seconds=1))
    receiver.will(hang())
    made = await register(api, f"{receiver.url}/hook", "job.failed")

    answered = await api.client.post(f"{HOOKS}/{made.endpoint_id}/test")

    assert (answered.status_code, answered.json()["state"]) == (202, "pending")
    (found,) = await all_in(api, "failed", 1)
    assert found.tries[0].error == "No answer in time."


# ------------------------------------------------------------------------- the log


async def test_the_log_is_filtered_and_paged(
    api: Api, receiver: ScriptedServer
) -> None:
    one = await register(api, f"{receiver.url}/one", "job.completed")
    two = await register(api, f"{receiver.url}/two", "job.completed", "job.created")
    jobs = [await finished_job(api) for _ in range(2)]
    await all_in(api, "delivered", 6)

    assert len(await logged(api, endpoint_id=one.endpoint_id)) == 2
    assert len(await logged(api, endpoint_id=two.endpoint_id)) == 4
    about = await logged(api, job_id=jobs[0])
    assert {found.job_id for found in about} == {jobs[0]} and len(about) == 3
    assert await logged(api, state="failed") == []
    assert await logged(api, job_id=uuid4()) == []
    everything = [found.delivery_id for found in await logged(api)]
    first = (await api.client.get(LOG, params={"limit": 4})).json()
    rest = (
        await api.client.get(LOG, params={"limit": 4, "cursor": first["next_cursor"]})
    ).json()
    paged = [UUID(found["delivery_id"]) for found in first["items"] + rest["items"]]
    assert paged == everything and rest["next_cursor"] is None
    moments = [found.created_at for found in await logged(api)]
    assert moments == sorted(moments, reverse=True)


@pytest.mark.parametrize(
    "query",
    [
        {"state": "odd"},
        {"cursor": "odd"},
        {"limit": "0"},
        {"job_id": "odd"},
        {"endpoint_id": "odd"},
    ],
)
async def test_odd_questions_of_the_log_are_refused(
    api: Api, query: dict[str, str]
) -> None:
    answered = await api.client.get(LOG, params=query)

    assert answered.status_code == 400
    assert check_problem(answered).error.param == next(iter(query))


async def test_one_is_sent_again_under_its_id(
    api: Api, receiver: ScriptedServer
) -> None:
    await finished_job(api, webhook_url=f"{receiver.url}/own")
    (found,) = await all_in(api, "delivered", 1)
    at = f"{LOG}/{found.delivery_id}"

    answered = await api.client.post(f"{at}/redeliver")

    assert answered.status_code == 202
    first, second = await arrived(receiver, 2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.headers["webhook-id"] == found.webhook_id

    async def is_done() -> bool:
        now = Delivery.model_validate_json((await api.client.get(at)).content)
        return now.state == "delivered" and [t.number for t in now.tries] == [1, 2]

    await wait_for_async(is_done, within=20, what="both tries are in the log")


async def test_what_would_go_nowhere_is_not_sent_again(
    api: Api, receiver: ScriptedServer
) -> None:
    made = await register(api, f"{receiver.url}/hook", "job.completed")
    await finished_job(api)
    (found,) = await all_in(api, "delivered", 1)
    again = f"{LOG}/{found.delivery_id}/redeliver"
    at = f"{HOOKS}/{made.endpoint_id}"
    since = {"since": "2026-01-01T00:00:00Z"}

    await api.client.patch(at, json={"enabled": False})
    off = await api.client.post(again)
    range_off = await api.client.post(f"{at}/redeliver", json=since)
    await api.client.delete(at)
    gone = await api.client.post(again)
    range_gone = await api.client.post(f"{at}/redeliver", json=since)
    unknown = await api.client.post(f"{LOG}/{uuid4()}/redeliver")

    assert [off.status_code, range_off.status_code] == [409, 409]
    assert "enable it first" in check_problem(off).detail
    assert (gone.status_code, range_gone.status_code) == (409, 404)
    assert unknown.status_code == 404
    (kept,) = await logged(api)
    assert (kept.url, kept.endpoint_id) == (None, made.endpoint_id)
    assert len(receiver.requests) == 1


async def test_a_range_brings_what_was_missed_in_order_and_once(
    api: Api, receiver: ScriptedServer
) -> None:
    made = await register(api, f"{receiver.url}/hook", "job.completed")
    at = f"{HOOKS}/{made.endpoint_id}"
    before = await finished_job(api)
    await all_in(api, "delivered", 1)
    await api.client.patch(at, json={"enabled": False})
    since = datetime.now(UTC).isoformat()
    missed = [await finished_job(api) for _ in range(3)]
    await all_in(api, "dropped", 3)
    await api.client.patch(at, json={"enabled": True})

    answered = await api.client.post(f"{at}/redeliver", json={"since": since})

    assert (answered.status_code, answered.json()) == (
        202,
        {"count": 3, "next_since": None},
    )
    await all_in(api, "delivered", 4)
    told = [verified(request, made.secret) for request in receiver.requests]
    assert [UUID(body["data"]["job_id"]) for body in told][0] == before
    assert {UUID(body["data"]["job_id"]) for body in told} == {before, *missed}
    assert set(ids_of(receiver.requests).values()) == {1}
    everything = {"since": "2026-01-01T00:00:00Z", "all": True}
    again = await api.client.post(f"{at}/redeliver", json=everything)
    assert again.json()["count"] == 4
    await arrived(receiver, 8)
    assert set(ids_of(receiver.requests).values()) == {2}


async def test_a_deleted_job_is_told_of_and_its_log_stays(
    api: Api, receiver: ScriptedServer, hooks: Hooks
) -> None:
    receiver.will(NO)
    job_id = await finished_job(api, webhook_url=f"{receiver.url}/own")
    await arrived(receiver, 1)
    assert (await api.client.delete(f"/api/v1/jobs/{job_id}")).status_code == 204

    async def is_settled() -> bool:
        (row,) = await hooks.written()
        return row.claim_token is None and row.attempts == 1

    await wait_for_async(is_settled, within=20, what="the first try is over")
    receiver.will(OK)
    await hooks.make_due()

    (found,) = await all_in(api, "delivered", 1)
    assert found.job_id == job_id
    body = json.loads(receiver.requests[-1].body)
    assert body["data"]["status"] == "completed"


async def test_webhooks_are_counted(api: Api, receiver: ScriptedServer) -> None:
    await finished_job(api, webhook_url=f"{receiver.url}/own")
    await all_in(api, "delivered", 1)
    receiver.will(NO)
    await finished_job(api, webhook_url=f"{receiver.url}/own")

    async def are() -> bool:
        api.app.state.figures = None
        found = await scrape(api)
        counted = [
            value(found, "mgs_webhook_deliveries_total", outcome=outcome)
            for outcome in ("delivered", "retried")
        ]
        depth = value(found, "mgs_webhook_queue_depth")
        return counted[0] == 1 and counted[1] >= 1 and depth == 1

    await wait_for_async(are, within=20, what="the figures", every=0.2)


# ---------------------------------------------------------- the libraries of others


@pytest.mark.npm
async def test_the_library_of_npm_believes_what_arrives(
    api: Api, receiver: ScriptedServer
) -> None:
    endpoint = await register(api, f"{receiver.url}/hook", "job.completed")
    at = f"{HOOKS}/{endpoint.endpoint_id}"
    turned = (await api.client.post(f"{at}/rotate")).json()["secret"]
    await finished_job(api, metadata={"name": "Zoë ✓"})
    (request,) = await arrived(receiver, 1)
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed; install it, then `make npm`")
    if not (NPM / "node_modules" / "standardwebhooks").exists():
        pytest.skip("the npm package is not there; get it with `make npm`")
    letter = {
        "headers": dict(request.headers),
        "body": request.body.decode(),
        "secrets": [turned, endpoint.secret],
    }

    process = await asyncio.create_subprocess_exec(
        node,
        "check_webhook.mjs",
        cwd=NPM,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate(json.dumps(letter).encode())

    assert process.returncode == 0, said.decode()
    assert json.loads(said) == {
        "types": ["job.completed", "job.completed"],
        "refused": 3,
    }
