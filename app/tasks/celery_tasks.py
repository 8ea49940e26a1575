"""The Celery door: a bell rang, so hand the job's id to the engine and return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from uuid import UUID

from celery import Celery, Task

from app.runtime import ADVANCE_TASK

Offer = Callable[[UUID], None]


def register(app: Celery, offer: Offer) -> Task[..., None]:
    """Add our one task to the app.

    The task takes microseconds and may be lost, repeated or late: what it says is only
    "look at this job".  An id that is no UUID is somebody else's message and is ignored.
    """

    @app.task(name=ADVANCE_TASK, ignore_result=True)
    def advance_job(*job_ids: str) -> None:
        """Ask the engine of this process to look at the jobs."""
        for job_id in job_ids:
            with contextlib.suppress(ValueError):
                offer(UUID(job_id))

    task: Task[..., None] = advance_job
    return task
