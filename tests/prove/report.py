"""The telling of it: one run on a screen, all runs in docs/proof.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tests.prove.checks import CHECKS
from tests.prove.run import Result

MOST_TOLD = 10  # findings of one check
LEGEND = """\
`lost`: accepted and gone. `stuck`: not finished, or late. `extra`: bought for nobody, or twice.
`backwards`: a status or version that went back. `settled in`: from the last fault until nothing
was left to do but purchases of unknown fate, and until these were settled, too: they are looked
for during two minutes before they are made again."""


def told(result: Result) -> Iterator[str]:
    """Tell one run, line by line."""
    ends = ", ".join(f"{count} {status}" for status, count in result.ends.items())
    yield (
        f"seed {result.seed}: {result.jobs} jobs ({ends}), {result.bought} purchases,"
        f" {result.lost_attempts} attempts lost, {result.sights} answers watched,"
        f" {sum(result.faults.values())} faults, settled in {result.settled_known:.1f} s,"
        f" with those of unknown fate in {result.settled:.1f} s"
    )
    yield "  " + ", ".join(
        f"{word} {len(wrong)}" for word, wrong in result.findings.items()
    )
    for word, wrong in result.findings.items():
        for one in wrong[:MOST_TOLD]:
            yield f"  {word.upper()} {one}"
        if len(wrong) > MOST_TOLD:
            yield f"  {word.upper()} … and {len(wrong) - MOST_TOLD} more"


def details(result: Result) -> Iterator[str]:
    """Tell what callers were answered and what the logs warned about."""
    for title, counts in (
        ("faults", result.faults),
        ("answers", result.answers),
        ("warnings", result.complaints),
    ):
        yield f"{title}:"
        for name, count in sorted(counts.items()):
            yield f"  {count:6d}  {name}"
    yield "last jobs:"
    yield from result.last_jobs


def page(
    command: str, date: str, results: Sequence[Result], lost_answers: Sequence[Result]
) -> str:
    """Write docs/proof.md."""
    return "\n".join(
        [
            "# Proof",
            "",
            "Written by `make prove`; do not edit. What it does and how to read it:"
            " `tests/prove/__init__.py`.",
            "",
            f"{date}: `{command}`",
            "",
            *_runs(results),
            *_faults(results),
            *_lost_answers(lost_answers),
        ]
    )


def _runs(results: Sequence[Result]) -> Iterator[str]:
    if not results:
        return
    yield "## Runs"
    yield ""
    yield LEGEND
    yield ""
    words = ("lost", "stuck", "extra", "backwards")
    others = [word for word in CHECKS if word not in words]
    heads = ("seed", "minutes", "jobs", "purchases", "faults", *words)
    yield f"| {' | '.join((*heads, 'other findings', 'settled in'))} |"
    yield f"|{'---|' * (len(heads) + 2)}"
    for one in results:
        counts = {word: len(wrong) for word, wrong in one.findings.items()}
        cells = (
            *(one.seed, f"{one.seconds / 60:.1f}", one.jobs, one.bought),
            *(sum(one.faults.values()), *(counts[word] for word in words)),
            sum(counts[word] for word in others),
            f"{one.settled_known:.1f} s, {one.settled:.1f} s",
        )
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""


def _faults(results: Sequence[Result]) -> Iterator[str]:
    faults: Counter[str] = Counter()
    for one in results:
        faults.update(one.faults)
    if not faults:
        return
    yield "## Faults"
    yield ""
    yield "| kind | times |"
    yield "|---|---|"
    for kind, count in sorted(faults.items()):
        yield f"| {kind} | {count} |"
    yield ""


def _lost_answers(results: Sequence[Result]) -> Iterator[str]:
    if not results:
        return
    jobs = sum(one.jobs for one in results)
    bought = sum(one.bought for one in results)
    wrong = sum(len(found) for one in results for found in one.findings.values())
    yield "## Lost answers"
    yield ""
    yield (
        f"{jobs} purchases in a row whose answer never arrived, in {len(results)} runs:"
        f" {bought} pictures bought for {jobs} jobs, {wrong} findings. Without webhooks, so"
        " that only the provider's list can tell; with a circuit breaker that never opens."
    )
    yield ""
