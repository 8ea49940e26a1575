"""The faults: each does what its row says, and the sandbox's own routes count what happened."""

import asyncio
import io
from dataclasses import replace

import aiohttp
import pytest
from PIL import Image
from tests.sandbox.sandbox_client import FAST

from sandbox.faults import FAULTS, BadRule, FaultBoard, Subject


@pytest.mark.parametrize(
    "rule",
    [
        {"fault": "nothing"},
        {},
        {"fault": "get.slow", "often": 3},
        {"fault": "get.slow", "params": {"minutes": 3}},
        {"fault": "get.slow", "match": {"colour": "red"}},
        [],
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule):
    with pytest.raises(BadRule):
        FaultBoard().add(rule)


def test_a_rule_strikes_so_many_times_and_only_its_subjects():
    board = FaultBoard()
    match = {"prompt_contains": "fox", "model": "a/b"}
    board.add({"fault": "create.dropped", "times": 2, "match": match})
    fox, dog = Subject(prompt="a fox", model="a/b"), Subject(
        prompt="a dog", model="a/b"
    )

    hits = [board.strike("create_before", s) is not None for s in (dog, fox, fox, fox)]

    assert hits == [False, True, True, False]
    assert board.strike("get", fox) is None
    assert board.rules()[0]["hits"] == 2


def test_chance_is_the_same_for_the_same_seed():
    def hits(seed):
        board = FaultBoard()
        board.add({"fault": "get.slow", "probability": 0.3, "seed": seed})
        return [board.strike("get", Subject()) is not None for _ in range(400)]

    assert hits(1) == hits(1) != hits(2)
    assert 80 < sum(hits(1)) < 160


@pytest.mark.parametrize(
    "fault, bought",
    [("create.lost_response", 1), ("create.truncated", 1), ("create.dropped", 0)],
)
async def test_creates_whose_answer_does_not_arrive(client, fault, bought):
    await client.fault(fault, times=1)
    with pytest.raises(aiohttp.ClientError):
        await client.create()

    assert await client.purchases() == bought
    assert (await client.create()).status == 201


@pytest.mark.parametrize(
    "fault, params, status, bought",
    [
        ("create.error_before", {"status": 503}, 503, 0),
        ("create.error_before", {"status": 500, "body": "json"}, 500, 0),
        ("create.error_after", {"status": 502, "body": "html"}, 502, 1),
        ("create.error_after", {"status": 504, "body": "empty"}, 504, 1),
        ("create.throttled", {"retry_after": 7}, 429, 0),
        ("create.unauthorized", {}, 401, 0),
        ("create.no_credit", {}, 402, 0),
        ("create.bad_json", {}, 201, 1),
        ("create.slow_before", {"seconds": 0.05}, 201, 1),
        ("create.slow_after", {"seconds": 0.05}, 201, 1),
    ],
)
async def test_creates_with_a_bad_answer(client, fault, params, status, bought):
    await client.fault(fault, params=params)
    if fault == "create.bad_json":
        with pytest.raises(ValueError):
            await client.create()
    else:
        answer = await client.create()
        assert answer.status == status
        if status == 429:
            assert (
                answer.headers["Retry-After"] == "7" and answer.body["retry_after"] == 7
            )

    assert await client.purchases() == bought


@pytest.mark.parametrize(
    "fault, params, expected",
    [
        ("prediction.fails", {"error": "E005"}, {"status": "failed", "error": "E005"}),
        ("prediction.aborted", {}, {"status": "aborted", "started_at": None}),
        ("prediction.no_output", {}, {"status": "succeeded", "output": None}),
        (
            "prediction.data_removed",
            {},
            {"data_removed": True, "output": None, "input": {}},
        ),
    ],
)
async def test_predictions_that_end_badly(client, fault, params, expected):
    await client.fault(fault, params=params)
    made = (await client.create()).body
    ended = await client.until(made["id"], "succeeded", "failed", "aborted")

    assert {key: ended[key] for key in expected} == expected


@pytest.mark.parametrize(
    "fault", ["prediction.stuck_starting", "prediction.stuck_processing"]
)
async def test_predictions_that_never_end_can_be_cancelled(client, fault):
    await client.fault(fault)
    made = (await client.create()).body
    await client.until(made["id"], fault.rpartition("_")[2])
    await client.call("POST", made["urls"]["cancel"])

    assert (await client.get(made["id"]))["status"] == "canceled"


async def test_fewer_outputs_than_asked_for(client):
    await client.fault("prediction.fewer_outputs", params={"count": 2})
    done = await client.finished("a fox", more={"num_outputs": 4})

    assert len(done["output"]) == 2


async def test_a_status_nobody_has_heard_of(start):
    async with start(replace(FAST, speed=5)) as client:
        await client.fault("prediction.unknown_status")
        made = (await client.create()).body
        assert (await client.get(made["id"]))["status"] == "hibernating"
        await client.until(made["id"], "succeeded")


async def test_stale_reads_show_the_past(client):
    done = await client.finished()
    await client.fault("get.stale", params={"seconds": 60})
    assert (await client.get(done["id"]))["status"] == "starting"
    await client.fault("list.stale", params={"seconds": 60})
    assert (await client.call("GET", "/v1/predictions")).body["results"] == []
    await client.call("DELETE", "/sandbox/faults")
    assert (await client.get(done["id"]))["status"] == "succeeded"


@pytest.mark.parametrize(
    "fault, status",
    [
        ("get.error", 500),
        ("get.not_found", 404),
        ("list.error", 500),
        ("get.slow", 200),
    ],
)
async def test_reads_with_a_bad_answer(client, fault, status):
    done = await client.finished()
    await client.fault(fault, params={"seconds": 0.05} if fault == "get.slow" else {})
    path = "" if fault.startswith("list") else f"/{done['id']}"

    assert (await client.call("GET", f"/v1/predictions{path}")).status == status


@pytest.mark.parametrize("fault", ["get.dropped", "list.dropped"])
async def test_reads_whose_answer_does_not_arrive(client, fault):
    done = await client.finished()
    # Not only once: aiohttp repeats a GET whose kept connection was closed.
    await client.fault(fault)
    path = "" if fault.startswith("list") else f"/{done['id']}"

    with pytest.raises(aiohttp.ClientError):
        await client.call("GET", f"/v1/predictions{path}")


async def test_downloads_that_are_not_what_they_say(client):
    done = await client.finished("a fox", more={"output_format": "png"})
    [url] = done["output"]
    good = await client.call("GET", url)

    async def spoilt(name, **params):
        await client.fault(name, params=params)
        return await client.call("GET", url, allow_redirects=False)

    html = await spoilt("download.html")
    assert html.headers["Content-Type"] == "image/png" and b"<html>" in html.body
    assert (await spoilt("download.wrong_magic")).body[:4] == b"\0\0\0\0"
    assert (await spoilt("download.error", status=503)).status == 503
    assert (await spoilt("download.not_found")).status == 404
    oversized = await spoilt("download.oversized", bytes=300_000)
    assert len(oversized.body) == 300_000 and oversized.body.startswith(good.body)
    redirect = await spoilt("download.redirect", location="http://10.0.0.1/")
    assert (redirect.status, redirect.headers["Location"]) == (302, "http://10.0.0.1/")
    slow = await spoilt("download.slow", bytes_per_second=len(good.body) * 5)
    assert slow.body == good.body
    wrong = await spoilt("download.wrong_type", content_type="text/plain")
    assert wrong.headers["Content-Type"].startswith("text/plain")
    bomb = await spoilt("download.bomb", side=9000)
    assert Image.open(io.BytesIO(bomb.body)).size == (9000, 9000)
    with pytest.raises(aiohttp.ClientPayloadError):
        await spoilt("download.truncated")


async def test_the_board_is_read_changed_and_cleared_over_http(client):
    one = await client.call("POST", "/sandbox/faults", json={"fault": "get.slow"})
    await client.call(
        "POST", "/sandbox/faults", json={"fault": "get.error", "times": 3}
    )
    read = (await client.call("GET", "/sandbox/faults")).body
    removed = await client.call("DELETE", f"/sandbox/faults/{one.body['id']}")
    missing = await client.call("DELETE", "/sandbox/faults/999")
    left = (await client.call("GET", "/sandbox/faults")).body["rules"]
    refused = await client.call("PUT", "/sandbox/faults", json=[{"fault": "x"}])
    cleared = await client.call("DELETE", "/sandbox/faults")

    assert set(read["known"]) == set(FAULTS)
    assert [rule["fault"] for rule in read["rules"]] == ["get.slow", "get.error"]
    assert (removed.status, missing.status, cleared.status) == (204, 404, 204)
    assert [rule["fault"] for rule in left] == ["get.error"]
    assert refused.status == 422 and "unknown fault" in refused.body["detail"]


async def test_stats_count_purchases_by_input_and_webhook(client, letterbox):
    await client.finished("a fox", more={"seed": 1}, webhook=letterbox.url)
    await client.finished("a fox", more={"seed": 1})
    await client.finished("a fox", more={"seed": 2})
    stats = (await client.call("GET", "/sandbox/stats?full=1")).body

    assert (stats["purchases"], stats["purchases_repeated"]) == (3, 1)
    assert sorted(stats["purchases_by_input"].values()) == [1, 2]
    assert stats["purchases_by_webhook"] == {letterbox.url: 1}
    assert stats["by_status"] == {"succeeded": 3} and stats["running"] == 0
    assert [p["input"]["seed"] for p in stats["predictions"]] == [1, 1, 2]
    assert stats["predictions"][0]["webhook"] == letterbox.url
    assert stats["predictions"][0]["input_hash"] in stats["purchases_by_input"]


async def test_a_reset_forgets_everything(client):
    done = await client.finished()
    await client.fault("get.slow")
    assert (await client.call("POST", "/sandbox/reset")).status == 204
    stats = (await client.call("GET", "/sandbox/stats")).body
    faults = (await client.call("GET", "/sandbox/faults")).body["rules"]

    assert stats["purchases"] == 0 and stats["by_status"] == {} and faults == []
    assert (await client.call("GET", done["urls"]["get"])).status == 404


async def test_a_reset_frees_those_who_wait(start):
    async with start(replace(FAST, speed=0.01)) as client:
        waiting = asyncio.create_task(client.create(headers={"Prefer": "wait=60"}))
        while not await client.purchases():
            await asyncio.sleep(0.01)
        await client.call("POST", "/sandbox/reset")

        assert (await asyncio.wait_for(waiting, 5)).status == 202
