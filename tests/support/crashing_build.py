"""What the test build of a process reads, and how it differs from the real one.

    MEDIAGEN_CRASH_AT         the place to end or stop at: see `app.core.crashpoints.arm`
    MEDIAGEN_TEST_LEASE       seconds instead of the fifteen of production
    MEDIAGEN_TEST_RECONCILE   seconds, comma separated, instead of 2,10,30,60,120
    MEDIAGEN_TEST_LAST_RESORT seconds instead of ten minutes
    MEDIAGEN_TEST_TROUBLES    purchases in trouble, instead of five, before buying is interrupted

Only the figures differ: which path a job takes is decided by the same code.  Production
never imports this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from redis.asyncio import Redis

from app.core import crashpoints
from app.core.breaker import CircuitBreaker
from app.core.circuit import Rhythm
from app.core.config import Settings
from app.domain.policy import Policy
from app.services import ledger

# Whoever uses the lease takes it from the ledger when imported: so before everybody else.
if "MEDIAGEN_TEST_LEASE" in os.environ:
    ledger.LEASE = timedelta(seconds=float(os.environ["MEDIAGEN_TEST_LEASE"]))

from app import runtime  # noqa: E402

_policy_of = runtime.policy_of


def shorter_policy(settings: Settings) -> Policy:
    """Give production's figures, with those the environment names made shorter."""
    policy = _policy_of(settings)
    if given := os.environ.get("MEDIAGEN_TEST_RECONCILE"):
        ages = tuple(timedelta(seconds=float(age)) for age in given.split(","))
        policy = replace(policy, reconcile_at=ages)
    if given := os.environ.get("MEDIAGEN_TEST_LAST_RESORT"):
        policy = replace(policy, last_resort=timedelta(seconds=float(given)))
    return policy


def tolerant_breaker(redis: Redis, on_opened: Callable[[str], None]) -> CircuitBreaker:
    """Make a breaker of purchases that puts up with so much trouble."""
    rhythm = Rhythm(threshold=int(os.environ["MEDIAGEN_TEST_TROUBLES"]))
    return CircuitBreaker(redis, "test-creates", rhythm=rhythm, on_opened=on_opened)


def prepare() -> None:
    """Turn this process into the test build."""
    runtime.policy_of = shorter_policy
    if "MEDIAGEN_TEST_TROUBLES" in os.environ:
        runtime.open_breaker = tolerant_breaker
    crashpoints.arm(os.environ.get("MEDIAGEN_CRASH_AT", ""))
