"""The laws, each a function from evidence to what is wrong with it: nothing, if it holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise

from app.domain import journal
from app.domain.lifecycle import IllegalEvent
from app.domain.policy import Policy
from app.domain.state import JobState
from tests.prove.clients import Sight
from tests.prove.evidence import Attempt, Bought, Evidence, Job
from tests.support.stack import FINISHED

Check = Callable[[Evidence], list[str]]

# Attempts for which one request may have left, and at most one.
MAYBE_SENT = ("sent", "running", "succeeded", "failed", "lost", "cancelled")
AT_THE_PROVIDER = ("succeeded", "failed", "canceled", "aborted")
_ATTEMPT_ID = re.compile(r"/callbacks/[^/]+/([0-9a-f-]{36})/")

# Events of the log that mean a mistake of ours, whatever broke around us.
MISTAKES = frozenset(
    ("look.crashed", "settle.illegal", "handle.taken", "file.lost", "Traceback")
)


def no_job_is_lost(evidence: Evidence) -> list[str]:
    """What was answered with 202 is known for ever, unless a caller deleted it."""
    found = []
    for job_id in evidence.diary.accepted:
        if job_id in evidence.deleted:
            continue
        served = evidence.served.get(job_id)
        job = evidence.jobs.get(job_id)
        if job is None:
            found.append(f"{job_id}: accepted, and no row has it")
        elif served is None or served.code != 200:
            code = None if served is None else served.code
            found.append(f"{job_id}: accepted, and the API answers {code}")
        elif (served.status, served.version) != (job.status, job.version):
            found.append(
                f"{job_id}: the row says {job.status} ({job.version}), the API"
                f" {served.status} ({served.version})"
            )
    return found


def no_job_is_stuck(evidence: Evidence) -> list[str]:
    """Every job comes to an end, soon after everything is healed."""
    live = [
        f"{job.id}: {job.status}/{job.stage}, {job.attempt_count} attempts,"
        f" {[one.state for one in job.attempts]}"
        for job in evidence.jobs.values()
        if job.status not in FINISHED
    ]
    return [*live, *evidence.late]


def nothing_is_bought_twice(evidence: Evidence) -> list[str]:
    """One picture is paid for a job, and one request leaves for an attempt at most."""
    jobs = {**evidence.deleted, **evidence.jobs}
    attempts = [one for job in jobs.values() for one in job.attempts]
    owners = {one.handle: one for one in attempts if one.handle is not None}
    by_id = {one.id: one for one in attempts}
    by_prompt: dict[str, list[Job]] = {}
    for job in jobs.values():
        by_prompt.setdefault(job.prompt, []).append(job)
    found = []
    paid: Counter[str] = Counter()
    for one in evidence.bought:
        if one.prompt not in by_prompt:
            found.append(f"{one.id}: bought for no job: {one.prompt!r}")
            continue
        owner = owners.get(one.id)
        if _is_paid(one):
            if owner is None:
                found.append(f"{one.id}: paid and owned by no attempt: {one.prompt!r}")
            else:
                paid[owner.job_id] += 1
    found += [
        f"{job_id}: {count} pictures paid"
        for job_id, count in paid.items()
        if count > 1
    ]
    return found + list(_sent_twice(evidence.bought, by_prompt, owners, by_id))


def _is_paid(one: Bought) -> bool:
    return one.status == "succeeded" and one.has_output


def _sent_twice(
    bought: Sequence[Bought],
    by_prompt: Mapping[str, list[Job]],
    owners: Mapping[str, Attempt],
    by_id: Mapping[str, Attempt],
) -> Iterator[str]:
    """Name attempts (or, where purchases do not tell theirs, prompts) sent more than once."""
    named: Counter[str] = Counter()
    prompts: Counter[str] = Counter()
    for one in bought:
        prompts[one.prompt] += 1
        match = _ATTEMPT_ID.search(one.webhook or "")
        if match is not None:
            named[match[1]] += 1
            owner = owners.get(one.id)
            if owner is not None and owner.id != match[1]:
                told = by_id.get(match[1])
                if told is None or told.job_id != owner.job_id:
                    yield f"{one.id}: bought by {match[1]}, owned by {owner.id}"
    yield from (f"{key}: sent {n} times" for key, n in named.items() if n > 1)
    for prompt, count in prompts.items():
        sent = [
            attempt
            for job in by_prompt.get(prompt, ())
            for attempt in job.attempts
            if attempt.state in MAYBE_SENT
        ]
        if count > len(sent) and by_prompt.get(prompt):
            yield f"{prompt!r}: bought {count} times with {len(sent)} attempts"


def each_handle_is_owned_once(evidence: Evidence) -> list[str]:
    """A prediction belongs to one attempt, and exists."""
    attempts = [
        one
        for job in (*evidence.jobs.values(), *evidence.deleted.values())
        for one in job.attempts
        if one.handle is not None
    ]
    # A job whose deletion was not answered may still be there, as it was.
    owned = Counter(handle for _, handle in {(one.id, one.handle) for one in attempts})
    known = {one.id for one in evidence.bought}
    twice = [f"{handle}: owned {n} times" for handle, n in owned.items() if n > 1]
    return twice + [f"{one}: the provider has none" for one in set(owned) - known]


def nothing_goes_backwards(evidence: Evidence) -> list[str]:
    """Versions never go down, an end never changes, and callers see what is recorded."""
    found = []
    for job in (*evidence.jobs.values(), *evidence.deleted.values()):
        versions = [event.version for event in job.events]
        if versions != list(range(1, job.version + 1)):
            found.append(f"{job.id}: version {job.version}, events {versions}")
        if any(event.status in FINISHED for event in job.events[:-1]):
            found.append(f"{job.id}: changed after its end")
        if any(later.at < earlier.at for earlier, later in pairwise(job.events)):
            found.append(f"{job.id}: an event before its cause")
        recorded = {event.version: event.status for event in job.events}
        for sight in evidence.diary.sights.get(job.id, ()):
            if recorded.get(sight.version) != sight.status:
                found.append(
                    f"{job.id}: a caller saw {sight.status} at version {sight.version},"
                    f" recorded is {recorded.get(sight.version)}"
                )
    for job_id, sights in evidence.diary.sights.items():
        found += [f"{job_id}: {wrong}" for wrong in _backwards(sights)]
    return found


def _backwards(sights: list[Sight]) -> Iterator[str]:
    """Compare answers that did not overlap: the later one must not be older."""
    ended = sorted(sights, key=lambda sight: sight.ended)
    latest, position = 0, 0
    for sight in sorted(sights, key=lambda sight: sight.began):
        while position < len(ended) and ended[position].ended <= sight.began:
            latest = max(latest, ended[position].version)
            position += 1
        if sight.version < latest:
            yield f"version {sight.version} was answered after version {latest}"


def history_tells_the_state(evidence: Evidence) -> list[str]:
    """Replaying the recorded events gives the stored state."""
    found = []
    for job in evidence.jobs.values():
        try:
            told = _replayed(job)
        except IllegalEvent as error:
            found.append(f"{job.id}: recorded is what cannot be: {error}")
            continue
        attempt = job.attempts[-1] if job.attempts else None
        replayed = told.attempt
        stored = (
            *(job.status, job.stage, job.version, job.attempt_count, job.error_code),
            (attempt.state, attempt.handle) if attempt else None,
        )
        retold = (
            *(told.status, told.stage, told.version, told.attempts),
            told.failure.code if told.failure else None,
            (replayed.state, replayed.handle) if replayed else None,
        )
        if stored != retold:
            found.append(f"{job.id}: stored {stored}, recorded {retold}")
    return found


def _replayed(job: Job) -> JobState:
    birth, *rest = job.events
    return journal.replay(
        birth.at,
        timedelta(seconds=birth.data["deadline"]),
        [(journal.revive(one.name, one.data), one.at) for one in rest],
        Policy(),
    )


def every_picture_is_whole(evidence: Evidence) -> list[str]:
    """A completed job has its files, with the bytes it says they have."""
    found = []
    for job in evidence.jobs.values():
        served = evidence.served.get(job.id)
        if served is not None:
            found += [f"{job.id}: {reason}" for reason in served.broken]
        if job.status == "completed" and not job.files:
            found.append(f"{job.id}: completed without a file")
        if job.status != "completed" and job.files:
            found.append(f"{job.id}: {job.status} with files")
    return found


def nothing_runs_on(evidence: Evidence) -> list[str]:
    """Nothing is left running at the provider that nobody waits for."""
    return [
        f"{one.id}: still {one.status}: {one.prompt!r}"
        for one in evidence.bought
        if one.status not in AT_THE_PROVIDER
    ]


def no_claim_is_open(evidence: Evidence) -> list[str]:
    """A finished job is due never and in nobody's hands, and has no open attempt."""
    return [
        f"{job.id}: {job.status}, due {job.is_due}, claimed {job.is_claimed},"
        f" attempts {[one.state for one in job.attempts]}"
        for job in evidence.jobs.values()
        if job.status in FINISHED
        and (
            job.is_due
            or job.is_claimed
            or any(one.state in ("ready", "sent", "running") for one in job.attempts)
        )
    ]


