"""The first page: the form that makes pictures, above the pictures.

`POST /ui/jobs` takes the form; `/ui/form` gives it again for another model, with all that was
typed; `/ui/estimate` says what pressing the button would mean; `/ui/pictures` takes pictures
ahead.  Jobs are made by the same functions as those of `POST /generate`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response
from starlette.datastructures import FormData, UploadFile

from app.api import problems
from app.api.deps import parse_job_id, runtime_of
from app.api.intake import compose, cost_of, foresee, once_by, sketch, take_in
from app.domain.access import Scope
from app.domain.errors import (
    BudgetExceeded,
    Forbidden,
    InvalidRequest,
    NotFound,
    OverLimit,
    ServiceError,
    Unavailable,
)
from app.domain.generation import ModelDescription
from app.models import schemas
from app.runtime import Runtime
from app.services.inputs import UPLOAD
from app.services.submission import NewJob
from app.services.upload_rows import Upload
from app.web.door import (
    PageRoute,
    caller_of,
    form_of,
    needs,
    takes_files,
    text_of,
)
from app.web.draft import (
    FILE,
    INPUT,
    Draft,
    Picture,
    Problems,
    Wrong,
    first_of,
    problems_of,
    read_draft,
    requests_of,
)
from app.web.gallery import gallery_of
from app.web.model_form import Field, Kind, fields_of
from app.web.render import fragment, is_htmx, page, see_other
from app.web.shown import jobs_shown
from app.web.start import draft_of_job, uploads_of

router = APIRouter(route_class=PageRoute)

_MOST_FILES: Final = 20
_CHUNK: Final = 64 * 1024
_STAND_IN: Final = "a prompt"  # what an estimate is made of before there is one


@dataclass(frozen=True, slots=True)
class Form:
    """The form with what it knows of the model: what its templates show."""

    draft: Draft
    models: Sequence[str]
    fields: Sequence[Field] = ()
    description: str = ""
    problems: Problems = field(default_factory=dict)

    def value(self, one: Field) -> str:
        """Give what stands in a field."""
        return self.draft.value(one)

    def problem(self, name: str) -> str:
        """Say what is wrong with a field; "" when nothing is."""
        return self.problems.get(name, "")

    @property
    def foremost(self) -> list[Field]:
        """Give the fields that are shown at once."""
        return [one for one in self.fields if one.is_foremost]

    @property
    def others(self) -> list[Field]:
        """Give the fields behind "More options"."""
        return [one for one in self.fields if not one.is_foremost]

    @property
    def is_open(self) -> bool:
        """Tell whether the other fields are shown: somebody opened them, or one is wrong."""
        wrong = {INPUT + one.name for one in self.others}
        return self.draft.is_open or bool(wrong & set(self.problems))


# ------------------------------------------------------------------------------ the page


@router.api_route("/", methods=["GET", "HEAD"])
@needs(Scope.READ)
async def home(
    request: Request,
    model: Annotated[str | None, Query(max_length=300)] = None,
    prompt: Annotated[str, Query(max_length=6000)] = "",
    start: Annotated[str | None, Query(alias="from", max_length=64)] = None,
) -> Response:
    """Show the form, as a job was asked for with `from`, and what was made."""
    runtime = runtime_of(request)
    draft = Draft(model=model or runtime.settings.default_model, prompt=prompt)
    if start is not None:
        draft = await _draft_from(request, start)
    return await _home(request, await _form(request, draft))


async def _draft_from(request: Request, job_id: str) -> Draft:
    """Write a job of the caller's into the form; pictures that are not kept are left out."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    record = await runtime.ledger.read(parse_job_id(job_id), realm=realm)
    draft = draft_of_job(record, keys_on=runtime.gatekeeper.demands_keys)
    pictures = {
        name: tuple(await _own_uploads(request, ids))
        for name, ids in uploads_of(record).items()
    }
    return replace(draft, pictures=pictures)


async def _home(request: Request, form: Form, status: int = 200) -> Response:
    pictures = await gallery_of(request)
    return page(request, "home.html", status, form=form, **pictures)


@router.post("/ui/form")
@needs(Scope.GENERATE)
@takes_files(most=_MOST_FILES)
async def choose(request: Request) -> Response:
    """Give the form for another model, with all that was typed."""
    form = await _form(request, await _draft(request, form_of(request)))
    if is_htmx(request):
        return fragment(request, "create_form.html", form=form)
    return await _home(request, form)


# -------------------------------------------------------------------------- making jobs


