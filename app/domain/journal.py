"""Events as records: what `job_events` keeps, and how to replay it.

`decide` is pure, so folding the recorded events over the newborn job gives the stored state
again (all of it but the scheduling: `due_at` depends on jitter nobody needs to remember).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import get_args

from app.domain.events import Event
from app.domain.generation import JSON, Failure, RefusalKind
from app.domain.lifecycle import decide
from app.domain.policy import Policy
from app.domain.state import JobState, new_job

_KINDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}

SUBMITTED = "Submitted"  # the birth of a job: recorded, and never decided


def record(event: Event) -> tuple[str, dict[str, JSON]]:
    """Give the event's name and its JSON data."""
    data = {
        name: value
        for name, value in dataclasses.asdict(event).items()
        if value is not None
    }
    return type(event).__name__, data


def revive(name: str, data: Mapping[str, JSON]) -> Event:
    """Rebuild the event that `record` wrote.  Raise KeyError for an unknown name."""
    kind = _KINDS[name]
    values: dict[str, object] = dict(data)
    if isinstance(failure := values.get("failure"), dict):
        values["failure"] = Failure(**failure)
    if isinstance(refusal := values.get("kind"), str):
        values["kind"] = RefusalKind(refusal)
    if isinstance(warnings := values.get("warnings"), list):
        values["warnings"] = tuple(str(text) for text in warnings)
    event: Event = kind(**values)
    return event


def replay(
    born: datetime,
    deadline: timedelta,
    history: Iterable[tuple[Event, datetime]],
    policy: Policy,
    *,
    warnings: tuple[str, ...] = (),
) -> JobState:
    """Fold recorded events over a newborn job; `warnings` are those it was born with."""
    state = new_job(born, deadline, warnings=warnings)
    for event, at in history:
        state = decide(state, event, at, policy, 0.0)
    return state
