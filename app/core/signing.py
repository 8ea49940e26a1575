"""Secrets of Standard Webhooks, read strictly.

Libraries skip what is no base64, so that a secret cut short while copying becomes another
one without a word.
"""

from __future__ import annotations

import base64
import binascii

PREFIX = "whsec_"


def signing_key(secret: str) -> bytes:
    """Give the key of a `whsec_…` secret; raise `ValueError` that completes "it …"."""
    encoded = secret.removeprefix(PREFIX)
    if encoded == secret:
        raise ValueError(f"does not start with {PREFIX}")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"is not base64 after {PREFIX}") from None
    if not key:
        raise ValueError(f"has nothing after {PREFIX}")
    return key
