"""What is there in the end: rows, files over HTTP, and what the provider sold."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psycopg
from psycopg.rows import dict_row

from tests.prove.clients import Diary

AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Attempt:
    """A row of `attempts`."""

    id: str
    job_id: str
    number: int
    state: str
    handle: str | None
    sent_at: datetime


@dataclass(frozen=True, slots=True)
class Event:
    """A row of `job_events`."""

    version: int
    name: str
    data: Mapping[str, Any]
    status: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Job:
    """A row of `jobs` with all that belongs to it."""

    id: str
    status: str
    stage: str | None
    version: int
    prompt: str
    num_outputs: int
    attempt_count: int
    is_due: bool
    is_claimed: bool
    error_code: str | None
    created_at: datetime
    attempts: tuple[Attempt, ...] = ()
    events: tuple[Event, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bought:
    """A prediction, as the provider knows it."""

    id: str
    status: str
    prompt: str
    webhook: str | None
    has_output: bool


@dataclass(frozen=True, slots=True)
class Served:
    """What the API says of a job in the end; `broken` are files that are not what they should."""

    code: int
    status: str | None = None
    version: int | None = None
    broken: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything the checks look at.  `deleted` are jobs as they were before their deletion."""

    diary: Diary
    jobs: Mapping[str, Job]
    deleted: Mapping[str, Job]
    bought: Sequence[Bought]
    served: Mapping[str, Served]
    deaths: Sequence[str] = ()
    slow_stops: Sequence[str] = ()
    late: Sequence[str] = ()
    complaints: Mapping[str, int] = field(default_factory=dict)
    books: Sequence[str] = ()


# -------------------------------------------------------------------------------- rows

_JOBS = """
SELECT id::text, status, stage, version, prompt, num_outputs, attempts AS attempt_count,
       due_at IS NOT NULL AS is_due, claim_token IS NOT NULL AS is_claimed, error_code, created_at
FROM jobs WHERE %(all)s OR id = ANY(%(ids)s::uuid[])
"""
_ATTEMPTS = """
SELECT id::text, job_id::text, number, state, handle, sent_at FROM attempts
WHERE %(all)s OR job_id = ANY(%(ids)s::uuid[]) ORDER BY job_id, number
"""
_EVENTS = """
SELECT job_id::text, version, name, data, status, at FROM job_events
WHERE %(all)s OR job_id = ANY(%(ids)s::uuid[]) ORDER BY job_id, version
"""
_FILES = """
SELECT job_id::text, key, sha256 FROM assets
WHERE %(all)s OR job_id = ANY(%(ids)s::uuid[]) ORDER BY job_id, index
"""


def read_jobs(database_url: str, ids: Sequence[str] | None = None) -> dict[str, Job]:
    """Read these jobs, or all, at one moment."""
    which = {"all": ids is None, "ids": list(ids or ())}
    with psycopg.connect(database_url, row_factory=dict_row) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        jobs = connection.execute(_JOBS, which).fetchall()
        attempts = connection.execute(_ATTEMPTS, which).fetchall()
        events = connection.execute(_EVENTS, which).fetchall()
        files = connection.execute(_FILES, which).fetchall()
    of_attempts = _by_job(attempts)
    of_events = _by_job(events)
    of_files = _by_job(files)
    return {
        row["id"]: Job(
            **row,
            attempts=tuple(Attempt(**one) for one in of_attempts.get(row["id"], ())),
            events=tuple(
                Event(**{k: v for k, v in one.items() if k != "job_id"})
                for one in of_events.get(row["id"], ())
            ),
            files={f["key"]: f["sha256"] for f in of_files.get(row["id"], ())},
        )
        for row in jobs
    }


