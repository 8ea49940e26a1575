"""Links open one path for a while, and nothing else."""

from __future__ import annotations

import base64
from datetime import timedelta
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.links import LinkSigner, derived_key

OLD, NEW = b"the old key, long enough", b"the new key, long enough"
HOUR = timedelta(hours=1)
PATH = "/media/ab/abc.png"
Pairs = list[tuple[str, str]]


class Clock:
    def __init__(self, now: float = 1_800_000_123.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def signer(*keys: bytes, clock: Clock | None = None) -> LinkSigner:
    return LinkSigner(keys or (NEW,), HOUR, clock=clock or Clock())


def taken_apart(link: str) -> tuple[str, Pairs]:
    parts = urlsplit(link)
    return parts.path, parse_qsl(parts.query, strict_parsing=True)


@given(st.floats(1e9, 9e9), st.integers(1, 7 * 86_400))
def test_a_link_lives_as_long_as_promised_and_no_eternity(
    now: float, seconds: int
) -> None:
    lifetime = timedelta(seconds=seconds)
    end = LinkSigner([NEW], lifetime, clock=Clock(now)).end()

    assert seconds <= end - now + 1e-6
    assert end - now <= 1.5 * seconds + 3


def test_a_link_is_the_same_for_half_its_life() -> None:
    clock = Clock(1_800_000_000.0)
    found = signer(clock=clock)
    first = found.end()

    clock.now += 1799
    assert found.end() == first
    clock.now += 1
    assert found.end() == first + 1800
    assert found.mark(found.end()) != found.mark(first)


def test_a_link_opens_its_path_until_its_end() -> None:
    clock = Clock()
    found = signer(clock=clock)
    end = found.end()
    path, query = taken_apart(found.sign(PATH, end))

    assert path == PATH
    assert found.seconds_left(path, query) == end - int(clock.now)
    clock.now = end - 0.25
    assert found.seconds_left(path, query) == 1
    clock.now = end
    assert found.seconds_left(path, query) is None


def test_a_link_may_have_a_life_of_its_own() -> None:
    clock = Clock()
    found = signer(clock=clock)
    path, query = taken_apart(found.sign_for(PATH, timedelta(minutes=20)))

    assert found.seconds_left(path, query) == 1200


def _forgeries() -> dict[str, Pairs]:
    found = signer()
    end = found.end()
    _, query = taken_apart(found.sign(PATH, end))
    (_, moment), (_, signature) = query
    raw = base64.urlsafe_b64decode(signature + "=")
    # The last of 43 characters carries two bits that mean nothing.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twin = signature[:-1] + alphabet[alphabet.index(signature[-1]) ^ 1]
    assert base64.urlsafe_b64decode(twin + "=") == raw
    other = taken_apart(signer(OLD).sign(PATH, end))[1]

    def spelt(moment: str = moment, signature: str = signature) -> Pairs:
        return [("expires", moment), ("signature", signature)]

    return {
        "nothing": [],
        "no signature": [("expires", moment)],
        "no end": [("signature", signature)],
        "later": spelt(str(end + 1)),
        "earlier": spelt(str(end - 1)),
        "leading zero": spelt("0" + moment),
        "plus": spelt("+" + moment),
        "space": spelt(" " + moment),
        "underscore": spelt(moment[0] + "_" + moment[1:]),
        "fraction": spelt(moment + ".0"),
        "other digits": spelt(moment.translate({48 + n: 0x660 + n for n in range(10)})),
        "huge": spelt("9" * 5000),
        "empty end": spelt(""),
        "negative": spelt("-" + moment),
        "empty signature": spelt(signature=""),
        "padded": spelt(signature=signature + "="),
        "cut": spelt(signature=signature[:-1]),
        "hex": spelt(signature=raw.hex()),
        "spare bits": spelt(signature=twin),
        "no ascii": spelt(signature="é" * 43),
        "newline": spelt(signature=signature + "\n"),
        "another key": other,
        "end twice": [*query, ("expires", moment)],
        "signature twice": [*query, ("signature", signature)],
        "capitals": [("Expires", moment), ("signature", signature)],
    }


@pytest.mark.parametrize("name", list(_forgeries()))
def test_a_forgery_opens_nothing(name: str) -> None:
    assert signer().seconds_left(PATH, _forgeries()[name]) is None


@pytest.mark.parametrize(
    "path",
    ["/media/ab/abd.png", "/media/ab/abc.png/", "/media/ab/abc", "", PATH + "\n"],
)
def test_a_link_opens_no_other_path(path: str) -> None:
    found = signer()
    _, query = taken_apart(found.sign(PATH, found.end()))

    assert found.seconds_left(path, query) is None


def test_other_parameters_do_not_matter() -> None:
    found = signer()
    _, query = taken_apart(found.sign(PATH, found.end()))

    assert found.seconds_left(PATH, [("utm", "x"), *query, ("v", "2")]) is not None


def test_keys_are_changed_without_a_dead_link() -> None:
    """Behind the old one, before it, alone: what was signed stays good while it lives."""
    steps = [signer(OLD), signer(OLD, NEW), signer(NEW, OLD), signer(NEW)]
    for one, next_one in zip(steps, steps[1:]):
        _, query = taken_apart(one.sign(PATH, one.end()))
        assert next_one.seconds_left(PATH, query) is not None
        # Processes of both versions run side by side.
        _, query = taken_apart(next_one.sign(PATH, next_one.end()))
        assert one.seconds_left(PATH, query) is not None
    _, old = taken_apart(steps[0].sign(PATH, steps[0].end()))
    assert steps[-1].seconds_left(PATH, old) is None


def test_links_of_another_key_have_another_mark() -> None:
    one, other = signer(OLD, NEW), signer(NEW, OLD)

    assert one.mark(one.end()) != other.mark(other.end())


def test_a_derived_key_is_stable_and_shows_nothing_of_its_secret() -> None:
    secret = "r8_for_tests_only_0123456789"

    assert derived_key(secret) == derived_key(secret) != derived_key(secret + "x")
    assert len(derived_key(secret)) == 32
    assert secret.encode() not in derived_key(secret)


def test_a_signer_without_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="key"):
        LinkSigner((), HOUR)
