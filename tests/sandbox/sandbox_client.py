"""A small client for the tests of the sandbox, and a place that webhooks can be sent to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from sandbox.config import SandboxConfig
from sandbox.runner import Sandbox

SCHNELL = "black-forest-labs/flux-schnell"
PRO = "black-forest-labs/flux-1.1-pro"
FAST = SandboxConfig(
    speed=0, creates_per_minute=0, requests_per_minute=0, pictures="plain"
)


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: Any
    body: Any


class Client:
    """Speaks to one sandbox."""

    def __init__(self, sandbox: Sandbox, session: aiohttp.ClientSession) -> None:
        self.url = sandbox.url
        self.session = session

    async def call(self, method: str, path: str, **options: Any) -> Answer:
        """Send a request with a token; a path or a whole address."""
        headers = {"Authorization": "Bearer r8_test", **options.pop("headers", {})}
        url = path if path.startswith("http") else self.url + path
        async with self.session.request(
            method, url, headers=headers, **options
        ) as answer:
            raw = await answer.read()
            is_json = "json" in answer.content_type
            body = await answer.json(content_type=None) if is_json and raw else raw
            return Answer(answer.status, answer.headers, body)

    async def create(self, prompt: str = "a fox", /, **body: Any) -> Answer:
        """Create with flux-schnell unless told otherwise."""
        headers = body.pop("headers", {})
        given = {"prompt": prompt, **body.pop("more", {})}
        payload = {"version": SCHNELL, "input": given, **body}
        return await self.call("POST", "/v1/predictions", json=payload, headers=headers)

    async def get(self, prediction_id: str) -> Any:
        """Return a prediction."""
        return (await self.call("GET", f"/v1/predictions/{prediction_id}")).body

    async def until(self, prediction_id: str, *statuses: str) -> Any:
        """Look until the prediction has one of these statuses; fail after 5 seconds."""
        async with asyncio.timeout(5):
            while (seen := await self.get(prediction_id))["status"] not in statuses:
                await asyncio.sleep(0.01)
        return seen

    async def finished(self, prompt: str = "a fox", /, **body: Any) -> Any:
        """Create and wait for the end."""
        wait = {"Prefer": "wait=10"}
        answer = await self.create(prompt, headers=wait, **body)
        assert answer.status == 201, answer.body
        return answer.body

    async def fault(self, name: str, **rule: Any) -> None:
        """Switch one fault on, in place of all others."""
        rules = {"rules": [{"fault": name, **rule}]}
        answer = await self.call("PUT", "/sandbox/faults", json=rules)
        assert answer.status == 200, answer.body

    async def purchases(self) -> int:
        """Return how many predictions were made."""
        return (await self.call("GET", "/sandbox/stats")).body["purchases"]


@dataclass
class Letterbox:
    """Takes webhooks; answers with the next of ``answers``, 200 when there is none."""

    url: str = ""
    letters: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    async def _take(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.letters.append((headers, await request.read()))
        status = self.answers.pop(0) if self.answers else 200
        location = {"Location": self.url} if status in (301, 302) else None
        return web.Response(status=status, headers=location)

    async def __aenter__(self) -> Letterbox:
        app = web.Application()
        app.router.add_post("/hook", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/hook"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def hold(self, count: int) -> None:
        """Wait until there are so many letters; fail after 5 seconds."""
        async with asyncio.timeout(5):
            while len(self.letters) < count:
                await asyncio.sleep(0.01)
