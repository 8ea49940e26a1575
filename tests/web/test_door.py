"""Who sees a page, whose forms are taken, and how a refusal looks."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from http.cookies import SimpleCookie
from urllib.parse import quote

import httpx
import pytest
from pydantic import SecretStr

from app.core.links import derived_key
from app.services.gatekeeper import CONFIGURED
from app.web.session import local_path
from app.web.sessions import Sessions
from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.keyed import ADMIN_KEY, METRICS_TOKEN, People
from tests.api.served import TOKEN, Api
from tests.support.object_store import BUCKET, aws_environment
from tests.support.waiting import wait_for_async
from tests.web.browsing import Browsing, browsing

HERS = "a harbour only alice may see"


@pytest.fixture
async def browser(people: People) -> AsyncIterator[Browsing]:
    async with browsing(people.api) as browser:
        yield browser


@pytest.fixture
async def alice(people: People, browser: Browsing) -> Browsing:
    await browser.sign_in(people.keys["alice"].key)
    return browser


def cookie_of(answer: httpx.Response, name: str) -> dict[str, str]:
    """Give a cookie's attributes, lower case; fails when it was not set."""
    for line in answer.headers.get_list("set-cookie"):
        morsels = SimpleCookie(line)
        if name in morsels:
            morsel = morsels[name]
            return {"value": morsel.value} | {
                key: str(value) for key, value in morsel.items() if value
            }
    raise AssertionError(f"no {name} in {answer.headers.get_list('set-cookie')}")


# ------------------------------------------------------------------------------ signing in


async def test_whoever_is_not_signed_in_is_led_there_and_back(
    people: People, browser: Browsing
) -> None:
    asked = await browser.get("/?model=stability-ai%2Fsdxl")

    assert asked.status_code == 303
    where = asked.headers["location"]
    assert where == "/signin?next=" + quote("/?model=stability-ai%2Fsdxl", safe="/")
    await browser.get(where)
    answer = await browser.post(
        "/signin", {"key": ADMIN_KEY, "next": "/?model=stability-ai%2Fsdxl"}
    )
    assert answer.status_code == 303
    assert answer.headers["location"] == "/?model=stability-ai%2Fsdxl"
    assert (await browser.get("/")).status_code == 200
    again = await browser.get("/signin?next=/webhooks")
    assert (again.status_code, again.headers["location"]) == (303, "/webhooks")


async def test_the_cookie_is_for_this_browser_and_no_script(browser: Browsing) -> None:
    answer = await browser.sign_in(ADMIN_KEY)

    cookie = cookie_of(answer, "mgs_session")
    assert cookie["httponly"] == "True"
    assert cookie["samesite"] == "lax"
    assert cookie["path"] == "/"
    assert cookie["max-age"] == str(12 * 3600)
    assert "domain" not in cookie and "secure" not in cookie
    assert ADMIN_KEY not in cookie["value"]


@pytest.mark.parametrize("how", ["told by the proxy", "known by the settings"])
async def test_with_https_no_neighbour_can_set_the_cookie(
    serve: Serve, sandbox: Sandbox, how: str
) -> None:
    settings = {"auth_required": True, "admin_api_key": ADMIN_KEY}
    if how == "known by the settings":
        settings["public_base_url"] = "https://media.example"
    api: Api = await serve(sandbox, **settings)
    headers = {"Host": "media.example"}
    if how == "told by the proxy":
        headers["X-Forwarded-Proto"] = "https"
    async with browsing(api, **headers) as browser:
        first = await browser.get("/signin")
        visitor = cookie_of(first, "__Host-mgs_visitor")
        # Over plain http to the test's server, httpx keeps secure cookies to itself.
        sent = {"Cookie": f"__Host-mgs_visitor={visitor['value']}"}
        answer = await browser.post("/signin", {"key": ADMIN_KEY}, headers=sent)

    assert visitor["secure"] == "True"
    cookie = cookie_of(answer, "__Host-mgs_session")
    assert cookie["secure"] == "True" and cookie["path"] == "/"
    assert "domain" not in cookie


