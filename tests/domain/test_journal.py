import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import journal
from app.domain.events import Event
from tests.domain.cases import EVENTS

any_event = st.one_of(*(st.from_type(kind) for kind in get_args(Event)))


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_survives_the_journal(name: str) -> None:
    kind, data = journal.record(EVENTS[name])

    assert journal.revive(kind, json.loads(json.dumps(data))) == EVENTS[name]


@given(event=any_event)
def test_any_event_survives_the_journal(event: Event) -> None:
    kind, data = journal.record(event)
    kept = json.loads(json.dumps(data))

    # By its text: a progress of NaN does not equal itself.
    assert repr(journal.revive(kind, kept)) == repr(event)


def test_the_table_of_cases_has_an_event_of_every_kind() -> None:
    assert {type(event) for event in EVENTS.values()} == set(get_args(Event))


def test_every_event_name_fits_its_column() -> None:
    assert all(len(kind.__name__) <= 32 for kind in get_args(Event))


def test_an_unknown_name_is_not_guessed_at() -> None:
    with pytest.raises(KeyError):
        journal.revive("Exploded", {})
