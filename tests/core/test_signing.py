"""Reading secrets of Standard Webhooks."""

from __future__ import annotations

import pytest

from app.core.signing import signing_key


@pytest.mark.parametrize(
    ("secret", "key"),
    [
        ("whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX", bytes(range(24))),
        ("whsec_AAEC", b"\x00\x01\x02"),
        ("whsec_AAE=", b"\x00\x01"),
        ("whsec_AAE", b"\x00\x01"),
        ("whsec_+/+/", b"\xfb\xff\xbf"),
    ],
)
def test_the_key_is_what_follows_the_prefix(secret: str, key: bytes) -> None:
    assert signing_key(secret) == key


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ("", "does not start"),
        ("AAEC", "does not start"),
        ("WHSEC_AAEC", "does not start"),
        ("whsec_", "nothing"),
        ("whsec_A", "base64"),
        ("whsec_%%%%", "base64"),
        ("whsec_AA-_", "base64"),
        ("whsec_AAEC ", "base64"),
        ("whsec_AAÉC", "base64"),
        (" whsec_AAEC", "does not start"),
    ],
)
def test_anything_else_is_no_secret_and_is_not_repeated(
    secret: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        signing_key(secret)

    rest = secret.removeprefix("whsec_").strip()
    assert not rest or rest not in str(caught.value)
