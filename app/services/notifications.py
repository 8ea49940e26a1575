"""Verbs on notifications: claim, settle, send again, read, forget.  Nothing here commits.

The claim protocol is that of jobs: whoever finds a row due pushes `due_at` one lease ahead and
writes a token, and a settle is refused when the token no longer stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    DateTime,
    Double,
    Integer,
    Interval,
    SmallInteger,
    Text,
    Uuid,
    bindparam,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.notices import TEST
from app.domain.redelivery import SCHEDULE
from app.services.outbox import drop

KEPT: Final = timedelta(days=30)
MOST_RECEIVERS: Final = 1000  # looked at in one round


@dataclass(frozen=True, slots=True)
class Receiver:
    """Who has something due; `name` is what the rows call them."""

    name: str
    owner: str


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The right to send one notification, good until the lease ends.

    `tries` counts from when it was last asked for, this one included; `number` from the start.
    `secrets` are the endpoint's that count now, none for a job's own URL.
    """

    id: UUID
    token: UUID
    owner: str
    receiver: str
    endpoint_id: UUID | None
    url: str
    secrets: tuple[str, ...]
    type: str
    data: Mapping[str, Any]
    created_at: datetime
    number: int
    tries: int
    is_failing: bool

    @property
    def webhook_id(self) -> str:
        """Give the id its receiver knows it by, the same with every try."""
        return webhook_id_of(self.id)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a try came to.  `pause` is how long until the next, for `pending` alone."""

    dispatch: Dispatch
    state: str  # pending, delivered, failed, dropped
    pause: timedelta | None
    at: datetime
    seconds: float
    status_code: int | None
    error: str | None


def webhook_id_of(notification_id: UUID) -> str:
    """Write a notification's id as `webhook-id`."""
    return f"msg_{notification_id.hex}"


# ------------------------------------------------------------------------------- claim

# A few index entries for each receiver that has anything waiting, however much that is: the
# recursion steps from one to the next.  Every owner's first before any owner's second: who has
# more receivers than are looked at must not hide the others.
_WAITING = text("""
WITH RECURSIVE waiting AS (
    (
        SELECT receiver, owner, due_at FROM notifications
        WHERE due_at IS NOT NULL ORDER BY receiver, due_at LIMIT 1
    )
    UNION ALL
    SELECT later.receiver, later.owner, later.due_at FROM waiting
    CROSS JOIN LATERAL (
        SELECT n.receiver, n.owner, n.due_at FROM notifications n
        WHERE n.due_at IS NOT NULL AND n.receiver > waiting.receiver
        ORDER BY n.receiver, n.due_at LIMIT 1
    ) AS later
)
SELECT receiver, owner FROM (
    SELECT receiver, owner, due_at,
        row_number() OVER (PARTITION BY owner ORDER BY due_at) AS place
    FROM waiting WHERE due_at <= now()
) AS due
ORDER BY place, due_at LIMIT :limit
""")

_LOCK_DUE = text("""
SELECT due.id FROM unnest(:receivers, :shares) AS asked(receiver, share)
CROSS JOIN LATERAL (
    SELECT n.id FROM notifications n
    WHERE n.receiver = asked.receiver AND n.due_at <= now()
    ORDER BY n.due_at LIMIT asked.share FOR UPDATE SKIP LOCKED
) AS due
""").bindparams(
    bindparam("receivers", type_=ARRAY(Text())),
    bindparam("shares", type_=ARRAY(Integer())),
)
# By ids that are told, and not in one statement with the above: how many it will find nobody
# can guess, and a wrong guess reads the whole table.
#
# What belongs to an endpoint that is gone or switched off goes nowhere.  A test does: it is
# asked for, perhaps to see whether the endpoint may be switched on again.  What was taken so often
# and never settled ends its workers: it is given up.
_CLAIM = text("""
WITH found AS (
    SELECT
        n.id, e.url, e.secret, e.failing_since,
        CASE WHEN e.previous_until > now() THEN e.previous_secret END AS previous,
        n.endpoint_id IS NULL OR coalesce(e.is_enabled, false)
            OR (e.id IS NOT NULL AND n.type = :test) AS is_wanted,
        n.attempts - n.tried_before < :most AS may_try
    FROM notifications n LEFT JOIN endpoints e ON e.id = n.endpoint_id
    WHERE n.id = ANY(:ids)
),
sorted AS (SELECT *, is_wanted AND may_try AS goes FROM found)
UPDATE notifications n SET
    attempts = n.attempts + CASE WHEN sorted.goes THEN 1 ELSE 0 END,
    claim_token = CASE WHEN sorted.goes THEN gen_random_uuid() END,
    due_at = CASE WHEN sorted.goes THEN now() + :lease END,
    finished_at = CASE WHEN NOT sorted.goes THEN now() END,
    state = CASE
        WHEN sorted.goes THEN 'pending' WHEN sorted.is_wanted THEN 'failed' ELSE 'dropped'
    END
FROM sorted WHERE n.id = sorted.id AND n.id = ANY(:ids)
RETURNING
    n.id, n.claim_token, n.state, n.owner, n.receiver, n.endpoint_id, n.type, n.data, n.created_at,
    n.attempts, n.attempts - n.tried_before AS tries, coalesce(sorted.url, n.url) AS url,
    sorted.secret, sorted.previous, sorted.failing_since IS NOT NULL AS is_failing
""").bindparams(
    bindparam("ids", type_=ARRAY(Uuid())),
    bindparam("lease", type_=Interval()),
    bindparam("test", TEST),
)


async def waiting(conn: AsyncConnection) -> list[Receiver]:
    """Tell who has something due: one of each owner in turn, whoever waited longest first."""
    rows = await conn.execute(_WAITING, {"limit": MOST_RECEIVERS})
    return [Receiver(row.receiver, row.owner) for row in rows]


