"""The tables of jobs: Job, Attempt, Asset, JobEvent.

With `models/account.py` the one description of the schema; migrations are generated from it
and hot paths use its Core tables.  The laws of `domain/lifecycle.py` that a row can break are
CHECKs here.  Status words and other small vocabularies are text with a CHECK: adding a word is
a cheap migration, and psql shows it as it is.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    Numeric,
    SmallInteger,
    String,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

Moment = DateTime(timezone=True)

THIS_TRANSACTION = text("((pg_current_xact_id())::text)::bigint")

TERMINAL = "status IN ('completed', 'failed', 'cancelled')"


class Base(DeclarativeBase):
    """All tables, with constraint names that migrations can rely on."""

    metadata = MetaData(naming_convention=NAMING)


class Job(Base):
    """One job: what was asked, where it stands, and when somebody must look next.

    `due_at` is queue order, retry delay, next look and lease at once; whoever holds
    `claim_token` is looking now.  `has_news`: the provider was heard to be done since that
    look began.  `input` is exactly what goes to the provider; `uploads` names the uploads
    behind its links, by input.  `reserved_usd` is what the job held of the budgets when it was
    accepted, NULL when its price was unknown.
    """

    __tablename__ = "jobs"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    version: Mapped[int] = mapped_column(Integer)

    owner: Mapped[str] = mapped_column(Text, server_default=text("'default'"))
    key_id: Mapped[UUID | None] = mapped_column(Uuid)
    is_public: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    reserved_usd: Mapped[Decimal | None] = mapped_column(Numeric(14, 6))

    status: Mapped[str] = mapped_column(String(16))
    stage: Mapped[str | None] = mapped_column(String(16))
    progress: Mapped[float | None] = mapped_column(Double)
    is_cancel_requested: Mapped[bool] = mapped_column(Boolean)
    attempts: Mapped[int] = mapped_column(SmallInteger)
    look_failures: Mapped[int] = mapped_column(SmallInteger)

    provider: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(Text)
    prompt: Mapped[str] = mapped_column(Text)
    input: Mapped[dict[str, Any]] = mapped_column(JSONB)
    uploads: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=text("'{}'"))
    num_outputs: Mapped[int] = mapped_column(SmallInteger)
    priority: Mapped[int] = mapped_column(SmallInteger)
    webhook_url: Mapped[str | None] = mapped_column(Text)
    client_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB)
    request_id: Mapped[str | None] = mapped_column(Text)
    retry_of: Mapped[UUID | None] = mapped_column(Uuid)

    warnings: Mapped[list[str]] = mapped_column(JSONB)
    error_code: Mapped[str | None] = mapped_column(Text)
    error_message: Mapped[str | None] = mapped_column(Text)
    error_retryable: Mapped[bool | None] = mapped_column(Boolean)
    cost_usd: Mapped[Decimal | None] = mapped_column(Numeric(12, 6))

    due_at: Mapped[datetime | None] = mapped_column(Moment)
    claim_token: Mapped[UUID | None] = mapped_column(Uuid)
    has_news: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    silent_looks: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    deadline_at: Mapped[datetime] = mapped_column(Moment)
    created_at: Mapped[datetime] = mapped_column(Moment)
    started_at: Mapped[datetime | None] = mapped_column(Moment)
    generated_at: Mapped[datetime | None] = mapped_column(Moment)
    completed_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint(
            "status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')",
            name="status_known",
        ),
        CheckConstraint(
            "stage IN ('queued', 'submitting', 'reconciling', 'generating', 'storing')",
            name="stage_known",
        ),
        CheckConstraint(f"({TERMINAL}) = (due_at IS NULL)", name="finished_not_due"),
        CheckConstraint(
            f"({TERMINAL}) = (completed_at IS NOT NULL)", name="finished_has_moment"
        ),
        CheckConstraint(f"({TERMINAL}) = (stage IS NULL)", name="finished_no_stage"),
        CheckConstraint(
            "(status = 'pending') = (stage IS NOT DISTINCT FROM 'queued')",
            name="pending_is_queued",
        ),
        CheckConstraint(
            f"NOT ({TERMINAL}) OR claim_token IS NULL", name="finished_unclaimed"
        ),
        CheckConstraint(
            "(status = 'failed') = (error_code IS NOT NULL)", name="failed_has_reason"
        ),
        CheckConstraint("progress BETWEEN 0 AND 1", name="progress_is_share"),
        CheckConstraint("version >= 1 AND attempts >= 0", name="counts_sane"),
        # The watcher: jobs under way that somebody must look at, and the queue.
        Index("ix_jobs_due", "due_at", postgresql_where=text("due_at IS NOT NULL")),
        Index(
            "ix_jobs_turns",
            "owner",
            text("priority DESC"),
            "due_at",
            postgresql_where=text("status = 'pending'"),
        ),
        # Listing by keyset: ids are UUIDv7, so the primary key is newest first already.
        Index("ix_jobs_status_id", "status", text("id DESC")),
        Index("ix_jobs_model_id", "model", text("id DESC")),
        # An owner's own: among others' jobs theirs may be few and far between.
        Index("ix_jobs_owner_id", "owner", text("id DESC")),
        Index("ix_jobs_owner_status_id", "owner", "status", text("id DESC")),
        Index("ix_jobs_owner_model_id", "owner", "model", text("id DESC")),
        # Searching: parts of words, in any case.  Finished jobs only: every look at a live one
        # would write its prompt's hundred entries again.
        Index(
            "ix_jobs_prompt_parts",
            "prompt",
            postgresql_using="gin",
            postgresql_ops={"prompt": "gin_trgm_ops"},
            postgresql_where=text("due_at IS NULL"),
        ),
    )


class Attempt(Base):
    """One intended purchase, committed before the provider is called.

    `fingerprint` names the exact input (`Job.input` never changes); `token` makes the
    webhook's address unguessable.  A prediction (`handle`) belongs to one attempt at most,
    and a job has one open attempt at most: both are unique indexes.  `cancel_at` is when the
    prediction is next to be cancelled at the provider because nobody wants it; a LOST attempt
    with a handle turned up late.
    """

    __tablename__ = "attempts"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    job_id: Mapped[UUID] = mapped_column(
        Uuid, ForeignKey("jobs.id", ondelete="CASCADE")
    )
    number: Mapped[int] = mapped_column(SmallInteger)
    state: Mapped[str] = mapped_column(String(16))
    handle: Mapped[str | None] = mapped_column(Text)
    fingerprint: Mapped[str] = mapped_column(String(64))
    token: Mapped[str] = mapped_column(String(64))
    sent_at: Mapped[datetime] = mapped_column(Moment)
    closed_at: Mapped[datetime | None] = mapped_column(Moment)
    cancel_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        UniqueConstraint("job_id", "number"),
        CheckConstraint(
            "state IN ('ready', 'sent', 'running', 'succeeded', 'failed', 'refused',"
            " 'lost', 'cancelled')",
            name="state_known",
        ),
        CheckConstraint(
            "state NOT IN ('running', 'succeeded') OR handle IS NOT NULL",
            name="bought_has_handle",
        ),
        Index(
            "uq_attempts_handle",
            "handle",
            unique=True,
            postgresql_where=text("handle IS NOT NULL"),
        ),
        Index(
            "uq_attempts_open",
            "job_id",
            unique=True,
            postgresql_where=text("state IN ('ready', 'sent', 'running')"),
        ),
        # The sweep: what runs at the provider, and since when.
        Index(
            "ix_attempts_running",
            "sent_at",
            postgresql_where=text("state = 'running'"),
        ),
        # Late survivors: searched for, and cancelled when nobody wants them.
        Index(
            "ix_attempts_lost",
            "sent_at",
            postgresql_where=text("state = 'lost' AND handle IS NULL"),
        ),
        Index(
            "ix_attempts_cancel",
            "cancel_at",
            postgresql_where=text("cancel_at IS NOT NULL"),
        ),
    )


class Asset(Base):
    """One stored output.  Several assets may share a file (`key`), which is its hash.

    `colour` (`#rrggbb`) stands in for the picture until it is loaded; NULL until somebody
    looked, some time after the job's end.  `provenance` is what the file says of its origin,
    NULL for files from before that was asked.
    """

    __tablename__ = "assets"

    job_id: Mapped[UUID] = mapped_column(
        Uuid, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
    )
    index: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    key: Mapped[str] = mapped_column(Text, index=True)
    sha256: Mapped[str] = mapped_column(String(64))
    content_type: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    colour: Mapped[str | None] = mapped_column(String(7))
    provenance: Mapped[str | None] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint("size_bytes > 0", name="not_empty"),
        CheckConstraint(
            "provenance IN ('marked', 'present', 'credentials', 'signed', 'none')",
            name="provenance_known",
        ),
        # Searching by size.
        Index("ix_assets_size", "width", "height", text("job_id DESC")),
    )


class Stray(Base):
    """A signed file that was about to be stored: no second signature gives the same bytes.

    Nobody finds it again when the process dies before it is recorded.  So it is looked at
    once, some time after `noted_at`, and removed unless an asset has it by then.
    """

    __tablename__ = "strays"

    key: Mapped[str] = mapped_column(Text, primary_key=True)
    noted_at: Mapped[datetime] = mapped_column(
        Moment, server_default=text("now()"), index=True
    )


class JobEvent(Base):
    """What happened to a job, in order: `version` is the job's version after it.

    `xid` is the transaction that wrote it.  Ids are given out before commits, in another order;
    whoever reads the log of all jobs as it grows goes by (`xid`, `id`), up to the oldest
    transaction that is still open, and misses nothing.
    """

    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    job_id: Mapped[UUID] = mapped_column(
        Uuid, ForeignKey("jobs.id", ondelete="CASCADE")
    )
    version: Mapped[int] = mapped_column(Integer)
    name: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    status: Mapped[str] = mapped_column(String(16))
    stage: Mapped[str | None] = mapped_column(String(16))
    at: Mapped[datetime] = mapped_column(Moment)
    xid: Mapped[int] = mapped_column(BigInteger, server_default=THIS_TRANSACTION)

    __table_args__ = (
        UniqueConstraint("job_id", "version"),
        Index("ix_job_events_log", "xid", "id"),
    )
