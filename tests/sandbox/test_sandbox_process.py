"""``python -m sandbox`` as a process, and the runners for tests."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox.config import SandboxConfig
from sandbox.runner import ThreadedSandbox

ROOT = Path(__file__).parents[2]


@contextmanager
def process(*arguments):
    command = [sys.executable, "-m", "sandbox", *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def get(url, path, token="r8_test"):
    host = url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(host, timeout=5)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_is_and_stops_at_once(number):
    with process("--port", "0", "--speed", "0.01") as child:
        ready = child.stdout.readline()
        url = re.fullmatch(r"sandbox: .* ready at (http://\S+/v1)\n", ready).group(1)
        host = url.removeprefix("http://").removesuffix("/v1")
        waiting = http.client.HTTPConnection(host, timeout=5)
        body = '{"version": "black-forest-labs/flux-schnell", "input": {"prompt": "a"}}'
        headers = {"Authorization": "Bearer x", "Prefer": "wait"}
        waiting.request("POST", "/v1/predictions", body, headers)
        deadline = time.monotonic() + 5
        while not get(url, "/sandbox/stats")[1]["purchases"]:
            assert time.monotonic() < deadline
        started = time.monotonic()
        child.send_signal(number)
        _, complaints = child.communicate(timeout=5)
        waiting.close()

    assert child.returncode == 0
    assert complaints == ""
    assert time.monotonic() - started < 1.5


def test_a_busy_port_is_one_line_and_code_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with process("--port", port) as child:
            out, complaint = child.communicate(timeout=10)

    assert (child.returncode, out) == (2, "")
    assert (
        complaint
        == f"sandbox: cannot listen on 127.0.0.1:{port}: choose another with --port\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "70000"),
        ("--speed", "0"),
        ("--expiry", "-1"),
        ("--pictures", "ugly"),
        ("--webhook-secret", "whsec_%%%"),
    ],
)
def test_a_wrong_option_is_refused_with_code_2(arguments):
    with process(*arguments) as child:
        _, complaint = child.communicate(timeout=10)

    assert child.returncode == 2
    assert f"argument {arguments[0]}" in complaint


def test_options_reach_the_sandbox():
    with process(
        "--port", "0", "--token-check", "r8_right", "--speed", "instant"
    ) as child:
        url = child.stdout.readline().split()[-1]
        assert get(url, "/v1/account", "r8_wrong")[0] == 401
        assert get(url, "/v1/account", "r8_right")[0] == 200
        child.terminate()
        child.communicate(timeout=5)


def test_a_sandbox_in_a_thread():
    with ThreadedSandbox(SandboxConfig(speed=0)) as sandbox:
        status, account = get(sandbox.url, "/v1/account")
        port = int(sandbox.url.rpartition(":")[2])
        with pytest.raises(OSError), ThreadedSandbox(port=port):
            pass

    assert (status, account["username"]) == (200, "sandbox")
    with pytest.raises(OSError):
        get(sandbox.url, "/v1/account")


def test_it_imports_nothing_of_the_application():
    code = "import sys, sandbox.__main__; print([m for m in sys.modules if m[:4] == 'app.'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "[]\n"
