"""Who a key belongs to: from the secret in a request to a caller.

What a row says is believed for less than a second, in each process by itself: a key that was
revoked, has expired or got other limits is treated so everywhere within that time, and nobody
has to be told.  A key in use is looked up again before its time is over, beside the requests:
they wait for the table only the first time.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Never
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core import migrations
from app.core.batching import Batcher
from app.core.config import LONGEST_SECRET
from app.core.patience import end
from app.domain.access import ANYBODY, Caller, Scope
from app.domain.errors import InvalidKey, Unauthorized, Unavailable
from app.services import keys
from app.services.attempts import FailedAttempts
from app.services.keys import FORM, KeyRecord, digest
from app.services.ledger import MOST_AT_ONCE, PATIENCE, Ledger

log = structlog.get_logger("app.gatekeeper")

CONFIGURED = Caller(name="ADMIN_API_KEY")
MONITOR = Caller(name="METRICS_TOKEN", scopes=frozenset((Scope.MONITOR,)))

MISSING = "Send an API key: Authorization: Bearer mgs_…"
REFUSED = "The API key is unknown, expired or revoked."

FRESH = timedelta(milliseconds=400)  # from then on, the row is read again
BELIEVED = timedelta(milliseconds=900)  # and until then, the answer may be awaited
USE_NOTED_EVERY = timedelta(minutes=1)
ADMIN_SOUGHT_EVERY = timedelta(seconds=5)  # at start, until the database answers
FAREWELL = timedelta(milliseconds=500)
MOST_REMEMBERED = 10_000  # keys, in a process


@dataclass(frozen=True, slots=True)
class _Known:
    """What the table said of a hash, and when it was asked."""

    at: float
    record: KeyRecord | None
    caller: Caller | None


class Gatekeeper:
    """Identifies callers.  Safe to share within one event loop."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        demands_keys: bool,
        attempts: FailedAttempts,
        admin_key: str | None = None,
        metrics_token: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.demands_keys = demands_keys
        self._ledger = ledger
        self._attempts = attempts
        self._clock = clock
        self._configured = [
            (digest(secret), caller)
            for secret, caller in ((admin_key, CONFIGURED), (metrics_token, MONITOR))
            if secret is not None
        ]
        self._has_admin_key = admin_key is not None
        self._known: OrderedDict[bytes, _Known] = OrderedDict()  # oldest answer first
        self._lookups: dict[bytes, asyncio.Task[_Known]] = {}
        self._noted: OrderedDict[UUID, float] = OrderedDict()  # oldest first
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reads: Batcher[bytes, KeyRecord | None] = Batcher(
            self._read, limit=MOST_AT_ONCE, is_shared=_is_shared
        )
        self._uses: Batcher[UUID, None] = Batcher(
            self._mark, limit=MOST_AT_ONCE, is_shared=_is_shared
        )

    async def identify(self, secret: str | None, address: str) -> Caller:
        """Say who calls from the address.

        Raises `Unauthorized`, `OverLimit` after too many failures, `Unavailable`.
        """
        if not self.demands_keys:
            return ANYBODY
        if not secret:
            raise Unauthorized(MISSING)
        if len(secret) > LONGEST_SECRET:
            await self._refuse(address)  # without so much as hashing it
        found = digest(secret)
        for known, caller in self._configured:
            if hmac.compare_digest(found, known):
                return caller
        if not FORM.fullmatch(secret):
            # Nobody has such a key: the table need not be asked.
            await self._refuse(address)
        told = self._remembered(found)
        if told is None:
            # A key this process met before is let through, whatever its neighbours do.
            if found not in self._known:
                self._attempts.let_try(address, found)
            told = await self._look_up(found)
        if told.caller is None:
            await self._refuse(address, found)
        return told.caller

    async def identify_again(self, hashed: bytes) -> Caller:
        """Say who bears the key with the hash; for those who showed the key itself before.

        Counts as no attempt: whoever asks knows that the hash is not a stranger's guess.
        Raises `InvalidKey` when the key is not valid any more, `Unavailable`.
        """
        told = self._remembered(hashed) or await self._look_up(hashed)
        if told.caller is None:
            raise InvalidKey(REFUSED)
        return told.caller

    def find_configured(self, fits: Callable[[bytes], bool]) -> Caller | None:
        """Give who bears the configured key whose hash fits; None when there is none."""
        found = [caller for known, caller in self._configured if fits(known)]
        return found[0] if found else None

    @asynccontextmanager
    async def looking_for_admin(self) -> AsyncIterator[None]:
        """Find out beside the block whether anybody can make keys; warn when nobody can."""
        task = asyncio.create_task(self._look_for_admin())
        try:
            yield
        finally:
            await end(task)

    async def is_locked_out(self, conn: AsyncConnection) -> bool:
        """Tell whether keys are demanded, and nobody has one to make others with."""
        if not self.demands_keys or self._has_admin_key:
            return False
        return not await keys.has_live_admin(conn)

    async def _refuse(self, address: str, found: bytes | None = None) -> Never:
        """Turn a failed attempt away: the only place where one becomes known."""
        await self._attempts.note_failure(address, found)
        raise InvalidKey(REFUSED)

    async def aclose(self) -> None:
        """Let what is being looked up or noted come to its end, if that is soon."""
        tasks = [*self._tasks, *self._lookups.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=FAREWELL.total_seconds())
        await end(*tasks)

    async def _look_for_admin(self) -> None:
        if not self.demands_keys or self._has_admin_key:
            return
        while not await self._knows_admin():
            await asyncio.sleep(ADMIN_SOUGHT_EVERY.total_seconds())

    async def _knows_admin(self) -> bool:
        """Tell whether the table could be asked; warn when it has no key to make others."""
        try:
            async with _within_patience(), self._ledger.reading() as conn:
                if not await migrations.is_current(conn):
                    return False
                if await self.is_locked_out(conn):
                    warn_locked_out()
        except (Unavailable, DBAPIError):
            return False
        return True

    # -- what is known of a key ----------------------------------------------------------------

    def _remembered(self, found: bytes) -> _Known | None:
        """Give what may still be believed, and have it renewed in time."""
        told = self._known.get(found)
        if told is None:
            return None
        age = self._clock() - told.at
        if age >= BELIEVED.total_seconds():
            return None
        if age >= FRESH.total_seconds():
            self._ask(found)
        self._note_use(told)
        return told

    async def _look_up(self, found: bytes) -> _Known:
        """Ask the table, together with whoever else wants to know of the same key."""
        async with _within_patience():
            # Whoever hangs up must not take the answer away from the others.
            told = await asyncio.shield(self._ask(found))
        self._note_use(told)
        return told

    def _ask(self, found: bytes) -> asyncio.Task[_Known]:
        task = self._lookups.get(found)
        if task is None:
            task = asyncio.create_task(self._learn(found))
            self._lookups[found] = task
            task.add_done_callback(lambda done: self._end_lookup(found, done))
        return task

    def _end_lookup(self, found: bytes, task: asyncio.Task[_Known]) -> None:
        del self._lookups[found]
        if not task.cancelled():
            task.exception()  # seen, also when nobody waits: the next request asks again

    async def _learn(self, found: bytes) -> _Known:
        # What is committed after this moment may be missing from the answer.
        asked_at = self._clock()
        record = await self._reads(found)
        told = _Known(asked_at, record, record.caller if record else None)
        self._known.pop(found, None)
        if record is None:
            return told  # not remembered: guesses must not crowd out keys
        self._known[found] = told
        while len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)
        return told

    async def _read(self, hashes: Sequence[bytes]) -> Sequence[KeyRecord | None]:
        async with _within_patience():
            try:
                rows = await self._read_once(hashes)
            except Unavailable:
                # After a restart of PostgreSQL every pooled connection is dead, and the
                # first failure has cleared them out.
                rows = await self._read_once(hashes)
        return [rows.get(wanted) for wanted in hashes]

    async def _read_once(self, hashes: Sequence[bytes]) -> dict[bytes, KeyRecord]:
        async with self._ledger.reading() as conn:
            return await keys.find_live(conn, list(set(hashes)))

    # -- when a key was used -------------------------------------------------------------------

    def _note_use(self, told: _Known) -> None:
        """Have it written down that a key was used, now and then, beside the request."""
        if told.record is None:
            return
        key_id, now = told.record.id, self._clock()
        noted = self._noted.get(key_id)
        if noted is not None and now - noted < USE_NOTED_EVERY.total_seconds():
            return
        self._noted[key_id] = now
        self._noted.move_to_end(key_id)
        while len(self._noted) > MOST_REMEMBERED:
            self._noted.popitem(last=False)
        self._start(self._mark_used(key_id))

    async def _mark_used(self, key_id: UUID) -> None:
        try:
            await self._uses(key_id)
        except (Unavailable, DBAPIError) as error:
            # Nobody misses it; the next use tries again.
            self._noted.pop(key_id, None)
            log.warning("key.use_not_noted", error=type(error).__name__)

    async def _mark(self, key_ids: Sequence[UUID]) -> Sequence[None]:
        async with _within_patience(), self._ledger.transaction() as conn:
            await keys.mark_used(conn, list(set(key_ids)))
        return [None] * len(key_ids)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)


def warn_locked_out() -> None:
    """Tell the log that nobody can make keys, and the remedy."""
    log.warning(
        "auth.no_admin_key",
        remedy="set ADMIN_API_KEY to a key of your own (openssl rand -hex 32), restart, and "
        "make the others with it: mediagen keys create",
    )


def _is_shared(error: BaseException) -> bool:
    """A database that is gone is everybody's trouble."""
    return isinstance(error, Unavailable)


@asynccontextmanager
async def _within_patience() -> AsyncIterator[None]:
    """Give up in time with `Unavailable`: a silent connection must not hold everybody up."""
    try:
        async with asyncio.timeout(PATIENCE.total_seconds()):
            yield
    except TimeoutError as error:
        raise Unavailable("The database does not answer in time.") from error
