"""A real Chromium, and pages on which nothing may go wrong.

`visit` opens a page of an API and gives Playwright's `Page`.  When the test is over, no page may
have written an error to its console, thrown, asked another host, or broken its policy.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    async_playwright,
)

from tests.api.conftest import (  # noqa: F401 - fixtures of these tests, too
    api,
    emptied,
    sandbox,
    serve,
    shared,
    shared_changes,
    shared_sandbox,
    worker,
)
from tests.api.served import Api

CHROMIUM = shutil.which("chromium") or shutil.which("chrome")
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
PATIENCE = 10_000  # milliseconds, for whatever a page is to show

Visit = Callable[..., Awaitable[Page]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave these tests out where there is no browser, and say how to get one."""
    if CHROMIUM is not None:
        return
    absent = pytest.mark.skip(
        reason="no Chromium here (Debian: apt-get install chromium)"
    )
    for item in items:
        if "tests/browser/" in item.path.as_posix():
            item.add_marker(absent)


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all tests of this process."""
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        await chromium.close()


@pytest.fixture
async def visit(browser: Browser) -> AsyncIterator[Visit]:
    """Open pages: `await visit(api, "/", device=PHONE, dark=True, scripts=False)`.

    Pages of one test share cookies, unless `stranger=True`.
    """
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    async def open_page(
        served: Api,
        path: str = "/",
        *,
        device: Any = DESK,
        dark: bool = False,
        scripts: bool = True,
        stranger: bool = False,
    ) -> Page:
        kind = {
            "viewport": device,
            "color_scheme": "dark" if dark else "light",
            "java_script_enabled": scripts,
            "reduced_motion": "reduce",
        }
        if stranger or not contexts:
            contexts.append(await browser.new_context(base_url=served.origin, **kind))
            contexts[-1].set_default_timeout(PATIENCE)
        page = await contexts[-1].new_page()
        await page.set_viewport_size(device)
        _listen(page, served.origin, wrong)
        await page.goto(path)
        return page

    yield open_page
    for context in contexts:
        await context.close()
    assert wrong == []


def _listen(page: Page, origin: str, wrong: list[str]) -> None:
    """Note what must not happen on a page."""

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            wrong.append(f"console: {message.text}")

    def asked(request: Request) -> None:
        host = urlsplit(request.url)
        if host.scheme in ("http", "https") and host.netloc != urlsplit(origin).netloc:
            wrong.append(f"foreign host: {request.url}")

    page.on("console", hear)
    page.on("pageerror", lambda error: wrong.append(f"thrown: {error}"))
    page.on("request", asked)
