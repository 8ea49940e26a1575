"""The page of a job as it is served, and the words and figures on it."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, get_args
from uuid import UUID, uuid4

import pytest

from sqlalchemy import CheckConstraint

from app.domain.events import Event, Progressed, Refused, Started
from app.domain.generation import Failure, GenerationRequest, RefusalKind
from app.services.job_records import ATTEMPTS
from app.web.job import phases_of
from app.web.words import attempt_words, timeline, words_of
from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.served import Api
from tests.api.two_owners import add_upload, completed_job, drawing, keep
from tests.support.jobs import JobTable, new_job
from tests.web.visitor import Visitor, visiting, words

PROMPT = 'it\'s a "quiet" harbour; $HOME & `ls` \\ end'


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    return await emptied(shared, shared_sandbox)


@pytest.fixture
async def visitor(api: Api) -> AsyncIterator[Visitor]:
    async with visiting(api) as visitor:
        yield visitor


def jobs_of(api: Api) -> JobTable:
    return JobTable(api.app.state.runtime.database)


# -------------------------------------------------------------------------- what is shown


async def test_a_finished_job_tells_all_there_is(api: Api, visitor: Visitor) -> None:
    stored = await keep(api.app.state.runtime, drawing(1))
    job_id = await completed_job(
        jobs_of(api),
        stored,
        prompt=PROMPT,
        request=GenerationRequest(
            "acme/painter", {"prompt": PROMPT, "seed": 4711, "go_fast": True}
        ),
        metadata={"campaign": "winter"},
        warnings=("negative_prompt was ignored",),
    )

    page = await visitor.look(f"/jobs/{job_id}")

    said = words(page)
    for part in (PROMPT, "acme/painter", "4711", "go_fast true", "campaign winter"):
        assert part in said
    for part in ("negative_prompt was ignored", "unknown", str(job_id)):
        assert part in said
    for step in ("Accepted", "Sending it", "The provider is drawing", "Saved"):
        assert step in said
    assert "1 succeeded" in said and f"prediction-{job_id.hex[-8:]}" in said
    assert f'href="/media/{stored.key}" download' in page
    assert re.search(r"<rect class=\"times-generating\"[^>]*width=", page)
    assert "style=" not in page


async def test_a_failed_job_says_why_and_what_helps(api: Api, visitor: Visitor) -> None:
    jobs = jobs_of(api)
    (job_id,) = await jobs.submit(new_job())
    failure = Failure("content_policy", "The prompt was refused.", retryable=False)
    await jobs.look(job_id, Refused(RefusalKind.PERMANENT, failure))

    said = words(await visitor.look(f"/jobs/{job_id}"))

    assert "The prompt was refused." in said
    assert "change something first" in said and "content_policy" in said


async def test_a_live_job_can_be_cancelled_without_scripts(
    api: Api, visitor: Visitor
) -> None:
    (job_id,) = await jobs_of(api).submit(new_job())
    page = await visitor.look(f"/jobs/{job_id}")

    answer = await visitor.send(f"/ui/jobs/{job_id}/cancel", back=f"/jobs/{job_id}")

    assert 'http-equiv="refresh"' not in page and "<noscript>" in page
    assert answer.headers["location"] == f"/jobs/{job_id}"
    assert "Nothing was made." in words(await visitor.look(f"/jobs/{job_id}"))


async def test_the_manifest_comes_as_a_file(api: Api, visitor: Visitor) -> None:
    stored = await keep(api.app.state.runtime, drawing(1))
    job_id = await completed_job(jobs_of(api), stored)
    page = await visitor.look(f"/jobs/{job_id}")

    answer = await visitor.get(f"/ui/jobs/{job_id}/manifest")
    told = await api.client.get(f"/api/v1/jobs/{job_id}/manifest")

    assert f'href="/ui/jobs/{job_id}/manifest"' in page
    assert answer.json() == told.json()
    assert answer.headers["content-disposition"].startswith("attachment;")


async def test_an_unknown_job_is_a_page_that_says_so(visitor: Visitor) -> None:
    for path in (f"/jobs/{uuid4()}", f"/ui/jobs/{uuid4()}/panel"):
        answer = await visitor.get(path)
        assert answer.status_code == 404
        assert "There is no such job." in words(answer.text)
    assert (await visitor.get("/jobs/nonsense")).status_code == 400


# ----------------------------------------------------------------------- making it again


async def test_again_is_the_same_and_another_seed_is_not(
    api: Api, visitor: Visitor
) -> None:
    old = await api.generate(PROMPT, seed=7, aspect_ratio="16:9")
    await api.client.post(f"/api/v1/jobs/{old.job_id}/cancel")
    await visitor.look(f"/jobs/{old.job_id}")

    again = await visitor.send(f"/ui/jobs/{old.job_id}/retry")
    varied = await visitor.send(f"/ui/jobs/{old.job_id}/vary")

    same, other = [
        await api.job(UUID(answer.headers["location"].removeprefix("/jobs/")))
        for answer in (again, varied)
    ]
    assert (same.parameters, same.retry_of) == (old.parameters, old.job_id)
    assert other.parameters | {"seed": 7} == old.parameters
    assert other.parameters["seed"] != 7
    assert (other.prompt, other.retry_of) == (PROMPT, None)


async def test_a_model_without_a_seed_gives_no_other_one(
    api: Api, visitor: Visitor
) -> None:
    asked = GenerationRequest("acme/painter", {"prompt": PROMPT})
    (job_id,) = await jobs_of(api).submit(new_job(request=asked))
    page = await visitor.look(f"/jobs/{job_id}")

    answer = await visitor.send(f"/ui/jobs/{job_id}/vary")

    assert "/vary" not in page
    assert answer.status_code == 409


async def test_deleting_leads_to_the_gallery(api: Api, visitor: Visitor) -> None:
    stored = await keep(api.app.state.runtime, drawing(1))
    job_id = await completed_job(jobs_of(api), stored)
    await visitor.look(f"/jobs/{job_id}")

    answer = await visitor.send(f"/ui/jobs/{job_id}/delete")

    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert await api.listed() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"num_outputs": 2, "aspect_ratio": "16:9", "output_format": "png"},
        {"model": "black-forest-labs/flux-dev", "parameters": {"guidance": 3.5}},
    ],
)
async def test_the_command_asks_for_the_very_same(
    api: Api, visitor: Visitor, fields: Mapping[str, Any]
) -> None:
    job = await api.generate(PROMPT, **fields)

    page = await visitor.look(f"/jobs/{job.job_id}")

    (shown,) = re.findall(r'<code id="curl">(.*?)</code>', page, re.DOTALL)
    command = shlex.split(html.unescape(shown).replace("\\\n", ""))
    assert command[:2] == ["curl", f"{api.origin}/api/v1/generate"]
    body = json.loads(command[command.index("-d") + 1])
    answer = await api.client.post("/api/v1/generate?dry_run=true", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["parameters"] == job.parameters
    assert answer.json()["num_outputs"] == job.num_outputs


async def test_the_command_names_uploads_as_a_caller_does(
    api: Api, visitor: Visitor
) -> None:
    stored = await keep(api.app.state.runtime, drawing(1))
    upload = await add_upload(api.app.state.runtime, stored, "default")
    asked = {"image": f"upload:{upload}"}
    job = await api.generate(
        PROMPT, model="black-forest-labs/flux-dev", parameters=asked
    )

    page = await visitor.look(f"/jobs/{job.job_id}")

    assert job.parameters["image"] != asked["image"]
    assert f"upload:{upload}" in html.unescape(page)


# ---------------------------------------------------------------------- words and figures


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a log."""

    name: str
    status: str = "processing"
    data: Mapping[str, Any] = field(default_factory=dict)
    at: datetime = datetime(2026, 11, 25, tzinfo=UTC)


