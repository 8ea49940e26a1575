"""The gallery in a browser: cards that live, searching, choosing, with and without scripts."""

from __future__ import annotations

import io
import json
import zipfile
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest
from playwright.async_api import Browser, Locator, Page, expect

from app.domain.events import CancelRequested, Progressed, Started
from sandbox.runner import Sandbox
from tests.api.served import Api
from tests.api.two_owners import completed_job, drawing, keep
from tests.browser.conftest import DESK, PHONE, Visit, emptied
from tests.support.jobs import JobTable, new_job
from tests.support.tcp_proxy import TcpProxy

PROMPT = "a heron at the edge of a pond"
SOON = 15_000  # milliseconds; machines are slow when many tests run


@pytest.fixture
async def quiet(shared: Api, shared_sandbox: Sandbox) -> Api:
    """An API without a worker: what happens to jobs is up to the test."""
    return await emptied(shared, shared_sandbox)


def jobs_of(api: Api) -> JobTable:
    return JobTable(api.app.state.runtime.database)


async def completed(api: Api, seed: int, **fields: object) -> UUID:
    stored = await keep(api.app.state.runtime, drawing(seed))
    return await completed_job(jobs_of(api), stored, **fields)


def card(page: Page, job_id: UUID) -> Locator:
    return page.locator(f"#job-{job_id}")


async def is_listening(page: Page) -> None:
    await expect(page.locator("html[data-listening]")).to_be_attached(timeout=SOON)


async def is_drawn(picture: Locator) -> None:
    """Wait until the picture is there, and shown."""
    await expect(picture).to_be_visible(timeout=SOON)
    await expect(picture).to_have_js_property("complete", True)
    assert await picture.evaluate("image => image.naturalWidth") > 0


# --------------------------------------------------------------------------- live cards


async def test_a_card_comes_by_itself_and_turns_into_the_picture(
    api: Api, worker: None, visit: Visit
) -> None:
    page = await visit(api)
    await is_listening(page)
    await page.evaluate("window.wasNotReloaded = true")

    job = await api.generate(PROMPT)

    shown = card(page, job.job_id)
    await expect(shown).to_contain_text(PROMPT, timeout=SOON)
    picture = shown.get_by_role("img", name=PROMPT)
    await is_drawn(picture)
    assert await page.evaluate("window.wasNotReloaded")


async def test_what_is_written_into_the_form_becomes_a_picture(
    api: Api, worker: None, visit: Visit
) -> None:
    page = await visit(api)
    await is_listening(page)

    await page.get_by_label("What should the picture show?").fill(PROMPT)
    await page.keyboard.press("Control+Enter")

    await is_drawn(page.locator("#jobs").get_by_role("img", name=PROMPT))
    await expect(page.locator("#jobs .job")).to_have_count(1)
    await expect(page.locator("#nothing")).to_be_hidden()


async def test_a_card_says_how_far_the_job_is(quiet: Api, visit: Visit) -> None:
    jobs = jobs_of(quiet)
    page = await visit(quiet)
    await is_listening(page)
    (job_id,) = await jobs.submit(new_job())
    said = card(page, job_id).locator("[data-words]")
    await expect(said).to_have_text("waiting", timeout=SOON)

    await jobs.look(job_id, Started("handle"))
    await expect(said).to_have_text("drawing", timeout=SOON)
    await jobs.look(job_id, Progressed(0.4))
    await expect(card(page, job_id)).to_contain_text("40 %", timeout=SOON)
    bar = card(page, job_id).get_by_role("progressbar")
    await expect(bar).to_have_js_property("value", 0.4)
    await jobs.tell(job_id, CancelRequested())
    await expect(said).to_have_text("cancelling", timeout=SOON)
    await expect(card(page, job_id).get_by_role("button")).to_have_count(0)


async def test_a_page_that_is_loaded_again_goes_on(quiet: Api, visit: Visit) -> None:
    jobs = jobs_of(quiet)
    (job_id,) = await jobs.submit(new_job())
    page = await visit(quiet)
    await is_listening(page)
    await jobs.look(job_id, Started("handle"), Progressed(0.3))
    await expect(card(page, job_id)).to_contain_text("30 %", timeout=SOON)

    await page.reload()
    await expect(card(page, job_id)).to_contain_text("30 %")
    await is_listening(page)
    await jobs.look(job_id, Progressed(0.8))

    await expect(card(page, job_id)).to_contain_text("80 %", timeout=SOON)


