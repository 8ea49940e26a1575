"""Replicate's API as the sandbox speaks it."""

import asyncio
import hashlib
import io
import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from PIL import Image
from tests.sandbox.sandbox_client import FAST, PRO, SCHNELL

from sandbox.catalogue import Catalogue

VERSION = Catalogue.bundled().find(SCHNELL).version
SDXL = Catalogue.bundled().find("stability-ai/sdxl")


async def test_an_early_answer_omits_what_is_not_known(start):
    async with start(replace(FAST, speed=1)) as client:
        answer = await client.create()

    body = answer.body
    assert answer.status == 201
    assert answer.headers["Location"] == body["urls"]["get"]
    assert body["status"] == "starting"
    assert not {"output", "started_at", "completed_at", "metrics"} & set(body)
    assert re.fullmatch("[a-z2-7]{26}", body["id"])
    assert body["urls"]["get"] == f"{client.url}/v1/predictions/{body['id']}"
    assert (body["source"], body["version"], body["model"]) == (
        "api",
        "hidden",
        SCHNELL,
    )


@pytest.mark.parametrize(
    "path, body, version",
    [
        ("/v1/predictions", {"version": SCHNELL}, "hidden"),
        ("/v1/predictions", {"version": f"{SCHNELL}:{VERSION}"}, VERSION),
        ("/v1/predictions", {"version": VERSION}, VERSION),
        (f"/v1/models/{SCHNELL}/predictions", {}, "hidden"),
        ("/v1/deployments/sandbox/flux-schnell/predictions", {}, VERSION),
        ("/v1/predictions", {"version": SDXL.version}, SDXL.version),
    ],
)
async def test_every_form_of_create(client, path, body, version):
    given = {"input": {"prompt": "a fox"}, **body}
    answer = await client.call("POST", path, json=given)
    done = await client.until(answer.body["id"], "succeeded")

    assert answer.status == 201
    assert done["version"] == version
    assert done["metrics"]["predict_time"] > 0 and done["metrics"]["total_time"] >= 0
    assert len(done["output"]) == 1


@pytest.mark.parametrize(
    "path, body, status, said",
    [
        ("/v1/predictions", {"version": "a/b"}, 422, "version does not exist"),
        ("/v1/predictions", {"version": f"{SCHNELL}:latest"}, 422, "does not exist"),
        ("/v1/predictions", {"version": SDXL.ref}, 422, "does not exist"),
        ("/v1/predictions", {}, 422, "version is required"),
        (f"/v1/models/{SDXL.ref}/predictions", {}, 404, "not be found"),
        ("/v1/models/a/b/predictions", {}, 404, "not be found"),
        ("/v1/deployments/a/flux-schnell/predictions", {}, 404, "not be found"),
        (
            "/v1/predictions",
            {"version": SCHNELL, "model": SCHNELL},
            422,
            "Additional property model is not allowed",
        ),
        (
            "/v1/predictions",
            {"version": SCHNELL, "input": None},
            422,
            "Expected: object",
        ),
        ("/v1/predictions", {"version": SCHNELL, "webhook": "x"}, 422, "webhook"),
        (
            "/v1/predictions",
            {"version": SCHNELL, "webhook_events_filter": ["end"]},
            422,
            "must be one of",
        ),
    ],
)
async def test_a_create_that_is_refused_makes_nothing(client, path, body, status, said):
    answer = await client.call("POST", path, json={"input": {"prompt": "a"}, **body})

    assert (answer.status, answer.body["status"]) == (status, status)
    assert said in answer.body["detail"]
    assert await client.purchases() == 0


async def test_a_bad_input_is_refused_with_one_entry_each(client):
    answer = await client.create("a", more={"num_outputs": 9, "megapixels": "7"})

    assert answer.status == 422
    assert answer.body["title"] == "Input validation failed"
    assert answer.body["detail"].startswith("- input.num_outputs: Must be less than")
    assert [f["type"] for f in answer.body["invalid_fields"]] == ["number_lte", "enum"]


async def test_a_body_that_is_not_json_is_malformed(client):
    answer = await client.call("POST", "/v1/predictions", data=b"{")

    assert answer.status == 400 and "JSON" in answer.body["detail"]


