"""What things cost, from the price list to what is left of a budget."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import insert

from app.models import schemas
from app.models.key_schemas import NewKey
from app.models.money_schemas import Usage
from app.services.accounts import ENTRIES
from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.keyed import KEYS_ON, People, keyed
from tests.api.served import FLUX, Api, check_problem, working

USAGE = "/api/v1/usage"
DEV = "black-forest-labs/flux-dev"
PRO = "black-forest-labs/flux-1.1-pro"
PRICES = f"""
version = "test"
[[price]]
model = "{FLUX}"
since = 2020-01-01
per_image_usd = 0.25
[[price]]
model = "{DEV}"
since = 2020-01-01
hardware = "gpu-t4"
"""
TODAY = datetime.now(UTC).date


@dataclass
class Desk:
    """An API with keys, and the one Ann asks with."""

    people: People
    ann: NewKey
    client: httpx.AsyncClient

    async def ask(self, **params: Any) -> httpx.Response:
        """Ask as Ann."""
        return await self.client.get(USAGE, params=params)

    async def told(
        self, client: httpx.AsyncClient | None = None, **params: Any
    ) -> dict[str, Any]:
        """Ask, as Ann or with another client, and get an answer."""
        answer = await (client or self.client).get(USAGE, params=params)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@pytest.fixture
async def desk(serve: Serve, sandbox: Sandbox) -> AsyncIterator[Desk]:
    api: Api = await serve(sandbox, **KEYS_ON)
    async with keyed(api) as people:
        budget = {"day_usd": "2", "month_usd": "30"}
        ann = await people.key("ann", scopes=["read"], budget=budget)
        yield Desk(people, ann, await people.bearer(ann.key))


async def book(desk: Desk, *entries: dict[str, Any]) -> None:
    """Write charges."""
    usual: dict[str, Any] = {
        "day": TODAY(),
        "owner": "ann",
        "key_id": desk.ann.key_id,
        "model": FLUX,
        "kind": "charge",
        "amount_usd": Decimal("0.25"),
        "status": "completed",
        "outputs": 1,
        "at": datetime.now(UTC),
    }
    rows = [usual | {"job_id": uuid4()} | entry for entry in entries]
    database = desk.people.api.app.state.runtime.database
    async with database.begin() as conn:
        await conn.execute(insert(ENTRIES), rows)


# --------------------------------------------------------------------------- from the start


async def test_a_job_is_priced_held_for_charged_and_told(
    serve: Serve, sandbox: Sandbox, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES)
    api: Api = await serve(sandbox, price_file=prices, budget_day_usd=Decimal("9"))
    listed = schemas.ModelList.model_validate_json(
        (await api.client.get("/api/v1/models")).content
    )
    models = {one.name: one for one in listed.items}
    price = models[FLUX].price
    assert price is not None
    assert (price.basis, price.usd, price.since) == ("image", "0.25", date(2020, 1, 1))
    assert models[FLUX].price_per_output_usd == "0.25"
    assert models[DEV].price is not None and models[DEV].price.basis == "second"
    assert models[DEV].price_per_output_usd is None
    assert models[PRO].price is not None, "the built-in ones hold for the others"

    job = await api.generate("a mill by the river", model=FLUX, num_outputs=3)
    held = Usage.model_validate_json((await api.client.get(USAGE)).content)
    async with working(api.settings):
        done = await api.finished(job.job_id)
    found = Usage.model_validate_json(
        (await api.client.get(USAGE, params={"by": "model"})).content
    )

    assert held.budget.service is not None
    assert held.budget.service.day.model_dump() == {
        "limit_usd": "9",
        "spent_usd": "0",
        "reserved_usd": "0.75",
        "left_usd": "8.25",
    }
    assert done.cost_usd == Decimal("0.75")
    (row,) = found.rows
    assert row.model_dump(exclude={"day", "key_id", "owner"}) == {
        "model": FLUX,
        **{"jobs": 1, "completed": 1, "failed": 0, "cancelled": 0},
        **{"outputs": 3, "cost_usd": "0.75", "unpriced_jobs": 0},
    }
    assert found.totals.model_dump() == row.model_dump(
        exclude={"day", "model", "key_id", "owner"}
    )
    assert found.budget.key is None
    assert found.budget.service is not None
    assert found.budget.service.day.spent_usd == "0.75"
    assert found.budget.service.day.reserved_usd == "0"
    assert found.budget.service.month.left_usd is None
    metrics = (await api.client.get("/metrics")).text
    assert "\nmgs_cost_usd_total 0.75\n" in metrics
    assert "\nmgs_reserved_usd 0.0\n" in metrics


async def test_a_sandbox_has_no_prices(serve: Serve, sandbox: Sandbox) -> None:
    api: Api = await serve(sandbox)

    listed = (await api.client.get("/api/v1/models")).json()["items"]

    assert {one["price"] for one in listed} == {None}
    assert {one["price_per_output_usd"] for one in listed} == {None}


# --------------------------------------------------------------------------------- usage


async def test_callers_see_their_own_and_administrators_everybodys(desk: Desk) -> None:
    await book(desk, {}, {"owner": "bob", "key_id": None}, {"owner": "bob"})

    hers = await desk.told()
    all_of_it = await desk.told(desk.people.admin, by="owner,day")
    his = await desk.told(desk.people.admin, owner="bob", by="key")

    assert (hers["totals"]["jobs"], len(hers["rows"])) == (1, 1)
    assert [(row["owner"], row["jobs"]) for row in all_of_it["rows"]] == [
        ("ann", 1),
        ("bob", 2),
    ]
    assert {row["day"] for row in all_of_it["rows"]} == {TODAY().isoformat()}
    assert [(row["key_id"], row["jobs"]) for row in his["rows"]] == [
        (str(desk.ann.key_id), 1),
        (None, 1),
    ]
    assert (await desk.told(owner="ann"))["totals"]["jobs"] == 1
    assert (await desk.told(desk.people.admin, owner="nobody\x00"))["rows"] == []


@pytest.mark.parametrize("params", [{"owner": "bob"}, {"by": "day,owner"}])
async def test_other_owners_are_for_administrators(
    desk: Desk, params: dict[str, str]
) -> None:
    await book(desk, {"owner": "bob"})

    answer = await desk.ask(**params)

    assert answer.status_code == 403
    assert check_problem(answer).code == "forbidden"


async def test_usage_takes_a_key_that_may_read(desk: Desk) -> None:
    submitter = await desk.people.key("ann", scopes=["generate"])

    forbidden = await (await desk.people.bearer(submitter.key)).get(USAGE)
    unauthorized = await desk.people.nobody.get(USAGE)

    assert (forbidden.status_code, unauthorized.status_code) == (403, 401)


async def test_the_last_thirty_days_are_told_if_nothing_else_is_asked_for(
    desk: Desk,
) -> None:
    days = [TODAY() - timedelta(days=ago) for ago in (0, 29, 30)]
    await book(desk, *({"day": day} for day in days))

    found = await desk.told()
    older = await desk.told(to=days[1].isoformat())
    one = await desk.told(**{"from": days[2], "to": days[2]})

    assert [row["day"] for row in found["rows"]] == [str(days[1]), str(days[0])]
    assert (found["from"], found["to"]) == (str(days[1]), str(days[0]))
    assert [row["day"] for row in older["rows"]] == [str(days[2]), str(days[1])]
    assert [row["day"] for row in one["rows"]] == [str(days[2])]


async def test_a_row_has_what_it_is_grouped_by_and_nothing_else(desk: Desk) -> None:
    await book(desk, {"amount_usd": None, "status": "failed", "outputs": 0})

    (row,) = (await desk.told(by=" model , key"))["rows"]

    assert row == {
        "model": FLUX,
        "key_id": str(desk.ann.key_id),
        **{"jobs": 1, "completed": 0, "failed": 1, "cancelled": 0},
        **{"outputs": 0, "cost_usd": None, "unpriced_jobs": 1},
    }


async def test_more_groups_than_asked_for_are_counted_and_not_told(desk: Desk) -> None:
    await book(desk, *({"model": f"a/{n}"} for n in range(3)))

    found = await desk.told(by="model", limit=2)

    assert [row["model"] for row in found["rows"]] == ["a/0", "a/1"]
    assert (found["has_more"], found["totals"]["jobs"]) == (True, 3)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"by": ""}, "by"),
        ({"by": "week"}, "by"),
        ({"by": "day,day"}, "by"),
        ({"from": "2026-02-30"}, "from"),
        ({"from": "2026-09-02", "to": "2026-09-01"}, "from"),
        ({"from": "2025-01-01", "to": "2026-09-01"}, "from"),
        ({"from": "9999-12-31"}, "from"),
        ({"limit": "0"}, "limit"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(
    desk: Desk, params: dict[str, str], field: str
) -> None:
    answer = await desk.ask(**params)

    assert answer.status_code == 400
    assert check_problem(answer).error.param == field


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31"])
async def test_the_ends_of_the_calendar_are_days(desk: Desk, day: str) -> None:
    assert (await desk.told(to=day, **({"from": day} if day > "2" else {})))[
        "rows"
    ] == []


async def test_the_budget_is_the_calling_keys_and_for_administrators_the_services(
    desk: Desk,
) -> None:
    hers = (await desk.told())["budget"]
    of_all = (await desk.told(desk.people.admin))["budget"]

    nothing_spent = {"spent_usd": "0", "reserved_usd": "0"}
    assert hers["service"] is None
    assert hers["key"] == {
        "job_usd": None,
        "day": {"limit_usd": "2", "left_usd": "2"} | nothing_spent,
        "month": {"limit_usd": "30", "left_usd": "30"} | nothing_spent,
    }
    assert of_all["key"] is None
    assert of_all["service"]["day"]["limit_usd"] is None
