"""The provider's webhooks: a hint when genuine, nothing at all when not, and never a 5xx."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as configured
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine

from app.api.callbacks import BODY_LIMIT
from app.domain.events import GenerationCancelled, OutcomeUnknown, Progressed, Started
from app.embedded import Valkey
from app.services import webhook_signatures
from app.services.callback_urls import callback_url
from app.services.job_records import Claim
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.served import Api, check_problem, provided, working
from tests.api.test_metrics import scrape, value
from tests.contracts.scripted_server import (
    Reaction,
    ScriptedServer,
    answer,
    answer_json,
    hang,
)
from tests.support.jobs import JobTable
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for_async
from tests.support.webhooks import OTHER_SECRET, SECRET, Letter, letter_to, prediction

PROMISE = 2.0 + 0.6  # seconds to an answer whatever is down; see test_outages.py


@pytest.fixture(scope="module")
async def shared_sandbox() -> AsyncIterator[Sandbox]:
    """A provider that signs with the secret of our letters."""
    async with provided(webhook_secret=SECRET) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Sandbox:
    return shared_sandbox


@pytest.fixture
async def api(shared: Api, sandbox: Sandbox) -> Api:
    await shared.app.state.runtime.counters.push()  # what the test before counted
    return await emptied(shared, sandbox)


@pytest.fixture
def database_url(shared: Api) -> str:
    """The API's database, so that `jobs` are its jobs."""
    return shared.settings.database_url.get_secret_value()


@pytest.fixture
def redis_url(valkey: Valkey) -> str:
    """A Redis without what the shared API counts."""
    url = f"{valkey.url.rpartition('/')[0]}/1"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
async def jobs(engine: AsyncEngine) -> JobTable:
    """The API's jobs: none yet."""
    table = JobTable(engine)
    await table.wipe()
    return table


async def send(api: Api, letter: Letter) -> httpx.Response:
    """Send a webhook.  What opens doors in it must not be found in any log."""
    api.contract.said |= {one for one in (letter.token, letter.signature) if one}
    answer = await api.client.post(
        letter.path,
        params={"token": letter.token},
        content=letter.body,
        headers=letter.signed(),
    )
    assert answer.status_code < 500, answer.text
    return answer


async def outcomes(api: Api) -> Mapping[str, float]:
    """Give what was counted."""
    found = (await scrape(api))["mgs_provider_webhooks"]
    return {one.labels["outcome"]: one.value for one in found.samples if one.value}


async def generating(jobs: JobTable, handle: str) -> Claim:
    """Have a job at the provider whose next look is a minute away; give the purchase."""
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, Started(handle))
    await jobs.age(timedelta(minutes=-1), job_id)
    return claim


async def is_due(jobs: JobTable, claim: Claim) -> bool:
    row = await jobs.row(claim.job_id)
    return bool(row.due_at is not None and row.due_at <= row.now)


# ------------------------------------------------------------------------------ genuine


@pytest.mark.parametrize("status", ["succeeded", "failed", "aborted", "canceled"])
async def test_a_webhook_makes_its_job_due_and_rings(
    api: Api, jobs: JobTable, status: str
) -> None:
    claim = await generating(jobs, "pred1")
    other = await generating(jobs, "pred2")
    untouched = await jobs.snapshot(other.job_id)
    assert not await is_due(jobs, claim)

    answer = await send(api, letter_to(claim, "pred1", status))

    assert (answer.status_code, answer.content) == (204, b"")
    assert await is_due(jobs, claim)
    assert await jobs.snapshot(other.job_id) == untouched
    assert await outcomes(api) == {"accepted": 1}

    async def has_rung() -> bool:
        rung = await api.app.state.runtime.redis.lrange("mediagen", 0, -1)
        return any(str(claim.job_id) in _arguments(message) for message in rung)

    await wait_for_async(has_rung, within=5, what="the bell")


def _arguments(message: bytes) -> str:
    return base64.b64decode(json.loads(message)["body"]).decode()


async def test_what_it_says_is_not_believed(api: Api, jobs: JobTable) -> None:
    claim = await generating(jobs, "pred1")
    before = await jobs.row(claim.job_id)
    letter = letter_to(claim, "pred1")

    await send(
        api,
        letter.but(body=prediction("pred1", output=["https://evil.example/a.png"])),
    )

    after = await jobs.row(claim.job_id)
    assert (after.status, after.stage, after.version) == (
        *(before.status, before.stage, before.version),
    )


