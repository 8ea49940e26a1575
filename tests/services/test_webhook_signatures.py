"""Who sent it: signatures, clocks, and a secret that changes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from datetime import datetime, timedelta, tzinfo
from typing import Any, Self

import pytest
import standardwebhooks.webhooks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain.errors import ProviderUnavailable
from app.services.webhook_signatures import (
    FETCH_PAUSE,
    TOLERANCE,
    SignatureCheck,
    SigningSecret,
    Verdict,
)
from tests.support.webhooks import OTHER_SECRET, SECRET, Letter

NOW = 1_795_340_000
BODY = b'{"id":"p1","status":"succeeded"}'

# Published with the scheme, and made by hand for a body of this provider.
VECTORS = {
    "published": (
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    ),
    "a prediction": (
        "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX",
        "msg_01hzy8m3s4t5u6v7w8x9y0z1a2",
        1795340000,
        b'{"id":"ufawqhfynnddngldkgtslldrkq","status":"succeeded","output":'
        b'["https://replicate.delivery/xezq/abc/out-0.webp"]}',
        "v1,p0hxMC+B7+flOm3oKtEdWDbw3ebH6UJ6KIOd10vSWzQ=",
    ),
}


class Time:
    """A clock that stands, for us and for the library."""

    now: float = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(clock.now, tz=tz)

    monkeypatch.setattr(standardwebhooks.webhooks, "datetime", Frozen)
    return clock


class Provider:
    """Gives its secret, and counts how often it was asked."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> str:
        self.asked += 1
        await self.gate.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def check_of(
    clock: Time, provider: Provider | None = None, given: str | None = None, **more: Any
) -> SignatureCheck:
    fetch = provider or Provider(AssertionError("nothing is to be fetched"))
    return SignatureCheck(SigningSecret(given, fetch, clock=clock, **more), clock=clock)


def letter(**changes: Any) -> Letter:
    return Letter("", "", BODY, at=NOW).but(**changes)


async def judge(check: SignatureCheck, letter: Letter) -> Verdict:
    headers: Mapping[str, Any] = letter.signed()
    return await check.judge(headers, letter.body)


# ------------------------------------------------------------------------- signatures


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("away", [0, 300, -300])
async def test_known_signatures_are_right(
    clock: Time, vector: tuple[str, str, int, bytes, str], away: int
) -> None:
    secret, message_id, timestamp, body, signature = vector
    clock.now = timestamp + away
    headers = {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature,
    }
    check = check_of(clock, given=secret)

    assert await check.judge(headers, body) is Verdict.GENUINE
    assert await check.judge(headers, body + b" ") is Verdict.FORGED


def _other(text: str) -> str:
    return base64.b64encode(text.encode().ljust(32)).decode()


