"""The pictures, which are also the queue: cards, the search, older ones, what is chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api import acts
from app.api.batches import zipped
from app.api.deps import promptly, read_cursor, runtime_of, write_cursor
from app.api.intake import Accepted
from app.api.problems import BadParameter
from app.domain.access import Scope
from app.domain.errors import InvalidRequest, ServiceError
from app.runtime import Runtime
from app.services import job_queries, job_search
from app.services.job_queries import JobFilter, JobRecord
from app.services.job_service import Outcome
from app.web.door import PageRoute, caller_of, form_of, needs, text_of
from app.web.gallery_filter import Search, read_search
from app.web.render import count, fragment, is_htmx, see_other, toast
from app.web.session import local_path
from app.web.shown import jobs_shown
from app.web.words import STATUSES

router = APIRouter(route_class=PageRoute)

PAGE: Final = 24  # cards at a time
_PATIENT: Final = 4  # looks for one answer; each takes a tenth of a second at most
MOST_CARDS: Final = 100  # in one answer, by name
_MOST_CHOSEN: Final = 100


# ------------------------------------------------------------------------------ looking


async def gallery_of(request: Request) -> dict[str, Any]:
    """Give what `gallery.html` shows for the query of an address."""
    search = read_search(request.query_params)
    cursor = request.query_params.get("cursor") or None
    listed = await _list(request, search, cursor)
    more = {} if cursor is None else {"cursor": cursor}
    return listed | {
        "search": search,
        "is_older": cursor is not None,
        "here": search.address(**more),
        "statuses": STATUSES,
        "models": [model.name for model in runtime_of(request).catalogue.list()],
    }


async def _list(request: Request, search: Search, cursor: str | None) -> dict[str, Any]:
    runtime, wanted = runtime_of(request), search.wanted(caller_of(request))
    shown, rest = await promptly(_look(runtime, wanted, read_cursor(cursor)))
    older = older_cards = None
    if rest is not None:
        following = write_cursor(rest)
        older = search.address(cursor=following)
        older_cards = search.address("/ui/cards", cursor=following)
    return {
        "jobs": await jobs_shown(runtime, shown),
        "older": older,
        "older_cards": older_cards,
    }


async def _look(
    runtime: Runtime, wanted: JobFilter, before: UUID | None
) -> tuple[list[JobRecord], UUID | None]:
    """Find a page of jobs, and where to go on."""
    found: list[JobRecord] = []
    for _ in range(_PATIENT):
        async with runtime.ledger.transaction() as conn:
            some = await job_search.page(
                conn, wanted, before=before, limit=PAGE - len(found)
            )
        found += some.jobs
        before = some.rest
        if before is None or len(found) == PAGE:
            break
    return found, before


@router.get("/ui/gallery")
@needs(Scope.READ)
async def found(request: Request) -> Response:
    """Show what a search finds, in the place of what was there."""
    context = await gallery_of(request)
    headers = {"HX-Replace-Url": context["here"]}
    return fragment(request, "gallery_body.html", headers=headers, **context)


@router.get("/ui/cards")
@needs(Scope.READ)
async def cards(request: Request) -> Response:
    """Show the cards that come next, or those of the jobs named with `ids`."""
    named = request.query_params.get("ids")
    if named is None:
        search = read_search(request.query_params)
        listed = await _list(request, search, request.query_params.get("cursor"))
        return fragment(request, "cards.html", **listed)
    shown = await cards_of(request, _ids(named.split(","), MOST_CARDS))
    return fragment(request, "cards.html", jobs=shown, older=None)


async def cards_of(request: Request, job_ids: Sequence[UUID]) -> list[dict[str, Any]]:
    """Give those of the jobs the caller may see, in the order asked for."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    found = await promptly(_find(runtime, job_ids))
    records = [
        found[one]
        for one in job_ids
        if one in found and realm in (None, found[one].row.owner)
    ]
    return await jobs_shown(runtime, records)


async def _find(runtime: Runtime, job_ids: Sequence[UUID]) -> dict[UUID, JobRecord]:
    async with runtime.ledger.reading() as conn:
        return await job_queries.find(conn, job_ids)


def _ids(texts: Sequence[str], most: int) -> list[UUID]:
    try:
        found = list(dict.fromkeys(UUID(text) for text in texts))
    except ValueError:
        raise BadParameter("ids must be UUIDs.", field="ids") from None
    if len(found) > most:
        raise BadParameter(f"At most {most} at once.", field="ids")
    return found


# ------------------------------------------------------------------------ what is chosen


@router.post("/ui/download")
@needs(Scope.READ)
async def download(request: Request) -> Response:
    """Send the pictures of the chosen jobs as one zip."""
    return await zipped(request, _chosen(request))


@router.post("/ui/selection")
@needs(Scope.GENERATE)
async def act_on_many(request: Request) -> Response:
    """Cancel, run again or delete the chosen jobs."""
    chosen = _chosen(request)
    match text_of(form_of(request), "verb"):
        case "cancel":
            cancelled = await acts.cancel_many(request, chosen)
            done = [one for one, end in cancelled.items() if isinstance(end, Outcome)]
            return await _tell(request, "Cancelling {}.", done, chosen, changed=done)
        case "retry":
            results = await acts.retry_many(request, chosen)
            made = [end.job.id for end in results.values() if isinstance(end, Accepted)]
            why = [end for end in results.values() if isinstance(end, ServiceError)]
            text = "{} will be made again."
            return await _tell(request, text, made, chosen, added=made, why=why)
        case "delete":
            refused = await acts.delete_many(request, chosen)
            gone = [one for one in chosen if one not in refused]
            why = list(refused.values())
            return await _tell(request, "Deleted {}.", gone, chosen, gone=gone, why=why)
    raise InvalidRequest("Say what to do with the pictures.", field="verb")


def _chosen(request: Request) -> list[UUID]:
    texts = [one for one in form_of(request).getlist("job") if isinstance(one, str)]
    if not texts:
        raise InvalidRequest("Choose a picture first.", field="job")
    return _ids(texts, _MOST_CHOSEN)


async def _tell(
    request: Request,
    text: str,
    done: Sequence[UUID],
    chosen: Sequence[UUID],
    *,
    changed: Sequence[UUID] = (),
    added: Sequence[UUID] = (),
    gone: Sequence[UUID] = (),
    why: Sequence[ServiceError] = (),
) -> Response:
    """Say what was done, and let the cards show it; without JavaScript, lead back."""
    if not is_htmx(request):
        return see_other(local_path(text_of(form_of(request), "back") or "/"))
    if not done and why:
        return toast(request, str(why[0]), kind="bad")
    left = len(chosen) - len(done)
    told = text.format(count(len(done), "job"))
    if left:
        told += f" {count(left, 'job')} could not be: {why[0]}" if why else ""
    return toast(
        request,
        told,
        kind="note" if left else "good",
        headers=news_of(changed=changed, added=added, gone=gone),
    )


def news_of(
    *,
    changed: Sequence[UUID] = (),
    added: Sequence[UUID] = (),
    gone: Sequence[UUID] = (),
) -> dict[str, str]:
    """Tell the script of the page which cards to fetch, and which to take away."""
    news = {"changed": changed, "added": added, "gone": gone}
    ids = {name: [str(one) for one in some] for name, some in news.items()}
    return {"HX-Trigger": json.dumps({"mgs:jobs": ids})}
