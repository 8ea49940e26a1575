"""The page of operators in a real browser: what they do there, and being left in peace."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from playwright.async_api import expect

from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.served import Api, working
from tests.browser.conftest import DESK, PHONE, Visit
from tests.support.history import BROKEN, past_job
from tests.support.jobs import JobTable

MINUTE = timedelta(minutes=1)


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> AsyncIterator[Api]:
    api = await emptied(shared, shared_sandbox)
    api.app.state.runtime.operations.forget()
    yield api
    await api.client.post("/api/v1/queue/resume")


@pytest.mark.parametrize("device", [DESK, PHONE])
async def test_an_operator_pauses_and_resumes_the_queue(
    api: Api, visit: Visit, device: dict[str, int]
) -> None:
    page = await visit(api, "/operations", device=device)
    await page.get_by_text("Pause…").click()
    why = page.get_by_label("Why?")
    await expect(why).to_be_focused()
    await why.fill("moving the database")
    await page.get_by_role("button", name="Pause the queue").click()
    await expect(page.get_by_text("The queue is paused")).to_be_visible()
    await expect(page.get_by_text("“moving the database”")).to_be_visible()

    waiting = await api.generate("a ship that waits")
    async with working(api.settings):
        await page.get_by_text("Resume…").click()
        await page.get_by_role("button", name="Resume the queue").click()
        await expect(page.get_by_text("The queue is running")).to_be_visible()
        assert (await api.finished(waiting.job_id)).status == "completed"


async def test_an_operator_runs_failed_jobs_again(api: Api, visit: Visit) -> None:
    jobs = JobTable(api.app.state.runtime.database)
    failed = {str(await past_job(jobs, n * MINUTE, failure=BROKEN)) for n in (3, 2, 1)}
    page = await visit(api, "/operations")
    group = page.get_by_role("listitem").filter(has_text=BROKEN.code)
    await expect(group).to_contain_text(BROKEN.message)
    await group.get_by_text("Run again…").click()
    await group.get_by_role("button", name="Run 3 jobs again").click()

    await expect(page.get_by_text("3 jobs accepted again.")).to_be_visible()
    await expect(group).to_have_count(0)
    listed = (await api.client.get("/api/v1/jobs?status=pending")).json()["items"]
    assert {one["retry_of"] for one in listed} == failed


async def test_the_figures_renew_themselves(api: Api, visit: Visit) -> None:
    page = await visit(api, "/operations")
    await page.clock.install()
    await page.reload()
    waiting = page.locator(".gauge").filter(has_text="Waiting")
    await expect(waiting).to_contain_text("nobody waits")
    await api.generate("a ship on the horizon")
    api.app.state.runtime.operations.forget()

    await page.clock.fast_forward(11_000)

    await expect(waiting).to_contain_text("the oldest came in")


async def test_nobody_is_disturbed_who_is_typing(api: Api, visit: Visit) -> None:
    page = await visit(api, "/operations")
    await page.clock.install()
    await page.reload()
    await page.get_by_text("Pause…").click()
    await page.get_by_label("Why?").fill("half a sent")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))

    async with page.expect_request("**/ui/operations/failures"):
        await page.clock.fast_forward(11_000)

    await expect(page.get_by_label("Why?")).to_have_value("half a sent")
    assert "/ui/operations/now" not in asked
    await page.keyboard.press("Escape")
    await expect(page.get_by_label("Why?")).to_be_hidden()
    await expect(page.locator("summary").filter(has_text="Pause…")).to_be_focused()


async def test_it_works_without_scripts(api: Api, visit: Visit) -> None:
    page = await visit(api, "/operations", scripts=False)
    await page.get_by_text("Pause…").click()
    await page.get_by_label("Why?").fill("no scripts here")
    await page.get_by_role("button", name="Pause the queue").click()
    await expect(page.get_by_text("The queue is paused")).to_be_visible()
    await page.get_by_text("Resume…").click()
    await page.get_by_role("button", name="Resume the queue").click()
    await expect(page.get_by_text("The queue is running")).to_be_visible()
