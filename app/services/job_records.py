"""Between rows and values: how a job's state is read from its row and written back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Row,
    Table,
    Uuid,
    bindparam,
    exists,
    func,
    literal_column,
    select,
    true,
)

from app.domain.generation import Failure, GenerationRequest
from app.domain.state import Attempt, AttemptState, JobState, Stage, Status
from app.models import account, notice
from app.models import job as tables


def table_of(model: type[tables.Base]) -> Table:
    """Give the Core table of a model."""
    table = model.__table__
    assert isinstance(table, Table)
    return table


JOBS = table_of(tables.Job)
ATTEMPTS = table_of(tables.Attempt)
ASSETS = table_of(tables.Asset)
EVENTS = table_of(tables.JobEvent)
UPLOADS = table_of(account.Upload)
ENDPOINTS = table_of(notice.Endpoint)

PRIORITIES: Mapping[str, int] = {"low": -1, "normal": 0, "high": 1}


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to look at a job, good until somebody else takes it.

    `is_fresh` tells that this claim itself intended the attempt in `state`: nothing was
    sent yet.  Otherwise a SENT attempt without handle may have been bought.  `began` is this
    process's monotonic clock before the claim was asked for.
    """

    job_id: UUID
    token: UUID
    state: JobState
    request: GenerationRequest
    num_outputs: int
    attempt_id: UUID | None
    attempt_token: str | None
    request_id: str | None
    now: datetime
    is_fresh: bool = False
    began: float = 0.0


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """One file in the store, as the `assets` table keeps it."""

    index: int
    key: str
    sha256: str
    content_type: str
    size_bytes: int
    width: int
    height: int


_latest_attempt = (
    select(ATTEMPTS)
    .where(ATTEMPTS.c.job_id == JOBS.c.id)
    .order_by(ATTEMPTS.c.number.desc())
    .limit(1)
    .lateral("latest")
)

# Whether somebody may want to hear of a job by webhook, besides the job's own URL.
# By name, for there is nothing in RETURNING that a subquery could be correlated to.
IS_HEARD = exists(
    select(literal_column("1")).where(
        ENDPOINTS.c.owner == literal_column("jobs.owner", JOBS.c.owner.type)
    )
)

# What a decision and a look need, and the database's clock.
SELECT_STATE = (
    select(
        JOBS,
        _latest_attempt.c.id.label("attempt_id"),
        _latest_attempt.c.number.label("attempt_number"),
        _latest_attempt.c.state.label("attempt_state"),
        _latest_attempt.c.handle.label("attempt_handle"),
        _latest_attempt.c.sent_at.label("attempt_sent_at"),
        _latest_attempt.c.token.label("attempt_token"),
        IS_HEARD.label("is_heard"),
        func.clock_timestamp().label("now"),
    )
    .select_from(JOBS.outerjoin(_latest_attempt, true()))
    .where(JOBS.c.id == func.any(bindparam("ids", type_=ARRAY(Uuid()))))
)


def read_state(row: Row[Any]) -> JobState:
    """Rebuild the state from a row of `SELECT_STATE`."""
    attempt = None
    if row.attempt_id is not None:
        attempt = Attempt(
            row.attempt_number,
            AttemptState(row.attempt_state),
            row.attempt_sent_at,
            row.attempt_handle,
        )
    failure = None
    if row.error_code is not None:
        failure = Failure(row.error_code, row.error_message, row.error_retryable)
    return JobState(
        status=Status(row.status),
        stage=Stage(row.stage) if row.stage else None,
        created_at=row.created_at,
        deadline_at=row.deadline_at,
        due_at=row.due_at,
        version=row.version,
        attempts=row.attempts,
        attempt=attempt,
        # Decided in whole percents; the column is a float of 4 bytes.
        progress=None if row.progress is None else round(row.progress, 2),
        is_cancel_requested=row.is_cancel_requested,
        is_claimed=row.claim_token is not None and row.due_at > row.now,
        has_news=row.has_news,
        look_failures=row.look_failures,
        silent_looks=row.silent_looks,
        failure=failure,
        warnings=tuple(row.warnings),
        started_at=row.started_at,
        generated_at=row.generated_at,
        completed_at=row.completed_at,
    )


# The columns of `jobs` a decision may change.
STATE_COLUMNS = (
    "id",
    "version",
    "status",
    "stage",
    "progress",
    "is_cancel_requested",
    "has_news",
    "attempts",
    "look_failures",
    "silent_looks",
    "warnings",
    "error_code",
    "error_message",
    "error_retryable",
    "cost_usd",
    "due_at",
    "claim_token",
    "started_at",
    "generated_at",
    "completed_at",
)


def write_state(
    job_id: UUID,
    state: JobState,
    *,
    due_at: datetime | None,
    claim_token: UUID | None,
    cost_usd: Decimal | None,
) -> dict[str, Any]:
    """Give the values of STATE_COLUMNS; a finished job is due never and claimed by nobody."""
    failure = state.failure
    return {
        "id": job_id,
        "version": state.version,
        "status": state.status.value,
        "stage": state.stage.value if state.stage else None,
        "progress": state.progress,
        "is_cancel_requested": state.is_cancel_requested,
        "has_news": state.has_news,
        "attempts": state.attempts,
        "look_failures": min(state.look_failures, 30_000),
        "silent_looks": min(state.silent_looks, 30_000),
        "warnings": list(state.warnings),
        "error_code": failure.code if failure else None,
        "error_message": failure.message if failure else None,
        "error_retryable": failure.retryable if failure else None,
        "cost_usd": cost_usd,
        "due_at": None if state.is_terminal else due_at,
        "claim_token": None if state.is_terminal else claim_token,
        "started_at": state.started_at,
        "generated_at": state.generated_at,
        "completed_at": state.completed_at,
    }


def read_claim(
    row: Row[Any],
    state: JobState,
    token: UUID,
    *,
    began: float,
    is_fresh: bool,
    attempt_id: UUID | None = None,
    attempt_token: str | None = None,
) -> Claim:
    """Make the claim on a row of `SELECT_STATE`."""
    return Claim(
        job_id=row.id,
        token=token,
        state=state,
        request=GenerationRequest(row.model, row.input),
        num_outputs=row.num_outputs,
        attempt_id=attempt_id or row.attempt_id,
        attempt_token=attempt_token or row.attempt_token,
        request_id=row.request_id,
        now=row.now,
        is_fresh=is_fresh,
        began=began,
    )
