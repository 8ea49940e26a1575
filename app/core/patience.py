"""Giving up in time, even on work that cannot be stopped in time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_abandoned: set[asyncio.Task[Any]] = set()


async def within(patience: timedelta, work: Coroutine[Any, Any, T]) -> T:
    """Give the result of the work, or raise `TimeoutError` when the time is up.

    `asyncio.timeout` waits until cancelled work has cleaned up, and closing a connection
    whose host is lost takes seconds.  Here the work is cancelled and left to itself.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=patience.total_seconds())
    finally:
        if not task.done():
            task.cancel()
            _abandoned.add(task)
            task.add_done_callback(_bury)
    if not task.done():
        raise TimeoutError
    return task.result()


def _bury(task: asyncio.Task[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled():
        task.exception()  # seen: nobody waits for it any more
