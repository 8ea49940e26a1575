"""What the code knows and the documentation does not tell.

Every rule is a function from text and facts to what is missing, so that it can be shown to fail.
"""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from urllib.parse import unquote

import pytest
import typer.main

from app import cli
from app.api import ops
from app.core.config import Settings
from app.domain.generation import Failure
from app.main import app
from app.models import schemas
from app.services.providers import replicate_errors

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "app"
NOT_OURS = frozenset((".venv", "node_modules", ".git", ".data", ".pytest_cache"))
IN_WORDS = frozenset(("required", "unset"))
REQUIRED: dict[str, Any] = {
    "database_url": "postgresql://localhost/none",
    "redis_url": "redis://localhost",
    "replicate_api_token": "r8_none",
}
METHODS = frozenset(("get", "head", "post", "put", "patch", "delete"))

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)")
LINK_DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?([^>\s]+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)? *$", re.MULTILINE)
PLACE = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.py):([\w.]+)(?:\(\))?`")


def read(path: str) -> str:
    """Read a file of the project."""
    return (ROOT / path).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------- rules


def missing_in_tables(words: Iterable[str], text: str) -> set[str]:
    """Name the words that no table has as `word` in the first cell of a row."""
    rows = re.findall(r"^\| *(.+?) *\|", text, re.MULTILINE)
    told = {word for cell in rows for word in re.findall(r"`([^`]+)`", cell)}
    return set(words) - told


def missing_as_code(words: Iterable[str], text: str) -> set[str]:
    """Name the words that are nowhere written as `word`."""
    told = set(re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))
    return set(words) - told


def missing_variables(names: Iterable[str], text: str) -> set[str]:
    """Name the variables that have no line of their own in an `.env` file."""
    return set(names) - set(re.findall(r"^(\w+)=", text, re.MULTILINE))


def wrong_defaults(text: str) -> set[str]:
    """Name the settings whose row of a table tells another default than the code has."""
    rows = re.findall(r"^\| *`([A-Z_\d]+)` *\| *([^|]*?) *\|", text, re.MULTILINE)
    told = {name.lower(): cell.strip("`") for name, cell in rows}
    given = {name: cell for name, cell in told.items() if cell not in IN_WORDS}
    loaded = Settings(**REQUIRED | given)
    wrong = set()
    for name, cell in told.items():
        field = Settings.model_fields.get(name)
        if field is None:
            continue
        if cell in IN_WORDS:
            is_right = cell == default_in_words(field.is_required(), field.default)
        else:
            is_right = getattr(loaded, name) == field.default
        if not is_right:
            wrong.add(name.upper())
    return wrong


def default_in_words(is_required: bool, default: object) -> str | None:
    """Say a default that is no value."""
    if is_required:
        return "required"
    return "unset" if default in (None, ()) else None


def missing_commands(names: Iterable[str], text: str) -> set[str]:
    """Name the commands that are never shown as `mediagen NAME`."""
    return {
        name
        for name in names
        if not re.search(rf"\bmediagen {re.escape(name)}(?![\w-])", text)
    }


def missing_links(names: Iterable[str], text: str) -> set[str]:
    """Name the files no link of the text leads to."""
    targets = {target.partition("#")[0] for target in links_of(text)}
    return {
        name for name in names if name not in targets and f"./{name}" not in targets
    }


def links_of(text: str) -> list[str]:
    """List the targets of a Markdown text's links; what is in code is none."""
    prose = INLINE_CODE.sub("``", FENCE.sub("", text))
    return LINK.findall(prose) + LINK_DEFINITION.findall(prose)


def anchors_of(text: str) -> set[str]:
    """Give the anchors of a Markdown text's headings, as GitHub makes them."""
    slugs: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
        slugs[slug] += 1
    return found


def broken_links(path: Path, text: str, root: Path = ROOT) -> set[str]:
    """Name the relative links of the text of a file that lead nowhere."""
    broken = set()
    for target in links_of(text):
        if re.match(r"[a-zA-Z][\w+.-]*:|//", target):
            continue
        name, _, anchor = target.partition("#")
        name = unquote(name)
        base = root if name.startswith("/") else path.parent
        file = base / name.lstrip("/") if name else path
        if not file.exists():
            broken.add(target)
        elif anchor and file.suffix == ".md":
            there = text if file == path else file.read_text(encoding="utf-8")
            if anchor not in anchors_of(there):
                broken.add(target)
    return broken


def missing_places(text: str, root: Path = ROOT) -> set[str]:
    """Name the `path:function` and `path:Class.method` of the text that do not exist."""
    return {
        f"{path}:{name}"
        for path, name in PLACE.findall(text)
        if not (root / path).is_file() or name not in names_of(root / path)
    }


# --------------------------------------------------------------------------------- facts


def setting_names() -> set[str]:
    """Name every setting as the environment does."""
    return {name.upper() for name in Settings.model_fields}


def routes() -> set[str]:
    """Name every documented route as `METHOD /path`."""
    return {
        f"{method.upper()} {path}"
        for path, operations in app.openapi()["paths"].items()
        for method in operations
        if method in METHODS
    }


def command_names() -> set[str]:
    """Name every command of `mediagen`."""
    command = typer.main.get_command(cli.app)
    commands: Mapping[str, object] = getattr(command, "commands")
    return set(commands)


def error_codes() -> set[str]:
    """Name every code a caller, or a reader of logs, can meet."""
    found = assigned_codes(tree(APP / "domain" / "errors.py"))
    for path in APP.rglob("*.py"):
        found |= failure_codes(tree(path))
    for path in (APP / "api").glob("*.py"):
        found |= problem_codes(tree(path))
    found |= provider_codes(replicate_errors)
    return found - {""}


def assigned_codes(module: ast.AST) -> set[str]:
    """Find `code = "…"`."""
    return {
        node.value.value
        for node in ast.walk(module)
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "code" for t in node.targets)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def failure_codes(module: ast.AST) -> set[str]:
    """Find the first argument, or `code`, of every `Failure(…)`."""
    found: set[str] = set()
    for call in calls(module):
        name = call.func
        called = name.attr if isinstance(name, ast.Attribute) else None
        called = name.id if isinstance(name, ast.Name) else called
        if called == "Failure":
            found |= texts(call.args[:1]) | texts(keywords(call, "code"))
    return found


def problem_codes(module: ast.AST) -> set[str]:
    """Find `code="…"` in calls, the values of `_CODES`, and what stands in for them."""
    found: set[str] = set()
    for call in calls(module):
        values = list(keywords(call, "code"))
        for value in values:
            found |= texts([value])
            if isinstance(value, ast.Call):
                found |= texts(value.args)
    for node in ast.walk(module):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        if any(isinstance(t, ast.Name) and t.id == "_CODES" for t in node.targets):
            found |= texts(node.value.values)
    return found


def provider_codes(module: ModuleType) -> set[str]:
    """Find the code of every failure and table row a module holds."""
    found: set[str] = set()
    for value in vars(module).values():
        for one in value if isinstance(value, tuple | list) else (value,):
            code = getattr(one, "code", None)
            is_row = type(one).__module__ == module.__name__
            if isinstance(code, str) and (is_row or isinstance(one, Failure)):
                found.add(code)
    return found


def tree(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def calls(module: ast.AST) -> Iterator[ast.Call]:
    """Walk the calls."""
    return (node for node in ast.walk(module) if isinstance(node, ast.Call))


def keywords(call: ast.Call, name: str) -> Iterator[ast.expr]:
    """Walk the values of a keyword."""
    return (keyword.value for keyword in call.keywords if keyword.arg == name)


def texts(nodes: Iterable[ast.expr | None]) -> set[str]:
    """Keep the text constants."""
    return {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def names_of(path: Path) -> set[str]:
    """Name what a module defines, `Class.method` included."""
    return set(_names_in(tree(path).body, ""))


def _names_in(body: Iterable[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name
            yield from _names_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from (prefix + t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id


def markdown_files(root: Path = ROOT) -> list[Path]:
    """List our Markdown files."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


# ------------------------------------------------------------------ the documentation is whole


def test_every_setting_is_in_the_readme() -> None:
    assert missing_in_tables(setting_names(), read("README.md")) == set()


def test_the_readme_tells_the_defaults_of_the_code() -> None:
    assert wrong_defaults(read("README.md")) == set()


def test_every_setting_is_in_env_example() -> None:
    assert missing_variables(setting_names(), read(".env.example")) == set()


def test_every_route_is_documented() -> None:
    assert missing_as_code(routes(), read("docs/api.md")) == set()


@pytest.mark.parametrize("words", [schemas.StatusWord, schemas.StageWord])
def test_every_status_and_stage_is_documented(words: object) -> None:
    assert missing_as_code(get_args(words), read("docs/api.md")) == set()


@pytest.mark.parametrize("model", [schemas.GenerateRequest, schemas.Job])
def test_every_field_of_requests_and_jobs_is_documented(
    model: type[schemas.GenerateRequest | schemas.Job],
) -> None:
    assert missing_in_tables(model.model_fields, read("docs/api.md")) == set()


def test_every_error_code_is_documented() -> None:
    assert missing_in_tables(error_codes(), read("docs/api.md")) == set()


def test_every_metric_is_documented() -> None:
    assert missing_in_tables(ops.METRICS, read("docs/operations.md")) == set()


def test_every_command_is_in_the_readme() -> None:
    assert missing_commands(command_names(), read("README.md")) == set()


def test_every_decision_is_in_the_list_of_decisions() -> None:
    files = {path.name for path in (ROOT / "docs/adr").glob("[0-9]*.md")}
    assert files
    assert missing_links(files, read("docs/adr/README.md")) == set()


def test_every_relative_link_resolves() -> None:
    broken = {
        str(path.relative_to(ROOT)): found
        for path in markdown_files()
        if (found := broken_links(path, path.read_text(encoding="utf-8")))
    }
    assert broken == {}


def test_every_place_of_the_tour_exists() -> None:
    text = read("docs/00-tour.md")
    assert PLACE.search(text), "the tour names no place at all"
    assert missing_places(text) == set()


# --------------------------------------------------------------------- the rules can fail


def without(text: str, word: str) -> str:
    """Take a word out of a text."""
    assert word in text
    return text.replace(word, "…")


def test_a_setting_taken_out_of_the_readme_is_missed() -> None:
    doctored = without(read("README.md"), "`MAX_RETRIES`")
    assert missing_in_tables(setting_names(), doctored) == {"MAX_RETRIES"}


def test_a_setting_that_is_only_in_prose_is_missed() -> None:
    text = "Set `MAX_RETRIES` as you like.\n\n| `DEBUG` | … |\n"
    assert missing_in_tables({"MAX_RETRIES", "DEBUG"}, text) == {"MAX_RETRIES"}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("`MAX_RETRIES` | `3`", "`MAX_RETRIES` | `4`"),
        ("`DEBUG` | `false`", "`DEBUG` | unset"),
        ("`STORAGE_PATH` | `./media`", "`STORAGE_PATH` | required"),
        ("`CORS_ORIGINS` | unset", "`CORS_ORIGINS` | `*`"),
        ("`REDIS_URL` | required", "`REDIS_URL` | `redis://localhost:6379/0`"),
    ],
)
def test_a_wrong_default_is_found(right: str, wrong: str) -> None:
    text = read("README.md")
    assert right in text
    assert wrong_defaults(text.replace(right, wrong)) == {right.split("`")[1]}


def test_a_setting_in_a_comment_of_env_example_is_missed() -> None:
    doctored = read(".env.example").replace("MAX_RETRIES=", "# MAX_RETRIES=")
    assert missing_variables(setting_names(), doctored) == {"MAX_RETRIES"}


def test_a_route_taken_out_is_missed() -> None:
    doctored = without(read("docs/api.md"), "HEAD /media/{key}")
    assert missing_as_code(routes(), doctored) == {"HEAD /media/{key}"}


def test_a_route_that_is_only_in_an_example_is_missed() -> None:
    assert missing_as_code({"GET /metrics"}, "```\n`GET /metrics`\n```\n")


@pytest.mark.parametrize("word", ["cancelled", "reconciling"])
def test_a_status_or_stage_taken_out_is_missed(word: str) -> None:
    words = {*get_args(schemas.StatusWord), *get_args(schemas.StageWord)}
    doctored = without(read("docs/api.md"), f"`{word}`")
    assert missing_as_code(words, doctored) == {word}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("conflict", id="of an exception"),
        pytest.param("outcome_lost", id="of the lifecycle"),
        pytest.param("no_output", id="of the runner"),
        pytest.param("invalid_cursor", id="of a keyword"),
        pytest.param("range_not_satisfiable", id="of a problem"),
        pytest.param("body_too_large", id="of the table of statuses"),
        pytest.param("http_error", id="of any other status"),
        pytest.param("provider_account", id="of the provider's refusals"),
        pytest.param("out_of_memory", id="of the provider's failures"),
    ],
)
def test_an_error_code_taken_out_is_missed(code: str) -> None:
    doctored = without(read("docs/api.md"), f"`{code}`")
    assert missing_in_tables(error_codes(), doctored) == {code}


def test_new_error_codes_are_found_wherever_they_are_written() -> None:
    assert assigned_codes(ast.parse("class A:\n    code = 'one'")) == {"one"}
    assert failure_codes(ast.parse("Failure('two', 'x', True)")) == {"two"}
    assert failure_codes(ast.parse("g.Failure(code='three')")) == {"three"}
    assert problem_codes(ast.parse("f(code='four')")) == {"four"}
    assert problem_codes(ast.parse("f(code=T.get(s, 'five'))")) == {"five"}
    assert problem_codes(ast.parse("_CODES = {418: 'six'}")) == {"six"}
    module = ModuleType("provider")
    vars(module)["ONE"] = Failure("seven", "x", True)
    vars(module)["MORE"] = (Failure("eight", "x", True),)
    assert provider_codes(module) == {"seven", "eight"}


def test_a_metric_taken_out_is_missed() -> None:
    doctored = without(read("docs/operations.md"), "`mgs_claims_lost`")
    assert missing_in_tables(ops.METRICS, doctored) == {"mgs_claims_lost"}


def test_a_command_taken_out_is_missed() -> None:
    doctored = without(read("README.md"), "mediagen doctor")
    assert missing_commands(command_names(), doctored) == {"doctor"}
    assert missing_commands({"up"}, "mediagen upgrade, mediagen up-to-date") == {"up"}


def test_a_decision_taken_out_is_missed() -> None:
    text = "* [One](0001-one.md)\n* 0002-two.md\n* `[Three](0003-three.md)`\n"
    files = {"0001-one.md", "0002-two.md", "0003-three.md"}
    assert missing_links(files, text) == {"0002-two.md", "0003-three.md"}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    (tmp_path / "other.md").write_text("# Other page\n")
    text = (
        "# Top\n\n## `?wait` and ETag\n\n"
        "[a](../other.md) [b](../other.md#other-page) [c](#wait-and-etag) "
        "[d](https://example.org/x) [e](/other.md) ![f](missing.png)\n"
        "[g](gone.md) [h](../other.md#gone) [i](#gone) `[j](code.md)`\n"
        "[k]: nowhere.md\n\n```\n[l](fenced.md)\n```\n\n## Top\n\n[m](#top-1)\n"
    )
    page.write_text(text)
    assert broken_links(page, text, tmp_path) == {
        *("missing.png", "gone.md", "../other.md#gone", "#gone", "nowhere.md"),
    }


def test_links_are_looked_for_in_all_our_files_and_no_others(tmp_path: Path) -> None:
    for name in ("a.md", "docs/b.md", ".venv/c.md", "x/node_modules/d.md", "e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [str(path.relative_to(tmp_path)) for path in markdown_files(tmp_path)]
    assert found == ["a.md", "docs/b.md"]


def test_a_place_that_does_not_exist_is_found(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "LIMIT = 1\ndef go(): ...\nclass Car:\n    async def stop(self): ...\n"
    )
    text = (
        "`one.py:go` `one.py:go()` `one.py:Car` `one.py:Car.stop` `one.py:LIMIT` "
        "`one.py:stop` `one.py:Car.go` `two.py:go` `one.py:12`"
    )
    assert missing_places(text, tmp_path) == {
        *("one.py:stop", "one.py:Car.go", "two.py:go", "one.py:12"),
    }
