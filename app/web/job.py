"""One job: its pictures, how it came about, and what can be done with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api import acts
from app.api.batches import zipped
from app.api.deps import Id, parse_job_id, promptly, runtime_of
from app.api.guard import admit_again
from app.api.intake import Accepted
from app.api.manifest import manifest_body
from app.api.views import respond
from app.domain.access import Scope
from app.runtime import Runtime
from app.services.job_history import History, history
from app.web.curl import curl_of
from app.web.door import PageRoute, caller_of, form_of, needs, text_of
from app.web.gallery import news_of
from app.web.render import fragment, is_htmx, page, see_other, toast
from app.web.session import local_path
from app.web.shown import jobs_shown
from app.web.words import attempt_words, timeline

router = APIRouter(route_class=PageRoute)

_PHASES: Final = (
    ("queued", "Waiting"),
    ("generating", "Drawing"),
    ("storing", "Saving"),
)
_HARDLY: Final = 0.01  # seconds


# ------------------------------------------------------------------------------ looking


@router.get("/jobs/{job_id}")
@needs(Scope.READ)
async def show(request: Request, job_id: Id) -> Response:
    """Show a job."""
    return page(request, "job.html", **await _context(request, job_id))


@router.get("/ui/jobs/{job_id}/panel")
@needs(Scope.READ)
async def panel(request: Request, job_id: Id) -> Response:
    """Show a job as it is now, in the place of what was shown of it."""
    return fragment(request, "job_panel.html", **await _context(request, job_id))


@router.get("/ui/jobs/{job_id}/manifest")
@needs(Scope.READ)
async def manifest(request: Request, job_id: Id) -> Response:
    """Send how the job's pictures came about, as a file."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    record = await runtime.ledger.read(parse_job_id(job_id), realm=realm)
    name = f"manifest-{record.row.id.hex[-12:]}.json"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return respond(manifest_body(record), headers=headers)


async def _context(request: Request, job_id: str) -> dict[str, Any]:
    runtime, realm = runtime_of(request), caller_of(request).realm
    record = await runtime.ledger.read(parse_job_id(job_id), realm=realm)
    past = await promptly(_history(runtime, record.row.id))
    (job,) = await jobs_shown(runtime, [record])
    return {
        "job": job,
        "steps": timeline(past.events),
        "attempts": [
            {"words": attempt_words(row.state), **row._mapping} for row in past.attempts
        ],
        "phases": phases_of(job["timings"]),
        "parameters": sorted(job["parameters"].items()),
        "takes_seed": "seed" in job["parameters"],
        "curl": curl_of(request, record),
    }


async def _history(runtime: Runtime, job_id: UUID) -> History:
    async with runtime.ledger.reading() as conn:
        return await history(conn, job_id)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the bar of timings: where it begins and how wide it is, in percent."""

    name: str
    words: str
    seconds: float
    start: float
    width: float


def phases_of(timings: Mapping[str, float | None]) -> list[Phase]:
    """Divide the bar of a finished job among its phases; of a live one nothing is known yet."""
    whole = timings["total"]
    if whole is None:
        return []
    known = [
        (name, words, seconds)
        for name, words in _PHASES
        if (seconds := timings[name]) is not None
    ]
    rest = whole - sum(seconds for _, _, seconds in known)
    if rest > _HARDLY:  # it ended in a phase that was not completed
        known.append(("rest", "Until its end", rest))
    total = sum(seconds for _, _, seconds in known) or 1.0
    phases: list[Phase] = []
    start = 0.0
    for name, words, seconds in known:
        width = 100 * seconds / total
        phases.append(Phase(name, words, seconds, round(start, 3), round(width, 3)))
        start += width
    return phases


# -------------------------------------------------------------------------------- doing


@router.post("/ui/jobs/{job_id}/cancel")
@needs(Scope.GENERATE)
async def cancel(request: Request, job_id: Id) -> Response:
    """Ask for the end of the job."""
    key = parse_job_id(job_id)
    await acts.cancel(request, key)
    if not is_htmx(request):
        return see_other(_back(request))
    runtime, realm = runtime_of(request), caller_of(request).realm
    record = await runtime.ledger.read(key, realm=realm)
    (job,) = await jobs_shown(runtime, [record])
    return fragment(request, "card.html", job=job)


@router.post("/ui/jobs/{job_id}/retry")
@needs(Scope.GENERATE)
async def retry(request: Request, job_id: Id) -> Response:
    """Make a new job with the same input."""
    return await _lead_to(request, await acts.retry(request, parse_job_id(job_id)))


@router.post("/ui/jobs/{job_id}/vary")
@needs(Scope.GENERATE)
async def vary(request: Request, job_id: Id) -> Response:
    """Make a new job with the same input but for the seed."""
    return await _lead_to(request, await acts.vary(request, parse_job_id(job_id)))


@router.post("/ui/jobs/{job_id}/delete")
@needs(Scope.GENERATE)
async def delete(request: Request, job_id: Id) -> Response:
    """Remove the job and its pictures."""
    key = parse_job_id(job_id)
    await acts.delete(request, key)
    if is_htmx(request):
        return toast(request, "Deleted.", kind="good", headers=news_of(gone=[key]))
    return see_other("/")


@router.post("/ui/jobs/{job_id}/download")
@needs(Scope.READ)
async def download(request: Request, job_id: Id) -> Response:
    """Send the pictures of the job as a zip."""
    await admit_again(request)
    return await zipped(request, [parse_job_id(job_id)])


async def _lead_to(request: Request, accepted: Accepted) -> Response:
    """Show the new job: as a card among the others, or on a page of its own."""
    job_id = accepted.job.id
    if not is_htmx(request):
        return see_other(f"/jobs/{job_id}")
    runtime, realm = runtime_of(request), caller_of(request).realm
    record = await runtime.ledger.read(job_id, realm=realm)
    (job,) = await jobs_shown(runtime, [record])
    return fragment(request, "card.html", job=job)


def _back(request: Request) -> str:
    return local_path(text_of(form_of(request), "back") or "/")
