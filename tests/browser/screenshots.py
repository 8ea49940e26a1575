"""Take the pictures of the documentation again: `python -m tests.browser.screenshots docs/images`.

Starts the whole system as `make run` does, with a folder and ports of its own, has the local
provider draw, and looks at the pages with a real browser.  Nothing is left of it but the files.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess  # nosec B404 - our own command line
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final

import httpx
from PIL import Image
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.browser.conftest import CHROMIUM, DESK, PHONE
from tests.support.waiting import wait_for, wait_for_async

READY: Final = re.compile(r"Ready in .*?: (http://\S+)")
SANDBOX: Final = re.compile(r"sandbox +(\S+)")
PATIENCE: Final = 120.0  # seconds

FAILS: Final = "a crowded square, every face in full detail"
SLOW: Final = "a glass greenhouse at night, lit from within"
FEATURED: Final = "a lighthouse on a rocky coast at sunset, long exposure"
DRAWN: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("swirls of smoke and silk, abstract", {"aspect_ratio": "1:1"}),
    ("a tulip in a glass, still life", {"aspect_ratio": "3:4"}),
    ("harbour with sailing boats, summer day", {"aspect_ratio": "16:9"}),
    ("a cabin in the pine forest, first snow", {"aspect_ratio": "1:1"}),
    ("mountains above the fog at dawn", {"aspect_ratio": "4:3"}),
    ("sand dunes of the sahara in the evening", {"aspect_ratio": "16:9"}),
    ("a minimalist bauhaus poster, geometric shapes", {"aspect_ratio": "3:4"}),
    ("rose garden, botanical study in spring light", {"aspect_ratio": "1:1"}),
    ("aurora over a frozen sea, stars", {"aspect_ratio": "3:2"}),
    ("tokyo skyline in the rain, neon at night", {"aspect_ratio": "4:3"}),
    (
        FEATURED,
        {
            "aspect_ratio": "4:3",
            "num_outputs": 2,
            "model": "black-forest-labs/flux-dev",
        },
    ),
)


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture of the documentation: a page, in a light, on a device."""

    name: str
    path: str
    device: Any
    is_dark: bool
    height: int | None = None  # of what is shown; None: what fits on the screen


HOME: Final = "/?prompt=a+red+fox+in+the+first+snow%2C+morning+light"

SHOTS: Final = (
    Shot("home-desk-light", HOME, DESK, False, 1960),
    Shot("home-desk-dark", HOME, DESK, True, 1960),
    Shot("home-phone-light", HOME, PHONE, False, 2200),
    Shot("home-phone-dark", HOME, PHONE, True, 2200),
    Shot("job-desk-dark", "{job}", DESK, True, 1180),
    Shot("job-phone-light", "{job}", PHONE, False, 1400),
    Shot("operations-desk-light", "/operations", DESK, False, 1180),
    Shot("webhooks-desk-dark", "/webhooks", DESK, True, 1100),
)


# ------------------------------------------------------------------------------ the system


@contextmanager
def started(folder: Path, receiver: str) -> Iterator[tuple[str, str]]:
    """Run everything; give the addresses of the API and of the local provider."""
    log = folder / "up.log"
    command = [sys.executable, "-m", "app.cli", "up", "--port", "8640"]
    environment = os.environ | {
        "OUTBOUND_HOSTS": receiver,
        "REPLICATE_API_TOKEN": "",
        "PRICE_FILE": "app/services/prices.toml",  # the local provider asks for nothing
    }
    with log.open("wb") as out:
        process = subprocess.Popen(  # nosec B603 - our own command line
            [*command, "--data-dir", str(folder / "data")],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        ready = wait_for(
            lambda: READY.search(log.read_text()), within=PATIENCE, what="it is ready"
        )
        sandbox = SANDBOX.search(log.read_text())
        assert sandbox, "a token is set: the local provider was not started"
        yield ready[1], f"http://{sandbox[1]}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)


class _Receiver(BaseHTTPRequestHandler):
    """Takes webhooks; now and then a try finds it away."""

    count = 0

    def do_POST(self) -> None:
        """Answer a call."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).count += 1
        self.send_response(503 if type(self).count % 5 == 2 else 204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def receiving() -> Iterator[str]:
    """Run a receiver of webhooks; give its host and port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Receiver)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# --------------------------------------------------------------------------- what is shown