@router.post("/ui/jobs")
@needs(Scope.GENERATE)
@takes_files(most=_MOST_FILES)
async def create(request: Request) -> Response:
    """Make the jobs of the form: all that are allowed, once however often it is sent."""
    draft = await _draft(request, form_of(request))
    form = await _form(request, draft)
    try:
        draft = await _with_files(request, form_of(request), form)
        form = replace(form, draft=draft)
        if form.problems:
            raise Wrong(form.problems)
        jobs = await _compose_all(request, form)
        if len(jobs) > 1:  # none of them, rather than some
            await runtime_of(request).ledger.judge(*jobs)
    except (Wrong, InvalidRequest, Forbidden, OverLimit, BudgetExceeded) as error:
        return await _show_again(request, form, error)
    made, refusal = await _take_in_all(runtime_of(request), jobs)
    if refusal is not None and not made:
        return await _show_again(request, form, refusal)
    return await _show_made(request, form, made, refusal)


async def _compose_all(request: Request, form: Form) -> list[NewJob]:
    wanted = _requests(request, form)
    return [
        await compose(request, one, once_by(f"{form.draft.once} {n}", "page", one))
        for n, one in enumerate(wanted)
    ]


def _requests(request: Request, form: Form) -> list[schemas.GenerateRequest]:
    keys_on = runtime_of(request).gatekeeper.demands_keys
    return requests_of(form.draft, form.fields, keys_on=keys_on)


async def _take_in_all(
    runtime: Runtime, jobs: Sequence[NewJob]
) -> tuple[list[UUID], ServiceError | None]:
    """Have the jobs accepted one after the other, up to the first that is refused."""
    made: list[UUID] = []
    for job in jobs:
        try:
            made.append((await take_in(runtime, job)).job.id)
        except ServiceError as error:
            return made, error
    return made, None


async def _show_made(
    request: Request, form: Form, made: Sequence[UUID], error: ServiceError | None
) -> Response:
    """Show the new jobs, newest first, and the form ready for the next press."""
    if not is_htmx(request) and error is None:
        return see_other("/")
    told = {}
    if error is not None:
        problems.note(request, error)
        told = {
            "": f"{len(made)} of the jobs were accepted. The others were not: {error}"
        }
    form = replace(form, draft=form.draft.anew(), problems=told)
    if not is_htmx(request):
        return await _home(request, form)
    runtime = runtime_of(request)
    realm = caller_of(request).realm
    records = [await runtime.ledger.read(one, realm=realm) for one in reversed(made)]
    jobs = await jobs_shown(runtime, records)
    return fragment(request, "created.html", form=form, jobs=jobs)


async def _show_again(
    request: Request, form: Form, error: Wrong | ServiceError
) -> Response:
    """Show the form with what is wrong beside its fields.

    A piece that was put into the page is a success to htmx; the page says otherwise.
    """
    status, found = 422, {}
    if isinstance(error, Wrong):
        found = dict(error.problems)
    else:
        problems.note(request, error)
        status, _ = problems.look_up(error)
        found = problems_of(error, form.fields)
    form = replace(form, problems=found)
    if is_htmx(request):
        return fragment(request, "create_form.html", form=form)
    return await _home(request, form, status)


# ----------------------------------------------------------------------------- estimates


@router.post("/ui/estimate")
@needs(Scope.GENERATE)
@takes_files(most=_MOST_FILES)
async def estimate(request: Request) -> Response:
    """Say what the jobs of the form would cost, or why they would be refused; make none."""
    runtime = runtime_of(request)
    draft = await _draft(request, form_of(request))
    if not draft.prompt.strip():
        draft = replace(draft, prompt=_STAND_IN)
    form = await _form(request, draft)
    try:
        if form.problems:
            raise Wrong(form.problems)
        jobs = [await sketch(request, one) for one in _requests(request, form)]
        found = await foresee(runtime, *jobs)
    except Wrong as error:
        return _estimated(request, problem=first_of(error.problems, form.fields))
    except InvalidRequest as error:
        told = problems_of(error, form.fields)
        return _estimated(request, problem=first_of(told, form.fields))
    except (Forbidden, OverLimit, BudgetExceeded, Unavailable) as error:
        return _estimated(request, problem=str(error))
    return _estimated(request, found=found, jobs=len(jobs), cost=_total(runtime, jobs))


def _estimated(
    request: Request,
    *,
    problem: str | None = None,
    found: Mapping[str, Any] | None = None,
    jobs: int = 0,
    cost: tuple[Decimal, Decimal] | None = None,
) -> HTMLResponse:
    return fragment(
        request, "estimate.html", problem=problem, found=found, jobs=jobs, cost=cost
    )


