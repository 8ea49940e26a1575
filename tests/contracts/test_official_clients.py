"""The provider's own clients, unchanged, against the sandbox: the proof that it is faithful."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image
from tests.support.waiting import wait_for

with warnings.catch_warnings():
    # Its pydantic v1 models are deprecated code; none of our business.
    warnings.simplefilter("ignore")
    import replicate
    from replicate.exceptions import ModelError, ReplicateError
    from replicate.helpers import FileOutput
    from replicate.webhook import InvalidSignatureError, Webhooks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:pydantic")

ROOT = Path(__file__).parents[2]
NPM = Path(__file__).parent / "npm"
SCHNELL = "black-forest-labs/flux-schnell"
PRO = "black-forest-labs/flux-1.1-pro"
FOX = {"prompt": "a red fox in the snow", "seed": 7}


@pytest.fixture(scope="module")
def sandbox_url() -> Iterator[str]:
    """Start ``python -m sandbox`` on a free port; its address, without /v1."""
    command = [sys.executable, "-m", "sandbox", "--port", "0", "--speed", "20"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        yield child.stdout.readline().split()[-1].removesuffix("/v1")
        child.terminate()


@pytest.fixture
def client(sandbox_url: str) -> Iterator[replicate.Client]:
    """The Python client, told where the sandbox is as its documentation says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLICATE_POLL_INTERVAL", "0.02")
        made = replicate.Client(api_token="r8_test", base_url=sandbox_url)
    made._client.post("/sandbox/reset")
    yield made
    made._client.close()


