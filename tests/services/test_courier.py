"""Webhooks arrive: at least once, signed, whatever the receiver does, and delaying nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from redis.asyncio import Redis
from sqlalchemy import func, text, update
from sqlalchemy.ext.asyncio import AsyncEngine
from standardwebhooks import Webhook, WebhookVerificationError

from app.core.counters import SharedCounters
from app.core.guarded_http import GuardedSessions
from app.core.links import LinkSigner
from app.domain.errors import Conflict
from app.domain.policy import Policy
from app.domain.redelivery import SCHEDULE
from app.services import courier as couriers
from app.services import job_service, notifications, outbox, receivers
from app.services.courier import EACH, OWNER, Courier
from app.services.housekeeping import ForgetNotifications
from app.services.job_records import ENDPOINTS
from app.services.ledger import Ledger
from app.services.letters import LONGEST_BODY, Letters, OwnerSecrets
from app.services.media_links import MediaLinks
from app.services.notifications import MOST_RECEIVERS, Dispatch, Receiver, share_out
from app.services.outbound import Outbound
from app.services.outbox import NOTIFICATIONS
from tests.contracts.scripted_server import (
    Reaction,
    ScriptedServer,
    answer,
    close,
    hang,
    raw,
)
from tests.services.test_outbound import Names
from tests.services.test_outbox import OWN, complete
from tests.support.hooks import Hooks, ids_of, verified
from tests.support.jobs import JobTable, new_job
from tests.support.waiting import wait_for_async

OWNER_SECRETS = OwnerSecrets([b"a signing key", b"the one before"])
LINKS = MediaLinks(
    LinkSigner([b"a signing key"], timedelta(minutes=10)),
    public_base_url="https://us.example",
    is_guarded=True,
)
OK = answer(204)
NO = answer(500, b"no")


@pytest.fixture
def hooks(engine: AsyncEngine) -> Hooks:
    return Hooks(engine)


@pytest.fixture
async def web() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer([OK]) as server:
        yield server


Run = Callable[..., Any]


@pytest.fixture
def run(
    engine: AsyncEngine,
    redis_url: str,
    web: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Run a courier while inside; `resolver` is its name server."""
    monkeypatch.setattr(couriers, "ROUND", timedelta(milliseconds=50))

    @asynccontextmanager
    async def running(
        *trusted: str,
        resolver: Names | None = None,
        idle: timedelta = timedelta(seconds=15),
        **options: Any,
    ) -> AsyncIterator[Courier]:
        outbound = Outbound((f"127.0.0.1:{web.port}", *trusted), resolver=resolver)
        outbound.sessions = GuardedSessions(
            max_connections=64, resolver=resolver, idle=idle
        )
        redis = Redis.from_url(redis_url)
        courier = Courier(
            ledger=Ledger(engine, Policy()),
            outbound=outbound,
            letters=Letters(LINKS, OWNER_SECRETS, "/api/v1"),
            counters=SharedCounters(redis),
            **options,
        )
        courier.start()
        try:
            yield courier
        finally:
            await courier.drain(timedelta(0))
            await outbound.aclose()
            await redis.aclose()

    return running


async def settled(hooks: Hooks, **states: int) -> None:
    """Wait until the notifications are in these states, and none is being sent."""

    async def are() -> bool:
        rows = await hooks.written()
        free = all(row.claim_token is None for row in rows)
        return free and await hooks.states() == states

    await wait_for_async(are, within=20, what=f"{states}")


async def tried(hooks: Hooks, count: int) -> None:
    """Wait until each pending notification was tried so often."""

    async def are() -> bool:
        rows = await hooks.written(state="pending")
        done = [
            len(await hooks.tries(row.id)) == count and row.claim_token is None
            for row in rows
        ]
        return bool(done) and all(done)

    await wait_for_async(are, within=20, what=f"{count} tries")


async def end(jobs: JobTable, **fields: Any) -> UUID:
    """Submit a job and cancel it at once."""
    (job_id,) = await jobs.submit(new_job(**fields))
    await jobs.cancel(job_id)
    return job_id


# ------------------------------------------------------------------------- what arrives


