"""Webhooks: which are sent, how they are signed, and which are tried again."""

import asyncio
import json
from dataclasses import replace
from datetime import timedelta

import pytest
import standardwebhooks
from tests.sandbox.sandbox_client import FAST

from sandbox.webhooks import RETRY_SHARES, sign

QUICK = replace(FAST, webhook_window=timedelta(seconds=0.6))


@pytest.mark.parametrize(
    "secret, message, moment, body, signature",
    [
        (
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1614265330,
            b'{"test": 2432232314}',
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
        ),
        (
            "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX",
            "msg_01hzy8m3s4t5u6v7w8x9y0z1a2",
            1795340000,
            b'{"id":"ufawqhfynnddngldkgtslldrkq","status":"succeeded",'
            b'"output":["https://replicate.delivery/xezq/abc/out-0.webp"]}',
            "v1,p0hxMC+B7+flOm3oKtEdWDbw3ebH6UJ6KIOd10vSWzQ=",
        ),
    ],
)
def test_known_signatures(secret, message, moment, body, signature):
    assert sign(secret, message, moment, body) == signature


async def test_the_filter_chooses_the_events_and_their_bodies_are_predictions(
    client, letterbox
):
    events = ["start", "output", "logs", "completed"]
    made = await client.create(webhook=letterbox.url, webhook_events_filter=events)
    await letterbox.hold(3)

    assert made.body["webhook"] == letterbox.url
    assert made.body["webhook_events_filter"] == events
    bodies = [json.loads(body) for _, body in letterbox.letters]
    by_status = {(body["status"], body["output"] is not None) for body in bodies}
    assert by_status == {
        ("processing", False),
        ("processing", True),
        ("succeeded", True),
    }
    assert {body["id"] for body in bodies} == {made.body["id"]}


async def test_without_a_filter_output_and_completed_are_sent(client, letterbox):
    await client.create(webhook=letterbox.url)
    await letterbox.hold(2)

    statuses = sorted(json.loads(body)["status"] for _, body in letterbox.letters)
    assert statuses == ["processing", "succeeded"]


async def test_a_webhook_verifies_with_the_accounts_secret(client, letterbox):
    secret = (await client.call("GET", "/v1/webhooks/default/secret")).body["key"]
    await client.create(webhook=letterbox.url, webhook_events_filter=["completed"])
    await letterbox.hold(1)
    [(headers, body)] = letterbox.letters

    seen = standardwebhooks.Webhook(secret).verify(body.decode(), headers)
    assert seen["status"] == "succeeded"


async def test_the_terminal_webhook_is_tried_again_under_the_same_id(start, letterbox):
    letterbox.answers = [500, 404, 503]
    async with start(QUICK) as client:
        await client.create(webhook=letterbox.url, webhook_events_filter=["completed"])
        await letterbox.hold(4)
        outcomes = (await client.call("GET", "/sandbox/stats")).body["webhooks"]

    assert len({headers["webhook-id"] for headers, _ in letterbox.letters}) == 1
    assert outcomes["retried"] == 3


async def test_it_is_given_up_after_the_window(start, letterbox):
    letterbox.answers = [500] * 20
    async with start(QUICK) as client:
        await client.create(webhook=letterbox.url, webhook_events_filter=["completed"])
        async with asyncio.timeout(5):
            while True:
                stats = (await client.call("GET", "/sandbox/stats")).body
                if stats["webhooks"].get("given_up"):
                    break
                await asyncio.sleep(0.02)

    assert len(letterbox.letters) == 1 + len(RETRY_SHARES)


async def test_other_events_are_sent_once_and_redirects_are_not_followed(
    start, letterbox
):
    letterbox.answers = [500, 301]
    async with start(QUICK) as client:
        await client.fault("prediction.stuck_processing")
        made = await client.create(
            webhook=letterbox.url, webhook_events_filter=["start"]
        )
        await letterbox.hold(1)
        assert (await client.get(made.body["id"]))["status"] == "processing"
        await client.call("DELETE", "/sandbox/faults")
        await client.create(webhook=letterbox.url, webhook_events_filter=["start"])
        await letterbox.hold(2)
        stats = (await client.call("GET", "/sandbox/stats")).body

    assert len(letterbox.letters) == 2
    assert stats["purchases_by_webhook"] == {letterbox.url: 2}


async def test_logs_are_sent_while_it_runs(start, letterbox):
    async with start(replace(QUICK, speed=1)) as client:
        await client.create(webhook=letterbox.url, webhook_events_filter=["logs"])
        await letterbox.hold(1)

    assert json.loads(letterbox.letters[0][1])["logs"].startswith("Using seed: ")


@pytest.mark.parametrize(
    "fault, params, letters",
    [
        ("webhook.lost", {}, 0),
        ("webhook.duplicated", {"copies": 3}, 3),
        ("webhook.late", {"seconds": 0.2}, 1),
        ("webhook.forged", {}, 1),
        ("webhook.unsigned", {}, 1),
    ],
)
async def test_faults_of_webhooks(client, letterbox, fault, params, letters):
    secret = (await client.call("GET", "/v1/webhooks/default/secret")).body["key"]
    await client.fault(fault, params=params, match={"event": "completed"})
    done = await client.finished(
        webhook=letterbox.url, webhook_events_filter=["completed"]
    )
    await letterbox.hold(letters)

    assert done["status"] == "succeeded"
    assert len({headers["webhook-id"] for headers, _ in letterbox.letters}) == min(
        1, letters
    )
    if fault in ("webhook.forged", "webhook.unsigned"):
        [(headers, body)] = letterbox.letters
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(secret).verify(body.decode(), headers)
    if fault == "webhook.lost":
        stats = (await client.call("GET", "/sandbox/stats")).body
        assert stats["webhooks"] == {"lost": 1}
