"""Places where a test may end the process: nothing happens there unless a test armed one.

Correctness under crashes is decided between two statements.  A place is named where such a
pair is; a test's own entry point arms one, and the process ends or stops exactly there.
Nothing here reads the environment, and no entry point of production arms anything.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from enum import StrEnum


class Point(StrEnum):
    """Every place, in the order a job passes them."""

    SUBMIT_COMMITTED = "submit.committed"  # stored, and nobody was told
    LOOK_BEGUN = "look.begun"  # claimed, and nothing done yet
    PURCHASE_INTENDED = "purchase.intended"  # written down, and not sent
    PURCHASE_MADE = "purchase.made"  # the provider answered, and nothing is written
    PURCHASE_SAVED = "purchase.saved"  # the handle is written down
    PICTURE_GENERATED = "picture.generated"  # said to be made, and perhaps not here
    OUTPUT_STORED = "output.stored"  # the files are in the store, no row names them
    JOB_SETTLED = "job.settled"  # finished, and nobody was told
    WEBHOOK_SENT = "webhook.sent"  # the receiver has it, and nothing is written


@dataclass(slots=True)
class _Armed:
    """What was asked for; `left` counts down to the time that strikes, None is each."""

    point: Point
    left: int | None
    number: signal.Signals


_UNTIL_STOPPED = 1.0  # seconds
_ACTIONS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_armed: _Armed | None = None


def arm(wish: str) -> None:
    """Make this process end at a place: `name`, `name:3` (the third time), `name:each`.

    `=kill` at the end (SIGKILL, the default) or `=stop` (SIGSTOP; whoever watches continues it).
    An empty wish disarms.  Raise ValueError for a wish that means nothing.
    """
    global _armed
    if not wish:
        _armed = None
        return
    place, _, action = wish.partition("=")
    name, _, time = place.partition(":")
    number = _ACTIONS.get(action or "kill")
    if number is None:
        raise ValueError(f"{action!r} is neither kill nor stop")
    left = None if time == "each" else int(time or "1")
    if left is not None and left < 1:
        raise ValueError("the first time is number 1")
    _armed = _Armed(Point(name), left, number)


def reach(point: Point, *, when: bool = True) -> None:
    """Tell that the process is here (and `when` holds); ends or stops it if this was armed."""
    if _armed is None or _armed.point is not point or not when:
        return
    if _armed.left is not None:
        _armed.left -= 1
        if _armed.left != 0:
            return
    os.kill(os.getpid(), _armed.number)
    # SIGSTOP is taken by whichever thread comes first, and stops the others a little later:
    # this one must not go on meanwhile.
    threading.Event().wait(_UNTIL_STOPPED)
