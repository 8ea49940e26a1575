"""The bare floor: FastAPI and asyncpg, one INSERT with commit per POST, one read per GET.

No validation, no events, no queue, no errors: what the machine can do at most with this
framework and this driver.  Run by `bench/submit_status.py`; DATABASE_URL names the database.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import orjson
from fastapi import FastAPI, Request, Response
from uuid_utils.compat import uuid7

TABLE = """
CREATE TABLE IF NOT EXISTS floor_jobs (
    id uuid PRIMARY KEY, status text NOT NULL, prompt text NOT NULL,
    input jsonb NOT NULL, created_at timestamptz NOT NULL DEFAULT now())
"""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pool."""
    async with asyncpg.create_pool(
        os.environ["DATABASE_URL"], min_size=10, max_size=10
    ) as pool:
        await pool.execute(TABLE)
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/jobs", status_code=202)
async def submit(request: Request) -> Response:
    """Store a row and answer with its id."""
    body = orjson.loads(await request.body())
    job_id = uuid7()
    await request.app.state.pool.execute(
        "INSERT INTO floor_jobs (id, status, prompt, input) VALUES ($1, $2, $3, $4)",
        job_id,
        "pending",
        body["prompt"],
        orjson.dumps(body).decode(),
    )
    answer = {"job_id": str(job_id), "status": "pending"}
    return Response(orjson.dumps(answer), 202, media_type="application/json")


@app.get("/jobs/{job_id}")
async def status(request: Request, job_id: UUID) -> Response:
    """Read a row by its key."""
    row = await request.app.state.pool.fetchrow(
        "SELECT id, status, prompt, input, created_at FROM floor_jobs WHERE id = $1",
        job_id,
    )
    answer = {
        "job_id": str(row["id"]),
        "status": row["status"],
        "prompt": row["prompt"],
        "input": orjson.loads(row["input"]),
        "created_at": row["created_at"],
    }
    return Response(orjson.dumps(answer), media_type="application/json")
