"""What the search bar asks for: read from an address, and written back into one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Final
from urllib.parse import urlencode

from app.domain.access import Caller
from app.domain.errors import Forbidden
from app.domain.state import Status
from app.services.job_queries import JobFilter

# `model` and `prompt` of the same address are the form's.
FIELDS: Final = ("q", "made_with", "status", "size", "after", "before", "owner")

_LONGEST: Final = 300
_SIZE: Final = re.compile(r"\s*(\d{1,5})\s*[x×*]\s*(\d{1,5})\s*", re.IGNORECASE)
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Search:
    """What was asked, as text, and what of it makes no sense, by field."""

    given: Mapping[str, str]
    wrong: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing is asked for in particular."""
        return not self.given

    def address(self, path: str = "/", **more: str) -> str:
        """Give the address of this search, shortest first."""
        query = urlencode(dict(self.given) | more)
        return f"{path}?{query}" if query else path

    def wanted(self, caller: Caller) -> JobFilter:
        """Say it to the tables, within what the caller may see; raise `Forbidden`.

        What makes no sense is left out.
        """
        given = {name: self.given.get(name) for name in FIELDS}
        owner, size = given["owner"], given["size"]
        if owner is not None and not caller.sees(owner):
            raise Forbidden("Only administrators see other owners.", field="owner")
        before = _day(given["before"])
        return JobFilter(
            owner=owner or caller.realm,
            status=None if "status" in self.wrong else given["status"],
            model=given["made_with"],
            text=given["q"],
            size=read_size(size) if size else None,
            created_after=_morning(_day(given["after"])),
            created_before=_morning(before + _DAY if before else None),
        )


def read_search(query: Mapping[str, str]) -> Search:
    """Read a search from the query of an address."""
    given: dict[str, str] = {}
    for name in FIELDS:
        text = query.get(name, "").replace("\x00", "\ufffd").strip()[:_LONGEST]
        if text:
            given[name] = text
    wrong: dict[str, str] = {}
    if given.get("status", "pending") not in list(Status):
        wrong["status"] = "There is no such status."
    if "size" in given and read_size(given["size"]) is None:
        wrong["size"] = "Width and height, such as 1024x768."
    for name in ("after", "before"):
        if name in given and _day(given[name]) is None:
            wrong[name] = "A day, such as 2026-11-25."
    return Search(given, wrong)


def read_size(text: str) -> tuple[int, int] | None:
    """Read width and height in pixels; None for what is no size."""
    found = _SIZE.fullmatch(text)
    return (int(found[1]), int(found[2])) if found else None


def _day(text: str | None) -> date | None:
    try:
        found = date.fromisoformat(text or "")
    except ValueError:
        return None
    # At the calendar's ends arithmetic overflows, and no job is from there.
    return found if 1970 < found.year < 9999 else None


def _morning(day: date | None) -> datetime | None:
    return None if day is None else datetime.combine(day, time(), UTC)
