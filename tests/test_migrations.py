import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, inspect, text

from app.core.database import open_sync_engine
from app.models import account, notice  # noqa: F401 - every part of the schema
from app.models.job import Base
from tests.support.servers import ROOT, alembic_config

MIGRATIONS = sorted((ROOT / "alembic" / "versions").glob("*.py"))


@pytest.fixture
def sync_engine(empty_database_url: str) -> Iterator[Engine]:
    engine = open_sync_engine(SecretStr(empty_database_url))
    yield engine
    engine.dispose()


def _upgrade(connection: Connection, revision: str) -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _downgrade(connection: Connection, revision: str) -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    command.downgrade(config, revision)


def _schema(connection: Connection) -> list[str]:
    """Describe every column, constraint and index PostgreSQL knows of."""
    query = text("""
        SELECT concat_ws(' ', table_name, column_name, data_type, is_nullable,
                         column_default, is_identity)
        FROM information_schema.columns WHERE table_schema = 'public'
        UNION ALL SELECT concat_ws(' ', conrelid::regclass, conname,
                                   pg_get_constraintdef(oid))
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT concat_ws(' ', relname, reloptions)
        FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
        """)
    return sorted(connection.scalars(query))


def _alembic(
    *words: str, url: str, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DATABASE_URL": url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "alembic", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_up_from_nothing_down_and_up_again_gives_the_same_tables(
    sync_engine: Engine,
) -> None:
    with sync_engine.begin() as connection:
        _upgrade(connection, "head")
        first = _schema(connection)
        _downgrade(connection, "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        _upgrade(connection, "head")

        assert _schema(connection) == first


def test_each_migration_can_be_undone_and_done_again(sync_engine: Engine) -> None:
    script = ScriptDirectory.from_config(alembic_config())
    revisions = [found.revision for found in script.walk_revisions()][::-1]
    with sync_engine.begin() as connection:
        for revision in revisions:
            _upgrade(connection, revision)
            before = _schema(connection)
            _downgrade(connection, "-1")
            _upgrade(connection, revision)
            assert _schema(connection) == before


def test_the_migrations_make_what_the_models_describe(sync_engine: Engine) -> None:
    with sync_engine.begin() as connection:
        _upgrade(connection, "head")
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)

        assert compare_metadata(context, Base.metadata) == []


def test_checks_and_partial_indexes_are_those_of_the_models(
    sync_engine: Engine, database_server: object
) -> None:
    """Alembic does not compare these: hold both ways of making tables side by side."""
    with sync_engine.connect() as connection:
        with connection.begin():
            _upgrade(connection, "head")
            migrated = _laws(connection)
        with connection.begin():
            _downgrade(connection, "base")
            Base.metadata.create_all(connection)
            described = _laws(connection)

    assert migrated == described


def _laws(connection: Connection) -> set[str]:
    checks = text(
        "SELECT conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace AND contype IN ('c', 'f', 'u')"
    )
    indexes = text(
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'"
        " AND tablename <> 'alembic_version'"
    )
    return {*connection.scalars(checks), *connection.scalars(indexes)}


def test_there_is_one_head() -> None:
    script = ScriptDirectory.from_config(alembic_config())

    assert len(script.get_heads()) == 1
    assert len(list(script.walk_revisions())) == len(MIGRATIONS)


def _first_statement(function: ast.FunctionDef) -> str:
    body = [
        statement
        for statement in function.body
        if not (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Constant)
        )
    ]
    return ast.unparse(body[0])


@pytest.mark.parametrize("path", MIGRATIONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("direction", ["upgrade", "downgrade"])
def test_a_migration_does_not_wait_long_for_locks(path: Path, direction: str) -> None:
    tree = ast.parse(path.read_text())
    (function,) = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == direction
    ]

    assert "SET LOCAL lock_timeout" in _first_statement(function)


def test_the_lock_timeout_of_a_migration_works(sync_engine: Engine) -> None:
    with sync_engine.begin() as connection:
        _upgrade(connection, "head")

        timeout = connection.scalar(text("SHOW lock_timeout"))

    assert timeout == "3s"


# ----------------------------------------------------------------- the commands as typed


def test_the_commands_work_as_documented(
    database_url: str, sync_engine: Engine
) -> None:
    _alembic("downgrade", "-1", url=database_url)
    _alembic("upgrade", "head", url=database_url)

    done = _alembic("check", url=database_url)

    assert "No new upgrade operations detected" in done.stdout


def test_a_migration_can_be_generated_and_run(
    database_url: str, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    shutil.copytree(
        ROOT / "alembic",
        tmp_path / "alembic",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    engine = open_sync_engine(SecretStr(database_url))
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs DROP COLUMN request_id"))

    _alembic(
        *("revision", "--autogenerate", "-m", "Bring it back"),
        url=database_url,
        folder=tmp_path,
    )
    _alembic("upgrade", "head", url=database_url, folder=tmp_path)

    (made,) = {
        path.name for path in (tmp_path / "alembic" / "versions").glob("*.py")
    } - {path.name for path in MIGRATIONS}
    source = (tmp_path / "alembic" / "versions" / made).read_text()
    with engine.connect() as connection:
        columns = [found["name"] for found in inspect(connection).get_columns("jobs")]
    engine.dispose()
    assert made.endswith("_bring_it_back.py")
    assert source.count("SET LOCAL lock_timeout") == 2
    assert "op.add_column" in source
    assert "request_id" in columns


def test_several_instances_may_migrate_at_once(empty_database_url: str) -> None:
    environment = {
        **os.environ,
        "DATABASE_URL": empty_database_url,
        "PYTHONPATH": str(ROOT),
    }
    racers = [
        subprocess.Popen(
            [sys.executable, "-m", "alembic", "upgrade", "head"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [racer.communicate(timeout=60)[1] for racer in racers]

    assert [racer.returncode for racer in racers] == [0, 0], said


def test_a_missing_database_url_is_one_clear_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "current"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": ""},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.startswith("DATABASE_URL is not set: ")
    assert len(done.stderr.splitlines()) == 1