async def test_a_purchase_of_unknown_fate_is_adopted(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, OutcomeUnknown("no answer"))

    assert (await send(api, letter_to(claim, "pred1", "starting"))).status_code == 204

    row = await jobs.row(job_id)
    assert (row.stage, row.attempt_handle) == ("generating", "pred1")
    assert row.attempts == 1
    assert await outcomes(api) == {"accepted": 1}


async def test_a_prediction_of_another_attempt_is_not_adopted(
    api: Api, jobs: JobTable
) -> None:
    owner = await generating(jobs, "pred1")
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, OutcomeUnknown("no answer"))

    await send(api, letter_to(claim, "pred1"))

    assert (await jobs.row(job_id)).attempt_handle is None
    assert (await jobs.row(owner.job_id)).attempt_handle == "pred1"


async def test_a_finished_job_stays_as_it_is(api: Api, jobs: JobTable) -> None:
    claim = await generating(jobs, "pred1")
    await jobs.cancel(claim.job_id)
    await jobs.look(claim.job_id, GenerationCancelled())
    before = await jobs.snapshot(claim.job_id)

    assert (await send(api, letter_to(claim, "pred1"))).status_code == 204

    assert await jobs.snapshot(claim.job_id) == before
    assert await outcomes(api) == {"needless": 1}


# -------------------------------------------------------------------- again, and too late


async def quiet(jobs: JobTable, claim: Claim) -> dict[str, Any]:
    """Let a look find nothing new; give everything stored about the job."""
    await jobs.look(claim.job_id, Progressed())
    await jobs.age(timedelta(minutes=-1), claim.job_id)
    assert not await is_due(jobs, claim)
    return await jobs.snapshot(claim.job_id)


async def test_a_duplicate_is_taken_and_changes_nothing(
    api: Api, jobs: JobTable
) -> None:
    claim = await generating(jobs, "pred1")
    letter = letter_to(claim, "pred1")
    await send(api, letter)
    before = await quiet(jobs, claim)

    again = [
        await send(api, letter),
        # The provider signs every try anew.
        await send(api, letter.but(at=letter.at + 1)),
    ]

    assert [one.status_code for one in again] == [204, 204]
    assert await jobs.snapshot(claim.job_id) == before
    assert await outcomes(api) == {"accepted": 1, "duplicate": 2}


async def test_another_process_knows_a_duplicate(
    api: Api, jobs: JobTable, serve: Serve, sandbox: Sandbox
) -> None:
    other: Api = await serve(sandbox, redis_url=api.settings.redis_url)
    claim = await generating(jobs, "pred1")
    letter = letter_to(claim, "pred1")
    await send(api, letter)
    before = await quiet(jobs, claim)

    assert (await send(other, letter)).status_code == 204

    assert await jobs.snapshot(claim.job_id) == before
    names = await api.app.state.runtime.redis.keys("mediagen:webhooks:*")
    assert names and not [name for name in names if letter.token in name.decode()]


async def test_many_copies_at_once_are_one_hint(api: Api, jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, OutcomeUnknown("no answer"))
    letter = letter_to(claim, "pred1")

    answers = await asyncio.gather(*(send(api, letter) for _ in range(20)))

    assert {one.status_code for one in answers} == {204}
    names = [event.name for event in await jobs.events(job_id)]
    assert len(names) == len(set(names))
    assert (await jobs.row(job_id)).attempt_handle == "pred1"


async def test_the_order_does_not_matter(api: Api, jobs: JobTable) -> None:
    seen = []
    for order in (("starting", "succeeded"), ("succeeded", "starting")):
        claim = await generating(jobs, f"pred{len(seen)}")
        for status in order:
            letter = letter_to(claim, f"pred{len(seen)}", status)
            assert (await send(api, letter)).status_code == 204
        row = await jobs.row(claim.job_id)
        seen.append((row.status, row.stage, row.version, await is_due(jobs, claim)))

    assert seen[0] == seen[1] == ("processing", "generating", 3, True)


# ------------------------------------------------------------------------------ refused

Spoil = Callable[[Letter], Letter]

