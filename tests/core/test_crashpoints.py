"""Places to die at: they strike when armed, and never in production."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from app.core import crashpoints
from app.core.config import Settings
from app.core.crashpoints import Point
from tests.support.servers import ROOT

PRODUCTION = sorted(
    path for folder in ("app", "worker") for path in (ROOT / folder).rglob("*.py")
)

# Passes one place three times, and another one first; says how far it came.
WALK = """
import sys
from app.core.crashpoints import Point, arm, reach
arm(sys.argv[1])
reach(Point.PURCHASE_MADE)
for time in range(3):
    reach(Point.LOOK_BEGUN, when=time != 0)
    print(time, flush=True)
"""


def walk(wish: str) -> tuple[int, str]:
    """Let a process walk past the places; give how it ended and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", WALK, wish],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.returncode, done.stdout.replace("\n", " ").strip()


@pytest.mark.parametrize(
    ("wish", "end", "said"),
    [
        ("", 0, "0 1 2"),
        ("job.settled", 0, "0 1 2"),
        ("purchase.made", -9, ""),
        ("look.begun", -9, "0"),
        ("look.begun:2=kill", -9, "0 1"),
        ("look.begun:3", 0, "0 1 2"),
        ("look.begun:each", -9, "0"),
    ],
)
def test_a_process_ends_where_it_was_told_to(wish: str, end: int, said: str) -> None:
    assert walk(wish) == (end, said)


def test_a_process_that_is_stopped_goes_on_when_it_is_continued() -> None:
    argv = [sys.executable, "-c", WALK, "look.begun:each=stop"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(2):
            _, state = os.waitpid(child.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(state)
            child.send_signal(signal.SIGCONT)
        assert child.stdout is not None
        said = child.stdout.read()

    assert (child.returncode, said.split()) == (0, ["0", "1", "2"])


@pytest.mark.parametrize(
    "wish", ["nowhere", "look.begun=explode", "look.begun:0", "look.begun:often"]
)
def test_a_wish_that_means_nothing_is_refused(wish: str) -> None:
    with pytest.raises(ValueError):
        crashpoints.arm(wish)

    assert crashpoints._armed is None


def reached(source: str) -> list[str]:
    """Name the places a source text passes."""
    return [
        node.args[0].attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "reach"
        and isinstance(node.args[0], ast.Attribute)
    ]


def test_every_place_is_passed_once_and_no_other() -> None:
    found = Counter(name for path in PRODUCTION for name in reached(path.read_text()))

    assert found == {point.name: 1 for point in Point}


def arming(path: Path) -> bool:
    text = path.read_text()
    return "MEDIAGEN_CRASH_AT" in text or ".arm(" in text or "import arm" in text


def test_production_arms_nothing_and_knows_no_variable_for_it() -> None:
    assert not [path.name for path in PRODUCTION if arming(path)]
    assert not [name for name in Settings.model_fields if "crash" in name]
    assert arming(ROOT / "tests/support/crashing_build.py")
