"""Which prediction is whose, when nobody knows whether a purchase was made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest

from app.domain.errors import ProviderUnavailable
from app.domain.events import Started
from app.domain.generation import GenerationRequest, Phase, Prediction
from app.domain.policy import Policy
from app.services.callback_urls import callback_url
from app.services.job_records import Claim
from app.services.ledger import Ledger
from app.services.reconciler import SKEW, Found, Reconciler, Seeker
from tests.support.jobs import JobTable, new_job

MODEL = "acme/painter"
INPUT = {"prompt": "a lighthouse", "seed": 7, "size": {"w": 1, "h": 2}}
MOMENT = timedelta(seconds=1)


@dataclass
class Listing:
    """The provider's list, page by page; `error` breaks it off after the pages."""

    pages: list[list[Prediction]] = field(default_factory=list)
    error: Exception | None = None
    walks: list[datetime] = field(default_factory=list)

    async def list_since(self, moment: datetime) -> AsyncIterator[list[Prediction]]:
        """Walk the pages."""
        self.walks.append(moment)
        for page in self.pages:
            await asyncio.sleep(0)
            yield page
        if self.error is not None:
            raise self.error


@pytest.fixture
def listing() -> Listing:
    return Listing()


@pytest.fixture
def reconciler(jobs: JobTable, listing: Listing) -> Reconciler:
    return Reconciler(Ledger(jobs.engine, Policy()), listing)  # type: ignore[arg-type]


async def _seek(jobs: JobTable, **changes: Any) -> Claim:
    """Make a job that was sent just now."""
    request = GenerationRequest(
        changes.pop("model", MODEL), changes.pop("input", INPUT)
    )
    (job_id,) = await jobs.submit(new_job(request=request))
    return await jobs.claim_one(job_id)


async def _find(reconciler: Reconciler, claim: Claim) -> Prediction | None:
    """Look for the claim's purchase."""
    assert claim.attempt_id is not None
    found = await reconciler.find(
        Seeker(claim.attempt_id, claim.request, _sent_at(claim))
    )
    return found.prediction if found else None


def _sent_at(claim: Claim) -> datetime:
    assert claim.state.attempt is not None
    return claim.state.attempt.sent_at


def _seen(handle: str, since: datetime | None = None, **changes: Any) -> Prediction:
    values: dict[str, Any] = {"model": MODEL, "input": INPUT, "created_at": since}
    return Prediction(handle, Phase.RUNNING, **(values | changes))