BAD: Mapping[str, tuple[Spoil, int, str]] = {
    "no signature": (
        lambda one: one.but(headers={"webhook-signature": None}),
        *(401, "unsigned"),
    ),
    "no headers at all": (
        lambda one: one.but(
            headers={
                "webhook-signature": None,
                "webhook-id": None,
                "webhook-timestamp": None,
            }
        ),
        *(401, "unsigned"),
    ),
    "no id": (lambda one: one.but(headers={"webhook-id": None}), 401, "unsigned"),
    "a strange id": (lambda one: one.but(id="a b"), 401, "unsigned"),
    "no time": (
        lambda one: one.but(headers={"webhook-timestamp": None}),
        *(401, "unsigned"),
    ),
    "a time that is none": (
        lambda one: one.but(headers={"webhook-timestamp": "soon"}),
        *(401, "unsigned"),
    ),
    "a negative time": (
        lambda one: one.but(headers={"webhook-timestamp": "-1"}),
        *(401, "unsigned"),
    ),
    "a signature of rubbish": (
        lambda one: one.but(headers={"webhook-signature": "v1,%%%, v1, ,"}),
        *(401, "unsigned"),
    ),
    "bytes in a header": (
        lambda one: one.but(headers={"webhook-signature": b"v1,\xff\xfe"}),
        *(401, "unsigned"),
    ),
    "another scheme": (
        lambda one: one.but(headers={"webhook-signature": f"v1a,{one.signature[3:]}"}),
        *(401, "unsigned"),
    ),
    "from long ago": (lambda one: one.but(at=one.at - 360), 401, "stale"),
    "from the future": (lambda one: one.but(at=one.at + 360), 401, "stale"),
    "a replay with a new time": (
        lambda one: one.but(
            headers={
                "webhook-timestamp": str(int(one.at) - 2),
                "webhook-signature": one.signature,
            }
        ),
        *(401, "forged"),
    ),
    "signed by somebody else": (
        lambda one: one.but(secret=OTHER_SECRET),
        *(401, "forged"),
    ),
    "a tampered body": (
        lambda one: one.tampered(one.body.replace(b"succeeded", b"canceled")),
        *(401, "forged"),
    ),
    "a body with a byte more": (
        lambda one: one.tampered(one.body + b"\n"),
        *(401, "forged"),
    ),
    "no body": (lambda one: one.tampered(b""), 401, "forged"),
    "a signature for another id": (
        lambda one: one.but(
            id="msg_other", headers={"webhook-signature": one.signature}
        ),
        *(401, "forged"),
    ),
    "no text": (lambda one: one.but(body=b"\xff\xfe\x00"), 401, "forged"),
    "no json": (lambda one: one.but(body=b"{"), 400, "malformed"),
    "no object": (lambda one: one.but(body=b"[1]"), 400, "malformed"),
    "nothing, signed": (lambda one: one.but(body=b""), 400, "malformed"),
    "deep json": (lambda one: one.but(body=b"[" * 100_000), 400, "malformed"),
    "no prediction id": (
        lambda one: one.but(body=b'{"status": "succeeded"}'),
        *(400, "malformed"),
    ),
    "an id that is none": (
        lambda one: one.but(body=b'{"id": "../../etc", "status": "succeeded"}'),
        *(400, "malformed"),
    ),
    "an unknown attempt": (
        lambda one: one.but(attempt_id=str(uuid4())),
        *(404, "unknown"),
    ),
    "no attempt's id": (lambda one: one.but(attempt_id="mine"), 404, "unknown"),
    "another token": (lambda one: one.but(token="x" * 32), 404, "unknown"),
    "no token": (lambda one: one.but(token=""), 404, "unknown"),
    "part of the token": (
        lambda one: one.but(token=one.token[:-1]),
        *(404, "unknown"),
    ),
    "a token of other letters": (
        lambda one: one.but(token=one.token[:-2] + "é\x00"),
        *(404, "unknown"),
    ),
    "too large": (
        lambda one: one.but(body=one.body.ljust(BODY_LIMIT + 1)),
        *(413, "oversized"),
    ),
}


@pytest.mark.parametrize(("spoil", "status", "outcome"), BAD.values(), ids=BAD)
async def test_what_is_not_right_is_refused_counted_and_without_effect(
    api: Api, jobs: JobTable, spoil: Spoil, status: int, outcome: str
) -> None:
    claim = await generating(jobs, "pred1")
    before = await jobs.snapshot(claim.job_id)

    answer = await send(api, spoil(letter_to(claim, "pred1")))

    assert answer.status_code == status
    check_problem(answer)
    assert await jobs.snapshot(claim.job_id) == before
    assert await outcomes(api) == {outcome: 1}
    # The one it was made from is taken: nothing but the spoiling was wrong.
    assert (await send(api, letter_to(claim, "pred1"))).status_code == 204
    assert await is_due(jobs, claim)