async def test_a_webhook_arrives_signed_with_links_and_without_a_prompt(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    endpoint = await hooks.register(f"{web.url}/hook?a=%2F", "job.completed")
    job_id = await complete(jobs, is_public=False, prompt="a secret wish")

    async with run():
        await settled(hooks, delivered=1)

    (request,) = web.requests
    (row,) = await hooks.written()
    assert (request.method, request.target) == ("POST", "/hook?a=%2F")
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == f"msg_{row.id.hex}"
    assert "authorization" not in request.headers
    body = verified(request, endpoint.secret)
    assert body["type"] == "job.completed"
    assert body["timestamp"] == row.created_at.isoformat().replace("+00:00", "Z")
    data = body["data"]
    assert data["job_id"] == str(job_id)
    assert data["version"] == row.job_version
    assert data["links"] == {
        "status": f"https://us.example/api/v1/status/{job_id}",
        "events": f"https://us.example/api/v1/jobs/{job_id}/events",
    }
    (output,) = data["outputs"]
    assert output["url"].startswith("https://us.example/media/ab/abab")
    assert "signature=" in output["url"] and "key" not in output
    assert b"secret wish" not in request.body
    (one,) = await hooks.tries(row.id)
    assert (one.number, one.status_code, one.error) == (1, 204, None)


async def test_a_jobs_own_url_is_signed_with_every_key_of_the_owner(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    await end(jobs, webhook_url=f"{web.url}/own", owner="alice")

    async with run():
        await settled(hooks, delivered=1)

    (request,) = web.requests
    newest, older = OWNER_SECRETS.of("alice")
    for secret in (newest, older):
        assert verified(request, secret)["data"]["status"] == "cancelled"
    for foreign in OWNER_SECRETS.of("bob"):
        with pytest.raises(WebhookVerificationError):
            verified(request, foreign)


async def test_a_new_secret_signs_beside_the_old_one_for_a_day(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    before = await hooks.register(f"{web.url}/hook", "job.cancelled")
    after = await hooks.rotate(before.id)
    await end(jobs)

    async with run():
        await settled(hooks, delivered=1)
        await hooks.age(timedelta(hours=25))
        await end(jobs)
        await settled(hooks, delivered=2)

    during, later = web.requests
    assert len(during.headers["webhook-signature"].split(" ")) == 2
    assert before.secret != after.secret
    verified(during, before.secret)
    verified(during, after.secret)
    verified(later, after.secret)
    with pytest.raises(WebhookVerificationError):
        verified(later, before.secret)


async def test_large_metadata_is_left_out_rather_than_the_webhook(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    url = f"{web.url}/own"
    await end(jobs, webhook_url=url, metadata={"n": "x" * 16_000})
    await end(jobs, webhook_url=url, metadata={"n": "x" * (LONGEST_BODY + 1)})

    async with run():
        await settled(hooks, delivered=2)

    small, large = sorted(web.requests, key=lambda one: -len(one.body))
    assert len(json.loads(small.body)["data"]["metadata"]["n"]) == 16_000
    told = json.loads(large.body)["data"]
    assert (told["metadata"], told["metadata_omitted"]) == ({}, True)
    assert max(len(one.body) for one in web.requests) <= LONGEST_BODY


# ------------------------------------------------------------------- what goes wrong


async def test_down_through_ten_retries_then_up_each_arrives_once(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    endpoint = await hooks.register(f"{web.url}/hook", "job.cancelled")
    expected = [await end(jobs) for _ in range(3)]
    web.will(NO)

    async with run():
        for number in range(1, len(SCHEDULE)):
            await tried(hooks, number)
            if number == len(SCHEDULE) - 1:
                web.will(OK)
            await hooks.make_due()
        await settled(hooks, delivered=3)

    assert len(SCHEDULE) - 1 == 10
    bodies = [verified(request, endpoint.secret) for request in web.requests]
    assert {UUID(body["data"]["job_id"]) for body in bodies} == set(expected)
    assert len(web.requests) == 3 and set(ids_of(web.requests).values()) == {1}
    for row in await hooks.written():
        codes = [one.status_code for one in await hooks.tries(row.id)]
        assert codes == [500] * 10 + [204]
    assert (await hooks.endpoint(endpoint.id)).failing_since is None


async def test_each_try_is_signed_anew_under_the_same_id(
    jobs: JobTable, hooks: Hooks, run: Run
) -> None:
    await end(jobs, webhook_url=OWN)
    taken = await take(hooks)
    letters = Letters(LINKS, OWNER_SECRETS, "/api/v1")
    now = datetime.now(UTC)

    first, second = (letters.write(taken, now + timedelta(seconds=n)) for n in (0, 5))

    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.headers["webhook-timestamp"] != second.headers["webhook-timestamp"]
    for letter in (first, second):
        for secret in OWNER_SECRETS.of("default"):
            Webhook(secret).verify(letter.body, dict(letter.headers))


async def take(hooks: Hooks, lease: timedelta = timedelta(seconds=30)) -> Dispatch:
    """Claim the one notification there is, and never be heard of again."""
    async with hooks.engine.begin() as conn:
        (waiting,) = await notifications.waiting(conn)
        (taken,) = await notifications.claim(conn, {waiting.name: 9}, lease=lease)
    return taken


async def test_after_the_last_try_it_is_given_up(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    endpoint = await hooks.register(f"{web.url}/hook", "job.cancelled")
    await end(jobs)
    web.will(NO)

    async with run():
        for number in range(1, len(SCHEDULE)):
            await tried(hooks, number)
            await hooks.make_due()
        await settled(hooks, failed=1)

    assert len(web.requests) == len(SCHEDULE)
    # It failed for moments only: a clock was turned, not days waited.
    assert (await hooks.endpoint(endpoint.id)).is_enabled


async def test_an_endpoint_that_failed_for_days_is_switched_off(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    endpoint = await hooks.register(f"{web.url}/hook", "job.cancelled")
    await end(jobs)
    await end(jobs)
    web.will(NO)

    async with run():
        await tried(hooks, 1)
        first, second = await hooks.written()
        async with hooks.engine.begin() as conn:  # three days later
            await conn.execute(
                update(ENDPOINTS).values(
                    failing_since=ENDPOINTS.c.failing_since - timedelta(days=3)
                )
            )
            for row, changes in (
                (first, {"attempts": 10, "due_at": func.now()}),
                (second, {"due_at": func.now() + timedelta(hours=1)}),
            ):
                this = update(NOTIFICATIONS).where(NOTIFICATIONS.c.id == row.id)
                await conn.execute(this.values(changes))
        await settled(hooks, failed=1, dropped=1)

    found = await hooks.endpoint(endpoint.id)
    assert (found.is_enabled, found.disabled_reason) == (
        False,
        "Nothing arrived for 3 days.",
    )


@pytest.mark.parametrize(
    ("reaction", "status", "says"),
    [
        (answer(500), 500, "It answered 500."),
        (answer(404), 404, "It answered 404."),
        (
            answer(302, headers={"Location": "/elsewhere"}),
            302,
            "It answered 302: redirects are not followed.",
        ),
        (answer(307, headers={"Location": "/elsewhere"}), 307, "redirects"),
        (close(), None, "The connection broke"),
        (raw(b"SSH-2.0-OpenSSH\r\n"), None, "is no HTTP"),
    ],
)
async def test_what_is_no_success_is_tried_again_and_told_in_words(
    jobs: JobTable,
    hooks: Hooks,
    web: ScriptedServer,
    run: Run,
    reaction: Reaction,
    status: int | None,
    says: str,
) -> None:
    await end(jobs, webhook_url=f"{web.url}/own")
    web.will(reaction)

    async with run():
        await tried(hooks, 1)

    (row,) = await hooks.written()
    (one,) = await hooks.tries(row.id)
    assert one.status_code == status
    assert says in one.error
    assert [request.target for request in web.requests] == ["/own"]
    assert timedelta(seconds=3) < row.due_at - one.at < timedelta(seconds=20)


async def test_a_receiver_nobody_is_at_is_tried_again(
    jobs: JobTable, hooks: Hooks, run: Run
) -> None:
    await end(jobs, webhook_url="http://127.0.0.1:9/own")

    async with run("127.0.0.1:9"):
        await tried(hooks, 1)

    (row,) = await hooks.written()
    (one,) = await hooks.tries(row.id)
    assert one.error == "The connection could not be made."


@pytest.mark.parametrize(
    ("status", "retry_after", "least", "most"),
    [
        (503, "600", 600, 630),
        (503, "999999999", 86_400, 86_430),
        (503, "soon", 4, 20),
        (429, "1", 60, 90),
        (502, None, 60, 90),
        (504, None, 60, 90),
    ],
)
async def test_receivers_say_when_to_come_back(
    jobs: JobTable,
    hooks: Hooks,
    web: ScriptedServer,
    run: Run,
    status: int,
    retry_after: str | None,
    least: float,
    most: float,
) -> None:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    await end(jobs, webhook_url=f"{web.url}/own")
    web.will(answer(status, headers=headers))

    async with run():
        await tried(hooks, 1)

    (row,) = await hooks.written()
    (one,) = await hooks.tries(row.id)
    assert least <= (row.due_at - one.at).total_seconds() <= most


async def test_gone_switches_an_endpoint_off_and_drops_what_waits(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    gone = await hooks.register(f"{web.url}/gone", "job.cancelled")
    other = await hooks.register(f"{web.url}/other", "job.cancelled", owner="bob")
    web.will(NO)
    await end(jobs)
    await end(jobs)

    async with run():
        await tried(hooks, 1)
        web.will(answer(410))
        async with hooks.engine.begin() as conn:  # one of the two is due again
            first = "(SELECT id FROM notifications LIMIT 1)"
            await conn.execute(
                text(f"UPDATE notifications SET due_at = now() WHERE id = {first}")
            )
        await settled(hooks, dropped=2)
        await end(jobs)
        await settled(hooks, dropped=3)

    found = await hooks.endpoint(gone.id)
    assert (found.is_enabled, found.disabled_reason) == (
        False,
        "It answered 410 (Gone).",
    )
    assert (await hooks.endpoint(other.id)).is_enabled
    assert len(web.requests) == 1


async def test_gone_ends_a_webhook_to_a_jobs_own_url(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    await end(jobs, webhook_url=f"{web.url}/own")
    web.will(answer(410))

    async with run():
        await settled(hooks, dropped=1)


@pytest.mark.parametrize(
    "url",
    [
        "https://loopback.example/hook",
        "https://rebinding.example/hook",
        "https://metadata.example/hook",
        "http://127.0.0.1:{port}/hook",
        "https://[::ffff:127.0.0.1]/hook",
    ],
)
async def test_nobody_inside_is_called(
    jobs: JobTable, hooks: Hooks, run: Run, url: str
) -> None:
    """Whatever was accepted once: names change, and so does who is trusted."""
    names = Names(
        loopback_example=[["127.0.0.1"]],
        rebinding_example=[["::ffff:7f00:1"]],
        metadata_example=[["169.254.169.254"]],
    )
    async with ScriptedServer([answer(200, b"the crown jewels")]) as bait:
        await end(jobs, webhook_url=url.format(port=bait.port))
        async with run(resolver=names):
            await tried(hooks, 1)

        assert bait.connections == 0
    (row,) = await hooks.written()
    (one,) = await hooks.tries(row.id)
    assert one.status_code is None
    assert "127.0.0.1" not in one.error and "169.254" not in one.error


async def test_a_receiver_that_says_nothing_is_waited_for_and_no_longer(
    jobs: JobTable,
    hooks: Hooks,
    web: ScriptedServer,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(couriers, "PATIENCE", timedelta(milliseconds=200))
    await end(jobs, webhook_url=f"{web.url}/own")
    web.will(hang())

    async with run():
        await tried(hooks, 1)

    (row,) = await hooks.written()
    (one,) = await hooks.tries(row.id)
    assert (one.status_code, one.error) == (None, "No answer in time.")


async def test_a_receiver_may_think_for_as_long_as_it_is_promised(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    """Longer than others whom we call may be silent."""
    await end(jobs, webhook_url=f"{web.url}/own")

    async def later(request: Any, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        await OK(request, writer)

    web.will(later)
    async with run(idle=timedelta(seconds=0.1)):
        await settled(hooks, delivered=1)

    (row,) = await hooks.written()
    assert row.attempts == 1


async def test_a_success_is_one_however_the_answer_goes_on(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    await end(jobs, webhook_url=f"{web.url}/own")
    web.will(hang(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nsome"))

    async with run():
        await settled(hooks, delivered=1)


# --------------------------------------------------------------------- places and turns


async def test_who_is_slow_keeps_nobody_else_waiting(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    async with ScriptedServer([hang()]) as slow:
        for _ in range(EACH * 3):
            await end(jobs, webhook_url=f"{slow.url}/own")
        async with run(f"127.0.0.1:{slow.port}") as courier:

            async def is_stuck() -> bool:
                return len(slow.requests) == EACH

            await wait_for_async(is_stuck, within=20, what="the slow one is called")
            await end(jobs, webhook_url=f"{web.url}/own")
            await settled_one(hooks)

            assert len(web.requests) == 1
            assert len(slow.requests) == EACH
            assert courier.in_flight == EACH


async def settled_one(hooks: Hooks) -> None:
    async def is_there() -> bool:
        return bool(await hooks.written(state="delivered"))

    await wait_for_async(is_there, within=20, what="the other one arrives")


async def test_an_owner_with_very_many_receivers_hides_nobody(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks
) -> None:
    """However many of one owner's have waited longer, others are among those dealt to."""
    job_ids = await jobs.submit(
        *(
            new_job(owner="alice", webhook_url=f"https://h{number}.example/own")
            for number in range(MOST_RECEIVERS + 1)
        )
    )
    async with engine.begin() as conn:
        cancels = [_cancel(job_id) for job_id in job_ids]
        await job_service.transition(conn, cancels, policy=Policy())
    await hooks.age(timedelta(minutes=1))
    await end(jobs, webhook_url=OWN, owner="bob")

    async with engine.connect() as conn:
        waiting = await notifications.waiting(conn)

    shares = share_out(96, waiting, [], each=EACH, owner=OWNER)
    assert shares["bob own.example"] == EACH
    assert sum(shares.values()) == OWNER + EACH


def test_places_are_dealt_in_rounds_within_bounds() -> None:
    waiting = [Receiver(f"a {n}", "a") for n in range(5)] + [Receiver("b 0", "b")]

    assert share_out(100, waiting, [], each=2, owner=4) == {
        "a 0": 1,
        "a 1": 1,
        "a 2": 1,
        "a 3": 1,
        "b 0": 2,
    }
    assert share_out(3, waiting, [], each=2, owner=9) == {"a 0": 1, "a 1": 1, "a 2": 1}
    busy = [Receiver("b 0", "b"), Receiver("b 0", "b")]
    assert "b 0" not in share_out(100, waiting, busy, each=2, owner=4)
    assert share_out(0, waiting, [], each=2, owner=4) == {}


async def test_two_workers_send_each_once(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    endpoint = await hooks.register(f"{web.url}/hook")
    await jobs.submit(*(new_job() for _ in range(40)))

    async with run(), run():
        await settled(hooks, delivered=40)

    assert set(ids_of(web.requests).values()) == {1}
    assert len(web.requests) == 40
    verified(web.requests[0], endpoint.secret)


async def test_what_was_sent_and_not_settled_is_sent_again_under_its_id(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    await end(jobs, webhook_url=f"{web.url}/own")
    taken = await take(hooks)

    async with run():
        await asyncio.sleep(0.3)  # some rounds
        assert web.requests == []
        await hooks.make_due()
        await settled(hooks, delivered=1)

    (request,) = web.requests
    assert request.headers["webhook-id"] == taken.webhook_id
    (row,) = await hooks.written()
    assert row.attempts == 2
    assert [one.number for one in await hooks.tries(row.id)] == [2]


async def test_one_that_ends_its_worker_each_time_is_given_up(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    await end(jobs, webhook_url=f"{web.url}/own")
    for _ in SCHEDULE:
        await take(hooks, timedelta(0))  # and never a word of it again

    async with run():
        await settled(hooks, failed=1)

    (row,) = await hooks.written()
    assert row.attempts == len(SCHEDULE)
    assert web.requests == []
    await hooks.redeliver(row.id)
    async with run():
        await settled(hooks, delivered=1)


async def test_a_settle_without_its_claim_changes_nothing_but_the_log(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks
) -> None:
    await end(jobs, webhook_url=OWN)
    late = await take(hooks, timedelta(0))
    now = await take(hooks)
    verdict = notifications.Verdict(
        late, "delivered", None, datetime.now(UTC), 0.1, 200, None
    )

    async with engine.begin() as conn:
        assert await notifications.settle(conn, [verdict]) == set()

    (row,) = await hooks.written()
    assert (row.state, row.claim_token) == ("pending", now.token)
    assert [one.number for one in await hooks.tries(row.id)] == [1]


async def test_a_wake_is_faster_than_the_round(
    engine: AsyncEngine,
    jobs: JobTable,
    hooks: Hooks,
    web: ScriptedServer,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(couriers, "ROUND", timedelta(hours=1))
    (job_id,) = await jobs.submit(new_job(webhook_url=f"{web.url}/own"))
    ledger = Ledger(engine, Policy())
    async with run() as courier:
        ledger.on_told = courier.wake
        await asyncio.sleep(0.2)  # it has looked, and rests for an hour

        await ledger.change(_cancel(job_id))

        await settled(hooks, delivered=1)


def _cancel(job_id: UUID) -> job_service.Change:
    from app.domain.events import CancelRequested

    return job_service.Change(job_id, CancelRequested())


async def test_draining_waits_for_answers_and_takes_nothing_more(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    release = asyncio.Event()

    async def later(request: Any, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await OK(request, writer)

    web.will(later)
    await end(jobs, webhook_url=f"{web.url}/own")
    async with run() as courier:

        async def is_called() -> bool:
            return len(web.requests) == 1

        await wait_for_async(is_called, within=20, what="the call")
        draining = asyncio.create_task(courier.drain(timedelta(seconds=20)))
        await asyncio.sleep(0.1)
        await end(jobs, webhook_url=f"{web.url}/own")
        assert not draining.done()
        release.set()
        await draining

    assert await hooks.states() == {"delivered": 1, "pending": 1}
    assert len(web.requests) == 1


async def test_a_database_that_goes_away_is_outlived(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    await end(jobs, webhook_url=f"{web.url}/own")
    async with engine.begin() as conn:
        await conn.execute(text("ALTER TABLE notifications RENAME TO away"))
    async with run():
        await asyncio.sleep(0.2)
        async with engine.begin() as conn:
            await conn.execute(text("ALTER TABLE away RENAME TO notifications"))

        await settled(hooks, delivered=1)


# ---------------------------------------------------------------------- endpoints change


async def test_a_switched_off_or_removed_endpoint_is_sent_nothing(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    off = await hooks.register(f"{web.url}/off", "job.cancelled")
    await end(jobs)
    await hooks.change(off.id, is_enabled=False)

    assert await hooks.states() == {"dropped": 1}
    # A change that was under way at that moment left one behind.
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "UPDATE notifications SET state = 'pending', due_at = now(),"
                " finished_at = NULL"
            )
        )
    async with run():
        await settled(hooks, dropped=1)
    (row,) = await hooks.written()
    assert row.attempts == 0
    assert web.requests == []


async def test_much_that_is_pending_is_dropped_bit_by_bit(
    jobs: JobTable,
    hooks: Hooks,
    web: ScriptedServer,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever switches an endpoint off waits for a part of it; the courier drops the rest."""
    monkeypatch.setattr(outbox, "DROPPED_AT_ONCE", 10)
    endpoint = await hooks.register(f"{web.url}/hook", "job.created")
    await jobs.submit(*(new_job() for _ in range(60)))

    await hooks.change(endpoint.id, is_enabled=False)

    assert await hooks.states() == {"dropped": 10, "pending": 50}
    web.will(OK)
    async with run(places=2):
        await hooks.test(endpoint)
        await settled(hooks, dropped=60, delivered=1)
    assert len(web.requests) == 1


async def test_a_test_is_tried_once_also_when_the_endpoint_is_off(
    hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    endpoint = await hooks.register(f"{web.url}/hook", enabled=False)
    web.will(OK, NO)

    async with run():
        await hooks.test(endpoint)
        await settled(hooks, delivered=1)
        await hooks.test(endpoint)
        await settled(hooks, delivered=1, failed=1)

    assert verified(web.requests[0], endpoint.secret)["type"] == "webhook.test"
    assert len(web.requests) == 2


async def test_a_test_of_an_endpoint_that_is_gone_goes_nowhere(
    engine: AsyncEngine, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    endpoint = await hooks.register(f"{web.url}/hook")
    async with engine.begin() as conn:
        await receivers.remove(conn, endpoint.id, realm=None)
    # It was being written while the endpoint was removed.
    made = await hooks.test(endpoint)

    async with run():
        await settled(hooks, dropped=1)

    (row,) = await hooks.written()
    assert row.attempts == 0
    with pytest.raises(Conflict):
        await hooks.redeliver(made)
    assert web.requests == []


async def test_asked_for_again_it_has_all_its_tries_again(
    jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    await end(jobs, webhook_url=f"{web.url}/own")
    async with run():
        await settled(hooks, delivered=1)
        (row,) = await hooks.written()
        web.will(NO)
        await hooks.redeliver(row.id)
        await tried(hooks, 2)
        web.will(OK)
        await hooks.make_due()
        await settled(hooks, delivered=1)

    (row,) = await hooks.written()
    assert (row.attempts, row.tried_before) == (3, 1)


async def test_what_ended_a_month_ago_is_forgotten_with_its_tries(
    engine: AsyncEngine, jobs: JobTable, hooks: Hooks, web: ScriptedServer, run: Run
) -> None:
    await end(jobs, webhook_url=f"{web.url}/own")
    async with run():
        await settled(hooks, delivered=1)
    (old,) = await hooks.written()
    await hooks.age(timedelta(days=31))
    await end(jobs, webhook_url=f"{web.url}/own")
    duty = ForgetNotifications(Ledger(engine, Policy()))

    await duty.perform()

    assert [row.state for row in await hooks.written()] == ["pending"]
    assert await hooks.tries(old.id) == []
