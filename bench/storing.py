"""Pictures stored per second: received, decoded whole, hashed, written through to the disk.

    python -m bench.storing [--runs 5] [--pictures 64] [--side 1024]

Draws different pictures with the sandbox's painter, then puts them all at once into a folder.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from app.services.media_store import open_media_store
from sandbox.painter import Commission, paint

LIMIT = 100 * 1024 * 1024


async def stream(content: bytes) -> AsyncIterator[bytes]:
    """Give the content as a download would."""
    yield content


async def store_all(pictures: Sequence[bytes]) -> float:
    """Put the pictures into an empty store; give how many went in a second."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_media_store(Path(folder).as_uri())
        began = time.perf_counter()
        await asyncio.gather(
            *(store.put(stream(picture), max_bytes=LIMIT) for picture in pictures)
        )
        rate = len(pictures) / (time.perf_counter() - began)
        await store.aclose()
    return rate


def main() -> None:
    """Measure each format and print the median of the runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--side", type=int, default=1024)
    options = parser.parse_args()
    side = options.side
    for kind in ("webp", "png", "jpeg"):
        drawn = [
            paint(Commission(f"fox {number}", "", number, 0, side, side, kind, 80))
            for number in range(options.pictures)
        ]
        rates = sorted(asyncio.run(store_all(drawn)) for _ in range(options.runs))
        print(
            f"{kind:5}{statistics.median(rates):6.0f} per second"
            f" (from {rates[0]:.0f} to {rates[-1]:.0f})"
        )


if __name__ == "__main__":
    main()