@pytest.mark.parametrize(
    "header", [{"Authorization": ""}, {"Authorization": "Bearer "}]
)
async def test_without_a_token_nothing_goes(client, header):
    answer = await client.call("GET", "/v1/account", headers=header)

    assert answer.status == 401
    assert answer.headers["Content-Type"].startswith("application/problem+json")


async def test_a_configured_token_is_checked(start):
    async with start(replace(FAST, token="r8_right")) as client:
        for sent, status in (
            ("Bearer r8_right", 200),
            ("Token r8_right", 200),
            ("Bearer r8", 401),
        ):
            answer = await client.call(
                "GET", "/v1/account", headers={"Authorization": sent}
            )
            assert answer.status == status


async def test_waiting_answers_the_end(client):
    answer = await client.create(headers={"Prefer": "wait"})

    assert answer.status == 201
    assert answer.headers["Preference-Applied"] == "wait=60"
    assert answer.body["status"] == "succeeded"
    assert answer.body["output"][0].startswith(f"{client.url}/files-out/")


async def test_a_wait_that_is_too_short_answers_starting(start):
    async with start(replace(FAST, speed=1)) as client:
        await client.fault("prediction.stuck_processing")
        answer = await client.create(headers={"Prefer": "wait=1"})

        assert (answer.status, answer.body["status"]) == (202, "starting")
        assert (await client.get(answer.body["id"]))["status"] == "processing"


async def test_progress_grows_while_processing(start):
    async with start(replace(FAST, speed=2)) as client:
        made = (await client.create("a", more={"num_inference_steps": 4})).body
        seen = set()
        async with asyncio.timeout(5):
            while (now := await client.get(made["id"]))["status"] != "succeeded":
                seen.update(re.findall(r"(\d)/4", now["logs"]))
                await asyncio.sleep(0.02)

    assert seen >= {"1", "2"} and "4" not in seen
    assert re.search(r"^100%\|.+\| 4/4", now["logs"], re.MULTILINE)


@pytest.mark.parametrize("kind", ["webp", "jpg", "png"])
async def test_the_outputs_are_pictures_of_the_right_kind(start, kind):
    async with start(replace(FAST, pictures="painted")) as client:
        more = {"num_outputs": 2, "output_format": kind, "megapixels": "0.25"}
        done = await client.finished("a lake", more=more)
        first, second = [await client.call("GET", url) for url in done["output"]]
        headers = {"If-None-Match": first.headers["ETag"]}
        again = await client.call("GET", done["output"][0], headers=headers)

    assert done["output"][1].endswith(f"/out-1.{kind}")
    image = Image.open(io.BytesIO(first.body))
    assert image.size == (512, 512)
    assert first.headers["Content-Type"] == Image.MIME[image.format]
    assert int(first.headers["Content-Length"]) == len(first.body)
    assert first.body != second.body
    assert again.status == 304


async def test_a_single_picture_model_answers_a_single_address(client):
    done = await client.finished(version=PRO)

    assert isinstance(done["output"], str) and done["output"].endswith("/out-0.webp")


async def test_the_same_seed_gives_the_same_picture_and_no_seed_another(client):
    async def digest(**more):
        done = await client.finished("a fox", more=more)
        body = (await client.call("GET", done["output"][0])).body
        return hashlib.sha256(body).hexdigest()

    assert await digest(seed=5) == await digest(seed=5)
    assert await digest(seed=5) != await digest(seed=6)
    assert await digest() != await digest()


async def test_the_list_is_newest_first_in_pages_of_a_hundred(client):
    ids = [(await client.create(f"fox {n}")).body["id"] for n in range(205)]
    page = (await client.call("GET", "/v1/predictions")).body
    pages = [page]
    while page["next"]:
        page = (await client.call("GET", page["next"])).body
        pages.append(page)
    back = (await client.call("GET", pages[2]["previous"])).body

    assert pages[0]["previous"] is None
    assert [len(page["results"]) for page in pages] == [100, 100, 5]
    assert [p["id"] for page in pages for p in page["results"]] == ids[::-1]
    assert [p["id"] for p in back["results"]] == [p["id"] for p in pages[1]["results"]]


