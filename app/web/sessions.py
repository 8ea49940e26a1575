"""Who is signed in: what a browser's cookie says, and who that is now.

A cookie holds no API key.  Of a key from the table it holds the hash, from which nobody finds
256 random bits; of the configured one, which a person may have chosen, a hash made with a key of
ours.  It is signed, and ends after half a day; the key behind it is looked up with every request,
so a session ends within a second of its key.  Nothing is stored: signing out makes the browser
forget.
"""

from __future__ import annotations

import base64
import hmac
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from app.domain.access import Caller
from app.domain.errors import InvalidKey
from app.services.gatekeeper import REFUSED, Gatekeeper
from app.services.keys import digest

LIFETIME: Final = timedelta(hours=12)

_MADE: Final = 1  # a key from the table: `mark` is its hash
_CONFIGURED: Final = 2  # `mark` is its hash, hashed again with a key of ours
_PAYLOAD: Final = struct.Struct(">BQ16s32s")  # kind, end in Unix seconds, nonce, mark
_SIGNATURE: Final = 32
_LABEL: Final = b"mediagen session 1\n"
_SEAL: Final = b"mediagen session, configured key\n"
_TOKEN: Final = b"mediagen form 1\n"


@dataclass(frozen=True, slots=True)
class Session:
    """What a cookie of ours says.  `id` is no secret of its holder's, and differs each time."""

    id: str
    is_configured: bool
    mark: bytes
    key: bytes  # the one of ours it is signed with


class Sessions:
    """Makes and reads cookies and the tokens of forms.  The same in every process."""

    def __init__(
        self,
        keys: Sequence[bytes],
        *,
        lifetime: timedelta = LIFETIME,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """The first of the keys signs, all are believed.  `clock` gives Unix seconds."""
        self.lifetime = lifetime
        self._keys = [hmac.digest(key, b"mediagen: pages", "sha256") for key in keys]
        self._clock = clock

    def open(self, secret: str, caller: Caller) -> str:
        """Give the cookie for somebody who showed the key, and was found to be the caller."""
        key, mark = self._keys[0], digest(secret)
        kind = _MADE if caller.key_id is not None else _CONFIGURED
        if kind == _CONFIGURED:
            mark = _seal(key, mark)
        end = int(self._clock() + self.lifetime.total_seconds())
        payload = _PAYLOAD.pack(kind, end, secrets.token_bytes(16), mark)
        return _encode(payload + _sign(key, payload))

    def read(self, cookie: str) -> Session | None:
        """Read a cookie; None for one that is not ours, or has come to its end."""
        raw = _decode(cookie)
        if len(raw) != _PAYLOAD.size + _SIGNATURE:
            return None
        payload, signature = raw[: _PAYLOAD.size], raw[_PAYLOAD.size :]
        fits = [
            key
            for key in self._keys
            if hmac.compare_digest(_sign(key, payload), signature)
        ]
        kind, end, nonce, mark = _PAYLOAD.unpack(payload)
        if not fits or self._clock() >= end or kind not in (_MADE, _CONFIGURED):
            return None
        return Session(nonce.hex(), kind == _CONFIGURED, mark, fits[0])

    def token(self, holder: str) -> str:
        """Give what a form must bring back: it proves that it was given to this browser."""
        return _encode(_token(self._keys[0], holder))

    def is_token(self, text: str, holder: str) -> bool:
        """Tell whether the token was given to this browser."""
        given = _decode(text)
        # Every key is tried, whichever fits: the time taken tells nothing.
        fits = [hmac.compare_digest(_token(key, holder), given) for key in self._keys]
        return any(fits)


async def caller_of_session(gatekeeper: Gatekeeper, session: Session) -> Caller:
    """Say who is signed in; raise `InvalidKey` when the key is not valid any more."""
    if not session.is_configured:
        return await gatekeeper.identify_again(session.mark)
    found = gatekeeper.find_configured(
        lambda known: hmac.compare_digest(_seal(session.key, known), session.mark)
    )
    if found is None:
        raise InvalidKey(REFUSED)
    return found


def _sign(key: bytes, payload: bytes) -> bytes:
    return hmac.digest(key, _LABEL + payload, "sha256")


def _seal(key: bytes, hashed: bytes) -> bytes:
    return hmac.digest(key, _SEAL + hashed, "sha256")


def _token(key: bytes, holder: str) -> bytes:
    return hmac.digest(key, _TOKEN + holder.encode(), "sha256")


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """Read base64url; nothing for what is none, or too long to be of ours."""
    if len(text) > 256 or not text.isascii():
        return b""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return b""
