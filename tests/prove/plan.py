"""What will go wrong and when: the same seed makes the same plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.services.ledger import LEASE

Params = Mapping[str, Any]
Make = Callable[[random.Random], Params]

APIS = ("api1", "api2")
WORKERS = ("worker1", "worker2")
# Who talks to whom, each over a wire of its own.
LINKS = (
    "api-database",
    "worker-database",
    "broker",
    "worker-provider",
    "provider-api",
)

WARM_UP = 1.0  # seconds before the first fault
STEP = 0.1  # seconds
PAUSE = 1.0  # seconds between two faults of the same target
_LEASE = LEASE.total_seconds()


def _nothing(rng: random.Random) -> Params:
    return {}


@dataclass(frozen=True, slots=True)
class Kind:
    """One thing that can go wrong: with whom, for how many seconds, with what details.

    `weight` is how often it is in the bag that faults are drawn from.
    """

    name: str
    targets: Sequence[str]
    lasts: tuple[float, float]
    weight: int = 1
    make: Make = _nothing


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing going wrong: `at` seconds after the beginning, for `lasts` seconds."""

    at: float
    kind: str
    target: str
    lasts: float
    params: Params = field(default_factory=dict)

    def __str__(self) -> str:
        told = " ".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.at:6.1f} s  {self.kind} {self.target} {self.lasts:.1f} s {told}"


def _rule(low: float, high: float, **params: Callable[[random.Random], Any]) -> Make:
    """Make a rule of the sandbox that strikes a share of the calls between `low` and `high`."""

    def make(rng: random.Random) -> Params:
        return {
            "probability": round(rng.uniform(low, high), 2),
            "seed": rng.randrange(10**6),
            "params": {name: draw(rng) for name, draw in params.items()},
        }

    return make


def _status(rng: random.Random) -> int:
    return rng.choice((500, 502, 503, 504))


def _body(rng: random.Random) -> str:
    return rng.choice(("html", "json", "text", "empty"))


def _seconds(low: float, high: float) -> Callable[[random.Random], float]:
    return lambda rng: round(rng.uniform(low, high), 1)


