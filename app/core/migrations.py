"""Is the database's schema the one this code was written for?"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

ROOT = Path(__file__).resolve().parents[2]

_CURRENT = text("SELECT version_num FROM alembic_version")


@lru_cache(maxsize=1)
def wanted_revision() -> str | None:
    """Name the newest migration that ships with the code."""
    scripts = ScriptDirectory.from_config(Config(str(ROOT / "alembic.ini")))
    return scripts.get_current_head()


async def is_current(conn: AsyncConnection) -> bool:
    """Tell whether all migrations were run."""
    try:
        return bool(await conn.scalar(_CURRENT) == wanted_revision())
    except ProgrammingError:
        return False  # no such table: nothing was ever migrated