GOOD = letter()
VERDICTS: Mapping[str, tuple[Letter, Verdict]] = {
    "as sent": (GOOD, Verdict.GENUINE),
    "at the edge of the past": (letter(at=NOW - 300), Verdict.GENUINE),
    "at the edge of the future": (letter(at=NOW + 300), Verdict.GENUINE),
    "among others": (
        GOOD.but(
            headers={
                "webhook-signature": f"v1a,{_other('x')} v1,{_other('y')} v1,short"
                f" junk {GOOD.signature} v2,a,b"
            }
        ),
        Verdict.GENUINE,
    ),
    "too old": (letter(at=NOW - 301), Verdict.STALE),
    "too new": (letter(at=NOW + 301), Verdict.STALE),
    "of milliseconds": (letter(at=NOW * 1000), Verdict.STALE),
    "of another time": (
        GOOD.but(headers={"webhook-timestamp": str(NOW + 1)}),
        Verdict.FORGED,
    ),
    "of another id": (GOOD.but(headers={"webhook-id": "msg_2"}), Verdict.FORGED),
    "of another secret": (letter(secret=OTHER_SECRET), Verdict.FORGED),
    "of another body": (GOOD.tampered(BODY + b" "), Verdict.FORGED),
    "of a body that is no text": (letter(body=b"\xff\xfe"), Verdict.FORGED),
    "of an empty body": (GOOD.tampered(b""), Verdict.FORGED),
    "of the asymmetric kind only": (
        GOOD.but(headers={"webhook-signature": f"v1a,{_other('x')}"}),
        Verdict.UNSIGNED,
    ),
    "cut short": (
        GOOD.but(headers={"webhook-signature": GOOD.signature[:-1]}),
        Verdict.UNSIGNED,
    ),
    "without its version": (
        GOOD.but(headers={"webhook-signature": GOOD.signature[3:]}),
        Verdict.UNSIGNED,
    ),
    "not signed": (GOOD.but(headers={"webhook-signature": None}), Verdict.UNSIGNED),
    "without an id": (GOOD.but(headers={"webhook-id": None}), Verdict.UNSIGNED),
    "with an empty id": (letter(id=""), Verdict.UNSIGNED),
    "with a dot in its id": (letter(id=f"a.{NOW}"), Verdict.UNSIGNED),
    "with a long id": (letter(id="a" * 257), Verdict.UNSIGNED),
    "without a time": (GOOD.but(headers={"webhook-timestamp": None}), Verdict.UNSIGNED),
    "at no time": (GOOD.but(headers={"webhook-timestamp": "nan"}), Verdict.UNSIGNED),
    "at half a second": (
        GOOD.but(headers={"webhook-timestamp": f"{NOW}.5"}),
        Verdict.UNSIGNED,
    ),
    "at a time in words": (
        GOOD.but(headers={"webhook-timestamp": "1.79534e9"}),
        Verdict.UNSIGNED,
    ),
    "at a time without end": (
        GOOD.but(headers={"webhook-timestamp": "9" * 5000}),
        Verdict.UNSIGNED,
    ),
    "at a time in other digits": (
        GOOD.but(headers={"webhook-timestamp": "١٧٩٥٣٤٠٠٠٠"}),
        Verdict.UNSIGNED,
    ),
}


@pytest.mark.parametrize(("sent", "verdict"), VERDICTS.values(), ids=VERDICTS)
async def test_what_is_thought_of_a_message(
    clock: Time, sent: Letter, verdict: Verdict
) -> None:
    assert await judge(check_of(clock, given=SECRET), sent) is verdict


async def test_a_text_cannot_be_cut_apart_in_another_way(clock: Time) -> None:
    """The signed text is joined with dots; one message must not be passed off as two."""
    sent = letter(id="msg_1", body=f"x.{NOW}.rest".encode())
    moved = letter(
        id=f"msg_1.{NOW}.x",
        body=b"rest",
        headers={"webhook-signature": sent.signature},
    )

    check = check_of(clock, given=SECRET)

    assert await judge(check, sent) is Verdict.GENUINE
    assert moved.signature == sent.signature, "the attack would be real"
    assert await judge(check, moved) is Verdict.UNSIGNED


