"""The plan of faults: decided by the seed, with every kind, never twice at once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from app.services.ledger import LEASE
from sandbox.faults import FAULTS, FaultBoard
from tests.prove.plan import KINDS, Fault, make_plan

HOUR = 3600.0


def test_the_same_seed_makes_the_same_plan() -> None:
    plans = [make_plan(7, seconds=HOUR, every=2) for _ in range(2)]

    assert plans[0] == plans[1]
    assert [str(fault) for fault in plans[0]] == [str(fault) for fault in plans[1]]


def test_another_seed_makes_another_plan() -> None:
    assert make_plan(7, seconds=60, every=2) != make_plan(8, seconds=60, every=2)


@pytest.mark.parametrize("seed", range(20))
def test_all_has_ended_at_the_end(seed: int) -> None:
    plan = make_plan(seed, seconds=120, every=1)

    assert len(plan) > 60
    assert all(0 < fault.at and fault.at + fault.lasts <= 120.1 for fault in plan)
    assert all(early.at <= late.at for early, late in pairwise(plan))


@pytest.mark.parametrize("seed", range(20))
def test_nothing_happens_twice_at_once_to_the_same_target(seed: int) -> None:
    by_target: dict[str, list[Fault]] = {}
    for fault in make_plan(seed, seconds=HOUR, every=0.5):
        by_target.setdefault(fault.target, []).append(fault)

    for faults in by_target.values():
        assert all(a.at + a.lasts < b.at for a, b in pairwise(faults))


def test_a_long_plan_has_every_kind() -> None:
    counts = Counter(fault.kind for fault in make_plan(1, seconds=HOUR, every=2))

    assert set(counts) == {kind.name for kind in KINDS}


def test_processes_are_frozen_for_less_and_for_more_than_a_lease() -> None:
    lasts: dict[str, list[float]] = {
        "part.frozen": [],
        "part.frozen_past_its_lease": [],
    }
    for fault in make_plan(1, seconds=HOUR, every=2):
        lasts.get(fault.kind, []).append(fault.lasts)

    assert max(lasts["part.frozen"]) < LEASE.total_seconds()
    assert min(lasts["part.frozen_past_its_lease"]) > LEASE.total_seconds()


def test_the_sandbox_takes_every_rule_of_the_plan() -> None:
    board = FaultBoard()
    for fault in make_plan(1, seconds=HOUR, every=1):
        name = fault.kind.removeprefix("provider.")
        if name != fault.kind:
            assert name in FAULTS
            board.add({"fault": name, **fault.params})

    assert len(board.rules()) > 100
