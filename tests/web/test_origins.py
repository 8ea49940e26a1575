"""While no keys are demanded: what pages of other sites can make a browser do here."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.served import Api, check_problem
from tests.web.browsing import Browsing, browsing

ELSEWHERE = [
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "https://evil.example"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "null"},
    {"Origin": "http://["},
    # A name that was pointed at our address: to the browser that page is one of ours.
    {"Origin": "http://evil.example:8000", "Host": "evil.example:8000"},
    {"Origin": "http://evil.example.", "Host": "evil.example."},
]
FROM_HERE = [
    {},
    {"Sec-Fetch-Site": "none"},
    {"Origin": "http://localhost:8000", "Host": "localhost:8000"},
    {"Origin": "http://[::1]:8000", "Host": "[::1]:8000"},
    {"Origin": "http://studio", "Host": "studio"},
    {"Origin": "http://mgs.localhost", "Host": "mgs.localhost"},
]
# What needs no permission of ours before a browser sends it.
SIMPLE = {"Content-Type": "text/plain"}


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    return await emptied(shared, shared_sandbox)


async def write(api: Api, path: str, headers: dict[str, str]) -> httpx.Response:
    body = b'{"prompt": "bought by a page elsewhere", "reason": "mischief"}'
    async with httpx.AsyncClient(base_url=api.origin, timeout=20) as client:
        return await client.post(path, content=body, headers=SIMPLE | headers)


@pytest.mark.parametrize("headers", ELSEWHERE, ids=str)
async def test_a_page_elsewhere_buys_and_stops_nothing(
    api: Api, headers: dict[str, str]
) -> None:
    for path in ("/api/v1/generate", "/api/v1/queue/pause", "/api/v1/queue/resume"):
        answer = await write(api, path, headers)

        assert answer.status_code == 403, path
        assert check_problem(answer).code == "foreign_origin"
    assert (await api.client.get("/api/v1/jobs")).json()["items"] == []


@pytest.mark.parametrize("headers", FROM_HERE, ids=str)
async def test_programs_and_pages_of_ours_may_write(
    api: Api, headers: dict[str, str]
) -> None:
    own = {"Origin": api.origin} if headers == {} else headers

    for given in (own, {}):
        answer = await write(api, "/api/v1/generate?dry_run=true", given)
        assert answer.status_code == 422, answer.text  # `reason` is no field of it


async def test_listed_and_public_names_are_believed(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(
        sandbox,
        cors_origins=("https://gallery.example",),
        public_base_url="https://media.example",
    )
    listed = {"Origin": "https://gallery.example", "Sec-Fetch-Site": "cross-site"}
    public = {"Origin": "https://media.example", "Host": "media.example"}

    for headers in (listed, public):
        answer = await write(api, "/api/v1/generate", headers)
        assert answer.status_code == 422, answer.text


async def test_forms_are_not_taken_from_a_name_that_was_pointed_here(api: Api) -> None:
    async with browsing(api) as browser:
        await browser.get("/")
        for headers in ELSEWHERE:
            answer = await browser.post("/ui/form", {"prompt": "x"}, headers=headers)
            assert answer.status_code == 403, headers


async def test_reading_needs_no_origin(api: Api) -> None:
    async with httpx.AsyncClient(base_url=api.origin) as client:
        answer = await client.get("/api/v1/jobs", headers=ELSEWHERE[0])

    assert answer.status_code == 200


# ------------------------------------------------------------------------- odd requests


@pytest.fixture
async def browser(api: Api) -> AsyncIterator[Browsing]:
    async with browsing(api) as browser:
        await browser.get("/")
        yield browser


@pytest.mark.parametrize("text", ["a\x00b", "\x7f", "\x1b[0m"])
@pytest.mark.parametrize(
    ("path", "field"),
    [("/ui/operations/pause", "reason"), ("/ui/operations/retry", "code")],
)
async def test_what_cannot_be_written_down_is_refused(
    browser: Browsing, path: str, field: str, text: str
) -> None:
    for send in (browser.post, browser.htmx):
        answer = await send(path, {field: text})
        assert answer.status_code == 422, answer.text


async def test_forms_come_in_the_letters_of_our_pages(browser: Browsing) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\\ud800\r\n--b--'
    )
    for path in ("/ui/form", "/ui/jobs", "/ui/webhooks", "/ui/operations/pause"):
        answer = await browser.client.post(
            path,
            content=body,
            headers={
                "Content-Type": "multipart/form-data; boundary=b; charset=unicode_escape",
                "X-CSRF-Token": browser.token,
            },
        )
        assert answer.status_code == 415, path


async def test_a_number_nobody_counts_to_is_refused(browser: Browsing) -> None:
    answer = await browser.get(f"/operations?tried=1&again={'9' * 5000}")

    assert answer.status_code == 400


async def test_health_checkers_are_answered(api: Api) -> None:
    async with httpx.AsyncClient(base_url=api.origin) as client:
        as_browser = {"Accept": "text/html"}
        assert (await client.head("/", headers=as_browser)).status_code == 200
        assert (await client.head("/signin", headers=as_browser)).status_code == 303
        led = await client.head("/", follow_redirects=True)

    assert (led.status_code, led.url.path, led.content) == (200, "/docs", b"")
