"""Every exception this service raises on purpose.

    ServiceError
    ├── InvalidRequest            the caller can mend it: names the field and the remedy
    │   └── ModelNotFound         no such model at the provider
    │   ├── OutboundRefused       a URL this service does not call
    │   └── KeyReused             the Idempotency-Key belongs to another request
    ├── Unauthorized              no key was sent, or in a way nobody can read
    │   └── InvalidKey            one was sent, and it is unknown, expired or revoked
    ├── Forbidden                 the key's scopes or limits do not allow it
    ├── BudgetExceeded            it would cost more than is left, or nobody knows what
    ├── NotFound                  no such job or file
    ├── Conflict                  the job is not in a state that allows the verb
    │   └── InProgress            the first request with this Idempotency-Key is being accepted
    ├── OverLimit                 too much at once: wait and try again
    ├── LostClaim                 another worker has the job now; change nothing
    ├── Unavailable               a part we need did not answer; try again later
    │   ├── ProviderUnavailable   the provider did not answer, or not sensibly
    │   │   └── ProviderThrottled 429; carries how long to wait
    │   └── StorageUnavailable    the blob store did not take or give the bytes
    ├── PredictionNotFound        the provider does not know the handle
    └── OutputError               one output file could not be had or believed
        ├── OutputInterrupted     the transfer broke or was too slow: fetch it again
        ├── OutputGone            404 or 410: the provider may have removed it
        ├── OutputForbidden       a host, scheme or address we do not download from
        └── OutputInvalid         the bytes are not a picture we accept

Expected outcomes of a purchase are values, not exceptions: see `generation.CreateOutcome`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta


class ServiceError(Exception):
    """Anything this service raises on purpose; `str()` is fit for the caller's eyes.

    `retry_after` says how long to wait before it is worth trying again, where that is known.
    """

    code = "internal_error"
    retryable = False
    retry_after: timedelta | None = None


class InvalidRequest(ServiceError):
    """The request cannot be honoured as sent; `field` names what to change."""

    code = "invalid_request"

    def __init__(
        self, message: str, *, field: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.field = field
        if code is not None:
            self.code = code


class ModelNotFound(InvalidRequest):
    """The provider has no such model or version, or does not let us use it."""

    code = "model_not_found"

    def __init__(self, message: str) -> None:
        super().__init__(message, field="model")


class KeyReused(InvalidRequest):
    """An Idempotency-Key was sent before, with another request."""

    code = "idempotency_key_reused"

    def __init__(self, message: str) -> None:
        super().__init__(message, field="Idempotency-Key")


class OutboundRefused(InvalidRequest):
    """A caller's URL leads where this service does not go; never says to which address."""

    code = "url_refused"


class Unauthorized(ServiceError):
    """The request has no key, or in a way that cannot be read."""

    code = "unauthorized"


class InvalidKey(Unauthorized):
    """A key was sent, and it is unknown, expired or revoked."""

    code = "invalid_api_key"


class Forbidden(ServiceError):
    """The key is valid, and does not allow this; `scope` is the one it lacks, if it does."""

    code = "forbidden"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        scope: str | None = None,
    ) -> None:
        super().__init__(message)
        self.field = field
        self.scope = scope
        if code is not None:
            self.code = code


class BudgetExceeded(ServiceError):
    """The job would cost more than a budget has left, or its price is unknown.

    `facts` say which budget, and what is left, in plain values.
    """

    code = "budget_exceeded"

    def __init__(
        self, message: str, facts: Mapping[str, str], *, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.facts = facts
        if code is not None:
            self.code = code


class NotFound(ServiceError):
    """There is no such job or file."""

    code = "not_found"


class Conflict(ServiceError):
    """The job's present status does not allow the verb."""

    code = "conflict"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class InProgress(Conflict):
    """The first request with this Idempotency-Key is still being accepted."""

    code = "idempotency_in_progress"
    retryable = True
    retry_after = timedelta(seconds=1)


class OverLimit(ServiceError):
    """A limit of the key is reached: the same request may be let through later."""

    code = "rate_limited"
    retryable = True

    def __init__(
        self, message: str, *, retry_after: timedelta, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        if code is not None:
            self.code = code


class LostClaim(ServiceError):
    """The claim was taken over; whoever holds this must change nothing."""

    code = "claim_lost"


class Unavailable(ServiceError):
    """A part we depend on did not answer; the same call may succeed later."""

    code = "service_unavailable"
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        retry_after: timedelta | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        if code is not None:
            self.code = code


class ProviderUnavailable(Unavailable):
    """The provider did not answer a read, or answered nonsense.  Nothing is known."""

    code = "provider_unavailable"


class ProviderThrottled(ProviderUnavailable):
    """The provider answered 429 to a read; `retry_after` says how long to wait."""

    code = "provider_throttled"


class StorageUnavailable(Unavailable):
    """The blob store did not take or give the bytes."""

    code = "storage_unavailable"


class PredictionNotFound(ServiceError):
    """The provider does not know this handle (any more)."""

    code = "prediction_not_found"


class OutputError(ServiceError):
    """One output of a finished prediction could not be had or believed."""

    code = "output_error"


class OutputInterrupted(OutputError):
    """The transfer broke off, stalled or was too slow; the same URL may work again."""

    code = "output_interrupted"
    retryable = True


class OutputGone(OutputError):
    """The provider answered 404 or 410 for the file."""

    code = "output_gone"
    retryable = True


class OutputForbidden(OutputError):
    """The URL points where we do not download from (host, scheme, address, redirect)."""

    code = "output_forbidden"


class OutputInvalid(OutputError):
    """The bytes are complete, and are no picture we accept (format, size, pixels)."""

    code = "output_invalid"