def share_out(
    places: int,
    waiting: Sequence[Receiver],
    under_way: Sequence[Receiver],
    *,
    each: int,
    owner: int,
) -> dict[str, int]:
    """Say how many may be sent to each: one round after the other, as long as there is room.

    No receiver gets more than `each` at once and no owner's receivers more than `owner`
    together, counting those `under_way`: who is slow keeps only places of their own.
    """
    by_receiver = Counter(one.name for one in under_way)
    by_owner = Counter(one.owner for one in under_way)
    shares: Counter[str] = Counter()
    for _ in range(each):
        for one in waiting:
            if places <= 0:
                return dict(shares)
            if by_receiver[one.name] < each and by_owner[one.owner] < owner:
                by_receiver[one.name] += 1
                by_owner[one.owner] += 1
                shares[one.name] += 1
                places -= 1
    return dict(shares)


async def claim(
    conn: AsyncConnection,
    shares: Mapping[str, int],
    *,
    lease: timedelta,
    most_tries: int = len(SCHEDULE),
) -> list[Dispatch]:
    """Take what is due, up to so many for each receiver, the oldest first.

    What was taken `most_tries` times since it was asked for ends as `failed`, and what has no
    receiver any more as `dropped`, together with more of the same.
    """
    asked = {"receivers": list(shares), "shares": list(shares.values())}
    ids = list((await conn.execute(_LOCK_DUE, asked)).scalars())
    if not ids:
        return []
    taken = {"ids": ids, "lease": lease, "most": most_tries}
    rows = (await conn.execute(_CLAIM, taken)).all()
    if closed := {row.receiver for row in rows if row.state == "dropped"}:
        await drop(conn, sorted(closed))
    return [_dispatch(row) for row in rows if row.claim_token is not None]


def _dispatch(row: Any) -> Dispatch:
    secrets = (row.secret, row.previous)
    return Dispatch(
        id=row.id,
        token=row.claim_token,
        owner=row.owner,
        receiver=row.receiver,
        endpoint_id=row.endpoint_id,
        url=row.url,
        secrets=tuple(secret for secret in secrets if secret is not None),
        type=row.type,
        data=row.data,
        created_at=row.created_at,
        number=row.attempts,
        tries=row.tries,
        is_failing=row.is_failing,
    )


# ------------------------------------------------------------------------------ settle

# A try is written down also when the claim was lost: it was made.
_SETTLE = text("""
WITH tries AS (
    SELECT * FROM unnest(
        :ids, :tokens, :states, :pauses, :numbers, :ats, :seconds, :codes, :errors
    ) AS one(id, token, state, pause, number, at, seconds, code, error)
),
written AS (
    INSERT INTO deliveries (notification_id, number, at, seconds, status_code, error)
    SELECT tries.id, tries.number, tries.at, tries.seconds, tries.code, tries.error
    FROM tries JOIN notifications n ON n.id = tries.id
    ON CONFLICT DO NOTHING
)
UPDATE notifications n SET
    state = tries.state,
    claim_token = NULL,
    due_at = CASE WHEN tries.state = 'pending' THEN now() + tries.pause END,
    finished_at = CASE WHEN tries.state <> 'pending' THEN now() END
FROM tries WHERE n.id = tries.id AND n.claim_token = tries.token
RETURNING n.id
""").bindparams(
    bindparam("ids", type_=ARRAY(Uuid())),
    bindparam("tokens", type_=ARRAY(Uuid())),
    bindparam("states", type_=ARRAY(Text())),
    bindparam("pauses", type_=ARRAY(Interval())),
    bindparam("numbers", type_=ARRAY(Integer())),
    bindparam("ats", type_=ARRAY(DateTime(timezone=True))),
    bindparam("seconds", type_=ARRAY(Double())),
    bindparam("codes", type_=ARRAY(SmallInteger())),
    bindparam("errors", type_=ARRAY(Text())),
)


async def settle(conn: AsyncConnection, verdicts: Sequence[Verdict]) -> set[UUID]:
    """Write down what the tries came to; give the notifications whose claim still stood."""
    values = {
        "ids": [one.dispatch.id for one in verdicts],
        "tokens": [one.dispatch.token for one in verdicts],
        "states": [one.state for one in verdicts],
        "pauses": [one.pause for one in verdicts],
        "numbers": [one.dispatch.number for one in verdicts],
        "ats": [one.at for one in verdicts],
        "seconds": [one.seconds for one in verdicts],
        "codes": [one.status_code for one in verdicts],
        "errors": [one.error for one in verdicts],
    }
    return set((await conn.execute(_SETTLE, values)).scalars())


# ------------------------------------------------------------------------------ forget

_FORGET = text("""
DELETE FROM notifications
WHERE finished_at < now() - :kept AND id IN (
    SELECT id FROM notifications WHERE finished_at < now() - :kept
    ORDER BY finished_at LIMIT :limit
)
""").bindparams(bindparam("kept", type_=Interval()))
_FIGURES = text(
    "SELECT count(*) AS depth, now() - min(due_at) AS overdue"
    " FROM notifications WHERE due_at IS NOT NULL"
)


async def forget(conn: AsyncConnection, *, limit: int) -> int:
    """Remove what ended long ago, the oldest first, with its tries; say how many."""
    return (await conn.execute(_FORGET, {"kept": KEPT, "limit": limit})).rowcount


async def figures(conn: AsyncConnection) -> tuple[int, timedelta]:
    """Count what is to be sent, and tell how long the oldest of it has been due."""
    row = (await conn.execute(_FIGURES)).one()
    return row.depth, max(row.overdue or timedelta(0), timedelta(0))
