"""What endpoints take from the request: the runtime, bodies, cursors."""

from __future__ import annotations

import base64
import re
from collections.abc import Coroutine, Sequence
from datetime import date, datetime
from typing import Annotated, Any, TypeVar, get_args
from uuid import UUID

from fastapi import Path, Query, Request
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import ErrorDetails

from app.api.bodies import read_body
from app.api.guard import admit_again
from app.api.problems import BadParameter, InvalidBody
from app.core.patience import within
from app.domain.errors import Unavailable
from app.runtime import Runtime
from app.services.ledger import PATIENCE

# What we accept is checked by ourselves, with words of our own; these describe it.
Id = Annotated[str, Path(json_schema_extra={"format": "uuid"})]
Cursor = Annotated[
    str | None,
    Query(
        max_length=64,
        json_schema_extra={"pattern": "^[A-Za-z0-9_-]{22}$"},
        description="`next_cursor` of the page before.",
    ),
]

Size = Annotated[
    str | None,
    Query(
        pattern="^[1-9][0-9]{0,5}x[1-9][0-9]{0,5}$",
        description="Of an output, in pixels: width, an x, height; such as 1024x768.",
    ),
]


def _written_out(given: object) -> object:
    """Refuse a bare number: nobody can tell whether it counts seconds or milliseconds."""
    if isinstance(given, str) and not re.match(r"\d{4}-\d\d-\d\d", given, re.ASCII):
        raise ValueError(
            "must be written out, such as 2026-11-23 or 2026-11-23T20:00:00Z"
        )
    return given


Moment = Annotated[datetime, BeforeValidator(_written_out)]
Day = Annotated[date, BeforeValidator(_written_out)]

_CURSOR = re.compile(r"[\w-]{22}", re.ASCII)

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")


def runtime_of(request: Request) -> Runtime:
    """Give the parts of this process."""
    runtime: Runtime = request.app.state.runtime
    return runtime


async def promptly(work: Coroutine[Any, Any, T]) -> T:
    """Give what the tables answer; raise `Unavailable` in time when they say nothing."""
    try:
        return await within(PATIENCE, work)
    except TimeoutError as error:
        raise Unavailable("The database does not answer in time.") from error


async def parse_body(request: Request, kind: type[B]) -> B:
    """Read and validate the JSON body in one pass; raise `InvalidBody` naming the fields.

    For guarded routes: whoever sends slowly must still have a valid key at the end.
    """
    body = await read_body(request)
    await admit_again(request)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise explained(error, kind) from None


def explained(error: ValidationError, kind: type[BaseModel]) -> InvalidBody:
    """Say what is wrong with a body, field by field, in words that help."""
    details = error.errors(include_url=False, include_input=False)
    fields = [_explain(detail, kind) for detail in details]
    first = details[0]["loc"]
    return InvalidBody(fields, str(first[0]) if first else None)


def _explain(detail: ErrorDetails, kind: type[BaseModel]) -> tuple[str, str]:
    # RFC 6901, section 3: a name may hold what pointers are made of.
    names = (str(part).replace("~", "~0").replace("/", "~1") for part in detail["loc"])
    pointer = "".join(f"/{name}" for name in names)
    text = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        fields = _model_at(kind, detail["loc"][:-1]).model_fields
        text = "is not a field of this request; known are " + ", ".join(fields)
    elif detail["type"] == "json_invalid":
        text = "is not valid JSON: " + text.removeprefix("Invalid JSON: ")
    elif detail["type"] == "missing":
        text = "is required"
    return pointer, text


def _model_at(kind: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    """Find the model of an object within the body."""
    for name in path:
        field = kind.model_fields.get(str(name))
        hint = field.annotation if field else None
        for one in (hint, *get_args(hint)):
            if isinstance(one, type) and issubclass(one, BaseModel):
                kind = one
    return kind


def parse_job_id(text: str) -> UUID:
    """Read a job id; raise `BadParameter` for anything that is no UUID."""
    try:
        return UUID(text)
    except ValueError:
        raise BadParameter("job_id must be a UUID.", field="job_id") from None


def write_cursor(last: UUID) -> str:
    """Make the opaque cursor that continues after a job."""
    return base64.urlsafe_b64encode(last.bytes).rstrip(b"=").decode()


def read_cursor(text: str | None) -> UUID | None:
    """Read a cursor back; raise `BadParameter` for one we never gave."""
    if text is None:
        return None
    if not _CURSOR.fullmatch(text):
        raise BadParameter(
            "cursor must be a next_cursor of an earlier answer.",
            field="cursor",
            code="invalid_cursor",
        )
    return UUID(bytes=base64.urlsafe_b64decode(text + "=="))


def read_size(text: str | None) -> tuple[int, int] | None:
    """Give width and height of a valid `Size`."""
    if text is None:
        return None
    width, _, height = text.partition("x")
    return int(width), int(height)
