"""What the outside is told of a job: one vocabulary for event streams and webhooks.  Pure.

Every entry of a job's log has one of these names.  `ANNOUNCED` are those worth a webhook.
"""

from __future__ import annotations

from typing import Final

from app.domain.events import Intended, Progressed
from app.domain.journal import SUBMITTED
from app.domain.state import Status

CREATED: Final = "job.created"
STARTED: Final = (
    "job.started"  # a purchase is about to be made; again with each attempt
)
PROGRESS: Final = "job.progress"
UPDATED: Final = "job.updated"  # anything else that can be seen
COMPLETED: Final = "job.completed"
FAILED: Final = "job.failed"
CANCELLED: Final = "job.cancelled"

ENDS: Final = (COMPLETED, FAILED, CANCELLED)
ANNOUNCED: Final = (CREATED, STARTED, *ENDS)
ALL: Final = (CREATED, STARTED, PROGRESS, UPDATED, *ENDS)
TEST: Final = "webhook.test"  # of no job: somebody wants to see whether webhooks arrive

_BY_EVENT: Final = {
    SUBMITTED: CREATED,
    Intended.__name__: STARTED,
    Progressed.__name__: PROGRESS,
}


def name_of(event: str, status: str) -> str:
    """Name an entry of a job's log, by its event and the job's status after it."""
    if Status(status).is_terminal:
        return f"job.{status}"
    return _BY_EVENT.get(event, UPDATED)
