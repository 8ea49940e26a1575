"""The page of operators, without scripts: what it says, and what its forms do."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import timedelta
from xml.etree import ElementTree

import pytest
from sqlalchemy import text

from app.services import operations
from app.web.charts import HEIGHT, Series, bar_chart, line, line_chart, lonely, nice_top
from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.keyed import ADMIN_KEY, People
from tests.api.served import Api
from tests.support.history import BLOCKED, BROKEN, past_job
from tests.support.jobs import JobTable
from tests.web.browsing import browsing
from tests.web.reader import Reader, words_of

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> AsyncIterator[Api]:
    api = await emptied(shared, shared_sandbox)
    forget(api)
    yield api
    await api.client.post("/api/v1/queue/resume")


@pytest.fixture
async def reader(api: Api) -> AsyncIterator[Reader]:
    async with browsing(api) as browser:
        yield Reader(browser)


@pytest.fixture
def jobs(api: Api) -> JobTable:
    return JobTable(api.app.state.runtime.database)


def forget(api: Api) -> None:
    """Have the figures read anew."""
    found = api.app.state.runtime.operations
    found.forget()
    found._trends.forget()


async def test_an_idle_service_has_nothing_to_complain_of(reader: Reader) -> None:
    said = await reader.open("/operations")

    assert reader.status == 200
    assert "The queue is running" in said
    assert "Waiting 0 nobody waits" in said
    assert "Nothing. That is how it should be." in said
    assert "Nothing to show yet" in said


async def test_pausing_and_resuming_with_forms(api: Api, reader: Reader) -> None:
    await reader.open("/operations")
    answer = await reader.send(
        "/ui/operations/pause", reason=" moving \n the database "
    )

    assert answer.status_code == 303
    assert "The queue is paused" in reader.text
    assert "“moving the database”" in reader.text
    queue = (await api.client.get("/api/v1/queue")).json()
    assert (queue["state"], queue["reason"]) == ("paused", "moving the database")

    await reader.send("/ui/operations/resume")
    assert "The queue is running" in reader.text
    assert (await api.client.get("/api/v1/queue")).json()["state"] == "running"


@pytest.mark.parametrize("reason", ["", "  ", "x" * 201])
async def test_a_pause_without_a_usable_reason_is_refused(
    api: Api, reader: Reader, reason: str
) -> None:
    await reader.open("/operations")
    answer = await reader.send("/ui/operations/pause", reason=reason)

    assert answer.status_code == 422
    assert (await api.client.get("/api/v1/queue")).json()["state"] == "running"


async def test_a_form_nobody_was_given_changes_nothing(api: Api) -> None:
    async with browsing(api) as browser:
        answer = await browser.post("/ui/operations/pause", {"reason": "because"})

    assert answer.status_code == 403
    assert (await api.client.get("/api/v1/queue")).json()["state"] == "running"


async def test_htmx_gets_the_piece_it_replaces(api: Api, reader: Reader) -> None:
    await reader.open("/operations")
    answer = await reader.send("/ui/operations/pause", htmx=True, reason="because")

    assert answer.status_code == 200
    assert "The queue is paused" in answer.text
    assert "<html" not in answer.text


async def test_a_group_of_failures_is_run_again_once(
    api: Api, reader: Reader, jobs: JobTable
) -> None:
    broken = {await past_job(jobs, n * MINUTE, failure=BROKEN) for n in (9, 8, 7)}
    blocked = await past_job(jobs, HOUR, failure=BLOCKED)
    said = await reader.open("/operations")
    assert f"3 {BROKEN.code}" in said and f"1 {BLOCKED.code}" in said

    await reader.send("/ui/operations/retry", code=BROKEN.code)
    assert "3 jobs accepted again." in reader.text
    assert BROKEN.code not in reader.text and BLOCKED.code in reader.text
    await reader.send("/ui/operations/retry", code=BROKEN.code)

    listed = (await api.client.get("/api/v1/jobs?status=pending")).json()["items"]
    assert {job["retry_of"] for job in listed} == {str(one) for one in broken}
    assert str(blocked) not in {job["retry_of"] for job in listed}


async def test_no_more_are_run_again_in_one_go_than_is_said(
    api: Api,
    reader: Reader,
    jobs: JobTable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operations, "MOST_AGAIN", 2)
    for n in (9, 8, 7):
        await past_job(jobs, n * MINUTE, failure=BROKEN)
    await reader.open("/operations")
    answer = await reader.send("/ui/operations/retry", htmx=True, code=BROKEN.code)

    assert "2 jobs accepted again." in answer.text
    listed = (await api.client.get("/api/v1/jobs?status=pending")).json()["items"]
    assert len(listed) == 2


async def test_what_cannot_be_run_again_now_stays_where_it_is(
    api: Api, reader: Reader, jobs: JobTable
) -> None:
    await past_job(jobs, HOUR, failure=BROKEN)
    backlog = api.app.state.runtime.backlog
    await reader.open("/operations")
    ceiling, backlog._ceiling = backlog._ceiling, 0
    try:
        answer = await reader.send("/ui/operations/retry", htmx=True, code=BROKEN.code)
    finally:
        backlog._ceiling = ceiling

    assert answer.status_code == 503
    assert answer.headers["hx-retarget"] == "#toasts"
    assert BROKEN.code in await reader.open("/operations")


@pytest.mark.parametrize("piece", ["now", "failures", "trends"])
async def test_each_piece_is_to_be_had_by_itself(reader: Reader, piece: str) -> None:
    page = await reader.browser.get(f"/ui/operations/{piece}", **{"HX-Request": "true"})

    assert page.status_code == 200
    assert "<html" not in page.text


async def test_the_charts_say_in_a_table_what_they_draw(
    api: Api, reader: Reader, jobs: JobTable
) -> None:
    await past_job(jobs, HOUR, seconds=(2, 40, 1))
    await past_job(jobs, HOUR, failure=BROKEN)
    async with jobs.engine.begin() as conn:
        await conn.execute(text("UPDATE ledger_entries SET amount_usd = 0.25"))
    forget(api)

    page = await reader.browser.get("/operations")
    said = words_of(page.text)
    drawings = re.findall(r'(?s)<svg viewBox="0 0 480.*?</svg>', page.text)

    assert len(drawings) == 5
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        titled = root.attrib["aria-labelledby"].split()
        assert [one.attrib["id"] for one in root[:2]] == titled
        assert all(one.text for one in root[:2])
    assert re.search(r"40\.\d s", said)
    assert "1 of 2 jobs failed: 50 %" in said


async def test_only_administrators_see_it(people: People) -> None:
    async with browsing(people.api) as browser:
        stranger = await browser.get("/operations")
        assert stranger.status_code == 303
        assert stranger.headers["location"] == "/signin?next=/operations"
        await browser.sign_in(people.keys["alice"].key)
        theirs = await browser.get("/operations")
        assert theirs.status_code == 403
        assert "The queue is" not in theirs.text
        assert 'href="/operations"' not in (await browser.get("/")).text
        refused = await browser.post("/ui/operations/pause", {"reason": "mine"})
        assert refused.status_code == 403
    async with browsing(people.api) as browser:
        await browser.sign_in(ADMIN_KEY)
        admin = Reader(browser)
        await admin.open("/operations")
        await admin.send("/ui/operations/pause", reason="a look inside")
        assert "a look inside” — ADMIN_API_KEY" in admin.text
        await admin.send("/ui/operations/resume")


# --------------------------------------------------------------------------------- charts


@pytest.mark.parametrize(
    ("values", "top"),
    [([], 1), ([None], 1), ([0], 1), ([0.3], 0.5), ([1], 1), ([21, None], 25)],
)
def test_the_scale_ends_at_a_round_number(
    values: list[float | None], top: float
) -> None:
    assert nice_top([Series("a", values)]) == pytest.approx(top)


def test_a_line_is_broken_where_there_is_nothing() -> None:
    values = [0, 1, None, 1]
    assert line(values, 1) == f"M0 {HEIGHT}L160 0"
    assert lonely(values, 1) == "M480 0h.01"
    assert line([1, None, 0.5, 1], 1) == "M320 60L480 0"
    assert line([None, None], 1) == lonely([None, None], 1) == ""


def test_bars_are_as_high_as_their_values() -> None:
    series = Series("a", [2, 0, None, 4])
    chart = bar_chart("x", "X", list("abcd"), series, str, unit="u", summary="s")

    # The scale ends at five.
    assert [bar.height for bar in chart.bars] == [HEIGHT * 2 / 5, HEIGHT * 4 / 5]
    assert [words for _, words in chart.rows] == [["2"], ["0"], ["–"], ["4"]]


def test_a_chart_without_any_value_says_so() -> None:
    chart = line_chart(
        "x", "X", ["a"], [Series("a", [None])], str, unit="u", summary="s"
    )

    assert chart.is_empty
