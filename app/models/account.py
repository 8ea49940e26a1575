"""The tables of callers and their money: keys, owners, accounts, the ledger, what came in.

The second half of the schema (see `models/job.py`).  Nothing here has a foreign key to `jobs`:
what was spent stays written when a job is deleted.
"""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Date,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    SmallInteger,
    String,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.models.job import Base, Moment

Dollars = Numeric(14, 6)


class APIKey(Base):
    """One key of an owner: SHA-256 of it, never itself; what it may do, and how much of it.

    A limit that is NULL does not apply.  Keys are revoked, never deleted: the ledger names them.
    """

    __tablename__ = "api_keys"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    owner: Mapped[str] = mapped_column(Text, index=True)
    name: Mapped[str] = mapped_column(Text)
    prefix: Mapped[str] = mapped_column(String(16))
    hash: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text()))
    created_at: Mapped[datetime] = mapped_column(Moment)
    expires_at: Mapped[datetime | None] = mapped_column(Moment)
    revoked_at: Mapped[datetime | None] = mapped_column(Moment)
    last_used_at: Mapped[datetime | None] = mapped_column(Moment)

    requests_per_minute: Mapped[int | None] = mapped_column(Integer)
    concurrent_jobs: Mapped[int | None] = mapped_column(Integer)
    jobs_per_day: Mapped[int | None] = mapped_column(Integer)
    models: Mapped[list[str] | None] = mapped_column(ARRAY(Text()))
    max_outputs: Mapped[int | None] = mapped_column(SmallInteger)
    max_pixels: Mapped[int | None] = mapped_column(BigInteger)
    budget_job_usd: Mapped[Decimal | None] = mapped_column(Dollars)
    budget_day_usd: Mapped[Decimal | None] = mapped_column(Dollars)
    budget_month_usd: Mapped[Decimal | None] = mapped_column(Dollars)


class Owner(Base):
    """Whose jobs take turns: `weight` is the share, `turn` the virtual time of the last start."""

    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    weight: Mapped[int] = mapped_column(SmallInteger, server_default=text("1"))
    turn: Mapped[float] = mapped_column(Double, server_default=text("0"))

    __table_args__ = (CheckConstraint("weight BETWEEN 1 AND 1000", name="weight_sane"),)


class Account(Base):
    """What a key, or the whole service, holds and has spent; its row is the lock of admission.

    `live` jobs are not finished.  `day` and `month` are the latest ones anything was accepted
    in; the figures beside them are of that day and month, reservations included.
    """

    __tablename__ = "accounts"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    live: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    day: Mapped[date] = mapped_column(Date)
    day_jobs: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    day_usd: Mapped[Decimal] = mapped_column(Dollars, server_default=text("0"))
    month: Mapped[date] = mapped_column(Date)
    month_usd: Mapped[Decimal] = mapped_column(Dollars, server_default=text("0"))
    reserved_usd: Mapped[Decimal] = mapped_column(Dollars, server_default=text("0"))
    spent_usd: Mapped[Decimal] = mapped_column(Dollars, server_default=text("0"))


class LedgerEntry(Base):
    """One movement of money, never changed: its sums are the balances of `accounts`.

    `reserve` and `release` (negative) cancel each other out at a job's end; `charge` is what it
    cost, NULL when that is not known.  `day` is the UTC day the job was accepted.
    """

    __tablename__ = "ledger_entries"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    day: Mapped[date] = mapped_column(Date)
    owner: Mapped[str] = mapped_column(Text)
    key_id: Mapped[UUID | None] = mapped_column(Uuid)
    job_id: Mapped[UUID] = mapped_column(Uuid)
    model: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(String(8))
    amount_usd: Mapped[Decimal | None] = mapped_column(Dollars)
    status: Mapped[str | None] = mapped_column(String(16))
    outputs: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    at: Mapped[datetime] = mapped_column(Moment)

    __table_args__ = (
        UniqueConstraint("job_id", "kind"),
        CheckConstraint("kind IN ('reserve', 'release', 'charge')", name="kind_known"),
        CheckConstraint(
            "amount_usd IS NOT NULL OR kind = 'charge'", name="amount_known"
        ),
        # Usage adds up charges; the rest is only ever read by job.
        Index(
            "ix_ledger_entries_day_owner",
            "day",
            "owner",
            postgresql_where=text("kind = 'charge'"),
        ),
    )


class Submission(Base):
    """A request that must not make a second job: by its Idempotency-Key, or as an SDK's retry."""

    __tablename__ = "submissions"

    owner: Mapped[str] = mapped_column(Text, primary_key=True)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[UUID] = mapped_column(Uuid)
    created_at: Mapped[datetime] = mapped_column(Moment, index=True)


class Upload(Base):
    """A file that came in, for models that take pictures.  `key` is its place in the store."""

    __tablename__ = "uploads"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    owner: Mapped[str] = mapped_column(Text)
    key: Mapped[str] = mapped_column(Text, index=True)
    sha256: Mapped[str] = mapped_column(String(64))
    content_type: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(Moment)
    used_at: Mapped[datetime] = mapped_column(Moment, index=True)

    __table_args__ = (UniqueConstraint("owner", "key"),)


class AuditEvent(Base):
    """One thing an administrator did."""

    __tablename__ = "audit_events"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    at: Mapped[datetime] = mapped_column(Moment)
    actor: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(Text)
    target: Mapped[str] = mapped_column(Text)
    details: Mapped[dict[str, Any]] = mapped_column(JSONB)
    address: Mapped[str | None] = mapped_column(Text)
    request_id: Mapped[str | None] = mapped_column(Text)
