"""Reading Server-Sent Events as a browser does (HTML standard, section 9.2.6)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from app.models import schemas


@dataclass(frozen=True, slots=True)
class Told:
    """One event; `id` is the last one heard up to it."""

    id: str | None
    event: str
    data: dict[str, Any]

    @property
    def place(self) -> tuple[str, int]:
        """Give the job and its version."""
        return self.data["job_id"], self.data["version"]


class Stream:
    """What comes out of one connection: events, the id to come back with, comments."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.last_id: str | None = None
        self.retry: int | None = None
        self.comments = 0
        self._events = self._read()

    def __aiter__(self) -> AsyncIterator[Told]:
        return self._events

    async def next(self) -> Told:
        """Wait for the next event."""
        return await anext(self._events)

    async def all(self) -> list[Told]:
        """Read to the end."""
        return [one async for one in self._events]

    async def _read(self) -> AsyncIterator[Told]:
        name, data, last_id = "message", "", self.last_id
        async for line in self.answer.aiter_lines():
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line:
                self.last_id = last_id
                if data:
                    yield _checked(Told(last_id, name, json.loads(data)))
                name, data = "message", ""
            elif not field:
                self.comments += 1
            elif field == "id":
                last_id = value
            elif field == "event":
                name = value
            elif field == "data":
                assert not data, "one line of data"
                data = value
            elif field == "retry":
                self.retry = int(value)
            else:
                raise AssertionError(f"what is {line}?")


def _checked(told: Told) -> Told:
    if told.event == "reset":
        schemas.StreamReset.model_validate(told.data)
    else:
        event = schemas.JobEvent.model_validate(told.data)
        assert event.type == told.event
    return told


@asynccontextmanager
async def streaming(
    client: httpx.AsyncClient, path: str, *, last_id: str | None = None, **params: Any
) -> AsyncIterator[Stream]:
    """Open a stream; anything but one fails."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    async with client.stream(
        "GET", path, params=params, headers=headers, timeout=30
    ) as answer:
        if answer.status_code != 200:
            await answer.aread()
        assert answer.status_code == 200, answer.text
        yield Stream(answer)