# ------------------------------------------------------------------------------ matching


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [
        ({}, True),
        ({"input": INPUT | {"steps": 4, "format": "webp"}}, True),
        ({"input": dict(reversed(INPUT.items()))}, True),
        ({"input": INPUT | {"seed": 8}}, False),
        ({"input": INPUT | {"prompt": "a lighthouse "}}, False),
        ({"input": INPUT | {"size": {"w": 1, "h": 3}}}, False),
        ({"input": {"prompt": "a lighthouse", "steps": 4}}, False),
        ({"input": {}}, False),
        ({"input": None}, False),
        ({"model": None}, True),
        ({"model": f"{MODEL}:0123abcd"}, True),
        ({"model": "hidden"}, True),
        ({"model": "acme/sculptor"}, False),
        ({"model": "acme/painter-2"}, False),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_what_counts_as_the_same_purchase(
    reconciler: Reconciler,
    listing: Listing,
    jobs: JobTable,
    changes: dict[str, Any],
    is_ours: bool,
) -> None:
    claim = await _seek(jobs)
    listing.pages = [[_seen("h-1", _sent_at(claim), **changes)]]

    found = await _find(reconciler, claim)

    assert (found.handle if found else None) == ("h-1" if is_ours else None)


async def test_a_version_in_our_name_of_the_model_makes_no_difference(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    claim = await _seek(jobs, model=f"{MODEL}:0123abcd")
    listing.pages = [[_seen("h-1", _sent_at(claim))]]

    assert await _find(reconciler, claim) is not None


@pytest.mark.parametrize(
    ("age", "is_ours"),
    [
        (timedelta(0), True),
        (-MOMENT, True),
        (SKEW - MOMENT, True),
        (SKEW + MOMENT, False),
        (timedelta(days=1), False),
        (None, True),
    ],
)
async def test_what_was_made_before_we_asked_is_not_ours(
    reconciler: Reconciler,
    listing: Listing,
    jobs: JobTable,
    age: timedelta | None,
    is_ours: bool,
) -> None:
    claim = await _seek(jobs)
    made = None if age is None else _sent_at(claim) - age
    listing.pages = [[_seen("h-1", made)]]

    found = await _find(reconciler, claim)

    assert (found is not None) == is_ours
    assert listing.walks == [_sent_at(claim) - SKEW]


async def test_what_another_attempt_owns_is_not_ours(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    owner, seeker = await _seek(jobs), await _seek(jobs)
    await jobs.settle(owner, Started("h-1"))
    now = _sent_at(seeker)
    listing.pages = [[_seen("h-2", now + MOMENT), _seen("h-1", now)]]

    found = await _find(reconciler, seeker)

    assert found is not None and found.handle == "h-2"
    listing.pages = [[_seen("h-1", now)]]
    assert await _find(reconciler, seeker) is None


async def test_of_several_that_fit_the_oldest_is_taken(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    claim = await _seek(jobs)
    now = _sent_at(claim)
    listing.pages = [
        [_seen("h-0", None), _seen("h-3", now + 3 * MOMENT)],
        [_seen("h-2", now + 2 * MOMENT), _seen("h-1", now + MOMENT)],
    ]

    found = await _find(reconciler, claim)

    assert found is not None and found.handle == "h-1"


# -------------------------------------------------------------------------------- by name


def _webhook(claim: Claim) -> str:
    assert claim.attempt_id is not None and claim.attempt_token is not None
    return callback_url("https://x.test/api/v1", claim.attempt_id, claim.attempt_token)


async def test_a_prediction_that_names_its_attempt_belongs_to_no_other(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    claims = [await _seek(jobs) for _ in range(2)]
    now = _sent_at(claims[0])
    listing.pages = [[_seen("h-1", now, webhook=_webhook(claims[1]))]]

    found = await asyncio.gather(*(_find(reconciler, claim) for claim in claims))

    assert [one.handle if one else None for one in found] == [None, "h-1"]


async def test_a_name_counts_more_than_the_input_and_says_so(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    claim = await _seek(jobs)
    assert claim.attempt_id is not None
    seeker = Seeker(claim.attempt_id, claim.request, _sent_at(claim))
    wiped = _seen("h-2", input={}, webhook=_webhook(claim))
    listing.pages = [[wiped, _seen("h-1", _sent_at(claim))]]

    assert await reconciler.search([seeker]) == [Found(wiped, is_certain=True)]
    nameless = _seen("h-3", _sent_at(claim), webhook="https://elsewhere.test/hook")
    listing.pages = [[nameless]]
    assert await reconciler.search([seeker]) == [Found(nameless, is_certain=False)]


# ------------------------------------------------------------------------------- together


async def test_equal_seekers_get_different_predictions(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    claims = [await _seek(jobs) for _ in range(3)]
    now = _sent_at(claims[0])
    listing.pages = [[_seen("h-2", now + MOMENT)], [_seen("h-1", now)]]

    found = await asyncio.gather(*(_find(reconciler, claim) for claim in claims))

    assert [one.handle if one else None for one in found] == ["h-1", "h-2", None]
    assert len(listing.walks) == 1


async def test_the_search_for_a_lost_attempt_takes_nothing_from_one_that_was_sent(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    """A hint from it may be refused, and whoever misses the purchase buys again."""
    lost, sent = await _seek(jobs), await _seek(jobs)
    listing.pages = [[_seen("h-1", _sent_at(sent))]]
    assert lost.attempt_id is not None
    await reconciler.search([Seeker(lost.attempt_id, lost.request, _sent_at(lost))])

    found = await _find(reconciler, sent)

    assert found is not None and found.handle == "h-1"


async def test_seekers_share_one_walk(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    claims = [
        await _seek(jobs, input={"prompt": f"mill {number}"}) for number in range(20)
    ]
    listing.pages = [
        [_seen(f"h-{n}", _sent_at(claims[n]), input=dict(claims[n].request.input))]
        for n in range(20)
    ]

    found = await asyncio.gather(*(_find(reconciler, claim) for claim in claims))

    assert [one.handle for one in found if one] == [f"h-{n}" for n in range(20)]
    assert len(listing.walks) == 1


async def test_a_shared_walk_reaches_back_to_the_oldest_seeker(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    old, young = await _seek(jobs), await _seek(jobs)
    await jobs.age(timedelta(seconds=100), old.job_id)
    await jobs.make_due(old.job_id)
    old = await jobs.claim_one(old.job_id)
    early = _sent_at(old) + MOMENT
    listing.pages = [[_seen("h-1", early)]]

    found = await asyncio.gather(_find(reconciler, young), _find(reconciler, old))

    assert listing.walks == [_sent_at(old) - SKEW]
    # Too early for the younger seeker, although the input is the same.
    assert [one.handle if one else None for one in found] == [None, "h-1"]


# ----------------------------------------------------------------------------- no answer


async def test_a_list_that_breaks_off_says_nothing(
    reconciler: Reconciler, listing: Listing, jobs: JobTable
) -> None:
    claims = [await _seek(jobs) for _ in range(3)]
    listing.pages = [[_seen("h-1", _sent_at(claims[0]))]]
    listing.error = ProviderUnavailable("the provider answered 500")

    answers = await asyncio.gather(
        *(_find(reconciler, claim) for claim in claims), return_exceptions=True
    )

    assert {type(answer) for answer in answers} == {ProviderUnavailable}
    assert len(listing.walks) == 1, "everybody's trouble is not asked for one by one"


async def test_an_empty_list_is_an_answer(
    reconciler: Reconciler, jobs: JobTable
) -> None:
    assert await _find(reconciler, await _seek(jobs)) is None
