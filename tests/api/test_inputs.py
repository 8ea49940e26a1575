"""Image to image: what a caller names as an input, and what the provider gets to read."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest

from app.domain.errors import InvalidRequest
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.keyed import KEYS_ON, keyed
from tests.api.served import TOKEN, Api, check_problem, provided, working
from tests.api.test_uploads import age, files_of, keys_of, rows_of, uploaded
from tests.contracts.scripted_server import Request, ScriptedServer, answer, drip, hang
from tests.support.drawings import draw, pixel_bomb
from tests.support.jobs import JobTable
from tests.support.waiting import wait_for_async

ONE = "black-forest-labs/flux-dev"  # takes `image`
MANY = "black-forest-labs/flux-2-pro"  # takes a list, `input_images`
TWO = "stability-ai/sdxl"  # takes `image` and `mask`
PICTURE = draw(1)
PATH = "/api/v1/generate"


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Sandbox:
    return shared_sandbox


@pytest.fixture
async def api(shared: Api, sandbox: Sandbox) -> Api:
    return await emptied(shared, sandbox)


@pytest.fixture
def database_url(shared: Api) -> str:
    """The API's database, so that `jobs` are its jobs."""
    return shared.settings.database_url.get_secret_value()


@pytest.fixture
async def own_sandbox() -> AsyncIterator[Sandbox]:
    """A provider for one test."""
    async with provided() as sandbox:
        yield sandbox


@pytest.fixture
async def fresh(serve: Serve, own_sandbox: Sandbox) -> Api:
    """An API that never sent a file anywhere."""
    found: Api = await serve(own_sandbox)
    return found


@pytest.fixture
async def web() -> AsyncIterator[ScriptedServer]:
    """A web server with a picture, somewhere."""
    async with ScriptedServer([answer(200, PICTURE)]) as server:
        yield server


@pytest.fixture
async def reaching(serve: Serve, sandbox: Sandbox, web: ScriptedServer) -> Api:
    """An API that may fetch from that server although it is on loopback."""
    api: Api = await serve(sandbox, outbound_hosts=(f"127.0.0.1:{web.port}",))
    return api


async def asked(api: Api, parameters: dict[str, Any], model: str = ONE) -> Any:
    body = {"prompt": "the same at night", "model": model, "parameters": parameters}
    return await api.client.post("/api/v1/generate", json=body)


async def refused(api: Api, parameters: dict[str, Any], model: str = ONE) -> Any:
    answered = await asked(api, parameters, model)
    assert answered.status_code == 422, answered.text
    return check_problem(answered)


async def accepted(api: Api, parameters: dict[str, Any], model: str = ONE) -> Any:
    answered = await asked(api, parameters, model)
    assert answered.status_code == 202, answered.text
    return answered.json()


async def seen_by_the_model(url: str) -> bytes:
    """Read an input as the provider's machine does: its own files, with its own rights."""
    async with httpx.AsyncClient(verify=False) as client:
        at = {"Authorization": "Bearer of-the-provider"}
        found = await client.get(f"{url}/download", headers=at)
        assert found.status_code == 200, found.text
        return found.content


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


# ------------------------------------------------------------------------- what arrives


async def test_an_upload_becomes_an_input_and_the_job_a_picture(
    api: Api, worker: None, sandbox: Sandbox, jobs: JobTable
) -> None:
    kept = await uploaded(api, PICTURE)

    job = await accepted(api, {"image": kept["uri"]})

    sent = job["parameters"]["image"]
    assert sent.startswith(f"{sandbox.url}/v1/files/")
    assert await seen_by_the_model(sent) == PICTURE
    done = await api.finished(job["job_id"])
    assert done.status == "completed"
    assert done.parameters == job["parameters"]
    row = await jobs.row(job["job_id"])
    assert row.uploads == {"image": kept["upload_id"]}
    async with httpx.AsyncClient(verify=False) as client:
        stats = (await client.get(f"{sandbox.url}/sandbox/stats?full=1")).json()
    (bought,) = stats["predictions"]
    assert bought["input"]["image"] == sent
    assert TOKEN not in str(bought["input"])


async def test_a_url_is_fetched_by_us_and_kept_as_an_upload(
    reaching: Api, web: ScriptedServer, jobs: JobTable
) -> None:
    url = f"{web.url}/cat.png?signature=x%2Fy"

    job = await accepted(reaching, {"image": url})

    (request,) = web.requests
    assert request.target == "/cat.png?signature=x%2Fy"
    assert "authorization" not in request.headers
    (upload,) = await rows_of(reaching)
    assert upload.sha256 == hashlib.sha256(PICTURE).hexdigest()
    assert (await jobs.row(job["job_id"])).uploads == {"image": str(upload.id)}
    assert str(web.port) not in str(job["parameters"])
    assert await seen_by_the_model(job["parameters"]["image"]) == PICTURE


