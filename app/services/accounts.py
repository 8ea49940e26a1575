"""The money of jobs: accounts, locked while a job is accepted, and the ledger's entries.

Everything is written in the transaction of the job's own change, so that accounts and entries
say the same as the jobs whatever dies.  Accounts are locked in the order of their names, after
any jobs: nobody waits in a circle.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Date,
    Integer,
    Row,
    Text,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import unnest
from app.domain.admission import SERVICE, Account
from app.models import account as tables
from app.services.job_records import table_of

ACCOUNTS = table_of(tables.Account)
ENTRIES = table_of(tables.LedgerEntry)

RESERVE, RELEASE, CHARGE = "reserve", "release", "charge"
_NOTHING = Decimal(0)


def account_of(key_id: UUID) -> str:
    """Name the account of a key."""
    return f"key:{key_id}"


def day_of(moment: datetime) -> date:
    """Give the UTC day of a moment."""
    return moment.astimezone(UTC).date()


# ------------------------------------------------------------------------ locked accounts

_names = bindparam("names", type_=ARRAY(Text(), dimensions=1))
_READ = (
    select(ACCOUNTS, func.now().label("now"))
    .where(ACCOUNTS.c.name == func.any(_names))
    .order_by(ACCOUNTS.c.name)
)
# All or none: one that is missing must not be opened with later ones locked already.
_are_open = (
    select(func.count()).where(ACCOUNTS.c.name == func.any(_names)).scalar_subquery()
)
_LOCK = _READ.where(_are_open == func.cardinality(_names)).with_for_update()
_CLOCK = select(func.now())
_wanted = func.unnest(_names).column_valued("wanted")
_today = cast(func.timezone("UTC", func.now()), Date)
_open = upsert(ACCOUNTS).from_select(
    ["name", "day", "month"],
    select(_wanted, _today, cast(func.date_trunc("month", _today), Date)).order_by(
        _wanted
    ),
    include_defaults=False,
)
# Changes nothing about those that are open, and so locks all of them in order.
_OPEN = _open.on_conflict_do_update(
    index_elements=[ACCOUNTS.c.name], set_={"live": ACCOUNTS.c.live}
)


async def lock(
    conn: AsyncConnection, names: Collection[str]
) -> tuple[dict[str, Account], datetime]:
    """Lock the accounts until the transaction ends; give them as they stand, and the clock.

    One that does not exist is opened, so that the first jobs of a key wait for each other too.
    """
    values = {"names": sorted(names)}
    rows = (await conn.execute(_LOCK, values)).all()
    if not rows:
        await conn.execute(_OPEN, values)
        rows = (await conn.execute(_LOCK, values)).all()
    now: datetime = rows[0].now
    return {row.name: _account(row, now) for row in rows}, now


async def glance(
    conn: AsyncConnection, names: Collection[str]
) -> tuple[dict[str, Account], datetime]:
    """Give the accounts as they stand, without locking or opening any, and the clock."""
    now: datetime = (await conn.execute(_CLOCK)).scalar_one()
    found = {name: Account(day_of(now)) for name in names}
    for row in await conn.execute(_READ, {"names": sorted(names)}):
        found[row.name] = _account(row, now)
    return found, now


def _account(row: Row[Any], now: datetime) -> Account:
    return Account(
        day=row.day,
        live=row.live,
        day_jobs=row.day_jobs,
        day_usd=row.day_usd,
        month_usd=row.month_usd,
    ).on(day_of(now))


# -------------------------------------------------------------------------------- entries

ENTRY_COLUMNS = (
    *("day", "owner", "key_id", "job_id", "model", "kind", "amount_usd"),
    *("status", "outputs", "at"),
)
_entries = unnest(ENTRIES, ENTRY_COLUMNS, alias="entry")
INSERT_ENTRIES = insert(ENTRIES).from_select(
    list(ENTRY_COLUMNS), select(_entries), include_defaults=False
)


# ------------------------------------------------------------------- accepted and finished

ACCEPTED_COLUMNS = ("name", "live", "day", "day_usd")
_accepted = unnest(ACCOUNTS, ACCEPTED_COLUMNS, alias="accepted")
_month = cast(func.date_trunc("month", _accepted.c.day), Date)
_new = upsert(ACCOUNTS).from_select(
    [
        *("name", "live", "day", "day_jobs", "day_usd"),
        *("month", "month_usd", "reserved_usd"),
    ],
    select(
        *(_accepted.c.name, _accepted.c.live, _accepted.c.day),
        *(_accepted.c.live, _accepted.c.day_usd),
        *(_month, _accepted.c.day_usd, _accepted.c.day_usd),
    ).order_by(_accepted.c.name),
    include_defaults=False,
)


def _rolled(period: Any, figure: str) -> Any:
    """Add to a figure of the same day or month, begin a newer one anew, leave an older one out."""
    old, new = ACCOUNTS.c[figure], _new.excluded[figure]
    return case(
        (ACCOUNTS.c[period] == _new.excluded[period], old + new),
        (ACCOUNTS.c[period] < _new.excluded[period], new),
        else_=old,
    )


BOOK_ACCEPTED = _new.on_conflict_do_update(
    index_elements=[ACCOUNTS.c.name],
    set_={
        "live": ACCOUNTS.c.live + _new.excluded.live,
        "day_jobs": _rolled("day", "day_jobs"),
        "day_usd": _rolled("day", "day_usd"),
        "month_usd": _rolled("month", "month_usd"),
        "reserved_usd": ACCOUNTS.c.reserved_usd + _new.excluded.reserved_usd,
        "day": func.greatest(ACCOUNTS.c.day, _new.excluded.day),
        "month": func.greatest(ACCOUNTS.c.month, _new.excluded.month),
    },
)

FINISHED_COLUMNS = ("name", "day", "live", "reserved_usd", "spent_usd")
_finished = unnest(ACCOUNTS, FINISHED_COLUMNS, alias="finished")
_held = (
    select(ACCOUNTS.c.name, ACCOUNTS.c.day, ACCOUNTS.c.month)
    .where(
        ACCOUNTS.c.name
        == func.any(bindparam("finished_name", type_=ARRAY(Text(), dimensions=1)))
    )
    .order_by(ACCOUNTS.c.name)
    .with_for_update()
    .cte("held")
)
_change = _finished.c.spent_usd - _finished.c.reserved_usd
_sums = (
    select(
        _held.c.name,
        func.sum(_finished.c.live).label("live"),
        func.sum(_finished.c.reserved_usd).label("reserved"),
        func.sum(_finished.c.spent_usd).label("spent"),
        func.coalesce(
            func.sum(_change).filter(_finished.c.day == _held.c.day), literal(0)
        ).label("day_change"),
        func.coalesce(
            func.sum(_change).filter(
                func.date_trunc("month", _finished.c.day) == _held.c.month
            ),
            literal(0),
        ).label("month_change"),
    )
    .select_from(_held)
    .join(_finished, _finished.c.name == _held.c.name)
    .group_by(_held.c.name)
    .cte("sums")
)
BOOK_FINISHED = (
    update(ACCOUNTS)
    .where(ACCOUNTS.c.name == _sums.c.name)
    .values(
        live=ACCOUNTS.c.live - cast(_sums.c.live, Integer),
        reserved_usd=ACCOUNTS.c.reserved_usd - _sums.c.reserved,
        spent_usd=ACCOUNTS.c.spent_usd + _sums.c.spent,
        day_usd=ACCOUNTS.c.day_usd + _sums.c.day_change,
        month_usd=ACCOUNTS.c.month_usd + _sums.c.month_change,
    )
)


@dataclass(frozen=True, slots=True)
class Movement:
    """What a job's acceptance or end means to the accounts it belongs to."""

    job_id: UUID
    owner: str
    key_id: UUID | None
    model: str
    day: date  # the UTC day of its acceptance

    def entry(
        self,
        kind: str,
        amount_usd: Decimal | None,
        at: datetime,
        *,
        status: str | None = None,
        outputs: int = 0,
    ) -> dict[str, Any]:
        """Give a row of the ledger."""
        return {
            "day": self.day,
            "owner": self.owner,
            "key_id": self.key_id,
            "job_id": self.job_id,
            "model": self.model,
            "kind": kind,
            "amount_usd": amount_usd,
            "status": status,
            "outputs": outputs,
            "at": at,
        }


