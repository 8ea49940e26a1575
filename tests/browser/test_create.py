"""Making pictures in a real browser: with scripts, without, by keyboard, by drag and drop."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from playwright.async_api import Page, expect

from sandbox.runner import Sandbox
from tests.api.served import Api
from tests.api.conftest import emptied
from tests.browser.conftest import DESK, PHONE, Visit
from tests.support.drawings import draw

DEV = "black-forest-labs/flux-dev"
EDIT = "black-forest-labs/flux-2-pro"
PROMPT = "What should the picture show?"
# A file that falls onto an element, as the browser tells a page of it.
DROP = """
([element, name, kind, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type: kind }));
  for (const type of ["dragover", "drop"]) {
    const options = { dataTransfer, bubbles: true, cancelable: true };
    element.dispatchEvent(new DragEvent(type, options));
  }
}
"""


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    return await emptied(shared, shared_sandbox)


async def newest(api: Api) -> dict[str, Any]:
    """Read the newest job."""
    found = (await api.client.get("/api/v1/jobs", params={"limit": 1})).json()
    job: dict[str, Any] = found["items"][0]
    return job


async def fits(page: Page) -> bool:
    """Tell whether nothing sticks out to the side."""
    wide: bool = await page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    return wide


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("device", [DESK, PHONE])
async def test_a_prompt_becomes_a_card_without_a_reload(
    api: Api, visit: Visit, device: Any, dark: bool
) -> None:
    page = await visit(api, "/", device=device, dark=dark)
    await page.evaluate("window.isTheSame = true")
    await expect(page.locator("#estimate")).to_contain_text("Price unknown")
    await page.get_by_label(PROMPT).fill("a quiet harbour at night")
    await page.get_by_label("16:9", exact=True).check()
    await page.get_by_role("button", name="Create").click()

    card = page.locator("#jobs article").first
    await expect(card).to_contain_text("a quiet harbour at night")
    await expect(page.locator("#toasts")).to_contain_text("1 job accepted.")
    await expect(page.get_by_label(PROMPT)).to_have_value("a quiet harbour at night")
    assert await page.evaluate("window.isTheSame")
    assert (await newest(api))["parameters"]["aspect_ratio"] == "16:9"
    assert await fits(page)


async def test_the_keyboard_is_enough(api: Api, visit: Visit) -> None:
    page = await visit(api, "/")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await expect(page.get_by_label(PROMPT)).to_be_focused()
    await page.keyboard.type("a quiet harbour at night")
    await page.keyboard.press("Control+Enter")

    await expect(page.locator("#jobs article")).to_have_count(1)
    await expect(page.get_by_label(PROMPT)).to_be_focused()


async def test_a_mistake_stands_beside_its_field_which_has_the_focus(
    api: Api, visit: Visit
) -> None:
    page = await visit(api, "/")
    await page.get_by_label(PROMPT).fill("a quiet harbour at night")
    await page.get_by_text("More options").click()
    steps = page.get_by_label("Num inference steps")
    await steps.fill("77")
    await page.keyboard.press("Control+Enter")

    await expect(steps).to_have_attribute("aria-invalid", "true")
    await expect(steps).to_be_focused()
    await expect(steps).to_have_value("77")
    await expect(steps).to_have_accessible_description(
        "Must be between 1 and 4."
        " Number of denoising steps. 4 is recommended, and lower number of steps produce"
        " lower quality outputs, faster. 1 to 4."
    )
    await expect(page.get_by_label(PROMPT)).to_have_value("a quiet harbour at night")
    await expect(page.locator("#jobs article")).to_have_count(0)


async def test_another_model_brings_its_own_fields(api: Api, visit: Visit) -> None:
    page = await visit(api, "/")
    await page.get_by_label(PROMPT).fill("a quiet harbour at night")
    await page.get_by_label("Model", exact=True).select_option(DEV)

    await page.get_by_text("More options").click()
    guidance = page.get_by_label("Guidance")
    await expect(guidance).to_have_value("3")
    slider = page.locator("[data-slider]", has=guidance).locator("input[type=range]")
    await slider.fill("7.5")
    await expect(guidance).to_have_value("7.5")
    await expect(page.get_by_label(PROMPT)).to_have_value("a quiet harbour at night")
    await page.get_by_role("button", name="Create").click()
    await expect(page.locator("#jobs article")).to_have_count(1)
    assert (await newest(api))["parameters"]["guidance"] == 7.5


async def test_a_picture_is_dropped_shown_and_taken_away(
    api: Api, visit: Visit
) -> None:
    page = await visit(api, f"/?model={EDIT}")
    for number in (1, 2):
        picture = base64.b64encode(draw(number)).decode()
        box = await page.locator("[data-drop]").element_handle()
        await page.evaluate(DROP, [box, f"{number}.png", "image/png", picture])
        shown = page.get_by_alt_text("A picture you chose")
        await expect(shown).to_have_count(number)
    await expect(shown.first).to_have_js_property("naturalWidth", 32)
    await page.get_by_role("button", name="Remove this picture").first.click()
    await expect(shown).to_have_count(1)

    await page.get_by_label(PROMPT).fill("the same harbour at night")
    await page.get_by_role("button", name="Create").click()
    await expect(page.locator("#jobs article")).to_have_count(1)
    assert len((await newest(api))["parameters"]["input_images"]) == 1


async def test_a_picture_that_is_dropped_is_sent_once(api: Api, visit: Visit) -> None:
    page = await visit(api, f"/?model={EDIT}")
    sent: list[str] = []
    page.on("request", lambda one: sent.append(one.url))
    picture = base64.b64encode(draw(6, kind="PNG")).decode()
    box = await page.locator("[data-drop]").first.element_handle()

    await page.evaluate(DROP, [box, "fox.png", "image/png", picture])
    await expect(page.locator(".picked img")).to_have_count(1)
    await page.wait_for_load_state("networkidle")

    assert sum(one.endswith("/ui/pictures") for one in sent) == 1
    # What is chosen in the gallery below looks otherwise.
    await expect(page.locator(".picked")).to_have_css("margin-bottom", "0px")
    await expect(page.locator(".picked img")).to_have_count(1)


async def test_a_file_that_is_no_picture_is_refused_beside_the_field(
    api: Api, visit: Visit
) -> None:
    page = await visit(api, f"/?model={DEV}")
    box = await page.locator("[data-drop]").element_handle()
    text = base64.b64encode(b"no picture at all").decode()
    await page.evaluate(DROP, [box, "notes.txt", "text/plain", text])

    await expect(page.locator("#problem-p-image")).to_contain_text("not a picture")
    await expect(page.get_by_alt_text("A picture you chose")).to_have_count(0)


async def test_the_estimate_follows_what_is_chosen(api: Api, visit: Visit) -> None:
    page = await visit(api, "/")
    await expect(page.locator("#estimate")).to_contain_text("Price unknown")
    await page.get_by_label("How many times").fill("3")
    await expect(page.locator("#estimate")).to_contain_text("for 3 jobs")
    await page.get_by_label("How many times").fill("30")
    await expect(page.locator("#estimate")).to_contain_text(
        "How many times: a whole number from 1 to 10."
    )


async def test_without_scripts_everything_is_there(api: Api, visit: Visit) -> None:
    page = await visit(api, "/", scripts=False, device=PHONE)
    await page.get_by_label(PROMPT).fill("a quiet harbour at night")
    await page.get_by_label("Model", exact=True).select_option(DEV)
    await page.get_by_role("button", name="Show its options").click()
    picture = {"name": "a.png", "mimeType": "image/png", "buffer": draw(3)}
    await page.get_by_label("Drop a picture here").set_input_files([picture])
    await page.get_by_role("button", name="Create").click()

    await expect(page.locator("#jobs article")).to_have_count(1)
    job = await newest(api)
    assert (job["model"], job["prompt"]) == (DEV, "a quiet harbour at night")
    assert job["parameters"]["image"].startswith("http")
    assert await fits(page)
