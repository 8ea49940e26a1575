"""The page of webhooks, without scripts: what its forms do, and for whom."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.keyed import ADMIN_KEY, People
from tests.api.served import Api, working
from tests.contracts.scripted_server import ScriptedServer, answer
from tests.support.hooks import Hooks, verified
from tests.support.waiting import wait_for_async
from tests.web.browsing import browsing
from tests.web.reader import Reader, words_of

OK, NO = answer(204), answer(500)
SECRET = re.compile(r"whsec_[\w+/=]+")


@pytest.fixture(scope="module")
async def receiver() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer([OK]) as server:
        yield server


@pytest.fixture(scope="module")
def shared_changes(receiver: ScriptedServer) -> dict[str, Any]:
    return {"outbound_hosts": (f"127.0.0.1:{receiver.port}",)}


@pytest.fixture(scope="module")
async def running(shared: Api) -> AsyncIterator[None]:
    """A worker for all tests of the module."""
    async with working(shared.settings):
        yield


@pytest.fixture
async def api(
    shared: Api, shared_sandbox: Sandbox, running: None, receiver: ScriptedServer
) -> Api:
    receiver.will(OK)
    return await emptied(shared, shared_sandbox)


@pytest.fixture
def hooks(api: Api) -> Hooks:
    return Hooks(api.app.state.runtime.database)


@pytest.fixture
async def reader(api: Api) -> AsyncIterator[Reader]:
    async with browsing(api) as browser:
        yield Reader(browser)


async def listed(api: Api) -> list[dict[str, Any]]:
    """Read the endpoints there are."""
    items: list[dict[str, Any]] = (await api.client.get("/api/v1/webhooks")).json()[
        "items"
    ]
    return items


# ------------------------------------------------------------------------------ endpoints


async def test_an_endpoint_is_added_and_its_secret_shown_once(
    api: Api, reader: Reader
) -> None:
    await reader.open("/webhooks")
    made = await reader.browser.post(
        "/ui/webhooks",
        {
            "url": "https://hooks.example/shop",
            "description": "the  shop",
            "events": ["job.failed", "job.completed"],
        },
    )
    (endpoint,) = await listed(api)

    assert (endpoint["url"], endpoint["description"]) == (
        "https://hooks.example/shop",
        "the shop",
    )
    assert endpoint["events"] == ["job.completed", "job.failed"]
    (secret,) = SECRET.findall(made.text)
    kept = await api.client.get(f"/api/v1/webhooks/{endpoint['endpoint_id']}/secret")
    assert kept.json()["secret"] == secret
    api.contract.said.add(secret)
    assert "https://hooks.example/shop" in await reader.open("/webhooks")
    assert secret not in reader.text


@pytest.mark.parametrize(
    "url", ["", "hooks.example", "ftp://hooks.example/", "http://127.0.0.1:1/x"]
)
async def test_an_address_that_will_not_do_is_told_beside_the_field(
    api: Api, reader: Reader, url: str
) -> None:
    for htmx in (False, True):
        await reader.open("/webhooks")
        send = reader.browser.htmx if htmx else reader.browser.post
        refused = await send("/ui/webhooks", {"url": url, "description": "the shop"})

        assert refused.status_code == (200 if htmx else 422)
        assert 'aria-invalid="true"' in refused.text
        assert 'value="the shop"' in refused.text
        assert ("<html" in refused.text) is not htmx
    assert await listed(api) == []


async def test_an_endpoint_is_disabled_enabled_given_a_new_secret_and_removed(
    api: Api, reader: Reader, hooks: Hooks
) -> None:
    made = await hooks.register("https://hooks.example/")
    at = f"/ui/webhooks/{made.id}"
    await reader.open("/webhooks")

    await reader.send(f"{at}/disable")
    assert "The endpoint is disabled." in reader.text
    assert not (await hooks.endpoint(made.id)).is_enabled
    await reader.send(f"{at}/enable")
    assert (await hooks.endpoint(made.id)).is_enabled
    rotated = await reader.send(f"{at}/rotate")
    (secret,) = SECRET.findall(rotated.text)
    assert secret == (await hooks.endpoint(made.id)).secret != made.secret
    assert "Two secrets sign until" in words_of(rotated.text)
    await reader.send(f"{at}/remove")
    assert "The endpoint is removed." in reader.text
    assert await listed(api) == []


@pytest.mark.parametrize(
    ("reaction", "said"),
    [(OK, "The test: answered 204, after"), (NO, "The test: answered 500, after")],
)
@pytest.mark.parametrize("htmx", [False, True])
async def test_a_test_tells_what_came_of_it(
    reader: Reader,
    hooks: Hooks,
    receiver: ScriptedServer,
    reaction: Any,
    said: str,
    htmx: bool,
) -> None:
    receiver.will(reaction)
    made = await hooks.register(receiver.url)
    await reader.open("/webhooks")
    answered = await reader.send(f"/ui/webhooks/{made.id}/test", htmx=htmx)

    text = words_of(answered.text) if htmx else reader.text
    assert said in text
    (call,) = receiver.requests
    assert verified(call, made.secret)["type"] == "webhook.test"


# -------------------------------------------------------------------------------- the log


async def test_the_log_shows_each_try_and_sends_again(
    api: Api, reader: Reader, hooks: Hooks, receiver: ScriptedServer
) -> None:
    receiver.will(NO, OK)
    made = await hooks.register(receiver.url)
    await reader.open("/webhooks")
    await reader.send(f"/ui/webhooks/{made.id}/test")
    (row,) = await hooks.written()
    said = await reader.open("/webhooks")
    assert "Failed webhook.test" in said
    assert "1 try · last answer 500" in said

    await reader.send(f"/ui/deliveries/{row.id}/redeliver")
    assert "It is sent again now." in reader.text

    async def is_delivered() -> bool:
        return "Delivered webhook.test" in await reader.open("/webhooks")

    await wait_for_async(is_delivered, within=20, what="it is delivered")
    assert "2 tries · last answer 204" in reader.text


async def test_what_did_not_arrive_is_sent_again_by_the_range(
    api: Api, reader: Reader, hooks: Hooks, receiver: ScriptedServer
) -> None:
    made = await hooks.register(receiver.url, "job.created")
    await hooks.change(made.id, is_enabled=False)
    await hooks.change(made.id, is_enabled=True)
    job = await api.generate("a lamp in a window far away")
    await api.finished(job.job_id)

    async def is_delivered() -> bool:
        return (await hooks.states())["delivered"] == 1

    await wait_for_async(is_delivered, within=20, what="the webhook is delivered")
    at = f"/ui/webhooks/{made.id}/redeliver"
    await reader.open("/webhooks")

    await reader.send(at, hours="24")
    assert "There was nothing to send again." in reader.text
    await reader.send(at, hours="24", all="on")
    assert "1 webhook will be sent again now" in reader.text
    wrong = await reader.send(at, hours="25")
    assert wrong.status_code == 422


async def test_the_log_is_narrowed_and_goes_on_behind_its_end(
    reader: Reader, hooks: Hooks
) -> None:
    first = await hooks.register("https://one.example/", enabled=False)
    other = await hooks.register("https://two.example/", enabled=False)
    for _ in range(23):
        await hooks.test(first)
    await hooks.test(other)

    def urls(page: str) -> list[str]:
        return re.findall(r'delivery-url fine">([^<]+)<', page)

    whole = (await reader.browser.get("/webhooks")).text
    assert len(urls(whole)) == 20
    (older,) = re.findall(r'href="([^"]*cursor[^"]*)"', whole)
    led = await reader.browser.get(older.replace("&amp;", "&"))
    assert led.status_code == 303
    rest = (await reader.browser.get(led.headers["location"])).text
    assert len(urls(rest)) == 4

    only = await reader.browser.get(
        f"/ui/webhooks/deliveries?endpoint_id={other.id}&state=",
        **{"HX-Request": "true"},
    )
    assert urls(only.text) == ["https://two.example/"]
    none = await reader.browser.get(
        "/ui/webhooks/deliveries?state=dropped", **{"HX-Request": "true"}
    )
    assert "Nothing like that." in none.text


# -------------------------------------------------------------------------------- isolation


async def test_others_see_nothing_and_reach_nothing(people: People) -> None:
    api = people.api
    hooks = Hooks(api.app.state.runtime.database)
    theirs = await hooks.register("https://alice.example/", owner="alice")
    delivery = await hooks.test(theirs)
    before = await hooks.endpoint(theirs.id)

    async with browsing(api) as browser:
        await browser.sign_in(people.keys["bob"].key)
        bob = Reader(browser)
        assert "alice" not in await bob.open("/webhooks")
        for verb in ("disable", "enable", "rotate", "remove", "test", "redeliver"):
            answered = await bob.send(f"/ui/webhooks/{theirs.id}/{verb}", hours="24")
            assert answered.status_code == 404, verb
        answered = await bob.send(f"/ui/deliveries/{delivery}/redeliver")
        assert answered.status_code == 404
        for query in (f"test={delivery}", f"endpoint_id={theirs.id}"):
            assert "alice.example" not in await bob.open(f"/webhooks?{query}")
    assert await hooks.endpoint(theirs.id) == before

    async with browsing(api) as browser:
        await browser.sign_in(ADMIN_KEY)
        assert "https://alice.example/ alice ·" in await Reader(browser).open(
            "/webhooks"
        )


async def test_a_key_that_may_only_look_is_given_no_forms(people: People) -> None:
    hooks = Hooks(people.api.app.state.runtime.database)
    made = await hooks.register("https://watched.example/", owner="watcher")
    key = await people.key("watcher", scopes=["read"])

    async with browsing(people.api) as browser:
        await browser.sign_in(key.key)
        page = await browser.get("/webhooks")
        refused = await browser.post(f"/ui/webhooks/{made.id}/disable")

    assert "https://watched.example/" in page.text
    assert "/ui/webhooks/" not in re.sub(r"/ui/webhooks/deliveries", "", page.text)
    assert refused.status_code == 403


async def test_what_is_no_id_is_refused(reader: Reader) -> None:
    for path in (
        "/webhooks?endpoint_id=x",
        "/webhooks?state=odd",
        "/webhooks?cursor=x",
        "/ui/webhooks/deliveries?endpoint_id=x",
    ):
        assert (await reader.browser.get(path)).status_code == 400, path
