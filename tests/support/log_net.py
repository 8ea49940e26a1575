"""A net under the whole suite: no log file and no output of a process may hold a secret.

Every process a test starts writes below pytest's temporary folder.  When the session ends,
everything written there is searched for what opens a door or costs money.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# Logs of processes, their rotated ones, and what `Program` keeps of stdout and stderr.
LOGS = ("*.log", "*.log.*", "*.txt")

# Of programs that are not ours: the bucket writes down which links it was shown.
FOREIGN = frozenset(("moto.log",))

# Nobody's: the example of the documentation, which the sandbox prints.
HARMLESS = frozenset(("r8_sandbox",))

SECRETS = {
    # With a capital and a digit, for names of metrics begin so, too.
    "an API key": r"mgs_(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{20,}",
    "a token of the provider": r"\br8_\w{6,}",
    "a signing secret": r"whsec_[\w+/=-]{8,}",
    "a credential": r"(?i)\bbearer\s+(?!\[|…|token)[\w.~+/=-]{8,}",
    "a header": r"(?i)['\"]?(?:authorization|x-api-key)['\"]?\s*[:=,]\s*['\"]?[\w.-]{8,}",
    "a signed link": r"(?i)[?&](?:x-amz-)?signature=[\w%-]{8,}",
    "a webhook's token": r"[?&]token=[\w-]{8,}",
    "a password in a URL": (
        r"\b(?:postgres\w*|rediss?|https?)(?:\+\w+)?://[^\s:@/]*:[^\s@/*\[]+@"
    ),
}
# One pass says of nearly every line that there is nothing in it.
_NET = re.compile(r"(?i)mgs_|r8_|whsec_|bearer|authorization|x-api-key|[?&]\w|://")
_EACH = {kind: re.compile(pattern) for kind, pattern in SECRETS.items()}


def leaks(text: str) -> Iterator[tuple[str, str]]:
    """Give what kind of secret each line holds, and the line."""
    for line in text.splitlines():
        if _NET.search(line) is None:
            continue
        for kind, pattern in _EACH.items():
            found = [one[0] for one in pattern.finditer(line)]
            if set(found) - HARMLESS:
                yield kind, line


def search(folder: Path) -> list[str]:
    """Search every log below the folder; give one line of report for each secret."""
    found = []
    for pattern in LOGS:
        for file in sorted(folder.rglob(pattern)):
            if file.is_file() and file.name not in FOREIGN:
                text = file.read_text(errors="replace")
                found += [
                    f"{file.relative_to(folder)} holds {kind}: {line[:300]}"
                    for kind, line in leaks(text)
                ]
    return found


@pytest.fixture(scope="session", autouse=True)
def no_secret_in_any_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the session when anything it ran wrote a secret down."""
    yield
    found = search(tmp_path_factory.getbasetemp())
    assert not found, "\n".join(found[:20])
