"""The HTTP contract: what callers send and what they get, with examples that work.

Knows nothing of the tables.  Unknown fields are refused: a misspelt one must not be
silently ignored when it costs money.
"""

from __future__ import annotations

import math
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
)

METADATA_LIMIT = 16 * 1024
PARAMETERS_LIMIT = 64 * 1024

StatusWord = Literal["pending", "processing", "completed", "failed", "cancelled"]
StageWord = Literal["queued", "submitting", "reconciling", "generating", "storing"]
PriorityWord = Literal["low", "normal", "high"]
ProvenanceWord = Literal["marked", "present", "credentials", "signed", "none"]
VisibilityWord = Literal["private", "public"]


def _storable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain the character U+0000")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def _http_url(text: str) -> str:
    if not text.startswith(("https://", "http://")):
        raise ValueError("must be an http:// or https:// URL")
    return text


def _plain_json(limit: int) -> AfterValidator:
    """Accept what JSON and PostgreSQL can both carry, up to a size."""

    def check(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        _refuse_odd(value)
        try:
            size = len(orjson.dumps(value))
        except TypeError:
            raise ValueError("has a number outside 64 bits") from None
        if size > limit:
            raise ValueError(f"must be at most {limit} bytes as JSON, not {size}")
        return value

    return AfterValidator(check)


def _refuse_odd(value: JsonValue) -> None:
    match value:
        case str():
            _storable(value)
        case float() if not math.isfinite(value):
            raise ValueError("must not contain NaN or Infinity")
        case dict():
            for key, item in value.items():
                _storable(key)
                _refuse_odd(item)
        case list():
            for item in value:
                _refuse_odd(item)
        case _:
            pass


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class GenerateRequest(_Body):
    """A picture to make."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {"prompt": "a lighthouse at dusk, gentle waves"},
                {
                    "prompt": "a red fox in the snow, morning light",
                    "model": "black-forest-labs/flux-schnell",
                    "aspect_ratio": "16:9",
                    "num_outputs": 2,
                    "output_format": "png",
                    "seed": 42,
                    "metadata": {"campaign": "winter"},
                },
            ]
        },
    )

    prompt: Annotated[str, AfterValidator(_storable), AfterValidator(_not_blank)] = (
        Field(
            min_length=1, max_length=10_000, description="What the picture should show."
        )
    )
    model: (
        Annotated[
            str,
            StringConstraints(
                max_length=300, pattern=r"^[\w.-]+/[\w.-]+(:[A-Za-z0-9._-]+)?$"
            ),
        ]
        | None
    ) = Field(
        None,
        description="`owner/name` or `owner/name:version`; default: DEFAULT_MODEL.",
    )
    negative_prompt: Annotated[str, AfterValidator(_storable)] | None = Field(
        None, max_length=10_000, description="What it should not show."
    )
    # Strict: "512" and 512.0 are no integers, as the schema says.
    width: int | None = Field(None, ge=16, le=8192, strict=True, description="Pixels.")
    height: int | None = Field(None, ge=16, le=8192, strict=True, description="Pixels.")
    aspect_ratio: (
        Annotated[str, StringConstraints(max_length=32), AfterValidator(_storable)]
        | None
    ) = Field(None, description="Such as `16:9`.")
    num_outputs: int = Field(
        1, ge=1, le=16, strict=True, description="How many pictures."
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=2**63 - 1,
        strict=True,
        description="Same seed, same input: same picture.",
    )
    output_format: Literal["png", "jpg", "jpeg", "webp", "avif"] | None = Field(
        None, description="File format, where the model lets one choose."
    )
    parameters: Annotated[dict[str, JsonValue], _plain_json(PARAMETERS_LIMIT)] = Field(
        default_factory=dict,
        description="The model's own inputs by their own names; see `GET /models`.",
    )
    webhook_url: (
        Annotated[
            str,
            StringConstraints(max_length=2048),
            AfterValidator(_storable),
            AfterValidator(_http_url),
        ]
        | None
    ) = Field(None, description="Where to tell about the job's end.")
    metadata: Annotated[dict[str, JsonValue], _plain_json(METADATA_LIMIT)] = Field(
        default_factory=dict, description="Yours; kept and returned; at most 16 KiB."
    )
    priority: PriorityWord = Field("normal", description="Place in the queue.")
    visibility: VisibilityWord | None = Field(
        None,
        description="Who may have the pictures: `public`, anybody who knows the address;"
        " `private`, your keys and signed links.  Default: `private` where keys are"
        " demanded.",
    )


class Thumbnails(_Body):
    """Addresses of small WebP pictures, by the square they fit into."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    small: str = Field(alias="256")
    large: str = Field(alias="768")


class Output(_Body):
    """One stored picture."""

    index: int
    url: str = Field(
        description="Where to get it.  A private file's works for a while: read the job"
        " again for a new one."
    )
    content_type: str
    size_bytes: int
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    sha256: str = Field(description="Of the file's bytes, hexadecimal.")
    thumbnails: Thumbnails = Field(
        description="Made when first asked for, if not before."
    )
    colour: str | None = Field(
        description="The mean one, as `#rrggbb`; null until it is known, some time after"
        " the end of the job. No part of `version`."
    )
    provenance: ProvenanceWord | None = Field(
        description="What the file says of its origin; null: from before that was noted."
    )


class JobError(_Body):
    """Why a job failed."""

    code: str = Field(description="Stable; switch on this.")
    message: str = Field(description="For people.")
    retryable: bool = Field(description="The same request may succeed later.")


class Waiting(_Body):
    """What keeps a pending job from starting."""

    code: Literal["provider_account", "provider_unavailable"] = Field(
        description="Stable; switch on this."
    )
    message: str = Field(description="For people.")
    since: datetime = Field(description="When it began.")


class Provider(_Body):
    """Who made the picture."""

    name: str
    prediction_id: str | None


class Timings(_Body):
    """Seconds spent so far in each phase; null where it has not been reached."""

    queued: float | None
    generating: float | None
    storing: float | None
    total: float | None


class Job(_Body):
    """A job as it stands."""

    job_id: UUID
    owner: str = Field(description="Whom it belongs to: all keys of this name see it.")
    visibility: VisibilityWord = Field(description="Who may have the pictures.")
    status: StatusWord
    stage: StageWord | None = Field(description="What a live job waits for.")
    waiting_for: Waiting | None = Field(
        description="Why a pending job cannot start yet, beyond its place in the queue; "
        "no part of `version`."
    )
    model: str
    prompt: str
    parameters: dict[str, Any] = Field(
        description="The model's input as really sent, seed included."
    )
    num_outputs: int
    progress: float | None = Field(description="0 to 1, where the model says.")
    attempts: int = Field(description="Purchases intended so far.")
    image_path: str | None = Field(
        description="URL path of the first output, with its query when it is private."
    )
    outputs: list[Output]
    warnings: list[str]
    error: JobError | None
    cost_usd: Decimal | None = Field(description="Null when unknown, never 0 instead.")
    provider: Provider
    timings: Timings
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    retry_of: UUID | None
    metadata: dict[str, Any]
    version: int = Field(
        description="Grows by one with every change; part of the ETag."
    )


class Cost(_Body):
    """What a job may cost, in dollars."""

    low_usd: Decimal = Field(description="The least a completed job costs.")
    high_usd: Decimal = Field(description="The worst case; this is what is reserved.")


class Queue(_Body):
    """How long the wait may be."""

    pending: int = Field(description="Jobs that wait to start.")
    starts_within_seconds: float = Field(
        description="At most, while the provider takes purchases as usual."
    )
    generates_in_seconds: float | None = Field(
        description="What the model's latest pictures took; null when there are none."
    )


class Estimate(_Body):
    """What `POST /generate` would do; nothing was accepted and nothing bought."""

    model: str
    parameters: dict[str, Any] = Field(
        description="The model's input as it would be sent; a seed is chosen anew each time."
    )
    num_outputs: int
    warnings: list[str]
    cost: Cost | None = Field(description="Null when the model's price is unknown.")
    queue: Queue


class JobPage(_Body):
    """Jobs, newest first."""

    items: list[Job]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page.")


class JobSelection(_Body):
    """Jobs to do something to."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [{"job_ids": ["019346a0-5b7e-7cc2-9c3e-000000000000"]}]
        },
    )

    job_ids: list[UUID] = Field(
        min_length=1, max_length=100, description="One named twice counts once."
    )


class JobResult(_Body):
    """What became of one job of a selection: an outcome, or an error."""

    job_id: UUID
    outcome: (
        Literal["cancelled", "cancelling", "unchanged", "accepted", "deleted"] | None
    ) = Field(
        description="`cancelling`: as soon as the provider agrees; `unchanged`: it was"
        " finished already; `accepted`: `new_job_id` is the new job."
    )
    new_job_id: UUID | None
    error: JobError | None = Field(description="Why nothing was done.")


class JobResults(_Body):
    """What became of the jobs of a selection, in its order."""

    results: list[JobResult]


class Price(_Body):
    """What a model costs: `usd` for each image, megapixel, or second of hardware."""

    basis: Literal["image", "megapixel", "second"]
    usd: str
    since: date = Field(description="The UTC day from which the price holds.")


class Upload(_Body):
    """A picture that was sent to us, for models to work on."""

    upload_id: UUID
    uri: str = Field(
        description="What to send as a model's input: `upload:<upload_id>`."
    )
    content_type: str
    size_bytes: int
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    sha256: str = Field(description="Of the file's bytes, hexadecimal.")
    created_at: datetime
    expires_at: datetime = Field(description="Kept until then; using it moves the end.")


class Model(_Body):
    """A model the service knows."""

    name: str
    description: str
    version: str | None
    input_schema: dict[str, Any] = Field(
        description="JSON Schema of the model's inputs."
    )
    price_per_output_usd: str | None = Field(
        description="Null when unknown, or not by the image."
    )
    price: Price | None = Field(description="Today's; null when unknown.")


class ModelList(_Body):
    """The catalogue.  Other models of the provider work too, by name."""

    default: str
    items: list[Model]


class Component(_Body):
    """One part's health."""

    status: Literal["ok", "degraded", "down"]
    latency_ms: float | None = None
    detail: str | None = None
    figures: dict[str, Any] = Field(default_factory=dict)


class Health(_Body):
    """The service's health: `down` when it cannot accept or keep jobs."""

    status: Literal["ok", "degraded", "down"]
    version: str
    components: dict[str, Component] = Field(
        default_factory=dict,
        description="Left out of `/health/ready` where keys are demanded.",
    )


class ErrorMember(_Body):
    """The same error in the shape SDKs of the OpenAI family read."""

    message: str
    type: str
    param: str | None
    code: str


class BudgetProblem(_Body):
    """Which budget a job does not fit into, and what is left of it."""

    budget: Literal["key", "service"]
    period: Literal["job", "day", "month"] | None = None
    needed_usd: Decimal | None = None
    limit_usd: Decimal | None = None
    left_usd: Decimal | None = None


class FieldProblem(_Body):
    """One thing wrong with the payload."""

    pointer: str = Field(description="JSON pointer into the body, or the parameter.")
    detail: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:mediagen:problem:not_found",
                    "title": "Not found",
                    "status": 404,
                    "detail": "There is no such job.",
                    "instance": "/api/v1/status/019346a0-5b7e-7cc2-9c3e-000000000000",
                    "code": "not_found",
                    "retryable": False,
                    "request_id": "5f0c1b7e",
                    "error": {
                        "message": "There is no such job.",
                        "type": "invalid_request_error",
                        "param": None,
                        "code": "not_found",
                    },
                }
            ]
        }
    )

    type: str = Field(description="Stable URI of the kind of problem.")
    title: str
    status: int
    detail: str
    instance: str
    code: str = Field(description="Stable; switch on this.")
    retryable: bool
    request_id: str
    error: ErrorMember
    errors: list[FieldProblem] | None = None
    budget: BudgetProblem | None = None
