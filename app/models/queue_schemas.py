"""The HTTP contract of the queue; see `schemas.py`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

REASON_LIMIT = 200

Reason = Annotated[
    str,
    StringConstraints(
        min_length=1,
        max_length=REASON_LIMIT,
        pattern=r"^[^\x00-\x1f\x7f]*$",
    ),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PauseRequest(_Body):
    """Why nothing may start for a while."""

    reason: Reason = Field(
        description="For operators, in health and in the audit log; callers do not see it.",
        examples=["moving the database"],
    )


class QueueStatus(_Body):
    """How the queue is, and what waits in it."""

    state: Literal["running", "paused"]
    since: datetime | None = Field(
        description="When it was paused; null while it runs."
    )
    reason: str | None = Field(description="Why it was paused; for administrators.")
    paused_by: str | None = Field(
        description="Who paused it, as in the audit log; for administrators."
    )
    pending: int = Field(
        description="Jobs that wait to start: the caller's, an administrator's all."
    )
    in_flight: int = Field(description="Jobs under way; they go on during a pause.")
    oldest_pending_at: datetime | None = Field(
        description="When the first of the pending jobs came in; null without any."
    )