async def test_the_token_of_one_attempt_is_none_for_another(
    api: Api, jobs: JobTable
) -> None:
    mine, other = await generating(jobs, "pred1"), await generating(jobs, "pred2")
    letter = letter_to(mine, "pred1")
    assert (await send(api, letter)).status_code == 204

    assert other.attempt_token is not None
    crossed = letter_to(other, "pred1").but(token=letter.token)
    wrong_token = letter.but(token=other.attempt_token)

    for one in (crossed, wrong_token):  # the second under an id that is known already
        assert (await send(api, one)).status_code == 404
    assert not await is_due(jobs, other)


async def test_a_large_prediction_is_taken(api: Api, jobs: JobTable) -> None:
    claim = await generating(jobs, "pred1")
    letter = letter_to(claim, "pred1")
    body = prediction("pred1", logs="")
    full = prediction("pred1", logs="x" * (BODY_LIMIT - len(body)))
    assert len(full) == BODY_LIMIT

    assert (await send(api, letter.but(body=full))).status_code == 204


async def test_a_body_that_hides_its_length_is_cut_off(
    api: Api, jobs: JobTable
) -> None:
    claim = await generating(jobs, "pred1")
    letter = letter_to(claim, "pred1")
    sent = 0

    async def trickle() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(2 * BODY_LIMIT // 65536):
            sent += 65536
            yield b" " * 65536

    answer = await api.client.post(
        letter.path,
        params={"token": letter.token},
        content=trickle(),
        headers=letter.signed(),
    )

    assert answer.status_code == 413
    assert check_problem(answer).code == "body_too_large"
    assert await outcomes(api) == {"oversized": 1}


async def test_a_chunked_body_is_as_good_as_any(api: Api, jobs: JobTable) -> None:
    claim = await generating(jobs, "pred1")
    letter = letter_to(claim, "pred1")

    async def pieces() -> AsyncIterator[bytes]:
        for byte in letter.body:
            yield bytes((byte,))

    answer = await api.client.post(
        letter.path,
        params={"token": letter.token},
        content=pieces(),
        headers=letter.signed(),
    )

    assert answer.status_code == 204
    assert await is_due(jobs, claim)


async def test_a_body_that_breaks_off_is_no_mistake_of_ours(
    api: Api, jobs: JobTable
) -> None:
    claim = await generating(jobs, "pred1")
    letter = letter_to(claim, "pred1")
    origin = urlsplit(api.origin)
    assert origin.hostname is not None and origin.port is not None
    head = f"POST {letter.path}?token={letter.token} HTTP/1.1\r\nhost: here\r\n"
    head += "".join(f"{name}: {text}\r\n" for name, text in letter.signed().items())
    head += f"content-length: {len(letter.body) + 1}\r\n\r\n"

    _, writer = await asyncio.open_connection(origin.hostname, origin.port)
    writer.write(head.encode() + letter.body)
    await writer.drain()
    writer.close()
    await writer.wait_closed()

    async def is_counted() -> bool:
        return await outcomes(api) == {"malformed": 1}

    await wait_for_async(is_counted, within=5, what="the count")
    assert not await is_due(jobs, claim)
    found = await scrape(api)
    assert value(found, "mgs_http_requests_total", code="500") == 0


@given(
    body=st.one_of(
        st.binary(max_size=200),
        st.dictionaries(
            st.sampled_from(("id", "status", "error", "logs", "output", "metrics")),
            st.recursive(
                st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=8,
            ),
        ).map(lambda value: json.dumps(value).encode()),
    ),
    headers=st.dictionaries(
        st.sampled_from(
            ("webhook-id", "webhook-timestamp", "webhook-signature", "content-type")
        ),
        st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=60).map(
            lambda text: text.encode("latin-1")
        ),
    ),
    token=st.one_of(st.none(), st.text(max_size=40)),
    secret=st.sampled_from((SECRET, OTHER_SECRET)),
)
@configured(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)
async def test_whatever_is_sent_it_is_never_our_mistake(
    shared: Api,
    body: bytes,
    headers: dict[str, bytes],
    token: str | None,
    secret: str,
) -> None:
    letter = Letter(str(uuid4()), "", body, secret=secret, headers=headers)
    signed = letter.signed()
    query = {} if token is None else {"token": token}

    # Not the client that knows the contract: the server itself refuses some of these.
    async with httpx.AsyncClient(base_url=shared.origin, verify=False) as client:
        answer = await client.post(
            letter.path, params=query, content=body, headers=signed
        )

    assert 400 <= answer.status_code < 500


