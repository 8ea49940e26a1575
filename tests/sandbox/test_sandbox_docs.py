"""The page about the sandbox is complete."""

from pathlib import Path

import pytest

from sandbox.__main__ import _parser
from sandbox.faults import FAULTS
from sandbox.server import create_app

PAGE = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text(encoding="utf-8")
OPTIONS = [
    a.option_strings[-1] for a in _parser()._actions if "--help" not in a.option_strings
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_on_the_page(option):
    assert f"`{option}`" in PAGE


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_every_fault_is_on_the_page_with_its_parameters(name):
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]

    assert FAULTS[name].promise in row
    assert all(f"`{param}` = " in row for param in FAULTS[name].defaults)


async def test_every_control_route_is_on_the_page():
    paths = {resource.canonical for resource in create_app().router.resources()}

    for path in paths:
        if path.startswith("/sandbox"):
            assert path.partition("/{")[0] in PAGE
