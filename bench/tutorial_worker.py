"""The design of most tutorials: a Celery task that buys, waits, stores, and updates the row.

Run by `bench/tutorial.py`.  The vendor's own client does the waiting: `run()` asks the provider
to hold the answer for up to 60 s, and polls every half second after that.  The pool is prefork,
Celery's default; nothing here is made slower than it has to be.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import psycopg
from celery import Celery
from replicate.client import Client

MODEL = "black-forest-labs/flux-schnell"
TABLE = """
CREATE TABLE tutorial_jobs (
    id int PRIMARY KEY, status text NOT NULL, prompt text NOT NULL, path text,
    created_at timestamptz NOT NULL DEFAULT now(), completed_at timestamptz)
"""

app = Celery("tutorial", broker=os.environ["REDIS_URL"])
app.conf.task_ignore_result = True


@app.task
def generate(job_id: int) -> None:
    """Make the picture of a job."""
    client = Client(
        api_token="r8_bench",
        base_url=os.environ["TUTORIAL_PROVIDER"],
        timeout=httpx.Timeout(90),
    )
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        row = connection.execute(
            "UPDATE tutorial_jobs SET status = 'processing' WHERE id = %s"
            " RETURNING prompt",
            [job_id],
        ).fetchone()
        assert row is not None
        output: Any = client.run(MODEL, input={"prompt": row[0]})
        path = Path(os.environ["STORAGE_PATH"], f"{job_id}.jpg")
        path.write_bytes(httpx.get(str(output[0])).raise_for_status().content)
        connection.execute(
            "UPDATE tutorial_jobs SET status = 'completed', path = %s,"
            " completed_at = now() WHERE id = %s",
            [str(path), job_id],
        )
