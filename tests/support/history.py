"""Jobs of earlier: as if the service had run for a while."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from app.services.job_queries import first_id

from app.domain.events import Generated, GenerationFailed, Started, Stored
from app.domain.generation import Failure
from tests.support.jobs import JobTable, new_job, stored_output

BLOCKED = Failure("content_blocked", "The prompt was refused.", retryable=False)
BROKEN = Failure("provider_error", "The model crashed.", retryable=True)


def id_of(at: datetime) -> UUID:
    """Make the id of a job that was accepted then."""
    # Version 7, and a variant, in their places: RFC 9562, 5.7.
    return UUID(int=first_id(at).int | 7 << 76 | 2 << 62 | secrets.randbits(62))


async def past_job(
    jobs: JobTable,
    ago: timedelta,
    *,
    seconds: Sequence[float] = (1, 2, 0.5),
    failure: Failure | None = None,
    cost_usd: Decimal | None = None,
    **fields: Any,
) -> UUID:
    """Have a job accepted so long ago and ended; `seconds` is how long its phases took.

    They are: waiting for its start, being generated, being stored.
    """
    job_id = id_of(datetime.now(UTC) - ago)
    await jobs.submit(new_job(id=job_id, **fields))
    queue, generate, store = (timedelta(seconds=one) for one in seconds)
    claim = await _after(jobs, job_id, queue)
    await jobs.settle(claim, Started(f"h-{job_id.hex}"))
    claim = await _after(jobs, job_id, generate)
    if failure is not None:
        await jobs.settle(claim, GenerationFailed(failure, is_transient=False))
    else:
        await jobs.record(claim, Generated())
        await jobs.age(store, job_id)
        await jobs.settle(
            claim, Stored(1), outputs=[stored_output()], cost_usd=cost_usd
        )
    await jobs.age(ago - queue - generate - store, job_id)
    return job_id


async def _after(jobs: JobTable, job_id: UUID, span: timedelta) -> Any:
    await jobs.age(span, job_id)
    await jobs.make_due(job_id)
    return await jobs.claim_one(job_id)
