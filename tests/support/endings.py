"""Ends that are sure: whatever a test starts in this process is over when the test is.

All tests of a session share one event loop.  A server or a worker that does not end would go
on in it, beside the tests that come after, and these would be blamed.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = (
    40.0  # seconds; below pytest's own, which would end the test and not the rest
)
_LAST = 2.0


@asynccontextmanager
async def sure_to_end(
    context: AbstractAsyncContextManager[T], *, what: str, within: float = PATIENCE
) -> AsyncIterator[T]:
    """Enter the context; leave it within so many seconds, or fail and say what goes on.

    Then every task that was begun meanwhile is cancelled.
    """
    before = asyncio.all_tasks()
    value = await context.__aenter__()
    try:
        yield value
    except BaseException as error:
        trace = error.__traceback__
        if not await _leave(context, (type(error), error, trace), before, what, within):
            raise
    else:
        await _leave(context, (None, None, None), before, what, within)


async def _leave(
    context: AbstractAsyncContextManager[Any],
    met: tuple[Any, Any, Any],
    before: set[asyncio.Task[Any]],
    what: str,
    within: float,
) -> bool | None:
    leaving = asyncio.ensure_future(context.__aexit__(*met))
    done, _ = await asyncio.wait((leaving,), timeout=within)
    if done:
        return leaving.result()
    mine = asyncio.current_task()
    left = {task for task in asyncio.all_tasks() - before if task is not mine}
    stacks = "".join(_stack_of(task) for task in left)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_LAST)
        if not done:
            break
    raise AssertionError(f"{what} did not end within {within:g} s:\n{stacks}")


def _stack_of(task: asyncio.Task[Any]) -> str:
    text = io.StringIO()
    task.print_stack(file=text)
    return text.getvalue()
