"""One of many: leadership by a session-level advisory lock of PostgreSQL.

The lock lives as long as its session: when the holder dies, however it dies, PostgreSQL ends
the session and somebody else gets it.  Needs a direct or session-pooled connection.
"""

from __future__ import annotations

from datetime import timedelta
from types import TracebackType
from typing import Self

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.core.database import DISCONNECTED

# A frozen process keeps its connections, and so its locks, for ever.  So the lock comes with its
# limit, in one statement: whoever freezes right behind it must lose it, too.
_TRY = text("""
WITH place AS MATERIALIZED (SELECT pg_try_advisory_lock(:key) AS is_taken)
SELECT
    is_taken,
    CASE WHEN is_taken THEN set_config('idle_session_timeout', :limit, false) END
FROM place
""")
_PING = text("SELECT 1")


class Leadership:
    """A place only one process in the deployment can hold.

    Holds one connection of the engine while it leads.  Whoever does not confirm for `silence`,
    for it is frozen, has lost the place.  Not to be shared between tasks.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        key: int,
        *,
        silence: timedelta = timedelta(seconds=5),
    ) -> None:
        self._engine = engine
        self._key = key
        self._silence = silence
        self._conn: AsyncConnection | None = None

    @property
    def is_held(self) -> bool:
        """Tell whether the place was ours when last looked at."""
        return self._conn is not None

    async def confirm(self) -> bool:
        """Tell whether the place is ours now, taking it if it is free.

        False also when the database cannot be asked: whoever cannot ask does not lead.
        """
        try:
            if self._conn is not None:
                await self._conn.execute(_PING)
                return True
            limit = f"{self._silence // timedelta(milliseconds=1)}ms"
            conn = await self._engine.connect()
            try:
                conn = await conn.execution_options(isolation_level="AUTOCOMMIT")
                taken = await conn.scalar(_TRY, {"key": self._key, "limit": limit})
            except BaseException:
                await conn.invalidate()
                raise
            if taken:
                self._conn = conn
                return True
            await conn.close()
            return False
        except (DBAPIError, *DISCONNECTED):
            await self.resign()
            return False

    async def resign(self) -> None:
        """Give the place up by ending the session, never by returning it to the pool."""
        conn, self._conn = self._conn, None
        if conn is not None:
            await conn.invalidate()
            await conn.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.resign()
