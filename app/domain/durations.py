"""How long models take, learned from the predictions of late."""

from __future__ import annotations

from collections import deque
from datetime import timedelta

REMEMBERED = 50  # per model
MOST_MODELS = 1000
EARLIER = 0.8  # of the shortest time seen: nobody is expected before


class Durations:
    """Remembers the last durations of each model, from creation to the end.

    What one process saw; another may know others.  Nothing depends on them but when to ask.
    """

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {}

    def learn(self, model: str, took: timedelta) -> None:
        """Take in how long one prediction of the model took."""
        if took < timedelta(0):
            return
        if model not in self._seen and len(self._seen) >= MOST_MODELS:
            self._seen.pop(next(iter(self._seen)))
        seen = self._seen.setdefault(model, deque(maxlen=REMEMBERED))
        seen.append(took.total_seconds())

    def usual_seconds(self, model: str) -> float | None:
        """Say within how many seconds nine of ten are over; None for an unknown model."""
        seen = self._seen.get(model)
        if not seen:
            return None
        return sorted(seen)[int(0.9 * (len(seen) - 1))]

    def soonest(self, model: str) -> timedelta:
        """Say from what age on a prediction may be over; zero for an unknown model."""
        seen = self._seen.get(model)
        return timedelta(seconds=EARLIER * min(seen)) if seen else timedelta(0)

    @property
    def soonest_of_all(self) -> timedelta:
        """Say from what age on one of any known model may be over; zero knowing none."""
        return min(map(self.soonest, self._seen), default=timedelta(0))
