"""The provider refuses to sell, or is ill: jobs wait, say why, and start by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.stack import Stack
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

Env = Callable[..., dict[str, str]]

JOBS = 20


@pytest.fixture
def stack(tmp_path: Path, child_env: Env) -> Iterator[Stack]:
    """A running system whose provider takes no time."""
    with Stack(tmp_path, child_env, sandbox=("--speed", "instant")) as running:
        yield running


def figures(stack: Stack, name: str) -> dict[str, float]:
    """Give a metric's samples by their only label's value."""
    families = text_string_to_metric_families(stack.client.get("/metrics").text)
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def creates(stack: Stack) -> int:
    """Say how many requests to buy were sent so far."""
    families = text_string_to_metric_families(stack.client.get("/metrics").text)
    return int(
        sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "mgs_provider_requests_total"
            and sample.labels["operation"] == "create"
        )
    )


def provider(stack: Stack) -> dict[str, Any]:
    """Give the provider's health."""
    answer = stack.client.get("/api/v1/health")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()["components"]["provider"]
    return found


def wait_until_held_back(stack: Stack, code: str) -> None:
    """Wait until health and metrics say that purchases are held back, and why."""

    def is_held_back() -> bool:
        found = provider(stack)
        return bool(found["status"] == "degraded" and found["figures"].get("reason"))

    wait_for(is_held_back, within=10, what="health is degraded", every=0.1)
    found = provider(stack)
    assert found["figures"]["breaker"] in ("open", "half_open")
    assert found["figures"]["reason"] == code
    assert stack.client.get("/api/v1/health").json()["status"] == "degraded"
    states = figures(stack, "mgs_provider_breaker_state")
    assert states["closed"] == 0 and sum(states.values()) == 1

    def was_counted() -> bool:
        return figures(stack, "mgs_provider_breaker_opened_total").get(code) == 1

    wait_for(was_counted, within=5, what="the opening is counted", every=0.2)


def submit(stack: Stack, count: int) -> list[str]:
    return [stack.submit(prompt=f"mill {n}") for n in range(count)]


def wait_until_well(stack: Stack) -> None:
    """Wait until health says that purchases go through again."""

    def is_well() -> bool:
        return bool(stack.client.get("/api/v1/health").json()["status"] == "ok")

    wait_for(is_well, within=10, what="health is ok", every=0.2)
    assert figures(stack, "mgs_provider_breaker_state")["closed"] == 1


def pending(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [job for job in jobs if job["status"] == "pending"]


def test_without_credit_jobs_wait_and_nothing_is_burned(stack: Stack) -> None:
    stack.trouble({"fault": "create.no_credit"})
    first = stack.submit(prompt="the first")
    wait_until_held_back(stack, "provider_account")
    job_ids = [first, *submit(stack, JOBS)]

    jobs = stack.jobs(job_ids)
    waiting = pending(jobs)
    assert len(waiting) >= len(jobs) - 1  # all but a probe that is out just now
    for job in waiting:
        assert job["waiting_for"]["code"] == "provider_account"
        assert "credit" not in job["waiting_for"]["message"]
    assert all(job["attempts"] <= 1 for job in jobs)
    assert sum(job["attempts"] for job in jobs) <= 2
    assert creates(stack) <= 2  # the first, and a probe on a slow machine
    assert stack.purchases()["purchases"] == 0

    stack.heal()
    found = stack.finish(job_ids, within=60)

    assert {(job["status"], job["attempts"]) for job in found} == {("completed", 1)}
    assert {job["waiting_for"] is None for job in found} == {True}
    bought = stack.purchases()
    assert (bought["purchases"], bought["purchases_repeated"]) == (len(job_ids), 0)
    wait_until_well(stack)


def test_while_the_provider_is_ill_only_a_few_jobs_find_out(stack: Stack) -> None:
    stack.trouble({"fault": "create.error_before", "params": {"status": 503}})
    sent = [stack.submit(prompt=f"sent {n}") for n in range(5)]
    wait_until_held_back(stack, "provider_unavailable")
    job_ids = submit(stack, JOBS)

    jobs = stack.jobs(job_ids)
    codes = {job["waiting_for"]["code"] for job in pending(jobs)}
    assert codes == {"provider_unavailable"}
    assert sum(job["attempts"] for job in jobs) <= 1
    stack.heal()

    def done() -> list[dict[str, Any]] | None:
        # But for a probe of the ill time, whose fate the provider's list must tell first.
        found = [j for j in stack.jobs(job_ids) if j["status"] == "completed"]
        return found if len(found) >= JOBS - 1 else None

    completed = wait_for(done, within=40, what="the others complete", every=0.5)

    assert {job["attempts"] for job in completed} == {1}
    assert all(job["attempts"] == 1 for job in stack.jobs(sent))
    assert {job["status"] for job in stack.jobs(sent)} == {"processing"}
    assert stack.purchases()["purchases_repeated"] == 0
    wait_until_well(stack)
