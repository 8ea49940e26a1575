"""Ids in paths beside words: `PATCH /webhooks/secret` is not about an endpoint.

A route `/{endpoint_id}` would answer for its neighbours, with 400 for a method they do not have,
and be named in their `Allow`.
"""

from __future__ import annotations

from starlette.convertors import StringConvertor, register_url_convertor


def keep_apart(name: str, *words: str) -> None:
    """Make `{id:name}` in a path match everything but the words."""

    class NotReserved(StringConvertor):
        """One segment of a path that is none of the words."""

        regex = f"(?!(?:{'|'.join(words)})(?:/|$))[^/]+"

    register_url_convertor(name, NotReserved())
