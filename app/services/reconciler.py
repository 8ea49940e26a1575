"""Finding purchases of unknown fate in the provider's own list.

A create whose answer was lost may have been made.  The provider keeps a list of everything
the account bought; a prediction with our exact input, made since we sent it and owned by no
attempt yet, is ours.  Several seekers share one walk through the list.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from app.core.batching import Batcher
from app.domain.generation import JSON, GenerationRequest, MediaClient, Prediction
from app.services import job_queries
from app.services.job_records import Claim
from app.services.ledger import Ledger

# The provider's clock and ours may differ by this much (replicate-api notes, recipe step 4).
SKEW = timedelta(seconds=60)
WRITING = timedelta(seconds=5)  # from finding a purchase to having adopted it


class Reconciler:
    """Looks for lost purchases.  Raises `Unavailable` when the list cannot be read whole."""

    def __init__(self, ledger: Ledger, client: MediaClient) -> None:
        self._ledger = ledger
        self._client = client
        self._given: dict[str, float] = {}
        self.find: Batcher[Claim, Prediction | None] = Batcher(
            self._find, limit=1000, is_shared=lambda error: True
        )

    async def _find(self, claims: Sequence[Claim]) -> Sequence[Prediction | None]:
        since = min(_sent_at(claim) for claim in claims) - SKEW
        by_prompt: dict[str, list[GenerationRequest]] = {}
        for claim in claims:
            by_prompt.setdefault(_prompt(claim.request.input), []).append(claim.request)
        candidates: list[Prediction] = []
        async for page in self._client.list_since(since):
            for seen in page:
                rivals = by_prompt.get(_prompt(seen.input or {}), ())
                if any(_matches(seen, request) for request in rivals):
                    candidates.append(seen)
        free = await self._unowned(candidates)
        # Oldest first on both sides: equal purchases are interchangeable, and no
        # prediction is given to two seekers.
        free.sort(key=lambda p: (p.created_at is None, p.created_at, p.handle))
        found: list[Prediction | None] = []
        for claim in claims:
            earliest = _sent_at(claim) - SKEW
            match = next((p for p in free if _fits(p, claim.request, earliest)), None)
            if match is not None:
                free.remove(match)
                self._given[match.handle] = time.monotonic()
            found.append(match)
        return found

    async def _unowned(self, candidates: Sequence[Prediction]) -> list[Prediction]:
        if not candidates:
            return []
        async with self._ledger.reading() as conn:
            taken = await job_queries.owned(conn, [p.handle for p in candidates])
        # Given away by an earlier walk, and perhaps not written down yet.
        recent = time.monotonic() - WRITING.total_seconds()
        self._given = {h: at for h, at in self._given.items() if at > recent}
        return [p for p in candidates if p.handle not in taken | self._given.keys()]


def _sent_at(claim: Claim) -> datetime:
    assert claim.state.attempt is not None
    return claim.state.attempt.sent_at


def _prompt(given: Mapping[str, JSON]) -> str:
    """Narrow the search: inputs with different prompts cannot be equal."""
    return str(given.get("prompt"))


def _fits(prediction: Prediction, request: GenerationRequest, since: datetime) -> bool:
    if prediction.created_at is not None and prediction.created_at < since:
        return False
    return _matches(prediction, request)


def _matches(prediction: Prediction, request: GenerationRequest) -> bool:
    """Tell whether the prediction is what the request asked for.

    The provider may add defaults, so only the keys we sent are compared; the model's name
    may be reported differently, so it only rules out when both are plain names.
    """
    name = request.model.partition(":")[0]
    if prediction.model is not None and "/" in prediction.model:
        if prediction.model.partition(":")[0] != name:
            return False
    return _contains(prediction.input, request.input)


def _contains(seen: Mapping[str, JSON] | None, sent: Mapping[str, JSON]) -> bool:
    if not seen:
        return False
    return all(key in seen and seen[key] == value for key, value in sent.items())
