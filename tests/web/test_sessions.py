"""Cookies of sessions and tokens of forms: whose they are, and until when."""

from __future__ import annotations

import base64
from datetime import timedelta
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.access import Caller
from app.services.gatekeeper import CONFIGURED
from app.services.keys import digest
from app.web.sessions import LIFETIME, Sessions

KEYS = [b"one key of ours" * 3]
SECRET = "mgs_" + "A" * 43


class Clock:
    """A clock that stands until it is told."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def made() -> Caller:
    return Caller(owner="alice", key_id=uuid4())


def test_a_cookie_says_whose_key_it_was_and_holds_no_key() -> None:
    sessions = Sessions(KEYS)

    cookie = sessions.open(SECRET, made())
    other = sessions.open(SECRET, made())

    session = sessions.read(cookie)
    assert session is not None and not session.is_configured
    assert session.mark == digest(SECRET)
    raw = base64.urlsafe_b64decode(cookie + "==")
    assert SECRET.encode() not in raw and SECRET not in cookie
    again = sessions.read(other)
    assert again is not None and again.id != session.id


def test_not_even_the_hash_of_the_configured_key_is_in_a_cookie() -> None:
    sessions = Sessions(KEYS)

    cookie = sessions.open("correct horse battery staple", CONFIGURED)

    session = sessions.read(cookie)
    assert session is not None and session.is_configured
    raw = base64.urlsafe_b64decode(cookie + "==")
    assert digest("correct horse battery staple") not in raw


def test_a_session_ends() -> None:
    clock = Clock()
    sessions = Sessions(KEYS, clock=clock)
    cookie = sessions.open(SECRET, made())

    clock.now += LIFETIME.total_seconds() - 1
    assert sessions.read(cookie) is not None
    clock.now += 1
    assert sessions.read(cookie) is None


def test_a_new_key_in_front_leaves_old_sessions_alone_until_the_old_one_goes() -> None:
    old, both = Sessions([b"old" * 9]), Sessions([b"new" * 9, b"old" * 9])
    cookie, token = old.open(SECRET, made()), old.token("visitor x")

    assert both.read(cookie) is not None
    assert both.is_token(token, "visitor x")
    alone = Sessions([b"new" * 9])
    assert alone.read(cookie) is None
    assert not alone.is_token(token, "visitor x")
    assert old.read(both.open(SECRET, made())) is None


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_bit_of_a_cookie_can_be_changed(place: int, bit: int) -> None:
    sessions = Sessions(KEYS)
    raw = bytearray(base64.urlsafe_b64decode(sessions.open(SECRET, made()) + "=="))
    raw[place % len(raw)] ^= 1 << bit

    changed = base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()

    assert sessions.read(changed) is None


@given(st.text(max_size=300))
def test_what_is_no_cookie_of_ours_is_nobodys(text: str) -> None:
    sessions = Sessions(KEYS)

    assert sessions.read(text) is None
    assert not sessions.is_token(text, "visitor x")


@pytest.mark.parametrize("other", ["visitor y", "session x", "visitor x ", ""])
def test_a_token_is_one_browsers(other: str) -> None:
    sessions = Sessions(KEYS, lifetime=timedelta(hours=1))

    token = sessions.token("visitor x")

    assert sessions.is_token(token, "visitor x")
    assert not sessions.is_token(token, other)
    assert not sessions.is_token(token + "A", "visitor x")
