"""What happens to jobs, for whoever listens: one reader of the log in each process.

While somebody listens, the log is read on at every hint, and every two seconds anyway.  What it
says is handed to the listeners in memory (`listeners`).

    async with live.follow(realm, after="123.45") as events:
        async for one in events:  # a LiveEvent or a Reset
            ...

All listeners end when the process is asked to stop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.batching import Batcher
from app.core.hints import Hints
from app.core.patience import end
from app.core.stopping import pause
from app.domain.errors import Unavailable
from app.services import event_log
from app.services.event_log import Bounds, LiveEvent, Position, Stretch
from app.services.ledger import PATIENCE, Ledger
from app.services.listeners import (
    REPLACED,
    TOO_OLD,
    TROUBLE,
    UNKNOWN,
    Entry,
    Follower,
    JobFollower,
    Listener,
    Reset,
    Watch,
)

__all__ = ["Follower", "JobFollower", "Live", "LiveEvent", "Reset", "Watch"]

log = structlog.get_logger("app.live")

REREAD = 2.0  # seconds, within which a lost hint is made up for
PACE = 0.02  # seconds between two readings
AWHILE = (
    0.02,
    0.05,
    0.1,
    0.25,
)  # seconds, while there is something that is not settled
AFTER_TROUBLE = 1.0  # seconds
LINGER = timedelta(seconds=10)  # after the last listener the next one is often near
PAGE = 200  # rows in one reading; several fit into a listener's queue
READERS = 3  # who may catch up at the same time: connections are few
JOBS_AT_ONCE = 100
FLOOR_LIFE = 5.0  # seconds

_NOWHERE = Position(-1, 0)


class Live:
    """Tells listeners what happens.  For one event loop; close it with `aclose`."""

    def __init__(
        self,
        ledger: Ledger,
        hints: Hints,
        stopping: asyncio.Event,
        *,
        linger: timedelta = LINGER,
    ) -> None:
        self._ledger = ledger
        self._hints = hints
        self._stopping = stopping
        self._linger = linger
        self._position: Position | None = None  # None: nobody has been told anything
        self._floor = (0.0, _NOWHERE)
        self._followers: dict[str | None, set[Follower]] = {}
        self._of_jobs: dict[UUID, set[JobFollower | Watch]] = {}
        self._news = asyncio.Event()
        self._is_ready = asyncio.Event()
        self._arriving = 0
        self._idle_since = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader: asyncio.Task[None] | None = None
        self._seats = asyncio.Semaphore(READERS)
        self._job_reads: Batcher[tuple[UUID, int], list[LiveEvent]] = Batcher(
            self._read_jobs, limit=JOBS_AT_ONCE, lanes=2, is_shared=_is_trouble
        )

    # -- listening -------------------------------------------------------------------------

    @asynccontextmanager
    async def follow(
        self, realm: str | None, *, after: str | None = None
    ) -> AsyncIterator[Follower]:
        """Hear what happens to an owner's jobs, or (None) to all, from now or a position on.

        A position of another log, or one too far back, is answered with a `Reset`; then follows
        what happens from now on.  Raises `ValueError` for what is no position, `Unavailable`.
        """
        asked = None
        if after is not None and (asked := event_log.read_position(after)) is None:
            raise ValueError("not a position")
        with self._coming():
            await self._start_reading()
            bounds = found = None
            if asked is not None:
                bounds, found = await self._judge(asked)
            # From here on nothing may be awaited: events would be missed.
            start, until = self.position, self.position
            if bounds is not None and asked is not None and found is None:
                start, until = asked, bounds.end
            follower = Follower(self, realm, start, until=until, first=found)
            everybody = self._followers.setdefault(realm, set())
            everybody.add(follower)
        self._admit(follower)
        try:
            yield follower
        finally:
            everybody.discard(follower)
            if not everybody and self._followers.get(realm) is everybody:
                del self._followers[realm]
            self._note_idle()

    @asynccontextmanager
    async def follow_job(
        self, job_id: UUID, *, after: int = 0
    ) -> AsyncIterator[JobFollower]:
        """Hear all that happened and happens to a job since a version, up to its end.

        A version it does not have is answered with a `Reset`, then with the whole log.  Of a
        job that does not exist nothing is heard.  Raises `Unavailable`.
        """
        follower = JobFollower(self, job_id, after)
        async with self._listening(follower):
            yield follower

    @asynccontextmanager
    async def watch(self, job_id: UUID) -> AsyncIterator[Watch]:
        """Notice every change of a job that is committed from now on.  Raises `Unavailable`."""
        watch = Watch(job_id)
        async with self._listening(watch):
            yield watch

    async def changed(self, job_id: UUID, version: int, timeout: float) -> None:
        """Return as soon as the job may be newer than the version, or after the time.

        Raises `Unavailable`.
        """
        async with self.watch(job_id) as watch:
            try:
                newer = await self.of_job(job_id, version + 1)
            except TROUBLE as error:
                raise _unavailable() from error
            if not newer:
                await watch.newer_than(version, timeout)

    @asynccontextmanager
    async def _listening(self, one: JobFollower | Watch) -> AsyncIterator[None]:
        with self._coming():
            await self._start_reading()
            others = self._of_jobs.setdefault(one.job_id, set())
            others.add(one)
        self._admit(one)
        try:
            yield
        finally:
            others.discard(one)
            if not others and self._of_jobs.get(one.job_id) is others:
                del self._of_jobs[one.job_id]
            self._note_idle()

    def _admit(self, listener: Listener) -> None:
        if self._stopping.is_set():
            listener.end()

    async def _judge(self, asked: Position) -> tuple[Bounds, Reset | None]:
        """Say where the log stands, and why it cannot be told from a position on, if so."""
        try:
            async with self._reading() as conn:
                bounds = await event_log.bounds(conn)
                if asked.xid > bounds.limit:
                    return bounds, UNKNOWN
                known_at, floor = self._floor
                if time.monotonic() - known_at > FLOOR_LIFE:
                    floor = await event_log.floor(conn, bounds.end)
                    self._floor = time.monotonic(), floor
        except TROUBLE as error:
            raise _unavailable() from error
        return bounds, TOO_OLD if asked < floor else None

    # -- what listeners read ---------------------------------------------------------------

    @property
    def position(self) -> Position:
        """How far all listeners have been told."""
        return self._position or _NOWHERE

    async def between(
        self, after: Position, until: Position, *, owner: str | None, limit: int
    ) -> list[Entry]:
        """Read settled rows again; few do at the same time."""
        async with self._seats, self._reading() as conn:
            return await event_log.between(conn, after, until, owner=owner, limit=limit)

    async def of_job(self, job_id: UUID, version: int) -> list[LiveEvent]:
        """Read a job's log from a version on, together with whoever else wants to."""
        return await self._job_reads((job_id, version))

    async def _read_jobs(
        self, wanted: Sequence[tuple[UUID, int]]
    ) -> Sequence[list[LiveEvent]]:
        async with self._reading() as conn:
            found = await event_log.of_jobs(conn, wanted)
        return [
            [one for one in found.get(job_id, ()) if one.version >= version]
            for job_id, version in wanted
        ]

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        # A silent connection must not hold everybody up.
        async with asyncio.timeout(PATIENCE.total_seconds()):
            async with self._ledger.reading() as conn:
                yield conn

    # -- the one reader --------------------------------------------------------------------

    async def _start_reading(self) -> None:
        """Have the log read from now on; return when what is committed next will be told."""
        if self._stopping.is_set():
            return
        if self._reader is None:
            self._is_ready.clear()
            self._reader = self._start(self._read_for_all())
        try:
            async with asyncio.timeout(PATIENCE.total_seconds()):
                await self._is_ready.wait()
        except TimeoutError as error:
            raise _unavailable() from error

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)
        return task

    async def _read_for_all(self) -> None:
        repairing = self._start(self._repair())
        ending = self._start(self._end_all_when_stopping())
        self._hints.listen(self._news.set)
        try:
            await self._read_while_wanted()
        finally:
            # In one step: whoever comes next starts another reader.
            self._reader, self._position = None, None
            self._end_all()
            repairing.cancel()
            ending.cancel()
            await self._hints.silence()

    async def _read_while_wanted(self) -> None:
        tries, is_in_trouble = 0, False
        while not self._stopping.is_set() and self._is_wanted():
            self._news.clear()
            try:
                rest, tries = await self._read_on(tries)
                is_in_trouble = False
            except TROUBLE as error:
                if not is_in_trouble:
                    log.warning("log.not_read", error=type(error).__name__)
                is_in_trouble, rest = True, AFTER_TROUBLE
                self._unsettle_jobs()
            await asyncio.sleep(PACE if rest else 0)
            await pause(max(rest - PACE, 0), self._news)

    async def _read_on(self, tries: int) -> tuple[float, int]:
        """Read once and tell; say how long to rest unless there are hints, and the tries."""
        if self._position is None:
            async with self._reading() as conn:
                self._position = (await event_log.bounds(conn)).end
            self._is_ready.set()
            return 0, 0
        async with self._reading() as conn:
            stretch = await event_log.read(conn, self._position, limit=PAGE)
        if stretch.bounds.limit < self._position.xid:
            self._begin_anew(stretch.bounds.end)
            return 0, 0
        self._tell(stretch)
        if stretch.is_full and stretch.settled:
            return 0, 0
        if not stretch.unsettled:
            return REREAD, 0
        if stretch.is_full:
            # Some old transaction keeps more from being settled than is looked at here.
            self._unsettle_jobs()
        return AWHILE[min(tries, len(AWHILE) - 1)], tries + 1

    def _tell(self, stretch: Stretch) -> None:
        for entry in stretch.settled:
            event = entry[1]
            for realm in (None, event.owner):
                for follower in self._followers.get(realm, ()):
                    follower.offer(entry)
            self._tell_job(event)
            self._position = entry[0]
        for event in stretch.unsettled:
            self._tell_job(event)  # among a job's own, its place is certain
        if stretch.unsettled or not stretch.is_full:
            self._position = max(self.position, stretch.bounds.end)

    def _tell_job(self, event: LiveEvent) -> None:
        for one in self._of_jobs.get(event.job_id, ()):
            one.offer(event)

    def _unsettle_jobs(self) -> None:
        """Have those who listen to a job look for themselves."""
        for others in self._of_jobs.values():
            for one in others:
                one.fall_behind()

    def _begin_anew(self, position: Position) -> None:
        """Go on in a log that is not the one we were in."""
        log.warning("log.replaced")
        self._position, self._floor = position, (0.0, _NOWHERE)
        for everybody in self._followers.values():
            for follower in everybody:
                follower.reset(REPLACED, position)
        self._unsettle_jobs()

    # -- coming and going ------------------------------------------------------------------

    def _is_wanted(self) -> bool:
        if self._followers or self._of_jobs or self._arriving:
            return True
        return time.monotonic() - self._idle_since < self._linger.total_seconds()

    @contextmanager
    def _coming(self) -> Iterator[None]:
        """Keep the reader going for somebody who is no listener yet."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    def _note_idle(self) -> None:
        self._idle_since = time.monotonic()

    async def _end_all_when_stopping(self) -> None:
        await self._stopping.wait()
        self._end_all()

    def _end_all(self) -> None:
        listeners: list[Listener] = []
        for everybody in self._followers.values():
            listeners += everybody
        for others in self._of_jobs.values():
            listeners += others
        for one in listeners:
            one.end()
        self._news.set()

    async def _repair(self) -> None:
        """Put rows that a dump brought from another server where old ones are."""
        try:
            async with self._reading() as conn:
                is_done = not await event_log.has_foreign(conn)
            while not is_done:
                log.warning("log.repaired")
                async with self._ledger.transaction() as conn:
                    is_done = await event_log.repair(conn)
        except TROUBLE as error:
            log.warning("log.not_repaired", error=type(error).__name__)

    async def aclose(self) -> None:
        """End all listeners, and the reading."""
        self._end_all()
        await end(*self._tasks)


def _unavailable() -> Unavailable:
    return Unavailable("The log of events cannot be read.")


def _is_trouble(error: BaseException) -> bool:
    """A database that is gone is everybody's trouble."""
    return isinstance(error, TROUBLE)
