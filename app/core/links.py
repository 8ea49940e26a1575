"""Links that open one path for a while: signed with a key, checked without asking anybody.

    /media/ab/abcd….png?expires=1800000000&signature=<43 characters of base64url>

The signature is HMAC-SHA256 over the path and the end, so neither can be changed.  The first
key signs and every key is believed: a new key is put behind the old one, then before it, and
the old one is dropped when its last link is dead.
"""

from __future__ import annotations

import base64
import hmac
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

EXPIRES = "expires"
SIGNATURE = "signature"

_MOMENT = re.compile(r"[1-9][0-9]{0,10}", re.ASCII)  # Unix seconds, one spelling each
_LABEL = "mediagen link 1"  # what these signatures are for, and nothing else
_DERIVATION = b"mediagen: keys of links, derived"
_NAMING = b"mediagen: keys of links, named"


class LinkSigner:
    """Makes and checks links.  Knows paths, not what is behind them."""

    def __init__(
        self,
        keys: Sequence[bytes],
        lifetime: timedelta,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`lifetime` is how long a link works at least.  `clock` gives Unix seconds."""
        if not keys:
            raise ValueError("at least one key is needed")
        self._keys = tuple(keys)
        self._clock = clock
        self._step = max(1, math.ceil(lifetime.total_seconds() / 2))
        self._hint = hmac.digest(keys[0], _NAMING, "sha256").hex()[:6]

    def end(self) -> int:
        """Say when links made now stop to work, in Unix seconds.

        The same for half a lifetime, so that a link read twice is one link to a cache; and
        never less than a lifetime away.
        """
        return (int(self._clock()) // self._step + 3) * self._step

    def sign(self, path: str, end: int) -> str:
        """Give the path with what opens it until the end, as a path and a query."""
        return f"{path}?{EXPIRES}={end}&{SIGNATURE}={_sign(self._keys[0], path, end)}"

    def sign_for(self, path: str, lifetime: timedelta) -> str:
        """Give the path with what opens it for a time of its own."""
        end = math.ceil(self._clock() + lifetime.total_seconds())
        return self.sign(path, end)

    def mark(self, end: int) -> str:
        """Name the links with this end: another mark, other links to the same paths."""
        return f"{end:x}{self._hint}"

    def seconds_left(self, path: str, query: Iterable[tuple[str, str]]) -> int | None:
        """Say how long the query still opens the path: at least a second; None: it does not.

        A query that names either part twice, or spells it in any way but ours, opens nothing.
        Other parameters do not matter.
        """
        given: dict[str, list[str]] = {EXPIRES: [], SIGNATURE: []}
        for name, value in query:
            if name in given:
                given[name].append(value)
        if any(len(values) != 1 for values in given.values()):
            return None
        moment, signature = given[EXPIRES][0], given[SIGNATURE][0]
        if _MOMENT.fullmatch(moment) is None:
            return None
        end = int(moment)
        # Every key is tried, whichever fits: the time taken tells nothing.
        fits = [
            hmac.compare_digest(_sign(key, path, end).encode(), signature.encode())
            for key in self._keys
        ]
        left = end - self._clock()
        return max(1, int(left)) if any(fits) and left > 0 else None


def derived_key(secret: str) -> bytes:
    """Make a key of a secret that has another purpose; nobody finds it from the key."""
    return hmac.digest(secret.encode(), _DERIVATION, "sha256")


def _sign(key: bytes, path: str, end: int) -> str:
    digest = hmac.digest(key, f"{_LABEL}\n{end}\n{path}".encode(), "sha256")
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
