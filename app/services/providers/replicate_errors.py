"""What Replicate's refusals and error texts mean: three tables with their sources.

Switch on the HTTP status, then on structure, on text only where there is nothing else.
Texts for people are cleaned: no links (they carry signatures), no tokens, bounded length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from app.domain.generation import Failure, Refused, RefusalKind

_LONGEST_TEXT = 300  # characters of a provider's text that reach a user
_LONGEST_WAIT = timedelta(days=1)  # sanity bound; the caller clamps further

ACCOUNT_MESSAGE = "the provider account cannot buy at the moment"
_THROTTLED = Failure(
    "provider_throttled", "the provider asks us to slow down", retryable=True
)
UNREACHABLE = Failure(
    "provider_unavailable", "the provider could not be reached", retryable=True
)
_ACCOUNT = Failure("provider_account", ACCOUNT_MESSAGE, retryable=True)
_FORBIDDEN = Failure(
    "provider_forbidden",
    "the provider does not let the account buy this",
    retryable=True,
)
_NO_MODEL = Failure(
    "model_not_found",
    "the provider has no such model or version, or does not let us use it; "
    "community models must be named owner/name:version",
    retryable=False,
)
_TOO_LARGE = Failure(
    "input_too_large",
    "the input is too large for the provider; send files as https URLs",
    retryable=False,
)
_REJECTED = Failure(
    "provider_rejected", "the provider refused the request", retryable=False
)


def classify_refusal(
    status: int, retry_after: str | None, body: Mapping[str, Any] | None
) -> Refused:
    """Say what a 4xx answer to a create means.  Nothing was created in any case.

    | status | seen as | source |
    |---|---|---|
    | 400 | malformed | `detail`, replicate.com/docs/reference/http, 2026-06 |
    | 401 | three wordings, problem+json | replicate-python tests/cassettes, 2023-24 |
    | 402 | "Insufficient credit"; tells people to buy credit, so it is never repeated | bodies
      pasted into public issues, 2025-26 |
    | 403 | unverified; may concern the model only | |
    | 404 | unknown model, or a community model without a version | public issues |
    | 409 | busy: Cog's answer at capacity | replicate/cog docs/http.md, 2026-08 |
    | 413 | too large | api.replicate.com/openapi.json, 2026-03 |
    | 422 | "Input validation failed" with `invalid_fields`, or "Invalid version or not
      permitted" | public issues, 2025-26 |
    | 429 | throttled | replicate.com/docs/topics/predictions/rate-limits |
    """
    if status in (409, 429):
        wait = read_retry_after(retry_after, body)
        return Refused(RefusalKind.THROTTLED, _THROTTLED, wait)
    if status in (401, 402, 403):
        wait = read_retry_after(retry_after, body)
        failure = _FORBIDDEN if status == 403 else _ACCOUNT
        return Refused(RefusalKind.ACCOUNT, failure, wait)
    return Refused(RefusalKind.PERMANENT, _permanent(status, body or {}))


def _permanent(status: int, body: Mapping[str, Any]) -> Failure:
    if status == 404:
        return _NO_MODEL
    if status == 413:
        return _TOO_LARGE
    if status not in (400, 422):
        return _REJECTED
    problems = _invalid_fields(body)
    ours = [(name, why) for name, why in problems if not name.startswith("input")]
    theirs = [(name, why) for name, why in problems if name.startswith("input")]
    title = str(body.get("title") or "").casefold()
    if "invalid version" in title or any(name == "version" for name, _ in ours):
        return _NO_MODEL
    if ours and not theirs:
        # The input is fine; what we wrapped around it is not.  Nothing a user can mend.
        return _REJECTED
    if not theirs:
        detail = str(body.get("detail") or "the provider gives no details")
        return _invalid_input(detail)
    parts = [f"{name.removeprefix('input.')}: {why}" for name, why in theirs]
    return _invalid_input("; ".join(parts))


def _invalid_input(why: str) -> Failure:
    message = clean_text(f"the model refused the input: {why}")
    return Failure("invalid_input", message, retryable=False)


def _invalid_fields(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List (field, reason) from `invalid_fields`, else from the lines of `detail`.

    A missing input is reported on `input` itself, with the name in the description; an
    additional top-level property on `(root)`.
    """
    found: list[tuple[str, str]] = []
    rows = body.get("invalid_fields")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("field"), str):
            reason = row.get("description")
            found.append((row["field"], reason if isinstance(reason, str) else ""))
    if not found and isinstance(detail := body.get("detail"), str):
        for line in detail.splitlines():
            name, colon, reason = line.strip().removeprefix("- ").partition(":")
            if line.strip().startswith("- ") and colon:
                found.append((name.strip(), reason.strip()))
    return found


_SECONDS_IN_TEXT = re.compile(r"~\s*(\d+(?:\.\d+)?)\s*s", re.IGNORECASE)


def read_retry_after(
    header: str | None, body: Mapping[str, Any] | None
) -> timedelta | None:
    """Say how long to wait: from the header, else `retry_after`, else "resets in ~Ns".

    Only the body and the text have been seen (public issues, 2025-26); the header is
    standard HTTP.  None when nothing says so.  Never negative; the caller clamps.
    """
    body = body or {}
    candidates = (_header_wait(header), _seconds(body.get("retry_after")))
    for candidate in candidates:
        if candidate is not None:
            return candidate
    detail = body.get("detail")
    match = _SECONDS_IN_TEXT.search(detail) if isinstance(detail, str) else None
    return _seconds(match.group(1)) if match else None


