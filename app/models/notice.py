"""The tables of what is told and steered: Endpoint, Notification, Delivery, Switch."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    SmallInteger,
    String,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.models.job import Base, Moment


class Endpoint(Base):
    """A registered receiver of webhooks.  `events` are the types it hears of; empty: all.

    `previous_secret` signs beside `secret` until `previous_until`.  `disabled_reason` says why
    it was switched off when nobody did so on purpose; `failing_since` is when the tries began
    to fail that nothing but failures followed.
    """

    __tablename__ = "endpoints"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True)
    owner: Mapped[str] = mapped_column(Text)
    url: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text, server_default=text("''"))
    events: Mapped[list[str]] = mapped_column(ARRAY(Text))
    secret: Mapped[str] = mapped_column(Text)
    previous_secret: Mapped[str | None] = mapped_column(Text)
    previous_until: Mapped[datetime | None] = mapped_column(Moment)
    is_enabled: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    disabled_reason: Mapped[str | None] = mapped_column(Text)
    failing_since: Mapped[datetime | None] = mapped_column(Moment)
    created_at: Mapped[datetime] = mapped_column(Moment)

    __table_args__ = (Index("ix_endpoints_owner_id", "owner", text("id DESC")),)


class Notification(Base):
    """One webhook for one receiver, written in the transaction of the change it tells of.

    It goes to an endpoint, or to the job's own `url`; `receiver` names either, together with
    its owner, and is what takes turns.  `due_at` and `claim_token` mean what they mean on
    `jobs`.  `data` is what was true after the change: links are added when it is sent.  A job
    that is deleted meanwhile is told of all the same.  `attempts` counts the tries that began,
    `tried_before` those before it was last asked for again.

    Nothing refers to the endpoint by a foreign key: whoever writes down what became of a job
    must not wait for somebody who changes an endpoint.
    """

    __tablename__ = "notifications"

    id: Mapped[UUID] = mapped_column(
        Uuid, primary_key=True, server_default=text("gen_random_uuid()")
    )
    owner: Mapped[str] = mapped_column(Text)
    receiver: Mapped[str] = mapped_column(Text)
    endpoint_id: Mapped[UUID | None] = mapped_column(Uuid)
    url: Mapped[str | None] = mapped_column(Text)
    type: Mapped[str] = mapped_column(String(32))
    job_id: Mapped[UUID | None] = mapped_column(Uuid, index=True)
    job_version: Mapped[int | None] = mapped_column(Integer)
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    state: Mapped[str] = mapped_column(String(16), server_default=text("'pending'"))
    attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    tried_before: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    due_at: Mapped[datetime | None] = mapped_column(Moment)
    claim_token: Mapped[UUID | None] = mapped_column(Uuid)
    created_at: Mapped[datetime] = mapped_column(Moment)
    finished_at: Mapped[datetime | None] = mapped_column(Moment)

    __table_args__ = (
        CheckConstraint(
            "state IN ('pending', 'delivered', 'failed', 'dropped')", name="state_known"
        ),
        CheckConstraint(
            "(state = 'pending') = (due_at IS NOT NULL)", name="pending_is_due"
        ),
        CheckConstraint(
            "(endpoint_id IS NULL) = (url IS NOT NULL)", name="one_receiver"
        ),
        Index(
            "ix_notifications_due",
            "receiver",
            "due_at",
            postgresql_where=text("due_at IS NOT NULL"),
        ),
        Index(
            "ix_notifications_finished",
            "finished_at",
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
        Index("ix_notifications_endpoint_made", "endpoint_id", "created_at", "id"),
        Index("ix_notifications_owner_made", "owner", "created_at", "id"),
    )


class Delivery(Base):
    """One try to deliver a notification; `status_code` is NULL when there was no answer."""

    __tablename__ = "deliveries"

    notification_id: Mapped[UUID] = mapped_column(
        Uuid, ForeignKey("notifications.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    at: Mapped[datetime] = mapped_column(Moment)
    seconds: Mapped[float] = mapped_column(Double)
    status_code: Mapped[int | None] = mapped_column(SmallInteger)
    error: Mapped[str | None] = mapped_column(Text)


class Switch(Base):
    """A state of the whole deployment that somebody set.  `queue`: off while it is paused."""

    __tablename__ = "switches"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    is_on: Mapped[bool] = mapped_column(Boolean)
    reason: Mapped[str] = mapped_column(Text, server_default=text("''"))
    changed_at: Mapped[datetime] = mapped_column(Moment)
    changed_by: Mapped[str] = mapped_column(Text)
