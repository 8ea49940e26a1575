"""A process hears that it shall stop, and does what it did at the signal before."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from app.core.stopping import SIGNALS, pause, told_by_signals

LONG = 30.0


@contextlib.contextmanager
def handled(number: signal.Signals) -> Iterator[list[int]]:
    """Handle the signal as a server would; give what came."""
    came: list[int] = []

    def handle(given: int, frame: FrameType | None) -> None:
        came.append(given)

    before = signal.signal(number, handle)
    try:
        yield came
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
async def test_a_signal_is_heard_and_still_does_what_it_did(
    number: signal.Signals,
) -> None:
    stopping = asyncio.Event()
    with handled(number) as came, told_by_signals(stopping):
        signal.raise_signal(number)
        assert came == [number]
        await asyncio.wait_for(stopping.wait(), LONG)


async def test_afterwards_the_signal_is_as_before() -> None:
    stopping = asyncio.Event()
    with handled(signal.SIGTERM) as came:
        theirs = signal.getsignal(signal.SIGTERM)
        with told_by_signals(stopping):
            assert signal.getsignal(signal.SIGTERM) is not theirs
        assert signal.getsignal(signal.SIGTERM) is theirs
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
    assert came and not stopping.is_set()


async def test_who_handles_the_signal_after_us_keeps_it() -> None:
    with contextlib.ExitStack() as later, handled(signal.SIGTERM):
        with told_by_signals(asyncio.Event()):
            later.enter_context(handled(signal.SIGTERM))
            theirs = signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is theirs


@pytest.mark.parametrize("how", [signal.SIG_DFL, signal.SIG_IGN])
async def test_a_signal_without_a_handler_is_left_alone(how: signal.Handlers) -> None:
    """One that ends the process must go on doing so; one that is ignored, too."""
    before = signal.signal(signal.SIGTERM, how)
    try:
        with told_by_signals(asyncio.Event()):
            assert signal.getsignal(signal.SIGTERM) is how
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_nothing_happens() -> None:
    async def enter() -> object:
        with told_by_signals(asyncio.Event()):
            return signal.getsignal(signal.SIGTERM)

    seen: list[object] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: seen.append(asyncio.run(enter())))
    thread.start()
    thread.join(LONG)
    assert seen == [before]


async def test_a_pause_ends_when_it_is_time_to_stop() -> None:
    stopping = asyncio.Event()
    resting = asyncio.create_task(pause(LONG, stopping))
    await asyncio.sleep(0)
    assert not resting.done()
    stopping.set()
    await asyncio.wait_for(resting, 1)


async def test_a_pause_ends_by_itself() -> None:
    stopping = asyncio.Event()
    await pause(0.01, stopping)
    assert not stopping.is_set()
