"""Counting purchases, so that a test can prove that nothing was bought twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import orjson


def fingerprint(model: str, given: dict[str, Any]) -> str:
    """Return the SHA-256 of the model and its canonical input (keys sorted, no spaces)."""
    canonical = orjson.dumps([model, given], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).hexdigest()


class Purchases:
    """How many predictions were made, in all and for each input and webhook address."""

    def __init__(self) -> None:
        self.total = 0
        self.by_input: Counter[str] = Counter()
        self.by_webhook: Counter[str] = Counter()

    def add(self, model: str, given: dict[str, Any], webhook: str | None) -> None:
        """Count one prediction."""
        self.total += 1
        self.by_input[fingerprint(model, given)] += 1
        if webhook is not None:
            self.by_webhook[webhook] += 1

    def repeated(self) -> int:
        """Return how many purchases repeated an input that had been bought before."""
        return self.total - len(self.by_input)
