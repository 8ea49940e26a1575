"""When webhooks are sent again: laws over every number of tries, answer and `Retry-After`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.redelivery import (
    BUSY,
    SCHEDULE,
    RedeliveryPolicy,
    read_retry_after,
)

POLICY = RedeliveryPolicy()
NOW = datetime(2026, 11, 25, 20, 0, tzinfo=UTC)
DAY = timedelta(days=1)

tries = st.integers(1, 40)
draws = st.floats(0, 1)
codes = st.none() | st.integers(200, 599).filter(lambda code: code != 410)
waits = st.none() | st.timedeltas(timedelta(0), timedelta(days=4000))


def test_ten_tries_follow_the_first_over_four_days() -> None:
    pauses = [POLICY.pause(number, 0.5) for number in range(1, 12)]

    assert pauses == [*SCHEDULE[1:], None]
    assert SCHEDULE[0] == timedelta(0)
    assert len(SCHEDULE) == 11
    assert 4 * DAY < sum(SCHEDULE, timedelta(0)) < 5 * DAY


@given(tries, draws, codes, waits)
def test_it_ends_and_never_waits_for_ever(
    count: int, draw: float, status: int | None, asked: timedelta | None
) -> None:
    pause = POLICY.pause(count, draw, status=status, retry_after=asked)

    assert (pause is None) == (count >= len(SCHEDULE))
    if pause is not None:
        slower = POLICY.slower if status in BUSY else 1
        most = SCHEDULE[count] * (1 + POLICY.jitter) * slower
        assert timedelta(0) < pause <= max(most, POLICY.least_rest, DAY)


@given(tries.filter(lambda n: n < len(SCHEDULE)), draws, codes, waits)
def test_retry_after_is_honoured_and_never_hurries(
    count: int, draw: float, status: int | None, asked: timedelta | None
) -> None:
    own = POLICY.pause(count, draw, status=status)
    told = POLICY.pause(count, draw, status=status, retry_after=asked)

    assert own is not None and told is not None
    assert told == max(own, min(asked or timedelta(0), DAY))


@given(st.integers(1, len(SCHEDULE) - 1), draws)
def test_jitter_spreads_and_busy_receivers_are_given_time(
    count: int, draw: float
) -> None:
    calm = POLICY.pause(count, draw, status=500)
    assert calm is not None
    assert abs(calm - SCHEDULE[count]) <= SCHEDULE[count] * POLICY.jitter * 1.0001
    for status in BUSY:
        busy = POLICY.pause(count, draw, status=status)
        assert busy is not None
        assert busy >= timedelta(minutes=1)
        assert busy >= calm * 1.9999


def test_the_ends_of_the_jitter_differ() -> None:
    assert POLICY.pause(2, 0) == timedelta(minutes=5) * 0.9
    assert POLICY.pause(2, 1) == timedelta(minutes=5) * 1.1


@given(tries, draws)
def test_gone_is_the_end(count: int, draw: float) -> None:
    assert POLICY.pause(count, draw, status=410) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        (" 120 ", 120),
        ("9" * 18, 10**9),
        ("Wed, 25 Nov 2026 20:01:00 GMT", 60),
        ("Wed, 25 Nov 2026 19:00:00 GMT", 0),
        ("Wed, 25 Nov 2026 20:01:00 -0000", 60),
        ("9" * 19, None),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("Wed, 99 Nov 2026 20:01:00 GMT", None),
        (None, None),
    ],
)
def test_retry_after_is_read(text: str | None, seconds: int | None) -> None:
    expected = None if seconds is None else timedelta(seconds=seconds)

    assert read_retry_after(text, NOW) == expected


@given(st.text())
def test_any_retry_after_can_be_read(text: str) -> None:
    found = read_retry_after(text, NOW)

    assert found is None or found >= timedelta(0)
