"""The names the outside knows: each entry of a log has one."""

from __future__ import annotations

from typing import get_args

import pytest

from app.domain import notices
from app.domain.events import Event
from app.domain.journal import SUBMITTED
from app.domain.state import Status


@pytest.mark.parametrize("event", [SUBMITTED, *(k.__name__ for k in get_args(Event))])
@pytest.mark.parametrize("status", list(Status))
def test_every_entry_has_a_known_name(event: str, status: Status) -> None:
    name = notices.name_of(event, status.value)

    assert name in notices.ALL
    assert (name in notices.ENDS) == status.is_terminal
    if status.is_terminal:
        assert name == f"job.{status.value}"


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (SUBMITTED, "job.created"),
        ("Intended", "job.started"),
        ("Progressed", "job.progress"),
        ("Started", "job.updated"),
    ],
)
def test_what_goes_on_is_named(event: str, name: str) -> None:
    assert notices.name_of(event, "processing") == name
