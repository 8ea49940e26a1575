import asyncio
from urllib.parse import quote

import asyncpg
import pytest
import structlog
from pydantic import SecretStr
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.config import libpq_url
from app.core.database import (
    CONNECT_TIMEOUT,
    asyncpg_dsn,
    is_disconnect,
    open_engine,
    open_sync_engine,
)

PLAIN = "postgresql://user:p%40ss@db.example:5433/media"


@pytest.mark.parametrize(
    "given",
    [
        PLAIN,
        PLAIN.replace("postgresql://", "postgres://"),
        PLAIN.replace("postgresql://", "postgresql+asyncpg://"),
        PLAIN.replace("postgresql://", "postgresql+psycopg://"),
        PLAIN.replace("postgresql://", "postgresql+psycopg2://"),
    ],
)
def test_any_form_of_the_url_serves_both_drivers(given: str) -> None:
    assert libpq_url(SecretStr(given)) == PLAIN
    assert asyncpg_dsn(SecretStr(given)) == PLAIN


@pytest.mark.parametrize(
    ("query", "for_psycopg", "for_asyncpg"),
    [
        ("sslmode=require", {"sslmode": "require"}, {"sslmode": "require"}),
        ("ssl=require", {"sslmode": "require"}, {"sslmode": "require"}),
        ("sslmode=prefer&ssl=require", {"sslmode": "prefer"}, {"sslmode": "prefer"}),
        ("channel_binding=require", {"channel_binding": "require"}, {}),
        (
            "connect_timeout=3&keepalives=1",
            {"connect_timeout": "3", "keepalives": "1"},
            {},
        ),
        (
            "sslrootcert=%2Fca.pem",
            {"sslrootcert": "/ca.pem"},
            {"sslrootcert": "/ca.pem"},
        ),
        ("application_name=a", {"application_name": "a"}, {"application_name": "a"}),
        ("host=%2Fvar%2Frun", {"host": "/var/run"}, {"host": "/var/run"}),
    ],
)
def test_options_are_what_the_driver_understands(
    query: str, for_psycopg: dict[str, str], for_asyncpg: dict[str, str]
) -> None:
    given = SecretStr(f"{PLAIN}?{query}")

    assert dict(make_url(libpq_url(given)).query) == for_psycopg
    assert dict(make_url(asyncpg_dsn(given)).query) == for_asyncpg


async def test_the_options_of_hosted_databases_connect(database_url: str) -> None:
    options = "sslmode=prefer&channel_binding=prefer&application_name=theirs"
    more = "&keepalives=1&connect_timeout=5&options=-c%20work_mem%3D6MB"
    engine = open_engine(
        SecretStr(f"{database_url}?{options}{more}"), name="ours", pool_size=1
    )
    async with engine.connect() as conn:
        name = await conn.scalar(text("SHOW application_name"))
        memory = await conn.scalar(text("SHOW work_mem"))
    await engine.dispose()

    assert (name, memory) == ("theirs", "6MB")


def test_a_password_survives_whatever_is_in_it() -> None:
    password = "a:b/c@d?e#f%g h"
    given = f"postgresql://user:{quote(password, safe='')}@db/media"

    form = make_url(asyncpg_dsn(SecretStr(given)))

    assert form.password == password


@pytest.mark.parametrize("form", ["postgresql", "postgres", "postgresql+psycopg"])
async def test_the_async_engine_connects_with_any_form(
    database_url: str, form: str
) -> None:
    url = SecretStr(database_url.replace("postgresql", form, 1))
    engine = open_engine(
        url, name="test-name", pool_size=1, settings={"work_mem": "5MB"}
    )
    async with engine.connect() as conn:
        name = await conn.scalar(text("SHOW application_name"))
        memory = await conn.scalar(text("SHOW work_mem"))
    await engine.dispose()

    assert (name, memory) == ("test-name", "5MB")


@pytest.mark.parametrize("form", ["postgresql", "postgres", "postgresql+asyncpg"])
def test_the_sync_engine_connects_with_any_form(database_url: str, form: str) -> None:
    engine = open_sync_engine(SecretStr(database_url.replace("postgresql", form, 1)))
    with engine.connect() as conn:
        assert conn.scalar(text("SELECT 1")) == 1
    engine.dispose()


# ---------------------------------------------------------- the world, or the statement?


async def test_a_closed_port_is_a_disconnect_and_noticed_at_once() -> None:
    engine = open_engine(
        SecretStr("postgresql://nobody@127.0.0.1:9/none"), name="test", pool_size=1
    )
    with pytest.raises(Exception) as caught:
        async with asyncio.timeout(CONNECT_TIMEOUT.total_seconds()):
            async with engine.connect():
                pass
    await engine.dispose()

    assert is_disconnect(caught.value)


async def test_an_ended_session_is_a_disconnect(engine: AsyncEngine) -> None:
    with pytest.raises(DBAPIError) as caught:
        async with engine.connect() as conn:
            pid = await conn.scalar(text("SELECT pg_backend_pid()"))
            async with engine.connect() as other:
                await other.execute(
                    text("SELECT pg_terminate_backend(:p, 2000)"), {"p": pid}
                )
            await conn.execute(text("SELECT 1"))

    assert is_disconnect(caught.value)


async def test_an_empty_pool_is_a_disconnect(database_url: str) -> None:
    engine = open_engine(SecretStr(database_url), name="test", pool_size=1)
    engine.pool._timeout = 0.05  # type: ignore[attr-defined]
    async with engine.connect():
        with pytest.raises(Exception) as caught:
            async with engine.connect():
                pass
    await engine.dispose()

    assert is_disconnect(caught.value)


async def test_a_wrong_statement_is_not_a_disconnect(engine: AsyncEngine) -> None:
    with pytest.raises(ProgrammingError) as wrong:
        async with engine.connect() as conn:
            await conn.execute(text("SELECT nothing FROM nowhere"))
    with pytest.raises(IntegrityError) as refused:
        async with engine.begin() as conn:
            await conn.execute(text("CREATE TEMP TABLE t (a int CHECK (a > 0))"))
            await conn.execute(text("INSERT INTO t VALUES (0)"))

    assert not is_disconnect(wrong.value)
    assert not is_disconnect(refused.value)
    assert not is_disconnect(ValueError("ours"))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        TimeoutError(),
        asyncpg.exceptions.CannotConnectNowError(),
    ],
    ids=repr,
)
def test_bare_errors_of_the_connection_are_disconnects(error: Exception) -> None:
    assert is_disconnect(error)


async def test_failed_statements_are_logged_without_their_parameters(
    engine: AsyncEngine,
) -> None:
    with structlog.testing.capture_logs() as logs:
        with pytest.raises(ProgrammingError):
            async with engine.connect() as conn:
                await conn.execute(
                    text("SELECT CAST(:prompt AS text) FROM nowhere"),
                    {"prompt": "a secret garden"},
                )

    (line,) = [log for log in logs if log["event"] == "statement.failed"]
    assert "nowhere" in line["statement"]
    assert line["sqlstate"] == "42P01"
    assert "secret garden" not in repr(logs)


async def test_slow_statements_are_logged(engine: AsyncEngine) -> None:
    with structlog.testing.capture_logs() as logs:
        async with engine.connect() as conn:
            await conn.execute(text("SELECT pg_sleep(0.3)"))

    (line,) = [log for log in logs if log["event"] == "statement.slow"]
    assert line["seconds"] >= 0.25
