"""An old job as the form of a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from uuid import UUID

import orjson

from app.domain.generation import JSON
from app.services.job_queries import JobRecord
from app.web.draft import Draft

_PROMPT = "prompt"


def draft_of_job(record: JobRecord, *, keys_on: bool) -> Draft:
    """Give the form as it would stand had the job been written into it, but for pictures.

    Its options are open: among them is the seed, which is the job's, too.
    """
    row = record.row
    files = set(row.uploads)
    values = {
        name: typed(value)
        for name, value in row.input.items()
        if name != _PROMPT and name not in files
    }
    draft = Draft(model=row.model, prompt=row.prompt, values=values, is_open=True)
    return replace(draft, is_public=keys_on and row.is_public)


def uploads_of(record: JobRecord) -> Mapping[str, list[UUID]]:
    """Name the uploads behind the job's pictures, by input."""
    found: dict[str, list[UUID]] = {}
    for name, given in record.row.uploads.items():
        items = given if isinstance(given, list) else [given]
        found[name] = [UUID(one) for one in items if isinstance(one, str)]
    return found


def typed(value: JSON) -> str:
    """Write a value as somebody types it into its field."""
    match value:
        case None:
            return ""
        case str():
            return value
        case list() if all(isinstance(one, str | int | float) for one in value):
            return "\n".join(str(one) for one in value)
    return orjson.dumps(value).decode()
