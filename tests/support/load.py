"""Callers that do not rest: keep-alive clients in threads, who note how every call went."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from uuid_utils.compat import uuid7

PACE = 0.1  # seconds between two calls of one caller
READS = 5  # of each job, right after its submit
LONG_POLL = 20  # seconds
SMALL = {"parameters": {"megapixels": "0.25"}}

Turns = Iterator[str]


@dataclass(frozen=True, slots=True)
class Call:
    """One call that reached a server: its status, or how the connection broke, and when."""

    request_id: str
    method: str
    status: int | None
    seconds: float
    trouble: str = ""


class Load:
    """Submits and reads, from server to server in turn, while the block lasts.

    A server that refuses connections is passed over: whoever was not let in lost nothing.
    With `watched`, as many callers again wait for the end of that job all the time;
    end it before the block, or leaving takes as long as they wait.
    """

    def __init__(
        self, *origins: str, callers: int = 3, watched: str | None = None
    ) -> None:
        self.calls: list[Call] = []
        self.accepted: list[str] = []
        self._origins = origins
        self._ended = threading.Event()
        self._crashes: list[BaseException] = []
        self._watched = watched
        work = [self._work] if watched is None else [self._work, self._watch]
        self._threads = [
            threading.Thread(target=self._run, args=(does, n), name=f"caller {n}")
            for does in work
            for n in range(callers)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if error is None:
            assert not self._crashes, self._crashes

    @property
    def broken(self) -> Sequence[Call]:
        """The calls without a whole answer."""
        return [call for call in self.calls if call.status is None]

    def _run(self, does: Callable[[httpx.Client, Turns], None], number: int) -> None:
        try:
            with httpx.Client(timeout=30) as client:
                does(client, itertools.cycle(self._turns(number)))
        except BaseException as error:
            self._crashes.append(error)
            raise

    def _turns(self, number: int) -> Sequence[str]:
        first = number % len(self._origins)
        return (*self._origins[first:], *self._origins[:first])

    def _watch(self, client: httpx.Client, origins: Turns) -> None:
        while not self._ended.is_set():
            path = f"/api/v1/status/{self._watched}?wait={LONG_POLL}"
            self._call(client, "GET", f"{next(origins)}{path}")

    def _work(self, client: httpx.Client, origins: Turns) -> None:
        for turn in itertools.count():
            body = {
                "prompt": f"{threading.current_thread().name}, picture {turn}"
            } | SMALL
            url = f"{next(origins)}/api/v1/generate"
            answer = self._call(client, "POST", url, body)
            if answer is not None and answer.status_code == 202:
                job_id = answer.json()["job_id"]
                self.accepted.append(job_id)
                for _ in range(READS):
                    url = f"{next(origins)}/api/v1/status/{job_id}"
                    self._call(client, "GET", url)
            if self._ended.is_set():
                return

    def _call(
        self,
        client: httpx.Client,
        method: str,
        url: str,
        body: dict[str, Any] | None = None,
    ) -> httpx.Response | None:
        self._ended.wait(PACE)
        request_id = uuid7().hex
        headers = {"X-Request-ID": request_id}
        began = time.monotonic()
        try:
            answer = client.request(method, url, json=body, headers=headers)
        except httpx.ConnectError:
            return None
        except httpx.TransportError as error:
            took = time.monotonic() - began
            self.calls.append(Call(request_id, method, None, took, repr(error)))
            return None
        took = time.monotonic() - began
        self.calls.append(Call(request_id, method, answer.status_code, took))
        return answer