async def test_a_data_uri_becomes_an_upload_too(fresh: Api) -> None:
    job = await accepted(fresh, {"image": data_uri(PICTURE)})

    assert len(await rows_of(fresh)) == 1
    assert await seen_by_the_model(job["parameters"]["image"]) == PICTURE


async def test_a_list_may_have_all_kinds(
    reaching: Api, web: ScriptedServer, jobs: JobTable
) -> None:
    kept = await uploaded(reaching, draw(2))
    inputs = [data_uri(draw(3)), kept["uri"], f"{web.url}/a.png", f"{web.url}/a.png"]

    job = await accepted(reaching, {"input_images": inputs}, MANY)

    sent = job["parameters"]["input_images"]
    assert [await seen_by_the_model(url) for url in sent] == [
        draw(3),
        draw(2),
        PICTURE,
        PICTURE,
    ]
    assert web.count("GET") == 1, "the same address is fetched once"
    names = (await jobs.row(job["job_id"])).uploads["input_images"]
    assert names[1] == kept["upload_id"]
    assert len(names) == 4


async def test_two_inputs_are_two_files(api: Api) -> None:
    picture, mask = await uploaded(api, draw(4)), await uploaded(api, draw(5))

    job = await accepted(api, {"image": picture["uri"], "mask": mask["uri"]}, TWO)

    assert await seen_by_the_model(job["parameters"]["image"]) == draw(4)
    assert await seen_by_the_model(job["parameters"]["mask"]) == draw(5)


async def test_a_file_goes_to_the_provider_once_for_many_jobs(
    api: Api, sandbox: Sandbox
) -> None:
    kept = await uploaded(api, PICTURE)

    links = {
        (await accepted(api, {"image": kept["uri"]}))["parameters"]["image"]
        for _ in range(3)
    }

    assert len(links) == 1


async def test_a_file_the_provider_soon_forgets_is_sent_again(serve: Serve) -> None:
    async with provided(files_retention=timedelta(minutes=10)) as sandbox:
        api: Api = await serve(sandbox)
        kept = await uploaded(api, PICTURE)

        links = {
            (await accepted(api, {"image": kept["uri"]}))["parameters"]["image"]
            for _ in range(2)
        }

    assert len(links) == 2


async def test_with_an_address_of_our_own_the_provider_gets_a_link(
    serve: Serve, sandbox: Sandbox
) -> None:
    base = "http://pictures.example"
    api: Api = await serve(sandbox, public_base_url=base)
    kept = await uploaded(api, PICTURE)

    job = await accepted(api, {"image": kept["uri"]})

    link = job["parameters"]["image"]
    assert link.startswith(f"{base}/media/")
    async with httpx.AsyncClient(verify=False) as anybody:
        found = await anybody.get(api.origin + link.removeprefix(base))
    assert found.content == PICTURE
    async with httpx.AsyncClient(verify=False) as client:
        at = {"Authorization": "Bearer x"}
        files = (await client.get(f"{sandbox.url}/v1/files", headers=at)).json()
    assert files["results"] == []


async def test_a_model_without_pictures_is_served_as_ever(api: Api) -> None:
    job = await accepted(api, {}, "black-forest-labs/flux-schnell")

    assert set(job["parameters"]) == {"prompt", "num_outputs", "seed"}


# ------------------------------------------------------------------------------ retried


async def test_a_retry_of_an_old_job_has_an_address_that_works(
    api: Api, sandbox: Sandbox
) -> None:
    """The provider has thrown its copy away, and this process has forgotten about it."""
    kept = await uploaded(api, PICTURE)
    job = await accepted(api, {"image": kept["uri"]})
    await api.client.post(f"/api/v1/jobs/{job['job_id']}/cancel")
    async with httpx.AsyncClient(verify=False) as client:
        await client.post(f"{sandbox.url}/sandbox/reset")
    api.app.state.runtime.inputs._provided.clear()
    await age(api, 5)

    again = await api.client.post(f"/api/v1/jobs/{job['job_id']}/retry")

    assert again.status_code == 202, again.text
    old, new = job["parameters"], again.json()["parameters"]
    assert new["image"] != old["image"]
    assert {**new, "image": ""} == {**old, "image": ""}
    assert await seen_by_the_model(new["image"]) == PICTURE
    async with working(api.settings):
        assert (await api.finished(again.json()["job_id"])).status == "completed"
    renewed = (await api.client.get(f"/api/v1/uploads/{kept['upload_id']}")).json()
    assert renewed["expires_at"] >= kept["expires_at"]


