"""The page of webhooks in a real browser: from a new endpoint to a call sent again."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.async_api import expect

from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.served import Api, working
from tests.browser.conftest import DESK, PHONE, Visit
from tests.contracts.scripted_server import ScriptedServer, answer
from tests.support.hooks import Hooks, verified
from tests.support.waiting import wait_for_async

OK, NO = answer(204), answer(500)


@pytest.fixture(scope="module")
async def receiver() -> Any:
    async with ScriptedServer([OK]) as server:
        yield server


@pytest.fixture(scope="module")
def shared_changes(receiver: ScriptedServer) -> dict[str, Any]:
    return {"outbound_hosts": (f"127.0.0.1:{receiver.port}",)}


@pytest.fixture(scope="module")
async def running(shared: Api) -> Any:
    """A worker for all tests of the module."""
    async with working(shared.settings):
        yield


@pytest.fixture
async def api(
    shared: Api, shared_sandbox: Sandbox, running: None, receiver: ScriptedServer
) -> Api:
    receiver.will(OK)
    return await emptied(shared, shared_sandbox)


@pytest.mark.parametrize(("device", "scripts"), [(DESK, True), (PHONE, False)])
async def test_an_endpoint_is_added_tested_and_sent_to_again(
    api: Api,
    visit: Visit,
    receiver: ScriptedServer,
    device: dict[str, int],
    scripts: bool,
) -> None:
    receiver.will(NO, OK)
    page = await visit(api, "/webhooks", device=device, scripts=scripts)
    await page.get_by_label("Address").fill(f"{receiver.url}/shop")
    await page.get_by_label("job.completed").check()
    await page.get_by_role("button", name="Add the endpoint").click()
    secret = await page.locator("#secret").inner_text()
    api.contract.said.add(secret)

    await page.get_by_role("button", name="Send a test").click()
    await expect(page.get_by_text("The test: answered 500")).to_be_visible()
    await expect(page.locator("#secret")).to_have_count(0)
    if not scripts:
        await page.goto("/webhooks")
    delivery = page.locator(".delivery")
    await expect(delivery).to_contain_text("Failed")

    await delivery.get_by_role("button", name="Send again").click()
    hooks = Hooks(api.app.state.runtime.database)

    async def is_delivered() -> bool:
        return (await hooks.states())["delivered"] == 1

    await wait_for_async(is_delivered, within=20, what="it is delivered")
    await page.goto("/webhooks")
    await expect(delivery).to_contain_text("Delivered")
    await delivery.get_by_text("2 tries · last answer 204").click()
    await expect(delivery.get_by_role("row")).to_have_count(3)
    assert verified(receiver.requests[0], secret)["type"] == "webhook.test"


async def test_a_secret_is_copied_by_a_press(api: Api, visit: Visit) -> None:
    page = await visit(api, "/webhooks")
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.get_by_label("Address").fill("https://hooks.example/")
    await page.get_by_role("button", name="Add the endpoint").click()
    secret = await page.locator("#secret").inner_text()
    api.contract.said.add(secret)

    await page.get_by_role("button", name="Copy").click()

    await expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert await page.evaluate("navigator.clipboard.readText()") == secret


async def test_what_is_wrong_is_told_where_it_was_typed(api: Api, visit: Visit) -> None:
    page = await visit(api, "/webhooks")
    address = page.get_by_label("Address")
    await address.fill("https://127.0.0.1:1/inside")
    await page.get_by_label("What is it for?").fill("the shop")
    await page.get_by_role("button", name="Add the endpoint").click()

    await expect(address).to_have_attribute("aria-invalid", "true")
    await expect(page.get_by_label("What is it for?")).to_have_value("the shop")


async def test_removing_asks_first(api: Api, visit: Visit) -> None:
    hooks = Hooks(api.app.state.runtime.database)
    await hooks.register("https://hooks.example/")
    page = await visit(api, "/webhooks")
    button = page.get_by_role("button", name="Remove the endpoint")
    await expect(button).to_be_hidden()
    await page.get_by_text("Remove…").click()
    await button.click()

    await expect(page.get_by_text("The endpoint is removed.")).to_be_visible()
    await expect(page.locator(".endpoint")).to_have_count(0)


async def test_the_log_is_narrowed_in_place(api: Api, visit: Visit) -> None:
    hooks = Hooks(api.app.state.runtime.database)
    for name in ("one", "two"):
        made = await hooks.register(f"https://{name}.example/", enabled=False)
        await hooks.test(made)
    page = await visit(api, "/webhooks")
    await expect(page.locator(".delivery")).to_have_count(2)
    await page.get_by_label("Endpoint", exact=True).select_option(
        "https://two.example/"
    )

    await expect(page.locator(".delivery")).to_have_count(1)
    await expect(page.locator(".delivery")).to_contain_text("two.example")
