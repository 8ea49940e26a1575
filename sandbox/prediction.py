"""A prediction, and the object it is on the wire."""

from __future__ import annotations

import asyncio
import base64
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from sandbox.catalogue import EXTENSIONS, Model, PictureOrder

JSON = dict[str, Any]
Event = Literal["start", "output", "logs", "completed"]
EVENTS: tuple[Event, ...] = ("start", "output", "logs", "completed")
#: Without a filter Replicate sends new outputs and the end (OpenAPI document, 2026-03).
DEFAULT_EVENTS: tuple[Event, ...] = ("output", "completed")
TERMINAL = frozenset({"succeeded", "failed", "canceled", "aborted"})
#: What a run cancelled before it started was seen to have used (recorded 2024).
NOTHING_USED = 3e-06


@dataclass(frozen=True, slots=True)
class Plan:
    """What will become of a prediction; times in seconds, None means never."""

    queue: float | None
    run: float | None
    count: int
    ending: str = "succeeded"
    error: str | None = None
    shown_status: str | None = None
    wiped_at_end: bool = False


@dataclass(slots=True, eq=False)
class Prediction:
    """One purchase.  Only :class:`PredictionBook` changes it."""

    id: str
    number: int
    model: Model
    version: str
    given: JSON
    order: PictureOrder
    seed: int
    plan: Plan
    base_url: str
    created_at: float
    deadline: float | None = None
    deployment: str | None = None
    webhook: str | None = None
    events: tuple[Event, ...] = DEFAULT_EVENTS
    events_given: bool = False
    status: str = "starting"
    started_at: float | None = None
    completed_at: float | None = None
    output_at: float | None = None
    data_removed: bool = False
    timer: asyncio.TimerHandle | None = None
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def is_terminal(self) -> bool:
        """Tell whether the prediction has ended."""
        return self.status in TERMINAL

    @property
    def prompt(self) -> str:
        """Return the prompt, the model's default when none was given."""
        return str(self.model.value(self.given, "prompt") or "")

    def file_name(self, index: int) -> str:
        """Return the name under which an output is served."""
        return f"out-{index}.{EXTENSIONS[self.order.format]}"

    def status_at(self, moment: float) -> str:
        """Return the status that a reader of that moment would have seen."""
        if self.completed_at is not None and self.completed_at <= moment:
            return self.status
        if self.plan.shown_status is not None:
            return self.plan.shown_status
        started = self.started_at is not None and self.started_at <= moment
        return "processing" if started else "starting"

    def logs_at(self, moment: float) -> str | None:
        """Return the log so far: the seed, then a progress bar that grows."""
        if self.data_removed:
            return ""
        end = self.completed_at if self.completed_at is not None else moment
        if self.started_at is None or self.started_at > moment:
            return ""
        if self.started_at == self.completed_at and self.status == "canceled":
            return None
        spent = max(0.0, min(moment, end) - self.started_at)
        total = self.model.steps(self.given)
        share = min(1.0, spent / self.plan.run) if self.plan.run else 1.0
        if (
            self.status == "succeeded"
            and self.completed_at
            and self.completed_at <= moment
        ):
            share = 1.0
        return f"Using seed: {self.seed}\n" + _progress(share, total, spent)

    def outputs(self, base_url: str) -> JSON | list[str] | str | None:
        """Return the output as the model's schema describes it, None when there is none."""
        urls = [
            f"{base_url}/files-out/{self.id}/{self.file_name(index)}"
            for index in range(self.plan.count)
        ]
        if not urls:
            return None
        return urls if self.model.makes_list else urls[0]

    def as_json(self, base_url: str, moment: float) -> JSON:
        """Return the object that GET answers, as it was at that moment."""
        status = self.status_at(moment)
        ended = self.completed_at is not None and self.completed_at <= moment
        known = self.output_at is not None and self.output_at <= moment
        shown = self.outputs(base_url) if known and not self.data_removed else None
        started = (
            self.started_at if self.started_at and self.started_at <= moment else None
        )
        body = {
            **self._early_json(base_url, status),
            "output": shown,
            "logs": self.logs_at(moment),
            "error": self.plan.error if status == "failed" else None,
            "data_removed": self.data_removed,
            "started_at": _stamp(started, 9),
            "completed_at": _stamp(self.completed_at if ended else None, 9),
            "metrics": {},
        }
        if ended and self.completed_at is not None:
            body["metrics"] = {
                "total_time": round(self.completed_at - self.created_at, 9)
            }
            if self.started_at is not None:
                spent = max(NOTHING_USED, self.completed_at - self.started_at)
                body["metrics"]["predict_time"] = round(spent, 9)
            if status == "succeeded":
                body["metrics"]["image_count"] = self.plan.count
        return body

    def as_created(self, base_url: str) -> JSON:
        """Return the early answer of a create, which omits what is not known (recorded 2023)."""
        body = self._early_json(base_url, "starting")
        if self.webhook is not None:
            body["webhook"] = self.webhook
            if self.events_given:
                body["webhook_events_filter"] = list(self.events)
        return body

    def _early_json(self, base_url: str, status: str) -> JSON:
        api = f"{base_url}/v1/predictions/{self.id}"
        body: JSON = {
            "id": self.id,
            "model": self.model.ref,
            "version": self.version,
            "input": {} if self.data_removed else self.given,
            "logs": "",
            "data_removed": False,
            "error": None,
            "source": "api",
            "status": status,
            "created_at": _stamp(self.created_at, 3),
            "urls": {
                "cancel": f"{api}/cancel",
                "get": api,
                "web": f"{base_url}/p/{self.id}",
            },
        }
        if self.deadline is not None:
            body["deadline"] = _stamp(self.deadline, 3)
        if self.deployment is not None:
            body["deployment"] = self.deployment
        return body


def new_id() -> str:
    """Return 26 lower-case letters and digits, as Replicate's ids look."""
    return base64.b32encode(os.urandom(16)).decode().rstrip("=").lower()


def _stamp(moment: float | None, digits: Literal[3, 9]) -> str | None:
    """Write a time as Replicate does: 3 digits or 9, both were recorded."""
    if moment is None:
        return None
    text = datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
    return f"{text[:-3]}Z" if digits == 3 else f"{text}000Z"


def _progress(share: float, total: int, spent: float) -> str:
    """Write the lines of a progress bar up to this share, ten at most."""
    lines: list[str] = []
    reached = int(share * total)
    for tenth in range(11):
        current = round(total * tenth / 10)
        if current > reached or (lines and current == round(total * (tenth - 1) / 10)):
            continue
        percent = 100 * current // total
        bar = "█" * (percent // 10) + " " * (10 - percent // 10)
        rate = current / spent if spent else 0.0
        lines.append(f"{percent:3d}%|{bar}| {current}/{total} [{rate:.2f}it/s]")
    return "\n".join(lines) + "\n"
