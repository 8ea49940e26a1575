"""Somebody who reads pages for their words and follows where their forms lead."""

from __future__ import annotations

import html
import re

import httpx

from tests.web.browsing import Browsing


class Reader:
    """Somebody at a browser without scripts: reads pages, sends their forms, is led on."""

    def __init__(self, browser: Browsing) -> None:
        self.browser = browser
        self.status = 0
        self.text = ""

    async def open(self, path: str) -> str:
        """Go to a page and give its words."""
        page = await self.browser.get(path)
        self.status, self.text = page.status_code, words_of(page.text)
        return self.text

    async def send(
        self, action: str, *, htmx: bool = False, **fields: str
    ) -> httpx.Response:
        """Send a form of the page that is open."""
        send = self.browser.htmx if htmx else self.browser.post
        answer = await send(action, fields)
        if answer.status_code == 303:
            await self.open(answer.headers["location"])
        return answer


def words_of(page: str) -> str:
    """Give the words of a page or a piece of one, with single spaces."""
    without = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", page)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", without)).split())
