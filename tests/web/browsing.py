"""A browser without scripts: keeps cookies, brings the token of the page it was given.

Every page is checked: its headers, and that nothing in it needs what the policy forbids.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import Any

import httpx

from tests.api.served import Api, check_safe

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_FORBIDDEN = re.compile(r"on[a-z]+|style|hx-on.*", re.IGNORECASE)
_SAID = ("prompt", "key", "csrf_token")


class Elements(HTMLParser):
    """The elements of a page, each with its attributes and the text right behind its start."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(html)

    def handle_starttag(
        self, tag: str, attrs: Sequence[tuple[str, str | None]]
    ) -> None:
        """Note an element."""
        self.all.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_data(self, data: str) -> None:
        """Note the text."""
        if self.all:
            self.all[-1][2].append(data)

    def named(self, name: str) -> list[tuple[str, dict[str, str], str]]:
        """Give the controls of a form with this name."""
        return [
            (tag, attributes, "".join(text))
            for tag, attributes, text in self.all
            if attributes.get("name") == name
        ]


def fields(html: str) -> dict[str, str]:
    """Give what a browser would send of a page's controls, but for choices of selects."""
    found: dict[str, str] = {}
    for tag, attributes, text in Elements(html).all:
        name = attributes.get("name")
        kind = attributes.get("type", "")
        if name is None or tag not in ("input", "textarea") or kind == "file":
            continue
        if kind in ("checkbox", "radio") and "checked" not in attributes:
            continue
        found[name] = "".join(text) if tag == "textarea" else attributes["value"]
    return found


def problems(html: str) -> dict[str, str]:
    """Give what the page says is wrong, by the name of the field; shown ones alone."""
    shown = re.findall(
        r'<p class="problem" id="problem-([\w-]+)"(?! hidden)[^>]*>.*?<span>(.*?)</span>',
        html,
        re.DOTALL,
    )
    return {name: text for name, text in shown}


class Browsing:
    """One browser at an API."""

    def __init__(self, api: Api, client: httpx.AsyncClient) -> None:
        self.api = api
        self.client = client
        self.token = ""

    async def get(self, path: str, **headers: str) -> httpx.Response:
        """Open a page."""
        return self._keep(await self.client.get(path, headers=headers))

    async def post(
        self,
        path: str,
        data: Mapping[str, Any] | None = None,
        *,
        files: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a form, with the token of the last page unless it has one."""
        sent = {"csrf_token": self.token} | dict(data or {})
        self.api.contract.said |= {
            str(sent[name]) for name in _SAID if len(str(sent.get(name, ""))) > 8
        }
        answer = await self.client.post(path, data=sent, files=files, headers=headers)
        return self._keep(answer)

    async def htmx(
        self, path: str, data: Mapping[str, Any] | None = None, **options: Any
    ) -> httpx.Response:
        """Send a form as htmx does."""
        headers = {"HX-Request": "true", "HX-Current-URL": f"{self.api.origin}/"}
        return await self.post(path, data, headers=headers, **options)

    async def sign_in(self, key: str) -> httpx.Response:
        """Sign in with a key."""
        await self.get("/signin")
        answer = await self.post("/signin", {"key": key})
        assert answer.status_code == 303, answer.text
        await self.get("/")
        return answer

    def _keep(self, answer: httpx.Response) -> httpx.Response:
        check_safe(answer)
        for cookie in self.client.cookies.jar:
            if cookie.value:
                self.api.contract.said.add(cookie.value)
        if answer.headers.get("content-type", "").startswith("text/html"):
            check_page(answer)
            if found := re.search(r'name="csrf_token" value="([\w-]+)"', answer.text):
                self.token = found[1]
        else:
            assert answer.status_code < 400 or not answer.text, answer.text
        return answer


def check_page(answer: httpx.Response) -> None:
    """Fail for a page that is kept by anybody, or needs more than its policy allows."""
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["cache-control"] == "no-store"
    for tag, attributes, text in Elements(answer.text).all:
        wrong = [name for name in attributes if _FORBIDDEN.fullmatch(name)]
        assert not wrong, f"<{tag}> has {wrong}"
        if tag in ("script", "style"):
            assert "src" in attributes and not "".join(text).strip(), text
        for name in ("src", "href", "action", "formaction"):
            place = attributes.get(name, "/")
            assert place.startswith(("/", "#", "data:image/")), place
            assert not place.startswith("//"), place


@asynccontextmanager
async def browsing(api: Api, **headers: str) -> AsyncIterator[Browsing]:
    """Open a browser nobody has used before."""
    async with httpx.AsyncClient(
        base_url=api.origin,
        headers={"Accept": "text/html,application/xhtml+xml"} | headers,
        verify=False,  # nothing here speaks TLS, and reading certificates takes time
        timeout=20,
    ) as client:
        yield Browsing(api, client)