def booked_accepted(
    jobs: Sequence[tuple[Movement, Decimal | None]],
) -> list[Mapping[str, Any]]:
    """Give the rows of `BOOK_ACCEPTED`: what accounts gain by these jobs and their worst cost."""
    sums: dict[str, dict[str, Any]] = {}
    for job, reserved in jobs:
        for name in accounts_of(job.key_id, is_priced=reserved is not None):
            row = sums.setdefault(
                name, {"name": name, "live": 0, "day": job.day, "day_usd": _NOTHING}
            )
            row["live"] += 1
            row["day_usd"] += reserved or _NOTHING
    return [sums[name] for name in sorted(sums)]


def accounts_of(key_id: UUID | None, *, is_priced: bool) -> list[str]:
    """Name the accounts a job counts in: its key's, and the service's when money is known."""
    names = [] if key_id is None else [account_of(key_id)]
    return [*names, SERVICE] if is_priced else names


def booked_finished(
    job: Movement, reserved: Decimal | None, spent: Decimal | None
) -> list[Mapping[str, Any]]:
    """Give the rows of `BOOK_FINISHED` for one job: what it held is let go, its cost booked."""
    is_priced = reserved is not None or spent is not None
    return [
        {
            "name": name,
            "day": job.day,
            "live": 0 if name == SERVICE and reserved is None else 1,
            "reserved_usd": reserved or _NOTHING,
            "spent_usd": spent or _NOTHING,
        }
        for name in accounts_of(job.key_id, is_priced=is_priced)
    ]
