"""No page may keep anybody out: axe-core looks at each one as it is shown.

Light and dark, on a desk and on a phone.  A new page is a new line of `PAGES`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, Page

from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON
from tests.api.served import Api, working
from tests.browser.conftest import DESK, PATIENCE, PHONE
from tests.support.servers import ROOT

AXE = ROOT / "tests/contracts/npm/node_modules/axe-core/axe.min.js"
pytestmark = [
    pytest.mark.npm,
    pytest.mark.skipif(not AXE.exists(), reason="no axe-core here (Node and make npm)"),
]

# What is open to everybody who is let in; `{job}` is a job, by what became of it.
PAGES = {
    "create and gallery": "/",
    "a form that was filled": "/?prompt=a+quiet+harbour&model=black-forest-labs/flux-dev",
    "a search": "/?q=harbour",
    "a search for nothing": "/?q=zebra",
    "a completed job": "/jobs/{completed}",
    "a failed job": "/jobs/{failed}",
    "a pending job": "/jobs/{pending}",
    "operations": "/operations",
    "webhooks": "/webhooks",
    "no such page": "/jobs/01a209f6-d8ee-7475-b811-2033399222cc",
}
LOOKS = [(DESK, False), (DESK, True), (PHONE, False), (PHONE, True)]
GRAVE = ("serious", "critical")

# What fits WCAG 2.2, levels A and AA, and what axe's makers hold to be good practice.
RUN = """
async () => {
  const found = await axe.run(document, { preload: false, resultTypes: ["violations"] });
  return found.violations.map((one) => [one.impact, one.id, one.help,
    one.nodes.map((node) => node.html.slice(0, 200) + " | " + node.failureSummary)]);
}
"""


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page of a browser that keeps nothing.  What errors say is not our concern here."""
    context = await browser.new_context(reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    yield await context.new_page()
    await context.close()


@pytest.fixture
async def jobs(shared: Api, shared_sandbox: Sandbox) -> dict[str, str]:
    """A job of each kind, by what became of it; and somebody who wants webhooks."""
    api = await emptied(shared, shared_sandbox)
    async with httpx.AsyncClient(verify=False) as client:
        fault = {"fault": "prediction.fails", "params": {"error": "Out of ideas."}}
        match = {"match": {"prompt_contains": "that fails"}}
        await client.put(f"{shared_sandbox.url}/sandbox/faults", json=[fault | match])
    broken = await api.generate("a harbour that fails")
    done = await api.generate("a quiet harbour at night", num_outputs=2)
    async with working(api.settings):
        ends = [await api.finished(one.job_id) for one in (done, broken)]
    waiting = await api.generate("a harbour in the rain")
    await api.client.post(
        "/api/v1/webhooks", json={"url": "https://hooks.example/here"}
    )
    found = {one.status: str(one.job_id) for one in ends}
    return found | {"pending": str(waiting.job_id)}


async def violations(page: Page) -> list[str]:
    """Say what axe finds wrong on the page as it is shown now."""
    # Evaluated by the debugger, which the page's policy does not bind.
    if not await page.evaluate("typeof axe === 'object'"):
        await page.evaluate(AXE.read_text())
    found: list[Any] = await page.evaluate(RUN)
    return [
        f"{impact} {name}: {text}\n    " + "\n    ".join(nodes)
        for impact, name, text, nodes in found
        if impact in GRAVE
    ]


async def looked_at(page: Page, url: str) -> dict[str, list[str]]:
    """Show the address in every way, and collect what is wrong."""
    wrong = {}
    for device, is_dark in LOOKS:
        await page.set_viewport_size(device)  # type: ignore[arg-type]
        await page.emulate_media(color_scheme="dark" if is_dark else "light")
        # Loaded anew, nothing is on its way from one colour to the other.
        await page.goto(url)
        if found := await violations(page):
            look = f"{device['width']} wide, {'dark' if is_dark else 'light'}"
            wrong[look] = found
    return wrong


def told(wrong: dict[str, list[str]]) -> str:
    return "\n".join(f"{look}\n  " + "\n  ".join(all_) for look, all_ in wrong.items())


@pytest.mark.parametrize("name", PAGES)
async def test_nothing_grave_on_any_page(
    shared: Api, jobs: dict[str, str], page: Page, name: str
) -> None:
    url = shared.origin + PAGES[name].format(**jobs)

    wrong = await looked_at(page, url)

    assert not wrong, told(wrong)


@pytest.mark.parametrize("path", ["/signin", "/signin?next=/operations"])
async def test_nothing_grave_where_one_signs_in(
    serve: Serve, sandbox: Sandbox, page: Page, path: str
) -> None:
    api: Api = await serve(sandbox, **KEYS_ON)

    wrong = await looked_at(page, api.origin + path)

    assert not wrong, told(wrong)


async def test_what_is_wrong_would_be_found(shared: Api, page: Page) -> None:
    await page.goto(shared.origin + "/")
    await page.evaluate(
        "document.querySelector('main').append(document.createElement('button'))"
    )

    found = await violations(page)

    assert [one.split(":")[0] for one in found] == ["critical button-name"]
