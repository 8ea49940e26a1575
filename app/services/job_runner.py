"""One look at one job: where talking to the provider meets the job's state.

`advance` gets a claim, does what the job's stage asks for with no transaction open, and
settles: one event, one next look.  It never decides; it reports what happened.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import structlog
from sqlalchemy.exc import DBAPIError, IntegrityError

from app.core.breaker import CircuitBreaker
from app.core.counters import SharedCounters
from app.core.crashpoints import Point, reach
from app.domain import errors, generation
from app.domain.durations import Durations
from app.domain.errors import (
    LostClaim,
    OutputError,
    OutputInvalid,
    PredictionNotFound,
    ServiceError,
    Unavailable,
)
from app.domain.events import (
    Event,
    Expired,
    GenerationCancelled,
    GenerationFailed,
    Generated,
    LookFailed,
    NotFound,
    OutcomeUnknown,
    OutputFailed,
    Progressed,
    Refused,
    Started,
    Stored,
)
from app.domain.generation import Failure, MediaClient, Phase, Prediction, RefusalKind
from app.domain.lifecycle import IllegalEvent
from app.domain.pricing import PriceTable
from app.domain.provenance import SourceType
from app.domain.state import Stage
from app.services.callback_urls import callback_url
from app.services.job_records import Claim, StoredOutput
from app.services.job_service import Change, Hold
from app.services.ledger import LEASE, Ledger
from app.services.media_store import MediaStore
from app.services.reconciler import Reconciler, Seeker

log = structlog.get_logger("app.runner")

SHORTEST_CANCEL_AFTER = timedelta(seconds=5)  # the provider's minimum
CONFIRMATION = timedelta(seconds=30)  # how long a cancelled prediction may linger
FETCHES = 2  # tries for a file whose bytes are complete and wrong
DOWNLOADS_AT_ONCE = 64
SOON = timedelta(milliseconds=500)  # a fetch that takes longer is worth telling about

# Why purchases are held back: what the breaker is told and callers see.
ACCOUNT = "provider_account"
UNREACHABLE = "provider_unavailable"


@dataclass(frozen=True, slots=True)
class _Result:
    """What a look came to.

    `made`: what is to be written down just before, if it is not yet.  `cost_usd` is what the
    event tells of the cost of the prediction, and `made_usd` what that does; None: nothing.
    """

    event: Event
    made: Generated | None = None
    made_usd: Decimal | None = None
    outputs: tuple[StoredOutput, ...] = ()
    cost_usd: Decimal | None = None


class JobRunner:
    """Carries a claimed job one step further.  Safe to share within one event loop."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        client: MediaClient,
        store: MediaStore,
        counters: SharedCounters,
        breaker: CircuitBreaker,
        max_output_bytes: int,
        prices: PriceTable,
        reconciler: Reconciler,
        durations: Durations,
        callback_base_url: str | None = None,
        on_stored: Callable[[Sequence[str]], None] = lambda keys: None,
    ) -> None:
        """`callback_base_url` is where the provider reaches our JSON API, if it can.

        `on_stored(keys)` is told of the files of every job that is completed, afterwards.
        """
        self._ledger = ledger
        self._client = client
        self._store = store
        self._counters = counters
        self._breaker = breaker
        self._max_output_bytes = max_output_bytes
        self._prices = prices
        self._reconciler = reconciler
        self._durations = durations
        self._callback_base_url = callback_base_url
        self._on_stored = on_stored
        self._downloads = asyncio.Semaphore(DOWNLOADS_AT_ONCE)

    async def advance(self, claim: Claim) -> timedelta | None:
        """Look at the job and settle; say how soon it wants the next look.

        None when it is finished, or in other hands.  Never raises but for cancellation,
        which leaves the claim to its lease.
        """
        with structlog.contextvars.bound_contextvars(
            job_id=str(claim.job_id), request_id=claim.request_id
        ):
            reach(Point.LOOK_BEGUN)
            try:
                result = await self._look(claim)
            except LostClaim:
                return self._give_way()
            except Unavailable as error:
                log.warning("look.failed", code=error.code, reason=str(error))
                result = _Result(LookFailed(error.code))
            except Exception as error:
                log.exception("look.crashed")
                result = _Result(LookFailed(type(error).__name__))
            reach(Point.OUTPUT_STORED, when=bool(result.outputs))
            return await self._settle(claim, result)

    def _give_way(self) -> timedelta | None:
        """Leave the job to whoever has it now."""
        log.warning("claim.lost")
        self._counters.add("claims_lost")
        return None

    # -------------------------------------------------------------------------- looks

    async def _look(self, claim: Claim) -> _Result:
        match claim.state.stage:
            case Stage.SUBMITTING if claim.is_fresh:
                return await self._buy(claim)
            case Stage.SUBMITTING:
                # Whoever intended this attempt died before saying how it went.
                self._counters.add("unknown_outcomes", reason="worker_died")
                return _Result(OutcomeUnknown("the worker died"))
            case Stage.RECONCILING:
                return await self._reconcile(claim)
            case Stage.GENERATING:
                return await self._watch(claim)
            case Stage.STORING:
                return await self._store_late(claim)
            case _:
                raise AssertionError(f"nothing to look at in {claim.state.stage}")

    async def _buy(self, claim: Claim) -> _Result:
        """Send the one request of this attempt, unless this process was asleep too long.

        Whoever slept through the lease has lost the attempt to others, who may have declared
        it lost and bought again.
        """
        if time.monotonic() - claim.began > LEASE.total_seconds():
            raise LostClaim("The purchase came too late.")
        left = claim.state.deadline_at - claim.now
        reach(Point.PURCHASE_INTENDED)
        turn = self._breaker.turn
        outcome = await self._client.create(
            claim.request,
            cancel_after=max(left, SHORTEST_CANCEL_AFTER),
            webhook=self._webhook(claim),
        )
        reach(Point.PURCHASE_MADE)
        await self._report(turn, outcome)
        match outcome:
            case generation.Started(prediction):
                usual = self._durations.usual_seconds(claim.request.model)
                return _Result(Started(prediction.handle, usual_seconds=usual))
            case generation.Refused(kind, failure, retry_after):
                log.warning("purchase.refused", kind=kind.value, code=failure.code)
                wait = retry_after.total_seconds() if retry_after else None
                return _Result(Refused(kind, failure, wait))
            case generation.Unknown(reason):
                log.warning("purchase.unknown", reason=reason)
                self._counters.add("unknown_outcomes", reason="no_answer")
                return _Result(OutcomeUnknown(reason))

    async def _report(self, turn: datetime, outcome: generation.CreateOutcome) -> None:
        """Tell the breaker of purchases what a create says about the ones to come."""
        match outcome:
            case generation.Started():
                await self._breaker.report_success(turn)
            case generation.Refused(RefusalKind.ACCOUNT, failure):
                # What is forbidden may be this model only: that takes more than one to say.
                is_fatal = failure.code == ACCOUNT
                await self._breaker.report_trouble(turn, ACCOUNT, is_fatal=is_fatal)
            case generation.Unknown() | generation.Refused(
                RefusalKind.TRANSIENT | RefusalKind.UNREACHABLE
            ):
                await self._breaker.report_trouble(turn, UNREACHABLE)
            case generation.Refused():
                await self._breaker.report_answer(turn)

    def _webhook(self, claim: Claim) -> str | None:
        """Compose the address at which the provider may tell about this attempt."""
        if self._callback_base_url is None:
            return None
        assert claim.attempt_id is not None and claim.attempt_token is not None
        return callback_url(
            self._callback_base_url, claim.attempt_id, claim.attempt_token
        )

    async def _reconcile(self, claim: Claim) -> _Result:
        """Ask the provider whether the purchase of unknown fate was made."""
        attempt = claim.state.attempt
        assert attempt is not None and claim.attempt_id is not None
        found = await self._reconciler.find(
            Seeker(claim.attempt_id, claim.request, attempt.sent_at)
        )
        if found is None:
            return _Result(NotFound())
        self._counters.add("orphans_adopted", by="list")
        if (await self._breaker.state()).reason == UNREACHABLE:
            # The answers get lost, and the provider sells all the same.
            await self._breaker.report_success(self._breaker.turn)
        return _Result(Started(found.prediction.handle, is_adopted=True))

    async def _watch(self, claim: Claim) -> _Result:
        """Read the prediction; end it first when nobody wants it any more."""
        state, handle = claim.state, _handle(claim)
        is_late = claim.now >= state.deadline_at
        try:
            if state.is_cancel_requested or is_late:
                await self._client.cancel(handle)
            prediction = await self._client.get(handle)
        except PredictionNotFound:
            # It was bought, so it is never bought again for this: a stale answer would
            # make it the second purchase.  The deadline bounds the wait.
            log.warning("prediction.not_found", handle=handle)
            return _Result(Expired() if is_late else LookFailed("not_found"))
        match prediction.phase:
            case Phase.QUEUED | Phase.RUNNING:
                if claim.now >= state.deadline_at + CONFIRMATION:
                    return _Result(Expired())
                usual = self._durations.usual_seconds(claim.request.model)
                progress = Progressed(
                    prediction.progress, usual, is_contradicted=state.has_news
                )
                return _Result(progress)
            case Phase.CANCELLED | Phase.ABORTED:
                is_aborted = prediction.phase is Phase.ABORTED
                cost = self._cost(claim, prediction)
                return _Result(GenerationCancelled(is_aborted), cost_usd=cost)
            case Phase.FAILED:
                failure = prediction.failure or _unexplained()
                return _Result(
                    GenerationFailed(failure, prediction.is_transient),
                    cost_usd=self._cost(claim, prediction),
                )
            case Phase.SUCCEEDED:
                return await self._collect(claim, prediction)

    async def _collect(self, claim: Claim, prediction: Prediction) -> _Result:
        """Fetch the picture; say that it is made, at the latest when the fetch takes long."""
        if not prediction.outputs:
            # What was made and removed is paid for; how many they were, nobody knows any more.
            removed = claim.num_outputs if prediction.data_removed else 0
            cost = self._cost(claim, prediction, [None] * removed)
            return _Result(_nothing_made(prediction), cost_usd=cost)
        self._learn(claim, prediction)
        learned = time.monotonic()
        fetching = asyncio.ensure_future(self._fetch(claim, prediction))
        try:
            await asyncio.wait((fetching,), timeout=SOON.total_seconds())
            made = Generated(prediction.predict_seconds, time.monotonic() - learned)
            usd = self._cost_unseen(claim, prediction)
            if fetching.done() and fetching.exception() is None:
                # One transaction instead of two.
                return replace(fetching.result(), made=made, made_usd=usd)
            change = Change(claim.job_id, made, Hold.KEEP, claim.token, cost_usd=usd)
            await self._ledger.change(change)
            reach(Point.PICTURE_GENERATED)
            return await fetching
        finally:
            # Whatever became of it is known by now, or nobody wants it any more.
            fetching.cancel()
            await asyncio.gather(fetching, return_exceptions=True)

    def _learn(self, claim: Claim, prediction: Prediction) -> None:
        """Remember how long the model took."""
        if prediction.created_at is not None and prediction.completed_at is not None:
            took = prediction.completed_at - prediction.created_at
            self._durations.learn(claim.request.model, took)

    async def _store_late(self, claim: Claim) -> _Result:
        """Fetch what an earlier look could not."""
        try:
            prediction = await self._client.get(_handle(claim))
        except PredictionNotFound:
            log.warning("prediction.not_found", handle=_handle(claim))
            return _Result(LookFailed("not_found"))
        return await self._fetch(claim, prediction)

    async def _fetch(self, claim: Claim, prediction: Prediction) -> _Result:
        """Bring every output into the store."""
        if not prediction.outputs:
            failure = Failure(
                "output_expired", "The provider removed the files.", retryable=True
            )
            return _Result(OutputFailed(failure, is_final=True))
        origin = SourceType.of(has_pictures=claim.has_pictures)
        fetched = await asyncio.gather(
            *(
                self._fetch_one(index, url, origin=origin)
                for index, url in enumerate(prediction.outputs)
            ),
            return_exceptions=True,
        )
        outputs: list[StoredOutput] = []
        for one in fetched:
            if isinstance(one, OutputError):
                log.warning("output.failed", code=one.code, reason=str(one))
                failure = Failure(one.code, str(one), retryable=True)
                is_final = isinstance(one, OutputInvalid)
                return _Result(OutputFailed(failure, is_final))
            if isinstance(one, BaseException):
                raise one
            outputs.append(one)
        return _Result(
            Stored(len(outputs), _warnings(claim, len(outputs))),
            outputs=tuple(outputs),
            cost_usd=self._cost_seen(claim, prediction, outputs),
        )

    def _cost(
        self, claim: Claim, prediction: Prediction, pixels: Sequence[int | None] = ()
    ) -> Decimal | None:
        """Say what a prediction that is over cost, at the prices of the job's first day."""
        return self._prices.actual(
            claim.request.model,
            claim.state.created_at.astimezone(UTC).date(),
            pixels=pixels,
            predict_seconds=prediction.busy_seconds,
        )

    def _cost_unseen(self, claim: Claim, prediction: Prediction) -> Decimal | None:
        """Say what a picture cost before it is here; None when only its pixels can tell.

        It is paid for whatever becomes of its files.
        """
        return self._cost(claim, prediction, [None] * len(prediction.outputs))

    def _cost_seen(
        self,
        claim: Claim,
        prediction: Prediction,
        outputs: Sequence[StoredOutput],
    ) -> Decimal | None:
        """Say what the files add to what `_cost_unseen` told."""
        if self._cost_unseen(claim, prediction) is not None:
            return None
        pixels = [output.width * output.height for output in outputs]
        return self._cost(claim, prediction, pixels)

    async def _fetch_one(
        self, index: int, url: str, *, origin: SourceType
    ) -> StoredOutput:
        for left in reversed(range(FETCHES)):
            try:
                async with self._downloads:
                    stored = await self._store.put(
                        self._client.download(url),
                        max_bytes=self._max_output_bytes,
                        origin=origin,
                    )
                return StoredOutput(
                    index=index,
                    key=stored.key,
                    sha256=stored.sha256,
                    content_type=stored.content_type,
                    size_bytes=stored.size_bytes,
                    width=stored.width,
                    height=stored.height,
                    provenance=stored.provenance,
                )
            except OutputInvalid:
                if left == 0:
                    raise
        raise AssertionError("unreachable")

    # ------------------------------------------------------------------------- settle

    async def _settle(self, claim: Claim, result: _Result) -> timedelta | None:
        """Write the result down, however long the database takes to come back.

        Safe to insist: the claim's token refuses the settle once somebody else has the job.
        """
        changes = []
        if result.made is not None:
            changes.append(
                Change(
                    claim.job_id,
                    result.made,
                    Hold.KEEP,
                    claim.token,
                    cost_usd=result.made_usd,
                )
            )
        changes.append(
            Change(
                claim.job_id,
                result.event,
                Hold.RELEASE,
                claim.token,
                result.outputs,
                result.cost_usd,
            )
        )
        waited, pause = timedelta(0), timedelta(milliseconds=50)
        while waited < LEASE * 2:
            try:
                # Asked for together, they are written together, in order.
                *_, outcome = await asyncio.gather(*map(self._ledger.change, changes))
            except LostClaim:
                return self._give_way()
            except IntegrityError:
                return await self._settle_taken(claim)
            except IllegalEvent:
                # A mistake of ours, and nothing was changed: the lease ends, and somebody
                # looks again.
                log.exception("settle.illegal", event_name=type(result.event).__name__)
                return self._give_way()
            except (Unavailable, DBAPIError):
                # Gone, or not willing (the loser of a deadlock): it may be the next time.
                await asyncio.sleep(pause.total_seconds())
                waited, pause = waited + pause, min(pause * 2, timedelta(seconds=2))
            else:
                reach(Point.PURCHASE_SAVED, when=isinstance(result.event, Started))
                reach(Point.JOB_SETTLED, when=outcome.after.is_terminal)
                await self._keep(claim, result.outputs)
                self._on_stored([output.key for output in result.outputs])
                return outcome.next_look
        return self._give_way()

    async def _keep(self, claim: Claim, outputs: Sequence[StoredOutput]) -> None:
        """See that the recorded files are still there; store again what is not.

        Deleting another job with the same bytes may have removed a file between storing
        and recording it; from the record on it cannot (see `file_locks`).
        """
        for output in outputs:
            try:
                if await self._has(output):
                    continue
                log.warning("file.missing", key=output.key)
                prediction = await self._client.get(_handle(claim))
                again = await self._fetch_one(
                    output.index,
                    prediction.outputs[output.index],
                    origin=SourceType.of(has_pictures=claim.has_pictures),
                )
                if again.key != output.key:
                    log.error("file.lost", key=output.key)
            except (ServiceError, IndexError) as error:
                log.error("file.lost", key=output.key, reason=type(error).__name__)

    async def _has(self, output: StoredOutput) -> bool:
        try:
            await self._store.head(output.key)
        except errors.NotFound:
            return False
        return True

    async def _settle_taken(self, claim: Claim) -> timedelta | None:
        """The handle belongs to another attempt: reconcile this one like any unknown."""
        log.error("handle.taken")
        event: Event = OutcomeUnknown("the handle belongs to another attempt")
        if claim.state.stage is Stage.RECONCILING:
            event = NotFound()
        change = Change(claim.job_id, event, Hold.RELEASE, claim.token)
        try:
            return (await self._ledger.change(change)).next_look
        except (LostClaim, IllegalEvent, Unavailable, DBAPIError):
            return self._give_way()


def _handle(claim: Claim) -> str:
    attempt = claim.state.attempt
    if attempt is None or attempt.handle is None:
        raise AssertionError("a bought attempt has a handle")
    return attempt.handle


def _warnings(claim: Claim, stored: int) -> tuple[str, ...]:
    if stored < claim.num_outputs:
        return (
            f"{claim.num_outputs} outputs were asked for and {stored} came:"
            " the model withheld the rest.",
        )
    return ()


def _unexplained() -> Failure:
    return Failure("provider_error", "The generation failed.", retryable=True)


def _nothing_made(prediction: Prediction) -> Event:
    if prediction.data_removed:
        failure = Failure(
            "output_expired", "The provider removed the files.", retryable=True
        )
        return GenerationFailed(failure, is_transient=False)
    failure = Failure("no_output", "The model made no picture.", retryable=True)
    return GenerationFailed(failure, is_transient=True)
