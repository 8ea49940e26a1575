"""Price files: what they say, and what is said of them when they make no sense."""

import tomllib
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from app.domain.pricing import Basis, Price
from app.services.catalogue import load_bundled_models
from app.services.prices import UnusablePrices, load_prices
from tests.support.servers import ROOT

SCHNELL = "black-forest-labs/flux-schnell"
DAY = date(2026, 10, 1)
HEAD = 'version = "mine"\n'
ENTRY = '[[price]]\nmodel = "me/model"\nsince = 2026-01-01\n'


@pytest.fixture
def price_file(tmp_path: Path) -> Path:
    return tmp_path / "prices.toml"


# ---------------------------------------------------------------------- what comes with us


def test_the_built_in_prices_are_of_models_we_know() -> None:
    table = load_prices()
    path = ROOT / "app" / "services" / "prices.toml"
    names = [entry["model"] for entry in tomllib.loads(path.read_text())["price"]]

    assert names and set(names) <= set(load_bundled_models())
    for name in names:
        price = table.price_of(name, DAY)
        assert price is not None and price.usd > 0
    found = table.price_of(SCHNELL, DAY)
    assert found is not None
    assert (found.basis, found.usd) == (Basis.IMAGE, Decimal("0.003"))


def test_every_built_in_figure_has_its_source_above_it() -> None:
    lines = (ROOT / "app" / "services" / "prices.toml").read_text().splitlines()
    heads = [
        number
        for number, line in enumerate(lines)
        if line in ("[[price]]", "[hardware]")
    ]

    assert len(heads) > 3
    assert all(lines[number - 1].startswith("# ") for number in heads)


def test_it_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert "*.toml" in project["tool"]["setuptools"]["package-data"]["*"]


# --------------------------------------------------------------------------- the operator's


def test_the_example_in_the_documentation_is_a_price_file(price_file: Path) -> None:
    text = (ROOT / "docs" / "money.md").read_text()
    price_file.write_text(text.partition("```toml\n")[2].partition("```")[0])

    table = load_prices(price_file)

    def usd(model: str, day: date) -> tuple[Basis, Decimal] | None:
        price = table.price_of(model, day)
        return price and (price.basis, price.usd)

    assert usd(SCHNELL, date(2026, 10, 31)) == (Basis.IMAGE, Decimal("0.003"))
    assert usd(SCHNELL, date(2026, 11, 1)) == (Basis.IMAGE, Decimal("0.0025"))
    assert usd("black-forest-labs/flux-2-pro", DAY) == (
        Basis.MEGAPIXEL,
        Decimal("0.015"),
    )
    assert usd("somebody/fine-tune", DAY) == (Basis.SECOND, Decimal("0.000975"))
    assert usd("somebody/private", DAY) == (Basis.SECOND, Decimal("0.0009"))


def test_a_model_the_file_names_is_priced_by_the_file_alone(price_file: Path) -> None:
    price_file.write_text(
        HEAD + ENTRY.replace("me/model", SCHNELL) + "per_image_usd = 1\n"
        f'[[price]]\nmodel = "{SCHNELL}:abc"\nsince = 2026-09-01\nper_second_usd = 2\n'
    )

    table = load_prices(price_file)

    assert table.version == f"{load_prices().version}+mine"
    since = date(2026, 1, 1)
    expected = Price(SCHNELL, since, Basis.IMAGE, Decimal(1))
    assert table.price_of(SCHNELL, since) == expected
    assert table.price_of(SCHNELL, DAY) == expected
    by_version = table.price_of(f"{SCHNELL}:abc", DAY)
    assert by_version is not None and by_version.basis is Basis.SECOND
    assert table.price_of("black-forest-labs/flux-dev", DAY) == load_prices().price_of(
        "black-forest-labs/flux-dev", DAY
    )
    assert table.price_of(SCHNELL, date(2025, 12, 31)) is None


