"""Signing in and out, in a real browser."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import expect

from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.keyed import ADMIN_KEY, KEYS_ON, People, keyed
from tests.browser.conftest import PHONE, Visit


@pytest.fixture
async def people(serve: Serve, sandbox: Sandbox) -> AsyncIterator[People]:
    async with keyed(await serve(sandbox, **KEYS_ON)) as people:
        yield people


@pytest.mark.parametrize("scripts", [True, False])
async def test_one_signs_in_and_out(
    people: People, visit: Visit, scripts: bool
) -> None:
    page = await visit(people.api, "/?prompt=a+quiet+harbour", scripts=scripts)
    await expect(page.get_by_label("API key")).to_be_focused()
    await page.get_by_label("API key").fill(people.keys["alice"].key)
    await page.keyboard.press("Enter")

    prompt = page.get_by_label("What should the picture show?")
    await expect(prompt).to_have_value("a quiet harbour")
    await expect(page.get_by_text("alice", exact=True)).to_be_visible()
    cookies = await page.context.cookies()
    assert all(one["httpOnly"] for one in cookies)
    assert people.keys["alice"].key not in str(cookies)

    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    await page.goto("/")
    await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


async def test_an_administrator_is_led_to_the_operations(
    people: People, visit: Visit
) -> None:
    page = await visit(people.api, "/signin", device=PHONE, dark=True)
    await page.get_by_label("API key").fill(ADMIN_KEY)
    await page.get_by_role("button", name="Sign in").click()

    places = page.get_by_role("navigation", name="Main")
    await expect(places.get_by_role("link", name="Operations")).to_be_visible()
    await expect(places.get_by_role("link", name="Create")).to_have_attribute(
        "aria-current", "page"
    )
    public = page.get_by_label("Public")
    await page.get_by_text("More options").click()
    await expect(public).not_to_be_checked()
