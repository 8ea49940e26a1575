"""Many small calls as few large ones, with no timer and no added delay.

A call that arrives while nothing is running starts at once, alone; calls that arrive while
one is running share the next one.  So a batch is as large as the load makes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Collect single items and run them together.

    `run` gets the items in order of arrival and answers one result each, in order; a result
    that is an exception is raised to that caller alone.  When `run` itself raises and
    `is_shared` says the error is nobody's in particular (the database is gone), all its
    callers get it; else each item is run once more by itself, so that one bad item fails
    alone.  `run` must therefore be atomic: all or nothing.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]],
        *,
        limit: int,
        lanes: int = 1,
        is_shared: Callable[[BaseException], bool] = lambda error: False,
    ) -> None:
        self._run = run
        self._limit = limit
        self._lanes = lanes
        self._is_shared = is_shared
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._busy = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, item: T) -> R:
        """Run the item, together with whoever else is waiting, and give its result."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._busy < self._lanes:
            self._busy += 1
            task = asyncio.create_task(self._drain())
            self._tasks.add(task)  # the loop itself keeps only weak references
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                size = min(len(self._waiting), self._limit)
                batch = [self._waiting.popleft() for _ in range(size)]
                batch = [entry for entry in batch if not entry[1].done()]
                if batch:
                    await self._settle(batch)
        finally:
            # In the same step as finding nothing to do: whoever just got a result and
            # calls again must not take this lane for a busy one and wait for ever.
            self._busy -= 1

    async def _settle(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._run([item for item, _ in batch])
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:  # handed to whoever waits, not swallowed
            if len(batch) > 1 and not self._is_shared(error):
                for entry in batch:
                    await self._settle([entry])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