async def test_the_door_is_in_the_log_and_what_opens_it_is_not(
    api: Api, jobs: JobTable
) -> None:
    claim = await generating(jobs, "pred1")
    letter = letter_to(claim, "pred1")

    await send(api, letter)
    await send(api, letter.but(token="guessed-and-wrong-but-long-enough"))

    assert api.settings.log_dir is not None
    text = (api.settings.log_dir / "api.log").read_text()
    assert f"POST {letter.path}" in text
    assert letter.token not in text and "guessed" not in text
    assert letter.signature not in text


# --------------------------------------------------------------------------- the secret


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer() as server:
        yield server


def asks(provider: ScriptedServer) -> dict[str, Any]:
    return {"replicate_api_base_url": f"{provider.url}/v1"}


async def test_the_secret_is_asked_for_and_its_change_is_survived(
    serve: Serve,
    jobs: JobTable,
    provider: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhook_signatures, "FETCH_PAUSE", timedelta(0))
    provider.will(
        answer_json(200, {"key": OTHER_SECRET}), answer_json(200, {"key": SECRET})
    )
    api: Api = await serve(**asks(provider))
    claim = await generating(jobs, "pred1")

    def letters() -> tuple[Letter, Letter]:
        letter = letter_to(claim, "pred1")
        return letter.but(secret=OTHER_SECRET), letter.but(id=letter.id + "n")

    for number in range(2):
        old, new = letters()
        assert (await send(api, old)).status_code == 204
        if number == 0:
            (asked,) = provider.requests
            assert asked.target == "/v1/webhooks/default/secret"
        assert (await send(api, new)).status_code == 204

    assert len(provider.requests) == 2
    assert set(await outcomes(api)) == {"accepted", "needless"}


async def test_forgers_cannot_make_us_ask_again_and_again(
    serve: Serve, jobs: JobTable, provider: ScriptedServer
) -> None:
    provider.will(answer_json(200, {"key": SECRET}))
    api: Api = await serve(**asks(provider))
    claim = await generating(jobs, "pred1")
    forged = letter_to(claim, "pred1").but(secret=OTHER_SECRET)

    for _ in range(3):
        answers = await asyncio.gather(*(send(api, forged) for _ in range(20)))
        assert {check_problem(one).code for one in answers} == {"webhook_forged"}

    assert len(provider.requests) == 1
    assert (await send(api, letter_to(claim, "pred1"))).status_code == 204


async def test_with_a_secret_in_the_settings_nobody_is_asked(
    serve: Serve, jobs: JobTable, provider: ScriptedServer
) -> None:
    provider.will(answer_json(200, {"key": OTHER_SECRET}))
    api: Api = await serve(**asks(provider), replicate_webhook_secret=SECRET)
    claim = await generating(jobs, "pred1")
    letter = letter_to(claim, "pred1")

    assert (await send(api, letter.but(secret=OTHER_SECRET))).status_code == 401
    assert (await send(api, letter)).status_code == 204

    assert provider.requests == []


@pytest.mark.parametrize(
    "reaction",
    [
        answer(500, b"<html>"),
        answer(401, b"{}"),
        answer(404, b"{}"),
        answer_json(200, {"key": "whsec_"}),
        hang(),
    ],
    ids=["500", "401", "404", "no secret", "no answer"],
)
async def test_without_the_secret_nothing_is_taken_and_all_may_come_again(
    serve: Serve, jobs: JobTable, provider: ScriptedServer, reaction: Reaction
) -> None:
    provider.will(reaction)
    api: Api = await serve(**asks(provider))
    claim = await generating(jobs, "pred1")
    began = time.monotonic()

    answers = [await send(api, letter_to(claim, "pred1"))]
    answers += await asyncio.gather(
        *(send(api, letter_to(claim, "pred1")) for _ in range(5))
    )

    patience = webhook_signatures.FETCH_PATIENCE.total_seconds()
    assert time.monotonic() - began < patience + 1
    for one in answers:
        assert one.status_code == 401
        problem = check_problem(one)
        assert (problem.code, problem.retryable) == ("webhook_secret_unknown", True)
    assert len(provider.requests) == 1
    assert not await is_due(jobs, claim)
    assert await outcomes(api) == {"secret_unknown": 6}


