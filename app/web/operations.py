"""The page of operators: how it is, how it went, what failed; and the queue's switch."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from app.api import acts, queue
from app.api.deps import runtime_of
from app.api.intake import Accepted
from app.domain.access import Scope
from app.domain.errors import InvalidRequest
from app.models.queue_schemas import REASON_LIMIT
from app.services.figures import Hour, Spread
from app.services.operations import MOST_AGAIN, Now, Trends
from app.services.usage import Day
from app.web.charts import Chart, Series, bar_chart, line_chart
from app.web.door import PageRoute, form_of, needs, text_of
from app.web.render import (
    count,
    fragment,
    is_htmx,
    money,
    page,
    see_other,
    span,
)

router = APIRouter(route_class=PageRoute)

PATH: Final = "/operations"
_PHASES: Final = (
    ("queue", "Waiting in the queue", "From acceptance to the first purchase"),
    ("generate", "Making the picture", "From the purchase to the provider's picture"),
    ("store", "Storing it", "Fetching, checking and keeping the files"),
)


@router.get(PATH)
@needs(Scope.ADMIN)
async def operations(
    request: Request,
    again: Annotated[str, Query(max_length=9)] = "",
    tried: Annotated[str, Query(max_length=9)] = "",
) -> Response:
    """Show everything; `again` of the `tried` jobs have just been accepted once more."""
    context = await _now(request) | await _failures(request) | await _trends(request)
    notice = None
    if again.isdecimal() and tried.isdecimal():
        notice = _told(int(again), int(tried))
    return page(request, "operations.html", notice=notice, **context)


# ------------------------------------------------------------- pieces that are asked for anew


@router.get("/ui/operations/now")
@needs(Scope.ADMIN)
async def show_now(request: Request) -> Response:
    """Give how it is."""
    return fragment(request, "operations_now.html", **await _now(request))


@router.get("/ui/operations/failures")
@needs(Scope.ADMIN)
async def show_failures(request: Request) -> Response:
    """Give what failed."""
    return fragment(request, "operations_failures.html", **await _failures(request))


@router.get("/ui/operations/trends")
@needs(Scope.ADMIN)
async def show_trends(request: Request) -> Response:
    """Give how it went."""
    return fragment(request, "operations_trends.html", **await _trends(request))


# --------------------------------------------------------------------- what can be done here


@router.post("/ui/operations/pause")
@needs(Scope.ADMIN)
async def pause(request: Request) -> Response:
    """Pause the queue."""
    reason = " ".join(text_of(form_of(request), "reason").split())
    if not reason:
        raise InvalidRequest("Say why, for whoever finds the queue paused.")
    if not _is_plain(reason):
        raise InvalidRequest("The reason has characters that cannot be shown.")
    if len(reason) > REASON_LIMIT:
        raise InvalidRequest(f"The reason has more than {REASON_LIMIT} characters.")
    await queue.pause(request, reason)
    return await _switched(request)


@router.post("/ui/operations/resume")
@needs(Scope.ADMIN)
async def resume(request: Request) -> Response:
    """Let the queue go on."""
    await queue.resume(request)
    return await _switched(request)


async def _switched(request: Request) -> Response:
    runtime_of(request).operations.forget()
    if not is_htmx(request):
        return see_other(PATH)
    return fragment(request, "operations_now.html", **await _now(request))


@router.post("/ui/operations/retry")
@needs(Scope.ADMIN)
async def retry_group(request: Request) -> Response:
    """Run the oldest jobs of a group again, as many as is allowed in one go."""
    code = text_of(form_of(request), "code")
    if not _is_plain(code):
        raise InvalidRequest("There is no such group.", field="code")
    runtime = runtime_of(request)
    async with runtime.operations.taking(code) as job_ids:
        results = await acts.retry_many(request, job_ids)
    accepted = sum(isinstance(one, Accepted) for one in results.values())
    if not is_htmx(request):
        return see_other(f"{PATH}?again={accepted}&tried={len(job_ids)}#failures")
    refusal = _first_refusal(results)
    response = fragment(
        request,
        "operations_failures.html",
        notice=_told(accepted, len(job_ids)),
        refusal=refusal,
        **await _failures(request),
    )
    return response


def _is_plain(text: str) -> bool:
    return all(" " <= one != "\x7f" for one in text)


def _told(accepted: int, tried: int) -> str:
    said = f"{count(accepted, 'job')} accepted again."
    if accepted < tried:
        said += f" {count(tried - accepted, 'job')} could not be."
    return said


def _first_refusal(results: Any) -> str | None:
    for one in results.values():
        if isinstance(one, Exception):
            return str(one)
    return None


# ----------------------------------------------------------------------------- what is shown


async def _now(request: Request) -> dict[str, Any]:
    now: Now = await runtime_of(request).operations.now()
    return {"now": now, "reason_limit": REASON_LIMIT}


async def _failures(request: Request) -> dict[str, Any]:
    groups = await runtime_of(request).operations.failures()
    return {"groups": groups, "most_again": MOST_AGAIN}


async def _trends(request: Request) -> dict[str, Any]:
    trends: Trends = await runtime_of(request).operations.trends()
    return {
        "trends": trends,
        "phases": [
            _phase(trends.hours, name, title, text) for name, title, text in _PHASES
        ],
        "errors": _errors(trends.hours),
        "spending": _spending(trends.days),
    }


def _phase(hours: Sequence[Hour], name: str, title: str, text: str) -> Chart:
    found: list[Spread | None] = [getattr(hour, name) for hour in hours]
    latest = next((one for one in reversed(found) if one is not None), None)
    summary = "No jobs in the last 24 hours."
    if latest is not None:
        summary = (
            f"Lately half within {span(latest.median)}, 95 % within {span(latest.p95)}."
        )
    return line_chart(
        f"chart-{name}",
        title,
        [_clock(hour.at) for hour in hours],
        [
            Series("95 %", [one.p95 if one else None for one in found], "soft"),
            Series("half", [one.median if one else None for one in found], "accent"),
        ],
        span,
        unit=text,
        summary=summary,
    )


def _errors(hours: Sequence[Hour]) -> Chart:
    failed = sum(hour.failed for hour in hours)
    ended = failed + sum(hour.completed for hour in hours)
    summary = "No jobs in the last 24 hours."
    if ended:
        summary = (
            f"{failed} of {count(ended, 'job')} failed: {_percent(failed / ended)}."
        )
    return bar_chart(
        "chart-errors",
        "Failures",
        [_clock(hour.at) for hour in hours],
        Series("failed", [hour.failed_share for hour in hours], "bad"),
        _percent,
        unit="Share of the jobs that came to an end",
        summary=summary,
        least_top=0.05,
    )


def _spending(days: Sequence[Day]) -> Chart:
    total = sum(day.cost_usd for day in days)
    unpriced = sum(day.unpriced_jobs for day in days)
    summary = f"{money(total)} in {len(days)} days"
    summary += f", {money(days[-1].cost_usd)} of it today." if days else "."
    if unpriced:
        summary += f" Of {count(unpriced, 'job')} the price is unknown."
    return bar_chart(
        "chart-spending",
        "Spent each day",
        [f"{day.day:%-d %b}" for day in days],
        Series("spent", [float(day.cost_usd) for day in days]),
        money,
        unit="Jobs accepted on that day (UTC), as far as prices are known",
        summary=summary,
    )


def _clock(at: datetime) -> str:
    return f"{at:%H:%M}"


def _percent(share: float) -> str:
    percent = share * 100
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"
