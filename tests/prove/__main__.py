"""`python -m tests.prove [--minutes 5] [--seed N] [--runs K]`: see the package's docstring."""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from tests.prove import report
from tests.prove.lost_answers import BATCH, lose_answers
from tests.prove.plan import KINDS, Kind, quick
from tests.prove.run import Order, Result, Tell, prove


def main() -> int:
    """Run what was asked for; 1 when a check failed, with the folder of its logs."""
    options = _options()
    seed = options.seed
    if seed is None:
        seed = random.SystemRandom().randrange(10**6)
    # First of all: whatever happens now can be had again.
    print(f"seed {seed}", flush=True)
    results = _all_runs(options, range(seed, seed + options.runs))
    lost = []
    for number in range(0, options.lost_answers, BATCH):
        count = min(BATCH, options.lost_answers - number)
        lost.append(
            _in_folder(options, seed + number, _one_batch(seed + number, count))
        )
    if options.write is not None:
        command = shlex.join(["python", "-m", "tests.prove", *_told(sys.argv[1:])])
        date = datetime.now(UTC).date().isoformat()
        options.write.write_text(report.page(command, date, results, lost))
    return 0 if all(one.is_proved for one in (*results, *lost)) else 1


def _all_runs(options: argparse.Namespace, seeds: Sequence[int]) -> list[Result]:
    def one(seed: int) -> Result:
        return _in_folder(options, seed, _one_run(options, seed))

    if options.at_once == 1:
        return [
            one(seed) for seed in seeds
        ]  # in the main thread: Ctrl-C ends it at once
    with ThreadPoolExecutor(options.at_once) as pool:
        return list(pool.map(one, seeds))


def _told(words: Sequence[str]) -> list[str]:
    """Leave out where this machine has its folders."""
    pairs = zip(words, ["", *words], strict=False)
    return [w for w, before in pairs if "--folder" not in (w, before)]


Run = Callable[[Path, Tell], Awaitable[Result]]


def _one_run(options: argparse.Namespace, seed: int) -> Run:
    order = Order(
        seed,
        options.minutes * 60,
        options.jobs_per_minute,
        options.every,
        _kinds(options),
    )
    return lambda folder, tell: prove(order, folder, tell)


def _kinds(options: argparse.Namespace) -> Sequence[Kind]:
    kinds = quick(KINDS) if options.quick else KINDS
    chosen = [kind for kind in kinds if re.search(options.only, kind.name)]
    if not chosen:
        raise SystemExit(f"no kind of fault is called {options.only!r}")
    return chosen


def _one_batch(seed: int, count: int) -> Run:
    return lambda folder, tell: lose_answers(seed, count, folder, tell)


def _in_folder(options: argparse.Namespace, seed: int, run: Run) -> Result:
    """Make one run in a folder of its own; the folder stays when a check failed."""
    folder = Path(tempfile.mkdtemp(prefix=f"prove-{seed}-", dir=options.folder))
    began = time.monotonic()

    def tell(text: str) -> None:
        line = f"[{time.monotonic() - began:6.1f}] {text}"
        with open(folder / "run.txt", "a") as log:
            print(line, file=log)
        if options.verbose:
            print(line, flush=True)

    async def go() -> Result:
        return await run(folder, tell)

    result = asyncio.run(go())
    for line in report.told(result):
        tell(line)
        print(line, flush=True)
    with open(folder / "run.txt", "a") as log:
        print(*report.details(result), sep="\n", file=log)
    if result.is_proved and not options.keep:
        shutil.rmtree(folder)
    else:
        print(f"  logs: {folder}", flush=True)
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.prove", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="of faults, each run")
    parser.add_argument(
        "--seed", type=int, help="decides every fault; fresh if left out"
    )
    parser.add_argument(
        "--runs", type=int, default=1, help="the seeds follow each other"
    )
    parser.add_argument(
        "--at-once", type=int, default=1, help="runs side by side, each a system"
    )
    parser.add_argument("--jobs-per-minute", type=float, default=240)
    parser.add_argument(
        "--every", type=float, default=2.0, help="seconds between faults"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only faults that are mended within seconds",
    )
    parser.add_argument(
        "--only", default="", help="kinds of faults: a regular expression"
    )
    parser.add_argument("--lost-answers", type=int, default=0, help="so many, in a row")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--folder", type=Path, help="where runs have their folders")
    parser.add_argument(
        "--keep", action="store_true", help="keep logs of good runs too"
    )
    parser.add_argument("--verbose", action="store_true", help="tell every fault")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
