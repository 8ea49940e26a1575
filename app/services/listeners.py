"""Those who listen to the log of events: to all of it, to one job's, or for any change of one.

Each has a short queue that the one reader of the process fills (`live.Live`).  One that does not
keep up loses its queue, not its place: it reads on in the log from where it is.  So what a
listener hears has no gap and nothing twice, however it came to be behind.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias
from uuid import UUID

from sqlalchemy.exc import DBAPIError

from app.domain.errors import Unavailable
from app.services.event_log import LONGEST_REPLAY, LiveEvent, Position

ROOM = 1000  # events that wait for a listener
REPLAYED_AT_ONCE = 500
AFTER_TROUBLE = 1.0  # seconds

TROUBLE = (Unavailable, DBAPIError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Reset:
    """What a listener knew is of no use any more: it must look at the jobs anew.

    What comes next is all that happens from now on; of a single job, its whole log.
    """

    reason: str
    message: str


UNKNOWN = Reset(
    "unknown_position",
    "This position is not in the log, which may have been restored from a backup: read the"
    " jobs anew.",
)
TOO_OLD = Reset(
    "too_far_back",
    f"More than {LONGEST_REPLAY} events have happened since: read the jobs anew.",
)
REPLACED = Reset(
    "log_replaced",
    "The log was replaced, perhaps restored from a backup: read the jobs anew.",
)

Heard: TypeAlias = LiveEvent | Reset
Entry: TypeAlias = tuple[Position, LiveEvent]


class Log(Protocol):
    """The log as listeners need it.  Reading raises one of `TROUBLE`."""

    @property
    def position(self) -> Position:
        """How far all listeners have been told."""

    async def between(
        self, after: Position, until: Position, *, owner: str | None, limit: int
    ) -> list[Entry]:
        """Read settled rows again."""

    async def of_job(self, job_id: UUID, version: int) -> list[LiveEvent]:
        """Read the log of a job from a version on."""


class Listener:
    """Somebody who waits to be woken, or for the end."""

    def __init__(self) -> None:
        self.is_over = False
        self._waker: asyncio.Future[bool] | None = None

    def end(self) -> None:
        """Have it end at once."""
        self.is_over = True
        self.wake()

    def wake(self) -> None:
        """Have it look at what there is."""
        if self._waker is not None:
            _ring(self._waker, True)

    async def _wait(self, patience: float | None) -> bool:
        """Wait to be woken; tell whether that was in time."""
        # Thousands do this at every event, and this is cheaper than `asyncio.timeout`.
        loop = asyncio.get_running_loop()
        waker: asyncio.Future[bool] = loop.create_future()
        self._waker = waker
        timer = None
        if patience is not None:
            timer = loop.call_later(patience, _ring, waker, False)
        try:
            return await waker
        finally:
            self._waker = None
            if timer is not None:
                timer.cancel()


def _ring(waker: asyncio.Future[bool], is_in_time: bool) -> None:
    if not waker.done():
        waker.set_result(is_in_time)


class _Follower(Listener):
    """Hears one event after the other: `async for one in follower`, or `heard`."""

    def __init__(self) -> None:
        super().__init__()
        # Behind means: what is missing is in the log, and nothing is put into the queue.
        self._is_behind = True

    async def __aiter__(self) -> AsyncIterator[Heard]:
        """Give what happens, until the end."""
        while heard := await self.heard():
            for one in heard:
                yield one

    async def heard(self, patience: float | None = None) -> Sequence[Heard]:
        """Wait for what happens next, and give all of it there is; nothing once it is over.

        Nothing, too, when the patience (seconds) is at its end.
        """
        while not self.is_over:
            try:
                found = await self._next()
            except TROUBLE:
                self._fall_behind()
                is_woken = await self._wait(_least(patience, AFTER_TROUBLE))
                if not is_woken and patience is not None:
                    return ()
                continue
            if found:
                return found
            if found is None and not self.is_over and not await self._wait(patience):
                return ()
        return ()

    def _fall_behind(self) -> None:
        self._is_behind = True

    @abstractmethod
    async def _next(self) -> Sequence[Heard] | None:
        """Give what there is: something, nothing as yet, or None when it must be waited for."""


def _least(patience: float | None, most: float) -> float:
    return most if patience is None else min(patience, most)


class Follower(_Follower):
    """Hears what happens to all jobs, or to those of one owner, in the order of the log."""

    def __init__(
        self,
        log: Log,
        owner: str | None,
        after: Position,
        *,
        until: Position,
        first: Reset | None = None,
    ) -> None:
        """Begin after a position; all up to `until` is in the log for certain."""
        super().__init__()
        self._at_least = until
        self.owner = owner
        self._log = log
        self._told = after  # all up to here
        self._until: Position | None = (
            None  # up to where the log is read before the queue
        )
        self._queue: deque[Entry] = deque()
        self._reset = first

    @property
    def position(self) -> Position:
        """Where to go on after what was heard."""
        if self._is_behind or self._until is not None or self._queue:
            return self._told
        return max(self._told, self._log.position)

    def offer(self, entry: Entry) -> None:
        """Let it hear something, in its time."""
        if self._is_behind:
            return
        if len(self._queue) >= ROOM:
            self._fall_behind()
            return
        self._queue.append(entry)
        self.wake()

    def reset(self, reset: Reset, position: Position) -> None:
        """Have it begin anew from a position."""
        self._queue.clear()
        self._told, self._until, self._at_least = position, None, position
        self._is_behind, self._reset = False, reset
        self.wake()

    def _fall_behind(self) -> None:
        self._queue.clear()
        self._is_behind = True

    async def _next(self) -> Sequence[Heard] | None:
        if self._reset is not None:
            reset, self._reset = self._reset, None
            return (reset,)
        if self._is_behind:
            # In one step: what is told from now on is queued, what was before is in the log.
            self._until = max(self._log.position, self._at_least)
            self._is_behind = False
        if self._until is not None:
            return await self._catch_up(self._until)
        if not self._queue:
            return None
        entries = [entry for entry in self._queue if entry[0] > self._told]
        self._queue.clear()
        return self._tell(entries)

    async def _catch_up(self, until: Position) -> Sequence[Heard]:
        found: list[Entry] = []
        if self._told < until:
            found = await self._log.between(
                self._told, until, owner=self.owner, limit=REPLAYED_AT_ONCE
            )
        if self._reset is not None:
            return ()  # what was read meanwhile is of another log
        if len(found) < REPLAYED_AT_ONCE:
            heard = self._tell(found)
            self._told, self._until = max(self._told, until), None
            return heard
        return self._tell(found)

    def _tell(self, entries: Sequence[Entry]) -> Sequence[Heard]:
        if entries:
            self._told = entries[-1][0]
        return [event for _, event in entries]


class JobFollower(_Follower):
    """Hears the log of one job from a version on, up to the job's end."""

    def __init__(self, log: Log, job_id: UUID, after: int) -> None:
        super().__init__()
        self.job_id = job_id
        self._log = log
        self._told = after
        self._is_new = after > 0
        self._queue: deque[LiveEvent] = deque()

    def offer(self, event: LiveEvent) -> None:
        """Let it hear something, in its time; the same may be offered again."""
        if self._is_behind:
            return
        if len(self._queue) >= ROOM:
            self._fall_behind()
            return
        self._queue.append(event)
        self.wake()

    def fall_behind(self) -> None:
        """Have it read the log: it may have missed something."""
        self._fall_behind()
        self.wake()

    def _fall_behind(self) -> None:
        self._queue.clear()
        self._is_behind = True

    async def _next(self) -> Sequence[Heard] | None:
        if self._is_behind:
            self._is_behind = False  # from here on, what is told is queued
            return await self._catch_up()
        heard: list[Heard] = []
        while self._queue:
            event = self._queue.popleft()
            if event.version > self._told + 1:
                self._fall_behind()
            elif event.version == self._told + 1:
                heard += self._tell([event])
        # Behind again: look into the log before waiting.
        return heard or (() if self._is_behind else None)

    async def _catch_up(self) -> Sequence[Heard]:
        found = await self._log.of_job(self.job_id, self._told)
        heard: list[Heard] = []
        is_known = any(event.version == self._told for event in found)
        if self._told and not is_known:
            if not self._is_new:
                self.is_over = True  # it was deleted
                return ()
            heard.append(UNKNOWN)
            self._told = 0
            found = await self._log.of_job(self.job_id, 0)
        self._is_new = False
        if not found or (found[-1].is_end and found[-1].version == self._told):
            self.is_over = True
        return heard + self._tell([one for one in found if one.version > self._told])

    def _tell(self, events: list[LiveEvent]) -> list[Heard]:
        if events:
            self._told = events[-1].version
            self.is_over = self.is_over or events[-1].is_end
        return list[Heard](events)


class Watch(Listener):
    """Notices changes of one job from the moment it was opened on."""

    def __init__(self, job_id: UUID) -> None:
        super().__init__()
        self.job_id = job_id
        self._noticed = 0
        self._is_unsure = False

    def offer(self, event: LiveEvent) -> None:
        """Let it notice a change."""
        self._noticed = max(self._noticed, event.version)
        self.wake()

    def fall_behind(self) -> None:
        """Have whoever waits look for themselves."""
        self._is_unsure = True
        self.wake()

    async def newer_than(self, version: int, timeout: float) -> None:
        """Return as soon as there may be a newer version, at the end, or after the time."""
        if self._noticed <= version and not self._is_unsure and not self.is_over:
            await self._wait(timeout)
        self._is_unsure = False
