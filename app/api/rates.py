"""Requests a minute: counted for keys with such a limit, and told in every answer to them.

The fields are those of draft-ietf-httpapi-ratelimit-headers-10, and those SDKs of the OpenAI
family read.  They wait in the ASGI scope for the answer to leave: an error that is answered
further out carries them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastapi import Request
from starlette.types import Scope

from app.core.quota import Standing
from app.domain.access import Caller
from app.domain.errors import OverLimit
from app.runtime import Runtime

Headers = Sequence[tuple[bytes, bytes]]

_FIELDS = "rate_fields"  # in the scope


async def charge(request: Request, runtime: Runtime, caller: Caller) -> None:
    """Count a request of the caller; raise `OverLimit` when it is one too many."""
    limit = caller.limits.requests_per_minute
    if limit is None:
        return
    standing = await runtime.quotas.take(f"key:{caller.key_id}", per_minute=limit)
    request.scope[_FIELDS] = _fields(limit, standing)
    if standing.wait:
        raise OverLimit(
            f"This key may make {limit} requests a minute: wait for Retry-After.",
            retry_after=standing.wait,
        )


def count_refusal(request: Request, error: OverLimit) -> None:
    """Count an answer 429 by the limit that was reached."""
    runtime: Runtime = request.app.state.runtime
    runtime.counters.add("rate_limited", reason=error.code)


def rate_fields(scope: Scope) -> Headers:
    """Give the header fields to add to the answer; none for callers without a limit."""
    fields: Headers = scope.get(_FIELDS, ())
    return fields


def _fields(limit: int, standing: Standing) -> Headers:
    reset = math.ceil(standing.reset.total_seconds())
    left = standing.left
    return (
        (b"ratelimit-policy", b'"requests";q=%d;w=60' % limit),
        (b"ratelimit", b'"requests";r=%d;t=%d' % (left, reset)),
        (b"x-ratelimit-limit-requests", b"%d" % limit),
        (b"x-ratelimit-remaining-requests", b"%d" % left),
        (b"x-ratelimit-reset-requests", b"%ds" % reset),
    )
