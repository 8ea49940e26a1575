"""Things that go wrong on request: a table of named faults, and rules that switch them on.

A fault strikes at one *point* of the sandbox.  The points ask :meth:`FaultBoard.strike` with a
:class:`Subject`; the first rule in force whose conditions hold answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

JSON = dict[str, Any]
Point = Literal[
    "create_before", "create_after", "plan", "get", "list", "download", "webhook"
]


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One row of the table: where a fault strikes, what it does, and its parameters."""

    point: Point
    promise: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


_ERROR = {"status": 500, "body": "html"}
_BODIES = "body is html, json, text or empty"

#: Every fault there is.  The part before the dot says which call it spoils.
FAULTS: Mapping[str, FaultKind] = {
    "create.dropped": FaultKind(
        "create_before", "Close the connection; no prediction was made."
    ),
    "create.error_before": FaultKind(
        "create_before", f"Answer an error; no prediction was made ({_BODIES}).", _ERROR
    ),
    "create.throttled": FaultKind(
        "create_before", "Answer 429 in Replicate's form.", {"retry_after": 1}
    ),
    "create.unauthorized": FaultKind("create_before", "Answer 401."),
    "create.no_credit": FaultKind("create_before", "Answer 402 in Replicate's form."),
    "create.slow_before": FaultKind(
        "create_before", "Wait, then create as usual.", {"seconds": 5}
    ),
    "create.lost_response": FaultKind(
        "create_after",
        "Make the prediction, then close the connection without an answer.",
    ),
    "create.error_after": FaultKind(
        "create_after",
        f"Make the prediction, then answer an error ({_BODIES}).",
        _ERROR,
    ),
    "create.truncated": FaultKind(
        "create_after", "Make the prediction, then send half of the answer."
    ),
    "create.bad_json": FaultKind(
        "create_after", "Make the prediction, then answer 201 with a body cut in half."
    ),
    "create.slow_after": FaultKind(
        "create_after", "Make the prediction, wait, then answer.", {"seconds": 5}
    ),
    "create.inline_outputs": FaultKind(
        "create_after",
        "Answer a create that waited with data: URIs, as Replicate did in 2024.",
    ),
    "prediction.fails": FaultKind(
        "plan",
        "End as failed with this error text.",
        {"error": "Prediction interrupted; please retry (code: PA)"},
    ),
    "prediction.stuck_starting": FaultKind("plan", "Never leave starting."),
    "prediction.stuck_processing": FaultKind("plan", "Never leave processing."),
    "prediction.aborted": FaultKind("plan", "End as aborted, never started."),
    "prediction.unknown_status": FaultKind(
        "plan", "Show a status nobody has heard of.", {"status": "hibernating"}
    ),
    "prediction.fewer_outputs": FaultKind(
        "plan", "Succeed with only so many pictures.", {"count": 1}
    ),
    "prediction.no_output": FaultKind("plan", "Succeed with an output of null."),
    "prediction.slow": FaultKind("plan", "Take longer to run.", {"seconds": 30}),
    "prediction.data_removed": FaultKind("plan", "Wipe the data as soon as it ends."),
    "get.error": FaultKind("get", f"Answer an error ({_BODIES}).", _ERROR),
    "get.not_found": FaultKind("get", "Answer 404 although the prediction exists."),
    "get.slow": FaultKind("get", "Wait, then answer.", {"seconds": 5}),
    "get.stale": FaultKind("get", "Show the state of a while ago.", {"seconds": 5}),
    "get.dropped": FaultKind("get", "Close the connection."),
    "list.error": FaultKind("list", f"Answer an error ({_BODIES}).", _ERROR),
    "list.slow": FaultKind("list", "Wait, then answer.", {"seconds": 5}),
    "list.stale": FaultKind(
        "list",
        "Show the list of a while ago, without younger predictions.",
        {"seconds": 5},
    ),
    "list.dropped": FaultKind("list", "Close the connection."),
    "download.error": FaultKind("download", f"Answer an error ({_BODIES}).", _ERROR),
    "download.not_found": FaultKind("download", "Answer 404."),
    "download.truncated": FaultKind(
        "download", "Promise the whole picture and send this share.", {"share": 0.5}
    ),
    "download.slow": FaultKind(
        "download", "Send this many bytes each second.", {"bytes_per_second": 4096}
    ),
    "download.html": FaultKind(
        "download", "Send HTML under the picture's name and type."
    ),
    "download.wrong_magic": FaultKind("download", "Spoil the first bytes."),
    "download.wrong_type": FaultKind(
        "download",
        "Send the picture with another content type.",
        {"content_type": "application/octet-stream"},
    ),
    "download.oversized": FaultKind(
        "download",
        "Send the picture and zeros up to this size.",
        {"bytes": 100_000_000},
    ),
    "download.bomb": FaultKind(
        "download", "Send a small PNG that claims to be huge.", {"side": 60_000}
    ),
    "download.redirect": FaultKind(
        "download",
        "Answer 302 to this address.",
        {"location": "http://169.254.169.254/latest/meta-data/"},
    ),
    "webhook.lost": FaultKind("webhook", "Never send it, retries included."),
    "webhook.duplicated": FaultKind("webhook", "Send it several times.", {"copies": 2}),
    "webhook.late": FaultKind("webhook", "Send it later.", {"seconds": 5}),
    "webhook.forged": FaultKind("webhook", "Sign it with a wrong key."),
    "webhook.unsigned": FaultKind("webhook", "Leave out the signature."),
}

