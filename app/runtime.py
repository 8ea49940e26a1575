"""The parts every process has, built from settings once, opened and closed together.

What only the worker runs is added by `worker_runtime`.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import structlog
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.breaker import CircuitBreaker
from app.core.config import Settings, refuse_to_start
from app.core.counters import SharedCounters
from app.core.database import close_engine, open_engine
from app.core.hints import Hints
from app.core.links import LinkSigner, derived_key
from app.core.lifeline import Lifeline
from app.core.patience import within
from app.core.queue import Bell, publisher_app
from app.core.quota import Quotas
from app.core.recall import Recall
from app.domain.access import Budget
from app.domain.generation import MediaClient
from app.domain.policy import Policy, RetryPolicy
from app.domain.pricing import PriceTable
from app.domain.state import JobState
from app.services.backlog import Backlog
from app.services.attempts import FailedAttempts
from app.services.catalogue import Catalogue, load_bundled_models
from app.services.gatekeeper import Gatekeeper
from app.services.health import HealthChecks
from app.services.inputs import Inputs
from app.services.ledger import Ledger
from app.services.live import Live
from app.services.letters import OwnerSecrets
from app.services.media_client import Throttle, open_breaker, open_media_client
from app.services.media_links import MediaLinks
from app.services.media_store import MediaStore, open_media_store
from app.services.prices import UnusablePrices, load_prices
from app.services.operations import Operations
from app.services.outbound import Outbound
from app.services.pausing import Obstacle, Pausing
from app.services.thumbnails import Thumbnails
from app.services.uploads import Uploads
from app.services.webhook_inbox import MEMORY, WebhookInbox
from app.services.webhook_signatures import SignatureCheck, SigningSecret

log = structlog.get_logger("app.runtime")

ADVANCE_TASK = "mediagen.advance_job"
EVENTS_CHANNEL = "mediagen:events"
CATALOGUE_TTL = timedelta(hours=1)
REDIS_TIMEOUT = 0.5  # seconds
LINK_SLACK = timedelta(hours=1)  # a model may read its input late
API_POOL = 10
MOST_CALLS = 96  # at once, to addresses that callers named
LONGEST_CLOSE = timedelta(seconds=6)  # of one part


@dataclass(frozen=True, slots=True)
class Runtime:
    """What every process has: the tables, the bell, the provider, the store."""

    settings: Settings
    database: AsyncEngine
    redis: Redis
    ledger: Ledger
    bell: Bell
    client: MediaClient
    catalogue: Catalogue
    store: MediaStore
    links: MediaLinks
    counters: SharedCounters
    throttle: Throttle
    breaker: CircuitBreaker
    health: HealthChecks
    inbox: WebhookInbox
    gatekeeper: Gatekeeper
    backlog: Backlog
    pausing: Pausing
    operations: Operations
    prices: PriceTable
    quotas: Quotas
    outbound: Outbound
    uploads: Uploads
    inputs: Inputs
    live: Live
    owner_secrets: OwnerSecrets
    thumbnails: Thumbnails
    # Set when the process was asked to stop: whoever waits on purpose answers now.
    stopping: asyncio.Event

    async def obstacle(self) -> Obstacle:
        """Say what keeps pending jobs from starting.  Never raises, and is cheap to ask."""
        queue = await self.pausing.state()
        if queue.is_paused:
            return Obstacle("paused", queue.since)
        breaker = await self.breaker.state()
        return Obstacle(breaker.reason, breaker.since)


def policy_of(settings: Settings) -> Policy:
    """Give the figures decisions use."""
    retry = RetryPolicy(
        max_retries=settings.max_retries, base=settings.retry_backoff_base
    )
    return Policy(retry=retry)


def signing_keys_of(settings: Settings) -> list[bytes]:
    """Give the keys that sign links, and that owners' webhook secrets are derived from."""
    keys = [key.get_secret_value().encode() for key in settings.media_signing_keys]
    if not keys:
        keys = [derived_key(settings.replicate_api_token.get_secret_value())]
    return keys


def links_of(settings: Settings) -> MediaLinks:
    """Give what makes and checks the addresses of files; the same in every process."""
    lifetime = timedelta(seconds=settings.media_link_seconds)
    return MediaLinks(
        LinkSigner(signing_keys_of(settings), lifetime),
        public_base_url=settings.public_base_url,
        is_guarded=settings.demands_keys,
    )


