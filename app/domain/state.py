"""What is known of a job and of its attempts: the values `lifecycle.decide` works on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from app.domain.generation import Failure


class Status(StrEnum):
    """What a caller sees.  The last three never change again."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Tell whether the job is finished for good."""
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class Stage(StrEnum):
    """What a live job is waiting for."""

    QUEUED = "queued"
    SUBMITTING = "submitting"
    RECONCILING = "reconciling"
    GENERATING = "generating"
    STORING = "storing"


class AttemptState(StrEnum):
    """How far one intended purchase came.  READY, SENT and RUNNING are open."""

    READY = "ready"  # certainly not bought; will be sent (again) later
    SENT = "sent"  # may have been bought: the request was about to leave
    RUNNING = "running"  # bought; the provider's handle is known
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REFUSED = "refused"  # the provider said no; nothing was created
    LOST = "lost"  # nobody could tell within the grace period
    CANCELLED = "cancelled"

    @property
    def is_open(self) -> bool:
        """Tell whether the attempt may still bring a picture."""
        return self in (AttemptState.READY, AttemptState.SENT, AttemptState.RUNNING)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One intended purchase.  `number` starts at 1; `handle` is the provider's id."""

    number: int
    state: AttemptState
    sent_at: datetime
    handle: str | None = None


@dataclass(frozen=True, slots=True)
class JobState:
    """Everything a decision needs.

    `due_at` is when somebody must look next, None exactly when finished.  `attempt` is the
    latest one, `attempts` how many were made so far.  `is_claimed` tells whether somebody is
    looking right now (then `due_at` in the table is their lease).  `look_failures` counts
    looks that came to nothing in a row, `silent_looks` those that ended without a word.
    `has_news`: the provider was heard to be done since the last look began.
    """

    status: Status
    stage: Stage | None
    created_at: datetime
    deadline_at: datetime
    due_at: datetime | None
    version: int = 1
    attempts: int = 0
    attempt: Attempt | None = None
    progress: float | None = None
    is_cancel_requested: bool = False
    is_claimed: bool = False
    has_news: bool = False
    look_failures: int = 0
    silent_looks: int = 0
    failure: Failure | None = None
    warnings: tuple[str, ...] = ()
    started_at: datetime | None = None
    generated_at: datetime | None = None
    completed_at: datetime | None = None

    @property
    def is_terminal(self) -> bool:
        """Tell whether the job is finished for good."""
        return self.status.is_terminal

    @property
    def open_attempt(self) -> Attempt | None:
        """The attempt that may still bring a picture, if any."""
        if self.attempt is not None and self.attempt.state.is_open:
            return self.attempt
        return None


def new_job(
    now: datetime, deadline: timedelta, *, warnings: tuple[str, ...] = ()
) -> JobState:
    """Give birth to a job: pending, due at once."""
    return JobState(
        status=Status.PENDING,
        stage=Stage.QUEUED,
        created_at=now,
        deadline_at=now + deadline,
        due_at=now,
        warnings=warnings,
    )