async def test_what_happened_while_the_network_was_away_is_made_up_for(
    quiet: Api, browser: Browser
) -> None:
    """In a page of its own: a lost connection is an error on the console."""
    jobs = jobs_of(quiet)
    (job_id,) = await jobs.submit(new_job())
    there = urlsplit(quiet.origin)
    assert there.hostname and there.port
    async with TcpProxy(there.hostname, there.port) as wire:
        page = await browser.new_page(base_url=f"http://127.0.0.1:{wire.port}")
        await page.goto("/")
        await is_listening(page)
        await wire.refuse()
        await expect(page.locator("html[data-listening]")).to_have_count(0)
        await jobs.look(job_id, Started("handle"), Progressed(0.6))
        await wire.restore()

        await expect(card(page, job_id)).to_contain_text("60 %", timeout=2 * SOON)
        await page.close()


async def test_a_job_is_cancelled_from_its_card(quiet: Api, visit: Visit) -> None:
    (job_id,) = await jobs_of(quiet).submit(new_job())
    page = await visit(quiet)

    await card(page, job_id).get_by_role("button", name="Cancel").click()

    await expect(card(page, job_id)).to_contain_text("Cancelled")
    assert (await quiet.job(job_id)).status == "cancelled"


async def test_a_failed_job_says_why_and_is_run_again(
    api: Api, sandbox: Sandbox, worker: None, visit: Visit
) -> None:
    rule = {"fault": "prediction.fails", "times": 1, "params": {"error": "NSFW (E005)"}}
    async with httpx.AsyncClient(verify=False) as client:
        await client.post(f"{sandbox.url}/sandbox/faults", json=rule)
    page = await visit(api)
    await is_listening(page)
    job = await api.generate(PROMPT)
    broken = card(page, job.job_id)
    await expect(broken).to_contain_text("Failed", timeout=SOON)
    await expect(broken).to_contain_text("sensitive")

    await broken.get_by_role("button", name="Retry").click()

    fresh = page.locator("#jobs .job").first
    await expect(fresh).not_to_have_attribute("id", f"job-{job.job_id}")
    await is_drawn(fresh.get_by_role("img", name=PROMPT))


# ------------------------------------------------------------------ finding, going back


async def test_searching_narrows_what_is_shown_and_the_address_keeps_it(
    quiet: Api, visit: Visit
) -> None:
    heron = await completed(quiet, 1, prompt=PROMPT)
    other = await completed(quiet, 2, prompt="a mill")
    page = await visit(quiet)

    await page.get_by_role("searchbox").fill("heron")
    await expect(card(page, other)).to_have_count(0)
    await expect(card(page, heron)).to_be_visible()
    await expect(page).to_have_url(f"{quiet.origin}/?q=heron")
    await page.get_by_text("Filters").click()
    await page.get_by_label("Status").select_option("failed")
    await expect(page.get_by_text("Nothing found.")).to_be_visible()
    await page.reload()
    await expect(page.get_by_role("searchbox")).to_have_value("heron")
    await expect(page.get_by_label("Status")).to_have_value("failed")
    await page.get_by_role("link", name="Clear the search").click()

    await expect(card(page, other)).to_be_visible()
    assert urlsplit(page.url).query == ""


async def test_older_pictures_come_as_one_goes_down(quiet: Api, visit: Visit) -> None:
    made = await jobs_of(quiet).submit(*(new_job() for _ in range(60)))
    page = await visit(quiet)
    shown = page.locator("#jobs .job")
    await expect(shown).to_have_count(24)

    for count in (48, 60):
        await page.mouse.wheel(0, 20_000)
        await expect(shown).to_have_count(count)

    await expect(page.locator("#older")).to_have_count(0)
    ids = await shown.evaluate_all("all => all.map(one => one.dataset.job)")
    assert ids == [str(one) for one in reversed(made)]


# ----------------------------------------------------------------------------- choosing


async def test_many_are_chosen_and_come_as_one_file(quiet: Api, visit: Visit) -> None:
    made = [await completed(quiet, seed) for seed in range(5)]
    page = await visit(quiet)
    boxes = [card(page, one).get_by_role("checkbox") for one in reversed(made)]
    await boxes[1].check()
    await boxes[3].click(modifiers=["Shift"])
    await expect(page.get_by_text("3 chosen")).to_be_visible()

    async with page.expect_download() as waiting:
        await page.get_by_role("button", name="Download").click()

    path = await (await waiting.value).path()
    bundle = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    manifest = json.loads(bundle.read("manifest.json"))
    found = {one["job_id"]: bundle.read(one["file"]) for one in manifest["files"]}
    assert found == {str(made[seed]): drawing(seed) for seed in (3, 2, 1)}
    await expect(page.get_by_text("3 chosen")).to_be_visible()


async def test_all_shown_are_chosen_and_deleted_after_a_question(
    quiet: Api, visit: Visit
) -> None:
    made = [await completed(quiet, seed) for seed in range(3)]
    page = await visit(quiet)
    await page.get_by_label("Select all shown").check()
    await expect(page.get_by_text("3 chosen")).to_be_visible()
    await card(page, made[0]).get_by_role("checkbox").uncheck()

    await page.get_by_role("button", name="Delete").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_role("button", name="Keep").click()
    await expect(dialog).to_be_hidden()
    assert len(await quiet.listed()) == 3
    await page.get_by_role("button", name="Delete").click()
    await dialog.get_by_role("button", name="Delete").click()

    await expect(page.locator("#jobs .job")).to_have_count(1)
    await expect(page.get_by_text("Deleted 2 jobs.")).to_be_visible()
    assert await quiet.listed() == [made[0]]


