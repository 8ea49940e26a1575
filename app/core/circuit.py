"""What a circuit breaker decides: pure, so that all processes decide alike.

    closed ──trouble──▶ open ──time──▶ half-open ──success──▶ closed
                         ▲                 │
                         └─────trouble─────┘   the pause doubles

Every function takes what is known and the moment, and answers what is known from then on.
`breaker.CircuitBreaker` keeps the answer where all processes see it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import orjson

NEVER = datetime(1970, 1, 1, tzinfo=UTC)

_NO_TIME = timedelta(0)
_MICROSECOND = timedelta(microseconds=1)


class Condition(StrEnum):
    """How a circuit is: all may go, one may try, nobody may go."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Rhythm:
    """When a circuit opens, and for how long.

    Ordinary trouble opens it when it came `threshold` times within `window` and nothing good
    in between; fatal trouble opens it at once.  It stays open for `first_pause`, or
    `first_fatal_pause`, and twice as long after each probe that failed, up to
    `longest_pause`.  A probe that said nothing for `probe_lease` is replaced.
    """

    threshold: int = 5
    window: timedelta = timedelta(seconds=60)
    first_pause: timedelta = timedelta(seconds=5)
    first_fatal_pause: timedelta = timedelta(seconds=15)
    longest_pause: timedelta = timedelta(seconds=60)
    probe_lease: timedelta = timedelta(seconds=15)
    # While somebody else's probe is out, its answer is soon worth asking for.
    probe_glance: timedelta = timedelta(milliseconds=500)


@dataclass(frozen=True, slots=True)
class Circuit:
    """Everything known.  `turn` is when it last opened, also after it closed again.

    Whoever acts notes the turn, and hands it back with what came of it: what was begun
    before the circuit opened says nothing about how things are now.
    `probe_until` is set from when a probe left until something came of it.
    """

    is_open: bool = False
    is_fatal: bool = False
    reason: str = ""
    turn: datetime = NEVER
    since: datetime = NEVER
    retry_at: datetime = NEVER
    pause: timedelta = _NO_TIME
    probe_until: datetime = NEVER
    troubles: int = 0
    first_trouble_at: datetime = NEVER

    @property
    def is_quiet(self) -> bool:
        """Tell whether nothing is wrong, and nothing was lately."""
        return not self.is_open and not self.troubles

    def condition(self, now: datetime) -> Condition:
        """Say how it is."""
        if not self.is_open:
            return Condition.CLOSED
        return Condition.OPEN if now < self.retry_at else Condition.HALF_OPEN


def admit(
    circuit: Circuit, now: datetime, rhythm: Rhythm, wanted: int
) -> tuple[Circuit, int, timedelta]:
    """Say how many of those who want to may go, and when it is worth asking for the rest.

    While half open that is a single one, the probe.
    """
    if not circuit.is_open:
        return circuit, wanted, _NO_TIME
    # A moment that is further off was set by a clock that is not this one.
    if now < circuit.retry_at <= now + rhythm.longest_pause:
        return circuit, 0, circuit.retry_at - now
    if now < circuit.probe_until <= now + rhythm.probe_lease:
        return circuit, 0, min(circuit.probe_until - now, rhythm.probe_glance)
    probing = replace(circuit, probe_until=now + rhythm.probe_lease)
    return probing, 1, _NO_TIME if wanted == 1 else rhythm.probe_glance


def recall_probe(circuit: Circuit) -> Circuit:
    """Take a probe back that did not leave after all, or that proved nothing."""
    return replace(circuit, probe_until=NEVER)


def trouble(
    circuit: Circuit,
    now: datetime,
    rhythm: Rhythm,
    *,
    turn: datetime,
    reason: str,
    is_fatal: bool,
) -> Circuit:
    """Learn that an action begun in that turn met with trouble."""
    if turn < circuit.turn:
        return circuit
    if circuit.is_open:
        if circuit.probe_until == NEVER:
            return circuit  # let go before it opened, and slow
        return _open(circuit, now, rhythm, reason, is_fatal)
    count, first = circuit.troubles + 1, circuit.first_trouble_at
    if circuit.troubles == 0 or not _NO_TIME <= now - first <= rhythm.window:
        count, first = 1, now
    counted = replace(circuit, troubles=count, first_trouble_at=first)
    if is_fatal or count >= rhythm.threshold:
        return _open(counted, now, rhythm, reason, is_fatal)
    return counted


def success(circuit: Circuit, *, turn: datetime) -> Circuit:
    """Learn that an action begun in that turn did what it should."""
    if turn < circuit.turn or circuit.is_quiet:
        return circuit
    return Circuit(turn=circuit.turn)


def answer(circuit: Circuit, *, turn: datetime) -> Circuit:
    """Learn that an action begun in that turn was answered, if not as hoped.

    That ends ordinary trouble, which is about not being answered.  About fatal trouble it
    says nothing: the next one may try.
    """
    if circuit.is_open and circuit.is_fatal:
        return circuit if turn < circuit.turn else recall_probe(circuit)
    return success(circuit, turn=turn)


def _open(
    circuit: Circuit, now: datetime, rhythm: Rhythm, reason: str, is_fatal: bool
) -> Circuit:
    pause = rhythm.first_fatal_pause if is_fatal else rhythm.first_pause
    pause = min(max(circuit.pause * 2, pause), rhythm.longest_pause)
    return Circuit(
        is_open=True,
        is_fatal=is_fatal,
        reason=reason,
        # Turns only grow, whatever the clock does.
        turn=max(now, circuit.turn + _MICROSECOND),
        since=circuit.since if circuit.is_open else now,
        retry_at=now + pause,
        pause=pause,
    )


# ----------------------------------------------------------------------------- in writing


def write(circuit: Circuit) -> bytes:
    """Put a circuit into bytes."""
    return orjson.dumps(
        {
            "is_open": circuit.is_open,
            "is_fatal": circuit.is_fatal,
            "reason": circuit.reason,
            "turn": circuit.turn,
            "since": circuit.since,
            "retry_at": circuit.retry_at,
            "pause": circuit.pause // _MICROSECOND,
            "probe_until": circuit.probe_until,
            "troubles": circuit.troubles,
            "first_trouble_at": circuit.first_trouble_at,
        }
    )


def read(written: bytes) -> Circuit:
    """Read a circuit; nothing, or what another version wrote, is a closed one."""
    try:
        known: dict[str, Any] = orjson.loads(written or b"{}")
        moments = {
            name: datetime.fromisoformat(known[name])
            for name in ("turn", "since", "retry_at", "probe_until", "first_trouble_at")
        }
        return Circuit(
            is_open=bool(known["is_open"]),
            is_fatal=bool(known["is_fatal"]),
            reason=str(known["reason"]),
            pause=known["pause"] * _MICROSECOND,
            troubles=int(known["troubles"]),
            **moments,
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return Circuit()
