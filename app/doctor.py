"""Is everything there that the service needs?  One finding per dependency, with its remedy.

Asks the way the service itself asks: same engine, same client, same store.  No check takes
longer than `PATIENCE`, whatever hangs, and no finding tells a secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import asyncpg
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core import heartbeat, migrations
from app.core.config import Settings
from app.core.database import DISCONNECTED, open_engine
from app.domain.errors import ServiceError
from app.services import keys
from app.services.media_client import Throttle, open_breaker, open_media_client
from app.services.media_store import open_media_store
from app.services.providers.addresses import OutputHosts

PATIENCE: Final = timedelta(seconds=3)
_SOCKET_TIMEOUT = 1.5  # seconds
_OLDEST_POSTGRES = 15
_OLDEST_REDIS = 6
_LARGEST_CLOCK_DIFFERENCE = 2.0  # seconds
_MIB = 1024 * 1024
_LITTLE_SPACE, _NO_SPACE = 1024 * _MIB, 100 * _MIB
_TROUBLE = (
    *(ServiceError, RedisError, DBAPIError, ValueError),
    *(asyncpg.PostgresError, asyncpg.InterfaceError, *DISCONNECTED),
)


class Mark(StrEnum):
    """How a dependency is.  DOUBTFUL: it works, and somebody should look at it."""

    FINE = "✓"
    DOUBTFUL = "!"
    BROKEN = "✗"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of one dependency, with the remedy when it is not fine."""

    name: str
    mark: Mark
    text: str
    seconds: float = 0.0


Answer = tuple[Mark, str]
Check = Callable[[Settings], Awaitable[Answer]]


def examine(load: Callable[[], Settings]) -> list[Finding]:
    """Check everything, at the same time; the findings come in a fixed order.

    `load` gives the settings, or prints what is wrong with each and raises `SystemExit`, as
    `config.load_settings` does: then only what needs no settings is checked.
    """
    began = time.monotonic()
    findings = [Finding("python", *_check_python())]
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            settings = load()
    except SystemExit:
        findings += [
            Finding("settings", Mark.BROKEN, line, time.monotonic() - began)
            for line in complaints.getvalue().splitlines()
        ]
        rest = (
            "with these settings nothing else can be checked; `mediagen up` needs none"
        )
        return [*findings, Finding("the rest", Mark.DOUBTFUL, rest)]
    took = time.monotonic() - began
    findings.append(
        Finding("settings", Mark.FINE, "complete, each within its range", took)
    )
    with _silence():
        return findings + _run(_ask_all(settings))


async def _ask_all(settings: Settings) -> list[Finding]:
    checks: dict[str, Check] = {
        "database": _check_database,
        "keys": _check_keys,
        "broker": _check_broker,
        "worker": _check_worker,
        "storage": _check_storage,
        "disk": _in_thread(_check_disk),
        "provider": _check_provider,
        "output hosts": _check_output_hosts,
        "log folder": _in_thread(_check_log_dir),
    }
    return await asyncio.gather(
        *(_timed(name, check, settings) for name, check in checks.items())
    )


async def _timed(name: str, check: Check, settings: Settings) -> Finding:
    """Run one check; what it cannot finish in time, or raises, is a finding, too."""
    began = time.monotonic()
    task = asyncio.ensure_future(check(settings))
    # Not asyncio.timeout: a clean-up that hangs in a thread ignores a cancellation.
    done, _ = await asyncio.wait([task], timeout=PATIENCE.total_seconds())
    if not done:
        task.cancel()
        late = f"no answer within {PATIENCE.total_seconds():g} s"
        answer = Mark.BROKEN, f"{late}: {_REMEDIES[name](settings)}"
    else:
        try:
            answer = task.result()
        except _TROUBLE as error:
            why = _reason(error)
            answer = Mark.BROKEN, f"{why}: {_REMEDIES[name](settings)}"
    return Finding(name, *answer, time.monotonic() - began)


