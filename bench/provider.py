"""A provider for load: Replicate's wire protocol, lean enough not to be what is measured.

    python -m bench.provider [--port 9010] [--seconds 0] [--spread 0] [--hold] [--format jpeg]

What `python -m sandbox` does for one caller this does for thousands, and no more of it:
create (with `Prefer: wait`), get, list with cursor, cancel, model, account, webhook secret,
output files, signed webhooks `start` and `completed`.  Every prediction succeeds after
`--seconds`, or with `--hold` when `POST /control/release` comes.  Nothing is checked.

`GET /control/ends` tells when predictions ended, `GET /control/stats` counts requests.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import random
import re
import signal
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlencode

import aiohttp
import orjson
import uvloop

from bench.lean_http import Answer, Asked, Connection
from bench.pictures import CONTENT_TYPES, EXTENSIONS, KINDS, Album, draw
from sandbox.catalogue import Catalogue
from sandbox.webhooks import RETRY_SHARES, sign

PAGE = 100
LONGEST_WAIT = 60.0
SECRET = "whsec_" + base64.b64encode(b"a secret for benchmarks only").decode()


# ------------------------------------------------------------------------------ predictions


@dataclass(slots=True)
class Prediction:
    """One purchase.  `ends_at` is None while it is held; times are Unix times."""

    id: str
    number: int
    model: str
    given: bytes
    created_at: float
    ends_at: float | None
    webhook: str | None
    events: tuple[str, ...]
    is_cancelled: bool = False

    def has_ended(self, now: float) -> bool:
        """Tell whether it was over at that moment."""
        return self.ends_at is not None and self.ends_at <= now


class Book:
    """All predictions, in order of creation."""

    def __init__(
        self, base: str, album: Album, *, seconds: float | None, spread: float
    ) -> None:
        self._base = base
        self._seconds = seconds
        self._spread = spread
        self._album = album
        self._by_id: dict[str, Prediction] = {}
        self._ordered: list[Prediction] = []

    def create(self, model: str, body: Mapping[str, Any]) -> Prediction:
        """Start a prediction; it runs at once."""
        now = time.time()
        if self._ordered:
            now = max(now, self._ordered[-1].created_at)
        prediction = Prediction(
            id=base64.b32encode(os.urandom(16)).decode().rstrip("=").lower(),
            number=len(self._ordered),
            model=model,
            given=orjson.dumps(body["input"]),
            created_at=now,
            ends_at=self._end_of_one_that_starts(now),
            webhook=body.get("webhook"),
            events=tuple(body.get("webhook_events_filter") or ("output", "completed")),
        )
        self._by_id[prediction.id] = prediction
        self._ordered.append(prediction)
        return prediction

    def _end_of_one_that_starts(self, now: float) -> float | None:
        if self._seconds is None:
            return None
        return now + self._seconds * (1 + self._spread * random.uniform(-1, 1))

    def find(self, key: str) -> Prediction | None:
        """Give the prediction, None when unknown."""
        return self._by_id.get(key)

    def held(self) -> list[Prediction]:
        """List what waits for its release."""
        return [p for p in self._ordered if p.ends_at is None]

    def ends(self) -> dict[str, float]:
        """Tell when predictions ended."""
        now = time.time()
        return {
            p.id: p.ends_at for p in self._ordered if p.ends_at and p.ends_at <= now
        }

    def page(self, since: float | None, before: int | None) -> list[Prediction]:
        """Give up to `PAGE` predictions from a moment on, newest first, below a number."""
        low = 0
        if since is not None:
            low = bisect_left(self._ordered, since, key=lambda p: p.created_at)
        high = len(self._ordered) if before is None else before
        return self._ordered[max(low, high - PAGE) : max(low, high)][::-1]

    def file(self, key: str) -> bytes | None:
        """Give the output of a prediction that succeeded."""
        prediction = self._by_id.get(key)
        if prediction is None or not prediction.has_ended(time.time()):
            return None
        return self._album.file(prediction.number, prediction.id.encode())

    def shown(self, prediction: Prediction, now: float) -> dict[str, Any]:
        """Give the object as GET answers it."""
        key, ended = prediction.id, prediction.has_ended(now)
        status, output, metrics = "processing", None, {}
        if ended:
            status = "canceled" if prediction.is_cancelled else "succeeded"
            spent = (prediction.ends_at or now) - prediction.created_at
            metrics = {"predict_time": spent, "total_time": spent}
            if not prediction.is_cancelled:
                name = f"out-0.{EXTENSIONS[self._album.kind]}"
                output = [f"{self._base}/files-out/{key}/{name}"]
        created = _stamp(prediction.created_at)
        return {
            "id": key,
            "model": prediction.model,
            "version": "hidden",
            "input": orjson.Fragment(prediction.given),
            "output": output,
            "logs": "",
            "error": None,
            "source": "api",
            "status": status,
            "data_removed": False,
            "created_at": created,
            "started_at": created,
            "completed_at": _stamp(prediction.ends_at) if ended else None,
            "metrics": metrics,
            "urls": {
                "get": f"{self._base}/v1/predictions/{key}",
                "cancel": f"{self._base}/v1/predictions/{key}/cancel",
            },
        }


def _stamp(moment: float | None) -> str | None:
    if moment is None:
        return None
    return f"{datetime.fromtimestamp(moment, UTC).isoformat(timespec='microseconds')[:26]}Z"


# --------------------------------------------------------------------------------- webhooks


class Courier:
    """Delivers signed events; the last one of a prediction is tried again for a minute."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=128),
            timeout=aiohttp.ClientTimeout(total=10),
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self.outcomes: Counter[str] = Counter()

    def watch(self, prediction: Prediction) -> None:
        """Send the events of a prediction whose end is known, each at its time."""
        if "completed" in prediction.events and prediction.ends_at is not None:
            delay = max(0.0, prediction.ends_at - time.time())
            loop = asyncio.get_running_loop()
            loop.call_later(delay, self.send, prediction, "completed")

    def send(self, prediction: Prediction, event: str) -> None:
        """Send an event about the prediction as it is now, if it was asked for."""
        if prediction.webhook is None or event not in prediction.events:
            return
        # A timer may be early by the wall clock.
        now = time.time()
        if event == "completed" and prediction.ends_at is not None:
            now = max(now, prediction.ends_at)
        shown = self._book.shown(prediction, now)
        tries = len(RETRY_SHARES) if event == "completed" else 0
        task = asyncio.create_task(
            self._deliver(prediction.webhook, orjson.dumps(shown), tries)
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Drop what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()

    async def _deliver(self, url: str, body: bytes, retries: int) -> None:
        message = f"msg_{os.urandom(8).hex()}"
        for share in (*RETRY_SHARES[:retries], None):
            now = int(time.time())
            headers = {
                "Content-Type": "application/json",
                "webhook-id": message,
                "webhook-timestamp": str(now),
                "webhook-signature": sign(SECRET, message, now, body),
            }
            try:
                async with self._session.post(
                    url, data=body, headers=headers
                ) as answer:
                    if answer.status < 300:
                        self.outcomes["delivered"] += 1
                        return
                    self.outcomes[f"refused {answer.status}"] += 1
            except (aiohttp.ClientError, TimeoutError, OSError):
                self.outcomes["unanswered"] += 1
            if share is not None:
                await asyncio.sleep(share * 60)


# ----------------------------------------------------------------------------------- routes

NOT_FOUND = Answer(404, b'{"detail":"The requested resource could not be found."}')


class Routes:
    """What each request is answered."""

    def __init__(self, base: str, book: Book, courier: Courier, album: Album) -> None:
        self._base = base
        self._book = book
        self._courier = courier
        self._album = album
        self._models = {model.ref: model for model in Catalogue.bundled()}
        self.counts: Counter[str] = Counter()
        self._table: list[tuple[re.Pattern[str], Callable[..., Answer]]] = [
            (re.compile(f"(?:{pattern})$"), answer)
            for pattern, answer in (
                (r"GET /v1/predictions/(\w+)", self._get),
                (r"POST /v1/predictions", self._create),
                (r"GET /files-out/(\w+)/[\w.-]+", self._file),
                (r"GET /v1/predictions", self._list),
                (r"POST /v1/models/([\w.-]+/[\w.-]+)/predictions", self._create),
                (r"POST /v1/predictions/(\w+)/cancel", self._cancel),
                (r"GET /v1/models/([\w.-]+/[\w.-]+)", self._describe),
                (r"GET /v1/account", self._account),
                (r"GET /v1/webhooks/default/secret", self._secret),
                (r"POST /control/release", self._release),
                (r"GET /control/ends", self._ends),
                (r"GET /control/stats", self._stats),
            )
        ]

    def answer(self, asked: Asked) -> Answer:
        """Answer a request."""
        line = f"{asked.method} {asked.path}"
        for pattern, handler in self._table:
            if (match := pattern.match(line)) is not None:
                if not asked.path.startswith("/control"):
                    self.counts[handler.__name__.strip("_")] += 1
                return handler(asked, *match.groups())
        return NOT_FOUND

    def _create(self, asked: Asked, model: str | None = None) -> Answer:
        body = orjson.loads(asked.body)
        prediction = self._book.create(model or body["version"].partition(":")[0], body)
        loop = asyncio.get_running_loop()
        loop.call_soon(self._courier.send, prediction, "start")
        self._courier.watch(prediction)
        left = LONGEST_WAIT + 1
        if prediction.ends_at is not None:
            left = prediction.ends_at - prediction.created_at
        if not asked.prefer.startswith("wait"):
            return Answer(201, self._early(prediction))
        if left > LONGEST_WAIT:
            late = partial(self._early, prediction)
            return Answer(202, b"", after=LONGEST_WAIT, late=late)
        return Answer(201, b"", after=left, late=partial(self._final, prediction))

    def _early(self, prediction: Prediction) -> bytes:
        """Write a prediction down that nobody has seen running yet."""
        shown = self._book.shown(prediction, prediction.created_at - 1)
        return orjson.dumps(shown | {"status": "starting", "started_at": None})

    def _final(self, prediction: Prediction) -> bytes:
        """Write a prediction down as it is at its end."""
        now = max(time.time(), prediction.ends_at or 0.0)
        return orjson.dumps(self._book.shown(prediction, now))

    def _get(self, asked: Asked, key: str) -> Answer:
        prediction = self._book.find(key)
        if prediction is None:
            return NOT_FOUND
        return _json(self._book.shown(prediction, time.time()))

    def _cancel(self, asked: Asked, key: str) -> Answer:
        prediction, now = self._book.find(key), time.time()
        if prediction is None:
            return NOT_FOUND
        if not prediction.has_ended(now):
            prediction.is_cancelled, prediction.ends_at = True, now
            self._courier.watch(prediction)
        return _json(self._book.shown(prediction, now))

    def _list(self, asked: Asked) -> Answer:
        since, now = asked.query.get("created_after"), time.time()
        before = asked.query.get("cursor")
        found = self._book.page(
            None if since is None else datetime.fromisoformat(since).timestamp(),
            None if before is None else int(before),
        )
        following = None
        if len(found) == PAGE and found[-1].number > 0:
            query = urlencode({**asked.query, "cursor": found[-1].number})
            following = f"{self._base}/v1/predictions?{query}"
        shown = [self._book.shown(prediction, now) for prediction in found]
        return _json({"previous": None, "next": following, "results": shown})

    def _file(self, asked: Asked, key: str) -> Answer:
        body = self._book.file(key)
        if body is None:
            return NOT_FOUND
        return Answer(200, body, CONTENT_TYPES[self._album.kind])

    def _describe(self, asked: Asked, ref: str) -> Answer:
        model = self._models.get(ref)
        if model is None:
            return NOT_FOUND
        latest = {"id": model.version, "openapi_schema": model.openapi_schema}
        return _json(
            {
                "owner": model.owner,
                "name": model.name,
                "description": model.description,
                "is_official": True,
                "latest_version": latest,
            }
        )

    def _account(self, asked: Asked) -> Answer:
        return _json({"type": "user", "username": "bench"})

    def _secret(self, asked: Asked) -> Answer:
        return _json({"key": SECRET})

    def _release(self, asked: Asked) -> Answer:
        """End what is held, all at once or evenly over so many seconds."""
        held, over = self._book.held(), float(asked.query.get("over", "0"))
        now = time.time()
        for number, prediction in enumerate(held):
            prediction.ends_at = now + over * number / len(held)
            self._courier.watch(prediction)
        return _json({"released": len(held)})

    def _ends(self, asked: Asked) -> Answer:
        return _json(self._book.ends())

    def _stats(self, asked: Asked) -> Answer:
        return _json(
            {
                "requests": self.counts,
                "webhooks": self._courier.outcomes,
                "file_bytes": self._album.size_bytes,
            }
        )


def _json(body: Any) -> Answer:
    return Answer(200, orjson.dumps(body))


# ------------------------------------------------------------------------------------ start


async def serve(options: argparse.Namespace, album: Album) -> None:
    """Serve until SIGINT or SIGTERM."""
    base = f"http://127.0.0.1:{options.port}"
    book = Book(
        base,
        album,
        seconds=None if options.hold else options.seconds,
        spread=options.spread,
    )
    courier = Courier(book)
    routes = Routes(base, book, courier, album)
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    await loop.create_server(
        lambda: Connection(routes.answer), "127.0.0.1", options.port, backlog=1024
    )
    await stopping.wait()
    await courier.close()


def add_picture_options(
    parser: argparse.ArgumentParser, *, side: int = 1024, kilobytes: int = 100
) -> None:
    """Add what pictures the provider makes; `picture_options` hands it on."""
    parser.add_argument("--format", choices=KINDS, default="jpeg")
    parser.add_argument("--side", type=int, default=side, help="pixels")
    parser.add_argument("--kilobytes", type=int, default=kilobytes, help="but for PNG")


def picture_options(options: argparse.Namespace) -> list[str]:
    """Write the options of `add_picture_options` down again."""
    return [
        f"--format={options.format}",
        f"--side={options.side}",
        f"--kilobytes={options.kilobytes}",
    ]


def main() -> None:
    """Draw the pictures, then serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9010)
    parser.add_argument("--seconds", type=float, default=0.0, help="a prediction's run")
    parser.add_argument("--spread", type=float, default=0.0, help="share of it, ±")
    parser.add_argument("--hold", action="store_true", help="until it is released")
    add_picture_options(parser)
    options = parser.parse_args()
    album = draw(
        options.format, count=4, side=options.side, kilobytes=options.kilobytes
    )
    uvloop.run(serve(options, album))


if __name__ == "__main__":
    main()