@pytest.fixture
def letters() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A place that webhooks can be sent to, and what came."""
    came: list[tuple[dict[str, str], bytes]] = []

    class Take(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            came.append((dict(self.headers.items()), body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Take) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hook", came
        server.shutdown()
        thread.join()


def create(client: replicate.Client, **more: object) -> replicate.prediction.Prediction:
    return client.predictions.create(model=SCHNELL, input={**FOX, **more})


def test_create_get_reload_wait(client):
    made = create(client)
    assert (made.status, made.output, made.model) == ("starting", None, SCHNELL)
    found = client.predictions.get(made.id)
    assert found.urls == made.urls and found.input == FOX
    made.wait()
    made.reload()

    assert made.status == "succeeded" and len(made.output) == 1
    assert made.metrics["predict_time"] > 0


def test_progress_is_understood(client):
    made = create(client)
    made.wait()

    assert (made.progress.percentage, made.progress.total) == (1.0, 4)


def opened(body: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(body))
    image.load()
    return image


@pytest.mark.parametrize("ref", [SCHNELL, PRO])
def test_run_answers_the_addresses_of_pictures(client, ref):
    """The client makes a FileOutput of https: and data: only; ours are plain http."""
    output = client.run(ref, input=FOX)

    for url in output if isinstance(output, list) else [output]:
        image = opened(FileOutput(url, client).read())
        assert (image.format, image.size) == ("WEBP", (1024, 1024))


@pytest.mark.parametrize("ref", [SCHNELL, PRO])
def test_run_answers_file_outputs_when_the_pictures_come_inline(client, ref):
    client._client.put("/sandbox/faults", json=[{"fault": "create.inline_outputs"}])
    output = client.run(ref, input=FOX)

    for file in output if isinstance(output, list) else [output]:
        assert isinstance(file, FileOutput)
        assert opened(file.read()).size == (1024, 1024)


def test_run_by_version_reads_the_schema_and_may_poll(client):
    version = client.models.get(SCHNELL).latest_version.id
    [url] = client.run(f"{SCHNELL}:{version}", input=FOX, wait=False)

    assert FileOutput(url, client).read()[8:12] == b"WEBP"


async def test_the_async_side_works_too(client):
    try:
        [url] = await client.async_run(SCHNELL, input=FOX)
        body = await FileOutput(url, client).aread()
    finally:
        await client._async_client.aclose()

    assert body[8:12] == b"WEBP"


def test_create_by_version_and_by_deployment(client):
    version = client.models.get(SCHNELL).latest_version
    by_version = client.predictions.create(version=version, input=FOX)
    by_deployment = client.deployments.predictions.create(
        deployment="sandbox/flux-schnell", input=FOX
    )

    assert by_version.version == by_deployment.version == version.id


def test_the_list_is_walked_page_by_page(client):
    ids = {create(client, seed=seed).id for seed in range(103)}
    pages = list(replicate.pagination.paginate(client.predictions.list))

    assert [len(page) for page in pages] == [100, 3]
    assert {made.id for page in pages for made in page} == ids


def test_cancel(client):
    made = client.predictions.create(
        model="google/nano-banana-2", input={"prompt": "slow"}
    )
    made.cancel()

    assert made.status == client.predictions.get(made.id).status == "canceled"


def test_models_versions_account_and_hardware(client):
    model = client.models.get(SCHNELL)
    [version] = model.versions.list()

    assert version.id == model.latest_version.id == model.versions.get(version.id).id
    assert (
        "prompt" in version.openapi_schema["components"]["schemas"]["Input"]["required"]
    )
    assert SCHNELL in {f"{m.owner}/{m.name}" for m in client.models.list()}
    assert client.accounts.current().username == "sandbox"
    assert "gpu-h100" in {hardware.sku for hardware in client.hardware.list()}
    assert client.deployments.get("sandbox/flux-schnell").name == "flux-schnell"


def test_files_are_uploaded_and_used_as_input(client, tmp_path):
    path = tmp_path / "fox.png"
    Image.new("RGB", (8, 8)).save(path)
    file = client.files.create(path, metadata={"of": "a fox"})
    made = client.predictions.create(
        version="black-forest-labs/flux-dev", input={**FOX, "image": path}
    )

    assert (file.name, file.metadata) == ("fox.png", {"of": "a fox"})
    assert {f.id for f in client.files.list()} >= {file.id}
    assert made.input["image"].startswith(str(client._base_url))
    assert client.files.delete(file.id) is True
    with pytest.raises(ReplicateError):
        client.files.get(file.id)


def test_webhooks_are_signed_as_the_client_expects(client, letters):
    url, came = letters
    secret = client.webhooks.default.secret()
    made = client.predictions.create(
        model=SCHNELL,
        input=FOX,
        webhook=url,
        webhook_events_filter=["completed"],
        wait=True,
    )
    made.wait()
    wait_for(lambda: came, within=10, what="the webhook")
    [(headers, body)] = came

    assert json.loads(body)["id"] == made.id
    Webhooks.validate(headers=headers, body=body.decode(), secret=secret, tolerance=60)
    with pytest.raises(InvalidSignatureError):
        Webhooks.validate(headers=headers, body=body.decode() + " ", secret=secret)


def test_a_bad_input_is_an_error_with_its_reasons(client):
    with pytest.raises(ReplicateError) as caught:
        create(client, num_outputs=9)

    assert (caught.value.status, caught.value.title) == (422, "Input validation failed")
    assert "num_outputs" in caught.value.detail


def test_a_failed_run_is_a_model_error(client):
    rule = {"fault": "prediction.fails", "params": {"error": "NSFW content detected."}}
    client._client.put("/sandbox/faults", json={"rules": [rule]})

    with pytest.raises(ModelError, match="NSFW"):
        client.run(SCHNELL, input=FOX)


@pytest.mark.npm
def test_the_javascript_client(client, letters, sandbox_url):
    """Everything in one run of Node, because starting it is slow."""
    if shutil.which("node") is None:
        pytest.skip("Node is not installed; install it, then `make npm`")
    if not (NPM / "node_modules" / "replicate").is_dir():
        pytest.skip("the npm package is not there; get it with `make npm`")
    url, came = letters
    client.predictions.create(
        model=SCHNELL, input=FOX, webhook=url, webhook_events_filter=["completed"]
    ).wait()
    wait_for(lambda: came, within=10, what="the webhook")
    headers, body = {k.lower(): v for k, v in came[0][0].items()}, came[0][1].decode()
    signed = [headers[f"webhook-{part}"] for part in ("id", "timestamp", "signature")]

    done = subprocess.run(
        ["node", "check_sandbox.mjs", f"{sandbox_url}/v1", *signed, body],
        cwd=NPM,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    bad_input = seen.pop("badInput")
    assert bad_input["status"] == 422 and "prompt is required" in bad_input["message"]
    assert seen == {
        "created": "starting",
        "finished": "succeeded",
        "outputs": 2,
        "ranType": "string",
        "magic": "WEBP",
        "inline": ["FileOutput", "WEBP"],
        "byVersion": 1,
        "listed": 5,
        "models": 17,
        "versions": 1,
        "account": "sandbox",
        "hardware": 7,
        "file": 6,
        "fileDeleted": True,
        "cancelled": "canceled",
        "webhookValid": True,
        "forgedValid": False,
    }
