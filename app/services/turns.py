"""Who starts next when not all can: start-time fair queueing between owners.

Time here is virtual: it counts starts, and each of an owner's takes `1 / weight` of it.
`owners.turn` is the moment an owner's latest start in turn began, and "now" is the latest of
all owners' turns.  An owner's next start begins when the one before ended, or now, if that is
past; whose start begins first, starts.  So owners that always have something waiting share
by weight, one that comes back finds its turn now at once, and has saved nothing up meanwhile.

Starts while there is enough for all (see `starts.Starts`) take no turn.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import ARRAY, Uuid, bindparam, select, text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import arrays, unnest
from app.domain.policy import Policy
from app.domain.state import JobState
from app.models import account as tables
from app.services import job_service
from app.services.job_records import Claim, table_of

OWNERS = table_of(tables.Owner)

# Jobs that are due and cannot be started: in other hands for a moment, in words of a newer
# version.  Those behind them get their place, so many times in one transaction.
ROUNDS = 3
MOST_IN_TURN = 100  # others wait for the floor meanwhile

# One at a time, or two would give out the same turns.
_TAKE_THE_FLOOR = text(
    "SELECT pg_advisory_xact_lock(1835466755)"  # 0x6D67_0003, next to the watcher's
)

# Reads a few index entries for each owner with pending jobs, however many they have: the
# recursion steps from owner to owner.  An owner's k-th job begins (k - 1) / weight after its
# first.  When the first jobs of `limit` owners are known, none that begins after the last of
# these can be among the chosen: the horizon keeps a thousand owners from being read in depth.
# Of starts that begin together, that of the owner who waited longest since its last is first: so
# a newcomer, for whom now is the beginning, is behind nobody who has just had a turn.
_NEXT = text("""
WITH RECURSIVE waiting AS (
    (
        SELECT owner, due_at FROM jobs
        WHERE status = 'pending' AND id <> ALL(:passed) AND deadline_at > now()
        ORDER BY owner, priority DESC, due_at LIMIT 1
    )
    UNION ALL
    SELECT later.owner, later.due_at FROM waiting
    CROSS JOIN LATERAL (
        SELECT jobs.owner, jobs.due_at FROM jobs
        WHERE jobs.status = 'pending' AND jobs.id <> ALL(:passed)
            AND jobs.owner > waiting.owner AND jobs.deadline_at > now()
        ORDER BY jobs.owner, jobs.priority DESC, jobs.due_at LIMIT 1
    ) AS later
),
clock AS (SELECT coalesce(max(turn), 0) AS now FROM owners),
heads AS (
    SELECT
        waiting.owner,
        1 / coalesce(owners.weight, 1)::float8 AS step,
        greatest(clock.now, owners.turn + 1 / owners.weight::float8) AS begins,
        coalesce(owners.turn, -1) AS last,
        coalesce(head.due_at, waiting.due_at) AS due_at
    FROM waiting
    CROSS JOIN clock
    LEFT JOIN owners ON owners.name = waiting.owner
    -- The first one found may have to be tried again later; then look behind it.
    LEFT JOIN LATERAL (
        SELECT jobs.due_at FROM jobs
        WHERE waiting.due_at > now() AND jobs.status = 'pending'
            AND jobs.owner = waiting.owner AND jobs.due_at <= now()
            AND jobs.id <> ALL(:passed) AND jobs.deadline_at > now()
        ORDER BY jobs.priority DESC, jobs.due_at LIMIT 1
    ) AS head ON true
    WHERE coalesce(head.due_at, waiting.due_at) <= now()
    ORDER BY begins, last, coalesce(head.due_at, waiting.due_at) LIMIT :limit
),
horizon AS (
    SELECT CASE WHEN count(*) = :limit THEN max(begins) ELSE 'Infinity' END AS ends
    FROM heads
)
SELECT own.id, heads.owner, heads.begins + (own.place - 1) * heads.step AS turn
FROM heads
CROSS JOIN horizon
CROSS JOIN LATERAL (
    SELECT
        jobs.id,
        jobs.due_at,
        row_number() OVER (ORDER BY jobs.priority DESC, jobs.due_at) AS place
    FROM jobs
    WHERE jobs.status = 'pending' AND jobs.owner = heads.owner
        AND jobs.due_at <= now() AND jobs.id <> ALL(:passed)
        AND jobs.deadline_at > now()
    ORDER BY jobs.priority DESC, jobs.due_at
    LIMIT least(:limit, floor((horizon.ends - heads.begins) / heads.step) + 1)::bigint
) AS own
ORDER BY turn, own.place, heads.last, own.due_at, own.id LIMIT :limit
""").bindparams(bindparam("passed", type_=ARRAY(Uuid())))

_taken = unnest(OWNERS, ("name", "turn"), alias="taken")
_insert_turns = upsert(OWNERS).from_select(
    ["name", "turn"], select(_taken), include_defaults=False
)
_TAKE_TURNS = _insert_turns.on_conflict_do_update(
    index_elements=[OWNERS.c.name], set_={"turn": _insert_turns.excluded.turn}
)


@dataclass(frozen=True, slots=True)
class Started:
    """What was started; the jobs that ended instead; whether more are waiting.

    `are_told`: webhooks are to tell of some.
    """

    claims: Sequence[Claim]
    ended: Sequence[JobState]
    has_more: bool
    are_told: bool = False


@dataclass(frozen=True, slots=True)
class _Pick:
    """A job to be started, whose it is, and when its start begins in virtual time."""

    job_id: UUID
    owner: str
    turn: float


async def start(
    conn: AsyncConnection, *, limit: int, lease: timedelta, policy: Policy
) -> Started:
    """Claim up to `limit` pending jobs whose turn it is.

    Between owners by turns, within an owner by priority, then by age.  Only owners whose job
    really started are charged.  Jobs out of time are left to those who end them.  Waits
    for others that do the same.  Does not commit.
    """
    await conn.execute(_TAKE_THE_FLOOR)
    claims: list[Claim] = []
    ended: list[JobState] = []
    passed: list[UUID] = []
    has_more, are_told = True, False
    for _ in range(ROUNDS):
        wanted = limit - len(claims)
        # One more than may start tells whether somebody is left waiting.
        picks = await _pick(conn, limit=wanted + 1, passed=passed)
        has_more = len(picks) > wanted
        if not picks:
            break
        ids = [pick.job_id for pick in picks[:wanted]]
        claimed = await job_service.claim(
            conn, ids, lease=lease, starts=wanted, policy=policy
        )
        started = {claim.job_id for claim in claimed.claims if claim.is_fresh}
        await _take_turns(conn, picks, started)
        claims += claimed.claims
        ended += claimed.ended
        are_told |= claimed.are_told
        passed += ids
        # What ended meanwhile has locked accounts; they are to be had in one order only.
        if len(claims) == limit or not has_more or claimed.ended:
            break
    return Started(claims, ended, has_more, are_told)


async def _pick(
    conn: AsyncConnection, *, limit: int, passed: Collection[UUID]
) -> list[_Pick]:
    rows = await conn.execute(_NEXT, {"limit": limit, "passed": list(passed)})
    return [_Pick(row.id, row.owner, row.turn) for row in rows]


async def _take_turns(
    conn: AsyncConnection, picks: Iterable[_Pick], started: Collection[UUID]
) -> None:
    """Write down how far the owners came: as many of their turns as jobs were started."""
    turns: dict[str, list[float]] = defaultdict(list)
    count: Counter[str] = Counter()
    for pick in picks:
        turns[pick.owner].append(pick.turn)
        count[pick.owner] += pick.job_id in started
    rows = [
        {"name": owner, "turn": turns[owner][number - 1]}
        for owner, number in sorted(count.items())
        if number
    ]
    if rows:
        await conn.execute(_TAKE_TURNS, arrays(rows, ("name", "turn"), alias="taken"))
