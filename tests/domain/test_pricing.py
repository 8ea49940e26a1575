"""What a job may cost at worst is never less than what it did cost."""

from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.generation import GenerationRequest
from app.domain.pricing import Basis, CostRange, Price, PriceTable, size_of

MODEL = "somebody/model"
VERSION = f"{MODEL}:{'a' * 64}"
DAY = date(2026, 9, 1)
DEADLINE = timedelta(minutes=15)


def a_table(
    basis: Basis, usd: str = "0.003", largest: str | None = None, **changes: Any
) -> PriceTable:
    price = Price(
        changes.get("model", MODEL),
        changes.get("since", date(2026, 1, 1)),
        basis,
        Decimal(usd),
        None if largest is None else Decimal(largest),
    )
    return PriceTable([price], "test")


def worst(
    table: PriceTable, outputs: int = 1, attempts: int = 4, **model_input: Any
) -> CostRange | None:
    request = GenerationRequest(MODEL, {"prompt": "a fox", **model_input})
    return table.estimate(
        request, outputs, day=DAY, deadline=DEADLINE, attempts=attempts
    )


# -------------------------------------------------------------------------- which price


def test_the_latest_price_that_is_not_after_the_day_counts() -> None:
    prices = [
        Price(MODEL, date(2026, month, 1), Basis.IMAGE, Decimal(month))
        for month in (5, 1, 9)
    ]
    table = PriceTable(prices, "test")

    def usd(day: date) -> Decimal | None:
        price = table.price_of(MODEL, day)
        return price and price.usd

    assert usd(date(2025, 12, 31)) is None
    assert usd(date(2026, 1, 1)) == 1
    assert usd(date(2026, 4, 30)) == 1
    assert usd(date(2026, 5, 1)) == 5
    assert usd(date(2030, 1, 1)) == 9


def test_an_exact_version_wins_over_its_name_from_its_day_on() -> None:
    table = PriceTable(
        [
            Price(MODEL, date(2026, 1, 1), Basis.IMAGE, Decimal(1)),
            Price(VERSION, date(2026, 6, 1), Basis.IMAGE, Decimal(2)),
        ],
        "test",
    )

    def usd(model: str, day: date) -> Decimal | None:
        price = table.price_of(model, day)
        return price and price.usd

    assert usd(VERSION, date(2026, 6, 1)) == 2
    assert usd(VERSION, date(2026, 5, 31)) == 1, "the name's, until then"
    assert usd(f"{MODEL}:other", DAY) == 1
    assert usd(MODEL, DAY) == 1
    assert usd("somebody/else", DAY) is None


@pytest.mark.parametrize("basis", Basis)
def test_what_nobody_knows_the_price_of_costs_nobody_knows_what(basis: Basis) -> None:
    table = a_table(basis, model="somebody/else")

    assert worst(table, width=512, height=512) is None
    assert table.actual(MODEL, DAY, pixels=[1], predict_seconds=1.0) is None


# ------------------------------------------------------------------------ the worst case


def test_images_cost_their_price_each_however_often_they_are_tried() -> None:
    table = a_table(Basis.IMAGE)

    assert worst(table, 4, attempts=10) == CostRange(Decimal("0.003"), Decimal("0.012"))
    assert table.actual(MODEL, DAY, pixels=[1, 2], predict_seconds=None) == Decimal(
        "0.006"
    )
    assert table.actual(MODEL, DAY, pixels=[], predict_seconds=9.0) == 0


def test_hardware_is_paid_for_until_the_deadline_at_worst() -> None:
    table = a_table(Basis.SECOND, "0.001")

    assert worst(table, 4, attempts=1) == CostRange(Decimal(0), Decimal("0.905"))
    assert table.actual(MODEL, DAY, pixels=[], predict_seconds=2.5) == Decimal("0.0025")
    assert table.actual(MODEL, DAY, pixels=[], predict_seconds=0) == 0


@pytest.mark.parametrize("seconds", [None, -1.0, float("nan"), float("inf"), 1e300])
def test_time_that_makes_no_sense_is_not_known(seconds: float | None) -> None:
    table = a_table(Basis.SECOND)

    assert table.actual(MODEL, DAY, pixels=[1], predict_seconds=seconds) is None


def test_pixels_cost_their_share_of_a_megapixel() -> None:
    table = a_table(Basis.MEGAPIXEL, "0.01", "4")

    assert worst(table, 2) == CostRange(Decimal(0), Decimal("0.08"))
    actual = table.actual(MODEL, DAY, pixels=[1024 * 1024], predict_seconds=1.0)
    assert actual == Decimal("0.010486"), "rounded up to the ledger's last place"


def test_pictures_nobody_has_seen_yet_cost_nobody_knows_what_by_the_pixel() -> None:
    def cost(basis: Basis, *pixels: int | None) -> Decimal | None:
        table = a_table(basis, "1", "4")
        return table.actual(MODEL, DAY, pixels=pixels, predict_seconds=1.0)

    assert cost(Basis.MEGAPIXEL, 10**6, None) is None
    assert cost(Basis.MEGAPIXEL) == 0
    assert cost(Basis.IMAGE, 10**6, None) == 2
    assert cost(Basis.SECOND, None) == 1


def test_pixels_of_unknown_number_cost_nobody_knows_what() -> None:
    assert worst(a_table(Basis.MEGAPIXEL)) is None


