"""Hearing that this process was asked to stop, while its open requests are still served.

A server finishes the requests under way before it tells the application that it ends.
Whoever answers late on purpose (long-polls, streams) would hold that end up, until the
platform kills the process and breaks the connection.  The signal itself comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def told_by_signals(stopping: asyncio.Event) -> Iterator[None]:
    """Set the event at SIGTERM or SIGINT, besides what these do already.

    For the running loop.  Does nothing outside of the main thread, which alone may handle
    signals, and nothing for a signal that has no handler: it ends the process by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    replaced: dict[signal.Signals, tuple[Handler, Handler]] = {}
    for number in SIGNALS:
        before = signal.getsignal(number)
        if callable(before):
            ours = _both(loop, stopping, before)
            signal.signal(number, ours)
            replaced[number] = ours, before
    try:
        yield
    finally:
        for number, (ours, before) in replaced.items():
            # Somebody who came after us keeps the place, and calls us in vain.
            if signal.getsignal(number) is ours:
                signal.signal(number, before)


def _both(
    loop: asyncio.AbstractEventLoop, stopping: asyncio.Event, before: Handler
) -> Handler:
    def handle(number: int, frame: FrameType | None) -> None:
        if not loop.is_closed():
            # Between any two instructions of the loop's own code: nothing else is safe here.
            loop.call_soon_threadsafe(stopping.set)
        before(number, frame)

    return handle


async def pause(seconds: float, stopping: asyncio.Event) -> None:
    """Sleep, but no longer than until the event is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()