async def test_many_are_run_again_at_once(quiet: Api, visit: Visit) -> None:
    for seed in range(2):
        await completed(quiet, seed)
    page = await visit(quiet)
    await page.get_by_label("Select all shown").check()

    await page.get_by_role("button", name="Run again").click()

    await expect(page.locator("#jobs .job")).to_have_count(4)
    await expect(page.get_by_text("2 jobs will be made again.")).to_be_visible()


async def test_everything_is_done_with_the_keyboard(quiet: Api, visit: Visit) -> None:
    job_id = await completed(quiet, 1, prompt=PROMPT)
    page = await visit(quiet)
    box = card(page, job_id).get_by_role("checkbox")
    await box.focus()
    await expect(box).to_have_css("opacity", "1")
    await page.keyboard.press("Space")
    await expect(page.get_by_text("1 chosen")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(box).not_to_be_checked()
    await page.keyboard.press("Space")

    delete = page.get_by_role("button", name="Delete")
    await delete.focus()
    await page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    await expect(delete).to_be_focused()
    await page.keyboard.press("Enter")
    await dialog.get_by_role("button", name="Delete").focus()
    await page.keyboard.press("Enter")

    await expect(card(page, job_id)).to_have_count(0)
    assert await quiet.listed() == []


# ------------------------------------------------------------------- other ways to look


async def test_without_scripts_all_of_it_can_be_used(quiet: Api, visit: Visit) -> None:
    done = await completed(quiet, 1, prompt=PROMPT)
    await jobs_of(quiet).submit(*(new_job() for _ in range(30)))
    page = await visit(quiet, scripts=False)
    await page.locator("#jobs .job").first.get_by_role("button", name="Cancel").click()
    await expect(page.locator("#jobs .job").first).to_contain_text("Cancelled")
    await page.get_by_role("link", name="Older pictures").click()
    await is_drawn(card(page, done).get_by_role("img", name=PROMPT))
    await page.get_by_role("searchbox").fill("heron")
    await page.get_by_role("button", name="Search").click()
    await expect(page.locator("#jobs .job")).to_have_count(1)
    await card(page, done).get_by_role("checkbox").check(force=True)
    await page.get_by_role("button", name="Delete").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()

    await expect(page.get_by_text("Nothing found.")).to_be_visible()
    assert done not in await quiet.listed(limit=100)


@pytest.mark.parametrize("device", [DESK, PHONE, {"width": 320, "height": 600}])
async def test_nothing_is_wider_than_the_screen(
    quiet: Api, visit: Visit, device: dict[str, int]
) -> None:
    await completed(quiet, 1, prompt="Donaudampfschifffahrtsgesellschaft" * 5)
    await jobs_of(quiet).submit(new_job())
    page = await visit(quiet, device=device)
    await page.get_by_label("Select all shown").check()

    wide = await page.evaluate("document.documentElement.scrollWidth")

    assert wide <= device["width"]


@pytest.mark.parametrize("path", ["/", "/webhooks", "/operations"])
async def test_nothing_in_the_bar_covers_anything_else(
    quiet: Api, visit: Visit, path: str
) -> None:
    page = await visit(quiet, path, device=PHONE)

    brand = await page.locator(".brand").bounding_box()
    places = await page.locator(".places").bounding_box()

    assert brand and places
    is_below = places["y"] >= brand["y"] + brand["height"] - 1
    assert is_below or places["x"] >= brand["x"] + brand["width"]


async def test_a_picture_moves_nothing_when_it_comes(quiet: Api, visit: Visit) -> None:
    for seed in range(6):
        await completed(quiet, seed)
    page = await visit(quiet)
    await is_drawn(page.locator("#jobs img").last)

    shift = await page.evaluate("""() => new Promise(tell => {
            new PerformanceObserver(list => tell(
                list.getEntries().reduce((sum, one) => sum + one.value, 0)
            )).observe({type: "layout-shift", buffered: true});
            setTimeout(() => tell(0), 300);
        })""")

    assert shift < 0.02


async def test_it_is_dark_where_people_want_it_so(quiet: Api, visit: Visit) -> None:
    await completed(quiet, 1)
    shades = []
    for dark in (False, True):
        page = await visit(quiet, dark=dark, stranger=True)
        shown = page.locator("#jobs .job").first
        shades.append(
            await shown.evaluate("one => getComputedStyle(one).backgroundColor")
        )

    assert shades == ["rgb(255, 255, 255)", "rgb(27, 26, 33)"]
