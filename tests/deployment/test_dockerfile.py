"""Dockerfile: small, pinned, not root, one image for both roles."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]

Instructions = list[tuple[str, str]]


@pytest.fixture(scope="module")
def instructions() -> Instructions:
    content = (ROOT / "Dockerfile").read_bytes()
    parsed = DockerfileParser(fileobj=io.BytesIO(content)).structure
    return [
        (one["instruction"], one["value"])
        for one in parsed
        if one["instruction"] != "COMMENT"
    ]


@pytest.fixture(scope="module")
def final(instructions: Instructions) -> Instructions:
    """The instructions of the last stage: what is shipped."""
    last = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


def values(instructions: Instructions, name: str) -> list[str]:
    return [value for found, value in instructions if found == name]


def test_bases_are_pinned_and_slim(instructions: Instructions) -> None:
    bases = [value.split()[0] for value in values(instructions, "FROM")]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim(-\w+)?", base) for base in bases)


def test_it_runs_as_an_ordinary_user_that_may_write_pictures(
    final: Instructions,
) -> None:
    (user,) = values(final, "USER")
    assert user not in ("root", "0")
    setup = " ".join(values(final, "RUN"))
    assert re.search(rf"useradd .*\b{user}\b", setup)
    environment = " ".join(values(final, "ENV"))
    stored = re.search(r"STORAGE_PATH=(\S+)", environment)
    assert stored and f"chown {user}:{user} {stored[1]}" in setup


def test_the_command_is_exec_form_and_takes_the_platforms_port(
    final: Instructions,
) -> None:
    (command,) = values(final, "CMD")
    words = json.loads(command)
    assert words[:2] == ["sh", "-c"]
    assert words[2].startswith("exec uvicorn app.main:app --host 0.0.0.0 ")
    assert "${PORT:-8000}" in words[2]
    # No entry point: the worker's role is just another command.
    assert values(final, "ENTRYPOINT") == []


def test_it_watches_its_own_health(final: Instructions) -> None:
    (check,) = values(final, "HEALTHCHECK")
    assert "/api/v1/health/live" in check
    assert json.loads(check.partition("CMD")[2])[0] == "python"


def test_only_what_exists_and_is_not_ignored_is_copied(
    instructions: Instructions,
) -> None:
    let_in = {
        line.removeprefix("!").rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for value in values(instructions, "COPY"):
        if value.startswith("--from"):
            continue
        for source in value.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.rstrip("/") in let_in, source


def test_neither_tests_nor_local_servers_are_shipped(
    instructions: Instructions,
) -> None:
    installed = " ".join(values(instructions, "RUN"))
    assert "requirements/runtime.txt" in installed
    assert "requirements/dev.txt" not in installed
    assert "requirements/local.txt" not in installed
