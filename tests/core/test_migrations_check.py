"""Readiness: the database may be ahead of the code, never behind it."""

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core import migrations


async def is_current(engine: AsyncEngine) -> bool:
    async with engine.connect() as conn:
        return await migrations.is_current(conn)


async def test_a_migrated_database_is_current(engine: AsyncEngine) -> None:
    assert await is_current(engine)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE alembic_version SET version_num = 'from_a_newer_release'", True),
        ("UPDATE alembic_version SET version_num = '0001'", False),
        ("DELETE FROM alembic_version", False),
        ("DROP TABLE alembic_version", False),
    ],
)
async def test_a_newer_database_serves_and_an_older_or_unmigrated_one_does_not(
    engine: AsyncEngine, statement: str, expected: bool
) -> None:
    async with engine.begin() as conn:
        await conn.execute(text(statement))

    assert await is_current(engine) is expected
