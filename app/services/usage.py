"""What was made and what it cost: sums over the ledger, and what budgets have left.

Nothing here changes a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, func, literal_column, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.access import Budget
from app.domain.admission import SERVICE, Account
from app.services.accounts import ACCOUNTS, CHARGE, ENTRIES, account_of
from app.services.job_records import JOBS

_NOTHING = Decimal(0)


class Grouping(StrEnum):
    """By what usage can be told apart, in the order of a row's columns."""

    DAY = "day"
    MODEL = "model"
    KEY = "key"
    OWNER = "owner"


_COLUMNS: dict[Grouping, ColumnElement[Any]] = {
    Grouping.DAY: ENTRIES.c.day,
    Grouping.MODEL: ENTRIES.c.model,
    Grouping.KEY: ENTRIES.c.key_id,
    Grouping.OWNER: ENTRIES.c.owner,
}


@dataclass(frozen=True, slots=True)
class Span:
    """Jobs accepted on these UTC days, both included; `owner` None: everybody's."""

    first: date
    last: date
    owner: str | None


@dataclass(frozen=True, slots=True)
class Sums:
    """What some finished jobs came to.  `cost_usd` adds up what is known of it."""

    jobs: int
    completed: int
    failed: int
    cancelled: int
    outputs: int
    cost_usd: Decimal
    unpriced_jobs: int

    @property
    def known_usd(self) -> Decimal | None:
        """Give the cost; None when it is known of none of the jobs."""
        return None if self.jobs and self.unpriced_jobs == self.jobs else self.cost_usd


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one group; what it was not grouped by is None."""

    sums: Sums
    day: date | None = None
    model: str | None = None
    key_id: UUID | None = None
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Groups in the order of what they are grouped by, the sums of all, and if some are missing."""

    rows: Sequence[UsageRow]
    totals: Sums
    is_cut: bool


async def usage(
    conn: AsyncConnection, span: Span, by: Sequence[Grouping], *, limit: int
) -> Usage:
    """Add up the finished jobs of a span, by group; at most `limit` groups are told."""
    found = (await conn.execute(_query(span, by, limit))).all()
    rows = [_row(row, by) for row in found if not row.is_total]
    # A total over no rows is a row too.
    (totals,) = (_sums(row) for row in found if row.is_total)
    return Usage(rows[:limit], totals, len(rows) > limit)


def _query(span: Span, by: Sequence[Grouping], limit: int) -> Select[Any]:
    columns = [_COLUMNS[one] for one in by]
    entries = ENTRIES.c
    is_total = func.grouping(columns[0]) > 0
    query = (
        select(
            is_total.label("is_total"),
            *columns,
            func.count().label("jobs"),
            *(
                func.count().filter(entries.status == status).label(status)
                for status in ("completed", "failed", "cancelled")
            ),
            func.coalesce(func.sum(entries.outputs), 0).label("outputs_made"),
            func.coalesce(func.sum(entries.amount_usd), 0).label("cost_usd"),
            func.count().filter(entries.amount_usd.is_(None)).label("unpriced"),
        )
        .where(
            # Spelt out, for the index that has only these.
            entries.kind == literal_column(f"'{CHARGE}'"),
            entries.day.between(span.first, span.last),
        )
        # The groups and the total in one walk over the entries.
        .group_by(func.grouping_sets(tuple_(*columns), tuple_()))
        .order_by(is_total.desc(), *columns)
        .limit(limit + 2)
    )
    return query if span.owner is None else query.where(entries.owner == span.owner)


def _sums(row: Row[Any]) -> Sums:
    return Sums(
        jobs=row.jobs,
        completed=row.completed,
        failed=row.failed,
        cancelled=row.cancelled,
        outputs=int(row.outputs_made),
        cost_usd=row.cost_usd,
        unpriced_jobs=row.unpriced,
    )


def _row(row: Row[Any], by: Sequence[Grouping]) -> UsageRow:
    return UsageRow(
        _sums(row),
        day=row.day if Grouping.DAY in by else None,
        model=row.model if Grouping.MODEL in by else None,
        key_id=row.key_id if Grouping.KEY in by else None,
        owner=row.owner if Grouping.OWNER in by else None,
    )


