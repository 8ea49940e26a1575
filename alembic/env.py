"""Run migrations against DATABASE_URL, synchronously, one transaction for all of them.

An advisory lock lets several instances start at once: one migrates, the others wait and find
nothing to do.
"""

from alembic import context
from sqlalchemy import Connection, text

from app.core.config import DatabaseSettings, load_settings
from app.core.database import open_sync_engine
from app.models import account, notice  # noqa: F401 - every part of the schema
from app.models.job import Base

MIGRATION_LOCK = 0x6D67_0002


def migrate(connection: Connection) -> None:
    """Run what the command asks for on the connection."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        connection.execute(
            text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK}
        )
        context.run_migrations()


def print_sql() -> None:
    """Write the statements instead of running them (`--sql`)."""
    context.configure(
        dialect_name="postgresql", target_metadata=Base.metadata, literal_binds=True
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    print_sql()
elif (given := context.config.attributes.get("connection")) is not None:
    migrate(given)  # a test or a script brings its own connection
else:
    engine = open_sync_engine(load_settings(DatabaseSettings).database_url)
    with engine.connect() as own:
        migrate(own)
    engine.dispose()
