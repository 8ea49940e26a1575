"""What callers do to jobs, one or many: cancel, run again, delete.

The JSON API and the pages both come here.  Only jobs in the caller's realm are touched; any
other is as unknown as one that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from fastapi import Request
from sqlalchemy import Row

from app.api.deps import promptly, runtime_of
from app.api.guard import admit_again, caller_of
from app.api.intake import (
    Accepted,
    earlier,
    new_job,
    once_of,
    take_in,
)
from app.domain.errors import Conflict, ServiceError, Unavailable
from app.domain.events import CancelRequested
from app.domain.generation import JSON, GenerationRequest
from app.domain.state import Status
from app.runtime import Runtime
from app.services import job_service
from app.services.job_service import Change, Deleted, Outcome
from app.services.repeats import Once
from app.services.translation import CommonRequest

_SEED: Final = "seed"

Refusals = Mapping[UUID, ServiceError]


# ------------------------------------------------------------------------------- cancel


async def cancel(request: Request, job_id: UUID) -> Outcome:
    """Ask for the end of a job; a finished one stays as it is.  Raise `NotFound`."""
    runtime = runtime_of(request)
    change = Change(job_id, CancelRequested(), realm=caller_of(request).realm)
    outcome = await runtime.ledger.change(change)
    _ring(runtime, job_id, outcome)
    return outcome


async def cancel_many(
    request: Request, job_ids: Sequence[UUID]
) -> dict[UUID, Outcome | Exception]:
    """Ask for the end of the jobs in one transaction; say what became of each."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    changes = [Change(one, CancelRequested(), realm=realm) for one in job_ids]
    outcomes = dict(zip(job_ids, await runtime.ledger.change_all(changes)))
    for job_id, outcome in outcomes.items():
        if isinstance(outcome, Outcome):
            _ring(runtime, job_id, outcome)
    return outcomes


def _ring(runtime: Runtime, job_id: UUID, outcome: Outcome) -> None:
    if not outcome.after.is_terminal:
        runtime.bell.ring(str(job_id))


# ---------------------------------------------------------------------------- run again


async def retry(
    request: Request, job_id: UUID, *, operation: str = "retry"
) -> Accepted:
    """Accept a new job with the same effective input; the old one stays as it is.

    `operation` is what an `Idempotency-Key` of the request counts for.  Raise `NotFound`,
    `Conflict` for a live job, and whatever forbids a new one.
    """
    runtime, realm = runtime_of(request), caller_of(request).realm
    old = (await runtime.ledger.read(job_id, realm=realm)).row
    once = once_of(request, operation, old.id)
    if once and (found := await earlier(runtime, old.owner, once)):
        return found
    if not Status(old.status).is_terminal:
        raise Conflict(f"The job is {old.status}: wait for its end or cancel it first.")
    return await _again(request, old, old.input, retry_of=old.id, once=once)


async def vary(request: Request, job_id: UUID) -> Accepted:
    """Accept a new job with the same input but for the seed, which is chosen anew.

    Raise `NotFound`, `Conflict` for a model that takes none, and whatever forbids a job.
    """
    runtime, realm = runtime_of(request), caller_of(request).realm
    old = (await runtime.ledger.read(job_id, realm=realm)).row
    if _SEED not in old.input:
        raise Conflict("The model takes no seed: run the job again as it is.")
    others = {name: value for name, value in old.input.items() if name != _SEED}
    prepared = await runtime.catalogue.prepare(
        CommonRequest(model=old.model, prompt=old.prompt, parameters=others)
    )
    varied = {**old.input, _SEED: prepared.input[_SEED]}
    return await _again(request, old, varied, retry_of=None, once=None)


async def _again(
    request: Request,
    old: Row[Any],
    wanted: Mapping[str, JSON],
    *,
    retry_of: UUID | None,
    once: Once | None,
) -> Accepted:
    """Accept a job like another one, its owner's, with addresses that work again."""
    runtime = runtime_of(request)
    sent = await runtime.inputs.refresh(old.owner, wanted, old.uploads)
    await admit_again(request)
    job = new_job(
        request,
        GenerationRequest(old.model, sent),
        num_outputs=old.num_outputs,
        prompt=old.prompt,
        priority=old.priority,
        metadata=old.metadata,
        webhook_url=old.webhook_url,
        retry_of=retry_of,
        warnings=(),
        uploads=old.uploads,
        once=once,
        owner=old.owner,
        is_public=old.is_public,
    )
    return await take_in(runtime, job)


async def retry_many(
    request: Request, job_ids: Sequence[UUID]
) -> dict[UUID, Accepted | ServiceError]:
    """Run the jobs again, one after the other; say what became of each.

    An `Idempotency-Key` counts for each job by itself, so that the same request sent again
    buys nothing twice.  Raise `Unavailable` when that is so before the first is accepted.
    """
    once_of(request, "retry", job_ids[0])  # a wrong key is told before anything is done
    results: dict[UUID, Accepted | ServiceError] = {}
    away: Unavailable | None = None
    for job_id in job_ids:
        try:
            if away is not None:
                raise away
            results[job_id] = await retry(
                request, job_id, operation=f"retry of {job_id}"
            )
        except ServiceError as error:
            if isinstance(error, Unavailable):
                if not any(isinstance(one, Accepted) for one in results.values()):
                    raise
                away = error  # the rest would only wait for the same answer
            results[job_id] = error
    return results


# ------------------------------------------------------------------------------- delete


async def delete(request: Request, job_id: UUID) -> None:
    """Remove a finished job, and its files unless another one has them.

    Raise `NotFound`, or `Conflict` for a live job.
    """
    for refusal in (await delete_many(request, [job_id])).values():
        raise refusal


async def delete_many(request: Request, job_ids: Sequence[UUID]) -> Refusals:
    """Remove the finished ones of the jobs in one transaction, with files nobody else has.

    Answer why the others are still there, or never were.
    """
    runtime = runtime_of(request)
    realm = caller_of(request).realm
    deleted = await promptly(_delete(runtime, job_ids, realm))
    async with runtime.ledger.removing(deleted.files) as orphans:
        await runtime.store.delete(orphans)
    return deleted.refused


async def _delete(
    runtime: Runtime, job_ids: Sequence[UUID], realm: str | None
) -> Deleted:
    async with runtime.ledger.transaction() as conn:
        return await job_service.delete_jobs(conn, job_ids, realm=realm)
