"""Finding purchases of unknown fate in the provider's own list.

A create whose answer was lost may have been made.  The provider keeps a list of everything
the account bought.  A prediction that names our attempt in its webhook is that attempt's; where
the list shows no webhooks, one with our exact input, made since we sent it and owned by no
attempt yet, is ours.  Several seekers share one walk through the list.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from app.core.batching import Batcher
from app.domain.generation import JSON, GenerationRequest, MediaClient, Prediction
from app.services import job_queries
from app.services.callback_urls import attempt_of
from app.services.ledger import Ledger

# The provider's clock and ours may differ by this much (replicate-api notes, recipe step 4).
SKEW = timedelta(seconds=60)
WRITING = timedelta(seconds=5)  # from finding a purchase to having adopted it


@dataclass(frozen=True, slots=True)
class Seeker:
    """An attempt whose purchase is looked for."""

    attempt_id: UUID
    request: GenerationRequest
    sent_at: datetime


@dataclass(frozen=True, slots=True)
class Found:
    """A purchase that turned up.  `is_certain`: it names the attempt itself."""

    prediction: Prediction
    is_certain: bool


class Reconciler:
    """Looks for lost purchases.  Raises `Unavailable` when the list cannot be read whole."""

    def __init__(self, ledger: Ledger, client: MediaClient) -> None:
        self._ledger = ledger
        self._client = client
        self._given: dict[str, float] = {}
        self.find: Batcher[Seeker, Found | None] = Batcher(
            self._give, limit=1000, is_shared=lambda error: True
        )

    async def _give(self, seekers: Sequence[Seeker]) -> Sequence[Found | None]:
        """Search for attempts that adopt what is found: nobody else is to find it now."""
        found = await self.search(seekers)
        now = time.monotonic()
        self._given |= {one.prediction.handle: now for one in found if one is not None}
        return found

    async def search(self, seekers: Sequence[Seeker]) -> Sequence[Found | None]:
        """Walk the list once for all seekers; answer one result each, in order.

        Gives nothing away: who seeks for a lost attempt may not get what is found.
        """
        candidates = await self._unowned(await self._candidates(seekers))
        # Oldest first on both sides: equal purchases are interchangeable, and no
        # prediction is given to two seekers.
        candidates.sort(key=lambda p: (p.created_at is None, p.created_at, p.handle))
        named, nameless = _by_name(candidates)
        found: list[Found | None] = []
        for seeker in seekers:
            match = named.get(seeker.attempt_id)
            is_certain = match is not None
            if match is None:
                earliest = seeker.sent_at - SKEW
                fitting = (p for p in nameless if _fits(p, seeker.request, earliest))
                match = next(fitting, None)
                if match is not None:
                    nameless.remove(match)
            found.append(None if match is None else Found(match, is_certain))
        return found

    async def _candidates(self, seekers: Sequence[Seeker]) -> list[Prediction]:
        """Read the list since the oldest seeker; keep what may be somebody's."""
        since = min(seeker.sent_at for seeker in seekers) - SKEW
        wanted = {seeker.attempt_id for seeker in seekers}
        by_prompt: dict[str, list[GenerationRequest]] = {}
        for seeker in seekers:
            prompt = _prompt(seeker.request.input)
            by_prompt.setdefault(prompt, []).append(seeker.request)
        candidates: list[Prediction] = []
        async for page in self._client.list_since(since):
            for seen in page:
                rivals = by_prompt.get(_prompt(seen.input or {}), ())
                if _attempt_of(seen) in wanted or any(
                    _matches(seen, request) for request in rivals
                ):
                    candidates.append(seen)
        return candidates

    async def _unowned(self, candidates: Sequence[Prediction]) -> list[Prediction]:
        if not candidates:
            return []
        async with self._ledger.reading() as conn:
            taken = await job_queries.owned(conn, [p.handle for p in candidates])
        # Given away by an earlier walk, and perhaps not written down yet.
        recent = time.monotonic() - WRITING.total_seconds()
        self._given = {h: at for h, at in self._given.items() if at > recent}
        return [p for p in candidates if p.handle not in taken | self._given.keys()]


def _by_name(
    candidates: Sequence[Prediction],
) -> tuple[dict[UUID, Prediction], list[Prediction]]:
    """Part those that name an attempt from those that show no name."""
    named: dict[UUID, Prediction] = {}
    nameless: list[Prediction] = []
    for prediction in candidates:
        attempt_id = _attempt_of(prediction)
        if attempt_id is None:
            nameless.append(prediction)
        else:
            named.setdefault(attempt_id, prediction)
    return named, nameless


def _attempt_of(prediction: Prediction) -> UUID | None:
    return attempt_of(prediction.webhook) if prediction.webhook else None


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