def _total(runtime: Runtime, jobs: Sequence[NewJob]) -> tuple[Decimal, Decimal] | None:
    """Add up what the jobs cost at least and at most; None when nobody knows."""
    costs = [cost_of(runtime, job.request, job.num_outputs) for job in jobs]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return None
    return sum((c.low for c in known), Decimal()), sum(
        (c.high for c in known), Decimal()
    )


# ------------------------------------------------------------------------------ pictures


@router.post("/ui/pictures")
@needs(Scope.GENERATE)
@takes_files(most=_MOST_FILES)
async def take_pictures(request: Request) -> Response:
    """Keep the pictures of one field ahead of the rest of the form, and show them there."""
    name = text_of(form_of(request), "input")
    try:
        kept = await _keep_files(request, form_of(request), name)
    except InvalidRequest as error:
        aim = {"HX-Reswap": "none"}  # but for the words beside the field
        text = _spoken(error)
        return fragment(request, "picked.html", 200, aim, name=name, problem=text)
    pictures = [_shown(runtime_of(request), one) for one in kept]
    return fragment(request, "picked.html", name=name, pictures=pictures, problem=None)


def _spoken(error: ServiceError) -> str:
    return str(error).partition(": ")[2] or str(error)


async def _keep_files(request: Request, form: FormData, name: str) -> list[Upload]:
    """Take in the files of one field; raise `InvalidRequest` for what is no picture."""
    runtime, owner = runtime_of(request), caller_of(request).owner
    return [
        await runtime.uploads.take_in(owner, _stream(one), field=f"parameters.{name}")
        for one in form.getlist(FILE + name)
        if isinstance(one, UploadFile) and one.filename
    ]


async def _stream(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(_CHUNK):
        yield chunk


def _shown(runtime: Runtime, upload: Upload) -> Picture:
    url = runtime.links.now().path(upload.key, is_public=False)
    return Picture(f"{UPLOAD}{upload.id}", url)


async def _with_files(request: Request, form: FormData, shown: Form) -> Draft:
    """Keep what came with the form itself, from browsers without scripts."""
    draft, pictures = shown.draft, dict(shown.draft.pictures)
    for one in shown.fields:
        kept = await _keep_files(request, form, one.name)
        added = tuple(_shown(runtime_of(request), upload) for upload in kept)
        if added and one.kind is Kind.PICTURE:
            pictures[one.name] = added[-1:]
        elif added:
            pictures[one.name] = (*pictures.get(one.name, ()), *added)
    return replace(draft, pictures=pictures)


# ------------------------------------------------------------------------ reading the form


async def _draft(request: Request, form: FormData) -> Draft:
    """Read what was typed, with the pictures that were sent ahead and are the caller's."""
    runtime = runtime_of(request)
    draft = read_draft(form, default_model=runtime.settings.default_model)
    pictures: dict[str, tuple[Picture, ...]] = {}
    for name in {one for one in form if one.startswith(INPUT)}:
        uris = [one for one in form.getlist(name) if isinstance(one, str)]
        ids = [_upload_id(uri) for uri in uris if uri.startswith(UPLOAD)]
        found = await _own_uploads(request, [one for one in ids if one is not None])
        if found:
            pictures[name.removeprefix(INPUT)] = tuple(found)
    return replace(draft, pictures=pictures)


def _upload_id(uri: str) -> UUID | None:
    try:
        return UUID(uri.removeprefix(UPLOAD))
    except ValueError:
        return None


async def _own_uploads(request: Request, ids: Sequence[UUID]) -> list[Picture]:
    """Find the caller's uploads; others, and those removed since, are left out."""
    runtime, owner = runtime_of(request), caller_of(request).owner
    found = await runtime.uploads.use(owner, ids[:_MOST_FILES])
    return [_shown(runtime, found[one]) for one in ids if one in found]


async def _form(request: Request, draft: Draft) -> Form:
    """Put the model's fields around the draft; an unknown model is a problem of its field."""
    runtime = runtime_of(request)
    models = [one.name for one in runtime.catalogue.list()]
    form = Form(draft, models)
    try:
        found: ModelDescription = await runtime.catalogue.describe(draft.chosen_model)
    except (InvalidRequest, NotFound) as error:
        return replace(form, problems={"model": str(error)})
    except Unavailable as error:
        return replace(form, problems={"": str(error)})
    return replace(form, fields=fields_of(found), description=found.description)
