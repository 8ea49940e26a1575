"""Sends webhooks: claims what is due, calls the receivers, writes down what they answered.

Runs in every worker beside the engine, with places and database connections of its own, so
that receivers who are slow keep nobody's picture waiting.  Among receivers nobody gets more
places than `EACH` at once, and no owner more than `OWNER`.

What was sent and not settled (a process that died in between) is sent again after the lease,
with the same `webhook-id`: every webhook arrives at least once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import aiohttp
import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.batching import Batcher
from app.core.counters import SharedCounters
from app.core.crashpoints import Point, reach
from app.core.guarded_http import CONNECT, was_refused
from app.core.patience import end
from app.domain.errors import OutboundRefused, Unavailable
from app.domain.notices import TEST
from app.domain.redelivery import GONE, RedeliveryPolicy, read_retry_after
from app.services import notifications, receivers
from app.services.ledger import Ledger
from app.services.letters import Letters
from app.services.notifications import Dispatch, Receiver, Verdict, share_out
from app.services.outbound import Outbound

log = structlog.get_logger("app.courier")

PATIENCE: Final = timedelta(seconds=20)  # with a receiver, for everything
LEASE: Final = timedelta(seconds=45)  # PATIENCE, and time to settle
ROUND: Final = timedelta(milliseconds=500)  # for what nobody woke us for
PLACES: Final = 96
EACH: Final = 4  # places of one receiver
OWNER: Final = 32  # places of all receivers of one owner
MOST_READ: Final = (
    4096  # bytes of an answer; nobody is interested, but it ends the request
)
# A receiver may use all of our patience to think, and others are not let be silent for so long.
_SILENCE: Final = aiohttp.ClientTimeout(
    total=None, sock_connect=CONNECT.total_seconds()
)
_INSIST: Final = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries to settle
_TROUBLE = (Unavailable, DBAPIError)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a receiver answered; or why it did not, in words for its owner."""

    status: int | None
    error: str | None
    retry_after: timedelta | None = None

    @property
    def is_success(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Courier:
    """Sends webhooks.  All methods belong to the loop's thread."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        outbound: Outbound,
        letters: Letters,
        counters: SharedCounters,
        policy: RedeliveryPolicy = RedeliveryPolicy(),
        places: int = PLACES,
    ) -> None:
        """`ledger` should have connections that nobody else waits for."""
        self._ledger = ledger
        self._outbound = outbound
        self._letters = letters
        self._counters = counters
        self._policy = policy
        self._places = places
        self._under_way: dict[asyncio.Task[None], Receiver] = {}
        self._stirred = asyncio.Event()
        self._is_pressed = False  # something due was left for want of a place
        self._is_draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._settles: Batcher[Verdict, bool] = Batcher(
            self._settle,
            limit=100,
            is_shared=lambda error: isinstance(error, Unavailable),
        )

    @property
    def in_flight(self) -> int:
        """How many webhooks are being sent."""
        return len(self._under_way)

    def wake(self) -> None:
        """Look now: something was written that is due."""
        self._stirred.set()

    def start(self) -> None:
        """Start sending, in the running loop."""
        self._tasks = [asyncio.create_task(self._serve(), name="courier")]

    async def breakdown(self) -> None:
        """Return when the courier ended that nobody ended."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def drain(self, patience: timedelta) -> None:
        """Send nothing more, wait for the answers under way, cut off what takes too long.

        What is cut off is sent again when the lease ends, by whoever is there then.
        """
        self._is_draining = True
        self._stirred.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=patience.total_seconds())
        left = list(self._under_way)
        await end(*left)
        log.info("courier.drained", cut_off=len(left))

    async def _serve(self) -> None:
        while not self._is_draining:
            self._stirred.clear()
            try:
                await self._take()
            except _TROUBLE as error:
                log.warning("courier.failed", error=type(error).__name__)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROUND.total_seconds()):
                    await self._stirred.wait()

    async def _take(self) -> None:
        """Claim what is due and there is a place for, and begin to send it."""
        free = self._places - len(self._under_way)
        if free <= 0:
            return
        async with self._ledger.transaction() as conn:
            waiting = await notifications.waiting(conn)
            self._is_pressed = bool(waiting)
            shares = share_out(
                free, waiting, list(self._under_way.values()), each=EACH, owner=OWNER
            )
            if not shares:
                return
            most_tries = len(self._policy.schedule)
            taken = await notifications.claim(
                conn, shares, lease=LEASE, most_tries=most_tries
            )
        for dispatch in taken:
            task = asyncio.create_task(self._deliver(dispatch))
            self._under_way[task] = Receiver(dispatch.receiver, dispatch.owner)
            task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        if self._is_pressed:
            self._stirred.set()

    # --------------------------------------------------------------------- one webhook

    async def _deliver(self, dispatch: Dispatch) -> None:
        began, at = time.monotonic(), datetime.now(UTC)
        answer = await self._send(dispatch, at)
        reach(Point.WEBHOOK_SENT)
        seconds = round(time.monotonic() - began, 3)
        verdict = self._judge(dispatch, answer, at, seconds)
        outcome = "retried" if verdict.state == "pending" else verdict.state
        self._counters.add("webhook_deliveries", outcome=outcome)
        # Neither the URL, which may hold a secret, nor anything that was said.
        log.info(
            "webhook.tried",
            webhook_id=dispatch.webhook_id,
            type=dispatch.type,
            number=dispatch.number,
            status=answer.status,
            outcome=outcome,
        )
        await self._insist(verdict)

    async def _send(self, dispatch: Dispatch, now: datetime) -> _Answer:
        """Call the receiver, once."""
        letter = self._letters.write(dispatch, now)
        try:
            target = self._outbound.check(dispatch.url)
            async with asyncio.timeout(PATIENCE.total_seconds()):
                async with self._outbound.session_for(target).post(
                    target,
                    data=letter.body,
                    headers=letter.headers,
                    allow_redirects=False,
                    timeout=_SILENCE,
                ) as response:
                    answer = _read(response.status, response.headers.get("Retry-After"))
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                        async with asyncio.timeout(1):
                            await response.content.read(MOST_READ)
                    return answer
        except OutboundRefused as error:
            return _Answer(None, str(error))
        except TimeoutError:
            return _Answer(None, "No answer in time.")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return _Answer(None, _explain(error))

    def _judge(
        self, dispatch: Dispatch, answer: _Answer, at: datetime, seconds: float
    ) -> Verdict:
        """Decide what becomes of a notification after a try."""
        state, pause = "delivered", None
        if answer.status == GONE:
            state = "dropped"
        elif not answer.is_success:
            # A test is watched by somebody, who will ask for another one.
            tries = 10**6 if dispatch.type == TEST else dispatch.tries
            pause = self._policy.pause(
                tries,
                random.random(),
                status=answer.status,
                retry_after=answer.retry_after,
            )
            state = "failed" if pause is None else "pending"
        return Verdict(dispatch, state, pause, at, seconds, answer.status, answer.error)

    # -------------------------------------------------------------------------- settle

    async def _insist(self, verdict: Verdict) -> None:
        """Write down what came of it; what cannot be written is sent again, in the end."""
        for pause in (*_INSIST, None):
            try:
                stood = await self._settles(verdict)
            except _TROUBLE as error:
                log.warning("webhook.unsettled", error=type(error).__name__)
                if pause is not None:
                    await asyncio.sleep(pause)
                continue
            if not stood:
                log.warning(
                    "webhook.claim_lost", webhook_id=verdict.dispatch.webhook_id
                )
            return

    async def _settle(self, verdicts: Sequence[Verdict]) -> Sequence[bool]:
        async with self._ledger.transaction() as conn:
            stood = await notifications.settle(conn, verdicts)
            await _mark(conn, verdicts)
            off = await self._switch_off(conn, verdicts)
        for endpoint_id in off:
            log.warning("endpoint.disabled", endpoint_id=str(endpoint_id))
        return [one.dispatch.id in stood for one in verdicts]

    async def _switch_off(
        self, conn: AsyncConnection, verdicts: Sequence[Verdict]
    ) -> list[UUID]:
        """Disable those who said they are gone, and those who have been so for days."""
        off: list[UUID] = []
        if gone := _endpoints(verdicts, lambda one: one.status_code == GONE):
            off += await receivers.switch_off(conn, gone, "It answered 410 (Gone).")
        if given_up := _endpoints(verdicts, _is_given_up):
            enough = self._policy.enough
            reason = f"Nothing arrived for {enough.days} days."
            off += await receivers.switch_off_dead(
                conn, given_up, reason, enough=enough
            )
        return off


