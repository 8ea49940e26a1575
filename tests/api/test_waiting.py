"""What callers and operators see while purchases are held back."""

from __future__ import annotations

import pytest

from app.core.breaker import CircuitBreaker
from tests.api.served import Api
from tests.api.test_metrics import scrape, value

PROMPT = "a mill by the river"


def breaker_of(api: Api) -> CircuitBreaker:
    breaker: CircuitBreaker = api.app.state.runtime.breaker
    return breaker


async def hold_back(api: Api, reason: str) -> None:
    """Have purchases held back, as a worker's report would."""
    breaker = breaker_of(api)
    await breaker.report_trouble(breaker.turn, reason, is_fatal=True)


@pytest.mark.parametrize("reason", ["provider_account", "provider_unavailable"])
async def test_a_pending_job_says_what_it_waits_for_wherever_it_is_shown(
    api: Api, reason: str
) -> None:
    early = await api.generate(PROMPT)
    assert early.waiting_for is None
    await hold_back(api, reason)
    since = (await breaker_of(api).state()).since

    newborn = await api.generate(PROMPT)
    read = await api.job(early.job_id)
    page = (await api.client.get("/api/v1/jobs")).json()["items"]

    waiting = newborn.waiting_for
    assert waiting is not None and waiting.code == reason
    assert waiting.since == since
    assert read.waiting_for == waiting
    assert [job["waiting_for"]["code"] for job in page] == [reason, reason]
    for word in ("credit", "billing", "token", "account"):
        assert word not in waiting.message


async def test_what_it_waits_for_is_no_change_of_the_job(api: Api) -> None:
    job = await api.generate(PROMPT)
    path = f"/api/v1/status/{job.job_id}"
    etag = (await api.client.get(path)).headers["etag"]

    await hold_back(api, "provider_account")

    answer = await api.client.get(path, headers={"If-None-Match": etag})
    assert answer.status_code == 304
    assert (await api.job(job.job_id)).version == job.version


async def test_a_finished_job_waits_for_nothing(api: Api) -> None:
    job = await api.generate(PROMPT)
    await hold_back(api, "provider_account")

    answer = await api.client.post(f"/api/v1/jobs/{job.job_id}/cancel")

    assert answer.json()["waiting_for"] is None
    assert (await api.job(job.job_id)).waiting_for is None


async def test_a_reason_of_another_version_is_told_as_one_we_know(api: Api) -> None:
    await hold_back(api, "provider_on_strike")

    waiting = (await api.generate(PROMPT)).waiting_for

    assert waiting is not None and waiting.code == "provider_unavailable"


async def test_health_is_degraded_and_says_why(api: Api) -> None:
    _, before = await api.health()
    await hold_back(api, "provider_account")

    status, health = await api.health()

    assert before.components["provider"].figures["breaker"] == "closed"
    assert (status, health.status) == (200, "degraded")
    provider = health.components["provider"]
    assert provider.status == "degraded"
    assert "provider_account" in (provider.detail or "")
    figures = provider.figures
    assert (figures["breaker"], figures["reason"]) == ("open", "provider_account")
    assert figures["since"] < figures["retry_at"]


async def test_metrics_tell_the_state_and_count_the_openings(api: Api) -> None:
    name = "mgs_provider_breaker_state"
    found = await scrape(api)
    assert value(found, name, state="closed") == 1
    assert value(found, name) == 1

    await hold_back(api, "provider_account")

    found = await scrape(api)
    assert value(found, name, state="open") == 1
    assert value(found, name) == 1
    opened = "mgs_provider_breaker_opened_total"
    assert value(found, opened, reason="provider_account") == 1
