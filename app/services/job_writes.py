"""Writing decisions down: rows collected for a batch, then one statement per table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Executable, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import RELAXED, arrays, unnest
from app.domain import journal
from app.domain.events import Event, Expired, WentSilent
from app.domain.generation import GenerationRequest
from app.domain.state import AttemptState, JobState, Stage
from app.services import accounts, file_locks, outbox
from app.services.accounts import Movement
from app.services.job_records import (
    ASSETS,
    ATTEMPTS,
    EVENTS,
    JOBS,
    STATE_COLUMNS,
    StoredOutput,
    write_state,
)

log = structlog.get_logger("app.jobs")

_states = unnest(JOBS, STATE_COLUMNS, alias="job")
_UPDATE_JOBS = (
    update(JOBS)
    .where(JOBS.c.id == _states.c.id)
    .values({name: _states.c[name] for name in STATE_COLUMNS if name != "id"})
)
_UPDATE_JOBS_RELAXED = _UPDATE_JOBS.where(RELAXED)
_ATTEMPT_COLUMNS = (
    *("id", "job_id", "number", "state", "handle", "fingerprint", "token"),
    *("sent_at", "closed_at", "cancel_at"),
)
_attempts = unnest(ATTEMPTS, _ATTEMPT_COLUMNS, alias="attempt")
_insert_attempts = upsert(ATTEMPTS).from_select(
    list(_ATTEMPT_COLUMNS), select(_attempts), include_defaults=False
)
_WRITE_ATTEMPTS = _insert_attempts.on_conflict_do_update(
    index_elements=[ATTEMPTS.c.job_id, ATTEMPTS.c.number],
    set_={
        name: _insert_attempts.excluded[name]
        for name in ("state", "handle", "sent_at", "closed_at", "cancel_at")
    },
)
_EVENT_COLUMNS = ("job_id", "version", "name", "data", "status", "stage", "at")
_events = unnest(EVENTS, _EVENT_COLUMNS, alias="event")
_INSERT_EVENTS = insert(EVENTS).from_select(
    list(_EVENT_COLUMNS), select(_events), include_defaults=False
)
_ASSET_COLUMNS = (
    *("job_id", "index", "key", "sha256", "content_type", "size_bytes"),
    *("width", "height", "created_at"),
)
_assets = unnest(ASSETS, _ASSET_COLUMNS, alias="asset")
_INSERT_ASSETS = insert(ASSETS).from_select(
    list(_ASSET_COLUMNS), select(_assets), include_defaults=False
)


_WRITES: Mapping[str, tuple[Any, Sequence[str]]] = {
    "job": (_UPDATE_JOBS, STATE_COLUMNS),
    "attempt": (_WRITE_ATTEMPTS, _ATTEMPT_COLUMNS),
    "event": (_INSERT_EVENTS, _EVENT_COLUMNS),
    "asset": (_INSERT_ASSETS, _ASSET_COLUMNS),
    "entry": (accounts.INSERT_ENTRIES, accounts.ENTRY_COLUMNS),
    "finished": (accounts.BOOK_FINISHED, accounts.FINISHED_COLUMNS),
    "notice": (outbox.INSERT_NOTICES, outbox.COLUMNS),
}


@lru_cache
def _together(*names: str) -> Executable:
    """Make one statement of several: a round trip and a plan instead of one for each table."""
    *others, last = (_WRITES[name][0] for name in names)
    statement = last
    for name, other in zip(names, others):
        statement = statement.add_cte(other.cte(f"{name}_written"))
    written: Executable = statement
    return written


class Writes:
    """Rows to write for a batch of decisions; `flush` sends them as one statement."""

    def __init__(self) -> None:
        self._jobs: dict[UUID, dict[str, Any]] = {}
        self._attempts: dict[tuple[UUID, int], dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._assets: list[dict[str, Any]] = []
        self._releases: list[Mapping[str, Any]] = []
        self._charges: dict[UUID, dict[str, Any]] = {}
        self._finished: list[Mapping[str, Any]] = []
        self._notices: dict[tuple[UUID, int], outbox.Notice] = {}

    @property
    def tells(self) -> bool:
        """Tell whether somebody is to be told of something by webhook."""
        return bool(self._notices)

    def add(
        self,
        row: Any,
        before: JobState,
        after: JobState,
        *,
        due_at: datetime | None,
        claim_token: UUID | None,
        cost_usd: Decimal | None = None,
    ) -> None:
        """Write the job's new state; log the one line of a change that can be seen.

        `cost_usd` is what the prediction cost that this tells of; a job costs what all its
        predictions did.  What changes nothing that can be seen was told before.
        """
        # An earlier change of this batch may have brought something.
        spent = self._jobs.get(row.id, {"cost_usd": row.cost_usd})["cost_usd"]
        told = None if after.version == before.version else cost_usd
        cost_usd = spent if told is None else told + (spent or 0)
        self._jobs[row.id] = _storable(
            write_state(
                row.id,
                after,
                due_at=due_at,
                claim_token=claim_token,
                cost_usd=cost_usd,
            )
        )
        if after.is_terminal and not before.is_terminal:
            is_unknown = _is_unknown(before, told, cost_usd)
            self._finish(row, after, cost_usd, is_unknown=is_unknown)
        if (before.status, before.stage) != (after.status, after.stage):
            log.info(
                "job.changed",
                job_id=str(row.id),
                request_id=row.request_id,
                status=after.status.value,
                stage=after.stage.value if after.stage else None,
                version=after.version,
                attempt=after.attempts,
                code=after.failure.code if after.failure else None,
            )

    def _finish(
        self, row: Any, after: JobState, cost_usd: Decimal | None, *, is_unknown: bool
    ) -> None:
        """Let go of what the job held, and book what it cost; once, as it finishes once."""
        day = accounts.day_of(row.created_at)
        job = Movement(row.id, row.owner, row.key_id, row.model, day)
        reserved = row.reserved_usd
        if reserved is not None:
            self._releases.append(job.entry(accounts.RELEASE, -reserved, row.now))
            # What nobody knows the cost of is never free; what was not bought is.
            cost_usd = reserved if is_unknown else cost_usd or Decimal(0)
        self._charges[row.id] = job.entry(
            accounts.CHARGE, cost_usd, row.now, status=after.status.value
        )
        self._finished += accounts.booked_finished(job, reserved, cost_usd)

    def decided(self, row: Any, state: JobState, after: JobState, event: Event) -> None:
        """Write what was decided outside any look; nobody has a claim then."""
        self.add(row, state, after, due_at=after.due_at, claim_token=None)
        if after.version != state.version:
            self.event(row, after, event)
        if after.attempt != state.attempt:
            self.attempt(row, after, event)

    def event(self, row: Any, after: JobState, event: Event) -> None:
        """Append the event to the job's history, and tell those who want to hear of it.

        The job's new state must have been written before: what is told is in it.
        """
        name, data = journal.record(event)
        if (heard := outbox.name_heard(row, event, after)) is not None:
            spent = self._jobs[row.id]["cost_usd"]
            told = outbox.notice_of(row, after, heard, cost_usd=spent)
            self._notices[row.id, after.version] = _storable(told)
        self._events.append(
            {
                "job_id": row.id,
                "version": after.version,
                "name": name,
                "data": _storable(data),
                "status": after.status.value,
                "stage": after.stage.value if after.stage else None,
                "at": row.now,
            }
        )

    def attempt(
        self,
        row: Any,
        after: JobState,
        event: Event,
        *,
        attempt_id: UUID | None = None,
        token: str | None = None,
    ) -> None:
        """Write the attempt, changed, or new with an id and a token of its own."""
        attempt = after.attempt
        if attempt is None:
            return
        is_over = not attempt.state.is_open
        # Given up while it runs: nobody saw the provider agree.
        is_given_up = isinstance(event, Expired | WentSilent)
        is_unwanted = is_given_up and attempt.state is AttemptState.CANCELLED
        self._attempts[row.id, attempt.number] = {
            "id": attempt_id or row.attempt_id,
            "job_id": row.id,
            "number": attempt.number,
            "state": attempt.state.value,
            "handle": attempt.handle,
            "fingerprint": GenerationRequest(row.model, row.input).fingerprint,
            "token": token or row.attempt_token,
            "sent_at": attempt.sent_at,
            "closed_at": row.now if is_over else None,
            "cancel_at": row.now if is_unwanted else None,
        }

    def outputs(self, row: Any, outputs: Sequence[StoredOutput]) -> None:
        """Attach stored files to the job."""
        if (charge := self._charges.get(row.id)) is not None:
            charge["outputs"] = len(outputs)
        for (job_id, _), notice in self._notices.items():
            if job_id == row.id and outputs:
                notice["data"]["outputs"] = outbox.outputs_told(outputs)
        for output in outputs:
            self._assets.append(
                {
                    "job_id": row.id,
                    "index": output.index,
                    "key": output.key,
                    "sha256": output.sha256,
                    "content_type": output.content_type,
                    "size_bytes": output.size_bytes,
                    "width": output.width,
                    "height": output.height,
                    "created_at": row.now,
                }
            )

    async def flush(self, conn: AsyncConnection, *, is_relaxed: bool = False) -> None:
        """Send what there is; relaxed, the commit waits for no disk (see `RELAXED`)."""
        if self._assets:
            await file_locks.share(conn, (asset["key"] for asset in self._assets))
        rows: dict[str, Sequence[Mapping[str, Any]]] = {
            "job": list(self._jobs.values()),
            "attempt": list(self._attempts.values()),
            "event": self._events,
            "asset": self._assets,
            "entry": [*self._releases, *self._charges.values()],
            "finished": self._finished,
            "notice": list(self._notices.values()),
        }
        names = [name for name, found in rows.items() if found]
        if not names:
            return
        values: dict[str, Any] = {}
        for name in names:
            values |= arrays(rows[name], _WRITES[name][1], alias=name)
        if is_relaxed and names == ["job"]:
            await conn.execute(_UPDATE_JOBS_RELAXED, values)
        else:
            await conn.execute(_together(*names), values)


def _is_unknown(before: JobState, told: Decimal | None, spent: Decimal | None) -> bool:
    """Tell a job that ends with a purchase nobody told the cost of."""
    attempt = before.attempt
    if before.stage is Stage.STORING:
        return spent is None
    is_running = attempt is not None and attempt.state is AttemptState.RUNNING
    return is_running and told is None


def _storable(value: Any) -> Any:
    """Replace what PostgreSQL cannot keep in a text: NUL and lone surrogates.

    Providers' error texts are not ours to trust; a job must not fail to settle over one.
    """
    match value:
        case str() if not isinstance(value, Enum):
            return value.replace("\x00", "\ufffd").encode(errors="replace").decode()
        case dict():
            return {name: _storable(part) for name, part in value.items()}
        case list() | tuple():
            return [_storable(part) for part in value]
    return value
