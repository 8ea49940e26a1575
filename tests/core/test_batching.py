import asyncio
from collections.abc import Sequence

import pytest

from app.core.batching import Batcher


class Sink:
    """Records its batches; holds each until `go` is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()
        self.at_once = 0
        self.most_at_once = 0

    async def run(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.go.wait()
        finally:
            self.at_once -= 1
        if 13 in items:
            raise ValueError("bad luck")
        if 99 in items:
            raise ConnectionError("the database is gone")
        return [LookupError("odd") if item == 7 else item * 10 for item in items]


async def _turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_lone_call_starts_at_once() -> None:
    sink = Sink()
    batcher = Batcher(sink.run, limit=10)

    call = asyncio.create_task(batcher(1))
    await _turns()

    assert sink.batches == [[1]]
    sink.go.set()
    assert await call == 10


async def test_calls_that_arrive_meanwhile_share_the_next_batch_in_order() -> None:
    sink = Sink()
    batcher = Batcher(sink.run, limit=10)
    first = asyncio.create_task(batcher(1))
    await _turns()
    rest = [asyncio.create_task(batcher(item)) for item in (2, 3, 4)]
    await _turns()

    sink.go.set()

    assert await asyncio.gather(first, *rest) == [10, 20, 30, 40]
    assert sink.batches == [[1], [2, 3, 4]]


async def test_a_batch_is_never_larger_than_the_limit() -> None:
    sink = Sink()
    sink.go.set()
    batcher = Batcher(sink.run, limit=3)

    answers = await asyncio.gather(*(batcher(item) for item in range(20, 28)))

    assert answers == [item * 10 for item in range(20, 28)]
    assert max(map(len, sink.batches)) == 3


@pytest.mark.parametrize("lanes", [1, 2, 3])
async def test_no_more_batches_run_at_once_than_there_are_lanes(lanes: int) -> None:
    sink = Sink()
    batcher = Batcher(sink.run, limit=1, lanes=lanes)
    calls = [asyncio.create_task(batcher(item)) for item in range(20, 26)]
    await _turns(10)

    sink.go.set()
    await asyncio.gather(*calls)

    assert sink.most_at_once == lanes


async def test_a_refused_item_fails_alone() -> None:
    sink = Sink()
    sink.go.set()
    batcher = Batcher(sink.run, limit=10)

    answers = await asyncio.gather(
        *(batcher(item) for item in (1, 7, 2)), return_exceptions=True
    )

    assert [answers[0], answers[2]] == [10, 20]
    assert isinstance(answers[1], LookupError)


async def test_an_item_that_breaks_its_batch_fails_alone_in_the_end() -> None:
    sink = Sink()
    sink.go.set()
    batcher = Batcher(sink.run, limit=10)

    answers = await asyncio.gather(
        *(batcher(item) for item in (1, 2, 13, 3)), return_exceptions=True
    )

    assert [answers[0], answers[1], answers[3]] == [10, 20, 30]
    assert isinstance(answers[2], ValueError)
    assert await batcher(4) == 40


async def test_an_error_that_is_nobodys_fault_reaches_all_without_another_try() -> None:
    sink = Sink()
    batcher = Batcher(
        sink.run, limit=10, is_shared=lambda error: isinstance(error, ConnectionError)
    )
    first = asyncio.create_task(batcher(1))
    await _turns()
    rest = [asyncio.create_task(batcher(item)) for item in (2, 99, 3)]
    await _turns()
    sink.go.set()

    answers = await asyncio.gather(first, *rest, return_exceptions=True)

    assert answers[0] == 10
    assert {type(answer) for answer in answers[1:]} == {ConnectionError}
    assert sink.batches == [[1], [2, 99, 3]]


async def test_a_caller_who_gives_up_while_waiting_is_left_out() -> None:
    sink = Sink()
    batcher = Batcher(sink.run, limit=10)
    first = asyncio.create_task(batcher(1))
    await _turns()
    second, third = (asyncio.create_task(batcher(item)) for item in (2, 3))
    await _turns()

    second.cancel()
    await _turns()
    sink.go.set()

    assert await asyncio.gather(first, third) == [10, 30]
    assert sink.batches == [[1], [3]]


async def test_a_caller_who_gives_up_while_running_does_not_disturb_the_others() -> (
    None
):
    sink = Sink()
    batcher = Batcher(sink.run, limit=10)
    first = asyncio.create_task(batcher(1))
    await _turns()
    calls = [asyncio.create_task(batcher(item)) for item in (2, 3)]
    sink.go.set()
    await first
    calls[0].cancel()

    assert await calls[1] == 30
    assert await batcher(4) == 40


@pytest.mark.parametrize("fails", [False, True])
async def test_who_calls_again_at_once_is_not_forgotten(fails: bool) -> None:
    """The lane that gave the first result has just ended when the second call comes."""

    async def run(items: Sequence[int]) -> Sequence[int]:
        if fails and items == [1]:
            raise ValueError("the first")
        return items

    batcher: Batcher[int, int] = Batcher(run, limit=10)

    async with asyncio.timeout(1):
        for item in range(1, 6):
            try:
                assert await batcher(item) == item
            except ValueError:
                assert item == 1
