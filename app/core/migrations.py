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
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(Config(str(ROOT / "alembic.ini")))


def wanted_revision() -> str | None:
    """Name the newest migration that ships with the code."""
    return _scripts().get_current_head()


async def is_current(conn: AsyncConnection) -> bool:
    """Tell whether all migrations that ship with the code were run.

    A revision we do not know is a newer one: in a rolling upgrade the database goes first,
    and old processes serve on until they are replaced.
    """
    try:
        found = await conn.scalar(_CURRENT)
    except ProgrammingError:
        return False  # no such table: nothing was ever migrated
    if found is None or found == wanted_revision():
        return found is not None
    return found not in {script.revision for script in _scripts().walk_revisions()}
