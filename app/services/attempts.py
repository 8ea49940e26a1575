"""How often an address may come with a wrong key before it is not listened to for a while.

Keys of 256 bits are not guessed, at any rate: what is protected here is the table of keys, and
the log.  So an address that was wrong too often is refused before anything is looked up; a
key this process already knows is let in before anybody asks here, whatever its neighbours
behind the same address do.

One wrong key that comes again and again (a forgotten program with an old key) has a bucket of
its own beside the one of keys nobody has seen: it does not use up what strangers from its
address may try.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta

from app.core.quota import Quotas
from app.domain.errors import OverLimit

FAILURES_PER_MINUTE = 20
BURST = 10
MEMORY = timedelta(minutes=1)  # how long a wrong key is taken for one that came again
MOST_WRONG = 10_000  # keys remembered; the oldest is forgotten first
NETWORK_BITS = 64  # of IPv6: what one customer gets at least

_NO_TIME = timedelta(0)


class FailedAttempts:
    """Counts wrong keys by address, in all processes together; see `Quotas` for how."""

    def __init__(
        self,
        quotas: Quotas,
        *,
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quotas = quotas
        self._on_failure = on_failure
        self._clock = clock
        self._wrong: OrderedDict[bytes, float] = OrderedDict()  # until when

    def let_try(self, address: str, hashed: bytes) -> None:
        """Return when a key this process does not know may be looked up; raise `OverLimit`.

        Asks nobody and counts nothing: a right key is no failure.
        """
        kind = "wrong" if self._came_before(hashed) else "unknown"
        wait = self._quotas.refusal(f"{kind}-keys:{network_of(address)}")
        if wait > _NO_TIME:
            raise _too_many(wait)

    async def note_failure(self, address: str, hashed: bytes | None = None) -> None:
        """Count a wrong key; raise `OverLimit` when it was one too many.

        `hashed` is its hash, if it had to be looked up to know that it is wrong.
        """
        self._on_failure()
        network = network_of(address)
        taken = [f"wrong-keys:{network}"]
        if hashed is not None and not self._came_before(hashed):
            taken.append(f"unknown-keys:{network}")
            self._remember(hashed)
        every = await asyncio.gather(
            *(
                self._quotas.take(name, per_minute=FAILURES_PER_MINUTE, burst=BURST)
                for name in taken
            )
        )
        wait = max(standing.wait for standing in every)
        if wait > _NO_TIME:
            raise _too_many(wait)

    def _came_before(self, hashed: bytes) -> bool:
        return self._clock() < self._wrong.get(hashed, float("-inf"))

    def _remember(self, hashed: bytes) -> None:
        self._wrong[hashed] = self._clock() + MEMORY.total_seconds()
        self._wrong.move_to_end(hashed)
        if len(self._wrong) > MOST_WRONG:
            self._wrong.popitem(last=False)


def network_of(address: str) -> str:
    """Name whom an address belongs to: itself, or for IPv6 its first 64 bits.

    What is no address, which a proxy may have been told by anybody, is all one.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    network = int(found) >> (128 - NETWORK_BITS) << (128 - NETWORK_BITS)
    return f"{ipaddress.IPv6Address(network)}/{NETWORK_BITS}"


def _too_many(wait: timedelta) -> OverLimit:
    return OverLimit(
        "Too many wrong API keys came from this address: wait, and check the key.",
        retry_after=wait,
        code="too_many_attempts",
    )
