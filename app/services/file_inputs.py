"""Which inputs of a model are files, and which of those are pictures.  Pure.

A model says `format: uri` and no more.  What kind of file it wants is only in the words of the
input's name, title and description, so words decide:

| words | the input is |
|---|---|
| its name has a word for pictures | a picture |
| its name has a word for something else | something else |
| title or description have a word for pictures and none for something else | a picture |
| none of these | something else |

Some models do not even say `format: uri`.  A plain text whose name has a word for pictures is an
input too; there, only what looks like an address is taken for one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from app.domain.generation import JSON
from app.services.input_schema import flatten

_PICTURES: Final = frozenset(
    "image images img imgs picture pictures photo photos photograph mask masks portrait"
    " sketch scribble drawing canny frame frames".split()
)
_OTHERS: Final = frozenset(
    "audio sound music song voice speech video videos movie weights weight lora loras"
    " checkpoint embedding zip tar archive dataset pdf csv subtitles webhook".split()
)
_WORD: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


@dataclass(frozen=True, slots=True)
class FileInput:
    """An input that takes a file by its URI, or a list of them; `is_sure`: the model says so."""

    name: str
    is_list: bool
    is_picture: bool
    is_sure: bool = True


def file_inputs(input_schema: Mapping[str, JSON]) -> dict[str, FileInput]:
    """Name the inputs that take files, in the order the model shows them (`x-order`)."""
    properties = input_schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    found = []
    for name, one in properties.items():
        if not isinstance(one, dict):
            continue
        schema = flatten(one, input_schema)
        is_list = _is_list(schema, input_schema)
        is_sure = is_list or _is_uri(schema, input_schema)
        if is_sure or _may_be_picture(name, schema, input_schema):
            order = schema.get("x-order")
            rank = order if isinstance(order, int) else len(properties)
            is_picture = not is_sure or _is_picture(name, schema)
            found.append((rank, FileInput(name, is_list, is_picture, is_sure)))
    found.sort(key=lambda pair: pair[0])
    return {one.name: one for _, one in found}


def _is_uri(schema: Mapping[str, JSON], root: Mapping[str, JSON]) -> bool:
    return any(one.get("format") == "uri" for one in _branches(schema, root))


def _is_list(schema: Mapping[str, JSON], root: Mapping[str, JSON]) -> bool:
    for one in _branches(schema, root):
        items = one.get("items")
        if isinstance(items, dict) and _is_uri(flatten(items, root), root):
            return True
    return False


def _may_be_picture(
    name: str, schema: Mapping[str, JSON], root: Mapping[str, JSON]
) -> bool:
    """Tell a text without format or choices that is named like a picture."""
    return bool(_words(name) & _PICTURES) and any(
        one.get("type") == "string" and "format" not in one and "enum" not in one
        for one in _branches(schema, root)
    )


def _branches(
    schema: Mapping[str, JSON], root: Mapping[str, JSON]
) -> list[Mapping[str, JSON]]:
    """Give the schema and its alternatives: an optional input is "a URI or null"."""
    found: list[Mapping[str, JSON]] = [schema]
    for word in ("anyOf", "oneOf"):
        alternatives = schema.get(word)
        if isinstance(alternatives, list):
            found += [flatten(a, root) for a in alternatives if isinstance(a, dict)]
    return found


def _is_picture(name: str, schema: Mapping[str, JSON]) -> bool:
    own = _words(name)
    if own & _PICTURES:
        return True
    if own & _OTHERS:
        return False
    said = _words(f"{schema.get('title', '')} {schema.get('description', '')}")
    return bool(said & _PICTURES) and not said & _OTHERS


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}