def budget_of(settings: Settings) -> Budget:
    """Give what all jobs together may cost."""
    return Budget(
        job_usd=settings.budget_job_usd,
        day_usd=settings.budget_day_usd,
        month_usd=settings.budget_month_usd,
    )


def prices_of(settings: Settings) -> PriceTable:
    """Give the prices that apply; a wrong PRICE_FILE ends the process with one clear line.

    Nothing is known of a provider that is not Replicate, unless the file says so.
    """
    if not settings.buys_from_replicate and settings.price_file is None:
        return PriceTable((), "none")
    try:
        return load_prices(settings.price_file)
    except UnusablePrices as error:
        refuse_to_start("price_file", f"{error}: see docs/money.md")


def _open_gatekeeper(
    settings: Settings,
    stack: AsyncExitStack,
    redis: Redis,
    ledger: Ledger,
    counters: SharedCounters,
) -> tuple[Gatekeeper, Quotas]:
    """Give who finds out who calls, and who counts how often."""
    lifeline = Lifeline(redis)
    quotas, failures = (Quotas(redis, lifeline=lifeline) for _ in range(2))
    note = partial(counters.add, "auth_failures")
    admin_key, token = settings.admin_api_key, settings.metrics_token
    gatekeeper = Gatekeeper(
        ledger,
        demands_keys=settings.demands_keys,
        attempts=FailedAttempts(failures, on_failure=note),
        admin_key=admin_key.get_secret_value() if admin_key else None,
        metrics_token=token.get_secret_value() if token else None,
    )
    for part in (lifeline, quotas, failures, gatekeeper):
        stack.push_async_callback(_in_time, part.aclose)
    return gatekeeper, quotas


def _open_inputs(
    settings: Settings,
    outbound: Outbound,
    uploads: Uploads,
    store: MediaStore,
    client: MediaClient,
    links: MediaLinks,
) -> Inputs:
    return Inputs(
        uploads=uploads,
        store=store,
        client=client,
        outbound=outbound,
        # Where the provider cannot reach us, files are sent to it instead.
        link_of=links.link_of if settings.callback_base_url else _no_link,
        lifetime=settings.job_deadline + LINK_SLACK,
    )


def _open_inbox(
    settings: Settings,
    stack: AsyncExitStack,
    redis: Redis,
    ledger: Ledger,
    ask_secret: Callable[[], Awaitable[str]],
) -> WebhookInbox:
    given = settings.replicate_webhook_secret
    secret = SigningSecret(given.get_secret_value() if given else None, ask_secret)
    stack.push_async_callback(_in_time, secret.aclose)
    return WebhookInbox(
        ledger=ledger,
        signatures=SignatureCheck(secret),
        seen=Recall(redis, "webhooks", lifetime=MEMORY),
    )


def _open_redis(settings: Settings) -> Redis:
    return Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=REDIS_TIMEOUT,
        socket_connect_timeout=REDIS_TIMEOUT,
        health_check_interval=15,
        max_connections=50,
    )


async def _in_time(close: Callable[..., Awaitable[None]], *what: object) -> None:
    """Close a part; one that does not let itself be closed must not keep the others."""
    try:
        await within(LONGEST_CLOSE, _closed(close, *what))
    except TimeoutError:
        log.error("runtime.part_left_open", part=close.__qualname__)


async def _closed(close: Callable[..., Awaitable[None]], *what: object) -> None:
    await close(*what)


def settle_memory() -> None:
    """Take what was loaded at start out of the garbage collector's rounds.

    It never becomes garbage, and walking through it costs a pause of about 100 ms each time.
    """
    gc.collect()
    gc.freeze()