def _one_to(most: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randint(1, most)


def _share(rng: random.Random) -> Params:
    return {"share": rng.choice((0.3, 0.6, 1.0))}


_SHORT = (1.0, 6.0)
_LONG = (_LEASE + 1, _LEASE + 7)

PARTS = (
    Kind("part.killed", APIS, (0.2, 3.0), weight=2),
    Kind("part.killed", WORKERS, (0.2, 3.0), weight=3),
    Kind("part.frozen", (*APIS, *WORKERS), _SHORT, weight=2),
    Kind("part.frozen_past_its_lease", (*APIS, *WORKERS), _LONG, weight=2),
    Kind("part.rolled", APIS, (0.1, 0.5)),
    Kind("part.rolled", WORKERS, (0.1, 0.5)),
    Kind("broker.wiped", ("broker-server",), (0.0, 0.0), weight=2),
    Kind("broker.restarted", ("broker-server",), (0.2, 4.0)),
    Kind("broker.frozen", ("broker-server",), (1.0, 8.0)),
    Kind("database.restarted", ("database-server",), (0.2, 3.0)),
    Kind("database.killed", ("database-server",), (0.2, 2.0)),
    Kind("database.sessions_ended", ("database-server",), (0.0, 0.0), 3, make=_share),
    Kind("wire.refuses", LINKS, (0.5, 6.0), weight=3),
    Kind("wire.silent", LINKS, (1.0, 8.0), weight=3),
)

# The provider's own troubles; the names are the sandbox's (docs/sandbox.md).
PROVIDER = (
    ("create.lost_response", 2, _rule(0.4, 1.0)),
    ("create.error_after", 1, _rule(0.4, 1.0, status=_status, body=_body)),
    ("create.truncated", 1, _rule(0.4, 1.0)),
    ("create.bad_json", 1, _rule(0.4, 1.0)),
    ("create.slow_after", 1, _rule(0.3, 1.0, seconds=_seconds(1, 12))),
    ("create.slow_before", 1, _rule(0.3, 1.0, seconds=_seconds(1, 12))),
    ("create.error_before", 1, _rule(0.4, 1.0, status=_status, body=_body)),
    ("create.dropped", 1, _rule(0.2, 0.6)),
    ("create.throttled", 2, _rule(0.5, 1.0, retry_after=_one_to(3))),
    ("create.no_credit", 1, _rule(1.0, 1.0)),
    ("prediction.fails", 1, _rule(0.3, 0.8)),
    ("prediction.aborted", 1, _rule(0.3, 0.8)),
    ("prediction.slow", 1, _rule(0.3, 0.8, seconds=_seconds(3, 20))),
    ("prediction.no_output", 1, _rule(0.2, 0.5)),
    ("prediction.unknown_status", 1, _rule(0.3, 1.0)),
    ("get.error", 1, _rule(0.4, 1.0, status=_status, body=_body)),
    ("get.dropped", 1, _rule(0.4, 1.0)),
    ("get.stale", 1, _rule(0.4, 1.0, seconds=_seconds(1, 20))),
    ("get.not_found", 1, _rule(0.2, 0.6)),
    ("get.slow", 1, _rule(0.2, 0.6, seconds=_seconds(1, 8))),
    ("list.error", 1, _rule(0.4, 1.0, status=_status, body=_body)),
    ("list.stale", 2, _rule(0.4, 1.0, seconds=_seconds(1, 20))),
    ("list.dropped", 1, _rule(0.4, 1.0)),
    ("download.truncated", 1, _rule(0.4, 1.0)),
    ("download.slow", 1, _rule(0.3, 0.8)),
    ("download.error", 1, _rule(0.4, 1.0, status=_status, body=_body)),
    ("webhook.lost", 1, _rule(0.4, 1.0)),
    ("webhook.duplicated", 1, _rule(0.4, 1.0, copies=_one_to(5))),
    ("webhook.late", 1, _rule(0.4, 1.0, seconds=_seconds(1, 20))),
    ("webhook.forged", 1, _rule(0.4, 1.0)),
    ("webhook.unsigned", 1, _rule(0.4, 1.0)),
)
KINDS = (
    *PARTS,
    *(
        Kind(f"provider.{name}", (name,), (2.0, 8.0), weight, make)
        for name, weight, make in PROVIDER
    ),
)


# Purchases that may have been made and were not: nobody can know before the grace is over,
# two minutes later.  A short run leaves them out.
GRACED = frozenset(
    (
        *("provider.create.dropped", "provider.create.error_before"),
        "provider.create.slow_before",
    )
)


def quick(kinds: Sequence[Kind]) -> list[Kind]:
    """Give the kinds that break only what is mended within seconds."""
    return [
        replace(kind, targets=[one for one in kind.targets if one != "worker-provider"])
        for kind in kinds
        if kind.name not in GRACED
    ]


def make_plan(
    seed: int,
    *,
    seconds: float,
    every: float,
    kinds: Sequence[Kind] = KINDS,
) -> tuple[Fault, ...]:
    """Plan so many seconds with a fault about every `every` seconds, in order of time.

    Kinds are drawn from a bag without putting them back, so that a long plan has every
    kind; nothing happens twice at once to the same target, and all has ended at the end.
    """
    rng = random.Random(f"faults of {seed}")
    bag: list[Kind] = []
    busy_until: dict[str, float] = {}
    faults: list[Fault] = []
    at = WARM_UP
    while at < seconds:
        if not bag:
            bag = [kind for kind in kinds for _ in range(kind.weight)]
            rng.shuffle(bag)
        kind = bag.pop()
        lasts = rng.uniform(*kind.lasts)
        params = kind.make(rng)
        target = rng.choice(kind.targets)
        if at + lasts <= seconds and busy_until.get(target, 0.0) <= at:
            faults.append(
                Fault(round(at, 2), kind.name, target, round(lasts, 2), params)
            )
            busy_until[target] = at + lasts + PAUSE
            at += rng.expovariate(1 / every)
        else:
            at += STEP  # what does not fit here is left out
    return tuple(faults)