@given(
    headers=st.fixed_dictionaries(
        {},
        optional={
            "webhook-id": st.text(max_size=40),
            "webhook-timestamp": st.one_of(
                st.text(max_size=20), st.integers().map(str), st.floats().map(str)
            ),
            "webhook-signature": st.one_of(
                st.text(max_size=120), st.from_regex(r"v1,[\w+/=,]{0,60}( v1,\w+)*")
            ),
        },
    ),
    body=st.binary(max_size=60),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
async def test_nothing_invented_is_genuine_and_nothing_breaks(
    clock: Time, headers: dict[str, str], body: bytes
) -> None:
    verdict = await check_of(clock, given=SECRET).judge(headers, body)

    assert verdict in (Verdict.UNSIGNED, Verdict.STALE, Verdict.FORGED)


# ------------------------------------------------------------------------- the secret


async def test_the_secret_is_fetched_once_for_all_who_wait(clock: Time) -> None:
    provider = Provider(SECRET)
    provider.gate.clear()
    check = check_of(clock, provider)

    judged = [asyncio.create_task(judge(check, letter(id=f"m{n}"))) for n in range(50)]
    while not provider.asked:
        await asyncio.sleep(0)
    provider.gate.set()

    assert set(await asyncio.gather(*judged)) == {Verdict.GENUINE}
    assert await judge(check, letter()) is Verdict.GENUINE
    assert provider.asked == 1


async def test_a_changed_secret_is_fetched_again(clock: Time) -> None:
    provider = Provider(OTHER_SECRET, SECRET)
    check = check_of(clock, provider)
    assert await judge(check, letter(secret=OTHER_SECRET)) is Verdict.GENUINE
    clock.now += FETCH_PAUSE.total_seconds()

    assert await judge(check, letter()) is Verdict.GENUINE

    assert provider.asked == 2
    assert await judge(check, letter(id="on_its_way", secret=OTHER_SECRET)) is (
        Verdict.GENUINE
    ), "it may have been sent before the change"
    clock.now += TOLERANCE.total_seconds()
    late = letter(at=clock.now)
    assert await judge(check, late) is Verdict.GENUINE
    assert await judge(check, late.but(secret=OTHER_SECRET)) is Verdict.FORGED


@pytest.mark.parametrize("answer", [OTHER_SECRET, ProviderUnavailable("away")])
async def test_whatever_is_thrown_at_us_the_secret_is_fetched_once_a_minute(
    clock: Time, answer: str | Exception
) -> None:
    provider = Provider(answer)
    check = check_of(clock, provider)
    wrong = Verdict.FORGED if answer == OTHER_SECRET else Verdict.UNDECIDED

    for minute in range(3):
        clock.now = NOW + minute * FETCH_PAUSE.total_seconds()
        for second in (0.0, 1.0, FETCH_PAUSE.total_seconds() - 0.001):
            clock.now = NOW + minute * FETCH_PAUSE.total_seconds() + second
            verdicts = await asyncio.gather(*(judge(check, letter()) for _ in range(9)))
            assert set(verdicts) == {wrong}
        assert provider.asked == minute + 1


async def test_nothing_is_fetched_for_what_is_unsigned_or_stale(clock: Time) -> None:
    provider = Provider(SECRET)
    check = check_of(clock, provider)

    assert await judge(check, letter(id="")) is Verdict.UNSIGNED
    assert await judge(check, letter(at=NOW - 900)) is Verdict.STALE

    assert provider.asked == 0


async def test_with_a_given_secret_nothing_is_fetched(clock: Time) -> None:
    provider = Provider(SECRET)
    check = check_of(clock, provider, given=OTHER_SECRET)

    assert await judge(check, letter()) is Verdict.FORGED
    assert await judge(check, letter(secret=OTHER_SECRET)) is Verdict.GENUINE

    assert provider.asked == 0


@pytest.mark.parametrize("answer", ["", "whsec_", "whsec_%%%", "AAEC", "whsec_é"])
async def test_a_secret_that_is_none_is_not_believed(clock: Time, answer: str) -> None:
    provider = Provider(answer, SECRET)
    check = check_of(clock, provider)

    assert await judge(check, letter()) is Verdict.UNDECIDED
    clock.now += FETCH_PAUSE.total_seconds()
    assert await judge(check, letter()) is Verdict.GENUINE


async def test_a_secret_that_cannot_be_had_again_is_still_the_secret(
    clock: Time,
) -> None:
    provider = Provider(SECRET, ProviderUnavailable("away"))
    check = check_of(clock, provider)
    assert await judge(check, letter()) is Verdict.GENUINE
    clock.now += FETCH_PAUSE.total_seconds()

    assert await judge(check, letter(secret=OTHER_SECRET)) is Verdict.FORGED
    assert await judge(check, letter()) is Verdict.GENUINE


async def test_a_slow_provider_is_not_waited_for_and_its_answer_is_used(
    clock: Time,
) -> None:
    provider = Provider(SECRET)
    provider.gate.clear()
    check = check_of(clock, provider, patience=timedelta(milliseconds=20))

    assert await judge(check, letter()) is Verdict.UNDECIDED
    waiting = asyncio.create_task(judge(check, letter()))
    await asyncio.sleep(0)
    provider.gate.set()

    assert await waiting is Verdict.GENUINE
    assert provider.asked == 1


async def test_a_caller_who_goes_away_leaves_the_fetch_to_the_others(
    clock: Time,
) -> None:
    provider = Provider(SECRET)
    provider.gate.clear()
    check = check_of(clock, provider)
    impatient = asyncio.create_task(judge(check, letter()))
    waiting = asyncio.create_task(judge(check, letter()))
    await asyncio.sleep(0)

    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    provider.gate.set()

    assert await waiting is Verdict.GENUINE


async def test_closing_ends_a_fetch(clock: Time) -> None:
    provider = Provider(SECRET)
    provider.gate.clear()
    secret = SigningSecret(None, provider, clock=clock)
    renewing = asyncio.create_task(secret.renew())
    await asyncio.sleep(0)

    await secret.aclose()

    assert await renewing is False