async def _mark(conn: AsyncConnection, verdicts: Sequence[Verdict]) -> None:
    """Note since when endpoints fail; says nothing to the table while they do well."""
    well = _endpoints(verdicts, lambda one: one.state == "delivered")
    ill = _endpoints(verdicts, lambda one: one.state != "delivered") - well
    recovered = well & _endpoints(verdicts, lambda one: one.dispatch.is_failing)
    if recovered:
        await receivers.mark_well(conn, recovered)
    if ill:
        await receivers.mark_ill(conn, ill)


def _endpoints(
    verdicts: Sequence[Verdict], wanted: Callable[[Verdict], bool]
) -> set[UUID]:
    return {
        one.dispatch.endpoint_id
        for one in verdicts
        if one.dispatch.endpoint_id is not None and wanted(one)
    }


def _is_given_up(verdict: Verdict) -> bool:
    return verdict.state == "failed" and verdict.dispatch.type != TEST


def _read(status: int, retry_after: str | None) -> _Answer:
    """Read the head of an answer."""
    error = None
    if 300 <= status < 400:
        error = f"It answered {status}: redirects are not followed."
    elif not 200 <= status < 300:
        error = f"It answered {status}."
    return _Answer(status, error, read_retry_after(retry_after, datetime.now(UTC)))


def _explain(error: Exception) -> str:
    """Say why there was no answer; never where a name led to."""
    if was_refused(error):
        return "The URL leads to an address that is not public."
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "The name could not be looked up."
        case aiohttp.ClientSSLError():
            return "TLS failed: is the certificate valid for this name?"
        case aiohttp.ClientConnectorError():
            return "The connection could not be made."
        case aiohttp.ClientResponseError():
            return "What it answered is no HTTP."
    return "The connection broke before there was an answer."