@asynccontextmanager
async def open_runtime(
    settings: Settings,
    *,
    name: str = "mediagen-api",
    pool_size: int = API_POOL,
    session: dict[str, str] | None = None,
) -> AsyncIterator[Runtime]:
    """Build the parts in the running loop; close them in reverse order.

    Nothing is connected yet: a process starts, and says so in its health, whatever is down.
    """
    prices = prices_of(settings)
    async with AsyncExitStack() as stack:
        database = open_engine(
            settings.database_url,
            name=name,
            pool_size=pool_size,
            settings=session,
        )
        stack.push_async_callback(_in_time, close_engine, database)
        redis = _open_redis(settings)
        stack.push_async_callback(_in_time, redis.aclose)
        counters = SharedCounters(redis)
        counters.start()
        stack.push_async_callback(_in_time, counters.stop)
        throttle = Throttle.open(
            redis,
            creates_per_minute=settings.provider_creates_per_minute,
            requests_per_minute=settings.provider_requests_per_minute,
        )
        breaker = open_breaker(redis, partial(_count_opening, counters))
        client = open_media_client(
            settings, throttle, on_request=partial(_count_request, counters)
        )
        stack.push_async_callback(_in_time, client.aclose)
        store = open_media_store(settings.effective_storage_url)
        stack.push_async_callback(_in_time, store.aclose)
        catalogue = Catalogue(client, bundled=load_bundled_models(), ttl=CATALOGUE_TTL)
        stack.push_async_callback(_in_time, catalogue.aclose)
        bell = Bell(publisher_app(settings.redis_url.get_secret_value()), ADVANCE_TASK)
        bell.start()
        stack.callback(bell.stop)
        hints = Hints(redis, EVENTS_CHANNEL)
        stack.push_async_callback(_in_time, hints.aclose)
        ledger = Ledger(
            database,
            policy_of(settings),
            on_end=partial(_count_end, counters),
            on_events=hints.give,
            budget=budget_of(settings),
        )
        stopping = asyncio.Event()
        live = Live(ledger, hints, stopping)
        stack.push_async_callback(_in_time, live.aclose)
        gatekeeper, quotas = _open_gatekeeper(settings, stack, redis, ledger, counters)
        links = links_of(settings)
        outbound = Outbound(settings.outbound_hosts, max_connections=MOST_CALLS)
        stack.push_async_callback(_in_time, outbound.aclose)
        uploads = Uploads(ledger, store, max_bytes=settings.max_upload_bytes)
        thumbnails = Thumbnails(ledger, store)
        stack.push_async_callback(_in_time, thumbnails.aclose)
        health = HealthChecks(
            database=database,
            ledger=ledger,
            redis=redis,
            store=store,
            client=client,
            breaker=breaker,
        )
        yield Runtime(
            settings=settings,
            database=database,
            redis=redis,
            ledger=ledger,
            bell=bell,
            client=client,
            catalogue=catalogue,
            store=store,
            links=links,
            counters=counters,
            throttle=throttle,
            breaker=breaker,
            health=health,
            inbox=_open_inbox(settings, stack, redis, ledger, client.webhook_secret),
            gatekeeper=gatekeeper,
            backlog=Backlog(ledger, settings.max_pending_jobs),
            pausing=Pausing(ledger),
            operations=Operations(ledger, health),
            prices=prices,
            quotas=quotas,
            outbound=outbound,
            uploads=uploads,
            inputs=_open_inputs(settings, outbound, uploads, store, client, links),
            live=live,
            stopping=stopping,
            owner_secrets=OwnerSecrets(signing_keys_of(settings)),
            thumbnails=thumbnails,
        )


def _no_link(key: str, lifetime: timedelta) -> None:
    """Give no address, for there is none the provider could read."""


def _count_opening(counters: SharedCounters, reason: str) -> None:
    counters.add("provider_breaker_opened", reason=reason)


def _count_end(counters: SharedCounters, state: JobState) -> None:
    """Count a finished job, and how long its phases took."""
    code = state.failure.code if state.failure else ""
    counters.add("jobs_finished", status=state.status.value, code=code)
    marks = (
        ("queue", state.created_at, state.started_at),
        ("generate", state.started_at, state.generated_at),
        ("store", state.generated_at, state.completed_at),
        ("total", state.created_at, state.completed_at),
    )
    for phase, begin, end in marks:
        if begin is not None and end is not None:
            span = (end - begin).total_seconds()
            counters.observe("job_phase_seconds", span, phase=phase)


def _count_request(
    counters: SharedCounters, operation: str, code: str, seconds: float
) -> None:
    counters.add("provider_requests", operation=operation, code=code)
    counters.observe("provider_request_seconds", seconds, operation=operation)
