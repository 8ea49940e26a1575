"""Starting with wrong settings: one clear line each, and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.core.config import CONFIGURATION_ERROR
from tests.support.servers import ROOT

GOOD = {
    "DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:9/jobs",
    "REDIS_URL": "redis://127.0.0.1:9/0",
    "REPLICATE_API_TOKEN": "r8_hunter2",
}


def start(
    folder: Path, root: str = "app.main", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do what `uvicorn app.main:app` does first, in a folder without `.env`."""
    return subprocess.run(
        [sys.executable, "-c", f"import {root}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path) -> None:
    ended = start(tmp_path)

    assert ended.returncode == CONFIGURATION_ERROR == 2
    lines = ended.stderr.splitlines()
    assert [line.split()[0] for line in lines] == list(GOOD)
    assert all("is not set: " in line for line in lines)


def test_what_is_wrong_is_named_and_no_secret_is_shown(tmp_path: Path) -> None:
    wrong = {
        "DATABASE_URL": "mysql://me:hunter2@localhost/jobs",
        "REDIS_URL": "http://me:hunter2@localhost",
        "MAX_RETRIES": "many",
        "RETRY_BACKOFF_BASE": "0",
        "JOB_DEADLINE_SECONDS": "1",
        "STORAGE_URL": "ftp://pictures",
        "PUBLIC_BASE_URL": "pictures.example",
        "API_V1_PREFIX": "api",
        "REPLICATE_WEBHOOK_SECRET": "whsec_hunter2%",
        "LOG_FORMAT": "xml",
        "DEBUG": "perhaps",
    }

    ended = start(tmp_path, **GOOD | wrong)

    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(wrong)
    assert all(": " in line for line in lines)
    assert "hunter2" not in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("root", ["app.main", "worker.celery_app"])
def test_a_wrong_price_file_is_one_line_that_names_the_entry(
    tmp_path: Path, root: str
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(
        'version = "1"\n[[price]]\nmodel = "me/model"\nsince = 2026-01-01\n'
    )

    ended = start(tmp_path, root, **GOOD, LOG_DIR="", PRICE_FILE=str(prices))

    assert ended.returncode == CONFIGURATION_ERROR
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"PRICE_FILE {prices}, entry 1 (me/model): ")


def test_right_settings_start_without_any_server(tmp_path: Path) -> None:
    ended = start(tmp_path, **GOOD, LOG_DIR="")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == [], "importing writes nothing"
