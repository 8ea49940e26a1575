"""Who calls, what they may do, and how much of it.  Pure.

An *owner* is whom jobs, files and events belong to.  A *key* belongs to an owner and says what
its bearer may do; keys of one owner see the same jobs.  A *caller* is what a request came with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

DEFAULT_OWNER = "default"  # of everything while no keys are demanded


class Scope(StrEnum):
    """What a caller may do.  `admin` may everything, and sees every owner's jobs."""

    GENERATE = "generate"  # submit, cancel, retry and delete jobs; upload
    READ = "read"  # look at jobs, models, files and usage
    ADMIN = "admin"  # keys, audit, metrics; all owners
    MONITOR = "monitor"  # metrics and health; no key has it alone, METRICS_TOKEN does


GRANTABLE = (Scope.GENERATE, Scope.READ, Scope.ADMIN)  # what keys are made with


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a key may do; None means any amount.

    `models` are `owner/name`s, with or without a version: a name allows all its versions.
    `max_pixels` bounds the width times height of one output that is asked for.
    """

    requests_per_minute: int | None = None
    concurrent_jobs: int | None = None
    jobs_per_day: int | None = None
    models: frozenset[str] | None = None
    max_outputs: int | None = None
    max_pixels: int | None = None

    def allows_model(self, model: str) -> bool:
        """Tell whether a job may use the model."""
        if self.models is None:
            return True
        return model in self.models or model.partition(":")[0] in self.models


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent at worst, in dollars, UTC days and months; None means any amount."""

    job_usd: Decimal | None = None
    day_usd: Decimal | None = None
    month_usd: Decimal | None = None

    @property
    def applies(self) -> bool:
        """Tell whether there is anything it forbids."""
        return not (self.job_usd is self.day_usd is self.month_usd is None)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever makes a request.  `key_id` is None without a key and for the configured one."""

    owner: str = DEFAULT_OWNER
    key_id: UUID | None = None
    name: str = "anybody"  # for the audit log
    scopes: frozenset[Scope] = frozenset(Scope)
    limits: Limits = field(default_factory=Limits)
    budget: Budget = field(default_factory=Budget)

    @property
    def is_admin(self) -> bool:
        """Tell whether every owner's jobs are visible."""
        return Scope.ADMIN in self.scopes

    def may(self, scope: Scope) -> bool:
        """Tell whether the caller has the scope."""
        return scope in self.scopes or self.is_admin

    def sees(self, owner: str) -> bool:
        """Tell whether the caller may know of an owner's things."""
        return owner == self.owner or self.is_admin

    @property
    def realm(self) -> str | None:
        """Give the owner whose things alone are visible; None: everybody's."""
        return None if self.is_admin else self.owner


# While no keys are demanded, everybody is this one.
ANYBODY = Caller()
