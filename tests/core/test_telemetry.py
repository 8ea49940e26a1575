"""Logs: where they go, and what never gets into them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy.exc import IntegrityError

from app.core.telemetry import DATABASE_LOGGER, configure_logging

SECRET = "a secret garden in the rain"

Configure = Callable[..., None]


@pytest.fixture
def configure(tmp_path: Path) -> Iterator[Configure]:
    """`configure_logging` into `tmp_path`, undone afterwards."""
    loggers = [logging.getLogger(), logging.getLogger(DATABASE_LOGGER)]
    before = [(list(one.handlers), one.level) for one in loggers]

    def call(role: Any = "api", **changes: Any) -> None:
        options: dict[str, Any] = {"log_dir": tmp_path, "log_format": "json"}
        configure_logging(role, **options | changes)

    yield call
    for one, (handlers, level) in zip(loggers, before, strict=True):
        for handler in list(one.handlers):
            one.removeHandler(handler)
            handler.close()
        for handler in handlers:
            one.addHandler(handler)
        one.setLevel(level)
    structlog.reset_defaults()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("role", ["api", "worker"])
def test_a_line_goes_to_the_file_of_its_process_and_to_stdout(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    configure(role)

    structlog.get_logger("app.jobs").info("job.settled", job_id="42")

    (line,) = lines(tmp_path / f"{role}.log")
    assert line["event"] == "job.settled"
    assert (line["job_id"], line["level"], line["logger"]) == (
        "42",
        "info",
        "app.jobs",
    )
    assert line["timestamp"].endswith("Z")
    assert json.loads(capsys.readouterr().out) == line


def test_statements_go_to_a_file_of_their_own_as_well(
    configure: Configure, tmp_path: Path
) -> None:
    configure()

    structlog.get_logger(DATABASE_LOGGER).warning("statement.slow", seconds=1)
    structlog.get_logger("app.jobs").info("job.settled")

    assert [line["event"] for line in lines(tmp_path / "database.log")] == [
        "statement.slow"
    ]
    assert len(lines(tmp_path / "api.log")) == 2


def test_without_a_folder_there_is_stdout_only(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(log_dir=None)

    structlog.get_logger("app.jobs").info("job.settled")

    assert "job.settled" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_warning(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()

    configure(log_dir=tmp_path / "file" / "logs")
    structlog.get_logger("app.jobs").info("job.settled")

    warning, line = map(json.loads, capsys.readouterr().out.splitlines())
    assert warning["event"] == "log_dir.unusable"
    assert "LOG_DIR" in warning["remedy"]
    assert line["event"] == "job.settled"


def test_a_file_moved_away_is_opened_anew(configure: Configure, tmp_path: Path) -> None:
    configure()
    log = structlog.get_logger("app.jobs")
    log.info("before")

    (tmp_path / "api.log").rename(tmp_path / "api.log.1")
    log.info("after")

    assert [line["event"] for line in lines(tmp_path / "api.log")] == ["after"]


def test_people_get_words_on_their_screen_and_machines_keep_json(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(log_format="console")

    structlog.get_logger("app.jobs").info("job.settled", job_id="42")

    said = capsys.readouterr().out
    assert "job.settled" in said and not said.startswith("{")
    assert lines(tmp_path / "api.log")[0]["job_id"] == "42"


@pytest.mark.parametrize(("debug", "shown"), [(False, 0), (True, 1)])
def test_debug_makes_logs_wordy(
    configure: Configure, tmp_path: Path, debug: bool, shown: int
) -> None:
    configure(debug=debug)

    structlog.get_logger("app.jobs").debug("detail")

    assert len(lines(tmp_path / "api.log")) == shown


def test_lines_of_libraries_are_lines_like_ours(
    configure: Configure, tmp_path: Path
) -> None:
    configure()

    with structlog.contextvars.bound_contextvars(request_id="abc"):
        logging.getLogger("uvicorn.error").warning("%s is %s", "it", "late")
        logging.getLogger("httpx").info("chatter")

    (line,) = lines(tmp_path / "api.log")
    assert (line["event"], line["request_id"]) == ("it is late", "abc")


# ------------------------------------------------------------------ what is kept out


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": SECRET},
        {"token": SECRET},
        {"Authorization": SECRET},
        {"headers": {"authorization": SECRET}},
        {"input": {"prompt": SECRET}},
        {"request": {"input": {"prompt": SECRET}}},
        {"jobs": [{"prompt": SECRET}]},
        {"url": f"https://files.example/a.png?signature={SECRET}".replace(" ", "+")},
        {"urls": ["https://files.example/a.png?sig=a+secret+garden+in+the+rain"]},
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_is_private_is_not_logged(
    configure: Configure, tmp_path: Path, values: dict[str, Any]
) -> None:
    configure()

    structlog.get_logger("app.jobs").info("happened", **values)

    text = (tmp_path / "api.log").read_text()
    assert "secret" not in text
    assert "redacted" in text


@pytest.mark.parametrize(
    "query", ["q=a+secret", "q=the+queen's+secret", 'q="a+secret"']
)
def test_what_callers_searched_for_is_not_logged(
    configure: Configure, tmp_path: Path, query: str
) -> None:
    configure()

    logging.getLogger("uvicorn.access").info(
        '%s - "%s %s HTTP/%s" %d',
        *("127.0.0.1:1", "GET", f"/api/v1/jobs?{query}", "1.1", 200),
    )

    (line,) = lines(tmp_path / "api.log")
    assert line["event"] == ('127.0.0.1:1 - "GET /api/v1/jobs?[redacted] HTTP/1.1" 200')


def test_a_traceback_does_not_carry_what_a_statement_carried(
    configure: Configure, tmp_path: Path
) -> None:
    """Both SQLAlchemy's parameters and PostgreSQL's DETAIL repeat the row."""
    configure()
    driver = ValueError(f"violates check\nDETAIL:  Failing row contains (1, {SECRET}).")
    try:
        raise IntegrityError(
            "INSERT INTO jobs", {"prompt": f"{SECRET}]\n[x"}, driver
        ) from driver
    except IntegrityError:
        structlog.get_logger("app.jobs").exception("look.crashed")

    (line,) = lines(tmp_path / "api.log")
    assert "secret" not in line["exception"]
    assert "IntegrityError" in line["exception"]
    assert "test_telemetry.py" in line["exception"]


def test_an_ordinary_traceback_is_kept(configure: Configure, tmp_path: Path) -> None:
    configure()
    try:
        raise KeyError("outputs")
    except KeyError:
        structlog.get_logger("app.jobs").exception("look.crashed")

    (line,) = lines(tmp_path / "api.log")
    assert line["exception"].endswith("KeyError: 'outputs'")


@pytest.mark.parametrize(
    "secret",
    [
        "mgs_Zm9vYmFyMDEyMzQ1Njc4OWFiY2RlZmdoaWprbG1ub3A",
        "r8_Zm9vYmFyMDEyMzQ1Njc4OWFiY2Rl",
        "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
        "Bearer Zm9vYmFyMDEyMzQ1Njc4OWFi",
    ],
)
def test_a_secret_in_the_middle_of_a_text_is_blanked(
    configure: Configure, tmp_path: Path, secret: str
) -> None:
    configure()

    logging.getLogger("library").warning("sent %s, and was refused", secret)
    structlog.get_logger("app.x").warning("x.failed", reason=f"no such key: {secret}!")
    try:
        raise RuntimeError(f"refused: {secret}")
    except RuntimeError:
        logging.getLogger("library").exception("it went wrong")

    text = (tmp_path / "api.log").read_text()
    assert secret.removeprefix("Bearer ") not in text
    assert text.count("[redacted]") == 3
