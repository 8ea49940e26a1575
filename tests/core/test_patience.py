"""Ending what does not want to end."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import pytest
import structlog

from app.core.patience import end, within

SOON = timedelta(milliseconds=20)


async def deaf(times: int, ended: list[str]) -> None:
    """Go on for ever, deaf to the first cancellations."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            times -= 1
            if times < 0:
                ended.append("heard")
                raise


async def started(*tasks: asyncio.Task[None]) -> tuple[asyncio.Task[None], ...]:
    """Let the tasks begin: one that never ran ends at the first cancellation."""
    await asyncio.sleep(0)
    return tasks


async def test_a_lost_cancellation_is_repeated() -> None:
    ended: list[str] = []
    tasks = await started(*(asyncio.create_task(deaf(n, ended)) for n in (0, 1, 3)))

    await end(*tasks, again=SOON)

    assert all(task.cancelled() for task in tasks)
    assert ended == ["heard"] * 3


async def test_what_never_ends_is_named_and_left() -> None:
    ended: list[str] = []
    task = asyncio.create_task(deaf(1000, ended), name="stubborn")
    await started(task)

    began = time.monotonic()
    with structlog.testing.capture_logs() as logs:
        await end(task, patience=SOON * 3, again=SOON)

    assert time.monotonic() - began < 5
    assert [one["tasks"] for one in logs if one["event"] == "task.left_behind"] == [
        ["stubborn"]
    ]
    assert not task.done()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)


async def test_what_a_task_raises_at_its_end_is_nobodys_concern() -> None:
    async def fail() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError("at the end")

    async def fail_at_once() -> None:
        raise ValueError("at once")

    tasks = await started(
        asyncio.create_task(fail()), asyncio.create_task(fail_at_once())
    )

    await end(*tasks)
    await end()

    assert all(isinstance(task.exception(), ValueError) for task in tasks)


async def test_within_gives_up_on_work_that_does_not_hear_of_it() -> None:
    ended: list[str] = []

    with pytest.raises(TimeoutError):
        await within(SOON, deaf(0, ended))
    await asyncio.sleep(0.05)

    assert ended == ["heard"]
