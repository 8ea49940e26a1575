"""The Celery door: a bell rang, so hand the job's id to the engine and return."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from celery import Celery, Task

from app.runtime import ADVANCE_TASK

Offer = Callable[[UUID], None]


def register(app: Celery, offer: Offer) -> Task[[str], None]:
    """Add our one task to the app.

    The task takes microseconds and may be lost, repeated or late: what it says is only
    "look at this job".  An id that is no UUID is somebody else's message and is ignored.
    """

    @app.task(name=ADVANCE_TASK, ignore_result=True)
    def advance_job(job_id: str) -> None:
        """Ask the engine of this process to look at the job."""
        try:
            offer(UUID(job_id))
        except ValueError:
            return

    task: Task[[str], None] = advance_job
    return task