async def test_a_retry_can_be_retried(api: Api, jobs: JobTable) -> None:
    kept = await uploaded(api, PICTURE)
    job = await accepted(api, {"input_images": [kept["uri"]] * 2}, MANY)
    for _ in range(2):
        await api.client.post(f"/api/v1/jobs/{job['job_id']}/cancel")
        job = (await api.client.post(f"/api/v1/jobs/{job['job_id']}/retry")).json()

    names = {"input_images": [kept["upload_id"]] * 2}
    assert (await jobs.row(job["job_id"])).uploads == names


async def test_a_retry_whose_picture_is_gone_is_refused(api: Api) -> None:
    kept = await uploaded(api, PICTURE)
    job = await accepted(api, {"image": kept["uri"]})
    await api.client.post(f"/api/v1/jobs/{job['job_id']}/cancel")
    await api.client.delete(f"/api/v1/uploads/{kept['upload_id']}")

    again = await api.client.post(f"/api/v1/jobs/{job['job_id']}/retry")

    assert again.status_code == 409
    assert "parameters.image" in check_problem(again).detail


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "value, says",
    [
        ("upload:nonsense", "id of an upload"),
        ("upload:01a209f6-d8ee-7475-b811-2033399222cc", "not there"),
        ("http://example.com/a.png", "https"),
        ("https://127.0.0.1/a.png", "public"),
        ("https://2130706433/a.png", "public"),
        ("https://user@example.com/a.png", "user name"),
        ("file:///etc/passwd", "https"),
        ("a.png", "https"),
        ("data:image/png;base64,%%%", "base64"),
        ("data:image/png", "no data"),
        (data_uri(b"<svg/>"), "SVG"),
        (data_uri(pixel_bomb()), "pixels"),
        ("data:text/html,<script>", "unknown kind"),
    ],
)
async def test_what_is_no_picture_of_the_public_is_refused_by_name(
    api: Api, value: str, says: str
) -> None:
    problem = await refused(api, {"image": value})

    assert problem.error.param == "parameters.image"
    assert says in problem.detail
    assert await rows_of(api) == files_of(api) == []


async def test_one_of_a_list_is_named(api: Api) -> None:
    problem = await refused(
        api, {"input_images": [data_uri(PICTURE), "http://a.example/"]}, MANY
    )

    assert problem.error.param == "parameters.input_images.1"
    assert problem.errors[0].pointer == "/parameters/input_images/1"


@pytest.mark.parametrize(
    "reaction, says",
    [
        (answer(404), "does not have the file"),
        (answer(500), "answered 500"),
        (answer(200, b"<html>please log in"), "web page"),
        (answer(200, PICTURE[:-30], {"Content-Length": "9999"}), "15 seconds"),
        (answer(302, b"", {"Location": "http://127.0.0.1:1/"}), "redirects"),
        (answer(200, draw(9, side=120)), "more than we accept"),
        (answer(200, b"", {"Content-Length": "99999999"}), "more than we accept"),
        (hang(), "15 seconds"),
        (drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.05), "15 seconds"),
    ],
    ids=(
        "missing,broken,login,cut,redirect,large,said to be large,silent,dripping"
    ).split(","),
)
async def test_what_cannot_be_fetched_is_said(
    serve: Serve, sandbox: Sandbox, web: ScriptedServer, reaction: Any, says: str
) -> None:
    hosts = (f"127.0.0.1:{web.port}",)
    api: Api = await serve(sandbox, outbound_hosts=hosts, max_upload_bytes=20_000)
    inputs = api.app.state.runtime.inputs
    web.will(reaction)
    if says == "15 seconds":  # which nobody wants to wait for
        inputs._patience = timedelta(seconds=0.3)
        says = "0.3 seconds"

    problem = await refused(api, {"image": f"{web.url}/a.png"})

    assert problem.error.param == "parameters.image"
    assert says in problem.detail
    assert await rows_of(api) == files_of(api) == []


async def test_the_slow_servers_of_one_owner_do_not_stop_others(
    serve: Serve, sandbox: Sandbox, web: ScriptedServer
) -> None:
    async def some_hang(request: Request, writer: asyncio.StreamWriter) -> None:
        reaction = hang() if "slow" in request.target else answer(200, PICTURE)
        await reaction(request, writer)

    hosts = (f"127.0.0.1:{web.port}",)
    api: Api = await serve(sandbox, outbound_hosts=hosts, **KEYS_ON)
    web.will(some_hang)
    slow = [f"{web.url}/slow-{number}.png" for number in range(20)]
    asked = {"prompt": "a", "model": MANY, "parameters": {"input_images": slow}}
    quick = {"prompt": "a", "model": ONE, "parameters": {"image": f"{web.url}/a.png"}}

    async with keyed(api) as people:
        hanging = asyncio.create_task(people.alice.post(PATH, json=asked))

        async def are_under_way() -> bool:
            return len(web.requests) >= 8

        await wait_for_async(are_under_way, within=5, what="the fetches")
        accepted = await people.bob.post(PATH, json=quick)
        fetched = [one.target for one in web.requests]
        hanging.cancel()

    assert accepted.status_code == 202, accepted.text
    assert len([one for one in fetched if "slow" in one]) == 8


