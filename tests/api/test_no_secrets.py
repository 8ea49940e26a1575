"""Nothing that opens a door is in a log; and the net that looks for it catches what there is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.runner import Sandbox
from tests.api.conftest import emptied
from tests.api.served import Api
from tests.support.log_net import SECRETS, leaks, search
from tests.support.servers import ROOT

KEY = "mgs_Zm9vYmFyMDEyMzQ1Njc4OWFiY2RlZmdoaWprbG1ub3A"
LINK = "/media/ab/cd.png?expires=1&signature=c2lnbmVkLWJ5LXVz"

PLANTED = {
    "an API key": f'{{"event": "key.created", "key": "{KEY}"}}',
    "a token of the provider": "ReplicateError: 401 for r8_Zm9vYmFyMDEy",
    "a signing secret": "checked with whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
    "a credential": "headers={'a': 'Bearer Zm9vYmFyMDEy'}",
    "a header": '{"headers": {"X-API-Key": "Zm9vYmFyMDEy"}}',
    "a signed link": f'127.0.0.1:1 - "GET {LINK} HTTP/1.1" 200',
    "a webhook's token": "POST /callbacks/replicate/1?token=Zm9vYmFyMDEy HTTP/1.1",
    "a password in a URL": "cannot reach postgresql+asyncpg://app:hunter2@db:5432/app",
}
INNOCENT = [
    'mgs_provider_request_seconds_bucket{le="0.5"} 3',
    '127.0.0.1:1 - "GET /media/ab/cd.png?[redacted] HTTP/1.1" 200',
    "REPLICATE_API_TOKEN=r8_sandbox",
    "WWW-Authenticate: Bearer",
    "send it as Authorization: Bearer mgs_…",
    "listening on http://127.0.0.1:8000",
    "database postgresql://mediagen@127.0.0.1:5432/mediagen",
    '{"event": "auth.refused", "prefix": "mgs_AbCd12", "signature": "bad"}',
]


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder the suite's own net does not look into."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        yield Path(folder)


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    return await emptied(shared, shared_sandbox)


def test_every_kind_of_secret_has_an_example() -> None:
    assert set(PLANTED) == set(SECRETS)


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_secret_is_caught(elsewhere: Path, kind: str) -> None:
    log = elsewhere / "deep" / "logs" / "api.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"nothing here\n{PLANTED[kind]}\nnor here\n")

    (found,) = [one for one in search(elsewhere) if kind in one]

    assert found.startswith("deep/logs/api.log")


@pytest.mark.parametrize("line", INNOCENT)
def test_what_is_no_secret_is_left_alone(line: str) -> None:
    assert list(leaks(line)) == []


@pytest.mark.parametrize("name", ["worker.log", "api.log.1", "api.txt"])
def test_a_session_that_wrote_a_secret_down_fails(elsewhere: Path, name: str) -> None:
    suite = elsewhere / "test_planted.py"
    suite.write_text(
        "def test_it_passes(tmp_path):\n"
        f"    (tmp_path / {name!r}).write_text({PLANTED['an API key']!r})\n"
    )

    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.support.log_net"),
            *("-p", "no:valkey", "-p", "no:cacheprovider", f"--rootdir={elsewhere}"),
            *(f"--basetemp={elsewhere / 'base'}", "-q", str(suite)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 passed, 1 error" in ran.stdout
    assert f"{name} holds an API key" in ran.stdout


async def test_the_access_log_has_no_queries_and_no_headers(api: Api) -> None:
    await api.client.get(LINK, headers={"authorization": f"Bearer {KEY}"})
    await api.client.get("/api/v1/jobs?q=something+private", headers={"x-api-key": KEY})
    await api.client.post(f"/api/v1/callbacks/replicate/1?token={KEY}", content=b"{}")

    assert api.settings.log_dir is not None
    text = (api.settings.log_dir / "api.log").read_text()
    assert "GET /media/ab/cd.png?[redacted]" in text
    for private in ("c2lnbmVk", "something", KEY):
        assert private not in text
