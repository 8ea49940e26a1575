"""The figures of the deployment, whoever is asked."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from app.api.ops import METRICS
from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.served import Api, served, working

PROMPT = "a mill by the river"
EMPTY_WHEN_ALL_IS_WELL = {
    "mgs_unknown_outcomes",
    "mgs_orphans_adopted",
    "mgs_claims_lost",
    "mgs_provider_breaker_opened",
    "mgs_provider_webhooks",
    "mgs_webhook_deliveries",
    *("mgs_late_survivors", "mgs_unwanted_cancelled"),
    *("mgs_swept_pages", "mgs_swept_news"),
    *("mgs_rate_limited", "mgs_auth_failures"),
}


async def scrape(api: Api) -> Mapping[str, Metric]:
    answer = await api.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(answer.text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    return {family.name: family for family in families}


def value(found: Mapping[str, Metric], sample: str, **labels: str) -> float:
    """Add up the samples of this name that have these labels."""
    return sum(
        one.value
        for family in found.values()
        for one in family.samples
        if one.name == sample and labels.items() <= one.labels.items()
    )


async def test_every_metric_is_there_after_a_job(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox)
    async with working(api.settings):
        await api.finished((await api.generate(PROMPT)).job_id)
    # The worker has ended: what it counted is still there.

    found = await scrape(api)

    assert set(found) == set(METRICS)
    for name, (kind, text) in METRICS.items():
        assert (found[name].type, found[name].documentation) == (kind, text)
        if name not in EMPTY_WHEN_ALL_IS_WELL | {"mgs_workers", "mgs_jobs_stage"}:
            assert found[name].samples, name
    assert value(found, "mgs_jobs", status="completed") == 1
    assert value(found, "mgs_jobs") == 1
    assert value(found, "mgs_jobs_finished_total", status="completed") == 1
    for phase in ("queue", "generate", "store", "total"):
        assert value(found, "mgs_job_phase_seconds_count", phase=phase) == 1
        assert value(found, "mgs_job_phase_seconds_sum", phase=phase) >= 0
    for operation in ("create", "download"):
        assert value(found, "mgs_provider_requests_total", operation=operation) == 1
    assert value(found, "mgs_queue_depth") == 0
    assert value(found, "mgs_jobs_in_flight") == 0


async def test_histograms_grow_from_bucket_to_bucket(api: Api) -> None:
    for _ in range(3):
        await api.listed()

    family = (await scrape(api))["mgs_http_request_seconds"]

    series = [s for s in family.samples if s.labels.get("route") == "/api/v1/jobs"]
    buckets = [s.value for s in series if s.name.endswith("_bucket")]
    bounds = [float(s.labels["le"]) for s in series if s.name.endswith("_bucket")]
    assert bounds == sorted(bounds) and bounds[-1] == float("inf")
    assert buckets == sorted(buckets) and buckets[-1] == 3
    assert [s.value for s in series if s.name.endswith("_count")] == [3]


async def test_live_jobs_are_counted_by_what_they_wait_for(api: Api) -> None:
    for number in range(3):
        await api.generate(f"mill number {number} by the river")

    found = await scrape(api)

    assert value(found, "mgs_jobs", status="pending") == 3
    assert value(found, "mgs_jobs_stage", stage="queued") == 3
    assert value(found, "mgs_queue_depth") == 3
    assert value(found, "mgs_jobs_in_flight") == 0
    assert value(found, "mgs_queue_oldest_age_seconds") > 0


async def test_a_cancelled_job_is_a_finished_job(api: Api) -> None:
    job_id = (await api.generate(PROMPT)).job_id
    for _ in range(2):
        await api.client.post(f"/api/v1/jobs/{job_id}/cancel")

    found = await scrape(api)

    assert value(found, "mgs_jobs_finished_total", status="cancelled") == 1


async def test_two_processes_tell_the_same_figures(
    serve: Serve, sandbox: Sandbox
) -> None:
    first, second = [await serve(sandbox), await serve(sandbox)]
    await first.generate(PROMPT)
    await second.generate(PROMPT)
    await first.listed()

    await scrape(first)
    one, other = await scrape(first), await scrape(second)

    for name in ("mgs_jobs", "mgs_jobs_stage", "mgs_queue_depth", "mgs_workers"):
        assert one[name].samples == other[name].samples
    assert value(other, "mgs_http_requests_total", route="/api/v1/generate") == 2
    assert value(other, "mgs_http_requests_total", route="/api/v1/jobs") == 1


async def test_counters_survive_the_process_that_counted(
    api: Api, sandbox: Sandbox
) -> None:
    async with served(api.settings) as short_lived:
        for _ in range(4):
            await short_lived.listed()

    found = await scrape(api)

    assert value(found, "mgs_http_requests_total", route="/api/v1/jobs") == 4


async def test_a_wiped_redis_costs_counts_and_nothing_else(
    api: Api, redis_url: str
) -> None:
    await api.generate(PROMPT)
    await scrape(api)
    async with Redis.from_url(redis_url) as redis:
        await redis.flushall()

    found = await scrape(api)

    assert set(found) == set(METRICS)
    assert value(found, "mgs_jobs", status="pending") == 1
    assert value(found, "mgs_http_requests_total", route="/api/v1/generate") == 0


async def test_routes_are_templates_and_methods_are_words(api: Api) -> None:
    """A label a caller can invent is a way to fill the memory of the monitoring."""
    job_id = (await api.generate(PROMPT)).job_id
    await api.job(job_id)
    await api.client.post(f"/api/v1/jobs/{job_id}/cancel")
    await api.client.get(f"/media/ab/ab{'0' * 62}.png")
    await api.client.get("/static/robots.txt")
    await api.health()
    for number in range(3):
        await api.client.get(f"/invented/{number}")
    async with httpx.AsyncClient(base_url=api.origin) as client:
        for method in ("PROPFIND", "REPORT", "MKCALENDAR"):
            await client.request(method, "/api/v1/generate")

    found = await scrape(api)

    requests = found["mgs_http_requests"].samples
    routes = {one.labels["route"] for one in requests}
    assert {
        *("/api/v1/generate", "/api/v1/status/{job_id}"),
        *("/api/v1/health", "/api/v1/jobs/{job_id}/cancel"),
        *("/media/{key}", "unmatched"),
    } <= routes
    assert not [route for route in routes if str(job_id) in route or "inv" in route]
    assert all(route.startswith("/") or route == "unmatched" for route in routes)
    methods = {one.labels["method"] for one in requests}
    assert methods <= {"GET", "POST", "any", "other"}
    assert value(found, "mgs_http_requests_total", code="202") == 1
    for family in found.values():
        for sample in family.samples:
            assert str(job_id) not in "".join(sample.labels.values())
