"""What is known of models when the provider is slow, silent, or asked for nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest

from app.domain.errors import ModelNotFound, ProviderUnavailable, Unavailable
from app.domain.generation import MediaClient, ModelDescription
from app.services import catalogue as module
from app.services.catalogue import Catalogue, load_bundled_models
from app.services.translation import CommonRequest

SCHNELL = "black-forest-labs/flux-schnell"
OWN = "someone/own-model"
BUNDLED = load_bundled_models()


@dataclass
class Clock:
    """A clock that goes only when told."""

    now: datetime = datetime(2026, 11, 23, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, span: timedelta) -> None:
        self.now += span


@dataclass
class Provider:
    """The describing part of a provider: a dictionary that can be silent or slow."""

    models: dict[str, ModelDescription] = field(default_factory=dict)
    silent: bool = False
    gate: asyncio.Event | None = None
    asked: list[str] = field(default_factory=list)

    async def describe(self, model: str) -> ModelDescription:
        self.asked.append(model)
        if self.gate is not None:
            await self.gate.wait()
        if self.silent:
            raise ProviderUnavailable("no answer")
        if model not in self.models:
            raise ModelNotFound(f"There is no model {model}.")
        return self.models[model]


def describe_own(text: str = "first") -> ModelDescription:
    return replace(BUNDLED[SCHNELL], name=OWN, description=text)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def provider() -> Provider:
    live = replace(BUNDLED[SCHNELL], description="live")
    return Provider({OWN: describe_own(), SCHNELL: live})


@pytest.fixture
async def catalogue(clock: Clock, provider: Provider) -> AsyncIterator[Catalogue]:
    client: MediaClient = provider  # type: ignore[assignment]
    found = Catalogue(client, bundled=BUNDLED, clock=clock, choose_seed=lambda: 5)
    yield found
    await found.aclose()


async def settle() -> None:
    """Let tasks in the background take their next steps."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_description_is_fetched_once(
    catalogue: Catalogue, provider: Provider
) -> None:
    for _ in range(3):
        assert (await catalogue.describe(OWN)).description == "first"

    assert provider.asked == [OWN]


async def test_many_callers_share_one_fetch(
    catalogue: Catalogue, provider: Provider
) -> None:
    provider.gate = asyncio.Event()
    callers = [asyncio.create_task(catalogue.describe(OWN)) for _ in range(50)]
    await settle()
    callers[0].cancel()
    provider.gate.set()

    found = await asyncio.gather(*callers, return_exceptions=True)

    assert isinstance(found[0], asyncio.CancelledError)
    assert all(isinstance(one, ModelDescription) for one in found[1:])
    assert provider.asked == [OWN]


async def test_an_old_description_is_renewed_behind_the_callers_back(
    catalogue: Catalogue, provider: Provider, clock: Clock
) -> None:
    await catalogue.describe(OWN)
    provider.models[OWN] = describe_own("second")
    clock.advance(timedelta(minutes=59))
    await catalogue.describe(OWN)
    assert provider.asked == [OWN]

    clock.advance(timedelta(minutes=2))
    assert (await catalogue.describe(OWN)).description == "first"
    await settle()

    assert (await catalogue.describe(OWN)).description == "second"
    assert provider.asked == [OWN, OWN]


async def test_an_old_description_outlives_a_silent_provider(
    catalogue: Catalogue, provider: Provider, clock: Clock
) -> None:
    await catalogue.describe(OWN)
    provider.silent = True
    clock.advance(timedelta(hours=5))

    for _ in range(5):
        assert (await catalogue.describe(OWN)).description == "first"
        await settle()

    assert provider.asked == [OWN, OWN], "a silent provider is not asked every time"


async def test_the_bundled_copy_is_the_last_resort(
    catalogue: Catalogue, provider: Provider, clock: Clock
) -> None:
    provider.silent = True
    for _ in range(3):
        assert await catalogue.describe(SCHNELL) == BUNDLED[SCHNELL]
    assert provider.asked == [SCHNELL]

    provider.silent = False
    clock.advance(timedelta(minutes=1))
    await catalogue.describe(SCHNELL)
    await settle()
    assert (await catalogue.describe(SCHNELL)).description == "live"


async def test_without_any_copy_the_caller_is_told_to_try_again(
    catalogue: Catalogue, provider: Provider
) -> None:
    provider.silent = True

    with pytest.raises(Unavailable) as caught:
        await catalogue.describe(OWN)

    assert caught.value.retryable
    provider.silent = False
    assert (await catalogue.describe(OWN)).description == "first"


async def test_a_senseless_description_counts_as_no_answer(
    catalogue: Catalogue, provider: Provider
) -> None:
    provider.models[SCHNELL] = replace(BUNDLED[SCHNELL], input_schema={"type": 5})

    assert await catalogue.describe(SCHNELL) == BUNDLED[SCHNELL]


async def test_an_unknown_model_is_not_asked_for_again_for_a_minute(
    catalogue: Catalogue, provider: Provider, clock: Clock
) -> None:
    for _ in range(3):
        with pytest.raises(ModelNotFound, match="no model no/such"):
            await catalogue.describe("no/such")
    assert provider.asked == ["no/such"]

    clock.advance(timedelta(seconds=61))
    provider.models["no/such"] = describe_own()
    assert await catalogue.describe("no/such")


async def test_a_removed_model_is_forgotten(
    catalogue: Catalogue, provider: Provider, clock: Clock
) -> None:
    await catalogue.describe(OWN)
    del provider.models[OWN]
    clock.advance(timedelta(hours=2))
    await catalogue.describe(OWN)
    await settle()

    with pytest.raises(ModelNotFound):
        await catalogue.describe(OWN)


@pytest.mark.parametrize("name", ["", "flux", "a/b/c", "a/b:", "../b", "a/ b", "a/b\n"])
async def test_what_is_no_name_is_not_asked_for(
    catalogue: Catalogue, provider: Provider, name: str
) -> None:
    with pytest.raises(ModelNotFound, match="owner/name"):
        await catalogue.describe(name)
    assert provider.asked == []


async def test_a_flood_of_names_does_not_fill_the_memory(
    catalogue: Catalogue, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_KNOWN", 5)
    monkeypatch.setattr(module, "_MAX_UNKNOWN", 5)
    for number in range(20):
        with pytest.raises(ModelNotFound):
            await catalogue.describe(f"no/such-{number}")
        provider.models[f"some/model-{number}"] = describe_own()
        await catalogue.describe(f"some/model-{number}")
        await catalogue.describe("some/model-0")

    assert len(catalogue._known) == len(catalogue._unknown) == 5
    assert provider.asked.count("some/model-0") == 1, "what is in use stays"


async def test_the_list_has_the_bundled_and_the_met(catalogue: Catalogue) -> None:
    await catalogue.describe(OWN)

    names = [found.name for found in catalogue.list()]

    assert names == sorted([*BUNDLED, OWN])


async def test_a_request_is_prepared_with_the_live_schema(
    catalogue: Catalogue,
) -> None:
    prepared = await catalogue.prepare(CommonRequest(OWN, "a fox", num_outputs=2))

    assert prepared.input == {"prompt": "a fox", "num_outputs": 2, "seed": 5}
