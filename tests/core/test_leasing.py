import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from pydantic import SecretStr
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only

from app.core.database import open_engine
from app.core.leasing import Leadership
from tests.support.waiting import wait_for_async

KEY = 4711


@pytest.fixture
async def rival_engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = open_engine(SecretStr(database_url), name="rival", pool_size=2)
    yield engine
    await engine.dispose()


async def _end_session_of_the_leader(engine: AsyncEngine) -> None:
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "SELECT pg_terminate_backend(pid, 2000) FROM pg_locks"
                " WHERE locktype = 'advisory' AND objid = :key"
            ),
            {"key": KEY},
        )


async def test_only_one_leads(engine: AsyncEngine, rival_engine: AsyncEngine) -> None:
    async with Leadership(engine, KEY) as first, Leadership(rival_engine, KEY) as other:
        assert [await first.confirm(), await other.confirm()] == [True, False]
        assert [await first.confirm(), await other.confirm()] == [True, False]
        assert (first.is_held, other.is_held) == (True, False)


async def test_another_key_is_another_place(engine: AsyncEngine) -> None:
    async with Leadership(engine, KEY) as first, Leadership(engine, KEY + 1) as other:
        assert [await first.confirm(), await other.confirm()] == [True, True]


async def test_whoever_resigns_lets_the_next_one_lead(
    engine: AsyncEngine, rival_engine: AsyncEngine
) -> None:
    async with Leadership(engine, KEY) as first, Leadership(rival_engine, KEY) as other:
        await first.confirm()
        await first.resign()

        assert not first.is_held
        assert await other.confirm()
        assert not await first.confirm()


async def test_leaving_the_block_resigns(
    engine: AsyncEngine, rival_engine: AsyncEngine
) -> None:
    async with Leadership(engine, KEY) as first:
        await first.confirm()

    async with Leadership(rival_engine, KEY) as other:
        assert await other.confirm()


async def test_a_leader_whose_session_ended_notices_and_another_takes_over(
    engine: AsyncEngine, rival_engine: AsyncEngine
) -> None:
    async with Leadership(engine, KEY) as first, Leadership(rival_engine, KEY) as other:
        await first.confirm()
        await _end_session_of_the_leader(rival_engine)

        assert await other.confirm()
        assert not await first.confirm()
        assert not first.is_held


async def test_a_leader_whose_session_ended_may_lead_again(engine: AsyncEngine) -> None:
    async with Leadership(engine, KEY) as first:
        await first.confirm()
        await _end_session_of_the_leader(engine)

        assert not await first.confirm()
        assert await first.confirm()


async def test_trying_in_vain_leaves_no_connection_behind(
    engine: AsyncEngine, rival_engine: AsyncEngine
) -> None:
    async with Leadership(engine, KEY) as first, Leadership(rival_engine, KEY) as other:
        await first.confirm()
        for _ in range(5):
            assert not await other.confirm()

        assert rival_engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_whoever_cannot_ask_does_not_lead() -> None:
    engine = open_engine(
        SecretStr("postgresql://nobody@127.0.0.1:9/none"), name="test", pool_size=1
    )
    async with Leadership(engine, KEY) as leadership:
        assert not await leadership.confirm()
    await engine.dispose()


async def test_whoever_falls_silent_loses_the_place_and_notices(
    engine: AsyncEngine, rival_engine: AsyncEngine
) -> None:
    short = timedelta(milliseconds=200)
    async with (
        Leadership(engine, KEY, silence=short) as frozen,
        Leadership(rival_engine, KEY) as other,
    ):
        assert await frozen.confirm()
        assert await frozen.confirm()

        await wait_for_async(other.confirm, within=5, what="the other one leads")

        assert not await frozen.confirm()
        assert not frozen.is_held


async def test_whoever_freezes_with_the_answer_in_its_hands_loses_the_place(
    engine: AsyncEngine, rival_engine: AsyncEngine
) -> None:
    def freeze(*arguments: object) -> None:
        if "pg_try_advisory_lock" in str(arguments[2]):
            frozen.set()
            await_only(asyncio.Event().wait())

    frozen = asyncio.Event()
    event.listen(engine.sync_engine, "after_cursor_execute", freeze)
    first = Leadership(engine, KEY, silence=timedelta(milliseconds=200))
    taking = asyncio.create_task(first.confirm())
    await asyncio.wait_for(frozen.wait(), 30)

    async with Leadership(rival_engine, KEY) as other:
        await wait_for_async(other.confirm, within=10, what="another leads")
    taking.cancel()
    await asyncio.wait([taking])


async def test_trying_in_vain_leaves_no_limit_behind(
    engine: AsyncEngine, rival_engine: AsyncEngine
) -> None:
    async with Leadership(engine, KEY) as first, Leadership(rival_engine, KEY) as other:
        assert [await first.confirm(), await other.confirm()] == [True, False]
        async with rival_engine.connect() as conn:
            assert await conn.scalar(text("SHOW idle_session_timeout")) == "0"
