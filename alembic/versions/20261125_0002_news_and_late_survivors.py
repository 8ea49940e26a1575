"""Remember news heard during a look, and predictions nobody wants.

Revision: 0002
Revises: 0001
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | Sequence[str] | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # Rather fail than queue behind a long transaction and block everybody behind us.
    op.execute("SET LOCAL lock_timeout = '3s'")
    # Changes of the catalogue alone, whatever the size of the tables.  The defaults stay:
    # processes of the version before know nothing of the columns.
    op.add_column(
        "jobs",
        sa.Column(
            "has_news", sa.Boolean(), server_default=sa.text("false"), nullable=False
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "silent_looks",
            sa.SmallInteger(),
            server_default=sa.text("0"),
            nullable=False,
        ),
    )
    op.add_column(
        "attempts", sa.Column("cancel_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.create_index(
        "ix_attempts_running",
        "attempts",
        ["sent_at"],
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "ix_attempts_lost",
        "attempts",
        ["sent_at"],
        postgresql_where=sa.text("state = 'lost' AND handle IS NULL"),
    )
    op.create_index(
        "ix_attempts_cancel",
        "attempts",
        ["cancel_at"],
        postgresql_where=sa.text("cancel_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '3s'")
    op.drop_index("ix_attempts_cancel", table_name="attempts")
    op.drop_index("ix_attempts_lost", table_name="attempts")
    op.drop_index("ix_attempts_running", table_name="attempts")
    op.drop_column("attempts", "cancel_at")
    op.drop_column("jobs", "silent_looks")
    op.drop_column("jobs", "has_news")
