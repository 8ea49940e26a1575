"""The requirement files: everything pinned, every direct dependency with its reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parents[2] / "requirements"


def requirements(name: str) -> list[tuple[Requirement, str]]:
    """The requirements of a file, each with its comment."""
    lines = (FOLDER / name).read_text().splitlines()
    split = [
        re.split(r"\s+#\s*", line, maxsplit=1)
        for line in lines
        if line[:1] not in ("#", "")
    ]
    return [(Requirement(words[0]), (words + [""])[1]) for words in split]


@pytest.mark.parametrize("name", ["runtime.txt", "local.txt", "dev.txt"])
def test_direct_dependencies_are_pinned_and_say_why(name: str) -> None:
    pinned = {canonicalize_name(one.name) for one, _ in requirements("constraints.txt")}
    for requirement, reason in requirements(name):
        assert reason, f"{requirement.name}: say why"
        assert canonicalize_name(requirement.name) in pinned


def test_constraints_are_exact() -> None:
    for requirement, _ in requirements("constraints.txt"):
        assert [one.operator for one in requirement.specifier] == [
            "=="
        ], requirement.name
