"""What the pages call things: stages, events and attempts in plain words.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

_STAGES: Final = {
    "queued": "waiting",
    "submitting": "sending",
    "reconciling": "looking it up",
    "generating": "drawing",
    "storing": "saving",
}
_ENDS: Final = {"completed": "done", "failed": "failed", "cancelled": "cancelled"}

STATUSES: Final = {
    "pending": "waiting",
    "processing": "in the making",
    "completed": "done",
    "failed": "failed",
    "cancelled": "cancelled",
}

_EVENTS: Final = {
    "Submitted": "Accepted",
    "Intended": "Sending it to the provider",
    "Started": "The provider is drawing",
    "Heard": "The provider told us about it",
    "Refused": "The provider refused",
    "OutcomeUnknown": "No answer from the provider: looking for it in its list",
    "NotFound": "Not in the provider's list",
    "Progressed": "Drawing",
    "Generated": "Drawn: fetching the files",
    "GenerationFailed": "The provider gave up",
    "GenerationCancelled": "Cancelled at the provider",
    "Stored": "Saved",
    "OutputFailed": "A file could not be fetched",
    "CancelRequested": "Somebody asked to cancel it",
    "Expired": "The time ran out",
    "WentSilent": "A worker fell silent; another one looks after it",
    "LookFailed": "A look at it came to nothing",
}

_ATTEMPTS: Final = {
    "ready": "to be sent again",
    "sent": "sent",
    "running": "at the provider",
    "succeeded": "succeeded",
    "failed": "failed",
    "refused": "refused: nothing was bought",
    "lost": "lost: never found at the provider",
    "cancelled": "cancelled",
}


def words_of(status: str, stage: str | None) -> str:
    """Say where a job stands."""
    if stage is None:
        return _ENDS.get(status, status)
    return _STAGES.get(stage, stage)


def attempt_words(state: str) -> str:
    """Say what became of an attempt."""
    return _ATTEMPTS.get(state, state)


class Entry(Protocol):
    """One entry of a job's log, as `job_history` reads it."""

    @property
    def name(self) -> str:
        """Name the kind of event."""

    @property
    def data(self) -> Mapping[str, Any]:
        """Give what is known of it."""

    @property
    def status(self) -> str:
        """Give the job's status after it."""

    @property
    def at(self) -> datetime:
        """Tell when it was."""


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a timeline.  `kind` is how it is drawn: plain, good, bad, odd or over."""

    at: datetime
    title: str
    detail: str | None
    kind: str


def timeline(events: Iterable[Entry]) -> list[Step]:
    """Tell the log in plain words; of progress in a row only the latest is told."""
    return [_step(event) for event in _without_steps_of_progress(events)]


def _without_steps_of_progress(events: Iterable[Entry]) -> Iterator[Entry]:
    held: Entry | None = None
    for event in events:
        if held is not None and event.name != held.name:
            yield held
        held = event if event.name == "Progressed" else None
        if held is None:
            yield event
    if held is not None:
        yield held


def _step(event: Entry) -> Step:
    title = _EVENTS.get(event.name, event.name)
    return Step(event.at, title, _detail(event), _kind(event))


def _detail(event: Entry) -> str | None:
    data = event.data
    match event.name:
        case "Progressed" if isinstance(data.get("progress"), int | float):
            return f"{data['progress']:.0%}"
        case "Started" if data.get("is_adopted"):
            return "It had been bought: found, and not bought again."
        case "Generated" if isinstance(data.get("predict_seconds"), int | float):
            return f"{data['predict_seconds']:.1f} s of the provider's time"
        case "Submitted" | "Stored" if data.get("warnings"):
            return " ".join(str(one) for one in data["warnings"])
    failure = data.get("failure")
    if isinstance(failure, Mapping) and failure.get("message"):
        return str(failure["message"])
    return None


def _kind(event: Entry) -> str:
    if event.status == "completed":
        return "good"
    if event.status == "failed":
        return "bad"
    if event.status == "cancelled":
        return "over"
    if event.name in ("Refused", "OutcomeUnknown", "GenerationFailed", "OutputFailed"):
        return "odd"
    return "plain"
