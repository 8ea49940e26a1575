"""The gallery as it is served: what cards say, searching, older ones, and acting on many."""

from __future__ import annotations

import html
import io
import json
import re
import zipfile
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from app.domain.events import CancelRequested, Refused, Started
from app.domain.generation import RefusalKind
from app.web import gallery
from app.web.gallery_filter import read_search, read_size
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON, keyed
from tests.api.served import FLUX, Api
from tests.api.two_owners import completed_job, drawing, keep
from tests.support.jobs import FAILURE, JobTable, new_job
from tests.web.visitor import Visitor, card, cards, visiting, words

PROMPT = "three kites above a stubble field"


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    return await emptied(shared, shared_sandbox)


@pytest.fixture
async def visitor(api: Api) -> AsyncIterator[Visitor]:
    async with visiting(api) as visitor:
        yield visitor


def jobs_of(api: Api) -> JobTable:
    return JobTable(api.app.state.runtime.database)


async def completed(api: Api, seed: int = 1, **fields: object) -> UUID:
    stored = await keep(api.app.state.runtime, drawing(seed))
    return await completed_job(jobs_of(api), stored, **fields)


async def failed(api: Api, **fields: object) -> UUID:
    jobs = jobs_of(api)
    (job_id,) = await jobs.submit(new_job(**fields))
    await jobs.look(job_id, Refused(RefusalKind.PERMANENT, FAILURE))
    return job_id


# -------------------------------------------------------------------------- what is shown


async def test_an_empty_gallery_says_what_to_do(visitor: Visitor) -> None:
    page = words(await visitor.look("/"))

    assert "No pictures yet. Write a prompt above" in page


async def test_a_picture_has_its_place_before_it_is_there(
    api: Api, visitor: Visitor
) -> None:
    job_id = await completed(api, prompt='a "quoted" <b>fox</b>')
    async with api.app.state.runtime.database.begin() as conn:
        await conn.exec_driver_sql("UPDATE assets SET colour = '#336699'")

    shown = card(await visitor.look("/"), job_id)

    (image,) = re.findall(r"<img [^>]*>", shown)
    for part in ('width="8"', 'height="8"', 'loading="lazy"', 'decoding="async"'):
        assert part in image
    assert 'alt="a &#34;quoted&#34; &lt;b&gt;fox&lt;/b&gt;"' in image
    assert re.search(r'src="/media/[^"]+w=768', image)
    assert re.search(r'srcset="/media/[^"]+w=256 8w"', image)
    assert 'fill="#336699"' in shown
    assert "style=" not in shown
    assert f'href="/jobs/{job_id}"' in shown


async def test_a_live_job_says_in_plain_words_where_it_stands(
    api: Api, visitor: Visitor
) -> None:
    jobs = jobs_of(api)
    waiting, drawn, unwanted = await jobs.submit(new_job(), new_job(), new_job())
    await jobs.look(drawn, Started("handle-1"))
    await jobs.look(unwanted, Started("handle-2"))
    await jobs.tell(unwanted, CancelRequested())

    page = await visitor.look("/")

    said = {
        one: re.findall(r"data-words>([^<]+)<", card(page, one))
        for one in (waiting, drawn, unwanted)
    }
    assert said == {waiting: ["waiting"], drawn: ["drawing"], unwanted: ["cancelling"]}
    assert "/cancel" in card(page, waiting)
    assert "/cancel" not in card(page, unwanted)


async def test_a_waiting_job_says_what_it_waits_for(api: Api, visitor: Visitor) -> None:
    (job_id,) = await jobs_of(api).submit(new_job())
    breaker = api.app.state.runtime.breaker
    await breaker.report_trouble(breaker.turn, "provider_account", is_fatal=True)

    shown = words(card(await visitor.look("/"), job_id))

    assert "No pictures can be bought at the moment" in shown


async def test_a_failed_job_says_why_and_can_be_run_again(
    api: Api, visitor: Visitor
) -> None:
    job_id = await failed(api)

    shown = card(await visitor.look("/"), job_id)

    assert "The weather was bad." in words(shown)
    assert f"/ui/jobs/{job_id}/retry" in shown


# -------------------------------------------------------------------------------- search


