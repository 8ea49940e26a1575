"""`mediagen` as a user meets it: what it prints, where, and with which exit code."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import Result

from app.client import Client, NotOurs, Refused, file_name
from app.processes import free_port
from tests.support.command_line import Stub, a_problem, recorded_run, run, stub_api
from tests.support.servers import ROOT
from tests.support.waiting import wait_for

JOB_ID = "01a209fa-5ae6-76b0-986d-bdbaa491b0e2"
PICTURE = b"\x89PNG not really, but every byte counts" * 100


def a_job(**changes: Any) -> dict[str, Any]:
    return {
        "job_id": JOB_ID,
        "status": "pending",
        "stage": "queued",
        "model": "acme/painter",
        "prompt": "A lighthouse, at dawn [bold]!",
        "parameters": {},
        "num_outputs": 1,
        "progress": None,
        "attempts": 1,
        "image_path": None,
        "outputs": [],
        "warnings": [],
        "error": None,
        "cost_usd": None,
        "provider": {"name": "replicate", "prediction_id": None},
        "timings": {"queued": 0.5, "generating": None, "storing": None, "total": None},
        "created_at": "2026-11-23T10:00:00.5Z",
        "started_at": None,
        "completed_at": None,
        "retry_of": None,
        "metadata": {},
        "version": 1,
    } | changes


def an_output(index: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "url": f"/media/ab/abcdef{index}.png",
        "content_type": "image/png",
        "size_bytes": len(PICTURE),
        "width": 64,
        "height": 48,
        "sha256": hashlib.sha256(PICTURE).hexdigest(),
    } | changes


def a_completed_job(*outputs: dict[str, Any]) -> dict[str, Any]:
    return a_job(status="completed", stage=None, outputs=list(outputs) or [an_output()])


@pytest.fixture
def api() -> Iterator[Stub]:
    with stub_api() as server:
        yield server


@pytest.fixture
def closed_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


def generate(api: Stub, folder: Path, *words: str) -> Result:
    return run("generate", "A lighthouse", "-o", str(folder), "--url", api.url, *words)


STATUS = f"GET /api/v1/status/{JOB_ID}"
GENERATE = "POST /api/v1/generate"
MEDIA = "GET /media/ab/abcdef0.png"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, app.cli; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )

    heavy = {"httpx", "sqlalchemy", "pydantic", "aiohttp", "rich.console", "app.up"}
    assert not heavy & set(loaded.stdout.split())


def test_up_hands_on_its_options_and_its_exit_code(api: Stub, tmp_path: Path) -> None:
    busy = str(api.server_port)

    result = run("up", "--port", busy, "--data-dir", str(tmp_path / "data"))

    assert result.exit_code == 2
    assert f"port {busy} is in use" in result.output
    assert (tmp_path / "data").is_dir()


# ---------------------------------------------------------------------------------- generate


def test_generate_saves_every_output_and_prints_the_paths(
    api: Stub, tmp_path: Path
) -> None:
    done = a_completed_job(an_output(0), an_output(1))
    api.on(GENERATE, (202, a_job()))
    working = a_job(status="processing", stage="generating", progress=0.5)
    api.on(STATUS, working, (304, b""), done)
    api.on(MEDIA, PICTURE)
    api.on("GET /media/ab/abcdef1.png", PICTURE)

    result = generate(api, tmp_path / "new" / "folder")

    paths = [Path(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert [path.name for path in paths] == [
        "a-lighthouse-at-dawn-bold-a491b0e2-0.png",
        "a-lighthouse-at-dawn-bold-a491b0e2-1.png",
    ]
    assert [path.read_bytes() for path in paths] == [PICTURE, PICTURE]
    assert len(list(paths[0].parent.iterdir())) == 2
    assert result.stderr.split() == ["queued", "generating", "completed"]


def test_generate_sends_what_was_asked_for_and_no_more(
    api: Stub, tmp_path: Path
) -> None:
    api.on(GENERATE, (202, a_job()))
    options = "--model a/b -n 2 --width 64 --height 48 --seed 7 --format png --no-wait"
    params = ["--param", "steps=4", "--param", "style=soft light", "--param", "x=[1]"]

    result = generate(api, tmp_path, *options.split(), *params)

    assert result.exit_code == 0
    assert result.stdout == f"{JOB_ID}\n"
    assert f"mediagen status {JOB_ID} --url {api.url}" in result.stderr
    assert api.body_of(GENERATE) == {
        "prompt": "A lighthouse",
        "model": "a/b",
        "num_outputs": 2,
        "width": 64,
        "height": 48,
        "seed": 7,
        "output_format": "png",
        "parameters": {"steps": 4, "style": "soft light", "x": [1]},
    }


def test_following_asks_for_news_only(api: Stub, tmp_path: Path) -> None:
    api.on(GENERATE, (202, a_job(status="processing", stage="generating")))
    api.on(STATUS, (304, b""), a_completed_job())
    api.on(MEDIA, PICTURE)

    generate(api, tmp_path)

    polls = [(path, head) for _, path, head, _ in api.seen if "/status/" in path]
    assert all("wait=" in path for path, _ in polls)
    assert [head["If-None-Match"] for _, head in polls] == ['"1"', '"1"']


WAITING = {
    "code": "provider_account",
    "message": "No pictures can be bought [bold]now.",
    "since": "2026-11-23T10:00:00Z",
}


def test_generate_says_why_a_pending_job_waits(api: Stub, tmp_path: Path) -> None:
    api.on(GENERATE, (202, a_job()))
    # Why it waits is no news of the job's own: 304, and the whole of it tells.
    api.on(STATUS, (304, b""), a_job(waiting_for=WAITING), a_completed_job())
    api.on(MEDIA, PICTURE)

    result = generate(api, tmp_path)

    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "queued",
        "queued: No pictures can be bought [bold]now.",
        "completed",
    ]
    polls = [(path, head) for _, path, head, _ in api.seen if "/status/" in path]
    assert ["If-None-Match" in head for _, head in polls] == [True, False, True]


def test_status_says_why_a_pending_job_waits(api: Stub) -> None:
    api.on(STATUS, a_job(waiting_for=WAITING))

    result = run("status", JOB_ID, "--url", api.url)

    said = "provider_account: No pictures can be bought [bold]now."
    assert f"waiting   {said}" in result.stdout


def test_json_is_alone_on_stdout(api: Stub, tmp_path: Path) -> None:
    api.on(GENERATE, (202, a_completed_job()))
    api.on(MEDIA, PICTURE)

    result = generate(api, tmp_path, "--json")

    assert json.loads(result.stdout) == a_completed_job()
    assert len(list(tmp_path.iterdir())) == 1


UPLOAD = "POST /api/v1/uploads"
MODELS = "GET /api/v1/models"


def a_model(name: str, **inputs: Any) -> dict[str, Any]:
    return {"name": name, "input_schema": {"type": "object", "properties": inputs}}


URI = {"type": "string", "format": "uri"}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    path.write_bytes(PICTURE)
    return path


@pytest.fixture
def drawing_api(api: Stub) -> Stub:
    """An API with models that take pictures."""
    items = [
        a_model("acme/one", mask=URI | {"x-order": 2}, photo=URI | {"x-order": 1}),
        a_model("acme/many", input_images={"type": "array", "items": URI}),
        a_model("acme/none", prompt={"type": "string"}),
    ]
    api.on(MODELS, {"default": "acme/one", "items": items})
    api.on(UPLOAD, *[(201, {"uri": f"upload:{n}"}) for n in range(1, 4)])
    api.on(GENERATE, (202, a_job()))
    return api


@pytest.mark.parametrize(
    "words, parameters",
    [
        (["--image", "{}"], {"photo": "upload:1"}),
        (["--image", "{}", "-m", "acme/one:abc"], {"photo": "upload:1"}),
        (["--image", "{}", "-m", "acme/many"], {"input_images": ["upload:1"]}),
        (
            ["--image", "{}", "--image", "{}", "-m", "acme/many"],
            {"input_images": ["upload:1", "upload:2"]},
        ),
        (["--image", "{}", "-m", "acme/strange"], {"image": "upload:1"}),
        (["--param", "mask=@{}"], {"mask": "upload:1"}),
        (
            ["--image", "{}", "--param", "mask=@{}", "--param", "steps=4"],
            {"steps": 4, "photo": "upload:1", "mask": "upload:2"},
        ),
        (["--param", 'caption="@home"'], {"caption": "@home"}),
    ],
)
def test_a_picture_is_uploaded_and_named_in_the_job(
    drawing_api: Stub, picture: Path, words: list[str], parameters: dict[str, Any]
) -> None:
    given = [word.replace("{}", str(picture)) for word in words]

    result = generate(drawing_api, picture.parent, "--no-wait", *given)

    assert result.exit_code == 0, result.output
    assert drawing_api.body_of(GENERATE)["parameters"] == parameters
    sent = [body for _, path, _, body in drawing_api.seen if "uploads" in path]
    assert all(PICTURE in body and b'name="file"' in body for body in sent)


@pytest.mark.parametrize(
    "words",
    [
        ["--image", "{}", "-m", "acme/none"],
        ["--image", "{}", "--image", "{}"],
        ["--image", "nowhere.png"],
        ["--param", "mask=@nowhere.png"],
        ["--param", "mask=@."],
    ],
)
def test_a_picture_that_cannot_be_used_is_wrong_usage(
    drawing_api: Stub, picture: Path, words: list[str]
) -> None:
    given = [word.replace("{}", str(picture)) for word in words]

    result = generate(drawing_api, picture.parent, *given)

    assert result.exit_code == 2
    assert not [path for _, path, *_ in drawing_api.seen if "generate" in path]


def test_a_picture_the_api_refuses_ends_the_command(
    drawing_api: Stub, picture: Path
) -> None:
    drawing_api.on(UPLOAD, a_problem(422, "The file is damaged."))

    result = generate(drawing_api, picture.parent, "--image", str(picture))

    assert result.exit_code == 2
    assert "The file is damaged." in result.output


@pytest.mark.parametrize("wrong", [{"sha256": "00" * 32}, {"size_bytes": 3}])
def test_a_damaged_download_is_not_kept(
    api: Stub, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    api.on(GENERATE, (202, a_completed_job(an_output(**wrong))))
    api.on(MEDIA, PICTURE)

    result = generate(api, tmp_path)

    assert result.exit_code == 1
    assert "damaged" in result.stderr and f"{api.url}/media/ab" in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_download_damaged_once_is_fetched_again(api: Stub, tmp_path: Path) -> None:
    api.on(GENERATE, (202, a_completed_job()))
    api.on(MEDIA, PICTURE[:-1] + b"?", PICTURE)

    assert generate(api, tmp_path).exit_code == 0
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == PICTURE


def test_another_file_is_never_replaced(api: Stub, tmp_path: Path) -> None:
    job = a_completed_job()
    api.on(GENERATE, (202, job))
    api.on(MEDIA, PICTURE)
    taken = tmp_path / file_name(job, an_output())
    taken.write_bytes(b"mine")

    first, second = generate(api, tmp_path), generate(api, tmp_path)

    assert taken.read_bytes() == b"mine"
    # The same bytes are not stored twice.
    assert first.stdout == second.stdout == f"{taken.with_stem(taken.stem + '-2')}\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_job_says_why(api: Stub, tmp_path: Path) -> None:
    error = {
        "code": "content_policy",
        "message": "Not this.\x1b[2J",
        "retryable": False,
    }
    api.on(GENERATE, (202, a_job()))
    api.on(STATUS, a_job(status="failed", stage=None, error=error))

    result = generate(api, tmp_path)

    assert result.exit_code == 1
    assert "The job failed: Not this. [2J (content_policy)" in result.stderr


def test_a_cancelled_job_is_no_success(api: Stub, tmp_path: Path) -> None:
    api.on(GENERATE, (202, a_job(status="cancelled", stage=None)))

    result = generate(api, tmp_path)

    assert result.exit_code == 1
    assert "The job was cancelled" in result.stderr


def test_a_refusal_names_every_field(api: Stub, tmp_path: Path) -> None:
    errors = [
        {"pointer": "/width", "detail": "must be at least 16"},
        {"pointer": "/prompt", "detail": "must not be blank"},
    ]
    api.on(GENERATE, a_problem(422, "width: must be at least 16", errors=errors))

    result = generate(api, tmp_path)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "The API refused (422): width: must be at least 16",
        "  width: must be at least 16",
        "  prompt: must not be blank",
    ]


def test_an_api_that_is_away_is_one_line_with_the_remedy(
    closed_url: str, tmp_path: Path
) -> None:
    result = run("generate", "x", "-o", str(tmp_path), "--url", closed_url)

    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert closed_url in line and "`mediagen up`" in line and "--url" in line


def test_somebody_elses_server_is_not_taken_for_the_api(api: Stub) -> None:
    api.on("GET /api/v1/jobs", b"<html>It works!</html>")

    result = run("jobs", "--url", api.url)

    assert result.exit_code == 3
    assert "other than this service" in result.stderr


def test_an_api_that_restarts_is_waited_for(api: Stub, tmp_path: Path) -> None:
    api.on(GENERATE, (202, a_job()))
    unavailable = a_problem(503, "The database does not answer.")
    api.on(STATUS, None, unavailable, (502, b"<html>"), a_completed_job())
    api.on(MEDIA, None, PICTURE)

    result = generate(api, tmp_path)

    assert result.exit_code == 0
    assert result.stderr.count("The API is away; asking again for 60 s") == 2
    assert result.stderr.count("The API is back") == 2


def test_patience_ends(api: Stub, tmp_path: Path) -> None:
    api.on(GENERATE, (202, a_job()))
    api.on(STATUS, None)

    result = generate(api, tmp_path, "--patience", "0.2")

    assert result.exit_code == 3
    assert "asking again for 0.2 s" in result.stderr
    assert api.url in result.stderr.splitlines()[-1]


def test_a_submission_whose_answer_is_lost_is_sent_again_as_the_same(
    api: Stub, tmp_path: Path
) -> None:
    api.on(GENERATE, None, None, (202, a_job()))

    assert generate(api, tmp_path, "--no-wait").exit_code == 0

    keys = [headers["Idempotency-Key"] for _, _, headers, _ in api.seen]
    assert len(keys) == 3
    assert len(set(keys)) == 1


def test_every_submission_has_a_key_of_its_own(api: Stub, tmp_path: Path) -> None:
    api.on(GENERATE, (202, a_job()))

    generate(api, tmp_path, "--no-wait")
    generate(api, tmp_path, "--no-wait")

    first, second = (headers["Idempotency-Key"] for _, _, headers, _ in api.seen)
    assert first != second


def test_a_folder_that_cannot_be_made_costs_nothing(api: Stub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    result = generate(api, tmp_path / "file" / "folder")

    assert result.exit_code == 2
    assert api.seen == []


@pytest.mark.parametrize("word", ["steps", "=4"])
def test_a_param_without_a_name_or_value_is_wrong_usage(
    api: Stub, tmp_path: Path, word: str
) -> None:
    result = generate(api, tmp_path, "--param", word)

    assert result.exit_code == 2
    assert "is not KEY=VALUE" in result.stderr
    assert api.seen == []


@pytest.mark.parametrize("url", ["ftp://here", "http://", "http://[::1"])
def test_a_url_that_is_none_is_wrong_usage(url: str) -> None:
    assert run("jobs", "--url", url).exit_code == 2


def test_ctrl_c_says_that_the_job_goes_on(api: Stub, tmp_path: Path) -> None:
    api.on(GENERATE, (202, a_job()))
    api.on(STATUS, (304, b""))
    words = ["generate", "x", "-o", str(tmp_path), "--url", api.url]
    with subprocess.Popen(
        [sys.executable, "-m", "app.cli", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores it; a child inherits that.
        preexec_fn=_listen_to_ctrl_c,
    ) as process:
        wait_for(
            lambda: any("/status/" in path for _, path, _, _ in api.seen),
            within=20,
            what="the first look at the job",
        )
        process.send_signal(2)
        _, said = process.communicate(timeout=20)

    assert process.returncode == 130
    assert f"goes on without us; see it with: mediagen status {JOB_ID}" in said


def _listen_to_ctrl_c() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "etc-passwd-a491b0e2-0.png"),
        ("¡!", "picture-a491b0e2-0.png"),
        ("灯台の夜明け", "灯台の夜明け-a491b0e2-0.png"),
        ("x" * 500, "x" * 40 + "-a491b0e2-0.png"),
    ],
)
def test_file_names_are_names(prompt: str, name: str) -> None:
    assert file_name(a_job(prompt=prompt), an_output()) == name


# ------------------------------------------------------------------------------ looking at jobs


def test_a_manifest_is_printed_as_it_is(api: Stub) -> None:
    told = {"job_id": JOB_ID, "request": {"prompt": "a lighthouse"}, "seed": 7}
    api.on(f"GET /api/v1/jobs/{JOB_ID}/manifest", told)

    result = run("manifest", JOB_ID, "--url", api.url)

    assert result.exit_code == 0
    assert json.loads(result.stdout) == told


def test_status_shows_the_job_with_whole_urls(api: Stub) -> None:
    api.on(STATUS, a_completed_job() | {"prompt": "x" * 300, "cost_usd": "0.003"})

    result = run("status", JOB_ID, "--url", api.url)

    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert f"job       {JOB_ID}" in lines
    assert "status    completed" in lines
    assert "cost      0.003 USD" in lines
    assert "prompt    " + "x" * 300 in lines
    assert f"output    {api.url}/media/ab/abcdef0.png" in lines
    assert "\x1b" not in result.stdout


def test_an_id_cannot_leave_its_place_in_the_url(api: Stub) -> None:
    run("status", "../jobs?x=", "--url", api.url)

    assert api.seen[0][1] == "/api/v1/status/..%2Fjobs%3Fx%3D"


def test_a_url_with_a_path_is_the_prefix(api: Stub) -> None:
    api.on("GET /pictures/v1/jobs", {"items": [], "next_cursor": None})

    result = run("jobs", MEDIAGEN_URL=f"{api.url}/pictures/v1/")

    assert result.exit_code == 0
    assert "no such jobs" in result.stderr


def test_jobs_is_a_table_newest_first_with_a_way_on(api: Stub) -> None:
    error = {"code": "x", "message": "y", "retryable": True}
    failed = a_job(status="failed", stage=None, error=error, prompt="two\nlines")
    page = {"items": [a_completed_job(), failed], "next_cursor": "abc"}
    api.on("GET /api/v1/jobs", page)

    words = "jobs --status failed --model a/b -q fox --size 8x6 --limit 2 --cursor xyz"
    result = run(*words.split(), "--url", api.url)

    head, _, first, second = (line.split() for line in result.stdout.splitlines())
    assert head == ["time", "job", "status", "model", "s", "files", "prompt"]
    assert JOB_ID in first and "completed" in first and "[bold]!" in first
    assert second[-2:] == ["two", "lines"] and "failed" in second
    assert "--cursor abc" in result.stderr
    query = api.seen[0][1].partition("?")[2]
    assert query == "status=failed&model=a%2Fb&q=fox&size=8x6&limit=2&cursor=xyz"


def test_a_search_that_is_not_over_says_how_to_go_on(api: Stub) -> None:
    api.on("GET /api/v1/jobs", {"items": [], "next_cursor": "abc"})

    result = run("jobs", "-q", "qx", "--url", api.url)

    assert (result.exit_code, result.stdout) == (0, "")
    assert "--cursor abc" in result.stderr and "no such" not in result.stderr


def test_jobs_as_json_is_the_apis_answer(api: Stub) -> None:
    page = {"items": [a_completed_job()], "next_cursor": None}
    api.on("GET /api/v1/jobs", page)

    assert json.loads(run("jobs", "--json", "--url", api.url).stdout) == page


def a_usage(**changes: Any) -> dict[str, Any]:
    sums = {"jobs": 3, "completed": 2, "failed": 1, "cancelled": 0, "outputs": 5}
    priced = sums | {"cost_usd": "0.015", "unpriced_jobs": 0}
    unpriced = sums | {"cost_usd": None, "unpriced_jobs": 3}
    period = {"spent_usd": "1", "reserved_usd": "0.5"}
    limited = period | {"limit_usd": "2", "left_usd": "0.5"}
    boundless = period | {"limit_usd": None, "left_usd": None}
    return {
        "from": "2026-10-28",
        "to": "2026-11-26",
        "by": ["model", "key"],
        "rows": [
            {"model": "acme/painter", "key_id": JOB_ID} | priced,
            {"model": "acme/[bold]", "key_id": None} | unpriced,
        ],
        "has_more": False,
        "totals": priced | {"jobs": 6, "unpriced_jobs": 3},
        "budget": {
            "key": {"job_usd": None, "day": limited, "month": boundless},
            "service": None,
        },
    } | changes


def test_usage_is_a_table_with_a_total_and_what_is_left(api: Stub) -> None:
    api.on("GET /api/v1/usage", a_usage())

    words = "usage --by model,key --from 2026-10-28 --to 2026-11-26 --owner ann --url"
    result = run(*words.split(), api.url)

    head, _, first, second, total, left = (
        line.split() for line in result.stdout.splitlines()
    )
    counts = ["jobs", "completed", "failed", "cancelled", "outputs"]
    assert head == ["model", "key", *counts, "USD", "unpriced"]
    assert first == ["acme/painter", JOB_ID, *"32105", "0.015"]
    assert second == ["acme/[bold]", "none", *"32105", "unknown", "3"]
    assert total == ["total", *"62105", "0.015", "3"]
    expected = "key, this day: 0.5 USD left of 2 (1 spent, 0.5 held for jobs under way)"
    assert " ".join(left) == expected
    query = api.seen[0][1].partition("?")[2]
    assert query == "by=model%2Ckey&from=2026-10-28&to=2026-11-26&owner=ann"


def test_usage_says_when_it_does_not_tell_everything(api: Stub) -> None:
    api.on("GET /api/v1/usage", a_usage(has_more=True))

    result = run("usage", "--url", api.url)

    assert "more groups" in result.stderr
    assert api.seen[0][1].partition("?")[2] == "by=day"


def test_usage_as_json_is_the_apis_answer(api: Stub) -> None:
    api.on("GET /api/v1/usage", a_usage())

    assert json.loads(run("usage", "--json", "--url", api.url).stdout) == a_usage()


def test_cancel_and_retry_show_the_job(api: Stub) -> None:
    working = a_job(status="processing", stage="generating")
    api.on(f"POST /api/v1/jobs/{JOB_ID}/cancel", working)
    api.on(f"POST /api/v1/jobs/{JOB_ID}/retry", (202, a_job(retry_of=JOB_ID)))

    cancelled = run("cancel", JOB_ID, "--url", api.url)
    retried = run("retry", JOB_ID, "--url", api.url, "--json")

    assert cancelled.exit_code == retried.exit_code == 0
    assert "status    processing" in cancelled.stdout
    assert "as soon as the provider agrees" in cancelled.stderr
    assert json.loads(retried.stdout)["retry_of"] == JOB_ID


def test_the_system_of_this_folder_is_found(api: Stub, tmp_path: Path) -> None:
    api.on("GET /pics/jobs", {"items": [a_job()], "next_cursor": None})
    port = str(api.server_port)
    with recorded_run(tmp_path, PORT=port, API_V1_PREFIX="/pics"):
        result = run("jobs", MEDIAGEN_DATA_DIR=str(tmp_path))

    assert result.exit_code == 0
    assert JOB_ID in result.stdout


# ----------------------------------------------------------------------------- the real API


def test_the_real_api_is_understood(
    child_env: Callable[..., dict[str, str]], closed_url: str, tmp_path: Path
) -> None:
    port = closed_url.rpartition(":")[2]
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", port]
    log = (tmp_path / "api.out").open("wb")
    with ExitStack() as stack:
        stack.enter_context(log)
        process = stack.enter_context(
            subprocess.Popen(
                command, cwd=tmp_path, env=child_env(), stdout=log, stderr=log
            )
        )
        stack.callback(process.terminate)
        wait_for(lambda: _is_up(closed_url), within=30, what="the API")
        url = ("--url", closed_url)

        accepted = run("generate", "a fox", "--no-wait", *url)
        job_id = accepted.stdout.strip()
        refused = run("generate", "a fox", "-n", "99", "-o", str(tmp_path), *url)
        cancelled = run("cancel", job_id, "--json", *url)
        retried = run("retry", job_id, "--json", *url)
        shown = run("status", job_id, *url)
        listed = run("jobs", *url)

    assert refused.exit_code == 2
    assert "num_outputs" in refused.stderr
    assert json.loads(cancelled.stdout)["status"] == "cancelled"
    assert json.loads(retried.stdout)["retry_of"] == job_id
    assert "status    cancelled" in shown.stdout
    assert len(listed.stdout.splitlines()) == 4
    assert listed.stdout.rstrip().endswith("a fox")


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/v1/health/live", trust_env=False).is_success
    except httpx.TransportError:
        return False


# ------------------------------------------------------------------------------------ client


def test_the_client_tells_a_refusal_from_a_stranger(api: Stub) -> None:
    api.on("GET /api/v1/jobs", (500, {"message": "not a problem document"}))

    with Client(api.url) as client:
        with pytest.raises(Refused, match="no such thing"):
            client.status("x")
        with pytest.raises(NotOurs):
            client.ask("GET", "/jobs")