# -------------------------------------------------------------------------- day by day


@dataclass(frozen=True, slots=True)
class Day:
    """What the jobs accepted on a UTC day cost; `unpriced_jobs` of them are not in it."""

    day: date
    jobs: int
    cost_usd: Decimal
    unpriced_jobs: int


async def days(conn: AsyncConnection, first: date, last: date) -> list[Day]:
    """Add up everybody's finished jobs day by day, days without any included.

    A fourth of the work of `usage`: for whoever asks often, and wants no more.
    """
    entries = ENTRIES.c
    query = (
        select(
            entries.day,
            func.count().label("jobs"),
            func.coalesce(func.sum(entries.amount_usd), 0).label("cost_usd"),
            func.count().filter(entries.amount_usd.is_(None)).label("unpriced"),
        )
        .where(
            entries.kind == literal_column(f"'{CHARGE}'"),
            entries.day.between(first, last),
        )
        .group_by(entries.day)
    )
    found = {
        row.day: Day(row.day, row.jobs, row.cost_usd, row.unpriced)
        for row in await conn.execute(query)
    }
    span = ((last - first) // timedelta(days=1)) + 1
    every = (first + timedelta(days=number) for number in range(span))
    return [found.get(day) or Day(day, 0, _NOTHING, 0) for day in every]


# ----------------------------------------------------------------------------- budgets


@dataclass(frozen=True, slots=True)
class Period:
    """How a budget of a day or a month stands.  `limit_usd` None: nothing is forbidden."""

    limit_usd: Decimal | None
    spent_usd: Decimal
    reserved_usd: Decimal

    @property
    def left_usd(self) -> Decimal | None:
        """Give what may still be reserved."""
        if self.limit_usd is None:
            return None
        return max(self.limit_usd - self.spent_usd - self.reserved_usd, _NOTHING)


@dataclass(frozen=True, slots=True)
class Standing:
    """How the budgets of an account stand."""

    job_usd: Decimal | None
    day: Period
    month: Period


async def standing(
    conn: AsyncConnection, key_id: UUID | None, budget: Budget, *, now: datetime
) -> Standing:
    """Say how a key's budgets stand, or with None the service's, on the UTC day of `now`."""
    today = now.astimezone(UTC).date()
    first = datetime(today.year, today.month, 1, tzinfo=UTC)
    midnight = datetime(today.year, today.month, today.day, tzinfo=UTC)
    held = func.coalesce(func.sum(JOBS.c.reserved_usd), 0)
    live = JOBS.c.due_at.is_not(None) & (JOBS.c.created_at >= first)
    if key_id is not None:
        live &= JOBS.c.key_id == key_id
    query = (
        select(
            ACCOUNTS,
            select(held).where(live).scalar_subquery().label("held_month"),
            select(held)
            .where(live & (JOBS.c.created_at >= midnight))
            .scalar_subquery()
            .label("held_day"),
        )
        # One statement, so that the figures are of the same moment.
        .where(ACCOUNTS.c.name == (SERVICE if key_id is None else account_of(key_id)))
    )
    row = (await conn.execute(query)).first()
    if row is None:
        account, held_day, held_month = Account(today), _NOTHING, _NOTHING
    else:
        account = Account(row.day, day_usd=row.day_usd, month_usd=row.month_usd)
        held_day, held_month = row.held_day, row.held_month
    account = account.on(today)
    return Standing(
        budget.job_usd,
        Period(budget.day_usd, account.day_usd - held_day, held_day),
        Period(budget.month_usd, account.month_usd - held_month, held_month),
    )


@dataclass(frozen=True, slots=True)
class Money:
    """What the whole service spent so far, and holds for jobs under way."""

    spent_usd: Decimal
    reserved_usd: Decimal


async def service_money(conn: AsyncConnection) -> Money:
    """Read what the whole service spent and holds; nothing before the first priced job."""
    query = select(ACCOUNTS.c.spent_usd, ACCOUNTS.c.reserved_usd)
    row = (await conn.execute(query.where(ACCOUNTS.c.name == SERVICE))).first()
    return Money(_NOTHING, _NOTHING) if row is None else Money(*row)
