"""Takes the provider's webhooks: is it genuine, is it new, whose is it, who must look.

What a webhook says is a hint and no more: it makes the job due, and the look that follows
reads the prediction itself.  So a message that comes twice, late or out of order does no
harm, and the memory of what came is there to save work only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError

from app.core.patience import within
from app.core.recall import Recall
from app.domain.errors import NotFound, Unavailable
from app.services.ledger import PATIENCE, Ledger
from app.services.news import Hint
from app.services.providers import replicate_wire as wire
from app.services.webhook_signatures import TOLERANCE, SignatureCheck, Verdict

log = structlog.get_logger("app.webhooks")

MEMORY = 2 * TOLERANCE  # the longest one and the same signed message can be believed
RETRY_AFTER = timedelta(seconds=2)

_TOKEN = re.compile(r"[\w-]{16,64}", re.ASCII)


class Reception(StrEnum):
    """How a webhook was received; the first three are the good ones."""

    ACCEPTED = "accepted"
    NEEDLESS = "needless"  # genuine; nothing was to be done about it (any more)
    DUPLICATE = "duplicate"
    UNSIGNED = "unsigned"
    STALE = "stale"
    FORGED = "forged"
    SECRET_UNKNOWN = "secret_unknown"
    OVERSIZED = "oversized"
    MALFORMED = "malformed"
    UNKNOWN = "unknown"  # no such attempt, or not with this token
    UNAVAILABLE = "unavailable"  # could not be written down; is to be sent again


@dataclass(frozen=True, slots=True)
class Receipt:
    """How a webhook was received, and the job to ring for, if any.

    `is_adoption`: it told of a purchase nobody knew the outcome of.
    """

    reception: Reception
    job_id: UUID | None = None
    is_adoption: bool = False


_REFUSED = {
    Verdict.UNSIGNED: Reception.UNSIGNED,
    Verdict.STALE: Reception.STALE,
    Verdict.FORGED: Reception.FORGED,
    Verdict.UNDECIDED: Reception.SECRET_UNKNOWN,
}


class WebhookInbox:
    """Receives webhooks.  Safe to share within one event loop."""

    def __init__(
        self, *, ledger: Ledger, signatures: SignatureCheck, seen: Recall
    ) -> None:
        self._ledger = ledger
        self._signatures = signatures
        self._seen = seen

    async def receive(
        self, attempt_id: UUID, token: str, headers: Mapping[str, str], body: bytes
    ) -> Receipt:
        """Take one webhook: answers after what it means is committed, and never raises.

        `headers` are looked up by lower-case names.  Nothing of the body is read before its
        signature was found right.
        """
        verdict = await self._signatures.judge(headers, body)
        if verdict is not Verdict.GENUINE:
            return Receipt(_REFUSED[verdict])
        if not _TOKEN.fullmatch(token):
            return Receipt(Reception.UNKNOWN)
        prediction = wire.parse_prediction(wire.parse_object(body))
        if prediction is None:
            return Receipt(Reception.MALFORMED)
        hint = Hint(attempt_id, token, prediction.handle, prediction.phase.is_over)
        if not hint.is_over:
            # Sent once, and told again by the end: not worth two questions to Redis.
            return await self._write(hint)
        key = _key(attempt_id, token, headers["webhook-id"])
        if await self._seen.knows(key):
            return Receipt(Reception.DUPLICATE)
        receipt = await self._write(hint)
        if receipt.reception in (Reception.ACCEPTED, Reception.NEEDLESS):
            # Not earlier: the provider is to send again what was not written.
            await self._seen.note(key)
        return receipt

    async def _write(self, hint: Hint) -> Receipt:
        try:
            told = await within(PATIENCE, self._ledger.hint(hint))
        except NotFound:
            return Receipt(Reception.UNKNOWN)
        except (Unavailable, DBAPIError, TimeoutError) as error:
            log.warning("webhook.not_written", error=type(error).__name__)
            return Receipt(Reception.UNAVAILABLE)
        if told.job_id is None:
            return Receipt(Reception.NEEDLESS)
        return Receipt(Reception.ACCEPTED, told.job_id, told.is_adoption)


def _key(attempt_id: UUID, token: str, message_id: str) -> str:
    """Name a message at an address; the token is not to be read out of Redis."""
    text = f"{attempt_id} {token} {message_id}"
    return hashlib.sha256(text.encode()).hexdigest()
