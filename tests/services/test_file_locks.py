"""Locks on files: nobody keeps others from a file for ever, and nothing stays behind."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.database import DISCONNECTED
from app.services import file_locks

KEY = f"ab/{'ab' * 32}.png"


async def test_whoever_freezes_with_a_file_lets_go_of_it(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_locks, "LONGEST_HOLD", timedelta(milliseconds=200))
    is_held, goes_on = asyncio.Event(), asyncio.Event()

    async def freeze() -> None:
        async with engine.connect() as conn:
            conn = await conn.execution_options(isolation_level="AUTOCOMMIT")
            async with file_locks.alone(conn, [KEY]):
                is_held.set()
                await goes_on.wait()

    frozen = asyncio.create_task(freeze())
    await is_held.wait()
    async with asyncio.timeout(20), engine.begin() as conn:
        await file_locks.share(conn, [KEY])

    goes_on.set()
    with pytest.raises((DBAPIError, *DISCONNECTED)):
        await frozen


@pytest.mark.parametrize("lock", [file_locks.alone, file_locks.together])
async def test_a_connection_may_rest_as_long_as_it_likes_afterwards(
    engine: AsyncEngine, lock: Any
) -> None:
    async with engine.connect() as conn:
        conn = await conn.execution_options(isolation_level="AUTOCOMMIT")
        limit = text("SELECT current_setting('idle_session_timeout')")
        async with lock(conn, [KEY]):
            assert await conn.scalar(limit) == "1min"

        assert await conn.scalar(limit) == "0"
        held = text(
            "SELECT count(*) FROM pg_locks"
            " WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        )
        assert await conn.scalar(held) == 0
