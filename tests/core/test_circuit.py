"""What a circuit breaker decides, over every history there may be."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from app.core import circuit as rules
from app.core.circuit import NEVER, Circuit, Condition, Rhythm

START = datetime(2026, 11, 23, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
RHYTHM = Rhythm()


def struck(
    circuit: Circuit, now: datetime = START, *, fatal: bool = False, **changes: object
) -> Circuit:
    """Give the circuit after one more trouble."""
    told = {"turn": circuit.turn, "reason": "ill", **changes}
    return rules.trouble(circuit, now, RHYTHM, is_fatal=fatal, **told)  # type: ignore


def opened(*, fatal: bool = False, now: datetime = START) -> Circuit:
    """Give a circuit that opened just now."""
    circuit = Circuit()
    for _ in range(1 if fatal else RHYTHM.threshold):
        circuit = struck(circuit, now, fatal=fatal)
    assert circuit.is_open
    return circuit


def probing(circuit: Circuit) -> Circuit:
    """Give it after the next probe left, as early as it may."""
    after, granted, _ = rules.admit(circuit, circuit.retry_at, RHYTHM, 10)
    assert granted == 1
    return after


def test_while_closed_everybody_may_go() -> None:
    assert rules.admit(Circuit(), START, RHYTHM, 200) == (Circuit(), 200, timedelta(0))


def test_trouble_opens_it_at_the_threshold_and_not_before() -> None:
    circuit = Circuit()
    for _ in range(RHYTHM.threshold - 1):
        circuit = struck(circuit)
    assert circuit.condition(START) is Condition.CLOSED
    circuit = struck(circuit)
    assert circuit.condition(START) is Condition.OPEN
    assert (circuit.reason, circuit.since) == ("ill", START)
    assert circuit.retry_at - START == RHYTHM.first_pause


@pytest.mark.parametrize("good", [rules.success, rules.answer])
def test_good_news_in_between_starts_the_count_again(good: object) -> None:
    circuit = Circuit()
    for _ in range(20):
        for _ in range(RHYTHM.threshold - 1):
            circuit = struck(circuit)
        circuit = good(circuit, turn=circuit.turn)  # type: ignore[operator]
    assert not circuit.is_open


def test_trouble_now_and_then_does_not_open_it() -> None:
    circuit = Circuit()
    for n in range(20):
        circuit = struck(circuit, START + n * RHYTHM.window / 3)
    assert not circuit.is_open


def test_fatal_trouble_opens_it_at_once() -> None:
    circuit = struck(Circuit(), fatal=True)
    assert circuit.retry_at - START == RHYTHM.first_fatal_pause


@pytest.mark.parametrize("fatal", [False, True])
def test_the_pause_doubles_with_every_failed_probe_and_starts_again(
    fatal: bool,
) -> None:
    circuit, pauses = opened(fatal=fatal), []
    for _ in range(6):
        pauses.append(circuit.pause)
        circuit = probing(circuit)
        circuit = struck(circuit, circuit.retry_at, fatal=fatal)
    expected = (15, 30, 60, 60, 60, 60) if fatal else (5, 10, 20, 40, 60, 60)
    assert pauses == [n * SECOND for n in expected]
    assert circuit.since == START
    again = rules.success(probing(circuit), turn=circuit.turn)
    assert again.is_quiet
    assert struck(again, fatal=True).pause == RHYTHM.first_fatal_pause


def test_one_probe_at_a_time_and_a_dead_one_is_replaced() -> None:
    circuit = probing(opened())
    now = circuit.retry_at
    for _ in range(3):
        after, granted, wait = rules.admit(circuit, now, RHYTHM, 10)
        assert (after, granted) == (circuit, 0)
        assert timedelta(0) < wait <= RHYTHM.probe_glance
    later = now + RHYTHM.probe_lease
    assert rules.admit(circuit, later, RHYTHM, 10)[1] == 1


def test_a_probe_that_did_not_leave_makes_room_for_the_next() -> None:
    circuit = probing(opened())
    circuit = rules.recall_probe(circuit)
    assert rules.admit(circuit, circuit.retry_at, RHYTHM, 10)[1] == 1


def test_what_began_before_it_opened_says_nothing() -> None:
    circuit = probing(opened())
    stale = Circuit().turn
    assert rules.success(circuit, turn=stale) == circuit
    assert rules.answer(circuit, turn=stale) == circuit
    assert struck(circuit, turn=stale, fatal=True) == circuit
    closed = rules.success(circuit, turn=circuit.turn)
    assert struck(closed, turn=stale, fatal=True) == closed


def test_trouble_without_a_probe_does_not_prolong_the_pause() -> None:
    circuit = opened()
    assert struck(circuit, START + SECOND) == circuit


def test_an_answer_ends_ordinary_trouble_and_frees_the_probe_of_fatal_trouble() -> None:
    ordinary = probing(opened())
    assert rules.answer(ordinary, turn=ordinary.turn).is_quiet
    fatal = probing(opened(fatal=True))
    after = rules.answer(fatal, turn=fatal.turn)
    assert after.is_open
    assert rules.admit(after, after.retry_at, RHYTHM, 1)[1] == 1


def test_a_clock_that_was_set_back_locks_nobody_out() -> None:
    circuit = opened()
    earlier = START - timedelta(hours=1)
    after, granted, _ = rules.admit(circuit, earlier, RHYTHM, 10)
    assert granted == 1
    # The probe of before the clock was set says something still.
    assert rules.success(after, turn=after.turn).is_quiet
    assert struck(after, earlier).turn > circuit.turn


@pytest.mark.parametrize(
    "written", [b"", b"{}", b"[]", b"nonsense", b'{"is_open": true}', b"\xff\x00"]
)
def test_what_cannot_be_read_is_closed(written: bytes) -> None:
    assert rules.read(written) == Circuit()


class Histories(RuleBasedStateMachine):
    """Any number of processes act, some of them long after they were let."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.circuit = Circuit()
        self.bad_in_a_row = 0

    @rule(seconds=st.floats(0, 90, allow_nan=False))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)

    @rule(wanted=st.integers(1, 200))
    def ask(self, wanted: int) -> None:
        """Ask to go."""
        before = self.circuit
        self.circuit, granted, wait = rules.admit(before, self.now, RHYTHM, wanted)
        match before.condition(self.now):
            case Condition.CLOSED:
                assert granted == wanted
            case Condition.OPEN:
                assert granted == 0 and before == self.circuit
                assert self.now + wait == before.retry_at
            case Condition.HALF_OPEN:
                assert granted <= 1
                is_out = self.now < before.probe_until
                assert granted == (0 if is_out else 1)
        assert (wait == timedelta(0)) == (granted == wanted)

    @rule(is_late=st.booleans(), is_fatal=st.booleans())
    def fail(self, is_late: bool, is_fatal: bool) -> None:
        """Report trouble, perhaps from before it opened."""
        before = self.circuit
        turn = NEVER if is_late else before.turn
        self.circuit = struck(before, self.now, fatal=is_fatal, turn=turn)
        if turn < before.turn:
            assert self.circuit == before
        else:
            self.bad_in_a_row += 1
        if self.circuit.is_open and not before.is_open:
            assert is_fatal or self.bad_in_a_row >= RHYTHM.threshold
            assert self.circuit.since == self.now
        if self.circuit.turn != before.turn:
            assert self.circuit.turn > before.turn

    @rule(is_late=st.booleans(), is_full=st.booleans())
    def succeed(self, is_late: bool, is_full: bool) -> None:
        """Report good news, perhaps from before it opened."""
        before = self.circuit
        turn = NEVER if is_late else before.turn
        tell = rules.success if is_full else rules.answer
        self.circuit = tell(before, turn=turn)
        if turn < before.turn:
            assert self.circuit == before
        elif is_full or not (before.is_open and before.is_fatal):
            assert self.circuit.is_quiet
            self.bad_in_a_row = 0

    @rule()
    def recall(self) -> None:
        """Take the probe back."""
        self.circuit = rules.recall_probe(self.circuit)

    @invariant()
    def nobody_is_locked_out(self) -> None:
        """However it came to this: after a while at most, somebody may try."""
        latest = self.now + RHYTHM.longest_pause + RHYTHM.probe_lease
        assert rules.admit(self.circuit, latest, RHYTHM, 1)[1] == 1

    @invariant()
    def it_is_kept_as_it_is(self) -> None:
        """Writing and reading changes nothing."""
        assert rules.read(rules.write(self.circuit)) == self.circuit

    @invariant()
    def a_closed_one_holds_nothing_against_anybody(self) -> None:
        """Only the count and the turn are left of what was."""
        circuit = self.circuit
        if not circuit.is_open:
            left = replace(Circuit(), turn=circuit.turn, troubles=circuit.troubles)
            first = circuit.first_trouble_at
            assert circuit == replace(left, first_trouble_at=first)
            assert circuit.troubles < RHYTHM.threshold


TestHistories = Histories.TestCase
