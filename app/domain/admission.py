"""May one more job be accepted?  Pure: an account as it stands, and what its rules say.

An *account* is what a key, or the whole service, holds and has spent.  What a job may cost at
worst is held from its acceptance to its end, so that jobs accepted at the same moment cannot
together spend more than there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal

from app.domain.access import Budget, Limits
from app.domain.errors import BudgetExceeded, Forbidden, OverLimit, ServiceError
from app.domain.generation import GenerationRequest
from app.domain.pricing import size_of

SERVICE = "service"  # the account of all jobs together
_SOON = timedelta(seconds=5)
_NOTHING = Decimal(0)


@dataclass(frozen=True, slots=True)
class Account:
    """How an account stands on a UTC day: `*_usd` are what is held and what was spent."""

    day: date
    live: int = 0
    day_jobs: int = 0
    day_usd: Decimal = _NOTHING
    month_usd: Decimal = _NOTHING

    def on(self, today: date) -> Account:
        """Give the account as it stands today: a new day or month begins with nothing."""
        if today <= self.day:
            return self
        is_same_month = (today.year, today.month) == (self.day.year, self.day.month)
        month_usd = self.month_usd if is_same_month else _NOTHING
        return Account(today, self.live, 0, _NOTHING, month_usd)

    def with_job(self, cost: Decimal | None) -> Account:
        """Give the account with one more job that costs that much at worst."""
        usd = cost or _NOTHING
        return replace(
            self,
            live=self.live + 1,
            day_jobs=self.day_jobs + 1,
            day_usd=self.day_usd + usd,
            month_usd=self.month_usd + usd,
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """What one account allows.  `name` is what callers are told: `key` or `service`."""

    name: str
    limits: Limits = Limits()
    budget: Budget = Budget()
    is_told: bool = True  # whether a caller may know the figures

    @property
    def applies(self) -> bool:
        """Tell whether the account must be looked at before a job is accepted."""
        limits = self.limits
        counts = (limits.concurrent_jobs, limits.jobs_per_day)
        return self.budget.applies or any(one is not None for one in counts)


def ban(limits: Limits, request: GenerationRequest, outputs: int) -> Forbidden | None:
    """Say what about a request its key never allows; None when it is allowed."""
    if not limits.allows_model(request.model):
        allowed = ", ".join(sorted(limits.models or ()))
        return Forbidden(
            f"This key may not use {request.model}; it may use: {allowed or 'none'}.",
            field="model",
            code="model_not_allowed",
        )
    if limits.max_outputs is not None and outputs > limits.max_outputs:
        return Forbidden(
            f"This key may ask for {limits.max_outputs} outputs at once, not {outputs}.",
            field="num_outputs",
            code="too_many_outputs",
        )
    if limits.max_pixels is None:
        return None
    size = size_of(request.input, None)
    if size is not None and size.least > limits.max_pixels:
        return Forbidden(
            f"This key may ask for {limits.max_pixels} pixels an output, not {size.least}.",
            field="width",
            code="too_large",
        )
    return None


def objection(
    terms: Terms, account: Account, cost: Decimal | None, now: datetime
) -> ServiceError | None:
    """Say why one more job must not be accepted; None when it may.

    `cost` is what it costs at worst, None when its price is unknown: then no budget can hold
    it.  `account` stands as it does at `now`.
    """
    limits = terms.limits
    if limits.concurrent_jobs is not None and account.live >= limits.concurrent_jobs:
        return OverLimit(
            f"{account.live} jobs of this {terms.name} are not finished, and"
            f" {limits.concurrent_jobs} may be.",
            retry_after=_SOON,
            code="too_many_jobs",
        )
    if limits.jobs_per_day is not None and account.day_jobs >= limits.jobs_per_day:
        return OverLimit(
            f"This {terms.name} has had its {limits.jobs_per_day} jobs of the day (UTC).",
            retry_after=_until_tomorrow(now),
            code="too_many_jobs_today",
        )
    return _over_budget(terms, account, cost)


def _over_budget(
    terms: Terms, account: Account, cost: Decimal | None
) -> BudgetExceeded | None:
    budget = terms.budget
    if not budget.applies:
        return None
    if cost is None:
        return BudgetExceeded(
            f"The {terms.name} has a budget, and the model's price is unknown: choose another"
            " model, or have its price added (PRICE_FILE).",
            {"budget": terms.name},
            code="price_unknown",
        )
    periods = (
        ("job", budget.job_usd, _NOTHING),
        ("day", budget.day_usd, account.day_usd),
        ("month", budget.month_usd, account.month_usd),
    )
    for period, limit, used in periods:
        if limit is not None and used + cost > limit:
            return _refusal(terms, period, limit, max(limit - used, _NOTHING), cost)
    return None


def _refusal(
    terms: Terms, period: str, limit: Decimal, left: Decimal, cost: Decimal
) -> BudgetExceeded:
    facts = {"budget": terms.name, "period": period, "needed_usd": plain(cost)}
    text = f"The job may cost up to ${plain(cost)}"
    if terms.is_told:
        facts |= {"limit_usd": plain(limit), "left_usd": plain(left)}
        text += f", and the {terms.name}'s budget per {period} has ${plain(left)} left"
    else:
        text += f", more than the {terms.name}'s budget per {period} has left"
    return BudgetExceeded(text + ".", facts)


def plain(usd: Decimal) -> str:
    """Write an amount of dollars without an exponent and without needless zeros."""
    text = f"{usd:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _until_tomorrow(now: datetime) -> timedelta:
    today = now.astimezone(UTC)
    tomorrow = datetime.combine(today.date(), time(), UTC) + timedelta(days=1)
    return tomorrow - today
