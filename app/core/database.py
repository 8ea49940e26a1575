"""Connections to PostgreSQL: an async engine for the service, a sync one for scripts.

Both come from the one DATABASE_URL, whatever driver it names.  Statements that are slow or
fail are logged by the logger `app.database` (see `telemetry`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import asyncpg
import orjson
import structlog
from pydantic import SecretStr
from sqlalchemy import (
    ColumnElement,
    Engine,
    String,
    Table,
    TableValuedAlias,
    Text,
    bindparam,
    column,
    create_engine,
    event,
    func,
    make_url,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.core.config import libpq_url
from app.core.patience import within

log = structlog.get_logger("app.database")

CONNECT_TIMEOUT = timedelta(seconds=1.5)
STATEMENT_TIMEOUT = timedelta(seconds=30)
SLOW_STATEMENT = timedelta(milliseconds=250)
FAREWELL = timedelta(seconds=1)
# A process that freezes, or a host that vanishes, in the middle of a transaction must not keep
# its locks: the server ends the session, and nothing was done.
LONGEST_SILENCE = timedelta(seconds=3)

# What "the database cannot be had" looks like: refused, reset, timed out, pool empty.
DISCONNECTED = (OSError, TimeoutError, PoolTimeout)


def is_disconnect(error: BaseException) -> bool:
    """Tell trouble with the connection or the server from a statement that is wrong.

    SQLSTATE classes 08 (connection), 53 (resources), 57P (shutdown); PostgreSQL 18 manual,
    appendix A.
    """
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return True
        state = getattr(error.orig, "sqlstate", None) or ""
        if state.startswith(("08", "53", "57P")):
            return True
        cause = error.orig.__cause__ if error.orig is not None else None
        return isinstance(cause, DISCONNECTED) or _is_client_side(error)
    return isinstance(error, DISCONNECTED) or type(error).__module__.startswith(
        "asyncpg.exceptions"
    )


def _is_client_side(error: DBAPIError) -> bool:
    """asyncpg's own complaints (no SQLSTATE) are about a connection that is gone."""
    text = str(error.orig)
    if "connection is closed" in text or "connection was closed" in text:
        return True
    cause = error.orig.__cause__ if error.orig is not None else None
    return isinstance(cause, asyncpg.InternalClientError)


# Connection options of libpq that asyncpg does not know and would send to the server.
_LIBPQ_ONLY = frozenset(
    (
        *("channel_binding", "connect_timeout", "fallback_application_name"),
        *("gssencmode", "keepalives", "keepalives_count", "keepalives_idle"),
        *("keepalives_interval", "load_balance_hosts", "sslcompression", "sslsni"),
        *("tcp_user_timeout", "requirepeer", "async_fallback"),
    )
)


def asyncpg_dsn(url: SecretStr) -> str:
    """Give the URL as asyncpg reads it: TLS files and server settings included."""
    parsed = make_url(libpq_url(url))
    return parsed.difference_update_query(
        [name for name in parsed.query if name in _LIBPQ_ONLY]
    ).render_as_string(hide_password=False)


def open_engine(
    url: SecretStr, *, name: str, pool_size: int, settings: dict[str, str] | None = None
) -> AsyncEngine:
    """Make an asyncpg engine that fails fast: nobody waits for a dead server for long.

    `name` is shown in `pg_stat_activity`; `settings` are server settings of its sessions.
    """
    dsn = asyncpg_dsn(url)
    silence = f"{LONGEST_SILENCE // timedelta(milliseconds=1)}ms"
    session = {"jit": "off", "idle_in_transaction_session_timeout": silence}
    session |= settings or {}
    if "application_name" not in make_url(dsn).query:
        session["application_name"] = name

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(
            dsn,
            timeout=CONNECT_TIMEOUT.total_seconds(),
            command_timeout=STATEMENT_TIMEOUT.total_seconds(),
            server_settings=session,
        )

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT.total_seconds(),
        pool_recycle=1800,
        pool_use_lifo=True,
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
        hide_parameters=True,  # they carry prompts
    )
    _log_statements(engine.sync_engine)
    return engine


async def close_engine(engine: AsyncEngine) -> None:
    """Close the engine's connections; those to a server that does not answer are dropped.

    asyncpg waits for the server to close a connection, without an end if it is silent.
    """
    with contextlib.suppress(TimeoutError):
        await within(FAREWELL, engine.dispose())


def open_sync_engine(url: SecretStr) -> Engine:
    """Make a psycopg engine, for migrations and scripts."""
    engine = create_engine(
        make_url(libpq_url(url)).set(drivername="postgresql+psycopg"),
        pool_size=1,
        hide_parameters=True,
        connect_args={"connect_timeout": 5, "application_name": "mediagen-script"},
    )
    _log_statements(engine)
    return engine


def unnest(table: Table, names: Sequence[str], *, alias: str) -> TableValuedAlias:
    """Make a table of parameters, one array per column; execute it with `arrays(rows, …)`.

    One statement writes any number of rows, with one plan whatever the number.  Parameters
    are named after `alias`, so that one statement can have several such tables.
    """
    columns = [table.c[name] for name in names]
    # One dimension, or a JSON list would be taken for a nested array; Text for VARCHAR(n),
    # whose cast would cut a long value silently.
    arrays: list[ColumnElement[Any]] = [
        bindparam(
            f"{alias}_{c.name}",
            type_=ARRAY(Text() if isinstance(c.type, String) else c.type, dimensions=1),
        )
        for c in columns
    ]
    values = func.unnest(*arrays).table_valued(
        *(column(c.name, c.type) for c in columns), name=alias
    )
    return values.render_derived()


def arrays(
    rows: Iterable[Mapping[str, Any]], names: Iterable[str], *, alias: str
) -> dict[str, list[Any]]:
    """Turn rows into the parameters of `unnest`: one list per column."""
    listed = list(rows)
    return {f"{alias}_{name}": [row[name] for row in listed] for name in names}


# A condition that is always true.  With it in a statement, the commit of its transaction is
# answered before it is on the disk: for what a crash of the server may take back, since nobody
# has seen it and it costs time only.
RELAXED: ColumnElement[bool] = (
    select(func.set_config("synchronous_commit", "off", True))
    .scalar_subquery()
    .is_not(None)
)


def _log_statements(engine: Engine) -> None:
    @event.listens_for(engine, "before_cursor_execute")
    def _begin(
        conn: Any, cursor: Any, statement: str, params: Any, context: Any, many: bool
    ) -> None:
        if context is not None:
            context.mediagen_began = time.monotonic()

    @event.listens_for(engine, "after_cursor_execute")
    def _end(
        conn: Any, cursor: Any, statement: str, params: Any, context: Any, many: bool
    ) -> None:
        took = time.monotonic() - getattr(context, "mediagen_began", time.monotonic())
        if took >= SLOW_STATEMENT.total_seconds():
            # Parameters are left out: they carry prompts.
            log.warning(
                "statement.slow", seconds=round(took, 3), statement=statement[:500]
            )

    @event.listens_for(engine, "handle_error")
    def _fail(context: Any) -> None:
        if isinstance(context.original_exception, asyncio.CancelledError):
            return  # nobody waits for it any more: a process that ends, a caller who left
        log.error(
            "statement.failed",
            statement=(context.statement or "connect")[:500],
            error=type(context.original_exception).__name__,
            sqlstate=getattr(context.original_exception, "sqlstate", None),
        )
