"""What is bought from a provider, in words no vendor owns.

The vendor's spelling, URLs and status words live in `services/providers/`; everything else
in the service knows only these values and the `MediaClient` protocol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol, TypeAlias

JSON: TypeAlias = (
    "None | bool | int | float | str | list[JSON] | dict[str, JSON]"  # one JSON value
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something did not work: a code to switch on, a text for people.

    `retryable` says whether the same request, sent again as a new job, may succeed.
    """

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One purchase, exactly as it goes to the provider.

    `model` is `owner/name` or `owner/name:version`; `input` is the model's own input.
    """

    model: str
    input: Mapping[str, JSON]

    @property
    def fingerprint(self) -> str:
        """Identify equal purchases: SHA-256 (hex) over model and input, key order ignored."""
        canonical = json.dumps(
            [self.model, self.input],
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
        )
        return hashlib.sha256(canonical.encode()).hexdigest()


class Phase(StrEnum):
    """Where a prediction stands at the provider.  The last four never change again."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABORTED = "aborted"  # ended before it ever ran; not billed

    @property
    def is_over(self) -> bool:
        """Tell whether the provider is done with it."""
        return self not in (Phase.QUEUED, Phase.RUNNING)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the provider says about one purchase at one moment.

    Everything but `handle` and `phase` may be missing.  `progress` is 0…1.
    `outputs` are the URLs of the files in order (https, http from a trusted host, or data).
    `failure` is set when the phase is FAILED, already classified; `is_transient` then says
    whether buying again is sensible.
    """

    handle: str
    phase: Phase
    model: str | None = None
    input: Mapping[str, JSON] | None = None
    outputs: tuple[str, ...] = ()
    progress: float | None = None
    failure: Failure | None = None
    is_transient: bool = False
    data_removed: bool = False
    webhook: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    predict_seconds: float | None = None

    @property
    def busy_seconds(self) -> float | None:
        """Say how long the hardware worked on it, None when unknown: what is billed by time."""
        if self.phase is Phase.ABORTED:
            return 0.0
        if self.predict_seconds is not None:
            return self.predict_seconds
        if self.started_at is None or self.completed_at is None:
            return None
        return (self.completed_at - self.started_at).total_seconds()


@dataclass(frozen=True, slots=True)
class Started:
    """The purchase was made; the prediction has a handle."""

    prediction: Prediction


class RefusalKind(StrEnum):
    """How a definite "no" to a create is to be treated.  Nothing was created in any case."""

    PERMANENT = "permanent"  # the request itself: no use in sending it again
    TRANSIENT = "transient"  # try again later; counts as an attempt
    UNREACHABLE = "unreachable"  # the request never left; costs no attempt
    THROTTLED = "throttled"  # 429: wait as told; costs no attempt
    ACCOUNT = "account"  # 401, 402, 403: the operator must act; costs no attempt


@dataclass(frozen=True, slots=True)
class Refused:
    """The provider said no and created nothing."""

    kind: RefusalKind
    failure: Failure
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Nobody knows whether the purchase was made; it must never be sent again blindly."""

    reason: str


CreateOutcome: TypeAlias = Started | Refused | Unknown


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as the provider describes it.

    `input_schema` is a self-contained JSON Schema (Draft 2020-12 vocabulary, `$ref`s resolved
    inside the document) of the model's own input; `version` is None where hidden.
    """

    name: str
    description: str
    version: str | None
    input_schema: Mapping[str, JSON]
    labels: tuple[str, ...] = field(default=())

    @property
    def properties(self) -> Mapping[str, Mapping[str, JSON]]:
        """Name the inputs the model has, with the schema of each."""
        found = self.input_schema.get("properties")
        if not isinstance(found, dict):
            return {}
        return {name: one for name, one in found.items() if isinstance(one, dict)}


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file for a model to work on.  `read` gives its bytes from the start, each time anew."""

    name: str
    content_type: str
    size_bytes: int
    read: Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True)
class ProvidedFile:
    """A file the provider keeps: `url` is what its models take, until `expires_at`, if known."""

    url: str
    expires_at: datetime | None


class MediaClient(Protocol):
    """The few verbs we need of a provider.

    `create` never raises for what the provider or the network did: its outcome is a value.
    The reading verbs raise `ProviderUnavailable` (or `ProviderThrottled`), and retry nothing.
    """

    @property
    def name(self) -> str:
        """Name the provider, as shown in a job's `provider.name`."""
        ...

    async def create(
        self,
        request: GenerationRequest,
        *,
        cancel_after: timedelta,
        webhook: str | None = None,
    ) -> CreateOutcome:
        """Buy once.  Exactly one POST leaves, or none; `cancel_after` bounds an orphan's life."""
        ...

    async def get(self, handle: str) -> Prediction:
        """Read one prediction.  Raise `PredictionNotFound` for an unknown handle."""
        ...

    def list_since(self, created_after: datetime) -> AsyncIterator[list[Prediction]]:
        """Walk the account's predictions made at or after the moment, newest first, by page."""
        ...

    async def cancel(self, handle: str) -> None:
        """Ask for the end of a prediction.  Harmless when it is over already."""
        ...

    async def describe(self, model: str) -> ModelDescription:
        """Describe `owner/name` or `owner/name:version`.  Raise `ModelNotFound`."""
        ...

    async def upload(self, file: InputFile) -> ProvidedFile:
        """Have the provider keep a file for a while.  Costs nothing, so it may be repeated.

        Raise `InvalidRequest` when the file is too large for it.
        """
        ...

    def download(self, url: str) -> AsyncIterator[bytes]:
        """Stream one output file.  Raise `OutputError`s; never sends our token along."""
        ...

    async def ping(self) -> None:
        """Return when the provider answers an authenticated read."""
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...
