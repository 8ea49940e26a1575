"""Rate limits as Replicate keeps them: token buckets with a minute's worth of room."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Allowance:
    """The bucket's answer to one request.

    ``retry_after`` is None when the request may go on; else the whole seconds to wait.
    """

    remaining: int
    reset: int
    retry_after: int | None

    def headers(self) -> dict[str, str]:
        """Return the headers that real answers were seen with (recorded 2023 and 2024)."""
        headers = {
            "ratelimit-remaining": str(self.remaining),
            "ratelimit-reset": str(self.reset),
        }
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        return headers


class TokenBucket:
    """Let ``per_minute`` requests through each minute, with short bursts.

    Replicate's documented limits are 600 creates and 3,000 other requests a minute
    (replicate.com/docs/topics/predictions/rate-limits, 2026-06).
    """

    def __init__(
        self, per_minute: int, *, burst: int | None = None, clock: Callable[[], float]
    ) -> None:
        self._rate = per_minute / 60
        self._room = float(burst or per_minute)
        self._tokens = self._room
        self._clock = clock
        self._filled_at = clock()

    def take(self) -> Allowance:
        """Take one token if there is one."""
        now = self._clock()
        earned = (now - self._filled_at) * self._rate
        self._tokens = min(self._room, self._tokens + earned)
        self._filled_at = now
        if self._tokens < 1:
            wait = (1 - self._tokens) / self._rate
            return Allowance(0, self._reset(), max(1, math.ceil(wait)))
        self._tokens -= 1
        return Allowance(int(self._tokens), self._reset(), None)

    def _reset(self) -> int:
        """Return the seconds until the bucket is full again."""
        return math.ceil((self._room - self._tokens) / self._rate)
