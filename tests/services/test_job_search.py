"""Searches among 24,000 jobs: the right ones, in order, and never by looking at most of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.core.database import open_engine
from app.services import job_search
from app.services.job_queries import JobFilter
from app.services.job_search import words_of
from tests.support.servers import DatabaseServer

JOBS = 24_000
LIVE = 60  # the youngest
AT_ONCE = timedelta(0)
FOR_EVER = timedelta(minutes=2)

# Jobs by number, the eldest first: what is common, rare, old, somebody's, or of a size.
_FILL = """
INSERT INTO jobs (id, version, owner, status, stage, is_cancel_requested, attempts, look_failures,
    provider, model, prompt, input, num_outputs, priority, metadata, warnings, error_code,
    due_at, deadline_at, created_at, completed_at)
SELECT uuidv7((n - %(jobs)s) * interval '1 s'), 1,
    CASE WHEN n %% 400 = 0 THEN 'few' WHEN n %% 4 = 1 THEN 'team' ELSE 'default' END,
    CASE WHEN is_live THEN 'pending' WHEN n %% 25 = 7 THEN 'failed' ELSE 'completed' END,
    CASE WHEN is_live THEN 'queued' END, false, 0, 0, 'replicate',
    CASE WHEN n %% 10 = 3 THEN 'acme/sketcher' ELSE 'acme/painter' END,
    'A house, number ' || n || '.'
        || CASE WHEN n %% 2 = 0 THEN ' Common things' ELSE ' odd 東京 light' END
        || CASE WHEN n %% 3000 = 11 THEN ' rare bird; oil on canvas' ELSE '' END
        || CASE WHEN n %% 3000 = 12 THEN ' canvas on oil; qx' ELSE '' END
        || CASE WHEN n < 14000 THEN ' Christmas' ELSE '' END,
    '{}', 1, 0, '{}', '[]', CASE WHEN NOT is_live AND n %% 25 = 7 THEN 'x' END,
    CASE WHEN is_live THEN now() + interval '1 day' END, now(), now(),
    CASE WHEN NOT is_live THEN now() END
FROM (SELECT n, n > %(jobs)s - %(live)s AS is_live FROM generate_series(1, %(jobs)s) AS n)
"""
_PICTURES = """
INSERT INTO assets (job_id, index, key, sha256, content_type, size_bytes, width, height, created_at)
SELECT id, index, 'ab/cd.png', 'abcd', 'image/png', 1,
    CASE WHEN n %% 2000 = 17 THEN 640 ELSE 1024 END, 1024, now()
FROM (SELECT id, row_number() OVER (ORDER BY id) AS n FROM jobs WHERE status = 'completed'),
    generate_series(0, 1) AS index
"""


@pytest.fixture(scope="module")
async def filled(
    database_server: DatabaseServer, template_database: str
) -> AsyncIterator[AsyncEngine]:
    """A database with jobs enough for plans to matter."""
    name = database_server.create(template=template_database)
    url = database_server.url_of(name)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(_FILL.encode(), {"jobs": JOBS, "live": LIVE})
        connection.execute(_PICTURES.replace("%%", "%").encode())
        connection.execute("VACUUM (ANALYZE)")
    # Reading all of it may take a busy machine longer than a silent session lives.
    patient = {"idle_in_transaction_session_timeout": "0"}
    engine = open_engine(SecretStr(url), name="test", pool_size=2, settings=patient)
    yield engine
    await engine.dispose()
    database_server.drop(name)


@pytest.fixture
async def conn(filled: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with filled.connect() as connection:
        yield connection


async def numbers(
    conn: AsyncConnection,
    *,
    looking: timedelta = FOR_EVER,
    limit: int = 20,
    **wanted: Any,
) -> list[int]:
    """Give the numbers of a page's jobs, in its order."""
    found = await job_search.page(
        conn, JobFilter(**wanted), before=None, limit=limit, looking=looking
    )
    return [int(one.row.prompt.split()[3].strip(".")) for one in found.jobs]


async def read_rows(conn: AsyncConnection) -> int:
    """Say how many rows of `jobs` this session has read, by whatever plan."""
    rows = await conn.scalar(
        text(
            "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables"
            " WHERE relname = 'jobs'"
        )
    )
    return int(rows or 0)


