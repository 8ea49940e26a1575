"""Rules of the house that a machine can check.  Each one is shown to be able to fail."""

import ast
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_socket import SocketConnectBlockedError

from tests.support.servers import ROOT

Rule = Callable[[ast.Module], list[str]]

APP = sorted((ROOT / "app").rglob("*.py"))
WORKER = sorted((ROOT / "worker").rglob("*.py"))
TESTS = sorted(
    path for path in (ROOT / "tests").rglob("*.py") if "node_modules" not in path.parts
)
COMPOSITION_ROOTS = {
    *("app/main.py", "app/cli.py", "app/up.py", "worker/celery_app.py"),
    *("app/core/config.py", "app/cli_session.py"),
}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _dotted(node: ast.expr) -> str:
    """Spell `a.b.c`; what is not a name is left out."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{_dotted(value)}.{name}"
    return ""


def _calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, _dotted(node.func)


def _at(node: ast.AST, text: str) -> str:
    return f"line {getattr(node, 'lineno', '?')}: {text}"


# -------------------------------------------------------------------------------- rules


def nobody_commits(tree: ast.Module) -> list[str]:
    """A commit is the end of a visible `begin()`, never a call."""
    return [
        _at(call, name) for call, name in _calls(tree) if name.endswith((".commit",))
    ]


def status_is_not_written(tree: ast.Module) -> list[str]:
    """A status changes through the gate; nobody else assigns one or updates jobs."""
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            # An object may name its own attribute so; nobody writes to somebody else's.
            if re.fullmatch(r"(?!self\.\w+$).*\.(status|stage)", _dotted(target)):
                found.append(_at(node, f"assigns {_dotted(target)}"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names = {keyword.arg for keyword in node.keywords}
            for argument in node.args:
                if isinstance(argument, ast.Dict):
                    keys = argument.keys
                    names |= {k.value for k in keys if isinstance(k, ast.Constant)}
            if node.func.attr == "values" and names & {"status", "stage"}:
                found.append(_at(node, "writes a status"))
        if isinstance(node, ast.Call) and _dotted(node.func) in ("update", "sa.update"):
            if _dotted(node.args[0]).rpartition(".")[2] in ("JOBS", "Job", "ATTEMPTS"):
                found.append(_at(node, "updates jobs"))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.search(r"(?is)\bupdate\s+jobs\b.*\bstatus\s*=", node.value):
                found.append(_at(node, "updates a status in SQL"))
    return found


def settings_are_not_read(tree: ast.Module) -> list[str]:
    """Settings are read where the parts are put together, and handed down."""
    forbidden = {"get_settings", "load_settings", "os.environ", "os.getenv"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and _dotted(node) in forbidden:
            found.append(_at(node, _dotted(node)))
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names} & {"environ", "getenv"}
            found += [_at(node, f"os.{name}") for name in sorted(names)]
    return found


def moments_know_their_zone(tree: ast.Module) -> list[str]:
    """Every datetime is aware."""
    found = []
    for call, name in _calls(tree):
        last = name.rpartition(".")[2]
        if last in ("utcnow", "utcfromtimestamp"):
            found.append(_at(call, name))
        is_datetime = name.endswith(("datetime.now", "datetime.fromtimestamp"))
        wanted = 1 if last == "now" else 2
        if is_datetime and len(call.args) < wanted:
            if not any(keyword.arg == "tz" for keyword in call.keywords):
                found.append(_at(call, f"{name} without a time zone"))
        if name in ("datetime", "datetime.datetime") and len(call.args) < 8:
            if not any(keyword.arg == "tzinfo" for keyword in call.keywords):
                found.append(_at(call, f"{name} without a time zone"))
    return found


def errors_are_caught_narrowly(tree: ast.Module) -> list[str]:
    """Only what is expected is caught; a handler that raises on may look at anything."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        is_broad = any(
            kind is None or _dotted(kind) in ("Exception", "BaseException")
            for kind in kinds
        )
        last = node.body[-1]
        if is_broad and not (isinstance(last, ast.Raise) and last.exc is None):
            found.append(_at(node, "catches everything"))
    return found


def nothing_is_printed(tree: ast.Module) -> list[str]:
    """What happens is logged; only commands talk to a terminal."""
    return [_at(call, name) for call, name in _calls(tree) if name == "print"]