async def test_the_lists_limits_are_inclusive_below_and_exclusive_above(client):
    made = []
    for n in range(3):
        made.append((await client.create(f"fox {n}")).body)
        await asyncio.sleep(0.005)
    after = {"created_after": made[1]["created_at"]}
    before = {"created_before": made[1]["created_at"]}

    async def listed(params):
        page = await client.call("GET", "/v1/predictions", params=params)
        return [p["id"] for p in page.body["results"]]

    assert await listed(after) == [made[2]["id"], made[1]["id"]]
    assert await listed(before) == [made[0]["id"]]
    assert await listed({**after, "source": "web"}) == []


@pytest.mark.parametrize(
    "query", ["cursor=x", "created_after=x", "created_after=2026-01-01"]
)
async def test_a_bad_list_query_is_refused(client, query):
    assert (await client.call("GET", f"/v1/predictions?{query}")).status == 400


async def test_cancelling_before_the_start_and_after_the_end(start):
    async with start(replace(FAST, speed=0.01)) as client:
        made = (await client.create()).body
        cancelled = await client.call("POST", made["urls"]["cancel"])
        again = await client.call("POST", made["urls"]["cancel"])

    body = cancelled.body
    assert (cancelled.status, body["status"], body["logs"]) == (200, "canceled", None)
    assert body["started_at"] == body["completed_at"]
    assert body["metrics"]["predict_time"] == 3e-06
    assert again.body == body


@pytest.mark.parametrize(
    "fault, status",
    [
        ("prediction.stuck_starting", "aborted"),
        ("prediction.stuck_processing", "canceled"),
    ],
)
async def test_the_deadline_ends_a_run(start, fault, status):
    async with start(FAST) as client:
        await client.fault(fault)
        made = (await client.create(headers={"Cancel-After": "5"})).body
        created, deadline = map(
            datetime.fromisoformat, (made["created_at"], made["deadline"])
        )
        assert deadline - created == timedelta(seconds=5)
        async with asyncio.timeout(8):
            while (seen := await client.get(made["id"]))["status"] != status:
                await asyncio.sleep(0.05)

    assert seen["completed_at"] >= made["deadline"][:-1]
    assert (seen["started_at"] is None) == (status == "aborted")


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 90), ("90s", 90), ("5m", 300), ("1h30m45s", 5445), ("24h", 86400)],
)
async def test_every_form_of_cancel_after(client, text, seconds):
    made = (await client.create(headers={"Cancel-After": text})).body
    created, deadline = map(
        datetime.fromisoformat, (made["created_at"], made["deadline"])
    )

    assert deadline - created == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["4", "", "soon", "25h", "-5", "5 m"])
async def test_a_bad_cancel_after_is_refused(client, text):
    assert (await client.create(headers={"Cancel-After": text})).status == 422


async def test_after_the_hour_the_data_are_gone(start):
    async with start(replace(FAST, retention=timedelta(seconds=0.3))) as client:
        done = await client.finished()
        async with asyncio.timeout(5):
            while not (seen := await client.get(done["id"]))["data_removed"]:
                await asyncio.sleep(0.02)
        file = await client.call("GET", done["output"][0])

    assert (seen["status"], seen["input"], seen["output"]) == ("succeeded", {}, None)
    assert file.status == 404


async def test_what_is_older_still_is_forgotten(start):
    times = {
        "retention": timedelta(seconds=0.1),
        "forget_after": timedelta(seconds=0.1),
    }
    async with start(replace(FAST, **times)) as client:
        made = (await client.create()).body
        async with asyncio.timeout(5):
            while (await client.call("GET", made["urls"]["get"])).status != 404:
                await asyncio.sleep(0.02)
        assert (await client.call("GET", "/v1/predictions")).body["results"] == []
        assert await client.purchases() == 1, "what was bought stays counted"