# ------------------------------------------------------------------------------ outages


@pytest.mark.parametrize("outage", ["refuse", "fall_silent"])
async def test_without_the_database_it_is_to_come_again(
    serve: Serve, sandbox: Sandbox, jobs: JobTable, database_url: str, outage: str
) -> None:
    async with wired(database_url) as (wire, url):
        api: Api = await serve(sandbox, database_url=url)
        claim = await generating(jobs, "pred1")
        letter = letter_to(claim, "pred1")
        await send(api, letter.but(id="msg_first"))
        await quiet(jobs, claim)

        await getattr(wire, outage)()
        answers = await asyncio.gather(*(send(api, letter) for _ in range(5)))

        for one in answers:
            assert one.elapsed.total_seconds() < PROMISE
            assert one.status_code == 429
            problem = check_problem(one)
            assert (problem.code, problem.retryable) == ("webhook_not_taken", True)
        await wire.restore()

        async def is_taken() -> bool:
            return (await send(api, letter)).status_code == 204

        await wait_for_async(is_taken, within=10, what="the way back", every=0.1)
        assert await is_due(jobs, claim), "what was refused is no duplicate"
        assert "duplicate" not in await outcomes(api)


@pytest.mark.parametrize("outage", ["refuse", "fall_silent"])
async def test_without_redis_it_is_taken_all_the_same(
    serve: Serve, sandbox: Sandbox, jobs: JobTable, redis_url: str, outage: str
) -> None:
    async with wired(redis_url) as (wire, url):
        api: Api = await serve(sandbox, redis_url=url, replicate_webhook_secret=SECRET)
        await getattr(wire, outage)()
        claim = await generating(jobs, "pred1")
        letter = letter_to(claim, "pred1")

        first = await send(api, letter)
        assert await is_due(jobs, claim)
        before = await quiet(jobs, claim)
        again = await send(api, letter)

        assert (first.status_code, again.status_code) == (204, 204)
        assert first.elapsed.total_seconds() < PROMISE
        assert await jobs.snapshot(claim.job_id) == before, "known in this process"
        await wire.restore()


@asynccontextmanager
async def wired(url: str) -> AsyncIterator[tuple[TcpProxy, str]]:
    """Put a wire in front of a server; give it and the address that leads through it."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    login = parts.netloc.rpartition("@")[0]
    async with TcpProxy(parts.hostname, parts.port) as wire:
        here = f"127.0.0.1:{wire.port}"
        netloc = f"{login}@{here}" if login else here
        yield wire, parts._replace(netloc=netloc).geturl()


# --------------------------------------------------------------------------- end to end

NEVER = timedelta(hours=1)


@asynccontextmanager
async def hardly_looking(api: Api) -> AsyncIterator[None]:
    """Run a worker that asks for webhooks, and would look by itself in an hour only."""
    settings = api.settings.model_copy(update={"public_base_url": api.origin})
    async with working(settings) as worker:
        ledger = worker.base.ledger
        ledger.policy = replace(ledger.policy, shortest_look=NEVER, longest_look=NEVER)
        yield


async def test_a_job_is_completed_by_webhooks_alone(
    serve: Serve, jobs: JobTable
) -> None:
    async with provided(speed=4.0) as sandbox:
        api: Api = await serve(sandbox)
        async with hardly_looking(api):
            ids = [(await api.generate(f"mill number {n}")).job_id for n in range(5)]

            for job_id in ids:
                assert (await api.finished(job_id)).status == "completed"

        stats = (await fetched(f"{sandbox.url}/sandbox/stats"))["purchases_by_webhook"]
    assert len(stats) == 5
    attempts = [(await jobs.attempts(job_id))[0] for job_id in ids]
    assert set(stats) == {
        callback_url(f"{api.origin}/api/v1", one.id, one.token) for one in attempts
    }
    assert (await outcomes(api)).get("accepted", 0) >= 5


async def fetched(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(verify=False) as client:
        body: dict[str, Any] = (await client.get(url)).json()
        return body
