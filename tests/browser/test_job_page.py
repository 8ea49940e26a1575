"""The page of a job in a browser: live, looked at closely, made again."""

from __future__ import annotations

import io
import zipfile
from uuid import UUID

import pytest
from playwright.async_api import expect

from app.domain.events import Progressed, Started
from sandbox.runner import Sandbox
from tests.api.served import Api
from tests.api.two_owners import completed_job, drawing, keep
from tests.browser.conftest import PHONE, Visit, emptied
from tests.browser.test_gallery import SOON, is_drawn, is_listening
from tests.support.jobs import JobTable, new_job

PROMPT = "an owl on a frosty branch"


@pytest.fixture
async def quiet(shared: Api, shared_sandbox: Sandbox) -> Api:
    """An API without a worker: what happens to jobs is up to the test."""
    return await emptied(shared, shared_sandbox)


async def completed(api: Api, seed: int = 1, **fields: object) -> UUID:
    stored = await keep(api.app.state.runtime, drawing(seed))
    return await completed_job(
        JobTable(api.app.state.runtime.database), stored, **fields
    )


async def test_the_page_follows_the_job_to_its_pictures(
    api: Api, worker: None, visit: Visit
) -> None:
    page = await visit(api)
    await is_listening(page)
    job = await api.generate(PROMPT, num_outputs=2)
    await page.locator(f"#job-{job.job_id} a").click()
    await expect(page).to_have_url(f"{api.origin}/jobs/{job.job_id}")

    pictures = page.get_by_role("img", name=PROMPT)
    await expect(pictures).to_have_count(2, timeout=SOON)
    await is_drawn(pictures.first)
    await expect(page.get_by_text("Saved", exact=True)).to_be_visible()
    await expect(page.locator("svg.times")).to_be_visible()

    async with page.expect_download() as waiting:
        await page.get_by_role("button", name="All as zip").click()
    path = await (await waiting.value).path()
    assert len(zipfile.ZipFile(io.BytesIO(path.read_bytes())).namelist()) == 3


async def test_progress_moves_while_one_looks(quiet: Api, visit: Visit) -> None:
    jobs = JobTable(quiet.app.state.runtime.database)
    (job_id,) = await jobs.submit(new_job())
    page = await visit(quiet, f"/jobs/{job_id}")
    await is_listening(page)
    said = page.locator("[data-words]")
    await expect(said).to_have_text("waiting")

    await jobs.look(job_id, Started("handle"), Progressed(0.7))

    await expect(said).to_have_text("drawing", timeout=SOON)
    await expect(page.locator("[data-percent]")).to_have_text("70 %", timeout=SOON)
    await expect(page.get_by_text("The provider is drawing")).to_be_visible(
        timeout=SOON
    )


async def test_a_picture_is_looked_at_closely(quiet: Api, visit: Visit) -> None:
    job_id = await completed(quiet, prompt=PROMPT)
    page = await visit(quiet, f"/jobs/{job_id}")
    link = page.locator("[data-zoom]")

    await link.focus()
    await page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    await is_drawn(dialog.get_by_role("img", name=PROMPT))
    await dialog.get_by_role("img").click()
    await expect(dialog).to_have_class("lightbox is-close")
    await page.keyboard.press("Escape")

    await expect(dialog).to_be_hidden()
    await expect(link).to_be_focused()


async def test_again_and_another_seed_lead_to_the_new_job(
    quiet: Api, visit: Visit
) -> None:
    job = await quiet.generate(PROMPT, seed=5)
    await quiet.client.post(f"/api/v1/jobs/{job.job_id}/cancel")
    for button in ("Run again", "Another seed"):
        page = await visit(quiet, f"/jobs/{job.job_id}")
        await page.get_by_role("button", name=button).click()
        await expect(page).not_to_have_url(f"{quiet.origin}/jobs/{job.job_id}")
        await expect(page.get_by_text("waiting", exact=True)).to_be_visible()

    seeds = {(await quiet.job(one)).parameters["seed"] for one in await quiet.listed()}
    assert 5 in seeds and len(seeds) == 2


async def test_a_button_that_is_pressed_twice_buys_once(
    quiet: Api, visit: Visit
) -> None:
    job_id = await completed(quiet, seed=4)
    page = await visit(quiet, f"/jobs/{job_id}")
    press = """(button) => {
      const kept = [];
      addEventListener("submit", (event) => kept.push(event.defaultPrevented));
      for (let time = 0; time < 3; time++) button.click();
      return kept;
    }"""

    kept = await page.get_by_role("button", name="Run again").evaluate(press)

    assert kept == [False, True, True]
    await expect(page).not_to_have_url(f"{quiet.origin}/jobs/{job_id}")
    jobs = (await quiet.client.get("/api/v1/jobs")).json()["items"]
    assert len(jobs) == 2


async def test_the_command_is_copied(quiet: Api, visit: Visit) -> None:
    job_id = await completed(quiet, prompt=PROMPT)
    page = await visit(quiet, f"/jobs/{job_id}")
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])

    await page.get_by_role("button", name="Copy").click()

    await expect(page.get_by_text("Copied.")).to_be_visible()
    copied = await page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("curl http://") and PROMPT in copied


async def test_a_job_is_deleted_after_a_question(quiet: Api, visit: Visit) -> None:
    job_id = await completed(quiet)
    page = await visit(quiet, f"/jobs/{job_id}")

    await page.get_by_role("button", name="Delete").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()

    await expect(page).to_have_url(f"{quiet.origin}/")
    assert await quiet.listed() == []


@pytest.mark.parametrize("scripts", [True, False])
async def test_a_job_is_cancelled_on_its_page(
    quiet: Api, visit: Visit, scripts: bool
) -> None:
    job = await quiet.generate(PROMPT)
    page = await visit(quiet, f"/jobs/{job.job_id}", device=PHONE, scripts=scripts)

    await page.get_by_role("button", name="Cancel").click()

    await expect(page.get_by_text("Nothing was made.")).to_be_visible()
    wide = await page.evaluate("document.documentElement.scrollWidth") if scripts else 0
    assert wide <= PHONE["width"]