def nobody_sleeps(tree: ast.Module) -> list[str]:
    """Nothing blocks an event loop, and no test hopes that a while is long enough."""
    found = [_at(call, name) for call, name in _calls(tree) if name == "time.sleep"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            if any(alias.name == "sleep" for alias in node.names):
                found.append(_at(node, "imports sleep"))
    return found


def public_things_are_documented(tree: ast.Module) -> list[str]:
    """Every public module, class, function and method says what it promises."""
    found = [] if ast.get_docstring(tree) else ["line 1: the module"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            if not isinstance(node, kinds) or node.name.startswith("_"):
                continue
            is_stub = ast.unparse(node.body[-1]) == "..." and len(node.body) == 1
            if not ast.get_docstring(node) and not (prefix and is_stub):
                found.append(_at(node, prefix + node.name))
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(tree.body, "")
    return found


# What a rule looks at, and where it does not hold, with the reason.
RULES: dict[Rule, tuple[list[Path], set[str]]] = {
    nobody_commits: ([*APP, *WORKER], set()),
    status_is_not_written: (
        [*APP, *WORKER],
        # The gate and the writing down of its answers; news, which only makes looks due and
        # names the owner of a late survivor.
        {
            *("app/services/job_service.py", "app/services/job_writes.py"),
            "app/services/news.py",
        },
    ),
    settings_are_not_read: (
        [*APP, *WORKER],
        # The store hands the AWS variables of the process to the S3 client, which owns them.
        COMPOSITION_ROOTS | {"app/services/media_store.py"},
    ),
    moments_know_their_zone: ([*APP, *WORKER, *TESTS], set()),
    errors_are_caught_narrowly: (
        [*APP, *WORKER],
        # The runner's boundary; the batcher hands errors to whoever waits; the worker's own
        # loop ends the process with what ended it.
        {
            *("app/services/job_runner.py", "app/core/batching.py"),
            "worker/celery_app.py",
        },
    ),
    nothing_is_printed: (
        [*APP, *WORKER],
        # Commands, and the one clear line about a wrong setting.
        {
            *("app/cli.py", "app/up.py", "app/terminal.py", "app/core/config.py"),
            *("worker/celery_app.py", "app/cli_keys.py", "app/cli_webhooks.py"),
        },
    ),
    nobody_sleeps: (
        [*APP, *WORKER, *TESTS],
        # Synchronous programs that wait for other processes, the bell's own thread, and the one
        # that sees the worker's end; the waiting of tests has a deadline.
        {
            *("app/core/queue.py", "worker/celery_app.py"),
            *("app/processes.py", "app/embedded.py", "app/client.py"),
            "tests/support/waiting.py",
        },
    ),
    public_things_are_documented: ([*APP, *WORKER], set()),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule: Rule) -> None:
    paths, exceptions = RULES[rule]
    broken = [
        f"{_name(path)}: {found}"
        for path in paths
        if _name(path) not in exceptions
        for found in rule(ast.parse(path.read_text()))
    ]

    assert not broken, f"{rule.__doc__}\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (nobody_commits, "async def f(c): await c.commit()", "c.begin()"),
        (nobody_commits, "session.commit()", "commit = 1"),
        (status_is_not_written, "job.status = 'failed'", "status = job.status"),
        (status_is_not_written, "job.stage: str = 'x'", "x = Row(status='a')"),
        (status_is_not_written, "self.job.status = 1", "self.status = 1"),
        (status_is_not_written, "update(JOBS)", "update(self)"),
        (status_is_not_written, "update(J).values(status='a')", "d.values()"),
        (status_is_not_written, "update(J).values({'stage': 1})", "q.values({'a': 1})"),
        (
            status_is_not_written,
            "text('UPDATE jobs SET status = 1')",
            "text('SELECT status FROM jobs WHERE status = 1')",
        ),
        (settings_are_not_read, "import os\nos.environ['A']", "import os\nos.getpid()"),
        (settings_are_not_read, "os.getenv('A')", "x.getenv_like('A')"),
        (settings_are_not_read, "from os import environ", "from os import path"),
        (settings_are_not_read, "load_settings(S)", "settings.debug"),
        (settings_are_not_read, "Depends(get_settings)", "Depends(get_runtime)"),
        (moments_know_their_zone, "datetime.now()", "datetime.now(UTC)"),
        (moments_know_their_zone, "datetime.utcnow()", "datetime.now(tz=UTC)"),
        (moments_know_their_zone, "dt.datetime.now()", "loop.now()"),
        (
            moments_know_their_zone,
            "datetime.fromtimestamp(1)",
            "datetime.fromtimestamp(1, UTC)",
        ),
        (
            moments_know_their_zone,
            "datetime(2026, 1, 1)",
            "datetime(2026, 1, 1, tzinfo=UTC)",
        ),
        (
            errors_are_caught_narrowly,
            "try: f()\nexcept Exception: pass",
            "try: f()\nexcept OSError: pass",
        ),
        (
            errors_are_caught_narrowly,
            "try: f()\nexcept: pass",
            "try: f()\nexcept BaseException:\n    g()\n    raise",
        ),
        (
            errors_are_caught_narrowly,
            "try: f()\nexcept (OSError, Exception) as e: raise Other from e",
            "try: f()\nexcept (OSError, ValueError) as e: raise Other from e",
        ),
        (nothing_is_printed, "print('x')", "console.print('x')"),
        (nobody_sleeps, "import time\ntime.sleep(1)", "import time\ntime.monotonic()"),
        (nobody_sleeps, "from time import sleep", "from time import monotonic"),
        (public_things_are_documented, "x = 1", '"""A module."""'),
        (
            public_things_are_documented,
            '"""M."""\ndef f(): pass',
            '"""M."""\ndef _f(): pass',
        ),
        (
            public_things_are_documented,
            '"""M."""\nasync def f(): pass',
            '"""M."""\nasync def f():\n    """F."""',
        ),
        (
            public_things_are_documented,
            '"""M."""\nclass C:\n    """C."""\n    def f(self): pass',
            '"""M."""\nclass C:\n    """C."""\n    def __len__(self): pass',
        ),
    ],
)
def test_the_rule_can_fail(rule: Rule, bad: str, good: str) -> None:
    assert rule(ast.parse(bad))
    assert not rule(ast.parse(good))


def test_every_exception_to_a_rule_is_needed() -> None:
    idle = [
        f"{rule.__name__}: {name}"
        for rule, (_, exceptions) in RULES.items()
        for name in sorted(exceptions)
        if not (ROOT / name).exists() or not rule(ast.parse((ROOT / name).read_text()))
    ]

    assert not idle


def test_imports_only_go_down() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout


def test_tests_cannot_reach_the_network() -> None:
    with socket.socket() as outside, pytest.raises(SocketConnectBlockedError):
        with pytest.warns(UserWarning, match="192.0.2.1"):
            outside.connect(("192.0.2.1", 80))


def test_tests_can_reach_this_machine() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
