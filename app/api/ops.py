"""Health for operators and load balancers, metrics for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from app import __version__
from app.api import problems
from app.api.deps import promptly, runtime_of
from app.api.guard import GuardedRoute, needs
from app.api.views import respond
from app.core import heartbeat
from app.core.circuit import Condition as Circuit
from app.core.counters import BUCKETS, Snapshot
from app.domain.access import Scope
from app.domain.errors import Unavailable
from app.models import schemas
from app.runtime import Runtime
from app.services import job_queries, notifications
from app.services.health import Condition, PartHealth, overall, pool_figures
from app.services.job_queries import LiveFigures
from app.services.usage import Money, service_money

health_router = APIRouter(
    prefix="/health", tags=["operations"], route_class=GuardedRoute
)
# Load balancers and supervisors have no key, and are told little.
probes_router = APIRouter(prefix="/health", tags=["operations"])
metrics_router = APIRouter(tags=["operations"], route_class=GuardedRoute)

FIGURES_LIFE = timedelta(seconds=5)

# Every metric: its kind and what it says.  Kept in Redis by all processes together, but for
# the gauges and the money, which are read from the tables (and this process's pool) at the scrape.
METRICS: Mapping[str, tuple[str, str]] = {
    "mgs_jobs": ("gauge", "Jobs by status."),
    "mgs_jobs_stage": ("gauge", "Live jobs by what they wait for."),
    "mgs_jobs_in_flight": ("gauge", "Jobs under way: sent, generating or storing."),
    "mgs_queue_depth": ("gauge", "Pending jobs."),
    "mgs_queue_oldest_age_seconds": (
        "gauge",
        "How long the oldest due job has been due.",
    ),
    "mgs_workers": ("gauge", "Workers that gave a sign of life lately."),
    "mgs_database_pool": ("gauge", "Connections of this process, by state."),
    "mgs_jobs_finished": ("counter", "Finished jobs by status and error code."),
    "mgs_job_phase_seconds": ("histogram", "Time in each phase of finished jobs."),
    "mgs_provider_requests": ("counter", "Requests to the provider."),
    "mgs_provider_request_seconds": ("histogram", "Time of requests to the provider."),
    "mgs_provider_breaker_state": (
        "gauge",
        "Whether purchases go through: 1 for the state that holds.",
    ),
    "mgs_provider_breaker_opened": (
        "counter",
        "How often purchases were held back, by reason.",
    ),
    "mgs_unknown_outcomes": (
        "counter",
        "Purchases nobody knew the outcome of at first.",
    ),
    "mgs_orphans_adopted": (
        "counter",
        "Purchases of unknown fate that were found, by what told of them.",
    ),
    "mgs_late_survivors": ("counter", "Purchases found after they were given up."),
    "mgs_unwanted_cancelled": (
        "counter",
        "Predictions nobody wanted that were cancelled at the provider.",
    ),
    "mgs_swept_pages": ("counter", "Pages of the provider's list that were read."),
    "mgs_swept_news": ("counter", "Predictions the list showed to be over."),
    "mgs_provider_webhooks": ("counter", "Webhooks of the provider, by what became."),
    "mgs_webhook_deliveries": ("counter", "Webhooks that were sent, by what became."),
    "mgs_webhook_queue_depth": ("gauge", "Webhooks that are to be sent, now or later."),
    "mgs_webhook_oldest_age_seconds": (
        "gauge",
        "How long the oldest due webhook has been due.",
    ),
    "mgs_claims_lost": ("counter", "Looks whose job somebody else had taken over."),
    "mgs_rate_limited": ("counter", "Requests refused for a limit, by its code."),
    "mgs_auth_failures": ("counter", "Wrong API keys."),
    "mgs_cost_usd": ("counter", "What finished jobs cost, as far as prices are known."),
    "mgs_reserved_usd": ("gauge", "What is held for jobs that are not finished."),
    "mgs_http_requests": ("counter", "Requests answered."),
    "mgs_http_request_seconds": ("histogram", "Time to answer."),
}


@health_router.get(
    "",
    response_model=schemas.Health,
    responses={
        503: {
            "model": schemas.Health,
            "description": "Not able to keep jobs; a problem when the key cannot be checked.",
            "content": problems.CONTENT,
        }
    },
    summary="How every part is",
)
@needs(Scope.MONITOR)
async def health(request: Request) -> Response:
    """Ask every part.  503 only when jobs cannot be accepted and kept."""
    return _tell(await runtime_of(request).health.everything())


@probes_router.get("/live", summary="Is the process alive")
async def live() -> Response:
    """Answer: nothing but this process is asked."""
    return respond({"status": "ok"})


@probes_router.get(
    "/ready",
    response_model=schemas.Health,
    responses={503: {"model": schemas.Health, "description": "Send no requests here."}},
    summary="Can jobs be accepted",
)
async def ready(request: Request) -> Response:
    """Ask the database, its migrations and the store: what accepting a job takes.

    A process that was asked to stop is not ready any more, whatever they say.
    """
    runtime = runtime_of(request)
    if runtime.stopping.is_set():
        parts = {"process": PartHealth(Condition.DOWN, detail="stopping")}
    else:
        parts = await runtime.health.essential()
    return _hint(parts) if runtime.gatekeeper.demands_keys else _tell(parts)


def _tell(parts: Mapping[str, PartHealth]) -> Response:
    components = {name: _part(part) for name, part in parts.items()}
    return _answer(overall(parts), {"components": components})


def _hint(parts: Mapping[str, PartHealth]) -> Response:
    """Say no more than whether jobs can be accepted: anybody may ask."""
    return _answer(overall(parts), {})


def _answer(condition: Condition, more: Mapping[str, Any]) -> Response:
    body = {"status": condition.value, "version": __version__, **more}
    return respond(body, 503 if condition is Condition.DOWN else 200)


def _part(part: PartHealth) -> dict[str, Any]:
    latency = None
    if part.latency is not None:
        latency = round(part.latency.total_seconds() * 1000, 2)
    return {
        "status": part.condition.value,
        "latency_ms": latency,
        "detail": part.detail,
        "figures": part.figures,
    }


# ---------------------------------------------------------------------------- metrics


@metrics_router.get(
    "/metrics", response_class=Response, summary="Figures for Prometheus"
)
@needs(Scope.MONITOR)
async def metrics(request: Request) -> Response:
    """Expose the figures of the whole deployment: any process gives the same answer."""
    runtime = runtime_of(request)
    figures = await _figures(request, runtime) | await _breaker(runtime)
    await runtime.counters.push()
    counted = await runtime.counters.read()
    registry = CollectorRegistry()
    registry.register(_Exposition(runtime, figures, counted))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


Gauges = dict[str, list[tuple[dict[str, str], float]]]


async def _figures(request: Request, runtime: Runtime) -> Gauges:
    """Read the gauges from the tables, at most every few seconds.

    What cannot be read is left out: a missing series is the truth, a zero would not be.
    """
    state = request.app.state
    known: tuple[float, Gauges] | None = getattr(state, "figures", None)
    if known and time.monotonic() - known[0] < FIGURES_LIFE.total_seconds():
        return known[1]
    gauges: Gauges = {}
    try:
        by_status, live, money, told = await promptly(_count(runtime))
    except Unavailable:
        return gauges
    queued = live.by_stage.get("queued", 0)
    in_flight = sum(live.by_stage.values()) - queued
    words = ("pending", "processing", "completed", "failed", "cancelled")
    gauges["mgs_jobs"] = [({"status": w}, by_status.get(w, 0)) for w in words]
    gauges["mgs_jobs_stage"] = [({"stage": s}, n) for s, n in live.by_stage.items()]
    gauges["mgs_jobs_in_flight"] = [({}, in_flight)]
    gauges["mgs_queue_depth"] = [({}, queued)]
    gauges["mgs_webhook_queue_depth"] = [({}, told[0])]
    gauges["mgs_webhook_oldest_age_seconds"] = [({}, told[1].total_seconds())]
    gauges["mgs_cost_usd"] = [({}, float(money.spent_usd))]
    gauges["mgs_reserved_usd"] = [({}, float(money.reserved_usd))]
    gauges["mgs_queue_oldest_age_seconds"] = [({}, live.overdue.total_seconds())]
    try:
        gauges["mgs_workers"] = [({}, len(await heartbeat.living(runtime.redis)))]
    except (RedisError, OSError, TimeoutError):
        gauges["mgs_workers"] = []
    state.figures = (time.monotonic(), gauges)
    return gauges


async def _breaker(runtime: Runtime) -> Gauges:
    state = await runtime.breaker.state()
    series = [({"state": one.value}, float(one is state.condition)) for one in Circuit]
    return {"mgs_provider_breaker_state": series}


async def _count(
    runtime: Runtime,
) -> tuple[dict[str, int], LiveFigures, Money, tuple[int, timedelta]]:
    async with runtime.ledger.reading() as conn:
        by_status = await job_queries.count_by_status(conn)
        live = await job_queries.live_figures(conn)
        told = await notifications.figures(conn)
        return by_status, live, await service_money(conn), told


class _Exposition(Collector):
    """One scrape's answer."""

    def __init__(self, runtime: Runtime, gauges: Gauges, counted: Snapshot) -> None:
        self._counted = counted
        pool = pool_figures(runtime.database)
        self._gauges = gauges | {
            "mgs_database_pool": [({"state": s}, float(n)) for s, n in pool.items()]
        }

    def collect(
        self,
    ) -> Iterator[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]:
        """Give every metric there is something to say about."""
        for name, (kind, text) in METRICS.items():
            if kind == "gauge":
                yield self._gauge(name, text)
            elif kind == "counter":
                yield self._counter(name, text)
            else:
                yield self._histogram(name, text)

    def _gauge(self, name: str, text: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text)
        for labels, value in self._gauges.get(name, ()):
            family.add_sample(name, labels, value)
        return family

    def _counter(self, name: str, text: str) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text)
        series = self._counted.counters.get(name.removeprefix("mgs_"), {})
        for labels, value in series.items():
            family.add_sample(f"{name}_total", dict(labels), value)
        for read, value in self._gauges.get(name, ()):
            family.add_sample(f"{name}_total", read, value)
        return family

    def _histogram(self, name: str, text: str) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, text)
        series = self._counted.histograms.get(name.removeprefix("mgs_"), {})
        bounds = [str(bound) for bound in BUCKETS] + ["+Inf"]
        for labels, found in series.items():
            seen = 0.0
            for bound, count in zip(bounds, found.counts, strict=True):
                seen += count
                sample = dict(labels) | {"le": bound}
                family.add_sample(f"{name}_bucket", sample, seen)
            family.add_sample(f"{name}_count", dict(labels), seen)
            family.add_sample(f"{name}_sum", dict(labels), found.total)
        return family