async def fill(api: httpx.AsyncClient, sandbox: str, receiver: str) -> str:
    """Have pictures made, some of them with trouble; give the job that is looked at."""
    rules = [
        {
            "fault": "prediction.fails",
            "match": {"prompt_contains": FAILS},
            "params": {"error": "NSFW content detected. Try a different prompt."},
        },
        {
            "fault": "prediction.slow",
            "match": {"prompt_contains": SLOW},
            "params": {"seconds": 600},
        },
    ]
    async with httpx.AsyncClient(
        headers={"Authorization": "Bearer screenshots"}
    ) as provider:
        answer = await provider.put(f"{sandbox}/sandbox/faults", json={"rules": rules})
        answer.raise_for_status()
    for description, events in (("the shop", []), ("the archive", ["job.completed"])):
        hook = {
            "url": f"http://{receiver}/{description.rpartition(' ')[2]}",
            "description": description,
            "events": events,
        }
        (await api.post("/api/v1/webhooks", json=hook)).raise_for_status()
    featured = ""
    for seed, (prompt, options) in enumerate(DRAWN, start=1):
        body = {"prompt": prompt, "seed": seed} | options
        featured = await _made(api, body)
    await _made(api, {"prompt": FAILS})
    answer = await api.post("/api/v1/generate", json={"prompt": SLOW})
    answer.raise_for_status()
    await _is_drawing(api, answer.json()["job_id"])
    return f"/jobs/{featured}"


async def _made(api: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """Make one job, and wait for its end."""
    answer = await api.post("/api/v1/generate", json=body)
    answer.raise_for_status()
    job_id = str(answer.json()["job_id"])

    async def is_over() -> bool:
        told = await api.get(f"/api/v1/status/{job_id}", params={"wait": 20})
        return told.json()["status"] not in ("pending", "processing")

    await wait_for_async(is_over, within=PATIENCE, what="the job is over")
    return job_id


async def _is_drawing(api: httpx.AsyncClient, job_id: str) -> None:
    async def is_drawing() -> bool:
        told = (await api.get(f"/api/v1/status/{job_id}")).json()
        return bool(told["stage"] == "generating")

    await wait_for_async(is_drawing, within=PATIENCE, what="it is drawn")


# ------------------------------------------------------------------------------- taking them


@asynccontextmanager
async def looking(browser: Browser, origin: str, shot: Shot) -> AsyncIterator[Page]:
    """Open a page as its shot wants it."""
    context = await browser.new_context(
        base_url=origin,
        viewport=shot.device,
        color_scheme="dark" if shot.is_dark else "light",
        reduced_motion="reduce",
        locale="en-GB",
        timezone_id="UTC",
        device_scale_factor=1,
    )
    try:
        yield await context.new_page()
    finally:
        await context.close()


async def take(browser: Browser, origin: str, shot: Shot, folder: Path) -> None:
    """Take one picture."""
    async with looking(browser, origin, shot) as page:
        await page.set_viewport_size(
            shot.device | {"height": shot.height or shot.device["height"]}
        )
        await page.goto(shot.path)
        if shot.path == HOME:
            await expect(page.locator(".estimate-cost")).to_be_visible()
        for image in await page.locator("main img").all():
            if await image.is_visible():
                await image.scroll_into_view_if_needed()
        await page.evaluate("scrollTo(0, 0)")
        await page.wait_for_function(
            "[...document.images].every((one) => one.complete)"
        )
        png = await page.screenshot()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").save(
            folder / f"{shot.name}.webp", quality=82, method=6, exact=True
        )


async def main(folder: Path) -> None:
    """Take all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, receiving() as receiver:
        with started(Path(scratch), receiver) as (origin, sandbox):
            async with httpx.AsyncClient(base_url=origin, timeout=60) as api:
                job = await fill(api, sandbox, receiver)
            async with async_playwright() as playwright:
                browser = await playwright.chromium.launch(
                    executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
                )
                for shot in SHOTS:
                    there = replace(shot, path=shot.path.format(job=job))
                    await take(browser, origin, there, folder)
                await browser.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")))
