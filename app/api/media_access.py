"""Who may have a stored file, and how long whoever gets it may keep it.

While no keys are demanded, everybody may.  Else whoever has a signed link (nobody is asked),
a key of an owner with a job or an upload that has the file, or the address of a public one.
To all others the file is as unknown as one that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from fastapi import Request

from app.api.deps import promptly
from app.api.guard import admit_or_nobody
from app.domain.access import Caller, Scope
from app.domain.errors import NotFound
from app.runtime import Runtime
from app.services import file_owners
from app.services.media_store import is_key

_BUCKET_LINK: Final = timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class Admission:
    """How a file, or the way to it in a bucket, may be handed out and kept.

    `bucket_link` is how long a link into the bucket may live.
    """

    file_headers: Mapping[str, str]
    redirect_headers: Mapping[str, str]
    bucket_link: timedelta = _BUCKET_LINK


def _headers(cache_control: str, **others: str) -> dict[str, str]:
    return {"Cache-Control": cache_control} | others


# The address holds the hash of the bytes, so they may be kept for ever; a redirect for less time
# than the link it leads to lives.
_OPEN: Final = Admission(
    _headers("public, max-age=31536000, immutable"), _headers("private, max-age=600")
)
# Keys are revoked: a browser asks again each time, and mostly hears 304.
_BY_KEY_HEADERS: Final = _headers("private, no-cache", Vary="Authorization, X-API-Key")
_BY_KEY: Final = Admission(_BY_KEY_HEADERS, _BY_KEY_HEADERS)


def _by_link(seconds_left: int) -> Admission:
    """Nothing that came of a link outlives it."""
    life = min(timedelta(seconds=seconds_left), _BUCKET_LINK)
    seconds = int(life.total_seconds())
    return Admission(
        _headers(f"private, max-age={seconds_left}, immutable"),
        _headers(f"private, max-age={seconds * 2 // 3}"),
        life,
    )


async def admit_to_file(request: Request, runtime: Runtime, key: str) -> Admission:
    """Say how the file may be handed out; raise `NotFound` where it may not.

    A key that comes with the request must be a valid one: `Unauthorized`, `Forbidden`,
    `OverLimit`.  Does not tell whether the file exists.
    """
    if not runtime.links.is_guarded:
        return _OPEN
    seconds_left = runtime.links.seconds_left(key, request.query_params.multi_items())
    if seconds_left is not None:
        return _by_link(seconds_left)
    caller = await admit_or_nobody(request, runtime, Scope.READ)
    if not is_key(key):
        raise NotFound("There is no such file.")
    return await promptly(_ask(runtime, key, caller))


async def _ask(runtime: Runtime, key: str, caller: Caller | None) -> Admission:
    async with runtime.ledger.reading() as conn:
        if await file_owners.is_public(conn, key):
            return _OPEN
        if caller is not None and (
            caller.is_admin or await file_owners.is_owned(conn, key, owner=caller.owner)
        ):
            return _BY_KEY
    raise NotFound("There is no such file.")
