"""Every figure a decision uses, and the one owner of retries."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a purchase that failed is tried again: the one owner of retries.

    The n-th retry waits a random part (full jitter) of `base` seconds times `base` to the
    power n-1, at most `cap`; a `Retry-After` is honoured up to `cap`.
    """

    max_retries: int = 3
    base: float = 2.0
    cap: timedelta = timedelta(minutes=5)

    def delay(
        self, retry: int, draw: float, *, at_least: float | None = None
    ) -> timedelta:
        """Say how long to wait before retry number `retry` (from 1); `draw` is 0…1."""
        cap = self.cap.total_seconds()
        exponent = min(retry - 1, 32)
        ceiling = min(cap, max(self.base, 1.0) * self.base**exponent)
        floor = min(max(at_least or 0.0, 0.0), cap)
        return timedelta(seconds=max(floor, draw * ceiling))


@dataclass(frozen=True, slots=True)
class Policy:
    """Every figure a decision uses.

    `reconcile_at` are the ages of a SENT attempt at which the provider is asked for it; the
    last one is the grace period.  `data_lifetime` is how long the provider keeps what we
    need for that and the files (an hour; replicate.com/docs/topics/predictions/
    data-retention), less a margin.  `last_resort` is how long after its time
    a job is still looked at when no look comes to an end; by then `Cancel-After` has ended
    whatever runs at the provider.

    Looks that end without a word in a row, as when the worker dies of the job, are spaced out
    beyond `silent_looks_forgiven`, and end it at `most_silent_looks`.

    Webhooks and the sweep of the provider's list bring the news.  A look of a job's own is
    for stragglers: it comes when `tardiness` times the usual time of the model are over
    (`unknown_usual` where nothing is known), or it and `longest_look`, and then ever more
    rarely.
    """

    retry: RetryPolicy = RetryPolicy()
    reconcile_at: tuple[timedelta, ...] = tuple(
        timedelta(seconds=s) for s in (2, 10, 30, 60, 120)
    )
    data_lifetime: timedelta = timedelta(minutes=55)
    shortest_look: timedelta = timedelta(milliseconds=500)
    longest_look: timedelta = timedelta(seconds=60)
    straggler_look: timedelta = timedelta(seconds=5)
    tardiness: float = 3.0
    unknown_usual: timedelta = timedelta(seconds=3)
    account_pause: timedelta = timedelta(seconds=30)
    last_resort: timedelta = timedelta(minutes=10)
    silent_looks_forgiven: int = 2
    most_silent_looks: int = 10

    @property
    def grace(self) -> timedelta:
        """How long an unknown outcome may stay unknown."""
        return self.reconcile_at[-1]

    def next_look(self, age: timedelta, usual_seconds: float | None) -> timedelta:
        """Say how soon to look at a prediction of this age that nobody told of.

        Not before it is a straggler; then after a third of its age, bounded.
        """
        usual = self.unknown_usual
        if usual_seconds is not None:
            usual = timedelta(seconds=min(max(usual_seconds, 0.0), 86_400.0))
        late = min(usual * self.tardiness, usual + self.longest_look)
        late = max(late, self.straggler_look)
        if age < late:
            return max(late - age, self.shortest_look)
        return min(max(age / 3, self.straggler_look), self.longest_look)

    def doubted_look(self, doubts: int) -> timedelta:
        """Say how soon to read again what was contradicted `doubts` times (from 1)."""
        wait = self.shortest_look / 2 * 2.0 ** min(doubts - 1, 16)
        return min(wait, self.straggler_look)
