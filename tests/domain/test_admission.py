from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.access import Budget, Limits
from app.domain.admission import Account, Terms, ban, objection, plain
from app.domain.errors import BudgetExceeded, OverLimit
from app.domain.generation import GenerationRequest

TODAY = date(2026, 11, 30)
NOW = datetime(2026, 11, 30, 22, 0, tzinfo=UTC)
ACCOUNT = Account(TODAY, 3, 5, Decimal("1.5"), Decimal("40"))
ONE = Decimal(1)


# -------------------------------------------------------------------------- the calendar


def test_a_new_day_begins_with_nothing_and_keeps_the_month() -> None:
    account = replace(ACCOUNT, day=date(2026, 11, 29)).on(TODAY)

    assert account == Account(TODAY, 3, 0, Decimal(0), Decimal("40"))


@pytest.mark.parametrize(
    "day", [date(2026, 10, 30), date(2025, 11, 30)], ids=["month", "year"]
)
def test_a_new_month_begins_with_nothing(day: date) -> None:
    account = replace(ACCOUNT, day=day).on(TODAY)

    assert account == Account(TODAY, 3)


def test_a_clock_that_went_back_changes_nothing() -> None:
    assert ACCOUNT.on(date(2026, 11, 29)) == ACCOUNT


# ---------------------------------------------------------------------------- objections


def judge(
    limits: Limits = Limits(), budget: Budget = Budget(), cost: Decimal | None = ONE
) -> OverLimit | BudgetExceeded | None:
    found = objection(Terms("key", limits, budget), ACCOUNT, cost, NOW)
    assert found is None or isinstance(found, OverLimit | BudgetExceeded)
    return found


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(concurrent_jobs=4, jobs_per_day=6), None),
        (Limits(concurrent_jobs=3), "too_many_jobs"),
        (Limits(concurrent_jobs=0), "too_many_jobs"),
        (Limits(jobs_per_day=5), "too_many_jobs_today"),
    ],
)
def test_jobs_are_counted(limits: Limits, code: str | None) -> None:
    found = judge(limits)

    assert (found and found.code) == code


def test_the_day_s_limit_says_when_the_next_day_begins() -> None:
    found = judge(Limits(jobs_per_day=1))

    assert isinstance(found, OverLimit)
    assert found.retry_after == timedelta(hours=2)


@pytest.mark.parametrize(
    ("budget", "period", "left"),
    [
        (Budget(ONE, Decimal("2.5"), Decimal(41)), None, None),
        (Budget(job_usd=Decimal("0.99")), "job", "0.99"),
        (Budget(day_usd=Decimal("2.499999")), "day", "0.999999"),
        (Budget(day_usd=Decimal("1.2")), "day", "0"),
        (Budget(month_usd=Decimal("40.5")), "month", "0.5"),
        (Budget(day_usd=Decimal(0)), "day", "0"),
    ],
)
def test_money_is_counted(budget: Budget, period: str | None, left: str | None) -> None:
    found = judge(budget=budget)

    facts = found.facts if isinstance(found, BudgetExceeded) else {}
    assert (facts.get("period"), facts.get("left_usd")) == (period, left)


def test_no_budget_holds_an_unknown_price() -> None:
    found = judge(budget=Budget(month_usd=Decimal(1_000_000)), cost=None)

    assert found is not None and found.code == "price_unknown"
    assert judge(cost=None) is None


@given(
    costs=st.lists(st.decimals(0, 5, places=6), max_size=30),
    limit=st.decimals(0, 20, places=6),
)
def test_what_is_accepted_never_exceeds_the_budget(
    costs: list[Decimal], limit: Decimal
) -> None:
    account, terms = Account(TODAY), Terms("key", budget=Budget(day_usd=limit))
    for cost in costs:
        before = account.day_usd
        if objection(terms, account, cost, NOW) is None:
            account = account.with_job(cost)
        else:
            assert before + cost > limit
    assert account.day_usd <= limit


# ---------------------------------------------------------------------------------- bans


def asked(**model_input: int | str) -> GenerationRequest:
    return GenerationRequest("acme/painter:7", {"prompt": "a", **model_input})


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(), None),
        (Limits(models=frozenset({"acme/painter"})), None),
        (Limits(models=frozenset({"acme/painter:7"})), None),
        (Limits(models=frozenset({"acme/painter:6"})), "model_not_allowed"),
        (Limits(models=frozenset({"acme/paint"})), "model_not_allowed"),
        (Limits(models=frozenset()), "model_not_allowed"),
        (Limits(max_outputs=2), None),
        (Limits(max_outputs=1), "too_many_outputs"),
        (Limits(max_pixels=512 * 256), None),
        (Limits(max_pixels=512 * 256 - 1), "too_large"),
    ],
)
def test_what_a_key_never_allows(limits: Limits, code: str | None) -> None:
    request = asked(width=512, height=256, size="custom")

    found = ban(limits, request, 2)

    assert (found and found.code) == code


@pytest.mark.parametrize(
    ("usd", "text"),
    [("0.030000", "0.03"), ("0", "0"), ("100", "100"), ("1E-6", "0.000001")],
)
def test_amounts_are_written_plainly(usd: str, text: str) -> None:
    assert plain(Decimal(usd)) == text
