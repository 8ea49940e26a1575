"""A stranger reads our OpenAPI document and tries everything it can think of."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from sandbox.runner import Sandbox
from tests.api.conftest import Serve
from tests.api.served import Api, working

SEED = "4"
CONFIG = Path(__file__).with_name("schemathesis.toml")
ADMIN_KEY = "an-administrator-of-this-test-alone"
# DELETE revokes a key, and that there was one is kept and told; that deleted jobs are gone,
# test_jobs.py shows.
LEFT_OUT = "use_after_free"
# examples of an operation · cases that come of them, with those of the other phases
AMOUNTS = {"with keys": (12, 1000), "without keys": (4, 300)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", AMOUNTS)
async def test_no_request_along_the_document_surprises_us(
    serve: Serve,
    sandbox: Sandbox,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    # Here an address is wrong hundreds of times on purpose; tests/services has what follows.
    monkeypatch.setattr("app.services.attempts.BURST", 1_000_000)
    keys: dict[str, Any] = {}
    examples, least = AMOUNTS[mode]
    options, left_out = [f"--max-examples={examples}"], LEFT_OUT
    if mode == "with keys":
        keys = {"auth_required": True, "admin_api_key": SecretStr(ADMIN_KEY)}
        options.append(f"--header=Authorization: Bearer {ADMIN_KEY}")
    else:
        left_out += ",ignored_auth"
    api: Api = await serve(sandbox, **keys)
    async with working(api.settings):
        code, said, report = await attack(
            api, tmp_path, [*options, f"--exclude-checks={left_out}"]
        )

    generated = report["test_cases"]["generated"]
    with capsys.disabled():
        print(f"\n{generated} cases of Schemathesis {mode}")
    assert code == 0, said
    assert report["operations"]["tested"] == report["operations"]["total"]
    assert generated >= least


async def attack(
    api: Api, folder: Path, options: Sequence[str]
) -> tuple[int, str, dict[str, Any]]:
    """Run the tool as its own process; give its exit code, its words and its report."""
    file = folder / "report.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", f"--config-file={CONFIG}", "run"),
        *(f"{api.origin}/openapi.json", "--checks=all"),
        *("--phases=examples,coverage,fuzzing,stateful", f"--seed={SEED}"),
        *("--generation-deterministic", "--no-shrink", "--continue-on-failure"),
        *("--no-color", "--report=json", f"--report-json-path={file}", *options),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    assert file.exists(), said.decode()
    return process.returncode, said.decode(), json.loads(file.read_bytes())