@pytest.mark.parametrize(
    ("key", "status", "text"),
    [
        ("", 401, "Enter an API key."),
        ("mgs_" + "A" * 43, 401, "The API key is unknown, expired or revoked."),
        ("x" * 600, 401, "The API key is unknown, expired or revoked."),
        (METRICS_TOKEN, 403, "The pages need a key with the scope read."),
    ],
)
async def test_a_key_that_opens_nothing_is_told_beside_the_field(
    people: People, browser: Browsing, key: str, status: int, text: str
) -> None:
    await browser.get("/signin?next=/webhooks")

    answer = await browser.post("/signin", {"key": key, "next": "/webhooks"})

    assert answer.status_code == status
    assert f"</svg>{text}</p>" in answer.text
    assert 'name="next" value="/webhooks"' in answer.text
    assert key not in answer.text or not key
    assert "mgs_session" not in "".join(answer.headers.get_list("set-cookie"))


async def test_wrong_keys_are_counted_as_at_the_api(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox, auth_required=True, admin_api_key=ADMIN_KEY)
    async with browsing(api) as browser:
        await browser.get("/signin")
        answers = [
            await browser.post("/signin", {"key": f"wrong{number}"})
            for number in range(12)
        ]

    assert answers[0].status_code == 401
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert "Too many wrong API keys" in answers[-1].text


@pytest.mark.parametrize(
    ("given", "there"),
    [
        *(("/webhooks", "/webhooks"), ("/?q=a%20b&x=1", "/?q=a%20b&x=1")),
        *(("/jobs/1#top", "/jobs/1#top"), ("", "/"), ("/", "/")),
        *(("//evil.example", "/"), ("/\\evil.example", "/"), ("\\\\evil", "/")),
        *(("https://evil.example", "/"), ("javascript:alert(1)", "/")),
        *(("/a\r\nSet-Cookie: x=1", "/"), ("/ü", "/"), (" /x", "/"), ("/a b", "/")),
        *(("/a\\b", "/"), ("/" + "a" * 3000, "/"), ("webhooks", "/")),
    ],
)
def test_one_is_led_on_within_these_pages_only(given: str, there: str) -> None:
    assert local_path(given) == there


async def test_signing_out_makes_the_browser_forget(alice: Browsing) -> None:
    assert (await alice.get("/")).status_code == 200

    answer = await alice.post("/signout")

    assert (answer.status_code, answer.headers["location"]) == (303, "/signin")
    assert cookie_of(answer, "mgs_session")["max-age"] == "0"
    assert (await alice.get("/")).status_code == 303


async def test_a_session_ends_within_a_second_of_its_key(
    people: People, browser: Browsing
) -> None:
    made = await people.key("carol")
    await browser.sign_in(made.key)

    await people.admin.delete(f"/api/v1/keys/{made.key_id}")

    async def is_out() -> bool:
        return (await browser.get("/")).status_code == 303

    await wait_for_async(is_out, within=1.0, what="the end of the session", every=0.1)
    piece = await browser.htmx("/ui/estimate")
    assert (piece.status_code, piece.headers["hx-redirect"]) == (401, "/signin")


async def test_a_session_ends_when_its_key_expires(
    people: People, browser: Browsing
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=1.5)
    made = await people.key("dave", expires_at=soon.isoformat())
    await browser.sign_in(made.key)

    async def is_out() -> bool:
        return (await browser.get("/")).status_code == 303

    await wait_for_async(is_out, within=4, what="the end of the session", every=0.2)


async def test_the_session_of_a_configured_key_dies_with_it(
    people: People, browser: Browsing
) -> None:
    """As after a restart with another ADMIN_API_KEY."""
    sessions: Sessions = people.api.app.state.sessions
    browser.client.cookies.set(
        "mgs_session", sessions.open("the admin key of yesterday", CONFIGURED)
    )
    assert (await browser.get("/")).status_code == 303

    browser.client.cookies.set("mgs_session", sessions.open(ADMIN_KEY, CONFIGURED))
    assert (await browser.get("/")).status_code == 200


async def test_sessions_are_signed_with_the_keys_of_links(people: People) -> None:
    sessions: Sessions = people.api.app.state.sessions
    same = Sessions([derived_key(TOKEN)])

    assert same.read(sessions.open(ADMIN_KEY, CONFIGURED)) is not None


# ------------------------------------------------------------------------- what is believed


