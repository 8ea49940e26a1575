"""Is it the provider who speaks?  Standard Webhooks 1.0, with a secret that may change.

`webhook-signature` lists HMAC-SHA256 signatures (`v1,<base64>`) over id, timestamp and the
body byte for byte (standardwebhooks.com; replicate.com/docs/topics/webhooks/verify-webhook,
2026-06).  One secret per account; where the settings have none it is fetched from the API.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

import structlog
from standardwebhooks import Webhook, WebhookVerificationError

from app.core.patience import end
from app.core.signing import signing_key
from app.domain.errors import ServiceError

log = structlog.get_logger("app.webhooks")

TOLERANCE = timedelta(minutes=5)  # between the clocks; the library has the same
FETCH_PAUSE = timedelta(minutes=1)  # at most one fetch in it, whatever is thrown at us
FETCH_PATIENCE = timedelta(
    seconds=3
)  # the provider waits "a few seconds" for an answer

# An id has no dot, so that id, timestamp and body cannot be cut apart in another way.
_ID = re.compile(r"[\w-]{1,256}", re.ASCII)
_TIMESTAMP = re.compile(r"\d{1,15}", re.ASCII)
_SIGNATURE = re.compile(r"v1,[A-Za-z0-9+/]{43}=")
_MOST_SIGNATURES = 8

Clock = Callable[[], float]


class Verdict(StrEnum):
    """What is to be thought of a message."""

    GENUINE = "genuine"
    UNSIGNED = "unsigned"  # a header is missing, or is not what it should be
    STALE = "stale"  # said to be from too long ago, or from the future
    FORGED = "forged"
    UNDECIDED = "undecided"  # the secret could not be had


@dataclass(frozen=True, slots=True)
class _Claimed:
    """What a message says about itself."""

    id: str
    timestamp: str
    signatures: tuple[str, ...]

    @property
    def headers(self) -> dict[str, str]:
        return {
            "webhook-id": self.id,
            "webhook-timestamp": self.timestamp,
            "webhook-signature": " ".join(self.signatures),
        }


class SigningSecret:
    """The keys a message may be signed with: one that is given, or whatever is fetched."""

    def __init__(
        self,
        given: str | None,
        fetch: Callable[[], Awaitable[str]],
        *,
        patience: timedelta = FETCH_PATIENCE,
        clock: Clock = time.monotonic,
    ) -> None:
        """With a `given` secret nothing is ever fetched.  Raise `ValueError` for a bad one."""
        self._text = given
        self._key = None if given is None else Webhook(signing_key(given))
        self._fetch = None if given is not None else fetch
        self._patience = patience
        self._clock = clock
        self._older: Webhook | None = None
        self._older_until = 0.0
        self._began = float("-inf")  # the last fetch
        self._fetching: asyncio.Task[None] | None = None

    @property
    def keys(self) -> Sequence[Webhook]:
        """Give the keys that count now, none before the first fetch.

        After a change the old one counts for as long as a message that was sent before it
        may be on its way, and no longer: it may have been changed because it got out.
        """
        if self._key is None:
            return ()
        if self._older is not None and self._clock() < self._older_until:
            return (self._key, self._older)
        return (self._key,)

    async def renew(self) -> bool:
        """Fetch the secret, together with whoever else wants to; tell whether it is another.

        False at once within a minute of the last fetch, and after a short while when the
        provider does not answer: the fetch then goes on, for those who come later.
        """
        before = self._key
        if self._fetching is None:
            is_allowed = self._age >= FETCH_PAUSE.total_seconds()
            if self._fetch is None or not is_allowed:
                return False
            self._began = self._clock()
            self._fetching = asyncio.create_task(self._take(self._fetch))
        left = max(self._patience.total_seconds() - self._age, 0.0)
        await asyncio.wait((self._fetching,), timeout=left)
        return self._key is not before

    @property
    def _age(self) -> float:
        """How long ago the last fetch began."""
        return self._clock() - self._began

    async def aclose(self) -> None:
        """End a fetch that is under way."""
        if self._fetching is not None:
            await end(self._fetching)

    async def _take(self, fetch: Callable[[], Awaitable[str]]) -> None:
        try:
            text = await fetch()
            key = Webhook(signing_key(text))
        except ServiceError as error:
            log.warning("webhook_secret.missing", code=error.code, reason=str(error))
        except ValueError as error:
            log.warning("webhook_secret.missing", reason=f"it {error}")
        else:
            if text != self._text:
                self._older, self._text, self._key = self._key, text, key
                self._older_until = self._clock() + TOLERANCE.total_seconds()
                log.info("webhook_secret.fetched")
        finally:
            self._fetching = None


class SignatureCheck:
    """Judges messages.  Safe to share within one event loop."""

    def __init__(self, secret: SigningSecret, *, clock: Clock = time.time) -> None:
        self._secret = secret
        self._clock = clock

    async def judge(self, headers: Mapping[str, str], body: bytes) -> Verdict:
        """Tell whether the secret's owner sent these bytes, not long ago.

        `headers` are looked up by lower-case names.  A signature that does not fit makes the
        secret be fetched again, once, and not more than once a minute.
        """
        claimed = _read(headers)
        if claimed is None:
            return Verdict.UNSIGNED
        if not self._is_fresh(claimed):
            return Verdict.STALE
        if _fits(self._secret.keys, claimed, body):
            return Verdict.GENUINE
        if await self._secret.renew() and _fits(self._secret.keys, claimed, body):
            return Verdict.GENUINE
        return Verdict.FORGED if self._secret.keys else Verdict.UNDECIDED

    def _is_fresh(self, claimed: _Claimed) -> bool:
        away = self._clock() - int(claimed.timestamp)
        return abs(away) <= TOLERANCE.total_seconds()


def _read(headers: Mapping[str, str]) -> _Claimed | None:
    """Read what can be read; entries of other versions and broken ones are left out."""
    message_id = headers.get("webhook-id", "")
    timestamp = headers.get("webhook-timestamp", "")
    entries = headers.get("webhook-signature", "").split(" ")
    signatures = [entry for entry in entries if _SIGNATURE.fullmatch(entry)]
    if not signatures or not _ID.fullmatch(message_id):
        return None
    if not _TIMESTAMP.fullmatch(timestamp):
        return None
    return _Claimed(message_id, timestamp, tuple(signatures[:_MOST_SIGNATURES]))


def _fits(keys: Sequence[Webhook], claimed: _Claimed, body: bytes) -> bool:
    headers = claimed.headers
    for key in keys:
        try:
            key.verify(body, headers, json_parse=False)
        except (WebhookVerificationError, ValueError):
            # ValueError: bytes that are no UTF-8, which the library reads as text.
            continue
        return True
    return False