def every_answer_was_promised(evidence: Evidence) -> list[str]:
    """The API answers what it documents, 503 included, and nothing else."""
    return list(evidence.diary.surprises)


def nobody_dies_by_himself(evidence: Evidence) -> list[str]:
    """No process ends because another one did, and each ends soon when it is asked to."""
    slow = [f"{name}: did not end after SIGTERM" for name in evidence.slow_stops]
    return [*evidence.deaths, *slow]


def nobody_reports_a_mistake(evidence: Evidence) -> list[str]:
    """No log tells of something that only a mistake of ours can cause."""
    return [
        f"{event} in the logs, {count} times"
        for event, count in evidence.complaints.items()
        if event.rstrip("!") in MISTAKES or event.endswith("!")
    ]


# In the order of the report, by the word that stands there.
def the_books_are_right(evidence: Evidence) -> list[str]:
    """What was held is let go, what was finished is charged, once, whatever died."""
    return list(evidence.books)


CHECKS: Mapping[str, Check] = {
    "lost": no_job_is_lost,
    "stuck": no_job_is_stuck,
    "extra": nothing_is_bought_twice,
    "backwards": nothing_goes_backwards,
    "files": every_picture_is_whole,
    "running": nothing_runs_on,
    "claims": no_claim_is_open,
    "handles": each_handle_is_owned_once,
    "history": history_tells_the_state,
    "answers": every_answer_was_promised,
    "books": the_books_are_right,
    "deaths": nobody_dies_by_himself,
    "mistakes": nobody_reports_a_mistake,
}


def judge(evidence: Evidence) -> dict[str, list[str]]:
    """Put the evidence to every check; give what is wrong, by the check's word."""
    return {word: check(evidence) for word, check in CHECKS.items()}
