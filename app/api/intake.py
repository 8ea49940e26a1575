"""What the routes that make jobs have in common: once only, within limits, then accepted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from uuid_utils.compat import uuid7

from app.api.deps import promptly, runtime_of
from app.api.guard import admit_again, caller_of
from app.api.problems import BadParameter
from app.api.views import etag_of, newborn_body, respond
from app.core.crashpoints import Point, reach
from app.domain.admission import ban, plain
from app.domain.errors import Conflict, NotFound, ServiceError
from app.domain.generation import JSON, GenerationRequest
from app.domain.pricing import CostRange
from app.models import schemas
from app.runtime import Runtime
from app.services import job_queries
from app.services.job_records import PRIORITIES
from app.services.repeats import Kind, Once
from app.services.submission import Birth, NewJob
from app.services.translation import CommonRequest, PreparedInput

# draft-ietf-httpapi-idempotency-key-header-07: a string of RFC 9651; bare keys are common too.
_QUOTED = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"', re.ASCII)
_BARE = re.compile(r"[\x21\x23-\x7e]+", re.ASCII)
_LONGEST_KEY = 255
# The same for readers of the OpenAPI document, but for escapes.
ONCE_PATTERN = r'^([!#-~]{1,255}|"[ !#-\[\]-~]{1,255}")$'
_HEADER = "Idempotency-Key"


# ---------------------------------------------------------------------------- once only


def once_of(request: Request, operation: str, asked: BaseModel | UUID) -> Once | None:
    """Read what makes this request once: its Idempotency-Key, or the mark of an SDK's try.

    `asked` is what it asks for: an equal request has an equal one.  Most requests bear
    neither, and cost nothing here.
    """
    given = request.headers.getlist(_HEADER)
    if given:
        key = _read_key(given)
        return Once(f"{operation}:{key}", _fingerprint(operation, asked))
    # SDKs of one family number their tries from 0, and send no key.
    number = request.headers.get("x-stainless-retry-count", "")
    if not (number.isascii() and number.isdigit()):
        return None
    fingerprint = _fingerprint(operation, asked)
    kind = Kind.LATER if number.strip("0") else Kind.FIRST
    return Once(f"{operation} retried:{fingerprint}", fingerprint, kind)


def _fingerprint(operation: str, asked: BaseModel | UUID) -> str:
    """Name a request by what it means: defaults included, in one order."""
    plain_values: object = str(asked)
    if isinstance(asked, BaseModel):
        plain_values = asked.model_dump(mode="json")
    canonical = orjson.dumps([operation, plain_values], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).hexdigest()


def _read_key(given: list[str]) -> str:
    text = given[0].strip() if len(given) == 1 else ""
    if found := _QUOTED.fullmatch(text):
        key = re.sub(r"\\(.)", r"\1", found[1])
    else:
        key = text if _BARE.fullmatch(text) else ""
    if not 1 <= len(key) <= _LONGEST_KEY:
        raise BadParameter(
            f"{_HEADER} must be sent once, with 1 to {_LONGEST_KEY} printable ASCII"
            ' characters, like "8e03978e-40d5-43dd-bc93-6894a57f9324".',
            field=_HEADER,
            code="invalid_idempotency_key",
        )
    return key


async def replayed(runtime: Runtime, owner: str, once: Once) -> Response | None:
    """Answer as the earlier equal request was, if there was one; raise for an unequal one."""
    earlier = await runtime.ledger.earlier(owner, once)
    if earlier is None:
        return None
    return await _replay(runtime, owner, earlier.job_id, once)


async def _replay(runtime: Runtime, owner: str, job_id: UUID, once: Once) -> Response:
    """Say again what was said when the job was accepted."""
    try:
        row = (await runtime.ledger.read(job_id, realm=owner)).row
    except NotFound:
        raise Conflict(
            "The job of this request was deleted; send another Idempotency-Key for a new one.",
            code="idempotent_job_deleted",
        ) from None
    warnings = await promptly(_birth_warnings(runtime, job_id))
    job = NewJob(
        id=row.id,
        request=GenerationRequest(row.model, row.input),
        provider=row.provider,
        prompt=row.prompt,
        num_outputs=row.num_outputs,
        priority=row.priority,
        deadline=runtime.settings.job_deadline,
        metadata=row.metadata,
        retry_of=row.retry_of,
        warnings=warnings,
        owner=row.owner,
        is_public=row.is_public,
    )
    by = "key" if once.kind is Kind.KEYED else "retry"
    marks = {"Idempotency-Replayed": "true", "X-Mgs-Deduped": by}
    return await _tell(runtime, job, row.created_at, marks)


async def _birth_warnings(runtime: Runtime, job_id: UUID) -> tuple[str, ...]:
    async with runtime.ledger.reading() as conn:
        return await job_queries.birth_warnings(conn, job_id)


def once_by(key: str, operation: str, asked: BaseModel) -> Once:
    """Make an equal request with this key once: another one with it is a request of its own."""
    fingerprint = _fingerprint(operation, asked)
    return Once(f"{operation}:{key}:{fingerprint}", fingerprint)


# ------------------------------------------------------------------- from a request to a job


async def compose(
    request: Request, wanted: schemas.GenerateRequest, once: Once | None
) -> NewJob:
    """Make the job that is asked for, ready to be accepted: its files are fetched and kept.

    Raise what forbids it, as far as that can be known of the request alone.
    """
    runtime, caller = runtime_of(request), caller_of(request)
    prepared = await _prepare(runtime, wanted)
    resolved = await runtime.inputs.resolve(caller.owner, prepared)
    await admit_again(request)  # fetching may have taken its time
    return _job_of(request, wanted, resolved.prepared, resolved.uploads, once)


async def sketch(request: Request, wanted: schemas.GenerateRequest) -> NewJob:
    """Make the job that is asked for, to be estimated: nothing is fetched."""
    prepared = await _prepare(runtime_of(request), wanted)
    return _job_of(request, wanted, prepared, {}, None)


async def _prepare(runtime: Runtime, wanted: schemas.GenerateRequest) -> PreparedInput:
    prepared = await runtime.catalogue.prepare(_common(runtime, wanted))
    if wanted.webhook_url is not None:
        await runtime.outbound.examine(wanted.webhook_url, field="webhook_url")
    return prepared


def _common(runtime: Runtime, wanted: schemas.GenerateRequest) -> CommonRequest:
    return CommonRequest(
        model=wanted.model or runtime.settings.default_model,
        prompt=wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        width=wanted.width,
        height=wanted.height,
        aspect_ratio=wanted.aspect_ratio,
        num_outputs=wanted.num_outputs,
        seed=wanted.seed,
        output_format=wanted.output_format,
        parameters=wanted.parameters,
    )


def _job_of(
    request: Request,
    wanted: schemas.GenerateRequest,
    prepared: PreparedInput,
    uploads: Mapping[str, JSON],
    once: Once | None,
) -> NewJob:
    return new_job(
        request,
        GenerationRequest(prepared.model, prepared.input),
        num_outputs=prepared.num_outputs,
        prompt=wanted.prompt,
        priority=PRIORITIES[wanted.priority],
        metadata=wanted.metadata,
        webhook_url=wanted.webhook_url,
        warnings=prepared.warnings + not_yet(wanted.webhook_url),
        uploads=uploads,
        once=once,
        owner=caller_of(request).owner,
        is_public=_is_public(runtime_of(request), wanted.visibility),
    )


def _is_public(runtime: Runtime, visibility: schemas.VisibilityWord | None) -> bool:
    """Private is what a caller with a key expects; without keys it could not be kept."""
    if visibility is None:
        return not runtime.settings.demands_keys
    return visibility == "public"


def not_yet(webhook_url: str | None) -> tuple[str, ...]:
    """Say what is taken down and not acted upon."""
    if webhook_url is None:
        return ()
    return ("webhook_url is kept but not called yet: read the job's status instead.",)


# --------------------------------------------------------------------------- acceptance


def new_job(
    request: Request,
    asked: GenerationRequest,
    *,
    num_outputs: int,
    prompt: str,
    priority: int,
    metadata: dict[str, JSON],
    webhook_url: str | None,
    warnings: tuple[str, ...],
    uploads: Mapping[str, JSON],
    once: Once | None,
    owner: str,
    is_public: bool,
    retry_of: UUID | None = None,
) -> NewJob:
    """Make a job, the caller's unless another `owner` is named, on the caller's account.

    Raise `Forbidden` for what the caller's key never allows.
    """
    runtime, caller = runtime_of(request), caller_of(request)
    if (found := ban(caller.limits, asked, num_outputs)) is not None:
        raise found
    cost = cost_of(runtime, asked, num_outputs)
    return NewJob(
        id=uuid7(),
        request=asked,
        provider=runtime.client.name,
        prompt=prompt,
        num_outputs=num_outputs,
        priority=priority,
        deadline=runtime.settings.job_deadline,
        metadata=metadata,
        webhook_url=webhook_url,
        request_id=request.scope.get("request_id"),
        retry_of=retry_of,
        warnings=warnings,
        uploads=uploads,
        owner=owner,
        is_public=is_public,
        key_id=caller.key_id,
        worst_usd=None if cost is None else cost.high,
        limits=caller.limits,
        budget=caller.budget,
        is_trusted=caller.is_admin,
        once=once,
    )


async def accept(runtime: Runtime, job: NewJob) -> Response:
    """Have the job written down and looked after; answer 202, or what forbids it."""
    birth = await take_in(runtime, job)
    if birth.is_repeat:
        assert job.once is not None
        return await _replay(runtime, job.owner, birth.job_id, job.once)
    return await _tell(runtime, job, birth.at, {})


async def take_in(runtime: Runtime, job: NewJob) -> Birth:
    """Have the job written down and looked after, or raise what forbids it.

    A repeat of an earlier request is told as that one's birth, and makes nothing.
    """
    await runtime.backlog.admit()
    try:
        birth = await runtime.ledger.submit(job)
    except ServiceError:
        runtime.backlog.withdraw()
        raise
    if birth.is_repeat:
        runtime.backlog.withdraw()
        return birth
    reach(Point.SUBMIT_COMMITTED)
    runtime.bell.ring(str(job.id))
    return birth


async def _tell(
    runtime: Runtime, job: NewJob, born: datetime, marks: dict[str, str]
) -> Response:
    location = f"{runtime.settings.api_v1_prefix}/status/{job.id}"
    headers = {
        "Location": location,
        "ETag": etag_of(job.id, 1),
        "Retry-After": "1",
        **marks,
    }
    breaker = await runtime.breaker.state()
    return respond(newborn_body(job, born, breaker), 202, headers)


async def estimate(runtime: Runtime, job: NewJob) -> Response:
    """Say what accepting the job would mean, or raise what forbids it; accept nothing."""
    return respond(await foresee(runtime, job))


async def foresee(runtime: Runtime, job: NewJob, *equals: NewJob) -> dict[str, Any]:
    """Give what accepting the job would mean, as `schemas.Estimate` describes it.

    Raise what forbids it, or those beside it.
    """
    pending = await runtime.backlog.pending()
    await runtime.ledger.judge(job, *equals)
    usual = await promptly(_usual_seconds(runtime, job.request.model))
    cost = cost_of(runtime, job.request, job.num_outputs)
    per_minute = runtime.settings.provider_creates_per_minute
    return {
        "model": job.request.model,
        "parameters": job.request.input,
        "num_outputs": job.num_outputs,
        "warnings": job.warnings,
        "cost": cost and {"low_usd": plain(cost.low), "high_usd": plain(cost.high)},
        "queue": {
            "pending": pending,
            "starts_within_seconds": round(pending * 60 / per_minute, 1),
            "generates_in_seconds": usual,
        },
    }


async def _usual_seconds(runtime: Runtime, model: str) -> float | None:
    async with runtime.ledger.reading() as conn:
        found = await job_queries.usual_duration(conn, model)
    return None if found is None else round(found.total_seconds(), 1)


def cost_of(
    runtime: Runtime, asked: GenerationRequest, num_outputs: int
) -> CostRange | None:
    """Say what a job accepted now may cost; None when nobody knows."""
    return runtime.prices.estimate(
        asked,
        num_outputs,
        day=datetime.now(UTC).date(),
        deadline=runtime.settings.job_deadline,
        attempts=runtime.settings.max_retries + 1,
    )
