"""When a webhook that did not arrive is sent again, and when it is given up.  Pure.

The pauses are those Standard Webhooks 1.0 proposes ("Deliverability and reliability"), with one
more day at the end: a first try at once and ten more, over a little more than four days.
"""

from __future__ import annotations

import email.utils
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

_HOURS: Final = (2, 5, 10, 14, 20, 24, 24)
SCHEDULE: Final = (
    timedelta(0),
    timedelta(seconds=5),
    timedelta(minutes=5),
    timedelta(minutes=30),
    *(timedelta(hours=hours) for hours in _HOURS),
)
BUSY: Final = frozenset((429, 502, 504))  # they say: not so fast
GONE: Final = 410  # it says: never again
_SECONDS = re.compile(r"\s*([0-9]{1,18})\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class RedeliveryPolicy:
    """Every figure of sending again.

    `schedule` has the pause before each try.  Jitter moves a pause by up to that share of it,
    either way.  Whoever is busy gets `slower` times as long, and `least_rest` at least.  An
    endpoint that failed for `enough` without a success in between is switched off when a
    notification for it is given up.
    """

    schedule: tuple[timedelta, ...] = SCHEDULE
    jitter: float = 0.1
    slower: float = 2.0
    least_rest: timedelta = timedelta(minutes=1)
    longest: timedelta = timedelta(days=1)
    enough: timedelta = timedelta(days=3)

    def pause(
        self,
        tries: int,
        draw: float,
        *,
        status: int | None = None,
        retry_after: timedelta | None = None,
    ) -> timedelta | None:
        """Say how long to wait after so many failed tries; None: give it up.

        `draw` is 0…1.  `status` is what the last try was answered, None when it was not.  A
        `retry_after` is honoured, up to `longest`; it never makes a pause shorter.
        """
        if tries >= len(self.schedule) or status == GONE:
            return None
        wanted = self.schedule[tries] * (1 + self.jitter * (2 * draw - 1))
        if status in BUSY:
            wanted = max(wanted * self.slower, self.least_rest)
        asked = min(retry_after or timedelta(0), self.longest)
        return max(wanted, asked)


def read_retry_after(text: str | None, now: datetime) -> timedelta | None:
    """Read a `Retry-After` (RFC 9110, 10.2.3): seconds or a date; None for anything else."""
    if text is None:
        return None
    if (matched := _SECONDS.fullmatch(text)) is not None:
        return timedelta(seconds=min(int(matched[1]), 10**9))
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(moment - now, timedelta(0))
