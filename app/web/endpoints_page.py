"""The page of webhooks: who is told, what was told to them, and telling it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import ValidationError
from sqlalchemy import Row

from app.api import deliveries, problems, webhooks
from app.api.deliveries import delivery_body, deliveries_of, parse_id
from app.api.deps import Cursor, Id, promptly, read_cursor, runtime_of, write_cursor
from app.api.webhooks import endpoint_body, endpoints_of
from app.domain.access import Scope
from app.domain.errors import Conflict, InvalidRequest
from app.domain.notices import ANNOUNCED
from app.models.webhook_schemas import (
    EndpointChange,
    EndpointRequest,
    RangeRequest,
    StateWord,
)
from app.services.delivery_log import LogFilter
from app.web.door import PageRoute, caller_of, form_of, needs, text_of
from app.web.render import count, fragment, is_htmx, page, see_other, span

router = APIRouter(route_class=PageRoute)

PATH: Final = "/webhooks"
_MOST_ENDPOINTS: Final = 100
_SHOWN: Final = 20  # deliveries on a page
_RANGES: Final = {"1": "hour", "24": "24 hours", "168": "7 days", "720": "30 days"}
_STATES: Final = ("pending", "delivered", "failed", "dropped")
# What a redirect says was done: words of ours, never of an address.
_DONE: Final = {
    "removed": "The endpoint is removed. Its log stays for 30 days.",
    "enabled": "The endpoint is told again of what happens from now on.",
    "disabled": "The endpoint is disabled. What was pending for it is dropped.",
    "again": "It is sent again now.",
}


@dataclass(frozen=True, slots=True)
class Draft:
    """What was typed into the form for a new endpoint, and what is wrong with it."""

    url: str = ""
    description: str = ""
    events: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """What is told beside the list: a sentence, a secret that is shown once, a test's result."""

    notice: str | None = None
    is_good: bool = True
    secret: str | None = None
    about: str | None = None  # the endpoint it is about
    draft: Draft = field(default_factory=Draft)


@dataclass(frozen=True, slots=True)
class LogQuery:
    """Which part of the log is shown."""

    endpoint_id: UUID | None = None
    state: str | None = None
    before: UUID | None = None

    def address(self, path: str, **changes: str | None) -> str:
        """Give the address of this part of the log, with something different."""
        given = {
            "endpoint_id": self.endpoint_id,
            "state": self.state,
            "cursor": self.before and write_cursor(self.before),
        } | changes
        query = urlencode({name: str(one) for name, one in given.items() if one})
        return f"{path}?{query}" if query else path


@router.get(PATH)
@needs(Scope.READ)
async def show(
    request: Request,
    endpoint_id: Annotated[UUID | None, Query()] = None,
    state: Annotated[StateWord | None, Query()] = None,
    cursor: Cursor = None,
    done: Annotated[str, Query(max_length=20)] = "",
    test: Annotated[UUID | None, Query()] = None,
) -> Response:
    """Show the endpoints and the latest of the log; what was `done`, and how a test went."""
    said = Said(notice=_DONE.get(done))
    if done.isdecimal():
        said = Said(_sent_again(int(done)))
    if test is not None:
        realm = caller_of(request).realm
        row = await promptly(deliveries.read_one(runtime_of(request), test, realm))
        said = _of_test(row)
    query = LogQuery(endpoint_id, state, read_cursor(cursor))
    return await _whole(request, said, query)


async def _whole(
    request: Request, said: Said, query: LogQuery = LogQuery(), status: int = 200
) -> HTMLResponse:
    context = await _registry(request, said) | await _log(request, query)
    return page(request, "webhooks.html", status, **context)


@router.get("/ui/webhooks/deliveries")
@needs(Scope.READ)
async def show_deliveries(
    request: Request,
    endpoint_id: Annotated[str, Query(max_length=40)] = "",
    state: Annotated[str, Query(max_length=20)] = "",
    cursor: Cursor = None,
) -> Response:
    """Give a part of the log."""
    query = LogQuery(
        parse_id(endpoint_id, "endpoint_id") if endpoint_id else None,
        state if state in _STATES else None,
        read_cursor(cursor),
    )
    if not is_htmx(request):
        return see_other(query.address(PATH) + "#deliveries")
    return fragment(request, "webhooks_log.html", **await _log(request, query))


