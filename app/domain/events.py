"""What can happen to a job.  Facts only; what follows from them is `lifecycle.decide`'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from app.domain.generation import Failure, RefusalKind


@dataclass(frozen=True, slots=True)
class Intended:
    """A purchase is about to be made; this is recorded before the request leaves."""


@dataclass(frozen=True, slots=True)
class Started:
    """The provider has the prediction.

    `is_adopted`: found by reconciling.  `usual_seconds` is how long the model usually takes,
    None when nothing is known of it.
    """

    handle: str
    is_adopted: bool = False
    usual_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """Somebody who speaks for the provider names the prediction of attempt `number`.

    `is_over`: the provider is done with it.  May be old, repeated, or out of order.
    """

    number: int
    handle: str
    is_over: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """The provider said no to the purchase and created nothing."""

    kind: RefusalKind
    failure: Failure
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class OutcomeUnknown:
    """Nobody knows whether the purchase was made."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotFound:
    """The provider showed its whole list, and the purchase is not in it (yet)."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """The provider is still at it.

    `is_contradicted`: so it answered, but it was heard to be done: an old answer, perhaps.
    """

    progress: float | None = None
    usual_seconds: float | None = None
    is_contradicted: bool = False


@dataclass(frozen=True, slots=True)
class Generated:
    """The provider is done; the files are still there, not here.

    `ago_seconds` is how long before it was written down somebody learned so.
    """

    predict_seconds: float | None = None
    ago_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationFailed:
    """The provider gave up on the prediction."""

    failure: Failure
    is_transient: bool


@dataclass(frozen=True, slots=True)
class GenerationCancelled:
    """The prediction was cancelled; `is_aborted`: before it ever ran."""

    is_aborted: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """Every output is in the store and believed."""

    outputs: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputFailed:
    """An output could not be had.  `is_final`: fetching it again is no use."""

    failure: Failure
    is_final: bool


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The caller does not want the job any more."""


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline passed before the provider was done."""


@dataclass(frozen=True, slots=True)
class WentSilent:
    """A look ended without a word, the last `times` in a row: its lease ran out.

    Perhaps the worker was ended, perhaps it dies of this job each time.
    """

    times: int


@dataclass(frozen=True, slots=True)
class LookFailed:
    """A look came to nothing for reasons that say nothing about the job."""

    reason: str


Event: TypeAlias = (
    Intended
    | Started
    | Heard
    | Refused
    | OutcomeUnknown
    | NotFound
    | Progressed
    | Generated
    | GenerationFailed
    | GenerationCancelled
    | Stored
    | OutputFailed
    | CancelRequested
    | Expired
    | WentSilent
    | LookFailed
)