async def test_creates_and_other_requests_have_their_own_limits(start):
    limits = {"creates_per_minute": 2, "requests_per_minute": 3}
    async with start(replace(FAST, **limits)) as client:
        creates = [await client.create() for _ in range(3)]
        reads = [await client.call("GET", "/v1/account") for _ in range(4)]
        made = await client.purchases()

    assert [answer.status for answer in creates] == [201, 201, 429]
    assert [answer.status for answer in reads] == [200, 200, 200, 429]
    refused = creates[2]
    assert refused.body["retry_after"] == int(refused.headers["Retry-After"]) >= 1
    assert (
        "throttled" in refused.body["detail"]
        and "resets in ~" in refused.body["detail"]
    )
    assert creates[0].headers["ratelimit-remaining"] == "1"
    assert made == 2


async def test_models_and_versions(client):
    listed = (await client.call("GET", "/v1/models")).body["results"]
    one = (await client.call("GET", f"/v1/models/{SCHNELL}")).body
    versions = (await client.call("GET", f"/v1/models/{SCHNELL}/versions")).body[
        "results"
    ]
    version = await client.call("GET", f"/v1/models/{SCHNELL}/versions/{VERSION}")
    missing = await client.call("GET", f"/v1/models/{SCHNELL}/versions/{'0' * 64}")

    assert one in listed and one["latest_version"] == versions[0] == version.body
    assert missing.status == 404
    schema = one["latest_version"]["openapi_schema"]["components"]["schemas"]
    ratio = schema["Input"]["properties"]["aspect_ratio"]
    assert ratio["allOf"] == [{"$ref": "#/components/schemas/aspect_ratio"}]
    assert "16:9" in schema["aspect_ratio"]["enum"]
    assert schema["Output"]["type"] == "array"


@pytest.mark.parametrize("path", ["/v1/hardware", "/v1/account", "/v1/deployments"])
async def test_the_quiet_routes_answer(client, path):
    assert (await client.call("GET", path)).status == 200


@pytest.mark.parametrize(
    "method, path, status",
    [("GET", "/v1/nothing", 404), ("DELETE", "/v1/account", 405), ("GET", "/x", 404)],
)
async def test_unknown_routes_answer_in_the_providers_form(
    client, method, path, status
):
    answer = await client.call(method, path)

    assert answer.status == answer.body["status"] == status


async def test_a_file_is_kept_served_and_deleted(client):
    form = aiohttp.FormData()
    form.add_field("content", b"GIF89a", filename="fox.gif", content_type="image/gif")
    form.add_field("metadata", '{"of": "a fox"}', content_type="application/json")
    made = await client.call("POST", "/v1/files", data=form)
    url = made.body["urls"]["get"]
    content = await client.call("GET", f"{url}/download")
    listed = (await client.call("GET", "/v1/files")).body["results"]
    deleted = await client.call("DELETE", url)
    gone = await client.call("GET", url)

    assert made.status == 201
    assert (made.body["name"], made.body["size"]) == ("fox.gif", 6)
    assert made.body["metadata"] == {"of": "a fox"}
    assert made.body["checksums"]["md5"] == hashlib.md5(b"GIF89a").hexdigest()
    assert datetime.fromisoformat(made.body["expires_at"]) > datetime.now(UTC)
    assert (content.body, content.headers["Content-Type"]) == (b"GIF89a", "image/gif")
    assert listed == [made.body]
    assert (deleted.status, gone.status) == (204, 404)
    assert gone.body["detail"] == "File not found"


async def test_a_public_address_replaces_the_host_header(start):
    async with start(replace(FAST, public_url="https://sandbox.example")) as client:
        made = (await client.create()).body

    assert made["urls"]["get"].startswith("https://sandbox.example/v1/predictions/")


async def test_thousands_in_flight_cost_no_task_each(start):
    async with start(replace(FAST, speed=0.01)) as client:
        tasks_before = len(asyncio.all_tasks())
        started = time.monotonic()
        gate = asyncio.Semaphore(64)

        async def one(n):
            async with gate:
                return (await client.create(f"fox {n}")).status

        statuses = await asyncio.gather(*(one(n) for n in range(2000)))
        stats = (await client.call("GET", "/sandbox/stats?brief=1")).body

        assert set(statuses) == {201}
        assert stats["running"] == 2000 and stats["purchases_repeated"] == 0
        assert len(asyncio.all_tasks()) < tasks_before + 200
        assert time.monotonic() - started < 30