# What the service's account says, beside what its entries and its live jobs add up to.
_BOOKS = """
SELECT a.live, a.reserved_usd, a.spent_usd, e.reserved, e.spent, e.charges, e.prices,
       j.live AS jobs, j.over
FROM accounts a,
     (SELECT coalesce(sum(amount_usd) FILTER (WHERE kind <> 'charge'), 0) AS reserved,
             coalesce(sum(amount_usd) FILTER (WHERE kind = 'charge'), 0) AS spent,
             count(*) FILTER (WHERE kind = 'charge') AS charges,
             count(*) FILTER (WHERE kind = 'reserve') AS prices FROM ledger_entries) e,
     (SELECT count(*) FILTER (WHERE reserved_usd IS NOT NULL AND completed_at IS NULL) AS live,
             count(*) FILTER (WHERE completed_at IS NOT NULL) AS over FROM jobs) j
WHERE a.name = 'service'
"""


def read_books(database_url: str) -> list[str]:
    """Say what is wrong with the money: the account, its entries and the jobs must agree."""
    with psycopg.connect(database_url, row_factory=dict_row) as connection:
        row = connection.execute(_BOOKS).fetchone()
    assert row is not None
    found = []
    if (row["reserved_usd"], row["spent_usd"]) != (row["reserved"], row["spent"]):
        found.append(f"the account and its entries differ: {row}")
    if row["live"] != row["jobs"]:
        found.append(f"the account counts other live jobs: {row}")
    if row["charges"] < row["over"]:  # more, for deleted jobs leave theirs
        found.append(f"finished jobs were not charged: {row}")
    if not row["prices"]:
        found.append("nothing was reserved at all")
    if not row["jobs"] and row["reserved_usd"]:
        found.append(f"money is held for no job: {row}")
    return found


def _by_job(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["job_id"], []).append(row)
    return found


# --------------------------------------------------------------------- over the wire


async def read_bought(sandbox_url: str) -> list[Bought]:
    """Ask the provider for everything it ever sold, oldest first."""
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        async with http.get(f"{sandbox_url}/sandbox/stats?full=1") as answer:
            body = await answer.json()
    return [
        Bought(
            id=one["id"],
            status=one["status"],
            prompt=str(one["input"].get("prompt")),
            webhook=one["webhook"],
            has_output=bool(one.get("output")),
        )
        for one in body["predictions"]
    ]


async def read_served(url: str, job_ids: Iterable[str]) -> dict[str, Served]:
    """Ask the API for each job, and fetch every file of those that are completed."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(http: aiohttp.ClientSession, job_id: str) -> Served:
        async with gate, http.get(f"{url}/api/v1/status/{job_id}") as answer:
            if answer.status != 200:
                return Served(answer.status)
            body = await answer.json()
            broken = [await _broken(http, url, output) for output in body["outputs"]]
            return Served(
                answer.status,
                body["status"],
                body["version"],
                tuple(reason for reason in broken if reason is not None),
            )

    ids = list(job_ids)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as http:
        found = await asyncio.gather(*(one(http, job_id) for job_id in ids))
    return dict(zip(ids, found, strict=True))


async def _broken(
    http: aiohttp.ClientSession, url: str, output: Mapping[str, Any]
) -> str | None:
    """Say what is wrong with a file, None when it is whole."""
    path = urlsplit(output["url"]).path
    async with http.get(f"{url}{path}") as answer:
        content = await answer.read()
    if answer.status != 200:
        return f"{path}: {answer.status}"
    if hashlib.sha256(content).hexdigest() != output["sha256"]:
        return f"{path}: other bytes"
    if len(content) != output["size_bytes"]:
        return f"{path}: {len(content)} bytes"
    return None


# -------------------------------------------------------------------------------- logs


def read_complaints(logs: Iterable[Path]) -> Counter[str]:
    """Count what processes warned about, by event; `…!` had a traceback of ours."""
    found: Counter[str] = Counter()
    for log in logs:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("Traceback"):
                found["Traceback!"] += 1
            if not line.startswith("{"):
                continue
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut in half by a kill
            if record.get("level") in ("warning", "error", "critical"):
                mark = "!" if "exception" in record else ""
                found[f"{str(record.get('event'))[:80]}{mark}"] += 1
    return found
