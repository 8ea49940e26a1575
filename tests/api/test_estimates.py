"""What a job would cost, and what happens when there is not enough left."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.api.conftest import Serve
from sandbox.runner import Sandbox
from tests.api.served import FLUX, Api, check_problem, working
from tests.support.money import check_books, total

PRICES = f"""
version = "of this test"

[[price]]
model = "{FLUX}"
since = 2026-01-01
per_image_usd = 0.003
"""


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES)
    return path


@pytest.fixture
async def api(serve: Serve, sandbox: Sandbox, prices: Path) -> Api:
    found: Api = await serve(
        sandbox, price_file=prices, budget_day_usd="0.0105", max_pending_jobs=50
    )
    return found


async def dry(api: Api, **body: Any) -> dict[str, Any]:
    answer = await api.client.post(
        "/api/v1/generate",
        params={"dry_run": True},
        json={"prompt": "a quiet harbour", **body},
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_dry_run_tells_all_and_makes_nothing(
    api: Api, sandbox: Sandbox
) -> None:
    found = await dry(api, num_outputs=3, negative_prompt="boats", seed=7)

    assert found["cost"] == {"low_usd": "0.003", "high_usd": "0.009"}
    assert found["model"] == FLUX
    assert found["parameters"]["seed"] == 7
    assert found["parameters"]["num_outputs"] == found["num_outputs"] == 3
    assert "negative_prompt was ignored" in found["warnings"][0]
    assert found["queue"] == {
        "pending": 0,
        "is_paused": False,
        "starts_within_seconds": 0.0,
        "generates_in_seconds": None,
    }
    assert await api.listed() == []
    await check_books(api.app.state.runtime.database)


async def test_a_dry_run_is_refused_as_the_job_would_be(api: Api) -> None:
    answer = await api.client.post(
        "/api/v1/generate?dry_run=true",
        json={"prompt": "a quiet harbour", "num_outputs": 4},
    )

    assert answer.status_code == 402
    problem = check_problem(answer)
    assert problem.code == "budget_exceeded"
    assert not problem.retryable
    assert problem.budget is not None
    assert problem.budget.model_dump(mode="json") == {
        "budget": "service",
        "period": "day",
        "needed_usd": "0.012",
        "limit_usd": "0.0105",
        "left_usd": "0.0105",
    }


async def test_an_unpriced_model_is_refused_under_a_budget(api: Api) -> None:
    answer = await api.client.post(
        "/api/v1/generate",
        json={"prompt": "a quiet harbour", "model": "stability-ai/sdxl"},
    )

    assert answer.status_code == 402
    assert check_problem(answer).code == "price_unknown"


async def test_money_is_held_settled_and_told(api: Api) -> None:
    database = api.app.state.runtime.database
    first = await api.generate("a quiet harbour", num_outputs=2)
    second = await api.generate("a quiet harbour", num_outputs=1)
    refused = await api.client.post("/api/v1/generate", json={"prompt": "too much"})
    assert refused.status_code == 402
    assert check_problem(refused).budget is not None
    assert await total(database, "reserve") == Decimal("0.009")
    await check_books(database)

    await api.client.post(f"/api/v1/jobs/{second.job_id}/cancel")
    async with working(api.settings):
        done = await api.finished(first.job_id)

    assert done.cost_usd == Decimal("0.006")
    await check_books(database)
    usage = (await api.client.get("/api/v1/usage")).json()
    assert (usage["totals"]["jobs"], usage["totals"]["cost_usd"]) == (2, "0.006")
    async with database.connect() as conn:
        found = await conn.execute(
            text("SELECT kind, amount_usd FROM ledger_entries WHERE job_id = :id"),
            {"id": first.job_id},
        )
        assert {row.kind: row.amount_usd for row in found} == {
            "reserve": Decimal("0.006"),
            "release": Decimal("-0.006"),
            "charge": Decimal("0.006"),
        }


async def test_a_full_queue_refuses_and_says_when_to_come_back(
    serve: Serve, sandbox: Sandbox
) -> None:
    api = await serve(sandbox, max_pending_jobs=2)
    for _ in range(2):
        await api.generate("a quiet harbour")

    answer = await api.client.post("/api/v1/generate", json={"prompt": "one more"})

    assert answer.status_code == 503
    assert check_problem(answer).code == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1
    assert len(await api.listed()) == 2


async def test_what_is_refused_does_not_fill_the_queue(
    serve: Serve, sandbox: Sandbox, prices: Path
) -> None:
    """Within the second for which a count is believed."""
    api = await serve(
        sandbox, price_file=prices, budget_job_usd="0.003", max_pending_jobs=3
    )
    api.app.state.runtime.backlog._clock = lambda: 100.0
    body = {"prompt": "a quiet harbour", "num_outputs": 2}

    refused = [await api.client.post("/api/v1/generate", json=body) for _ in range(5)]
    await api.generate("a quiet harbour")
    again = [
        await api.client.post(
            "/api/v1/generate",
            json=body | {"num_outputs": 1},
            headers={"Idempotency-Key": "k"},
        )
        for _ in range(2)
    ]
    await api.generate("a quiet harbour")

    assert {answer.status_code for answer in refused} == {402}
    assert {answer.status_code for answer in again} == {202}
    assert len(await api.listed()) == 3


async def test_the_estimate_knows_how_long_pictures_took(
    serve: Serve, sandbox: Sandbox
) -> None:
    api = await serve(sandbox)
    async with working(api.settings):
        await api.finished((await api.generate("a quiet harbour")).job_id)

    found = await dry(api)

    assert found["cost"] is None
    assert found["queue"]["generates_in_seconds"] >= 0
