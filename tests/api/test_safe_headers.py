"""Headers that keep browsers harmless, and documentation that still works under them.

That every answer has them, `Contract.check` looks at in every test of the API.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from app.api.safe_headers import missing, safe_headers
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.served import Api, check_safe

BROWSER = shutil.which("chromium") or shutil.which("chrome")
# ReDoc's script names its maker's logo; no page of ours asks another host for anything.
LOGO = "cdn.redoc.ly/redoc/logo-mini.svg"


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    return await emptied(shared, shared_sandbox)


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/docs", "/redoc", "/openapi.json", "/docs-files/swagger-ui.css"),
        *("/static/robots.txt", "/static/nothing", "/nothing", "/metrics"),
        *("/api/v1/jobs", "/api/v1/jobs?limit=0", "/api/v1/generate", "/media/nothing"),
    ],
)
async def test_every_answer_is_safe(api: Api, path: str) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "POST"):
        check_safe(await api.client.request(method, path))


async def test_a_crash_is_safe_as_well(api: Api) -> None:
    async def crash() -> None:
        raise RuntimeError("a mistake")

    api.app.add_api_route("/crash-safely", crash, include_in_schema=False)

    answer = await api.client.get("/crash-safely")

    assert answer.status_code == 500
    check_safe(answer)


@pytest.mark.parametrize(
    ("base_url", "is_insisted"),
    [
        *((None, False), ("http://media.example", False)),
        ("https://media.example", True),
    ],
)
async def test_https_is_insisted_on_where_it_is_there(
    serve: Serve, base_url: str | None, is_insisted: bool
) -> None:
    api: Api = await serve(public_base_url=base_url)

    answer = await api.client.get("/nothing")

    assert ("strict-transport-security" in answer.headers) is is_insisted


async def test_json_may_load_nothing_and_be_framed_by_nobody(api: Api) -> None:
    answer = await api.client.get("/api/v1/jobs")

    policy = answer.headers["content-security-policy"]
    assert policy == "default-src 'none'; frame-ancestors 'none'"


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_a_page_names_the_scripts_it_runs(api: Api, path: str) -> None:
    answer = await api.client.get(path)

    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy and "http" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self'")
    assert answer.text.count("<script>") == policy.split("style-src")[0].count("sha256")


def test_what_an_answer_says_itself_is_left_alone() -> None:
    own = [(b"X-Frame-Options", b"SAMEORIGIN"), (b"etag", b"1")]

    added = missing(safe_headers(None), own)

    names = [name for name, _ in added]
    assert b"x-frame-options" not in names
    assert b"x-content-type-options" in names


@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)"
)
@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ("/docs", "/api/v1/generate"),
        ("/docs#/jobs/generate_api_v1_generate_post", "application/json"),
        ("/redoc", "Submit a job"),
    ],
)
async def test_a_browser_shows_the_page_and_misses_nothing(
    api: Api, tmp_path: Path, page: str, shown: str
) -> None:
    assert BROWSER is not None
    process = await asyncio.create_subprocess_exec(
        BROWSER,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-breakpad"),
        *("--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom"),
        *(f"--user-data-dir={tmp_path / 'browser'}", f"{api.origin}{page}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        dom, said = await process.communicate()

    console = [line for line in said.decode().splitlines() if ":CONSOLE" in line]
    bad = [line for line in console if "violates" in line or "Error" in line]
    assert [line for line in bad if LOGO not in line] == []
    assert shown in dom.decode()