def _reason(error: BaseException) -> str:
    """Say what happened without repeating texts that could carry a password."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig.__cause__ or error.orig
    if isinstance(error, ServiceError):
        return str(error).rstrip(".")
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return "user or password refused"
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return "the server has no such database"
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, socket.gaierror):
        return "the host's name is unknown"
    if isinstance(error, ssl.SSLError):
        return "TLS failed"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    if type(error).__name__ in ("AuthenticationError", "ResponseError"):
        return "the server refuses us"
    return f"no connection ({type(error).__name__})"


# ------------------------------------------------------------------------------- the checks


def _check_python() -> Answer:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < (3, 11):
        return Mark.BROKEN, f"{version}: install Python 3.11 or newer"
    return Mark.FINE, version


async def _check_database(settings: Settings) -> Answer:
    engine = open_engine(settings.database_url, name="mediagen-doctor", pool_size=1)
    try:
        async with engine.connect() as conn:
            return await _judge_database(conn)
    finally:
        await engine.dispose()


async def _judge_database(conn: AsyncConnection) -> Answer:
    version = str(await conn.scalar(text("SHOW server_version"))).split()[0]
    asked = time.time()
    theirs = await conn.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))
    difference = float(theirs or 0) - (asked + time.time()) / 2
    found = f"PostgreSQL {version}, clock {difference:+.3f} s"
    if not await migrations.is_current(conn):
        return (
            Mark.BROKEN,
            f"{found}; migrations are missing: run alembic upgrade head",
        )
    if int(version.partition(".")[0]) < _OLDEST_POSTGRES:
        return (
            Mark.DOUBTFUL,
            f"{found}: tested with {_OLDEST_POSTGRES} and newer, upgrade it",
        )
    if abs(difference) > _LARGEST_CLOCK_DIFFERENCE:
        return Mark.DOUBTFUL, f"{found}: let both machines keep time (chrony, ntpd)"
    return Mark.FINE, f"{found}, migrations current"


async def _check_keys(settings: Settings) -> Answer:
    if not settings.demands_keys:
        found = "none demanded: whoever reaches the API may do everything"
        return Mark.DOUBTFUL, f"{found}: {_REMEDIES['keys'](settings)}"
    if settings.admin_api_key is not None:
        return Mark.FINE, "demanded; ADMIN_API_KEY makes them"
    engine = open_engine(settings.database_url, name="mediagen-doctor", pool_size=1)
    try:
        async with engine.connect() as conn:
            if not await migrations.is_current(conn):
                return Mark.DOUBTFUL, "demanded; run alembic upgrade head to have some"
            if await keys.has_live_admin(conn):
                return Mark.FINE, "demanded; one with the scope admin makes them"
    finally:
        await engine.dispose()
    missing = "demanded, and nobody has one with the scope admin"
    return Mark.BROKEN, f"{missing}: set ADMIN_API_KEY (openssl rand -hex 32)"


@asynccontextmanager
async def _redis(settings: Settings) -> AsyncIterator[Redis]:
    client = Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=_SOCKET_TIMEOUT,
        socket_connect_timeout=_SOCKET_TIMEOUT,
    )
    try:
        yield client
    finally:
        await client.aclose()


async def _check_broker(settings: Settings) -> Answer:
    async with _redis(settings) as redis:
        info = await redis.info()
    is_valkey = "valkey_version" in info
    version = str(info["valkey_version" if is_valkey else "redis_version"])
    policy = str(info.get("maxmemory_policy", "unknown"))
    found = f"{'Valkey' if is_valkey else 'Redis'} {version}"
    if int(version.partition(".")[0]) < _OLDEST_REDIS:
        return Mark.DOUBTFUL, f"{found}: upgrade to {_OLDEST_REDIS} or newer"
    if policy != "noeviction":
        remedy = "set it to noeviction, or bells and budgets vanish when memory is full"
        return Mark.DOUBTFUL, f"{found}, maxmemory-policy is {policy}: {remedy}"
    return Mark.FINE, f"{found}, maxmemory-policy noeviction"


async def _check_worker(settings: Settings) -> Answer:
    async with _redis(settings) as redis:
        try:
            found = await heartbeat.living(redis)
        except (RedisError, OSError):
            unknown = "cannot be seen while the broker does not answer"
            return Mark.DOUBTFUL, f"{unknown}: mend the broker first"
    if not found:
        return Mark.BROKEN, f"no sign of life: {_REMEDIES['worker'](settings)}"
    return Mark.FINE, f"{len(found)} at work: {', '.join(sorted(found))}"


async def _check_storage(settings: Settings) -> Answer:
    url = settings.effective_storage_url
    try:
        store = await asyncio.to_thread(open_media_store, url)
    except ValueError as error:
        return Mark.BROKEN, str(error)
    try:
        await store.check_writable()
    finally:
        await store.aclose()
    return Mark.FINE, f"{url} takes files"


def _check_disk(settings: Settings) -> Answer:
    parts = urlsplit(settings.effective_storage_url)
    if parts.scheme != "file":
        return Mark.FINE, "none needed: files go to a bucket"
    free = shutil.disk_usage(_existing(Path(unquote(parts.path)))).free
    found = f"{free / 1024**3:.1f} GiB free where files are stored"
    if free >= _LITTLE_SPACE:
        return Mark.FINE, found
    remedy = "make room, or move STORAGE_PATH to a larger disk"
    return Mark.BROKEN if free < _NO_SPACE else Mark.DOUBTFUL, f"{found}: {remedy}"


async def _check_provider(settings: Settings) -> Answer:
    try:
        OutputHosts.parse(settings.output_hosts)
    except ValueError:
        return Mark.DOUBTFUL, "not asked: mend OUTPUT_HOSTS first"
    async with _redis(settings) as redis:
        throttle = Throttle.open(
            redis,
            creates_per_minute=settings.provider_creates_per_minute,
            requests_per_minute=settings.provider_requests_per_minute,
        )
        client = open_media_client(settings, throttle)
        try:
            await client.ping()
        finally:
            await client.aclose()
        breaker = await open_breaker(redis).state()
    if breaker.reason is not None:
        return (
            Mark.DOUBTFUL,
            f"answers, but purchases are held back ({breaker.reason}, since "
            f"{breaker.since:%H:%M:%S} UTC): see docs/operations.md",
        )
    kind = "" if settings.buys_from_replicate else " (not Replicate itself)"
    return Mark.FINE, f"{settings.replicate_api_base_url} accepts the token{kind}"


async def _check_output_hosts(settings: Settings) -> Answer:
    try:
        hosts = OutputHosts.parse(settings.output_hosts)
    except ValueError as error:
        return Mark.BROKEN, f"{error}: {_REMEDIES['output hosts'](settings)}"
    listed = ", ".join(settings.output_hosts)
    if settings.buys_from_replicate:
        if "replicate.delivery" not in hosts.domains:
            return (
                Mark.BROKEN,
                f"{listed}: add replicate.delivery, where Replicate puts its outputs",
            )
    elif not hosts.trusted and hosts.domains <= {"replicate.delivery"}:
        provider = urlsplit(settings.replicate_api_base_url)
        port = provider.port or (443 if provider.scheme == "https" else 80)
        where = f"{provider.hostname}:{port}"
        return (
            Mark.DOUBTFUL,
            f"{listed or 'none'}: the provider is {where}; to take its files, "
            f"set OUTPUT_HOSTS={where}",
        )
    return Mark.FINE, listed


def _check_log_dir(settings: Settings) -> Answer:
    folder = settings.log_dir
    if folder is None:
        return Mark.FINE, "none: logs go to stdout only"
    folder.mkdir(parents=True, exist_ok=True)  # as the service would
    with tempfile.TemporaryFile(dir=folder):
        return Mark.FINE, f"{folder} takes files"


def _existing(path: Path) -> Path:
    """Give the nearest folder above that is there."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _database_address(settings: Settings) -> str:
    url = make_url(settings.database_url.get_secret_value())
    return f"{url.host or 'localhost'}:{url.port or 5432}/{url.database or ''}"


