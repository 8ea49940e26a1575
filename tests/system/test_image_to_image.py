"""A picture of one's own, changed by a model: the whole way, through real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.command_line import run
from tests.support.drawings import draw
from tests.support.stack import Stack

pytestmark = pytest.mark.slow

Env = Callable[..., dict[str, str]]

MODEL = "black-forest-labs/flux-dev"
PICTURE = draw(1, side=64)


def read_as_the_model(url: str) -> bytes:
    """Read an input without any right of the caller's."""
    answer = httpx.get(url)
    if "/v1/files/" in url:
        answer = httpx.get(f"{url}/download", headers={"Authorization": "Bearer it"})
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.mark.parametrize("way", ["link", "files"])
def test_a_picture_goes_in_and_another_comes_out(
    tmp_path: Path, child_env: Env, way: str
) -> None:
    stack = Stack(tmp_path, child_env, sandbox=("--speed", "instant"))
    if way == "link":
        stack.api.set(PUBLIC_BASE_URL=stack.url)
        stack.worker.set(PUBLIC_BASE_URL=stack.url)
    picture = tmp_path / "harbour.png"
    picture.write_bytes(PICTURE)
    with stack:
        out = tmp_path / "out"
        words = ["The same at night", "-m", MODEL, "--image", str(picture)]
        made = run("generate", *words, "-o", str(out), "--url", stack.url)
        assert made.exit_code == 0, made.output
        assert len(list(out.iterdir())) == 1

        (job,) = stack.client.get("/api/v1/jobs").json()["items"]
        again = stack.client.post(f"/api/v1/jobs/{job['job_id']}/retry").json()
        (second,) = stack.finish([again["job_id"]], within=30)

        sent: list[Any] = [one["parameters"]["image"] for one in (job, second)]
        start = stack.url if way == "link" else stack.sandbox_url
        assert all(url.startswith(start) for url in sent)
        assert {read_as_the_model(url) for url in sent} == {PICTURE}
        assert second["status"] == "completed"
        assert stack.purchases()["purchases"] == 2