# ---------------------------------------------------------------------------- endpoints


@router.post("/ui/webhooks")
@needs(Scope.GENERATE)
async def add(request: Request) -> Response:
    """Register an endpoint, and show its secret."""
    form = form_of(request)
    draft = Draft(
        text_of(form, "url").strip(),
        " ".join(text_of(form, "description").split()),
        tuple(one for one in ANNOUNCED if one in form.getlist("events")),
    )
    try:
        wanted = EndpointRequest.model_validate(
            {
                "url": draft.url,
                "description": draft.description,
                "events": list(draft.events),
            }
        )
        made = await webhooks.register(request, wanted)
    except ValidationError as error:
        return await _refused(request, draft, _in_words(error), 422)
    except (InvalidRequest, Conflict) as error:
        problems.note(request, error)
        return await _refused(request, draft, str(error), problems.look_up(error)[0])
    return await _revealed(request, made, "Registered. This is its secret:")


def _in_words(error: ValidationError) -> str:
    if any(one["loc"][:1] == ("url",) for one in error.errors()):
        return "Enter a whole address, such as https://example.com/hooks."
    return "The description is too long, or has characters that cannot be shown."


async def _refused(
    request: Request, draft: Draft, text: str, status: int
) -> HTMLResponse:
    said = Said(draft=replace(draft, problem=text))
    if is_htmx(
        request
    ):  # what is put into the page is a success; the page says otherwise
        context = await _registry(request, said)
        return fragment(request, "webhooks_registry.html", **context)
    return await _whole(request, said, status=status)


@router.post("/ui/webhooks/{endpoint_id}/rotate")
@needs(Scope.GENERATE)
async def rotate(request: Request, endpoint_id: Id) -> Response:
    """Give an endpoint a new secret, and show it."""
    target, realm = parse_id(endpoint_id, "endpoint_id"), caller_of(request).realm
    changed = await webhooks.rotate(runtime_of(request), target, realm)
    text = "The new secret. For 24 hours the one before signs too:"
    return await _revealed(request, changed, text)


async def _revealed(request: Request, endpoint: Row[Any], text: str) -> HTMLResponse:
    """Show a secret: in this answer and no other, so there is nothing to be led on to."""
    said = Said(text, secret=endpoint.secret, about=str(endpoint.id))
    if is_htmx(request):
        context = await _registry(request, said)
        return fragment(request, "webhooks_registry.html", **context)
    return await _whole(request, said)


@router.post("/ui/webhooks/{endpoint_id}/enable")
@needs(Scope.GENERATE)
async def enable(request: Request, endpoint_id: Id) -> Response:
    """Send to an endpoint again."""
    return await _switch(request, endpoint_id, is_on=True)


@router.post("/ui/webhooks/{endpoint_id}/disable")
@needs(Scope.GENERATE)
async def disable(request: Request, endpoint_id: Id) -> Response:
    """Send nothing to an endpoint."""
    return await _switch(request, endpoint_id, is_on=False)


async def _switch(request: Request, endpoint_id: str, *, is_on: bool) -> Response:
    target = parse_id(endpoint_id, "endpoint_id")
    await webhooks.change(request, target, EndpointChange(enabled=is_on))
    return await _done(request, "enabled" if is_on else "disabled", about=endpoint_id)


@router.post("/ui/webhooks/{endpoint_id}/remove")
@needs(Scope.GENERATE)
async def remove(request: Request, endpoint_id: Id) -> Response:
    """Remove an endpoint."""
    target, realm = parse_id(endpoint_id, "endpoint_id"), caller_of(request).realm
    await webhooks.remove(runtime_of(request), target, realm)
    return await _done(request, "removed")


async def _done(request: Request, word: str, about: str | None = None) -> Response:
    if not is_htmx(request):
        return see_other(f"{PATH}?done={word}")
    return await _list(request, Said(_DONE[word], about=about))


async def _list(request: Request, said: Said) -> HTMLResponse:
    """Give the list anew, and have the log looked at again."""
    context = await _registry(request, said)
    headers = {"HX-Trigger": "delivered"}
    return fragment(request, "webhooks_registry.html", headers=headers, **context)