def test_hardware_of_the_file_wins(price_file: Path) -> None:
    entry = ENTRY + 'hardware = "gpu-t4"\n'
    other = ENTRY.replace("model =", "model = ").replace("me/model", "me/other")
    price_file.write_text(
        HEAD + entry + other + 'hardware = "mine"\n[hardware]\nmine = 0.5\n'
    )

    table = load_prices(price_file)

    def usd(model: str) -> Decimal | None:
        price = table.price_of(model, DAY)
        return price and price.usd

    assert (usd("me/model"), usd("me/other")) == (Decimal("0.000225"), Decimal("0.5"))


def test_free_is_a_price(price_file: Path) -> None:
    price_file.write_text(HEAD + ENTRY + "per_image_usd = 0\n")

    cost = load_prices(price_file).actual(
        "me/model", DAY, pixels=[1], predict_seconds=None
    )

    assert cost == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version", "is no TOML"),
        (ENTRY + "per_image_usd = 1\n", "version is missing"),
        (HEAD + "prices = 1\n", "prices is not known here"),
        (HEAD + "price = 1\n", "price:"),
        (HEAD + "[hardware]\ncpu = -1\n", "hardware.cpu:"),
        (HEAD + "[[price]]\nper_image_usd = 1\n", "entry 1 (no model): model is"),
        (HEAD + ENTRY, "entry 1 (me/model): it takes exactly one of"),
        (
            HEAD + ENTRY + "per_image_usd = 1\nper_second_usd = 1\n",
            "entry 1 (me/model): it takes exactly one of",
        ),
        (
            HEAD + ENTRY + "per_image = 1\n",
            "entry 1 (me/model): per_image is not known",
        ),
        (HEAD + ENTRY + "per_image_usd = -1\n", "entry 1 (me/model): per_image_usd:"),
        (HEAD + ENTRY + "per_image_usd = nan\n", "entry 1 (me/model): per_image_usd:"),
        (HEAD + ENTRY + "per_image_usd = inf\n", "entry 1 (me/model): per_image_usd:"),
        (HEAD + ENTRY + "per_image_usd = true\n", "entry 1 (me/model): per_image_usd:"),
        (HEAD + ENTRY + "per_image_usd = '1'\n", "entry 1 (me/model): per_image_usd:"),
        (HEAD + ENTRY + "per_image_usd = 1e9\n", "entry 1 (me/model): per_image_usd:"),
        (
            HEAD + ENTRY.replace("2026-01-01", "2026-01-01T00:00:00Z"),
            "entry 1 (me/model): since:",
        ),
        (
            HEAD + ENTRY.replace("me/model", "model") + "per_image_usd = 1\n",
            "entry 1 (model): model:",
        ),
        (
            HEAD + ENTRY + "per_image_usd = 1\nmax_megapixels = 4\n",
            "max_megapixels belongs to per_megapixel_usd",
        ),
        (
            HEAD + ENTRY + "per_megapixel_usd = 1\nmax_megapixels = 0\n",
            "entry 1 (me/model): max_megapixels:",
        ),
        (
            HEAD + ENTRY + 'hardware = "gpu-x"\n',
            "entry 1 (me/model): hardware 'gpu-x' has no price",
        ),
        (
            HEAD + 2 * (ENTRY + "per_image_usd = 1\n"),
            "entry 2 (me/model): another entry has the same",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line_naming_the_entry(
    price_file: Path, text: str, words: str
) -> None:
    price_file.write_text(text)

    with pytest.raises(UnusablePrices) as caught:
        load_prices(price_file)

    message = str(caught.value)
    assert words in message
    assert message.startswith(str(price_file))
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_named(price_file: Path) -> None:
    with pytest.raises(UnusablePrices, match="cannot be read: No such file"):
        load_prices(price_file)
    price_file.write_bytes(b"\xff")
    with pytest.raises(UnusablePrices, match="no UTF-8"):
        load_prices(price_file)
