"""Know the models: what each takes as input, from the provider when it answers.

A description is believed for an hour, then renewed behind the caller's back.  When the provider
does not answer, an old description is better than none, and the bundled copy is the last resort.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import Final, TypeVar

from app.core.patience import end
from app.domain.errors import ModelNotFound, ProviderUnavailable, Unavailable
from app.domain.generation import MediaClient, ModelDescription
from app.services.translation import CommonRequest, PreparedInput, Translator

V = TypeVar("V")

_MODEL: Final = re.compile(
    r"[A-Za-z0-9][\w.-]{0,98}/[A-Za-z0-9][\w.-]{0,98}(:[\w.-]{1,128})?", re.ASCII
)
_MAX_KNOWN: Final = 256  # descriptions kept; some are 50 kB
_MAX_UNKNOWN: Final = 1024  # names kept that the provider does not know
_UNKNOWN_FOR: Final = timedelta(seconds=60)
_RETRY_AFTER: Final = timedelta(seconds=30)
_FETCHES: Final = (
    8  # at once, so that invented names cannot occupy the provider's client
)
_SEED_BITS: Final = 31


@dataclass(frozen=True, slots=True)
class _Known:
    """A compiled description and until when it is believed without asking again."""

    translator: Translator
    fresh_until: datetime


class Catalogue:
    """Describe models and prepare purchases.  One per process and event loop."""

    def __init__(
        self,
        client: MediaClient,
        *,
        bundled: Mapping[str, ModelDescription],
        ttl: timedelta = timedelta(hours=1),
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        choose_seed: Callable[[], int] = lambda: secrets.randbits(_SEED_BITS),
    ) -> None:
        self._client = client
        self._bundled = bundled
        self._ttl = ttl
        self._clock = clock
        self._choose_seed = choose_seed
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._unknown: OrderedDict[str, tuple[datetime, str]] = OrderedDict()
        self._flights: dict[str, asyncio.Task[Translator]] = {}
        self._fetching = asyncio.Semaphore(_FETCHES)

    async def describe(self, model: str) -> ModelDescription:
        """Describe `owner/name` or `owner/name:version`.

        Answers at once when the model was described before, however long ago; else waits for
        the provider, once however many callers wait.  Raise `ModelNotFound` when the provider
        knows no such model, `Unavailable` when it does not answer and no copy is at hand.
        """
        return (await self._translator(model)).description

    async def prepare(self, request: CommonRequest) -> PreparedInput:
        """Turn a request into the model's own, valid input; see `Translator.prepare`."""
        translator = await self._translator(request.model)
        return translator.prepare(request, choose_seed=self._choose_seed)

    def list(self) -> tuple[ModelDescription, ...]:
        """List the models known without asking anybody, by name; pinned versions are left out."""
        found = dict(self._bundled)
        for name, known in self._known.items():
            if ":" not in name:
                found[name] = known.translator.description
        return tuple(found[name] for name in sorted(found))

    async def aclose(self) -> None:
        """End what is being fetched."""
        await end(*self._flights.values())

    async def _translator(self, model: str) -> Translator:
        known = self._known.get(model)
        if known is not None:
            self._known.move_to_end(model)
            if self._clock() >= known.fresh_until:
                self._fly(model)
            return known.translator
        self._refuse_unknown(model)
        # Shielded: a caller who gives up must not take the answer from the others.
        return await asyncio.shield(self._fly(model))

    def _refuse_unknown(self, model: str) -> None:
        if not _MODEL.fullmatch(model):
            raise ModelNotFound(
                "model must look like owner/name or owner/name:version."
            )
        found = self._unknown.get(model)
        if found is None:
            return
        until, message = found
        if self._clock() < until:
            raise ModelNotFound(message)
        del self._unknown[model]

    def _fly(self, model: str) -> asyncio.Task[Translator]:
        """Join the fetch of this model that is under way, or start one."""
        flight = self._flights.get(model)
        if flight is None:
            flight = asyncio.create_task(self._fetch(model), name=f"describe {model}")
            self._flights[model] = flight
            flight.add_done_callback(lambda done: self._land(model, done))
        return flight

    def _land(self, model: str, flight: asyncio.Task[Translator]) -> None:
        del self._flights[model]
        if not flight.cancelled():
            flight.exception()  # seen; nobody may be waiting for a renewal

    async def _fetch(self, model: str) -> Translator:
        try:
            async with self._fetching:
                found = await self._client.describe(model)
            translator = Translator(found)
        except ModelNotFound as exc:
            self._known.pop(model, None)
            self._unknown[model] = (self._clock() + _UNKNOWN_FOR, str(exc))
            _trim(self._unknown, _MAX_UNKNOWN)
            raise
        except ProviderUnavailable as exc:
            return self._fall_back(model, exc)
        return self._keep(model, translator, self._ttl)

    def _fall_back(self, model: str, exc: ProviderUnavailable) -> Translator:
        """Use the old or the bundled copy, and ask again only after a while."""
        pause = max(_RETRY_AFTER, exc.retry_after or _RETRY_AFTER)
        known = self._known.get(model)
        if known is not None:
            return self._keep(model, known.translator, pause)
        bundled = self._bundled.get(model)
        if bundled is not None:
            return self._keep(model, Translator(bundled), pause)
        raise Unavailable(
            f"The provider did not say what {model} takes as input. Try again later.",
            retry_after=exc.retry_after,
        ) from exc

    def _keep(self, model: str, translator: Translator, span: timedelta) -> Translator:
        self._known[model] = _Known(translator, self._clock() + span)
        self._known.move_to_end(model)
        _trim(self._known, _MAX_KNOWN)
        return translator


def load_bundled_models() -> Mapping[str, ModelDescription]:
    """Read the descriptions that come with the package, by `owner/name`."""
    text = resources.files("app.services").joinpath("bundled_models.json").read_text()
    return {
        entry["name"]: ModelDescription(
            name=entry["name"],
            description=entry["description"],
            version=None,
            input_schema=entry["input_schema"],
        )
        for entry in json.loads(text)["models"]
    }


def _trim(entries: OrderedDict[str, V], limit: int) -> None:
    """Forget the entries used least recently."""
    while len(entries) > limit:
        entries.popitem(last=False)