_MATCHES = ("prompt_contains", "model", "prediction_id", "webhook_contains", "event")
_KEYS = {"fault", "times", "probability", "seed", "match", "params"}


class BadRule(ValueError):
    """A rule that cannot be switched on; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a fault may look at; empty where a point does not know."""

    prompt: str = ""
    model: str = ""
    prediction_id: str = ""
    webhook: str = ""
    event: str = ""


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that happens now, with its parameters filled in."""

    name: str
    params: Mapping[str, Any]


class Rule:
    """One switched-on fault: how often, how likely, for whom."""

    def __init__(self, number: int, given: JSON) -> None:
        unknown = set(given) - _KEYS
        if unknown:
            raise BadRule(f"unknown keys {sorted(unknown)}; known: {sorted(_KEYS)}")
        name = given.get("fault")
        if not isinstance(name, str) or name not in FAULTS:
            raise BadRule(f"unknown fault {name!r}; GET /sandbox/faults lists them")
        self.id = number
        self.fault = name
        self.hits = 0
        self.times: int | None = given.get("times")
        self.probability = float(given.get("probability", 1.0))
        self.seed: int = given.get("seed", 0)
        self.match: dict[str, str] = given.get("match") or {}
        params = given.get("params") or {}
        for word, allowed, used in (
            ("match", _MATCHES, self.match),
            ("params", FAULTS[name].defaults, params),
        ):
            if set(used) - set(allowed):
                raise BadRule(f"{name}: {word} may only have {sorted(allowed)}")
        self.params = {**FAULTS[name].defaults, **params}
        self._dice = random.Random(self.seed)

    def strikes(self, subject: Subject) -> bool:
        """Tell whether the rule applies to this subject now, and count it if so."""
        if self.times is not None and self.hits >= self.times:
            return False
        if not self._matches(subject) or self._dice.random() >= self.probability:
            return False
        self.hits += 1
        return True

    def _matches(self, subject: Subject) -> bool:
        match = self.match
        return (
            match.get("prompt_contains", "") in subject.prompt
            and match.get("webhook_contains", "") in subject.webhook
            and match.get("model", subject.model) == subject.model
            and match.get("prediction_id", subject.prediction_id)
            == subject.prediction_id
            and match.get("event", subject.event) == subject.event
        )

    def as_json(self) -> JSON:
        """Return the rule as it was given, with its number and its hits."""
        return {
            "id": self.id,
            "fault": self.fault,
            "times": self.times,
            "probability": self.probability,
            "seed": self.seed,
            "match": self.match,
            "params": self.params,
            "hits": self.hits,
        }


class FaultBoard:
    """The rules in force; none at start."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._numbered = 0

    def rules(self) -> list[JSON]:
        """Return the rules in force, used-up ones included, oldest first."""
        return [rule.as_json() for rule in self._rules]

    def replace(self, rules: list[JSON]) -> None:
        """Put these rules in force and drop all others; nothing changes on BadRule."""
        made = [self._make(given) for given in rules]
        self._rules = made

    def add(self, given: JSON) -> JSON:
        """Put one more rule in force and return it."""
        rule = self._make(given)
        self._rules.append(rule)
        return rule.as_json()

    def remove(self, number: int) -> bool:
        """Take one rule out of force; False when there is none with this number."""
        kept = [rule for rule in self._rules if rule.id != number]
        removed = len(kept) < len(self._rules)
        self._rules = kept
        return removed

    def clear(self) -> None:
        """Take all rules out of force."""
        self._rules = []

    def strike(self, point: Point, subject: Subject) -> Strike | None:
        """Return the fault that happens to this subject at this point, if any."""
        for rule in self._rules:
            if FAULTS[rule.fault].point == point and rule.strikes(subject):
                return Strike(rule.fault, rule.params)
        return None

    def _make(self, given: JSON) -> Rule:
        if not isinstance(given, dict):
            raise BadRule("a rule is an object with at least the key 'fault'")
        self._numbered += 1
        return Rule(self._numbered, given)
