"""What stands in the form of the first page: read from a request, shown again, asked for.

A draft is what was typed, right or wrong, so that nothing typed is lost.  `requests_of` turns it
into what the JSON API would be sent; what is wrong with it is told field by field.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pydantic import ValidationError
from starlette.datastructures import FormData

from app.api.deps import explained
from app.api.problems import fields_of as told_fields
from app.domain.errors import ServiceError
from app.domain.generation import JSON
from app.models import schemas
from app.services.translation import COUNT_INPUTS
from app.web.forms import text_of
from app.web.model_form import Field, Kind, Unreadable, read

INPUT: Final = "p."  # before the name of a model's own input
FILE: Final = "f."  # before the same, of a file that was not sent ahead

MOST_COPIES: Final = 10
MOST_JOBS: Final = 50  # made by one press of the button

_COMMON_SIZES: Final = ("width", "height")
_ONCE: Final = re.compile(r"[\w-]{16,64}", re.ASCII)

Problems = Mapping[str, str]
"""What is wrong, by the name of the field; under "" what belongs to none."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was sent ahead: what goes into the input, and where it can be seen."""

    uri: str
    url: str


@dataclass(frozen=True, slots=True)
class Draft:
    """The form as it stands.  `values` and `pictures` are by the names of the model's inputs."""

    model: str
    other_model: str = ""
    prompt: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, tuple[Picture, ...]] = field(default_factory=dict)
    copies: str = "1"
    is_by_line: bool = False
    is_public: bool = False
    is_open: bool = False  # whether the options are
    once: str = field(default_factory=lambda: secrets.token_urlsafe(18))

    @property
    def chosen_model(self) -> str:
        """Give the model that is meant: the one that was written wins."""
        return self.other_model or self.model

    def value(self, one: Field) -> str:
        """Give what stands in a field."""
        return self.values.get(one.name, one.default)

    def anew(self) -> Draft:
        """Give the same form for another press of the button: that one is meant again."""
        return replace(self, once=secrets.token_urlsafe(18))


def read_draft(form: FormData, *, default_model: str) -> Draft:
    """Read what was typed.  Pictures are left to whoever knows where they are."""
    values = {
        name.removeprefix(INPUT): text_of(form, name)
        for name in form
        if name.startswith(INPUT)
    }
    once = text_of(form, "once")
    draft = Draft(
        model=text_of(form, "model") or default_model,
        other_model=text_of(form, "other_model").strip(),
        prompt=text_of(form, "prompt").replace("\r\n", "\n"),
        values=values,
        copies=text_of(form, "copies").strip() or "1",
        is_by_line=text_of(form, "by_line") == "true",
        is_public=text_of(form, "public") == "true",
        is_open=text_of(form, "is_open") == "true",
    )
    return replace(draft, once=once) if _ONCE.fullmatch(once) else draft


class Wrong(Exception):
    """The draft cannot be asked for as it stands."""

    def __init__(self, problems: Problems) -> None:
        super().__init__("the form has mistakes")
        self.problems = problems


def requests_of(
    draft: Draft, fields: Sequence[Field], *, keys_on: bool
) -> list[schemas.GenerateRequest]:
    """Say the draft as requests, one for each job; raise `Wrong`."""
    problems: dict[str, str] = {}
    if not draft.prompt.strip():
        problems["prompt"] = "Say what the picture should show."
    common, own = _inputs(draft, fields, problems)
    copies = _copies(draft, problems)
    prompts = _prompts(draft)
    if len(prompts) * copies > MOST_JOBS:
        problems["copies"] = (
            f"That would be {len(prompts) * copies} jobs: {MOST_JOBS} at most."
        )
    if keys_on:
        common["visibility"] = "public" if draft.is_public else "private"
    wanted = []
    for number, prompt in enumerate(prompts * copies):
        body = common | {
            "model": draft.chosen_model,
            "prompt": prompt,
            "parameters": _with_seed(own, number),
        }
        try:
            wanted.append(schemas.GenerateRequest.model_validate(body))
        except ValidationError as error:
            found = explained(error, schemas.GenerateRequest)
            raise Wrong(problems_of(found, fields) | problems) from None
    if problems:
        raise Wrong(problems)
    return wanted


def problems_of(error: ServiceError, fields: Sequence[Field]) -> dict[str, str]:
    """Put what an error says beside the fields it is about."""
    told = [(pointer, text) for pointer, text in told_fields(error)]
    if not told and (named := getattr(error, "field", None)):
        told = [(f"/{named}", str(error))]
    found: dict[str, str] = {}
    for pointer, text in told:
        name = _field_at(pointer, fields)
        found.setdefault(name, _for_people(text, name))
    return found or {"": str(error)}


def _field_at(pointer: str, fields: Sequence[Field]) -> str:
    steps = pointer.strip("/").split("/")
    names = {one.name for one in fields}
    if steps[0] == "num_outputs":
        return next((INPUT + one for one in COUNT_INPUTS if one in names), "")
    if steps[0] in _COMMON_SIZES:
        return INPUT + steps[0] if steps[0] in names else ""
    if steps[0] == "parameters" and len(steps) > 1:
        return INPUT + steps[1] if steps[1] in names else ""
    return steps[0] if steps[0] in ("prompt", "model") else ""


def _for_people(text: str, name: str) -> str:
    """Say it without the words of the API; beside its field, nobody needs the field's name."""
    text = text.replace("parameters.", "")
    own = name.removeprefix(INPUT)
    if name and text.startswith(f"{own} "):
        text = text.removeprefix(f"{own} ")
    return text[:1].upper() + text[1:]


def _inputs(
    draft: Draft, fields: Sequence[Field], problems: dict[str, str]
) -> tuple[dict[str, Any], dict[str, JSON]]:
    """Read every field: what every model understands, and what is this one's own."""
    common: dict[str, Any] = {}
    own: dict[str, JSON] = {}
    for one in fields:
        if one.kind in (Kind.PICTURE, Kind.PICTURES):
            uris: list[JSON] = [each.uri for each in draft.pictures.get(one.name, ())]
            if uris:
                own[one.name] = uris if one.kind is Kind.PICTURES else uris[-1]
            elif one.is_required:
                problems[INPUT + one.name] = "Choose a picture."
            continue
        try:
            value = read(one, draft.value(one))
        except Unreadable as error:
            problems[INPUT + one.name] = _for_people(str(error), "")
            continue
        if value is None:
            continue
        if one.name in COUNT_INPUTS:
            common["num_outputs"] = value
        elif one.name in _COMMON_SIZES:
            common[one.name] = value
        else:
            own[one.name] = value
    return common, own


def _copies(draft: Draft, problems: dict[str, str]) -> int:
    text = draft.copies
    count = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0
    if not 1 <= count <= MOST_COPIES:
        problems["copies"] = f"A whole number from 1 to {MOST_COPIES}."
        return 1
    return count


def _prompts(draft: Draft) -> list[str]:
    if not draft.is_by_line:
        return [draft.prompt]
    return [line.strip() for line in draft.prompt.splitlines() if line.strip()] or [""]


def _with_seed(own: Mapping[str, JSON], number: int) -> dict[str, JSON]:
    """Give each of several jobs the next seed: the same one would make the same picture."""
    seed = own.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        return dict(own)
    return {**own, "seed": seed + number}
