"""The first page: the form that makes pictures, above the pictures."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.deps import promptly, runtime_of
from app.api.views import job_body
from app.domain.access import Scope
from app.runtime import Runtime
from app.services import job_queries
from app.services.job_queries import JobFilter
from app.web.door import PageRoute, caller_of, needs
from app.web.render import page

router = APIRouter(route_class=PageRoute)

_SHOWN = 12  # jobs below the form


@router.get("/")
@needs(Scope.READ)
async def home(request: Request) -> Response:
    """Show the form, and what was made lately."""
    runtime = runtime_of(request)
    jobs = await promptly(_latest(runtime, caller_of(request).realm))
    return page(request, "home.html", jobs=jobs)


async def _latest(runtime: Runtime, realm: str | None) -> list[dict[str, Any]]:
    async with runtime.ledger.reading() as conn:
        wanted = JobFilter(owner=realm)
        found = await job_queries.page(conn, wanted, before=None, limit=_SHOWN)
    addresses, obstacle = runtime.links.now(), await runtime.obstacle()
    return [job_body(record, addresses, obstacle) for record in found]