def _redis_address(settings: Settings) -> str:
    return urlsplit(settings.redis_url.get_secret_value()).netloc.rpartition("@")[2]


_REMEDIES: Final[dict[str, Callable[[Settings], str]]] = {
    "database": lambda s: f"start PostgreSQL at {_database_address(s)} "
    "(docker-compose up -d), or correct DATABASE_URL",
    "keys": lambda s: (
        "mend the database first, or set ADMIN_API_KEY"
        if s.demands_keys
        else "fine on one machine of your own; else set AUTH_REQUIRED=true and ADMIN_API_KEY"
    ),
    "broker": lambda s: f"start Redis or Valkey at {_redis_address(s)} "
    "(docker-compose up -d), or correct REDIS_URL",
    "worker": lambda s: "start one: celery -A worker.celery_app worker --loglevel=info",
    "storage": lambda s: f"it is {s.effective_storage_url}, by STORAGE_PATH or STORAGE_URL",
    "disk": lambda s: "check the disk of STORAGE_PATH",
    "provider": lambda s: f"check REPLICATE_API_BASE_URL ({s.replicate_api_base_url}) and "
    "REPLICATE_API_TOKEN (replicate.com/account/api-tokens)",
    "output hosts": lambda s: "correct OUTPUT_HOSTS: host names or host:port, with commas",
    "log folder": lambda s: "make LOG_DIR writable for this user, or set LOG_DIR= for stdout",
}


# ------------------------------------------------------------------------------- machinery


def _in_thread(check: Callable[[Settings], Answer]) -> Check:
    async def run(settings: Settings) -> Answer:
        return await asyncio.to_thread(check, settings)

    return run


def _run(work: Awaitable[list[Finding]]) -> list[Finding]:
    """Run to the end without waiting for threads that hang, as `asyncio.run` would."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(_end_tasks(loop))
        loop.close()


async def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Let cancelled checks clean up for a moment."""
    left = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    if left:
        await asyncio.wait(left, timeout=0.5)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the parts from logging what the findings say already."""
    before = structlog.get_config()
    structlog.configure(processors=[_drop], cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**before)


def _drop(*_: object) -> str:
    raise structlog.DropEvent
