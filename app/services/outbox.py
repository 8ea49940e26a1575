"""What is to be told of a change, written in the statement that writes the change.

So either both are committed or neither: no process that dies makes a webhook be forgotten, and
none tells of what did not happen.  Nothing is written, and no other statement sent, for jobs
nobody wants to hear of.  Sending is the business of `courier`.

A job's own `webhook_url` hears of its end; an endpoint hears of what it subscribed to.  Whether
an endpoint is enabled is asked when the row is written: for one that is not, the row is
`dropped`, and can be asked for again later.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Text,
    Uuid,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import unnest
from app.domain import notices
from app.domain.admission import plain
from app.domain.events import Event
from app.domain.generation import JSON
from app.domain.state import JobState
from app.models import notice as tables
from app.services.job_records import ENDPOINTS, StoredOutput, table_of

NOTIFICATIONS = table_of(tables.Notification)
DELIVERIES = table_of(tables.Delivery)

DROPPED_AT_ONCE: Final = 5000  # some tenth of a second; others wait meanwhile
LONGEST_TEXT: Final = 1000  # characters of what a provider said

COLUMNS: Final = (
    *("owner", "url", "receiver", "type", "job_id", "job_version", "data"),
    "created_at",
)
_told = unnest(NOTIFICATIONS, COLUMNS, alias="notice")
_is_enabled = ENDPOINTS.c.is_enabled
_common = (_told.c.owner, _told.c.type, _told.c.job_id, _told.c.job_version)
_own = select(
    *_common,
    type_coerce(_told.c.data, NOTIFICATIONS.c.data.type),
    _told.c.created_at,
    cast(null(), Uuid).label("endpoint_id"),
    _told.c.url,
    _told.c.receiver,
    literal("pending").label("state"),
    _told.c.created_at.label("due_at"),
    cast(null(), NOTIFICATIONS.c.finished_at.type).label("finished_at"),
).where(_told.c.url.is_not(None))
_subscribed = (
    select(
        *_common,
        type_coerce(_told.c.data, NOTIFICATIONS.c.data.type),
        _told.c.created_at,
        ENDPOINTS.c.id,
        cast(null(), Text),
        _told.c.owner + " " + cast(ENDPOINTS.c.id, Text),
        case((_is_enabled, "pending"), else_="dropped"),
        case((_is_enabled, _told.c.created_at)),
        case((~_is_enabled, _told.c.created_at)),
    )
    .select_from(_told)
    .join(ENDPOINTS, ENDPOINTS.c.owner == _told.c.owner)
    .where(
        or_(
            func.cardinality(ENDPOINTS.c.events) == 0,
            _told.c.type == func.any(ENDPOINTS.c.events),
        )
    )
)
# For `arrays(notices, COLUMNS, alias="notice")`.
INSERT_NOTICES = insert(NOTIFICATIONS).from_select(
    [
        *("owner", "type", "job_id", "job_version", "data", "created_at"),
        *("endpoint_id", "url", "receiver", "state", "due_at", "finished_at"),
    ],
    union_all(_own, _subscribed),
    include_defaults=False,
)

_PENDING = (
    select(NOTIFICATIONS.c.id)
    .where(
        NOTIFICATIONS.c.receiver == func.any(bindparam("names", type_=ARRAY(Text())))
    )
    # What is being sent at this moment is settled by whoever sends it.
    .where(NOTIFICATIONS.c.due_at.is_not(None))
    # Tests go out all the same, to whoever is there.
    .where(NOTIFICATIONS.c.type != notices.TEST)
    .where(
        NOTIFICATIONS.c.claim_token.is_(None) | (NOTIFICATIONS.c.due_at <= func.now())
    )
    # What is due first is left to the end, and so to a claim that is near.
    .order_by(NOTIFICATIONS.c.due_at.desc())
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)
_DROP = (
    update(NOTIFICATIONS)
    .where(NOTIFICATIONS.c.id == func.any(bindparam("ids", type_=ARRAY(Uuid()))))
    .values(state="dropped", due_at=None, claim_token=None, finished_at=func.now())
)

Notice = dict[str, Any]


def is_heard(row: Any, event: Event, after: JobState) -> bool:
    """Tell whether somebody wants to hear of the event."""
    return name_heard(row, event, after) is not None


def name_heard(row: Any, event: Event, after: JobState) -> str | None:
    """Name what the event is to the outside, if somebody wants to hear of it.

    `row` is one of `SELECT_STATE`.
    """
    name = notices.name_of(type(event).__name__, after.status.value)
    if name not in notices.ANNOUNCED:
        return None
    if row.is_heard or (row.webhook_url and name in notices.ENDS):
        return name
    return None


def notice_of(row: Any, after: JobState, name: str, *, cost_usd: Any) -> Notice:
    """Say what is told of a job after a change; `row` is one of `SELECT_STATE`."""
    failure = after.failure
    error = failure and {
        "code": failure.code,
        "message": failure.message[:LONGEST_TEXT],
        "retryable": failure.retryable,
    }
    data = _data(
        row.id,
        row.owner,
        row.model,
        num_outputs=row.num_outputs,
        is_public=row.is_public,
        metadata=row.metadata,
        retry_of=row.retry_of,
        created_at=row.created_at,
    )
    data |= {
        "version": after.version,
        "status": after.status.value,
        "stage": after.stage.value if after.stage else None,
        "attempts": after.attempts,
        "error": error,
        "cost_usd": None if cost_usd is None else plain(cost_usd),
        "started_at": _written(after.started_at),
        "completed_at": _written(after.completed_at),
    }
    url = row.webhook_url if name in notices.ENDS else None
    return {
        "owner": row.owner,
        "url": url,
        "receiver": None if url is None else receiver_of(row.owner, url),
        "type": name,
        "job_id": row.id,
        "job_version": after.version,
        "data": data,
        "created_at": row.now,
    }


def birth_notice(job: Any, born: datetime) -> Notice:
    """Say what is told of a job just accepted, a `submission.NewJob`."""
    data = _data(
        job.id,
        job.owner,
        job.request.model,
        num_outputs=job.num_outputs,
        is_public=job.is_public,
        metadata=job.metadata,
        retry_of=job.retry_of,
        created_at=born,
    )
    return {
        "owner": job.owner,
        "url": None,
        "receiver": None,
        "type": notices.CREATED,
        "job_id": job.id,
        "job_version": 1,
        "data": data,
        "created_at": born,
    }


async def drop(conn: AsyncConnection, receivers: Sequence[str]) -> None:
    """Drop what is pending for receivers that are sent nothing any more, `DROPPED_AT_ONCE`.

    Of more than that the rest is dropped by those who claim it.  Does not commit.
    """
    asked = {"names": list(receivers), "limit": DROPPED_AT_ONCE}
    # In two statements: how many there are nobody can guess, and a wrong guess reads the table.
    ids = list((await conn.execute(_PENDING, asked)).scalars())
    if ids:
        await conn.execute(_DROP, {"ids": ids})


def outputs_told(outputs: Sequence[StoredOutput]) -> list[dict[str, JSON]]:
    """Say of files what does not change; their addresses are made when it is told."""
    return [
        {
            "index": output.index,
            "key": output.key,
            "content_type": output.content_type,
            "size_bytes": output.size_bytes,
            "width": output.width,
            "height": output.height,
            "sha256": output.sha256,
        }
        for output in outputs
    ]


def receiver_of(owner: str, url: str) -> str:
    """Name whoever hears of an owner's jobs by their own URLs: one for each host."""
    return f"{owner} {urlsplit(url).netloc.lower()}"


def name_of_endpoint(owner: str, endpoint_id: UUID) -> str:
    """Name an endpoint as a receiver."""
    return f"{owner} {endpoint_id}"


def _data(
    job_id: UUID,
    owner: str,
    model: str,
    *,
    num_outputs: int,
    is_public: bool,
    metadata: JSON,
    retry_of: UUID | None,
    created_at: datetime,
) -> dict[str, Any]:
    """Give everything that is told of any job, as if it had just been accepted."""
    return {
        "job_id": str(job_id),
        "owner": owner,
        "visibility": "public" if is_public else "private",
        "version": 1,
        "status": "pending",
        "stage": "queued",
        "model": model,
        "num_outputs": num_outputs,
        "attempts": 0,
        "error": None,
        "cost_usd": None,
        "created_at": _written(created_at),
        "started_at": None,
        "completed_at": None,
        "retry_of": None if retry_of is None else str(retry_of),
        "metadata": metadata,
        "outputs": [],
    }


def _written(moment: datetime | None) -> str | None:
    """Write a moment as the API does."""
    return None if moment is None else moment.isoformat().replace("+00:00", "Z")
