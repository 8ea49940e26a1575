"""Files of the pages: those of others are as they were published, and all can be kept for ever."""

from __future__ import annotations

import hashlib
import re
import tomllib
from typing import Any

import pytest

from app.web.static_files import STATIC, static_url
from tests.api.served import Api
from tests.support.servers import ROOT

VENDORED = STATIC / "vendor"
LISTED: list[dict[str, Any]] = tomllib.loads((VENDORED / "vendored.toml").read_text())[
    "file"
]
TEMPLATES = ROOT / "app/web/templates"


@pytest.mark.parametrize("file", LISTED, ids=lambda file: file["name"])
def test_a_file_of_others_is_as_it_was_published(file: dict[str, Any]) -> None:
    found = hashlib.sha256((VENDORED / file["name"]).read_bytes()).hexdigest()

    assert found == file["sha256"]
    assert file["version"] in file["name"]
    assert file["licence"] and file["source"]


def test_every_file_of_others_is_listed() -> None:
    there = {path.name for path in VENDORED.iterdir()} - {"vendored.toml"}

    assert there == {file["name"] for file in LISTED}


def test_pages_name_only_files_that_are_there() -> None:
    named = {
        name
        for path in TEMPLATES.glob("*.html")
        for name in re.findall(r'static_url\("([^"]+)"\)', path.read_text())
    }

    assert {"app.css", "app.js", "vendor/htmx-2.0.11.min.js"} <= named
    assert [name for name in named if not (STATIC / name).is_file()] == []


def test_all_files_of_the_pages_are_packaged() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = data["package-data"]
    packaged = {
        path
        for package, folder in (("app", "app"), ("app.web", "app/web"))
        for pattern in patterns[package]
        for path in (ROOT / folder).glob(pattern)
    }

    there = {path for path in STATIC.rglob("*") if path.is_file()}
    assert there | set(TEMPLATES.iterdir()) <= packaged


async def test_an_address_that_names_the_content_may_be_kept(shared: Api) -> None:
    exact = await shared.client.get(static_url("app.css"))
    plain = await shared.client.get("/static/app.css")
    old = await shared.client.get("/static/app.css?v=0123456789abcdef")
    twice = await shared.client.get(static_url("app.css") + "&v=1")

    assert exact.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert exact.headers["content-type"].startswith("text/css")
    for other in (plain, old, twice):
        assert other.status_code == 200
        assert other.headers["cache-control"] == "no-cache"
