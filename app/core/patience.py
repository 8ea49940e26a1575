"""Giving up in time, even on work that cannot be stopped in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, TypeVar

import structlog

T = TypeVar("T")
log = structlog.get_logger(__name__)

AGAIN = timedelta(milliseconds=500)
LONGEST_END = timedelta(seconds=5)

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


async def end(
    *tasks: asyncio.Task[Any],
    patience: timedelta = LONGEST_END,
    again: timedelta = AGAIN,
) -> None:
    """Cancel the tasks and return when they have ended, or soon after the time is up.

    What they raise is nobody's concern any more.  To cancel once is not enough:
    `asyncio.wait_for` of Python 3.11, with which redis-py sends, loses a cancellation that comes
    in the moment its work is done (github.com/python/cpython/issues/86296, mended in 3.12), and
    a loop goes on as if nothing had happened.
    """
    deadline = time.monotonic() + patience.total_seconds()
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=again.total_seconds())
        if left and time.monotonic() >= deadline:
            log.error("task.left_behind", tasks=sorted(one.get_name() for one in left))
            break
    for task in tasks:
        if task.done():
            _bury(task)
        else:
            _abandoned.add(task)
            task.add_done_callback(_bury)


def _bury(task: asyncio.Task[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled():
        task.exception()  # seen: nobody waits for it any more
