"""What markers and signatures add to the storing of a picture, and thumbnails to a job.

    python -m bench.marking [--runs 5] [--pictures 24]

Puts the same pictures into a folder, one after the other: as they are, marked, and signed with
a certificate made for the occasion.  Prints the median time of one put, and the ratio to the
first.  Sizes are those of the files, about 100 kB and 5 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

from PIL import Image

from app.domain.provenance import SourceType
from app.services.credentials import load_certificate
from app.services.media_store import MediaStore, open_media_store
from app.services.provenance import mark
from app.services.scaling import scale_down
from tests.support.certificates import make_chain

LIMIT = 100 * 1024 * 1024


class Unannounced:
    """Signs, and notes nothing: there is no database here."""

    def __init__(self, folder: Path) -> None:
        chain = make_chain(folder)
        self.sign = load_certificate(chain.certificate, chain.key).sign

    async def announce(self, key: str) -> None:
        """Do nothing."""


def drawn(kind: str, side: int, seed: int) -> bytes:
    """Draw something between a photograph and noise."""
    random, out = Random(seed), io.BytesIO()
    grain = Image.frombytes("RGB", (side, side), random.randbytes(side * side * 3))
    soft = Image.frombytes("RGB", (16, 16), random.randbytes(768)).resize((side, side))
    Image.blend(soft, grain, 0.25).save(out, kind, quality=90)
    return out.getvalue()


async def put_once(
    store: MediaStore, picture: bytes, origin: SourceType | None
) -> float:
    """Put a picture; give how long it took, in seconds."""

    async def stream() -> AsyncIterator[bytes]:
        yield picture

    began = time.perf_counter()
    await store.put(stream(), max_bytes=LIMIT, origin=origin)
    return time.perf_counter() - began


async def measure(pictures: list[bytes], signing: Unannounced) -> dict[str, float]:
    """Put each picture in each way, in turn, as machines have moods; give the medians."""
    times: dict[str, list[float]] = {"plain": [], "marked": [], "signed": []}
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: open_media_store(Path(folder, name).as_uri()) for name in times}
        stores["signed"].sign_with(signing)
        for picture in pictures:
            for name, store in stores.items():
                origin = None if name == "plain" else SourceType.MADE
                times[name].append(await put_once(store, picture, origin))
        for store in stores.values():
            await store.aclose()
    return {name: statistics.median(found) for name, found in times.items()}


def alone(picture: bytes, extension: str) -> float:
    """Give the least time of the marking itself, in seconds."""
    took = []
    for _ in range(20):
        began = time.perf_counter()
        mark(io.BytesIO(picture), extension, SourceType.MADE)
        took.append(time.perf_counter() - began)
    return min(took)


def main() -> None:
    """Measure each format and size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        signing = Unannounced(Path(folder))
        for kind, side in (
            *(("PNG", 200), ("PNG", 1400), ("JPEG", 420), ("JPEG", 3000)),
            *(("WEBP", 420), ("WEBP", 3000)),
        ):
            count = max(2, options.pictures // (1 if side < 1000 else 8))
            pictures = [drawn(kind, side, seed) for seed in range(count)]
            runs = [
                asyncio.run(measure(pictures, signing)) for _ in range(options.runs)
            ]
            extension = "jpg" if kind == "JPEG" else kind.lower()
            marking = alone(pictures[0], extension)
            began = time.perf_counter()
            scale_down(io.BytesIO(pictures[0]), (256, 768))
            scaled = time.perf_counter() - began
            middle = {
                name: statistics.median(run[name] for run in runs) for name in runs[0]
            }
            size = statistics.mean(map(len, pictures)) / 1000
            print(
                f"{kind:5}{size:7.0f} kB  plain {middle['plain'] * 1e3:7.2f} ms"
                f"  marked x {middle['marked'] / middle['plain']:.3f}"
                f"  signed x {middle['signed'] / middle['plain']:.3f}"
                f"  (marking alone {marking * 1e3:.2f} ms; thumbnails, afterwards:"
                f" {scaled * 1e3:.0f} ms)"
            )


if __name__ == "__main__":
    main()