async def test_an_upload_of_somebody_else_is_not_there(
    serve: Serve, sandbox: Sandbox
) -> None:
    async with keyed(await serve(sandbox, **KEYS_ON)) as people:
        alice, _ = keys_of(people)
        kept = await uploaded(people.api, PICTURE, **alice)
        body = {
            "prompt": "the same at night",
            "model": ONE,
            "parameters": {"image": kept["uri"]},
        }

        answered = await people.bob.post("/api/v1/generate", json=body)

    assert answered.status_code == 422
    assert "not there" in check_problem(answered).detail


async def test_too_many_files_are_refused(api: Api) -> None:
    kept = await uploaded(api, PICTURE)
    model = "ideogram-ai/ideogram-v3-turbo"
    parameters = {"style_reference_images": [kept["uri"]] * 21}

    problem = await refused(api, parameters, model)

    assert "20 files" in problem.detail


async def test_an_upload_where_no_file_goes_is_refused(api: Api) -> None:
    kept = await uploaded(api, PICTURE)

    problem = await refused(
        api, {"output_format": kept["uri"]}, "black-forest-labs/flux-schnell"
    )
    assert problem.error.param == "parameters.output_format"
    answered = await api.client.post("/api/v1/generate", json={"prompt": kept["uri"]})
    assert answered.status_code == 202, "a prompt may be anything"


async def test_a_file_that_vanished_from_the_store_is_not_sent(api: Api) -> None:
    kept = await uploaded(api, PICTURE)
    (file,) = files_of(api)
    file.unlink()

    problem = await refused(api, {"image": kept["uri"]})

    assert "Upload it again" in problem.detail


async def test_without_the_provider_no_job_is_accepted(
    fresh: Api, own_sandbox: Sandbox
) -> None:
    kept = await uploaded(fresh, PICTURE)
    await accepted(fresh, {}, ONE)  # the model is known from here on
    await own_sandbox.stop()

    answered = await asked(fresh, {"image": kept["uri"]})

    assert answered.status_code == 503
    assert check_problem(answered).retryable
    assert len(await fresh.listed()) == 1


@pytest.mark.parametrize(
    "url, says",
    [
        ("http://hooks.example/job", "https"),
        ("https://127.0.0.1/hook", "public"),
        ("https://localhost/hook", "public"),
        ("https://[::ffff:10.0.0.1]/hook", "public"),
        ("https://hooks.example:8443/hook", "443"),
    ],
)
async def test_a_webhook_is_guarded_like_an_input(
    api: Api, url: str, says: str
) -> None:
    body = {"prompt": "a mill by the river", "webhook_url": url}

    answered = await api.client.post("/api/v1/generate", json=body)

    problem = check_problem(answered)
    assert (answered.status_code, problem.code) == (422, "url_refused")
    assert problem.error.param == "webhook_url"
    assert says in problem.detail


async def test_a_trusted_webhook_may_be_plain_http(reaching: Api, web: Any) -> None:
    body = {"prompt": "a mill by the river", "webhook_url": f"{web.url}/hook"}

    answered = await reaching.client.post("/api/v1/generate", json=body)

    assert answered.status_code == 202
    assert web.connections == 0


async def test_other_files_are_passed_on_and_not_fetched(
    reaching: Api, web: ScriptedServer
) -> None:
    """Weights, sound and the like: we could not tell good from bad."""
    runtime = reaching.app.state.runtime
    prepared = await _prepared_with_weights(runtime, "https://hub.example/w.tar")

    resolved = await runtime.inputs.resolve("default", prepared)

    assert resolved.prepared.input == prepared.input
    assert resolved.uploads == {}
    for bad in ("http://hub.example/w.tar", "https://10.0.0.1/w.tar"):
        with pytest.raises(InvalidRequest, match="parameters.weights"):
            await runtime.inputs.resolve(
                "default", await _prepared_with_weights(runtime, bad)
            )
    assert web.connections == 0


async def _prepared_with_weights(runtime: Any, url: str) -> Any:
    from app.services.file_inputs import FileInput
    from app.services.translation import PreparedInput

    files = {"weights": FileInput("weights", is_list=False, is_picture=False)}
    return PreparedInput("acme/painter", {"weights": url}, 1, (), files)
