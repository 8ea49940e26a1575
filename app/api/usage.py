"""What was made and what it cost, for whoever pays."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from app.api.deps import promptly, runtime_of
from app.api.guard import GuardedRoute, caller_of, needs
from app.api.problems import BadParameter
from app.api.views import respond
from app.domain.access import Caller, Scope
from app.domain.admission import plain
from app.domain.errors import Forbidden
from app.models import money_schemas
from app.runtime import Runtime, budget_of
from app.services import usage as ledger_sums
from app.services.usage import Grouping, Period, Span, Standing, Sums, UsageRow

router = APIRouter(route_class=GuardedRoute)

USUAL_DAYS = 30
MOST_DAYS = 366
MOST_ROWS = 10_000

_PROBLEM = {
    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
}


@router.get(
    "/usage",
    response_model=money_schemas.Usage,
    responses={400: {"description": "A parameter is wrong.", "content": _PROBLEM}},
    tags=["money"],
    summary="What was made and what it cost",
)
@needs(Scope.READ)
async def usage(
    request: Request,
    by: Annotated[
        str,
        Query(
            max_length=100,
            description="What to group by: one or more of `day`, `model`, `key` and, for"
            " administrators, `owner`, with commas between them.",
        ),
    ] = "day",
    first: Annotated[
        date | None,
        Query(alias="from", description="First UTC day; 30 days in all if left out."),
    ] = None,
    last: Annotated[
        date | None, Query(alias="to", description="Last UTC day; today if left out.")
    ] = None,
    owner: Annotated[
        str | None,
        Query(max_length=200, description="Whose jobs; for administrators."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 1000,
) -> Response:
    """Add up finished jobs by the day they were accepted, and say what budgets have left.

    Deleted jobs count like others: the ledger keeps them.
    """
    runtime, caller = runtime_of(request), caller_of(request)
    groups = _groups(by)
    if not caller.is_admin and Grouping.OWNER in groups:
        raise Forbidden("Only administrators may group by owner.", field="by")
    now = datetime.now(UTC)
    span = Span(*_days(first, last, now.date()), _realm(caller, owner))
    found = await promptly(_read(runtime, caller, span, groups, limit, now))
    return respond(found)


def _groups(text: str) -> list[Grouping]:
    words = [word.strip() for word in text.split(",")]
    try:
        groups = [Grouping(word) for word in words]
    except ValueError:
        groups = []
    if not groups or len(set(groups)) < len(groups):
        known = ", ".join(Grouping)
        raise BadParameter(
            f"by must be different ones of {known}, with commas between them.",
            field="by",
        )
    return groups


def _days(first: date | None, last: date | None, today: date) -> tuple[date, date]:
    """Fill in what was left out; raise `BadParameter` for days that make no span."""
    last = today if last is None else last
    if first is None:
        first = last - min(timedelta(days=USUAL_DAYS - 1), last - date.min)
    if first > last:
        raise BadParameter("from must not be after to.", field="from")
    if (last - first).days >= MOST_DAYS:
        raise BadParameter(f"At most {MOST_DAYS} days at a time.", field="from")
    return first, last


def _realm(caller: Caller, owner: str | None) -> str | None:
    """Give the owner whose jobs are meant; None for everybody's."""
    if owner is None:
        return caller.realm
    if not caller.sees(owner):
        raise Forbidden("Only administrators see other owners.", field="owner")
    # PostgreSQL cannot hold this character, and so has no such owner either.
    return owner.replace("\x00", "\ufffd")


async def _read(
    runtime: Runtime,
    caller: Caller,
    span: Span,
    by: list[Grouping],
    limit: int,
    now: datetime,
) -> dict[str, Any]:
    async with runtime.ledger.reading() as conn:
        found = await ledger_sums.usage(conn, span, by, limit=limit)
        key = service = None
        if caller.key_id is not None:
            key = await ledger_sums.standing(
                conn, caller.key_id, caller.budget, now=now
            )
        if caller.is_admin:
            budget = budget_of(runtime.settings)
            service = await ledger_sums.standing(conn, None, budget, now=now)
    return {
        "from": span.first,
        "to": span.last,
        "by": by,
        "rows": [_row(row, by) for row in found.rows],
        "has_more": found.is_cut,
        "totals": _sums(found.totals),
        "budget": {"key": _standing(key), "service": _standing(service)},
    }


# -------------------------------------------------------------------------------- bodies


def _row(row: UsageRow, by: list[Grouping]) -> dict[str, Any]:
    values = {
        Grouping.DAY: ("day", row.day),
        Grouping.MODEL: ("model", row.model),
        Grouping.KEY: ("key_id", row.key_id and str(row.key_id)),
        Grouping.OWNER: ("owner", row.owner),
    }
    return dict(values[one] for one in by) | _sums(row.sums)


def _sums(sums: Sums) -> dict[str, Any]:
    return {
        "jobs": sums.jobs,
        "completed": sums.completed,
        "failed": sums.failed,
        "cancelled": sums.cancelled,
        "outputs": sums.outputs,
        "cost_usd": _dollars(sums.known_usd),
        "unpriced_jobs": sums.unpriced_jobs,
    }


def _standing(found: Standing | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "job_usd": _dollars(found.job_usd),
        "day": _period(found.day),
        "month": _period(found.month),
    }


def _period(period: Period) -> dict[str, Any]:
    return {
        "limit_usd": _dollars(period.limit_usd),
        "spent_usd": _dollars(period.spent_usd),
        "reserved_usd": _dollars(period.reserved_usd),
        "left_usd": _dollars(period.left_usd),
    }


def _dollars(usd: Decimal | None) -> str | None:
    return None if usd is None else plain(usd)