async def test_the_api_does_not_believe_the_cookie(
    people: People, alice: Browsing
) -> None:
    cookies = alice.client.cookies
    async with httpx.AsyncClient(base_url=people.api.origin, cookies=cookies) as client:
        for path in ("/api/v1/jobs", "/metrics", "/api/v1/keys"):
            assert (await client.get(path)).status_code == 401, path
        made = await client.post("/api/v1/generate", json={"prompt": HERS})
        assert made.status_code == 401


async def test_pages_do_not_believe_a_key_in_a_header(
    people: People, browser: Browsing
) -> None:
    answer = await browser.get("/", authorization=f"Bearer {ADMIN_KEY}")

    assert answer.status_code == 303


async def test_everybody_sees_their_own(people: People, alice: Browsing) -> None:
    made = await people.alice.post("/api/v1/generate", json={"prompt": HERS})
    assert made.status_code == 202

    async with browsing(people.api) as other, browsing(people.api) as admin:
        await other.sign_in(people.keys["bob"].key)
        await admin.sign_in(ADMIN_KEY)

        assert HERS in (await alice.get("/")).text
        assert HERS not in (await other.get("/")).text
        page = (await admin.get("/")).text
        assert HERS in page and 'href="/operations"' in page
        assert 'href="/operations"' not in (await alice.get("/")).text


async def test_who_may_only_look_gets_no_form(
    people: People, browser: Browsing
) -> None:
    await browser.sign_in((await people.key("eve", scopes=["read"])).key)

    home = await browser.get("/")
    made = await browser.htmx("/ui/jobs", {"prompt": "a picture of mine"})

    assert 'id="create"' not in home.text
    assert made.status_code == 403
    assert "This needs a key with the scope generate." in made.text


async def test_pages_count_against_the_keys_requests_a_minute(
    people: People, browser: Browsing
) -> None:
    limited = await people.key("frank", limits={"requests_per_minute": 5})
    await browser.sign_in(limited.key)

    answers = [await browser.get("/") for _ in range(6)]

    last = answers[-1]
    assert answers[0].status_code == 200
    assert last.status_code == 429 and int(last.headers["retry-after"]) >= 1
    assert "This key may make 5 requests a minute" in last.text
    assert answers[0].headers["x-ratelimit-limit-requests"] == "5"


# ------------------------------------------------------------------------------- forms

FORGED: list[tuple[str, dict[str, str], dict[str, str]]] = [
    ("no token", {"csrf_token": ""}, {}),
    ("a made-up token", {"csrf_token": "A" * 43}, {}),
    ("a made-up token in the header", {}, {"X-CSRF-Token": "A" * 43}),
    ("another site", {}, {"Sec-Fetch-Site": "cross-site"}),
    ("a neighbouring host", {}, {"Sec-Fetch-Site": "same-site"}),
    ("another origin", {}, {"Origin": "https://evil.example"}),
    ("a hidden origin", {}, {"Origin": "null"}),
]


@pytest.mark.parametrize(("what", "data", "headers"), FORGED, ids=lambda one: str(one))
async def test_a_form_that_no_page_of_ours_sent_is_refused(
    alice: Browsing, what: str, data: dict[str, str], headers: dict[str, str]
) -> None:
    for path in ("/ui/jobs", "/signout"):
        fields = {"prompt": "forged by somebody else"} | data
        answer = await alice.post(path, fields, headers=headers)

        assert answer.status_code == 403, path
        assert "Nothing was done" in answer.text
    assert "forged by somebody" not in (await alice.get("/")).text


async def test_a_token_is_no_use_in_another_browser(
    people: People, alice: Browsing
) -> None:
    async with browsing(people.api) as other:
        await other.sign_in(people.keys["bob"].key)
        stolen = {"csrf_token": alice.token}

        assert (await other.post("/signout", stolen)).status_code == 403
        assert (await other.post("/signout")).status_code == 303


async def test_a_form_from_here_is_taken(people: People, alice: Browsing) -> None:
    ours = {"Origin": people.api.origin, "Sec-Fetch-Site": "same-origin"}

    answer = await alice.post("/signout", headers=ours)

    assert answer.status_code == 303


async def test_a_sign_in_cannot_be_forged_either(browser: Browsing) -> None:
    answer = await browser.post("/signin", {"key": ADMIN_KEY})

    assert answer.status_code == 403