def test_every_event_has_plain_words() -> None:
    for kind in (*get_args(Event), type("Submitted", (), {})):
        (step,) = timeline([Entry(kind.__name__)])
        assert step.title != kind.__name__
    (state,) = [
        str(one.sqltext)
        for one in ATTEMPTS.constraints
        if isinstance(one, CheckConstraint) and str(one.name).endswith("state_known")
    ]
    for word in re.findall(r"'(\w+)'", state):
        assert attempt_words(word)
    stages = ("queued", "submitting", "reconciling", "generating", "storing")
    said = {words_of("processing", stage) for stage in stages}
    assert said == {"waiting", "sending", "looking it up", "drawing", "saving"}


def test_of_progress_in_a_row_only_the_latest_is_told() -> None:
    log = [Entry("Started")]
    log += [Entry("Progressed", data={"progress": one / 10}) for one in range(1, 6)]
    log += [Entry("Generated"), Entry("Stored", "completed")]

    steps = timeline(log)

    assert [step.detail for step in steps] == [None, "50%", None, None]
    assert [step.kind for step in steps] == ["plain", "plain", "plain", "good"]


def test_the_bar_is_divided_by_what_took_how_long() -> None:
    known = {"queued": 1.0, "generating": 2.0, "storing": 1.0, "total": 4.0}
    broken = {"queued": 1.0, "generating": None, "storing": None, "total": 4.0}
    live = {"queued": 1.0, "generating": None, "storing": None, "total": None}

    shares = [(one.name, one.start, one.width) for one in phases_of(known)]
    assert shares == [("queued", 0, 25), ("generating", 25, 50), ("storing", 75, 25)]
    assert [(one.name, one.width) for one in phases_of(broken)] == [
        ("queued", 25),
        ("rest", 75),
    ]
    assert phases_of(live) == []


async def test_attempts_are_told_one_by_one(api: Api, visitor: Visitor) -> None:
    jobs = jobs_of(api)
    (job_id,) = await jobs.submit(new_job())
    failure = Failure("overloaded", "Too busy.", retryable=True)
    await jobs.look(job_id, Refused(RefusalKind.TRANSIENT, failure))
    await jobs.look(job_id, Started("second-handle"), Progressed(0.4))

    said = words(await visitor.look(f"/jobs/{job_id}"))

    assert "1 refused: nothing was bought" in said
    assert "2 at the provider" in said and "second-handle" in said
    assert "Too busy." in said and "Drawing" in said and "40%" in said
