"""The PostgreSQL server tests run against, and the databases they get on it.

A database is migrated once and then cloned for every test that wants one: commits are real,
and no test sees another one's rows.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy import URL, make_url

from app.core.database import open_sync_engine

ROOT = Path(__file__).resolve().parents[2]

# Nobody needs these databases after a power cut.
FAST_AND_LOOSE = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
    "max_connections": "200",
    "max_wal_size": "4GB",
}


_ROOM = 2 * 1024**3


@contextlib.contextmanager
def fast_folder() -> Iterator[Path]:
    """Give a folder for a session's servers, in memory where the machine has room there.

    A database is some 300 files: cloning one takes 20 ms in memory and 200 ms on a busy disk.
    """
    memory = Path("/dev/shm")
    has_room = (
        memory.is_dir()
        and os.access(memory, os.W_OK)
        and shutil.disk_usage(memory).free > _ROOM
    )
    with tempfile.TemporaryDirectory(
        prefix="mediagen-tests-",
        dir=memory if has_room else None,
        ignore_cleanup_errors=True,
    ) as folder:
        yield Path(folder)


def alembic_config() -> Config:
    """Read the project's alembic.ini; commands then print nothing."""
    config = Config(str(ROOT / "alembic.ini"))
    config.set_main_option("path_separator", "os")
    return config


_MIGRATING = threading.Lock()  # Alembic keeps the migration under way in a global


def migrate(url: str, revision: str = "head") -> None:
    """Bring a database to a revision, in this process, one at a time."""
    engine = open_sync_engine(SecretStr(url))
    try:
        with _MIGRATING, engine.begin() as connection:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    finally:
        engine.dispose()


class DatabaseServer:
    """Makes and drops databases on a server; `url` names any database of it."""

    def __init__(self, url: str) -> None:
        self._url: URL = make_url(url).set(drivername="postgresql")
        self._prefix = f"test_{secrets.token_hex(4)}"
        self._made = 0
        self._admin = psycopg.connect(
            self.url_of(self._url.database or "postgres"), autocommit=True
        )

    def url_of(self, database: str) -> str:
        """Compose the address of a database, in libpq's form."""
        return self._url.set(database=database).render_as_string(hide_password=False)

    def create(self, *, template: str | None = None) -> str:
        """Create a database, empty or as a copy of another one, and give its name."""
        self._made += 1
        name = f"{self._prefix}_{self._made}"
        self._admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template or "template0")
            )
        )
        return name

    def drop(self, database: str) -> None:
        """Drop a database, whoever is still connected."""
        self._admin.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(
                sql.Identifier(database)
            )
        )

    def close(self) -> None:
        """Let go of the server."""
        self._admin.close()