async def test_without_keys_forms_are_bound_to_the_browser(shared: Api) -> None:
    async with browsing(shared) as one, browsing(shared) as other:
        first = await one.get("/")
        await other.get("/")

        assert cookie_of(first, "mgs_visitor")["httponly"] == "True"
        stolen = await other.post("/ui/form", {"csrf_token": one.token})
        own = await other.post("/ui/form", {"prompt": "mine"})
        assert (stolen.status_code, own.status_code) == (403, 200)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        ((b"a=" + b"x" * 60_000 + b"&") * 5, "application/x-www-form-urlencoded", 413),
        (b"{}", "application/json", 415),
        (b"--b\r\nno-colon\r\n\r\n", "multipart/form-data; boundary=b", 400),
        (b"", "multipart/form-data", 400),
        (b"a=1&" * 201, "application/x-www-form-urlencoded", 400),
        (b"a=" + b"1" * 70_000, "application/x-www-form-urlencoded", 400),
    ],
)
async def test_what_is_no_form_is_refused_in_a_page(
    alice: Browsing, body: bytes, kind: str, status: int
) -> None:
    headers = {"Content-Type": kind, "X-CSRF-Token": alice.token}

    answer = await alice.client.post("/signout", content=body, headers=headers)

    assert answer.status_code == status
    assert "text/html" in answer.headers["content-type"]


# ---------------------------------------------------------------------------- refusals


async def test_an_address_that_leads_nowhere_is_a_page_for_people(
    alice: Browsing,
) -> None:
    page = await alice.get("/nothing/here")
    json = {"Accept": "application/json"}
    program = await alice.client.get("/nothing/here", headers=json)
    api = await alice.client.get("/api/v1/nothing")

    assert page.status_code == 404
    assert "There is nothing at this address." in page.text
    assert re.search(r"Request <code>\w{8,}</code>", page.text)
    for other in (program, api):
        assert other.status_code == 404
        assert other.headers["content-type"] == "application/problem+json"


async def test_whoever_asks_from_no_place_is_led_to_the_first_page(
    browser: Browsing,
) -> None:
    odd = {"HX-Request": "true", "HX-Current-URL": "http://["}

    answer = await browser.get("/ui/cards", **odd)

    assert (answer.status_code, answer.headers["hx-redirect"]) == (401, "/signin")


async def test_a_piece_that_is_refused_becomes_a_note(alice: Browsing) -> None:
    answer = await alice.htmx("/signout", {"csrf_token": "wrong"})

    assert answer.status_code == 403
    assert answer.headers["hx-retarget"] == "#toasts"
    assert 'class="toast toast-bad"' in answer.text and "<html" not in answer.text


async def test_a_crash_is_a_page_that_tells_nothing(shared: Api) -> None:
    async def crash() -> None:
        raise RuntimeError("a secret mistake")

    shared.app.add_api_route("/crash-in-a-page", crash, include_in_schema=False)
    async with browsing(shared) as browser:
        answer = await browser.get("/crash-in-a-page")

    assert answer.status_code == 500
    assert "Something went wrong on our side" in answer.text
    assert "secret mistake" not in answer.text


async def test_without_the_database_a_page_says_when_to_come_again(
    serve: Serve, sandbox: Sandbox
) -> None:
    nobody = SecretStr("postgresql://nobody@127.0.0.1:9/none")
    api: Api = await serve(sandbox, database_url=nobody)
    async with browsing(api) as browser:
        answer = await browser.get("/")

    assert answer.status_code == 503
    assert "Temporarily unavailable" in answer.text
    assert int(answer.headers["retry-after"]) >= 1


async def test_pictures_of_a_bucket_may_be_shown_and_nothing_else_of_it(
    serve: Serve, sandbox: Sandbox
) -> None:
    with aws_environment("http://127.0.0.1:9"):
        api: Api = await serve(sandbox, storage_url=f"s3://{BUCKET}/media")
    async with httpx.AsyncClient(base_url=api.origin) as client:
        answer = await client.get("/", headers={"Accept": "text/html"})

    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200
    assert "img-src 'self' data: http://127.0.0.1:9; " in policy
    assert policy.count("127.0.0.1:9") == 1
