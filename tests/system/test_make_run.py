"""`make run` as a user meets it: the whole system up, a picture made, everything down again."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from app import processes
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
STARTED = "Try: curl"


class System:
    """One run of `python -m app.up`, its terminal kept in a file."""

    def __init__(self, data_dir: Path, port: int, **settings: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.terminal = data_dir.parent / f"terminal-{time.monotonic_ns()}.txt"
        # Empty counts as not set, and wins over a developer's own .env.
        unset = dict.fromkeys(
            [
                "DATABASE_URL",
                "REDIS_URL",
                "REPLICATE_API_TOKEN",
                "STORAGE_URL",
                "API_V1_PREFIX",
                "PUBLIC_BASE_URL",
                "REPLICATE_WEBHOOK_SECRET",
                "AUTH_REQUIRED",
                "ADMIN_API_KEY",
            ],
            "",
        )
        env = os.environ | unset | settings
        env |= {
            "PORT": str(port),
            "MEDIAGEN_DATA_DIR": str(data_dir),
            "STORAGE_PATH": str(data_dir / "media"),
            "LOG_DIR": str(data_dir / "logs"),
        }
        with open(self.terminal, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.up"],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.terminal.read_text()

    def wait_until_ready(self, within: float) -> None:
        wait_for(
            lambda: STARTED in self.said() or self.process.poll() is not None,
            within=within,
            what="the system is up",
        )
        assert self.process.poll() is None, self.said()

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/api/v1{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=70) as answer:
            return json.load(answer)

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            content: bytes = answer.read()
            return content

    def end(self, number: signal.Signals) -> float:
        """Send the signal and return how long it took until nothing was left."""
        family = processes.descendants(self.process.pid)
        assert len(family) >= 5, self.said()
        asked = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(20)
        took = time.monotonic() - asked
        assert not [one for one in family if lives(one)], self.said()
        return took


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., System]]:
    port = processes.free_port()
    systems: list[System] = []

    def start_system(**settings: str) -> System:
        systems.append(System(tmp_path / "data", port, **settings))
        return systems[-1]

    yield start_system
    for system in systems:
        family = processes.descendants(system.process.pid)
        if system.process.poll() is None:
            system.process.terminate()
            system.process.wait(20)
        processes.kill_strangers(family)


@pytest.mark.slow
def test_a_picture_is_made_and_survives_a_restart(start: Callable[[], System]) -> None:
    system = start()
    system.wait_until_ready(within=60)
    job = system.call("/generate", {"prompt": "a lighthouse at dawn"})
    done = wait_for(
        lambda: (state := system.call(f"/status/{job['job_id']}?wait=10"))["status"]
        in ("completed", "failed")
        and state,
        within=60,
        what="the job is finished",
    )
    assert done["status"] == "completed", done
    picture = system.fetch(done["image_path"])
    Image.open(io.BytesIO(picture)).load()
    wait_for(
        lambda: b'mgs_provider_webhooks_total{outcome="' in system.fetch("/metrics"),
        within=10,
        what="the sandbox's webhooks are counted",
    )

    second = start()
    assert second.process.wait(20) == 2
    assert "already running" in second.said()
    assert len(second.said().splitlines()) == 1

    assert system.end(signal.SIGINT) < 5
    assert system.process.returncode == 0, system.said()

    again = start()
    again.wait_until_ready(within=30)
    assert again.call(f"/status/{job['job_id']}")["status"] == "completed"
    assert again.fetch(done["image_path"]) == picture
    assert again.end(signal.SIGTERM) < 5


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs PR_SET_PDEATHSIG"
)
def test_a_killed_supervisor_leaves_nothing_behind_and_can_start_again(
    start: Callable[[], System],
) -> None:
    system = start()
    system.wait_until_ready(within=60)
    family = processes.descendants(system.process.pid)
    system.process.kill()
    system.process.wait(5)
    wait_for(
        lambda: not [one for one in family if lives(one)],
        within=15,
        what="all have ended",
    )
    again = start()
    again.wait_until_ready(within=30)
    assert again.end(signal.SIGHUP) < 5


def test_a_busy_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        system = System(tmp_path / "data", taken.getsockname()[1])
        assert system.process.wait(30) == 2
    assert len(system.said().splitlines()) == 1
    assert "is in use" in system.said()
    assert "--port" in system.said()


@pytest.mark.slow
def test_with_an_admin_key_it_demands_keys_and_the_command_line_has_it(
    start: Callable[..., System], tmp_path: Path
) -> None:
    key = "the-admin-key-of-this-very-test"
    system = start(ADMIN_API_KEY=key)
    system.wait_until_ready(within=60)

    with pytest.raises(urllib.error.HTTPError, match="401"):
        system.call("/jobs")
    assert set(system.call("/health/ready")) == {"status", "version"}
    assert '-H "Authorization: Bearer $ADMIN_API_KEY"' in system.said()
    assert key not in system.said()
    # `mediagen` in this folder finds the key of the system that runs in it.
    command = [sys.executable, "-m", "app.cli", "keys", "create", "mine"]
    env = os.environ | {"MEDIAGEN_DATA_DIR": str(tmp_path / "data")}
    made = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    jobs = [sys.executable, "-m", "app.cli", "jobs", "--json"]
    env |= {"MEDIAGEN_API_KEY": made}
    listed = subprocess.run(
        jobs, cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert json.loads(listed.stdout)["items"] == []
    logs = "".join(path.read_text() for path in (tmp_path / "data/logs").iterdir())
    assert made not in logs and key not in logs
