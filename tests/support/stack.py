"""The whole system as processes: sandbox, API, worker, on a database and a broker given.

Every part can be ended in any way and started again, as an operator's bad day would.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

from app.processes import free_port, spawn
from tests.support.waiting import wait_for

FINISHED = ("completed", "failed", "cancelled")
API = "app.main:app"
WORKER = "worker.celery_app"
# The test builds: see tests/support/crashing_build.py.
CRASHING_API = "tests.support.crashing_api:app"
CRASHING_WORKER = "tests.support.crashing_worker"


class Program:
    """One process under test; its output is kept in a file."""

    def __init__(
        self, title: str, argv: Sequence[str], env: Mapping[str, str], folder: Path
    ) -> None:
        self.title = title
        self._argv = [sys.executable, "-m", *argv]
        self._env = dict(env)
        self._folder = folder
        self.log = folder / f"{title}.txt"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it; being ready is another matter."""
        self._process = spawn(self._argv, log=self.log, env=self._env, cwd=self._folder)

    def add(self, option: str) -> None:
        """Start it with one more option from now on."""
        self._argv.append(option)

    def set(self, **variables: str) -> None:
        """Start it with these variables from now on; an empty one is taken away."""
        self._env |= variables
        self._env = {name: value for name, value in self._env.items() if value}

    def freeze(self) -> None:
        """Stop it in the middle of whatever it does."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on as if nothing had been; harmless when it was not frozen."""
        os.kill(self.pid, signal.SIGCONT)

    def is_frozen(self) -> bool:
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def kill(self) -> None:
        """End it at once, as the kernel or an operator would."""
        self.end(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """Send the signal to a process that runs."""
        assert self._process is not None and self._process.poll() is None, self.said()
        os.kill(self._process.pid, number)

    def end(self, number: signal.Signals = signal.SIGTERM, within: float = 30) -> int:
        """Send the signal, wait, and give the exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            os.kill(self._process.pid, number)
        return self._process.wait(within)

    def wait(self, within: float) -> int:
        """Wait for its own end and give the exit code."""
        assert self._process is not None
        return self._process.wait(within)

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Stack:
    """Sandbox, API and worker.  Use as a context manager; `start` what the test needs."""

    def __init__(
        self,
        folder: Path,
        env: Callable[..., dict[str, str]],
        *,
        sandbox: Sequence[str] = (),
        api: str = API,
        worker: str = WORKER,
        **settings: str,
    ) -> None:
        api_port, sandbox_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{api_port}"
        self.sandbox_url = f"http://127.0.0.1:{sandbox_port}"
        self.media = folder / "media"
        values = env(
            REPLICATE_API_BASE_URL=f"{self.sandbox_url}/v1",
            OUTPUT_HOSTS=f"127.0.0.1:{sandbox_port}",
            STORAGE_PATH=str(self.media),
            PROVIDER_CREATES_PER_MINUTE="12000",
            PROVIDER_REQUESTS_PER_MINUTE="60000",
            **settings,
        )
        options = ["--creates-per-minute", "0", "--requests-per-minute", "0"]
        options += ["--pictures", "plain", *sandbox]
        self.sandbox = Program(
            "sandbox",
            ["sandbox", "--port", str(sandbox_port), *options],
            values,
            folder,
        )
        uvicorn = ["uvicorn", api, "--port", str(api_port)]
        self.api = Program("api", uvicorn, values, folder)
        self._celery = ["celery", "-A", worker, "worker", "--loglevel=info"]
        self.worker = Program("worker", self._celery, values, folder)
        self.client = httpx.Client(base_url=self.url, timeout=70)
        self._control = httpx.Client(base_url=self.sandbox_url, timeout=10)
        self._env = values
        self._folder = folder
        self._others: list[Program] = []

    def another_worker(self) -> Program:
        """Make a second worker on the same settings."""
        name = f"worker{len(self._others) + 2}"
        program = Program(
            name, [*self._celery, "-n", f"{name}@%h"], self._env, self._folder
        )
        self._others.append(program)
        return program

    def another_api(self) -> tuple[Program, str]:
        """Make a second API on the same settings; give its address, too."""
        port = free_port()
        argv = ["uvicorn", "app.main:app", "--port", str(port)]
        program = Program(f"api{len(self._others) + 2}", argv, self._env, self._folder)
        self._others.append(program)
        return program, f"http://127.0.0.1:{port}"

    def __enter__(self) -> Stack:
        self.sandbox.start()
        self.api.start()
        self.worker.start()
        self.wait_until_ready()
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self._control.close()
        programs = (self.worker, *self._others, self.api, self.sandbox)
        running = [program for program in programs if not program.has_ended()]
        for program in running:
            program.kill()

    def wait_until_ready(self, within: float = 40) -> None:
        """Wait until the API accepts jobs and a worker gave a sign of life."""
        wait_for(self._is_ready, within=within, what="the system is up", every=0.1)

    def _is_ready(self) -> bool:
        try:
            body = self.client.get("/api/v1/health", timeout=5).json()
        except (httpx.HTTPError, ValueError):
            return False
        return bool(body["status"] == "ok")

    # ----------------------------------------------------------------------- as a client

    def submit(self, **fields: Any) -> str:
        """Submit a job and give its id; it was accepted when this returns."""
        answer = self.client.post("/api/v1/generate", json=fields)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    def job(self, job_id: str, wait: float = 0) -> dict[str, Any]:
        """Read a job."""
        answer = self.client.get(f"/api/v1/status/{job_id}", params={"wait": wait})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def jobs(self, job_ids: Sequence[str]) -> list[dict[str, Any]]:
        return [self.job(job_id) for job_id in job_ids]

    def finish(self, job_ids: Sequence[str], within: float) -> list[dict[str, Any]]:
        """Wait until all the jobs are finished and give them."""

        def finished() -> list[dict[str, Any]] | None:
            found = self.jobs(job_ids)
            if all(job["status"] in FINISHED for job in found):
                return found
            return None

        try:
            return wait_for(
                finished, within=within, what="all jobs are finished", every=0.5
            )
        except AssertionError:
            left = [j for j in self.jobs(job_ids) if j["status"] not in FINISHED]
            raise AssertionError(f"unfinished: {left}") from None

    def check_files(self, job: Mapping[str, Any]) -> None:
        """See that every output is over HTTP and on disk what the job says it is."""
        for output in job["outputs"]:
            answer = self.client.get(output["url"])
            assert answer.status_code == 200, answer.text
            content = answer.content
            assert hashlib.sha256(content).hexdigest() == output["sha256"]
            assert len(content) == output["size_bytes"]
            with Image.open(io.BytesIO(content)) as picture:
                picture.load()
                assert picture.size == (output["width"], output["height"])
                assert answer.headers["content-type"] == output["content_type"]
            stored = self.media / output["url"].removeprefix("/media/")
            assert stored.read_bytes() == content

    # ------------------------------------------------------------------- at the provider

    def purchases(self) -> dict[str, Any]:
        """What the provider counted: see docs/sandbox.md."""
        body: dict[str, Any] = self._control.get("/sandbox/stats").json()
        return body

    def predictions(self) -> list[str]:
        """The handle of every prediction the provider made, oldest first."""
        body = self._control.get("/sandbox/stats?full=1").json()
        return [str(prediction["id"]) for prediction in body["predictions"]]

    def trouble(self, *rules: Mapping[str, Any]) -> None:
        """Switch faults of the provider on."""
        answer = self._control.put("/sandbox/faults", json={"rules": list(rules)})
        assert answer.status_code == 200, answer.text

    def heal(self) -> None:
        """Switch all faults off."""
        self._control.delete("/sandbox/faults").raise_for_status()
