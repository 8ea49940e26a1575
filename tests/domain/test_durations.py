from datetime import timedelta

import pytest

from app.domain.durations import MOST_MODELS, REMEMBERED, Durations

SECOND = timedelta(seconds=1)


def test_of_an_unknown_model_nothing_is_expected() -> None:
    durations = Durations()

    assert durations.usual_seconds("acme/painter") is None
    assert durations.soonest("acme/painter") == timedelta(0)


def test_nine_of_ten_are_over_within_the_usual_time() -> None:
    durations = Durations()
    for number in range(1, 11):
        durations.learn("acme/painter", number * SECOND)

    assert durations.usual_seconds("acme/painter") == 9.0
    assert durations.soonest("acme/painter") == timedelta(seconds=0.8)
    assert durations.usual_seconds("acme/sculptor") is None


def test_only_the_last_ones_count() -> None:
    durations = Durations()
    durations.learn("acme/painter", SECOND)
    for _ in range(REMEMBERED):
        durations.learn("acme/painter", 10 * SECOND)

    assert durations.soonest("acme/painter").total_seconds() == pytest.approx(8)


def test_a_time_that_cannot_be_is_not_learned() -> None:
    durations = Durations()
    durations.learn("acme/painter", -SECOND)

    assert durations.usual_seconds("acme/painter") is None


def test_what_is_remembered_is_bounded() -> None:
    durations = Durations()
    for number in range(MOST_MODELS + 5):
        durations.learn(f"acme/{number}", SECOND)

    assert durations.usual_seconds("acme/0") is None
    assert durations.usual_seconds(f"acme/{MOST_MODELS + 4}") == 1.0