@router.post("/ui/webhooks/{endpoint_id}/test")
@needs(Scope.GENERATE)
async def test(request: Request, endpoint_id: Id) -> Response:
    """Send a test and say what came of it."""
    target, realm = parse_id(endpoint_id, "endpoint_id"), caller_of(request).realm
    found = await webhooks.send_test(runtime_of(request), target, realm)
    if not is_htmx(request):
        return see_other(f"{PATH}?test={found.id}#endpoint-{endpoint_id}")
    return await _list(request, _of_test(found))


def _of_test(row: Row[Any]) -> Said:
    about = None if row.endpoint_id is None else str(row.endpoint_id)
    tries = delivery_body(row)["tries"]
    if not tries:
        return Said("The test is on its way; see the log below.", about=about)
    last = tries[-1]
    answer = last["error"] or "no answer"
    if last["status_code"] is not None:
        answer = f"answered {last['status_code']}"
    text = f"The test: {answer}, after {span(last['seconds'])}."
    return Said(text, is_good=row.state == "delivered", about=about)


# ----------------------------------------------------------------------------- sending again


@router.post("/ui/webhooks/{endpoint_id}/redeliver")
@needs(Scope.GENERATE)
async def redeliver_range(request: Request, endpoint_id: Id) -> Response:
    """Send again what did not arrive lately."""
    hours = text_of(form_of(request), "hours")
    if hours not in _RANGES:
        raise InvalidRequest("Choose how far back to go.", field="hours")
    target, realm = parse_id(endpoint_id, "endpoint_id"), caller_of(request).realm
    since = datetime.now(UTC) - timedelta(hours=int(hours))
    includes_all = text_of(form_of(request), "all") == "on"
    wanted = RangeRequest(since=since, until=None, all=includes_all)
    done = await webhooks.redeliver_range(runtime_of(request), target, realm, wanted)
    if not is_htmx(request):
        return see_other(f"{PATH}?done={done.count}")
    return await _list(request, Said(_sent_again(done.count), about=endpoint_id))


def _sent_again(number: int) -> str:
    if number == 0:
        return "There was nothing to send again."
    return f"{count(number, 'webhook')} will be sent again now, oldest first."


@router.post("/ui/deliveries/{delivery_id}/redeliver")
@needs(Scope.GENERATE)
async def redeliver(request: Request, delivery_id: Id) -> Response:
    """Send one webhook again."""
    target, realm = parse_id(delivery_id, "delivery_id"), caller_of(request).realm
    row = await deliveries.redeliver_one(runtime_of(request), target, realm)
    if not is_htmx(request):
        return see_other(f"{PATH}?done=again#deliveries")
    return fragment(
        request, "delivery_row.html", delivery=delivery_body(row), may_change=True
    )


# ----------------------------------------------------------------------------- what is shown


async def _registry(request: Request, said: Said) -> dict[str, Any]:
    runtime, caller = runtime_of(request), caller_of(request)
    rows = await promptly(endpoints_of(runtime, caller.realm, None, _MOST_ENDPOINTS))
    return {
        "endpoints": [endpoint_body(row) for row in rows],
        "said": said,
        "draft": asdict(said.draft),
        "events": ANNOUNCED,
        "ranges": _RANGES,
        "may_change": caller.may(Scope.GENERATE),
    }


async def _log(request: Request, query: LogQuery) -> dict[str, Any]:
    runtime, caller = runtime_of(request), caller_of(request)
    wanted = LogFilter(caller.realm, query.endpoint_id, None, query.state)
    rows = await promptly(deliveries_of(runtime, wanted, query.before, _SHOWN + 1))
    named = await promptly(endpoints_of(runtime, caller.realm, None, _MOST_ENDPOINTS))
    here = "/ui/webhooks/deliveries"
    older = None
    if len(rows) > _SHOWN:
        older = query.address(here, cursor=write_cursor(rows[_SHOWN - 1].id))
    return {
        "deliveries": [delivery_body(row) for row in rows[:_SHOWN]],
        "choices": [(str(row.id), row.url) for row in named],
        "query": query,
        "here": query.address(here),
        "older": older,
        "newest": query.address(here, cursor=None) if query.before else None,
        "states": _STATES,
        "may_change": caller.may(Scope.GENERATE),
    }