@pytest.mark.parametrize("side", [10**6, 10**9, 2**62])
def test_a_picture_larger_than_any_money_can_buy_costs_nobody_knows_what(
    side: int,
) -> None:
    table = a_table(Basis.MEGAPIXEL, "0.1", "4")
    sides = {"width": side, "height": side, "aspect_ratio": "custom"}

    assert worst(table, 16, **sides) is None


def test_no_cost_is_less_than_nothing_or_more_than_the_ledger_can_hold() -> None:
    assert worst(a_table(Basis.IMAGE), -1) is None
    hours = a_table(Basis.SECOND, "9999")
    assert hours.actual(MODEL, DAY, pixels=(), predict_seconds=86_400) is None


# --------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("model_input", "most"),
    [
        ({"size": "1024x1536"}, 1024 * 1536),
        ({"size": "1024x1536", "aspect_ratio": "Not set"}, 1024 * 1536),
        ({"size": "1000x1000"}, 1024 * 1024),  # a grid's next
        ({"size": "custom", "width": 640, "height": 320}, 640 * 320),
        ({"aspect_ratio": "custom", "width": 640, "height": 320}, 640 * 320),
        ({"megapixels": "0.25"}, 1024 * 1024 * 17 // 64),
        ({"megapixels": 1}, 1024 * 1024 * 17 // 16),
        ({"resolution": "0.5 MP", "aspect_ratio": "16:9"}, 1024 * 1024 * 17 // 32),
        ({"size": "2K", "aspect_ratio": "16:9"}, 4 * 1024 * 1024 * 17 // 16),
    ],
)
def test_an_input_that_settles_the_size_is_believed(
    model_input: dict[str, Any], most: int
) -> None:
    for largest in (None, Decimal(99)):
        size = size_of(model_input, largest)
        assert size is not None
        assert size.most == most
        assert 0 < size.least <= size.most


@pytest.mark.parametrize(
    "model_input",
    [
        {},
        {"prompt": "1024x1024"},
        {"aspect_ratio": "16:9"},
        {"aspect_ratio": "custom"},
        {"width": 256},
        {"width": 256, "height": 256},  # heeded only with `custom` by many models
        {"width": True, "height": True},
        {"width": 256, "height": 256, "aspect_ratio": "1:1"},
        {"width": 256, "height": 256, "aspect_ratio": "custom", "resolution": "4 MP"},
        {"size": "256x256", "aspect_ratio": "1:2"},
        {"size": "1K", "aspect_ratio": "match_input_image"},
        {"megapixels": "0.25", "image": "https://host/of/any/size.png"},
        {"megapixels": "0.25", "input_images": ["data:image/png;base64,AA"]},
        {"resolution": "match_input_image"},
    ],
)
def test_an_input_that_leaves_the_size_open_costs_the_largest_picture(
    model_input: dict[str, Any],
) -> None:
    assert size_of(model_input, None) is None
    size = size_of(model_input, Decimal("99"))
    assert size is not None
    assert (size.least, size.most) == (0, 99_000_000)


def test_an_input_may_speak_of_more_than_the_largest_picture() -> None:
    size = size_of({"width": 4096, "height": 4096}, Decimal(1))

    assert size is not None and size.most == 4096 * 4096


# ---------------------------------------------------------------------------- properties

dollars = st.decimals("0.000001", "100", places=6)
sides = st.integers(16, 4096)
outputs = st.integers(1, 10)


@given(dollars, sides, sides, outputs, st.data())
def test_pictures_never_cost_more_than_their_worst_case(
    usd: Decimal, width: int, height: int, asked: int, data: st.DataObject
) -> None:
    basis = data.draw(st.sampled_from([Basis.IMAGE, Basis.MEGAPIXEL]))
    came = data.draw(st.integers(0, asked))
    table = a_table(basis, str(usd), data.draw(st.sampled_from([None, "20"])))
    said = data.draw(
        st.sampled_from(
            [
                {"size": f"{width}x{height}"},
                {"aspect_ratio": "custom", "width": width, "height": height},
                {"width": width, "height": height},
                {},
            ]
        )
    )

    found = worst(table, asked, **said)
    cost = table.actual(MODEL, DAY, pixels=[width * height] * came, predict_seconds=1.0)

    assert cost is not None
    if found is not None:
        assert 0 < found.high
        assert cost <= found.high
        assert found.low <= found.high
        assert came == 0 or found.low <= cost


@given(
    st.decimals("0.000001", "1", places=6),
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=10),
    st.floats(10.0, 86_400.0),
)
def test_hardware_never_costs_more_than_its_worst_case(
    usd: Decimal, shares: list[float], seconds: float
) -> None:
    """However a job's attempts divide the time until the deadline."""
    table = a_table(Basis.SECOND, str(usd))
    whole = max(sum(shares), 1.0)
    spent = [share / whole * seconds for share in shares]

    found = table.estimate(
        GenerationRequest(MODEL, {}),
        1,
        day=DAY,
        deadline=timedelta(seconds=seconds),
        attempts=len(shares),
    )
    costs = [table.actual(MODEL, DAY, pixels=[], predict_seconds=one) for one in spent]

    assert found is not None
    assert sum(cost for cost in costs if cost is not None) <= found.high


@given(st.sampled_from(Basis), dollars, outputs, st.integers(1, 20), sides)
def test_more_never_costs_less(
    basis: Basis, usd: Decimal, asked: int, attempts: int, side: int
) -> None:
    table = a_table(basis, str(usd), "4")
    size = f"{side}x{side}"

    less, more = worst(table, asked, attempts, size=size), worst(
        table, asked + 1, attempts + 1, size=size
    )

    assert less is not None and more is not None
    assert less.low <= more.low and less.high <= more.high
