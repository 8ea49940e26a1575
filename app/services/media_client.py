"""Builds the provider's client from settings, and keeps it within the account's limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from pydantic import SecretStr
from redis.asyncio import Redis

from app.core.breaker import CircuitBreaker
from app.core.throttle import TokenBucket
from app.domain.errors import ProviderThrottled
from app.services.providers.addresses import OutputHosts
from app.services.providers.replicate import ReplicateClient
from app.services.providers.transport import (
    Downloader,
    DownloadLimits,
    OnRequest,
    ignore_request,
)

# Who is paused by an answer that does not say for how long, and for how long at most: a
# throttled account says "resets in ~Ns" with N below a minute (public issues, 2025-26).
_USUAL_PAUSE = timedelta(seconds=5)
_LONGEST_PAUSE = timedelta(minutes=2)
_PATIENCE = timedelta(seconds=5)
# Asking Redis costs as much as the request that is asked for: in a row, ask for several.
_STOCK = 10
_STOCK_LIFE = timedelta(milliseconds=500)


class ProviderSettings(Protocol):
    """The part of the settings that concerns the provider."""

    @property
    def replicate_api_base_url(self) -> str: ...
    @property
    def replicate_api_token(self) -> SecretStr: ...
    @property
    def output_hosts(self) -> tuple[str, ...]: ...
    @property
    def max_output_bytes(self) -> int: ...
    @property
    def worker_concurrency(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Throttle:
    """The account's two budgets, shared by all processes.

    Whoever buys takes from `creates` before; everything else takes from `requests` by
    itself.  Replicate allows 600 creates and 3000 other requests a minute per account
    (replicate.com/docs/topics/predictions/rate-limits).
    """

    creates: TokenBucket
    requests: TokenBucket

    @classmethod
    def open(
        cls, redis: Redis, *, creates_per_minute: int, requests_per_minute: int
    ) -> Throttle:
        """Make both buckets on one Redis client, which stays the caller's."""
        return cls(
            creates=TokenBucket(
                redis, "provider-creates", per_minute=creates_per_minute
            ),
            requests=TokenBucket(
                redis, "provider-requests", per_minute=requests_per_minute
            ),
        )


def open_breaker(
    redis: Redis, on_opened: Callable[[str], None] = lambda reason: None
) -> CircuitBreaker:
    """Make the breaker of purchases from our provider, shared by all processes."""
    name = f"{ReplicateClient.name}-creates"
    return CircuitBreaker(redis, name, on_opened=on_opened)


class ThrottleGate:
    """Hold requests until the bucket has a token, and close the bucket after a 429."""

    def __init__(self, throttle: Throttle, *, patience: timedelta = _PATIENCE) -> None:
        """Wait up to `patience` for a token."""
        self._throttle = throttle
        self._patience = patience
        self._stock = 0  # tokens taken in advance
        self._stocked_at = 0.0

    async def admit(self, operation: str) -> None:
        """Return with a token of the `requests` bucket, or raise `ProviderThrottled`."""
        now = time.monotonic()
        is_busy = now - self._stocked_at < _STOCK_LIFE.total_seconds()
        if self._stock > 0 and is_busy:
            self._stock -= 1
            return
        give_up = now + self._patience.total_seconds()
        while True:
            # Many at once while it goes on like this; what is left over then is forgone.
            grant = await self._throttle.requests.take(_STOCK if is_busy else 1)
            if grant.granted:
                self._stock = grant.granted - 1
                self._stocked_at = time.monotonic()
                return
            wait = grant.retry_after.total_seconds()
            if time.monotonic() + wait > give_up:
                raise ProviderThrottled(
                    "our own limit of provider requests is used up",
                    retry_after=grant.retry_after,
                )
            await asyncio.sleep(wait)

    async def throttled(self, operation: str, retry_after: timedelta | None) -> None:
        """Pause the bucket the operation belongs to, for everybody."""
        wait = _USUAL_PAUSE if retry_after is None else retry_after
        self._stock = 0
        is_create = operation == "create"
        bucket = self._throttle.creates if is_create else self._throttle.requests
        await bucket.pause(min(wait, _LONGEST_PAUSE))


def open_media_client(
    settings: ProviderSettings,
    throttle: Throttle,
    on_request: OnRequest | None = None,
) -> ReplicateClient:
    """Build the provider's client; it connects on first use.  Close it with `aclose()`.

    `on_request(operation, code, seconds)` is told of every request: the code is the HTTP
    status or the name of what went wrong.  Raise `ValueError` for a wrong output host.
    """
    on_request = on_request or ignore_request
    downloader = Downloader(
        OutputHosts.parse(settings.output_hosts),
        DownloadLimits(max_bytes=settings.max_output_bytes),
        max_connections=settings.worker_concurrency,
        on_request=on_request,
    )
    return ReplicateClient(
        base_url=settings.replicate_api_base_url,
        token=settings.replicate_api_token.get_secret_value(),
        downloader=downloader,
        max_connections=settings.worker_concurrency,
        on_request=on_request,
        gate=ThrottleGate(throttle),
    )