def newest(step: int, offset: int, *, below: int = JOBS + 1) -> list[int]:
    return [n for n in range(below - 1, 0, -1) if n % step == offset][:20]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"text": "common"}, newest(2, 0)),
        ({"text": "common", "owner": "few"}, newest(400, 0)),
        ({"text": "rare"}, newest(3000, 11)),
        ({"text": "RARE bir"}, newest(3000, 11)),
        ({"text": "rare common"}, []),
        ({"text": "oil canvas rare"}, newest(3000, 11)),
        ({"text": '"oil on canvas"'}, newest(3000, 11)),
        ({"text": '"canvas on oil"'}, newest(3000, 12)),
        ({"text": "canvas on oil"}, sorted(newest(3000, 11) + newest(3000, 12))[::-1]),
        ({"text": "christmas"}, list(range(13_999, 13_979, -1))),
        ({"text": "christmas", "owner": "few"}, newest(400, 0, below=14_000)),
        ({"text": "christmas 東京"}, newest(2, 1, below=14_000)),
        ({"text": "qx"}, newest(3000, 12)),
        ({"text": "東京"}, newest(2, 1)),
        ({"text": "zebra"}, []),
        ({"text": "common", "owner": "team"}, []),
        ({"text": "common", "owner": "nobody"}, []),
        ({"text": "rare", "status": "pending"}, []),
        ({"text": "common", "status": "pending"}, newest(2, 0)),
        ({"text": "odd", "model": "acme/sketcher"}, newest(10, 3)),
        ({"size": (7, 7)}, []),
        ({"size": (1024, 1024), "status": "pending"}, []),
        ({"size": (640, 1024), "text": "zebra"}, []),
    ],
)
async def test_the_right_jobs_in_order(
    conn: AsyncConnection, wanted: dict[str, Any], expected: list[int]
) -> None:
    assert await numbers(conn, **wanted) == expected


async def test_a_size_is_that_of_any_output_and_a_job_is_met_once(
    conn: AsyncConnection,
) -> None:
    every = JobFilter(status="completed")
    jobs = await job_search.page(conn, every, before=None, limit=JOBS)
    wanted = [
        one.row.id
        for one in jobs.jobs
        if any(picture["width"] == 640 for picture in one.outputs)
    ]

    found = await job_search.page(
        conn, JobFilter(size=(640, 1024)), before=None, limit=50
    )

    assert [one.row.id for one in found.jobs] == wanted
    assert len(wanted) == 12
    assert found.rest is None


@pytest.mark.parametrize("looking", [AT_ONCE, FOR_EVER])
@pytest.mark.parametrize(
    "wanted",
    [
        {"text": "rare"},
        {"text": "qx"},
        {"text": "christmas 東京", "owner": "team", "model": "acme/sketcher"},
        {"size": (640, 1024)},
        {"text": "common", "owner": "few", "size": (1024, 1024)},
    ],
)
async def test_pages_together_are_everything_whenever_a_search_gives_up(
    conn: AsyncConnection, wanted: dict[str, Any], looking: timedelta
) -> None:
    whole = await job_search.page(
        conn, JobFilter(**wanted), before=None, limit=JOBS, looking=FOR_EVER
    )
    ids = [one.row.id for one in whole.jobs]

    found: list[UUID] = []
    before: UUID | None = None
    while True:
        page = await job_search.page(
            conn, JobFilter(**wanted), before=before, limit=7, looking=looking
        )
        found += [one.row.id for one in page.jobs]
        if page.rest is None:
            break
        assert before is None or page.rest < before
        before = page.rest

    assert ids and found == ids
    assert whole.rest is None


@pytest.mark.parametrize(
    ("wanted", "looking", "most"),
    [
        ({"text": "common"}, FOR_EVER, 1_100),
        ({"text": "rare"}, FOR_EVER, 1_200),
        ({"text": "zebra"}, FOR_EVER, 1_200),
        ({"text": "rare zebra"}, FOR_EVER, 1_200),
        ({"text": "common", "owner": "few"}, FOR_EVER, 200),
        ({"text": "common", "owner": "nobody"}, FOR_EVER, 0),
        ({"text": "zebra 東京", "owner": "team"}, FOR_EVER, 4_300),
        ({"size": (640, 1024)}, FOR_EVER, 1_200),
        ({"size": (7, 7), "text": "qx"}, FOR_EVER, 1_100),
        ({"text": "christmas"}, AT_ONCE, 5_200 + LIVE + 4_100),
        ({"text": "東京 zebra"}, FOR_EVER, 1_200),
        ({"text": "qx"}, AT_ONCE, 5_200),
    ],
)
async def test_a_search_looks_at_few_jobs_or_gives_up(
    conn: AsyncConnection, wanted: dict[str, Any], looking: timedelta, most: int
) -> None:
    before = await read_rows(conn)

    await numbers(conn, looking=looking, **wanted)

    assert await read_rows(conn) - before <= most


async def test_a_search_that_gives_up_says_where_to_go_on(
    conn: AsyncConnection,
) -> None:
    page = await job_search.page(
        conn, JobFilter(text="christmas"), before=None, limit=20, looking=AT_ONCE
    )

    assert [len(page.jobs), page.rest is not None] == [0, True]


async def test_a_list_without_a_search_is_never_cut_short(
    conn: AsyncConnection,
) -> None:
    assert await numbers(conn, looking=AT_ONCE, text=" ", limit=3) == [
        JOBS,
        JOBS - 1,
        JOBS - 2,
    ]
    assert await numbers(conn, looking=AT_ONCE, owner="few") == newest(400, 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", []),
        ("  oil   canvas ", ["oil", "canvas"]),
        ('"oil on canvas" sea', ["oil on canvas", "sea"]),
        ('"oil', ['"oil']),
        ('a "" b', ["a", '""', "b"]),
        ("sea sea", ["sea"]),
    ],
)
def test_words_and_phrases(given: str, words: list[str]) -> None:
    assert words_of(given) == words
