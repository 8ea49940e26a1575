"""Finding jobs again: lists by what prompts say and how large pictures are.

No single plan serves every search.  A common word is soon met on a walk from the newest job
back; for a rare one that walk sees everything, and the index of prompts knows at once; asked
for a common one, the index names half the table.  The planner has to guess which it is, and
guesses from a sample.  So nothing here relies on its guess: every step looks at a bounded
number of jobs, and what it has seen decides on the next.

1. Walk: the newest jobs within the filters that have an index in the order of ids.
2. Ask the index of prompts: when it names few, these are all there can be.
3. Walk on in larger steps, among jobs with pictures of the size where one is wanted.  A search
   that has taken long enough ends with what it found, and tells where to go on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import Uuid

from app.services import job_queries
from app.services.job_queries import JobFilter, JobRecord, conditions
from app.services.job_records import ASSETS, JOBS

# How long a search may go on walking; what is left is for the next request.
LOOKING = timedelta(milliseconds=100)

_FIRST_STEP = 1_000
_LARGEST_STEP = 8_000
_FEW = 4_000  # what an index may name; looked at in some 20 ms
_FEW_LIVE = 20_000  # live jobs are not in the index of prompts: looked at one by one

_PHRASE = re.compile(r'"([^"]+)"|(\S+)')
# What certainly has a trigram in the index, whatever the database's locale takes for a letter.
_INDEXED = re.compile("[A-Za-z0-9]{3}")


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs, newest first, and the job before which to go on; None: there are no more.

    A search that had to give up in time has fewer jobs than were asked for, perhaps none, and
    goes on all the same.
    """

    jobs: Sequence[JobRecord]
    rest: UUID | None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a step saw: jobs that fit, newest first; how many it saw, and the oldest."""

    fitting: list[UUID]
    total: int
    oldest: UUID | None


def words_of(text: str) -> list[str]:
    """Give what must occur in a prompt: every word; between double quotes, as it stands."""
    found = (phrase or word for phrase, word in _PHRASE.findall(text))
    return list(dict.fromkeys(found))


async def page(
    conn: AsyncConnection,
    wanted: JobFilter,
    *,
    before: UUID | None,
    limit: int,
    looking: timedelta = LOOKING,
) -> Page:
    """List jobs, newest first, older than the job `before`; at most `limit`.

    On a connection in a transaction; writes nothing.
    """
    words = words_of(wanted.text or "")
    if not words and wanted.size is None:
        found = await job_queries.page(conn, wanted, before=before, limit=limit + 1)
        rest = found[limit - 1].row.id if len(found) > limit else None
        return Page(found[:limit], rest)
    # A plan made for any word is a plan for none: after a few executions it would be kept.
    await conn.exec_driver_sql("SET LOCAL plan_cache_mode = force_custom_plan")
    ids, rest = await _search(conn, wanted, words, before, limit, looking)
    records = await job_queries.find(conn, ids)
    return Page([records[one] for one in ids if one in records], rest)


async def _search(
    conn: AsyncConnection,
    wanted: JobFilter,
    words: Sequence[str],
    before: UUID | None,
    limit: int,
    looking: timedelta,
) -> tuple[list[UUID], UUID | None]:
    """Give the ids of a page, and where the next one begins."""
    deadline = time.monotonic() + looking.total_seconds()
    found: list[UUID] = []
    for number, step in enumerate(_steps()):
        walk = _walk if number == 0 or wanted.size is None else _walk_pictures
        missing = limit + 1 - len(found)
        seen = await walk(conn, wanted, words, before, step, missing)
        found += seen.fitting
        if len(found) > limit or seen.total < step:
            break
        before = seen.oldest
        if number == 0:
            missing = limit + 1 - len(found)
            others = await _ask_index(conn, wanted, words, before, missing)
            if others is not None:
                found += others
                break
        elif time.monotonic() >= deadline:
            return found, before
    return found[:limit], found[limit - 1] if len(found) > limit else None


def _steps() -> Iterator[int]:
    step = _FIRST_STEP
    while True:
        yield step
        step = min(step * 4, _LARGEST_STEP)


async def _walk(
    conn: AsyncConnection,
    wanted: JobFilter,
    words: Sequence[str],
    before: UUID | None,
    step: int,
    limit: int,
) -> _Seen:
    """Look at so many jobs within the other filters, newest first."""
    fits = and_(true(), *_says(words), *_measures(wanted))
    rows = select(JOBS.c.id, fits.label("fits"))
    rows = rows.where(*conditions(wanted), *_older(JOBS.c.id, before))
    return await _look(conn, rows.order_by(JOBS.c.id.desc()).limit(step), limit)


async def _walk_pictures(
    conn: AsyncConnection,
    wanted: JobFilter,
    words: Sequence[str],
    before: UUID | None,
    step: int,
    limit: int,
) -> _Seen:
    """Look at so many jobs with an output of the size, newest first."""
    pictures = (
        select(ASSETS.c.job_id)
        .distinct()
        .where(*_is_size(wanted), *_older(ASSETS.c.job_id, before))
        .order_by(ASSETS.c.job_id.desc())
        .limit(step)
        .subquery()
    )
    fits = and_(true(), *conditions(wanted), *_says(words))
    rows = select(JOBS.c.id, fits.label("fits"))
    rows = rows.join(pictures, pictures.c.job_id == JOBS.c.id)
    return await _look(conn, rows, limit)


async def _ask_index(
    conn: AsyncConnection,
    wanted: JobFilter,
    words: Sequence[str],
    before: UUID | None,
    limit: int,
) -> list[UUID] | None:
    """Give all older jobs that fit, if the index of prompts names few; else None."""
    indexed = [word for word in words if _INDEXED.search(word)]
    if not indexed:
        return None
    fits = and_(true(), *conditions(wanted), *_says(words), *_measures(wanted))
    jobs = select(JOBS.c.id, fits.label("fits")).where(*_older(JOBS.c.id, before))
    # In this order: a job may be finished in between, and is met twice then.
    live = jobs.where(JOBS.c.due_at.is_not(None)).limit(_FEW_LIVE + 1)
    now = await _look(conn, live, limit)
    finished = jobs.where(JOBS.c.due_at.is_(None), *_says(indexed)).limit(_FEW + 1)
    named = await _look(conn, finished, limit)
    if now.total > _FEW_LIVE or named.total > _FEW:
        return None
    return sorted({*now.fitting, *named.fitting}, reverse=True)


async def _look(conn: AsyncConnection, rows: Select[Any], limit: int) -> _Seen:
    """Look at all the rows, and give the newest that fit."""
    seen = rows.cte("seen")  # used three times, and therefore looked at once
    fitting = select(seen.c.id).where(seen.c.fits).order_by(seen.c.id.desc())
    statement = select(
        func.array(fitting.limit(limit).scalar_subquery(), type_=ARRAY(Uuid())),
        select(func.count()).select_from(seen).scalar_subquery(),
        select(seen.c.id).order_by(seen.c.id).limit(1).scalar_subquery(),
    )
    ids, total, oldest = (await conn.execute(statement)).one()
    return _Seen(list(ids), total, oldest)


def _older(
    column: ColumnElement[UUID], before: UUID | None
) -> Sequence[ColumnElement[bool]]:
    return () if before is None else (column < before,)


def _says(words: Sequence[str]) -> Sequence[ColumnElement[bool]]:
    """Every word occurs in the prompt, in any case."""
    return [JOBS.c.prompt.icontains(word, autoescape=True) for word in words]


def _measures(wanted: JobFilter) -> Sequence[ColumnElement[bool]]:
    """An output is of the size.  With its LIMIT it is asked job by job, never for all first."""
    if wanted.size is None:
        return ()
    one: Select[Any] = select(literal_column("1")).where(ASSETS.c.job_id == JOBS.c.id)
    return (one.where(*_is_size(wanted)).limit(1).scalar_subquery().is_not(None),)


def _is_size(wanted: JobFilter) -> Sequence[ColumnElement[bool]]:
    width, height = wanted.size or (0, 0)
    return ASSETS.c.width == width, ASSETS.c.height == height
