"""The HTTP contract of webhooks out; see `schemas.py`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
)

from app.models.key_schemas import within_the_calendar

EventWord = Literal[
    "job.created", "job.started", "job.completed", "job.failed", "job.cancelled"
]
StateWord = Literal["pending", "delivered", "failed", "dropped"]


def _each_once(words: list[EventWord]) -> list[EventWord]:
    if len(set(words)) < len(words):
        raise ValueError("must not name anything twice")
    return words


URL = Annotated[
    str, StringConstraints(min_length=1, max_length=2048, pattern=r"^https?://[!-~]+$")
]
Events = Annotated[list[EventWord], Field(max_length=5), AfterValidator(_each_once)]
Description = Annotated[
    str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")
]
When = Annotated[AwareDatetime, AfterValidator(within_the_calendar)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class EndpointRequest(_Body):
    """A receiver to register."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {"url": "https://example.com/hooks/pictures"},
                {
                    "url": "https://example.com/hooks/ends",
                    "events": ["job.completed", "job.failed", "job.cancelled"],
                    "description": "the shop",
                },
            ]
        },
    )

    url: URL = Field(description="https, of a public host; see docs/inputs.md.")
    events: Events = Field(
        default_factory=list, description="What to tell of; empty: everything."
    )
    description: Description = Field("", description="What it is for; for people.")


def _left_as_it_is(description: str | None = None) -> Any:
    """Make a field that may be left out, which is no value: null is refused."""
    return Field(
        default=None,
        description=description,
        json_schema_extra=lambda schema: schema.pop("default", None),
    )


class EndpointChange(_Body):
    """What is to be different about an endpoint; what is left out stays."""

    url: URL = _left_as_it_is("What is pending goes to the new one.")
    events: Events = _left_as_it_is("Empty: everything.")
    description: Description = _left_as_it_is()
    enabled: StrictBool = _left_as_it_is("Switched off, what is pending is dropped.")


class Endpoint(_Body):
    """A registered receiver."""

    endpoint_id: UUID
    owner: str
    url: str
    description: str
    events: list[str] = Field(description="What it is told of; empty: everything.")
    enabled: bool
    disabled_reason: str | None = Field(
        description="Why it was switched off, when nobody did so on purpose."
    )
    failing_since: datetime | None = Field(
        description="When the tries began to fail that no success followed."
    )
    previous_secret_until: datetime | None = Field(
        description="Until then the secret before signs too."
    )
    created_at: datetime


class NewEndpoint(Endpoint):
    """An endpoint just registered, or with a new secret."""

    secret: str = Field(description="`whsec_…`: check signatures with it.")


class EndpointPage(_Body):
    """Endpoints, newest first."""

    items: list[Endpoint]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page.")


class Secrets(_Body):
    """What signs; check signatures with the first one."""

    secret: str = Field(description="`whsec_…`")
    also_valid: list[str] = Field(description="What signs as well, for a while.")


class Try(_Body):
    """One call of a receiver."""

    number: int
    at: datetime
    seconds: float
    status_code: int | None = Field(description="null: there was no answer.")
    error: str | None = Field(description="Why it does not count, in words.")


class Delivery(_Body):
    """One webhook for one receiver, and how it went."""

    delivery_id: UUID
    webhook_id: str = Field(description="The `webhook-id` it has with every try.")
    owner: str
    endpoint_id: UUID | None = Field(description="null: it goes to the job's own URL.")
    url: str | None = Field(description="Where it goes; null: the endpoint is gone.")
    type: str = Field(description="Such as `job.completed`, or `webhook.test`.")
    job_id: UUID | None
    job_version: int | None
    state: StateWord = Field(
        description="`failed`: all tries did; `dropped`: the endpoint was switched off,"
        " removed, or said it is gone."
    )
    attempts: int = Field(description="Tries that were begun.")
    next_try_at: datetime | None = Field(description="null also while it is sent.")
    created_at: datetime
    finished_at: datetime | None
    tries: list[Try] = Field(description="The latest 50 that came to an end.")


class DeliveryPage(_Body):
    """Webhooks, newest first."""

    items: list[Delivery]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page.")


class RangeRequest(_Body):
    """What to send again: what an endpoint was to be told in a time and was not."""

    since: When = Field(description="When the first of it happened.")
    until: When | None = Field(None, description="Before when; null: until now.")
    all: StrictBool = Field(False, description="Also what was delivered.")


class Redelivered(_Body):
    """How much is sent again."""

    count: int
    next_since: datetime | None = Field(
        description="Not null: there is more; go on with it as `since`."
    )
