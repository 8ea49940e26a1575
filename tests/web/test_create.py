"""Making pictures with the form of the first page, without scripts and as htmx does."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.services.catalogue import load_bundled_models
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import People
from tests.api.served import FLUX, Api
from tests.api.test_estimates import PRICES
from tests.support.drawings import draw
from tests.web.browsing import Browsing, Elements, browsing, fields, problems

DEV = "black-forest-labs/flux-dev"
EDIT = "black-forest-labs/flux-2-pro"


@pytest.fixture
async def browser(shared: Api, shared_sandbox: Sandbox) -> AsyncIterator[Browsing]:
    await emptied(shared, shared_sandbox)
    async with browsing(shared) as browser:
        yield browser


async def jobs(api: Api) -> list[dict[str, Any]]:
    """List all jobs, oldest first."""
    found = (await api.client.get("/api/v1/jobs", params={"limit": 100})).json()
    return list(reversed(found["items"]))


async def typed(browser: Browsing, model: str = FLUX, **changes: str) -> dict[str, str]:
    """Open the page and fill the form in."""
    page = await browser.get(f"/?model={model}")
    return fields(page.text) | {"model": model} | changes


# ------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("model", load_bundled_models())
async def test_every_model_has_its_form(browser: Browsing, model: str) -> None:
    page = await browser.get(f"/?model={model}")

    assert page.status_code == 200
    names = {name for _, one, _ in Elements(page.text).all if (name := one.get("name"))}
    described = await browser.api.app.state.runtime.catalogue.describe(model)
    own = set(described.properties) - {"prompt", "openai_api_key"}
    assert {name[2:] for name in names if name.startswith(("p.", "f."))} == own
    chosen = re.search(r'<option value="([^"]+)" selected>', page.text)
    assert chosen and chosen[1] == model


async def test_what_a_label_or_a_problem_belongs_to_is_said(browser: Browsing) -> None:
    page = await browser.post(
        "/ui/jobs", await typed(browser, DEV, prompt=" ", **{"p.guidance": "much"})
    )

    elements = Elements(page.text).all
    ids = [one["id"] for _, one, _ in elements if "id" in one]
    assert len(ids) == len(set(ids))
    for _, one, _ in elements:
        for name in ("for", "aria-labelledby"):
            assert one.get(name, ids[0]) in ids
        for target in one.get("aria-describedby", "").split():
            assert target in ids
    wrong = {one["name"]: one for _, one, _ in elements if "aria-invalid" in one}
    assert set(wrong) == {"prompt", "p.guidance"}
    assert "problem-p-guidance" in wrong["p.guidance"]["aria-describedby"]


async def test_what_a_stranger_wrote_is_text(browser: Browsing) -> None:
    evil = '"><script>alert(1)</script>'
    await browser.get("/")

    for answer in (
        await browser.get(f"/?prompt={evil}&model={evil}"),
        await browser.post("/ui/form", {"prompt": evil, "model": evil, "once": evil}),
        await browser.htmx("/ui/form", {"other_model": evil, "copies": evil}),
    ):
        assert answer.status_code == 200
        assert "<script>alert" not in answer.text
        assert html.escape(evil, quote=False)[2:20] in answer.text


async def test_a_model_nobody_knows_is_told_beside_its_field(browser: Browsing) -> None:
    await browser.get("/")
    page = await browser.post("/ui/form", {"model": FLUX, "other_model": "no/such"})

    assert page.status_code == 200
    assert "model" in problems(page.text)
    made = await browser.post(
        "/ui/jobs", fields(page.text) | {"model": FLUX, "prompt": "a picture of mine"}
    )
    assert made.status_code == 422
    assert await jobs(browser.api) == []


async def test_another_model_keeps_what_was_typed(browser: Browsing) -> None:
    sent = await typed(browser, FLUX, prompt="a quiet\nharbour", copies="3")
    sent["p.seed"] = "42"

    piece = await browser.htmx("/ui/form", sent | {"model": DEV})

    assert "<html" not in piece.text
    kept = fields(piece.text)
    assert kept["prompt"].strip() == "a quiet\nharbour"
    assert (kept["copies"], kept["p.seed"]) == ("3", "42")
    assert "p.guidance" in kept and "p.guidance" not in sent


# ------------------------------------------------------------------------------ making


async def test_without_scripts_a_form_makes_a_job(browser: Browsing) -> None:
    sent = await typed(browser, prompt="a quiet harbour at night")
    sent |= {"p.aspect_ratio": "16:9", "p.num_outputs": "2", "p.output_quality": "55"}
    sent |= {"p.go_fast": "false", "p.seed": "7"}

    answer = await browser.post("/ui/jobs", sent)

    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    (job,) = await jobs(browser.api)
    assert job["prompt"] == "a quiet harbour at night"
    assert job["parameters"] == {
        "prompt": "a quiet harbour at night",
        "aspect_ratio": "16:9",
        "num_outputs": 2,
        "output_quality": 55,
        "go_fast": False,
        "seed": 7,
    }
    assert "a quiet harbour at night" in (await browser.get("/")).text


async def test_htmx_gets_the_new_card_and_the_form_anew(browser: Browsing) -> None:
    sent = await typed(browser, prompt="a quiet harbour at night")

    answer = await browser.htmx("/ui/jobs", sent)

    (job,) = await jobs(browser.api)
    assert answer.status_code == 200 and "<html" not in answer.text
    assert f'id="job-{job["job_id"]}"' in answer.text
    assert 'hx-swap-oob="afterbegin:#jobs"' in answer.text
    again = fields(answer.text)
    assert again["prompt"].strip() == "a quiet harbour at night"
    assert again["once"] != sent["once"]


async def test_a_form_that_is_sent_twice_makes_its_job_once(browser: Browsing) -> None:
    sent = await typed(browser, prompt="a quiet harbour at night", copies="2")

    answers = await asyncio.gather(
        *(browser.post("/ui/jobs", sent) for _ in range(3)), return_exceptions=True
    )
    later = await browser.htmx("/ui/jobs", sent)

    assert len(await jobs(browser.api)) == 2
    assert all(getattr(one, "status_code", 0) in (303, 409) for one in answers)
    assert later.text.count('class="job card"') == 2
    await browser.post("/ui/jobs", sent | {"prompt": "another harbour altogether"})
    assert len(await jobs(browser.api)) == 4


async def test_several_at_once(browser: Browsing) -> None:
    sent = await typed(browser, copies="2", by_line="true")
    sent |= {"prompt": "a red fox in the snow\r\n\r\n a white hare \n", "p.seed": "10"}

    await browser.post("/ui/jobs", sent)

    made = [
        (job["prompt"], job["parameters"]["seed"]) for job in await jobs(browser.api)
    ]
    assert made == [
        ("a red fox in the snow", 10),
        ("a white hare", 11),
        ("a red fox in the snow", 12),
        ("a white hare", 13),
    ]


async def test_sizes_and_counts_are_said_as_the_model_wants_them(
    browser: Browsing,
) -> None:
    sent = await typed(browser, "bytedance/seedream-4", prompt="a wide valley at noon")

    await browser.post(
        "/ui/jobs", sent | {"p.width": "1536", "p.height": "1024", "p.max_images": "3"}
    )

    (job,) = await jobs(browser.api)
    assert job["parameters"]["size"] == "custom"
    assert (job["parameters"]["width"], job["parameters"]["height"]) == (1536, 1024)
    assert job["parameters"]["sequential_image_generation"] == "auto"


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"prompt": "  "}, "prompt", "Say what the picture should show."),
        ({"prompt": "x" * 10_001}, "prompt", "at most 10000"),
        ({"copies": "0"}, "copies", "A whole number from 1 to 10."),
        ({"copies": "²"}, "copies", "A whole number from 1 to 10."),
        ({"p.num_outputs": "many"}, "p-num_outputs", "Must be a whole number|a number"),
        ({"p.num_outputs": "5"}, "p-num_outputs", "between 1 and 4"),
        ({"p.num_outputs": "99"}, "p-num_outputs", "less than or equal to 16"),
        ({"p.num_inference_steps": "9"}, "p-num_inference_steps", "between 1 and 4"),
        ({"p.aspect_ratio": "7:1"}, "p-aspect_ratio", "must be one of"),
        ({"p.seed": "1.5"}, "p-seed", "Must be a whole number"),
        ({"prompt": "a\x00b"}, "prompt", "U.0000"),
    ],
)
async def test_a_mistake_is_told_beside_its_field_and_nothing_is_lost(
    browser: Browsing, changes: dict[str, str], field: str, words: str
) -> None:
    good = {"prompt": "a prompt worth keeping", "p.output_quality": "55"}
    sent = await typed(browser, **good) | changes

    page = await browser.post("/ui/jobs", sent)
    piece = await browser.htmx("/ui/jobs", sent)

    assert (page.status_code, piece.status_code) == (422, 200)
    for answer in (page, piece):
        found = problems(answer.text)
        assert set(found) == {field}
        assert re.search(words, html.unescape(found[field]), re.IGNORECASE), found
        kept = fields(answer.text)
        assert kept["p.output_quality"] == "55"
        for name, value in changes.items():
            if name != "p.aspect_ratio":  # no radio button has what was forged
                assert kept[name].strip() == value.strip().replace(
                    "\x00", kept[name][1:2]
                )
    assert await jobs(browser.api) == []


async def test_all_mistakes_are_told_at_once(browser: Browsing) -> None:
    sent = await typed(browser, DEV, prompt="", copies="11")

    page = await browser.post("/ui/jobs", sent | {"p.guidance": "x", "p.seed": "y"})

    assert set(problems(page.text)) == {"prompt", "copies", "p-guidance", "p-seed"}


async def test_too_many_jobs_are_refused_before_any_is_made(browser: Browsing) -> None:
    lines = "\n".join(f"a picture of number {number}" for number in range(6))
    sent = await typed(browser, prompt=lines, by_line="true", copies="9")

    page = await browser.post("/ui/jobs", sent)

    assert problems(page.text)["copies"] == "That would be 54 jobs: 50 at most."
    assert await jobs(browser.api) == []


# ---------------------------------------------------------------------------- pictures


async def test_without_scripts_a_picture_comes_with_the_form(browser: Browsing) -> None:
    sent = await typed(browser, DEV, prompt=" ")
    picture = {"f.image": ("a.png", draw(4), "image/png")}

    page = await browser.post("/ui/jobs", sent, files=picture)
    kept = fields(page.text)
    await browser.post(
        "/ui/jobs", kept | {"model": DEV, "prompt": "the same harbour at night"}
    )

    assert kept["p.image"].startswith("upload:")
    (job,) = await jobs(browser.api)
    assert job["parameters"]["image"].startswith("http")


async def test_a_picture_that_is_sent_ahead_is_shown(browser: Browsing) -> None:
    await browser.get("/")

    answer = await browser.htmx(
        "/ui/pictures",
        {"input": "input_images"},
        files=[("f.input_images", (f"{n}.png", draw(n), "image/png")) for n in (1, 2)],
    )

    assert answer.text.count('name="p.input_images" value="upload:') == 2
    first, _ = re.findall(r'<img src="([^"]+)"', answer.text)
    shown = await browser.client.get(html.unescape(first))
    assert shown.status_code == 200 and shown.headers["content-type"] == "image/png"


@pytest.mark.parametrize("by_htmx", [True, False])
async def test_a_file_that_is_no_picture_is_told_beside_its_field(
    browser: Browsing, by_htmx: bool
) -> None:
    sent = await typed(browser, DEV, prompt="the same harbour at night")
    file = {"f.image": ("a.png", b"no picture at all", "image/png")}

    if by_htmx:
        answer = await browser.htmx("/ui/pictures", {"input": "image"}, files=file)
    else:
        answer = await browser.post("/ui/jobs", sent, files=file)

    assert "not a picture we accept" in problems(answer.text)["p-image"]
    assert await jobs(browser.api) == []


async def test_nobody_uses_a_picture_of_somebody_else(people: People) -> None:
    async with browsing(people.api) as alice, browsing(people.api) as bob:
        await alice.sign_in(people.keys["alice"].key)
        await bob.sign_in(people.keys["bob"].key)
        sent = {"model": DEV, "prompt": "the same harbour at night"}
        hers = await alice.htmx(
            "/ui/pictures",
            {"input": "image"},
            files={"f.image": ("a.png", draw(5), "image/png")},
        )
        uri = fields(hers.text)["p.image"]

        his = await bob.htmx("/ui/form", sent | {"p.image": uri})
        own = await alice.htmx("/ui/form", sent | {"p.image": uri})

        assert uri not in his.text and "/media/" not in his.text
        assert uri in own.text


# --------------------------------------------------------------------------- estimates


@pytest.fixture
async def priced(
    serve: Serve, sandbox: Sandbox, tmp_path: Path
) -> AsyncIterator[Browsing]:
    """A browser at a service with prices, and $0.0105 a day."""
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES)
    api: Api = await serve(sandbox, price_file=prices, budget_day_usd="0.0105")
    async with browsing(api) as browser:
        yield browser


async def test_the_price_is_told_before_and_refused_as_the_jobs_would_be(
    priced: Browsing,
) -> None:
    sent = await typed(priced, prompt="")
    one = await priced.htmx("/ui/estimate", sent)
    three = await priced.htmx("/ui/estimate", sent | {"p.num_outputs": "3"})
    twice = await priced.htmx("/ui/estimate", sent | {"copies": "2"})
    over = await priced.htmx("/ui/estimate", sent | {"copies": "4"})
    wrong = await priced.htmx("/ui/estimate", sent | {"p.seed": "x"})

    assert ">$0.003<" in one.text
    assert ">$0.003 to $0.009<" in three.text
    assert ">$0.006<" in twice.text and "for 2 jobs" in twice.text
    for refused in (over, wrong):
        assert refused.status_code == 200 and "estimate-no" in refused.text
    assert "budget per day has" in html.unescape(over.text)
    assert await jobs(priced.api) == []

    page = await priced.post("/ui/jobs", sent | {"copies": "4", "prompt": "a harbour"})
    assert page.status_code == 402
    assert "budget per day has" in html.unescape(page.text)
    assert fields(page.text)["copies"] == "4"
    assert await jobs(priced.api) == []


async def test_an_unknown_price_is_not_told_as_nothing(browser: Browsing) -> None:
    answer = await browser.htmx("/ui/estimate", await typed(browser, prompt=""))

    assert "Price unknown" in answer.text and "$" not in answer.text


# --------------------------------------------------------------------------- visibility


@pytest.mark.parametrize(("public", "word"), [("true", "public"), ("", "private")])
async def test_who_may_see_the_pictures(people: People, public: str, word: str) -> None:
    async with browsing(people.api) as alice:
        await alice.sign_in(people.keys["alice"].key)
        sent = {"model": FLUX, "prompt": f"a {word} harbour", "public": public}

        assert (await alice.post("/ui/jobs", sent)).status_code == 303

    found = await people.alice.get("/api/v1/jobs", params={"limit": 1})
    (job,) = found.json()["items"]
    assert (job["visibility"], job["owner"]) == (word, "alice")


async def test_what_a_key_may_not_is_told(people: People) -> None:
    made = await people.key("grace", limits={"models": [DEV], "concurrent_jobs": 2})
    async with browsing(people.api) as browser:
        await browser.sign_in(made.key)
        sent = {"prompt": "a harbour of grace", "model": FLUX}

        other = await browser.post("/ui/jobs", sent)
        many = await browser.post("/ui/jobs", sent | {"model": DEV, "copies": "3"})

    assert other.status_code == 403
    assert "This key may not use" in problems(other.text)["model"]
    assert many.status_code == 429
    assert "2 may be" in many.text
    listed = await people.admin.get("/api/v1/jobs", params={"owner": "grace"})
    assert listed.json()["items"] == []