async def test_a_search_finds_by_everything_it_offers(
    api: Api, visitor: Visitor
) -> None:
    kites = await completed(api, 1, prompt=PROMPT)
    storm = await failed(api, prompt="a storm")
    (old,) = await jobs_of(api).submit(new_job(prompt="an old kite"))
    await jobs_of(api).age(timedelta(days=3), old)
    today = f"{(await api.job(kites)).created_at:%Y-%m-%d}"

    async def found(**query: str) -> set[str]:
        return set(cards(await visitor.look("/", **query)))

    assert await found(q="kite") == {str(kites), str(old)}
    assert await found(q="KITES above") == {str(kites)}
    assert await found(status="failed") == {str(storm)}
    assert await found(made_with="acme/painter", q="storm") == {str(storm)}
    assert await found(made_with=FLUX) == set()
    assert await found(size="8x8") == await found(size="8 × 8") == {str(kites)}
    assert await found(after=today, q="kite") == {str(kites)}
    assert await found(before=today, after=today) == {str(kites), str(storm)}
    assert len(await found(q="", status="", size="")) == 3


async def test_a_search_that_finds_nothing_leads_back(visitor: Visitor) -> None:
    page = await visitor.look("/", q="zeppelins")

    assert "Nothing found." in words(page)
    assert re.search(r'<a [^>]*href="/">Clear the search</a>', page)
    assert 'value="zeppelins"' in page


async def test_what_makes_no_sense_is_said_beside_its_field(visitor: Visitor) -> None:
    page = await visitor.look("/", size="big", after="yesterday", status="odd")

    assert words(page).count("Width and height, such as 1024x768.") == 1
    assert words(page).count("A day, such as 2026-11-25.") == 1
    assert page.count('aria-invalid="true"') == 2


async def test_a_search_for_htmx_is_a_piece_with_an_address(
    api: Api, visitor: Visitor
) -> None:
    job_id = await completed(api, prompt=PROMPT)

    answer = await visitor.get("/ui/gallery", htmx=True, q="kites", status="")

    assert answer.headers["hx-replace-url"] == "/?q=kites"
    assert cards(answer.text) == [str(job_id)]
    assert "<html" not in answer.text


@pytest.mark.parametrize(
    ("text", "size"),
    [("640x480", (640, 480)), (" 640 × 480 ", (640, 480)), ("640", None), ("x", None)],
)
def test_sizes_are_read_as_people_write_them(
    text: str, size: tuple[int, int] | None
) -> None:
    assert read_size(text) == size


def test_a_search_is_written_back_as_it_was_read() -> None:
    search = read_search({"q": "a & b", "status": "", "before": "2026-11-25"})

    assert search.address() == "/?q=a+%26+b&before=2026-11-25"
    assert search.address("/ui/cards", cursor="x").endswith("&cursor=x")
    assert read_search({"q": "nul\x00"}).given == {"q": "nul\ufffd"}
    assert read_search({"after": "9999-12-31"}).wrong.keys() == {"after"}


# --------------------------------------------------------------------------- older ones


async def test_older_pictures_follow_without_scripts_each_once(
    api: Api, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "PAGE", 3)
    made = await jobs_of(api).submit(*(new_job(prompt=PROMPT) for _ in range(8)))
    await jobs_of(api).submit(new_job(prompt="something else"))
    seen: list[str] = []
    path: str | None = "/?q=kites"
    while path is not None:
        page = await visitor.look(path)
        seen += cards(page)
        older = re.search(r'id="older" href="([^"]+)" hx-get="([^"]+)"', page)
        path = html.unescape(older[1]) if older else None
        if older:
            piece = await visitor.look(html.unescape(older[2]), htmx=True)
            assert cards(piece)
            assert "<html" not in piece

    assert seen == [str(one) for one in reversed(made)]


async def test_cards_can_be_asked_for_by_name(api: Api, visitor: Visitor) -> None:
    one, other = await completed(api, 1), await failed(api)
    ids = f"{other},{uuid4()},{one}"

    assert cards(await visitor.look("/ui/cards", htmx=True, ids=ids)) == [
        str(other),
        str(one),
    ]
    assert (await visitor.get("/ui/cards", ids="nonsense")).status_code == 400


# ------------------------------------------------------------------------- acting on many


async def test_without_scripts_the_chosen_are_acted_upon_and_one_is_led_back(
    api: Api, visitor: Visitor
) -> None:
    done, broken = await completed(api), await failed(api)
    (waiting,) = await jobs_of(api).submit(new_job())
    await visitor.look("/")
    chosen = [str(done), str(broken), str(waiting)]

    async def act(verb: str, back: str) -> str:
        fields = {"job": chosen, "verb": verb, "back": back}
        answer = await visitor.send("/ui/selection", **fields)
        assert answer.status_code == 303, answer.text
        return answer.headers["location"]

    assert await act("cancel", "/?q=kites") == "/?q=kites"
    assert (await api.job(waiting)).status == "cancelled"
    assert await act("retry", "//elsewhere.example") == "/"
    again = {job.retry_of for job in [await api.job(i) for i in await api.listed()]}
    assert again == {None, done, broken, waiting}
    assert await act("delete", "/") == "/"
    assert not {done, broken, waiting} & set(await api.listed())


