"""The HTTP contract of keys and of the audit log; see `schemas.py`."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
)

OWNER_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_MANY = 1_000_000_000

ScopeWord = Literal["generate", "read", "admin"]


def within_the_calendar(moment: datetime) -> datetime:
    """Refuse what arithmetic with time zones would overflow at."""
    if not 1970 < moment.year < 9999:
        raise ValueError("must be between the years 1971 and 9998")
    return moment.astimezone(UTC)


def _each_once(words: list[str]) -> list[str]:
    if len(set(words)) < len(words):
        raise ValueError("must not name anything twice")
    return words


OwnerName = Annotated[str, StringConstraints(pattern=OWNER_PATTERN)]
KeyName = Annotated[
    str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")
]
Scopes = Annotated[
    list[ScopeWord], Field(min_length=1, max_length=3), AfterValidator(_each_once)
]
Expiry = Annotated[AwareDatetime, AfterValidator(within_the_calendar)]
ModelName = Annotated[
    str,
    StringConstraints(max_length=300, pattern=r"^[\w.-]+/[\w.-]+(:[A-Za-z0-9._-]+)?$"),
]
Models = Annotated[
    list[ModelName], Field(min_length=1, max_length=100), AfterValidator(_each_once)
]
Count = Annotated[int, Field(ge=1, le=_MANY)]
Dollars = Annotated[Decimal, Field(ge=0, max_digits=14, decimal_places=6)]
Weight = Annotated[int, Field(ge=1, le=1000)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Limits(_Body):
    """How much a key may do; null: any amount."""

    requests_per_minute: Count | None = Field(
        None, description="Requests a minute, of any kind."
    )
    concurrent_jobs: Count | None = Field(
        None, description="Jobs that are not finished, at once."
    )
    jobs_per_day: Count | None = Field(None, description="Jobs in a UTC day.")
    models: Models | None = Field(
        None, description="`owner/name`s that may be used; a name allows all versions."
    )
    max_outputs: Annotated[int, Field(ge=1, le=16)] | None = Field(
        None, description="Pictures in one job."
    )
    max_pixels: Count | None = Field(
        None, description="Width times height of one picture."
    )


class Budget(_Body):
    """What a key may spend at worst, in dollars, as decimal text; null: any amount."""

    job_usd: Dollars | None = Field(None, description="On one job.")
    day_usd: Dollars | None = Field(None, description="In a UTC day.")
    month_usd: Dollars | None = Field(None, description="In a UTC month.")


class KeyBudget(_Body):
    """What a key may spend at worst, in dollars; null: any amount."""

    job_usd: Decimal | None
    day_usd: Decimal | None
    month_usd: Decimal | None


class KeyRequest(_Body):
    """A key to make."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {"name": "gallery", "owner": "acme"},
                {
                    "name": "intern",
                    "owner": "acme",
                    "scopes": ["generate", "read"],
                    "limits": {"concurrent_jobs": 2, "max_outputs": 1},
                    "budget": {"day_usd": "0.50"},
                    "weight": 10,
                },
            ]
        },
    )

    name: KeyName = Field("unnamed", description="What it is for; shown to people.")
    owner: OwnerName = Field(
        "default", description="Whom its jobs and files belong to."
    )
    scopes: Scopes = Field(
        default=["generate", "read"], description="What it may do: see docs/access.md."
    )
    expires_at: Expiry | None = Field(
        None, description="From then on it is refused; null: never."
    )
    limits: Limits = Field(default_factory=Limits)
    budget: Budget = Field(default_factory=Budget)
    weight: Weight | None = Field(
        None, description="The owner's share when owners compete; null: as it is, or 1."
    )


def _left_as_it_is(description: str | None = None) -> Any:
    """Make a field that may be left out, which is no value: null is refused."""
    return Field(
        default=None,
        description=description,
        json_schema_extra=lambda schema: schema.pop("default", None),
    )


class KeyChange(_Body):
    """What is to be different about a key; what is left out stays, null takes a bound away."""

    name: KeyName = _left_as_it_is()
    scopes: Scopes = _left_as_it_is()
    expires_at: Expiry | None = None
    limits: Limits = _left_as_it_is()
    budget: Budget = _left_as_it_is()
    weight: Weight = _left_as_it_is("The owner's, of all its keys.")


class Key(_Body):
    """A key as it is kept: never the key itself."""

    key_id: UUID
    name: str
    owner: str
    prefix: str = Field(description="The beginning of the key, to tell it by.")
    scopes: list[ScopeWord]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")
    limits: Limits
    budget: KeyBudget
    weight: int = Field(description="The owner's share when owners compete.")


class NewKey(Key):
    """A key just made: the only answer that has the key itself."""

    key: str = Field(description="Shown this once; send it as `Authorization: Bearer`.")


class KeyPage(_Body):
    """Keys, newest first."""

    items: list[Key]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page.")


class AuditEvent(_Body):
    """One thing an administrator did."""

    id: int
    at: datetime
    actor: str = Field(description="`key:` and a key's id, or `ADMIN_API_KEY`.")
    action: str = Field(description="Such as `key.created`.")
    target: str = Field(description="What it was done to.")
    details: dict[str, Any]
    address: str | None = Field(description="Where the request came from.")
    request_id: str | None


class AuditPage(_Body):
    """What administrators did, newest first."""

    items: list[AuditEvent]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page.")
