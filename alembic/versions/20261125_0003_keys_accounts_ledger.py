"""Know whose a job is and what it costs: keys, owners, accounts, the ledger, what came in.

Revision: 0003
Revises: 0002
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0003"
down_revision: str | Sequence[str] | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # Rather fail than queue behind a long transaction and block everybody behind us.
    op.execute("SET LOCAL lock_timeout = '3s'")
    op.create_table(
        "accounts",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("live", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column(
            "day_jobs", sa.Integer(), server_default=sa.text("0"), nullable=False
        ),
        sa.Column(
            "day_usd",
            sa.Numeric(precision=14, scale=6),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column(
            "month_usd",
            sa.Numeric(precision=14, scale=6),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column(
            "reserved_usd",
            sa.Numeric(precision=14, scale=6),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column(
            "spent_usd",
            sa.Numeric(precision=14, scale=6),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_accounts")),
    )
    # What all jobs together cost is booked here, whoever they are of.
    op.execute(
        "INSERT INTO accounts (name, day, month) VALUES"
        " ('service', DATE '1970-01-01', DATE '1970-01-01')"
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("scopes", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True),
        sa.Column("concurrent_jobs", sa.Integer(), nullable=True),
        sa.Column("jobs_per_day", sa.Integer(), nullable=True),
        sa.Column("models", sa.ARRAY(sa.Text()), nullable=True),
        sa.Column("max_outputs", sa.SmallInteger(), nullable=True),
        sa.Column("max_pixels", sa.BigInteger(), nullable=True),
        sa.Column("budget_job_usd", sa.Numeric(precision=14, scale=6), nullable=True),
        sa.Column("budget_day_usd", sa.Numeric(precision=14, scale=6), nullable=True),
        sa.Column("budget_month_usd", sa.Numeric(precision=14, scale=6), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_keys_hash")),
    )
    op.create_index(op.f("ix_api_keys_owner"), "api_keys", ["owner"], unique=False)
    op.create_table(
        "audit_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("details", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("address", sa.Text(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
    )
    op.create_table(
        "ledger_entries",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=True),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("amount_usd", sa.Numeric(precision=14, scale=6), nullable=True),
        sa.Column("status", sa.String(length=16), nullable=True),
        sa.Column(
            "outputs", sa.SmallInteger(), server_default=sa.text("0"), nullable=False
        ),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "amount_usd IS NOT NULL OR kind = 'charge'",
            name=op.f("ck_ledger_entries_amount_known"),
        ),
        sa.CheckConstraint(
            "kind IN ('reserve', 'release', 'charge')",
            name=op.f("ck_ledger_entries_kind_known"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger_entries")),
        sa.UniqueConstraint(
            "job_id", "kind", name=op.f("uq_ledger_entries_job_id_kind")
        ),
    )
    op.create_index(
        "ix_ledger_entries_day_owner",
        "ledger_entries",
        ["day", "owner"],
        unique=False,
        postgresql_where=sa.text("kind = 'charge'"),
    )
    op.create_table(
        "owners",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "weight", sa.SmallInteger(), server_default=sa.text("1"), nullable=False
        ),
        sa.Column("turn", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint(
            "weight BETWEEN 1 AND 1000", name=op.f("ck_owners_weight_sane")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_owners")),
    )
    op.create_table(
        "submissions",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_submissions")),
    )
    op.create_index(
        op.f("ix_submissions_created_at"), "submissions", ["created_at"], unique=False
    )
    op.create_table(
        "uploads",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("content_type", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
        sa.UniqueConstraint("owner", "key", name=op.f("uq_uploads_owner_key")),
    )
    op.create_index(op.f("ix_uploads_key"), "uploads", ["key"], unique=False)
    op.create_index(op.f("ix_uploads_used_at"), "uploads", ["used_at"], unique=False)
    # Changes of the catalogue alone.  The defaults stay: processes of the version before know
    # nothing of the columns, and what was public until now stays public.
    op.add_column(
        "jobs",
        sa.Column(
            "owner", sa.Text(), server_default=sa.text("'default'"), nullable=False
        ),
    )
    op.add_column("jobs", sa.Column("key_id", sa.Uuid(), nullable=True))
    op.add_column(
        "jobs",
        sa.Column(
            "is_public", sa.Boolean(), server_default=sa.text("true"), nullable=False
        ),
    )
    op.add_column(
        "jobs",
        sa.Column("reserved_usd", sa.Numeric(precision=14, scale=6), nullable=True),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "uploads",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
        ),
    )
    # Who starts next is asked by owner from now on.
    op.drop_index(
        "ix_jobs_queue",
        table_name="jobs",
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index(
        "ix_jobs_owner_id",
        "jobs",
        ["owner", sa.literal_column("id DESC")],
        unique=False,
    )
    op.create_index(
        "ix_jobs_owner_status_id",
        "jobs",
        ["owner", "status", sa.literal_column("id DESC")],
        unique=False,
    )
    op.create_index(
        "ix_jobs_owner_model_id",
        "jobs",
        ["owner", "model", sa.literal_column("id DESC")],
        unique=False,
    )
    op.create_index(
        "ix_jobs_turns",
        "jobs",
        ["owner", sa.literal_column("priority DESC"), "due_at"],
        unique=False,
        postgresql_where=sa.text("status = 'pending'"),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '3s'")
    op.drop_index(
        "ix_jobs_turns",
        table_name="jobs",
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.drop_index("ix_jobs_owner_model_id", table_name="jobs")
    op.drop_index("ix_jobs_owner_status_id", table_name="jobs")
    op.drop_index("ix_jobs_owner_id", table_name="jobs")
    op.create_index(
        "ix_jobs_queue",
        "jobs",
        [sa.literal_column("priority DESC"), "due_at"],
        unique=False,
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.drop_column("jobs", "uploads")
    op.drop_column("jobs", "reserved_usd")
    op.drop_column("jobs", "is_public")
    op.drop_column("jobs", "key_id")
    op.drop_column("jobs", "owner")
    op.drop_index(op.f("ix_uploads_used_at"), table_name="uploads")
    op.drop_index(op.f("ix_uploads_key"), table_name="uploads")
    op.drop_table("uploads")
    op.drop_index(op.f("ix_submissions_created_at"), table_name="submissions")
    op.drop_table("submissions")
    op.drop_table("owners")
    op.drop_index("ix_ledger_entries_day_owner", table_name="ledger_entries")
    op.drop_table("ledger_entries")
    op.drop_table("audit_events")
    op.drop_index(op.f("ix_api_keys_owner"), table_name="api_keys")
    op.drop_table("api_keys")
    op.drop_table("accounts")