async def test_with_htmx_a_note_tells_what_was_done_and_to_which(
    api: Api, visitor: Visitor
) -> None:
    done = await completed(api)
    (waiting,) = await jobs_of(api).submit(new_job())
    await visitor.look("/")

    answer = await visitor.send(
        "/ui/selection", htmx=True, job=[str(done), str(waiting)], verb="delete"
    )

    news = json.loads(answer.headers["hx-trigger"])["mgs:jobs"]
    assert news == {"changed": [], "added": [], "gone": [str(done)]}
    assert "Deleted 1 job. 1 job could not be: The job is pending" in words(answer.text)


async def test_the_chosen_come_as_a_zip(api: Api, visitor: Visitor) -> None:
    one, other = await completed(api, 1), await completed(api, 2)
    await visitor.look("/")

    answer = await visitor.send("/ui/download", job=[str(one), str(other)])

    bundle = zipfile.ZipFile(io.BytesIO(answer.content))
    assert answer.headers["content-type"] == "application/zip"
    pictures = [bundle.read(name) for name in bundle.namelist()[:-1]]
    assert pictures == [drawing(1), drawing(2)]


@pytest.mark.parametrize(
    "fields",
    [{"verb": "delete"}, {"verb": "paint", "job": str(uuid4())}, {"job": "nonsense"}],
)
async def test_nonsense_is_refused(visitor: Visitor, fields: dict[str, str]) -> None:
    await visitor.look("/")

    answer = await visitor.send("/ui/selection", **fields)

    assert answer.status_code in (400, 422)


async def test_a_form_of_another_page_does_nothing(api: Api, visitor: Visitor) -> None:
    done = await completed(api)

    answer = await visitor.send("/ui/selection", job=str(done), verb="delete")

    assert answer.status_code == 403
    assert await api.listed() == [done]


# -------------------------------------------------------------------------- two owners


async def test_one_sees_and_touches_ones_own_alone(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(
        sandbox, public_base_url="https://pictures.example", **KEYS_ON
    )
    async with keyed(api) as people, visiting(api) as bob, visiting(api) as admin:
        theirs = await completed(api, 1, owner="alice", is_public=False, prompt=PROMPT)
        own = await completed(api, 2, owner="bob", is_public=False)
        await bob.sign_in(people.keys["bob"].key)
        await admin.sign_in(KEYS_ON["admin_api_key"])

        page = await bob.look("/")
        assert cards(page) == [str(own)]
        # Signed, and a path: another name of this host is another host to a browser.
        assert re.search(r'src="/media/[^"?]+\?expires=\d+&amp;signature=', page)
        assert cards(await bob.look("/ui/cards", ids=f"{theirs},{own}")) == [str(own)]
        assert (await bob.get("/", owner="alice")).status_code == 403
        for piece in ("", "/panel", "/manifest"):
            path = f"/ui/jobs/{theirs}{piece}" if piece else f"/jobs/{theirs}"
            assert (await bob.get(path)).status_code == 404
        for verb in ("cancel", "retry", "vary", "delete", "download"):
            assert (await bob.send(f"/ui/jobs/{theirs}/{verb}")).status_code == 404
        answer = await bob.send(
            "/ui/selection", htmx=True, job=str(theirs), verb="delete"
        )
        assert "There is no such job." in words(answer.text)
        refused = await bob.send("/ui/download", job=str(theirs))
        assert refused.status_code == 404

        assert cards(await admin.look("/")) == [str(own), str(theirs)]
        assert cards(await admin.look("/", owner="alice")) == [str(theirs)]
        assert 'name="owner"' not in page


async def test_whoever_may_only_read_gets_no_buttons(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox, **KEYS_ON)
    async with keyed(api) as people, visiting(api) as reader:
        job_id = await failed(api, owner="alice")
        key = await people.key("alice", scopes=["read"])
        await reader.sign_in(key.key)

        page = await reader.look("/")
        refused = await reader.send(f"/ui/jobs/{job_id}/retry")

    assert "/retry" not in page and "confirm-delete" not in page
    assert refused.status_code == 403
