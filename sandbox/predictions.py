"""All predictions of a sandbox: the state machine and its clock.

``starting`` → ``processing`` → ``succeeded`` | ``failed`` | ``canceled``, or ``starting`` →
``aborted`` | ``canceled`` (replicate.com/docs/topics/predictions/lifecycle, 2026-06).  Each
prediction in flight has one timer for its next moment and no task, so tens of thousands fit in
one process.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping

from sandbox.catalogue import Model
from sandbox.config import SandboxConfig
from sandbox.prediction import DEFAULT_EVENTS, JSON, Event, Plan, Prediction, new_id
from sandbox.purchases import Purchases

PAGE = 100
LOGS_INTERVAL = 0.5


class PredictionBook:
    """All predictions of one sandbox, and the only place where one changes.

    ``announce`` is called with every event that a webhook could be about, and its moment.
    """

    def __init__(
        self,
        config: SandboxConfig,
        *,
        clock: Callable[[], float],
        announce: Callable[[Prediction, Event, float], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._announce = announce
        self._sweeper: asyncio.TimerHandle | None = None
        self._clear()

    def _clear(self) -> None:
        self._by_id: dict[str, Prediction] = {}
        self._ordered: list[Prediction] = []
        self._finished: deque[Prediction] = deque()
        self._numbered = 0
        self.purchases = Purchases()
        self.counts: Counter[str] = Counter()

    def reset(self) -> None:
        """Forget every prediction; those in flight stop silently."""
        for prediction in self._ordered:
            _disarm(prediction)
            _release(prediction)
        self._clear()

    def close(self) -> None:
        """Stop all timers."""
        self.reset()
        if self._sweeper is not None:
            self._sweeper.cancel()

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self._ordered)

    def create(
        self,
        model: Model,
        given: JSON,
        plan: Plan,
        *,
        version: str,
        seed: int,
        base_url: str,
        webhook: str | None = None,
        events: tuple[Event, ...] | None = None,
        cancel_after: float | None = None,
        deployment: str | None = None,
    ) -> Prediction:
        """Make a prediction and start its clock."""
        now = round(self._clock(), 3)
        if self._ordered:
            now = max(now, self._ordered[-1].created_at)
        self._numbered += 1
        prediction = Prediction(
            id=new_id(),
            number=self._numbered,
            model=model,
            version=version,
            given=given,
            order=model.order(given),
            seed=seed,
            plan=plan,
            base_url=base_url,
            created_at=now,
            deadline=None if cancel_after is None else now + cancel_after,
            deployment=deployment,
            webhook=webhook,
            events=DEFAULT_EVENTS if events is None else events,
            events_given=events is not None,
        )
        self._by_id[prediction.id] = prediction
        self._ordered.append(prediction)
        self.counts["starting"] += 1
        self.purchases.add(model.ref, given, webhook)
        self._arm(prediction)
        if self._sweeper is None:
            self._sweep()
        return prediction

    def find(self, prediction_id: str) -> Prediction | None:
        """Return the prediction, wiped if its hour is over; None when unknown."""
        prediction = self._by_id.get(prediction_id)
        if prediction is not None:
            self._wipe_if_due(prediction)
        return prediction

    def cancel(self, prediction: Prediction) -> None:
        """Cancel; a prediction that has ended stays as it is."""
        if prediction.is_terminal:
            return
        now = self._clock()
        if prediction.started_at is None:
            prediction.started_at = now
        self._end(prediction, "canceled", now)

    async def wait(self, prediction: Prediction, timeout: float) -> bool:
        """Wait until the prediction has ended; False when the time ran out first."""
        if prediction.is_terminal:
            return True
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        prediction.waiters.append(waiter)
        await asyncio.wait([waiter], timeout=timeout)
        if waiter in prediction.waiters:
            prediction.waiters.remove(waiter)
        return prediction.is_terminal

    def page(
        self,
        *,
        before: int | None = None,
        after: int | None = None,
        since: float | None = None,
        until: float | None = None,
    ) -> tuple[list[Prediction], bool, bool]:
        """Return up to 100 predictions, newest first, and whether newer and older exist.

        ``before`` and ``after`` are numbers of a neighbouring page (exclusive); ``since`` is
        inclusive and ``until`` exclusive, on the time of creation.
        """
        ordered = self._ordered
        low, high = 0, len(ordered)
        if since is not None:
            low = bisect_left(ordered, since, key=lambda p: p.created_at)
        if until is not None:
            high = bisect_left(ordered, until, key=lambda p: p.created_at)
        if before is not None:
            stop = max(
                low, min(high, bisect_left(ordered, before, key=lambda p: p.number))
            )
            start = max(low, stop - PAGE)
        elif after is not None:
            start = max(low, bisect_left(ordered, after + 1, key=lambda p: p.number))
            stop = min(high, start + PAGE)
        else:
            start, stop = max(low, high - PAGE), high
        found = ordered[start:stop]
        for prediction in found:
            self._wipe_if_due(prediction)
        return found[::-1], stop < high, start > low

    # The clock of one prediction.

    def _arm(self, prediction: Prediction) -> None:
        """Set the timer for the prediction's next moment, if it has one."""
        moment = self._next_moment(prediction)
        if prediction.deadline is not None and (
            moment is None or prediction.deadline < moment
        ):
            moment = prediction.deadline
        if moment is None:
            return
        loop = asyncio.get_running_loop()
        delay = max(0.0, moment - self._clock())
        prediction.timer = loop.call_later(delay, self._advance, prediction, moment)

    def _next_moment(self, prediction: Prediction) -> float | None:
        plan = prediction.plan
        if prediction.started_at is None:
            return None if plan.queue is None else prediction.created_at + plan.queue
        end = None if plan.run is None else prediction.started_at + plan.run
        if prediction.webhook is not None and "logs" in prediction.events:
            next_logs = self._clock() + LOGS_INTERVAL
            return next_logs if end is None else min(end, next_logs)
        return end

    def _advance(self, prediction: Prediction, moment: float) -> None:
        """Do what is due at this moment, then wait for the next."""
        plan, now = prediction.plan, max(moment, self._clock())
        if prediction.deadline is not None and prediction.deadline <= moment:
            never_started = prediction.started_at is None
            self._end(prediction, "aborted" if never_started else "canceled", now)
            return
        if prediction.started_at is None:
            if plan.ending == "aborted":
                self._end(prediction, "aborted", now)
                return
            self._start(prediction, now)
        elif plan.run is not None and prediction.started_at + plan.run <= moment:
            if plan.ending == "succeeded":
                prediction.output_at = now
                self._announce(prediction, "output", now)
            self._end(prediction, plan.ending, now)
            return
        else:
            self._announce(prediction, "logs", now)
        self._arm(prediction)

    def _start(self, prediction: Prediction, now: float) -> None:
        prediction.started_at = now
        self._count(prediction, "processing")
        self._announce(prediction, "start", now)

    def _end(self, prediction: Prediction, status: str, now: float) -> None:
        _disarm(prediction)
        prediction.completed_at = now
        self._count(prediction, status)
        self._finished.append(prediction)
        self._announce(prediction, "completed", now)
        if prediction.plan.wiped_at_end:
            _wipe(prediction)
        _release(prediction)

    def _count(self, prediction: Prediction, status: str) -> None:
        self.counts[prediction.status] -= 1
        self.counts[status] += 1
        prediction.status = status

    # The hour after which data are wiped.

    def _wipe_if_due(self, prediction: Prediction) -> None:
        age = self._clock() - prediction.created_at
        if prediction.is_terminal and age > self._config.retention.total_seconds():
            _wipe(prediction)

    def _sweep(self) -> None:
        """Wipe what is over an hour old, and forget what is older still."""
        retention = self._config.retention.total_seconds()
        horizon = self._clock() - retention
        while self._finished and self._finished[0].created_at < horizon:
            _wipe(self._finished.popleft())
        oldest = horizon - self._config.forget_after.total_seconds()
        if self._ordered and self._ordered[0].created_at < oldest:
            self._forget_older_than(oldest)
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(max(0.05, min(5.0, retention / 4)), self._sweep)

    def _forget_older_than(self, moment: float) -> None:
        cut = bisect_left(self._ordered, moment, key=lambda p: p.created_at)
        for prediction in self._ordered[:cut]:
            _disarm(prediction)
            del self._by_id[prediction.id]
            self.counts[prediction.status] -= 1
        self._ordered = self._ordered[cut:]

    def status_counts(self) -> Mapping[str, int]:
        """Return how many predictions are in each status."""
        return {status: count for status, count in sorted(self.counts.items()) if count}


def _wipe(prediction: Prediction) -> None:
    """Remove input, output and logs (replicate.com/docs/topics/predictions/data-retention)."""
    prediction.given = {}
    prediction.data_removed = True


def _disarm(prediction: Prediction) -> None:
    if prediction.timer is not None:
        prediction.timer.cancel()
        prediction.timer = None


def _release(prediction: Prediction) -> None:
    for waiter in prediction.waiters:
        if not waiter.done():
            waiter.set_result(None)
    prediction.waiters.clear()
