"""Waiting for something to become true, with a deadline: the only place where tests pause."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    probe: Callable[[], T | None], *, within: float, what: str, every: float = 0.02
) -> T:
    """Ask until the answer is true and return it; fail the test after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(
                f"{what}: not within {within} s, last answer {answer!r}"
            )
        time.sleep(every)


async def wait_for_async(
    probe: Callable[[], Awaitable[T | None]],
    *,
    within: float,
    what: str,
    every: float = 0.02,
) -> T:
    """Ask until the answer is true and return it; fail the test after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        answer = await probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(
                f"{what}: not within {within} s, last answer {answer!r}"
            )
        await asyncio.sleep(every)
