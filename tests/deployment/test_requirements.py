"""The requirement files: everything pinned, every direct dependency with its reason."""

from __future__ import annotations

import re
from importlib import metadata
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


def _needed(name: str, extras: frozenset[str]) -> set[tuple[str, frozenset[str]]]:
    """Give what a distribution asks for, on this Python or on 3.11.0."""
    found = set()
    oldest = {"python_version": "3.11", "python_full_version": "3.11.0"}
    places = [here | {"extra": one} for here in ({}, oldest) for one in {"", *extras}]
    for text in metadata.distribution(name).requires or ():
        asked = Requirement(text)
        if asked.marker is None or any(asked.marker.evaluate(p) for p in places):
            found.add((canonicalize_name(asked.name), frozenset(asked.extras)))
    return found


def test_what_is_pinned_is_what_is_needed_and_what_is_installed() -> None:
    pinned = {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one, _ in requirements("constraints.txt")
    }
    todo = {
        (canonicalize_name(one.name), frozenset(one.extras))
        for name in ("runtime.txt", "local.txt", "dev.txt")
        for one, _ in requirements(name)
        if one.marker is None or one.marker.evaluate()
    }
    seen: set[tuple[str, frozenset[str]]] = set()
    absent = set()
    while todo - seen:
        name, extras = min(todo - seen, key=str)
        seen.add((name, extras))
        try:
            todo |= _needed(name, extras)
        except metadata.PackageNotFoundError:
            absent.add(name)  # for another Python than this one
    needed = {name for name, _ in seen}

    assert needed == set(pinned)
    installed = {name: metadata.version(name) for name in needed - absent}
    assert installed == {name: pinned[name] for name in needed - absent}