def _header_wait(header: str | None) -> timedelta | None:
    if header is None:
        return None
    if (wait := _seconds(header)) is not None:
        return wait
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    left = moment - datetime.now(timezone.utc)
    return min(max(left, timedelta(0)), _LONGEST_WAIT)


def _seconds(value: Any) -> timedelta | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    return timedelta(
        seconds=min(max(number, 0.0), _LONGEST_WAIT.total_seconds()),
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """One row of the table; `message` None shows the provider's own text, cleaned."""

    pattern: re.Pattern[str]
    code: str
    message: str | None
    retryable: bool
    is_transient: bool


def _kind(
    pattern: str,
    code: str,
    message: str | None,
    *,
    retryable: bool = False,
    is_transient: bool = False,
) -> _Kind:
    compiled = re.compile(pattern, re.IGNORECASE)
    return _Kind(compiled, code, message, retryable, is_transient)


_SENSITIVE = "the provider flagged the input or the output as sensitive"
_NSFW = (
    "the model withheld the picture as not safe for work; try another prompt or seed"
)
_MEMORY = "the model ran out of memory; ask for a smaller or fewer pictures"
_INTERRUPTED = "the provider interrupted the generation"
_OVERLOADED = "the model is overloaded at the provider"
_BROKE = "the provider failed while generating"

# The first row that matches decides.  Sources: [codes] replicate.com/docs/reference/
# error-codes; [wrap] the wrapper of API-backed official models, in a public repository;
# [issues] texts users pasted into public issues, 2023-26; [cog] predict.py of the models.
_FAILURES = (
    # [issues] "Prediction interrupted; please retry (code: PA)"
    _kind(
        r"\(code: PA\)|prediction interrupted",
        "provider_interrupted",
        _INTERRUPTED,
        retryable=True,
        is_transient=True,
    ),
    # [wrap][issues] "The input or output was flagged as sensitive. … (E005) (x7Jq…)"
    _kind(r"\(E005\)|flagged as sensitive", "content_policy", _SENSITIVE),
    # [cog] replicate/cog-sdxl, cog-stable-diffusion-3, cog-flux.  The output decided: the
    # same request may pass with another seed, but buying again is the user's choice.
    _kind(
        r"nsfw content|contained nsfw|nsfw.{0,20}detected",
        "content_policy",
        _NSFW,
        retryable=True,
    ),
    # [wrap] "Service is currently unavailable due to high demand… (E003)", and E004
    _kind(
        r"\(E00[34]\)|due to high demand|service is temporarily unavailable",
        "provider_overloaded",
        _OVERLOADED,
        retryable=True,
        is_transient=True,
    ),
    # [wrap] E001 and E002: the provider's own credit or key at the model's maker.
    _kind(r"\(E00[12]\)", "provider_error", _BROKE, retryable=True, is_transient=True),
    # [codes] E1001: killed for memory; [cog] the text of torch.
    _kind(r"\bE1001\b|out of memory", "out_of_memory", _MEMORY),
    # [codes] E6716: did not start in time; E8367: stopped in a non-terminal state.
    _kind(
        r"\b(E6716|E8367)\b",
        "provider_interrupted",
        _INTERRUPTED,
        retryable=True,
        is_transient=True,
    ),
    # [codes] E4875: the webhook's URL is empty.  Ours to mend, not the user's.
    _kind(r"\bE4875\b", "provider_rejected", "the provider refused the request"),
    # [codes] E1000 unknown, E8765 health check, E9243 starting, E9825 file upload;
    # [issues] E9828 and others in "Director: unexpected error handling prediction (E####)"
    _kind(
        r"^Director: |\b(E1000|E8765|E9243|E9825|E9828)\b",
        "provider_error",
        _BROKE,
        retryable=True,
        is_transient=True,
    ),
    # [issues] "Prediction input failed validation: {...}", older
    _kind(
        r"^(prediction )?input (failed validation|validation failed)",
        "invalid_input",
        None,
    ),
)
_NO_REASON = Failure("provider_error", _BROKE, retryable=True)


def classify_failure(error: object) -> tuple[Failure, bool]:
    """Say why a prediction failed, and whether buying again by ourselves is sensible.

    No text at all is treated like E1000 (unknown error at the provider).  A text that is in
    no row is the model's own exception: it would most likely fail again.
    """
    text = error if isinstance(error, str) else "" if error is None else str(error)
    if not text.strip():
        return _NO_REASON, True
    for kind in _FAILURES:
        if kind.pattern.search(text):
            message = clean_text(text) if kind.message is None else kind.message
            return Failure(kind.code, message, kind.retryable), kind.is_transient
    return Failure("model_error", clean_text(text), retryable=False), False


_PLACEHOLDERS = (
    (re.compile(r"data:[\w/+.-]*(;[\w=.-]+)*,\S*"), "[data]"),
    (re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>)\]}]+", re.IGNORECASE), "[link]"),
    (re.compile(r"\b(r8_|whsec_|sk-)[A-Za-z0-9_+/=-]{4,}"), "[secret]"),
    (re.compile(r"\bbearer\s+\S+", re.IGNORECASE), "[secret]"),
)


def clean_text(text: str) -> str:
    """Make a provider's text fit for people: one line, no links or secrets, bounded."""
    text = text[: 10 * _LONGEST_TEXT]
    for pattern, placeholder in _PLACEHOLDERS:
        text = pattern.sub(placeholder, text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) > _LONGEST_TEXT:
        text = text[: _LONGEST_TEXT - 1].rstrip() + "…"
    return text
