"""A browser without scripts: reads pages, keeps cookies, sends the forms it was given."""

from __future__ import annotations

import html
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.api.served import Api, check_safe

_TOKEN = re.compile(r'name="csrf_token" value="([^"]+)"')
_TAG = re.compile(r"<[^>]*>")


class Visitor:
    """Somebody who looks at the pages of an API."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self._token = ""

    async def look(self, path: str, *, htmx: bool = False, **query: Any) -> str:
        """Read a page, or a piece of one; it must be there."""
        answer = await self.get(path, htmx=htmx, **query)
        assert answer.status_code == 200, answer.text
        if found := _TOKEN.search(answer.text):
            self._token = found[1]
        return answer.text

    async def get(
        self, path: str, *, htmx: bool = False, **query: Any
    ) -> httpx.Response:
        """Ask for a page, whatever comes."""
        return await self.client.get(path, params=query or None, headers=_headers(htmx))

    async def send(
        self, path: str, *, htmx: bool = False, **fields: Any
    ) -> httpx.Response:
        """Send a form with the token of the page that was looked at last."""
        data: dict[str, Any] = {"csrf_token": self._token} | fields
        return await self.client.post(path, data=data, headers=_headers(htmx))

    async def sign_in(self, key: str) -> None:
        """Sign in with an API key."""
        await self.look("/signin")
        answer = await self.send("/signin", key=key)
        assert answer.status_code == 303, answer.text


def _headers(htmx: bool) -> dict[str, str]:
    kind = {"HX-Request": "true"} if htmx else {}
    return {"Accept": "text/html"} | kind


@asynccontextmanager
async def visiting(api: Api) -> AsyncIterator[Visitor]:
    """Give a visitor with an empty jar of cookies."""

    async def check(answer: httpx.Response) -> None:
        check_safe(answer)

    async with httpx.AsyncClient(
        base_url=api.origin,
        verify=False,  # nothing here speaks TLS, and reading certificates takes time
        timeout=10,
        event_hooks={"request": [api.contract.listen], "response": [check]},
    ) as client:
        yield Visitor(client)


def words(page: str) -> str:
    """Give what can be read on a page, in one line."""
    return " ".join(html.unescape(_TAG.sub(" ", page)).split())


def card(page: str, job_id: object) -> str:
    """Give the card of a job on a page."""
    found = re.search(rf'<article [^>]*id="job-{job_id}".*?</article>', page, re.DOTALL)
    assert found, f"no card of {job_id}"
    return found[0]


def cards(page: str) -> list[str]:
    """Name the jobs whose cards are on a page, in order."""
    return re.findall(r'<article [^>]*data-job="([^"]+)"', page)
