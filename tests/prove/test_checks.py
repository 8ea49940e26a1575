"""Every check can fail: a small true world, and a lie for each law."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.prove.checks import CHECKS, judge
from tests.prove.clients import Diary, Sight
from tests.prove.evidence import (
    Attempt,
    Bought,
    Event,
    Evidence,
    Job,
    Served,
    read_complaints,
)

BIRTH = datetime(2026, 11, 25, 12, tzinfo=UTC)
FOX, OWL, ELK = "job-fox", "job-owl", "job-elk"
ATTEMPTS = {
    name: f"00000000-0000-4000-8000-00000000000{number}"
    for number, name in enumerate((FOX, OWL, ELK))
}

Lie = Callable[[Evidence], Evidence]


def attempt(job_id: str, number: int = 1, **changes: Any) -> Attempt:
    """Make the attempt that bought the job's picture."""
    made = Attempt(
        f"{ATTEMPTS[job_id][:-2]}{number}{ATTEMPTS[job_id][-1]}",
        job_id,
        number,
        "succeeded",
        f"handle-of-{job_id}",
        BIRTH,
    )
    return replace(made, **changes)


def history(handle: str) -> tuple[Event, ...]:
    """Make the history of a job that was bought once and completed."""
    happened: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("Submitted", {"deadline": 900.0, "warnings": []}, "pending"),
        ("Intended", {}, "processing"),
        ("Started", {"handle": handle, "is_adopted": False}, "processing"),
        ("Generated", {"predict_seconds": 1.0}, "processing"),
        ("Stored", {"outputs": 1, "warnings": []}, "completed"),
    )
    return tuple(
        Event(version, name, data, status, BIRTH + timedelta(seconds=version))
        for version, (name, data, status) in enumerate(happened, 1)
    )


def job(job_id: str, **changes: Any) -> Job:
    """Make a completed job."""
    made = Job(
        id=job_id,
        status="completed",
        stage=None,
        version=5,
        prompt=f"proof of {job_id}",
        num_outputs=1,
        attempt_count=1,
        is_due=False,
        is_claimed=False,
        error_code=None,
        created_at=BIRTH,
        attempts=(attempt(job_id),),
        events=history(f"handle-of-{job_id}"),
        files={f"key-of-{job_id}": "00ff"},
    )
    return replace(made, **changes)


def bought(job_id: str, **changes: Any) -> Bought:
    """Make the prediction that the job's attempt bought."""
    made = Bought(
        id=f"handle-of-{job_id}",
        status="succeeded",
        prompt=f"proof of {job_id}",
        webhook=f"http://api/api/v1/callbacks/replicate/{attempt(job_id).id}/secret",
        has_output=True,
    )
    return replace(made, **changes)


def truth() -> Evidence:
    """Make a world where all is well: two jobs, and one that was deleted."""
    diary = Diary(
        accepted={name: f"proof of {name}" for name in (FOX, OWL, ELK)},
        sights={
            FOX: [
                Sight(0, 1, 1, "pending"),
                Sight(2, 4, 3, "processing"),
                Sight(3, 5, 2, "processing"),  # overlaps the one before: either is true
                Sight(6, 7, 5, "completed"),
                Sight(8, 9, 5, "completed"),
            ]
        },
        deletions={ELK},
    )
    return Evidence(
        diary=diary,
        jobs={FOX: job(FOX), OWL: job(OWL)},
        deleted={ELK: job(ELK)},
        bought=[bought(FOX), bought(OWL), bought(ELK)],
        served={name: Served(200, "completed", 5) for name in (FOX, OWL)},
        complaints={"claim.lost": 3},
    )


def in_job(**changes: Any) -> Lie:
    """Lie about the fox's row."""

    def lie(evidence: Evidence) -> Evidence:
        return replace(evidence, jobs={**evidence.jobs, FOX: job(FOX, **changes)})

    return lie


def also_bought(*more: Bought) -> Lie:
    return lambda e: replace(e, bought=[*e.bought, *more])


def instead_bought(one: Bought) -> Lie:
    return lambda e: replace(e, bought=[*e.bought[1:], one])


def seen(*sights: Sight) -> Lie:
    """Lie about what callers saw of the fox."""

    def lie(evidence: Evidence) -> Evidence:
        diary = replace(evidence.diary, sights={FOX: list(sights)})
        return replace(evidence, diary=diary)

    return lie


def without_row(evidence: Evidence) -> Evidence:
    jobs = {name: one for name, one in evidence.jobs.items() if name != FOX}
    return replace(evidence, jobs=jobs)


def served(answer: Served) -> Lie:
    return lambda e: replace(e, served={**e.served, FOX: answer})


def events(change: Callable[[tuple[Event, ...]], tuple[Event, ...]]) -> Lie:
    return in_job(events=change(history(f"handle-of-{FOX}")))


def twice_attempted(first: str, second: str = "succeeded") -> Lie:
    """Lie that the fox had two attempts, both with a paid picture."""
    attempts = (
        attempt(FOX, 1, state=first, handle="earlier"),
        attempt(FOX, 2, state=second),
    )
    earlier = bought(FOX, id="earlier", webhook=None)
    return lambda e: also_bought(earlier)(in_job(attempts=attempts)(e))


def lost_and_paid(evidence: Evidence) -> Evidence:
    """The first attempt was given up, its picture was made all the same, and another bought."""
    attempts = (attempt(FOX, 1, state="lost", handle=None), attempt(FOX, 2))
    stray = bought(FOX, id="stray")
    mine = bought(FOX, webhook=None)
    lie = replace(evidence, bought=[mine, *evidence.bought[1:], stray])
    return in_job(attempts=attempts)(lie)


