"""The HTTP contract of money: what was used, what it cost, what is left.

Dollars are texts, so that no client makes floating-point numbers of them.
"""

from __future__ import annotations

from datetime import date
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class UsageTotals(_Body):
    """What some finished jobs came to."""

    jobs: int = Field(description="Finished jobs; the next three add up to it.")
    completed: int
    failed: int
    cancelled: int
    outputs: int
    cost_usd: str | None = Field(
        description="What is known of the cost; null when that is nothing."
    )
    unpriced_jobs: int = Field(description="Jobs whose cost is not in `cost_usd`.")


class UsageRow(UsageTotals):
    """The jobs of one group: it has the members named in `by`."""

    day: date | None = Field(None, description="UTC day of the jobs' acceptance.")
    model: str | None = None
    key_id: UUID | None = Field(None, description="Null for jobs without a key.")
    owner: str | None = None


class BudgetPeriod(_Body):
    """How much of a UTC day's or month's budget is left."""

    limit_usd: str | None = Field(description="Null: no limit.")
    spent_usd: str
    reserved_usd: str = Field(description="Held for jobs that are not finished.")
    left_usd: str | None = Field(description="What new jobs may reserve.")


class BudgetStanding(_Body):
    """How the budgets of a key, or of the whole service, stand."""

    job_usd: str | None = Field(description="What one job may cost at worst.")
    day: BudgetPeriod
    month: BudgetPeriod


class Budgets(_Body):
    """The budgets that the next job counts in, as far as the caller may know them."""

    key: BudgetStanding | None = Field(description="Null for a caller without a key.")
    service: BudgetStanding | None = Field(description="Null but for administrators.")


class Usage(_Body):
    """Finished jobs, added up; and what budgets have left now."""

    model_config = ConfigDict(populate_by_name=True)

    from_day: date = Field(alias="from")
    to_day: date = Field(alias="to")
    by: list[str]
    rows: list[UsageRow] = Field(description="In the order of the groups.")
    has_more: bool = Field(
        description="There are more groups than are told; `totals` counts them too."
    )
    totals: UsageTotals
    budget: Budgets
