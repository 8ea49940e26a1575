"""One state of every kind a job can be in, one event of every kind, and what is legal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from app.domain.events import (
    CancelRequested,
    Event,
    Expired,
    GenerationCancelled,
    GenerationFailed,
    Generated,
    Heard,
    Intended,
    LookFailed,
    NotFound,
    OutcomeUnknown,
    OutputFailed,
    Progressed,
    Refused,
    Started,
    Stored,
    WentSilent,
)
from app.domain.generation import Failure, RefusalKind
from app.domain.lifecycle import decide
from app.domain.policy import Policy
from app.domain.state import JobState, new_job

POLICY = Policy()
BORN = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
DEADLINE = timedelta(minutes=15)
NOW = BORN + timedelta(seconds=1)
LATE = BORN + DEADLINE
FAILURE = Failure("bad_weather", "The weather was bad.", retryable=True)

EVENTS: Mapping[str, Event] = {
    "intended": Intended(),
    "started": Started("h-1"),
    "adopted": Started("h-1", is_adopted=True),
    "heard": Heard(1, "h-1", is_over=False),
    "heard_over": Heard(1, "h-1", is_over=True),
    "refused_permanent": Refused(RefusalKind.PERMANENT, FAILURE),
    "refused_transient": Refused(RefusalKind.TRANSIENT, FAILURE),
    "unreachable": Refused(RefusalKind.UNREACHABLE, FAILURE),
    "throttled": Refused(RefusalKind.THROTTLED, FAILURE, 10.0),
    "account_refused": Refused(RefusalKind.ACCOUNT, FAILURE),
    "unknown": OutcomeUnknown("timeout"),
    "not_found": NotFound(),
    "progressed": Progressed(0.5),
    "no_progress": Progressed(),
    "contradicted": Progressed(0.5, 2.0, is_contradicted=True),
    "generated": Generated(1.5, 0.25),
    "failed_for_good": GenerationFailed(FAILURE, is_transient=False),
    "failed_for_now": GenerationFailed(FAILURE, is_transient=True),
    "ended_by_provider": GenerationCancelled(),
    "aborted": GenerationCancelled(is_aborted=True),
    "stored": Stored(1, ("a warning",)),
    "output_failed": OutputFailed(FAILURE, is_final=False),
    "output_gone": OutputFailed(FAILURE, is_final=True),
    "cancel": CancelRequested(),
    "expired": Expired(),
    "look_failed": LookFailed("timeout"),
    "silent": WentSilent(1),
    "silent_again": WentSilent(POLICY.silent_looks_forgiven + 1),
    "poisonous": WentSilent(POLICY.most_silent_looks),
}


def after(*names: str, now: datetime = NOW) -> JobState:
    """Give the state after the named events, all at once."""
    state = new_job(BORN, DEADLINE)
    for name in names:
        state = decide(state, EVENTS[name], now, POLICY, 0.5)
    return state


SENT = ("intended",)
NEWS = ("heard", "heard_over")
OVERTAKEN = (  # what the look that bought has to say when its purchase was heard of before
    *("started", "adopted", "refused_permanent", "refused_transient", "throttled"),
    *("unreachable", "account_refused", "unknown", "not_found"),
)
STATES: Mapping[str, JobState] = {
    "queued": after(),
    "queued_throttled": after(*SENT, "throttled"),
    "queued_again": after(*SENT, "refused_transient"),
    "queued_lost": decide(
        after(*SENT, "unknown"), NotFound(), NOW + POLICY.grace, POLICY, 0.5
    ),
    "submitting": after(*SENT),
    "submitting_cancelled": after(*SENT, "cancel"),
    "reconciling": after(*SENT, "unknown"),
    "generating": after(*SENT, "started"),
    "generating_cancelled": after(*SENT, "started", "cancel"),
    "storing": after(*SENT, "started", "generated"),
    "completed": after(*SENT, "started", "generated", "stored"),
    "failed": after(*SENT, "refused_permanent"),
    "cancelled": after("cancel"),
}

# What a state becomes: a stage's name, or a final status.  What is not here is illegal.
_LEGAL: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(
        ("queued", "queued_again"),
        {
            **dict.fromkeys(("look_failed", *NEWS), "queued"),
            **{"intended": "submitting", "cancel": "cancelled"},
        },
    ),
    # Nothing was bought since: what is heard of is used.
    **dict.fromkeys(
        ("queued_throttled", "queued_lost"),
        {
            **dict.fromkeys(NEWS, "generating"),
            **{"intended": "submitting", "cancel": "cancelled"},
            "look_failed": "queued",
        },
    ),
    "submitting": {
        **dict.fromkeys(("started", "adopted", *NEWS), "generating"),
        "refused_permanent": "failed",
        **dict.fromkeys(
            ("refused_transient", "unreachable", "throttled", "account_refused"),
            "queued",
        ),
        "unknown": "reconciling",
        **dict.fromkeys(("cancel", "look_failed"), "submitting"),
    },
    "submitting_cancelled": {
        **dict.fromkeys(("started", "adopted", *NEWS), "generating"),
        "refused_permanent": "failed",
        **dict.fromkeys(
            ("refused_transient", "unreachable", "throttled", "account_refused"),
            "cancelled",
        ),
        "unknown": "reconciling",
        **dict.fromkeys(("cancel", "look_failed"), "submitting"),
    },
    "reconciling": {
        **dict.fromkeys(("started", "adopted", *NEWS), "generating"),
        **dict.fromkeys(("not_found", "cancel", "look_failed"), "reconciling"),
    },
    "generating": {
        "generated": "storing",
        **dict.fromkeys(("failed_for_good", "ended_by_provider"), "failed"),
        **dict.fromkeys(("failed_for_now", "aborted"), "queued"),
        **dict.fromkeys(
            ("progressed", "no_progress", "contradicted", "cancel", "look_failed"),
            "generating",
        ),
        **dict.fromkeys((*NEWS, *OVERTAKEN), "generating"),
    },
    "generating_cancelled": {
        "generated": "storing",
        "failed_for_good": "failed",
        **dict.fromkeys(
            ("ended_by_provider", "failed_for_now", "aborted"), "cancelled"
        ),
        **dict.fromkeys(
            ("progressed", "no_progress", "contradicted", "cancel", "look_failed"),
            "generating",
        ),
        **dict.fromkeys((*NEWS, *OVERTAKEN), "generating"),
    },
    "storing": {
        "stored": "completed",
        "output_gone": "failed",
        **dict.fromkeys(("output_failed", "cancel", "look_failed"), "storing"),
        **dict.fromkeys(("generated", *NEWS), "storing"),
    },
}

SILENCE = ("silent", "silent_again")
LEGAL: Mapping[str, Mapping[str, str]] = {
    state: {
        **legal,
        **dict.fromkeys(SILENCE, STATES[state].stage or ""),
        "poisonous": "failed",
    }
    for state, legal in _LEGAL.items()
}

# What the deadline adds: it ends every live job but one whose picture is already made.
EXPIRES: Mapping[str, str] = {
    name: "cancelled" if state.is_cancel_requested else "failed"
    for name, state in STATES.items()
    if not state.is_terminal and name != "storing"
}