LIES: Mapping[str, tuple[str, Lie]] = {
    "no row": ("lost", without_row),
    "404": ("lost", served(Served(404))),
    "another status": ("lost", served(Served(200, "failed", 5))),
    "another version": ("lost", served(Served(200, "completed", 4))),
    "still pending": ("stuck", in_job(status="pending", stage="queued")),
    "late": ("stuck", lambda e: replace(e, late=("job-fox: took more than 60 s",))),
    "bought for nobody": ("extra", also_bought(bought(FOX, id="x", prompt="whose?"))),
    "a stray picture": ("extra", also_bought(bought(FOX, id="x", webhook=None))),
    "sent twice": ("extra", also_bought(bought(FOX, id="x", status="canceled"))),
    "sent twice, by prompt": (
        "extra",
        also_bought(bought(FOX, id="x", webhook=None, status="failed")),
    ),
    "two paid": ("extra", twice_attempted("cancelled")),
    "lost, and paid": ("extra", lost_and_paid),
    "another job's": (
        "extra",
        instead_bought(replace(bought(FOX), webhook=bought(OWL).webhook)),
    ),
    "an older version later": (
        "backwards",
        seen(Sight(0, 1, 3, "processing"), Sight(2, 3, 2, "processing")),
    ),
    "unrecorded": ("backwards", seen(Sight(0, 1, 3, "pending"))),
    "unrecorded version": ("backwards", seen(Sight(0, 1, 6, "completed"))),
    "a gap": ("backwards", events(lambda all: (*all[:2], *all[3:]))),
    "changed after its end": (
        "backwards",
        events(lambda all: (*all[:3], replace(all[3], status="failed"), all[4])),
    ),
    "time ran backwards": (
        "backwards",
        events(lambda all: (*all[:4], replace(all[4], at=BIRTH))),
    ),
    "a broken file": ("files", served(Served(200, "completed", 5, ("other bytes",)))),
    "no file": ("files", in_job(files={})),
    "a file of nothing": ("files", in_job(status="failed")),
    "running on": ("running", instead_bought(bought(FOX, status="processing"))),
    "due for ever": ("claims", in_job(is_due=True)),
    "claimed for ever": ("claims", in_job(is_claimed=True)),
    "open for ever": ("claims", in_job(attempts=(attempt(FOX, state="running"),))),
    "shared": (
        "handles",
        in_job(attempts=(attempt(FOX, handle=f"handle-of-{OWL}"),)),
    ),
    "invented": ("handles", in_job(attempts=(attempt(FOX, handle="who?"),))),
    "another state": ("history", in_job(status="cancelled")),
    "another handle": ("history", in_job(attempts=(attempt(FOX, handle="who?"),))),
    "another count": ("history", in_job(attempt_count=2)),
    "a 500": (
        "answers",
        lambda e: replace(e, diary=replace(e.diary, surprises=["status: 500"])),
    ),
    "held for ever": ("books", lambda e: replace(e, books=["money is held"])),
    "died": ("deaths", lambda e: replace(e, deaths=["worker1: exit code 1"])),
    "would not end": ("deaths", lambda e: replace(e, slow_stops=["api1"])),
    "a crash": ("mistakes", lambda e: replace(e, complaints={"look.crashed!": 1})),
    "a traceback": ("mistakes", lambda e: replace(e, complaints={"x.failed!": 1})),
}


def test_nothing_is_wrong_with_the_truth() -> None:
    assert judge(truth()) == {word: [] for word in CHECKS}


@pytest.mark.parametrize(("word", "lie"), LIES.values(), ids=LIES)
def test_a_lie_is_found(word: str, lie: Lie) -> None:
    assert judge(lie(truth()))[word]


def test_every_check_has_its_lie() -> None:
    assert {word for word, _ in LIES.values()} == set(CHECKS)


@pytest.mark.parametrize("end", ["failed", "aborted", "canceled"])
def test_what_the_provider_gave_up_may_be_bought_again(end: str) -> None:
    evidence = twice_attempted("failed")(truth())
    made = [
        one if one.id != "earlier" else replace(one, status=end)
        for one in evidence.bought
    ]

    assert judge(replace(evidence, bought=made))["extra"] == []


def test_a_lost_purchase_that_was_cancelled_when_it_came_is_no_extra_one() -> None:
    evidence = lost_and_paid(truth())
    *others, stray = evidence.bought

    assert not judge(
        replace(evidence, bought=[*others, replace(stray, status="canceled")])
    )["extra"]


def test_a_deletion_whose_answer_was_lost_may_have_done_nothing() -> None:
    evidence = truth()
    jobs = {**evidence.jobs, ELK: job(ELK)}
    answers = {**evidence.served, ELK: Served(200, "completed", 5)}

    assert not any(judge(replace(evidence, jobs=jobs, served=answers)).values())


def test_logs_are_read_for_warnings_and_tracebacks(tmp_path: Path) -> None:
    log = tmp_path / "worker.txt"
    log.write_text(
        '{"event": "job.changed", "level": "info"}\n'
        '{"event": "claim.lost", "level": "warning"}\n'
        '{"event": "look.crashed", "level": "error", "exception": "Traceback…"}\n'
        '{"event": "cut in ha'
        "\nTraceback (most recent call last):\n"
    )

    assert read_complaints([log]) == {
        "claim.lost": 1,
        "look.crashed!": 1,
        "Traceback!": 1,
    }
