"""Entries of OUTBOUND_HOSTS: hosts and ports that are trusted exactly as written."""

from __future__ import annotations

import re
from typing import Final

_ENTRY: Final = re.compile(
    r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+):([0-9]{1,5})", re.ASCII | re.IGNORECASE
)


def parse_trusted(entry: str) -> tuple[str, int]:
    """Give host, in lower case and without brackets, and port; raise `ValueError`."""
    matched = _ENTRY.fullmatch(entry)
    if matched is None or not 0 < int(matched[2]) < 65536:
        raise ValueError(f"{entry!r} is not host:port")
    return matched[1].strip("[]").lower(), int(matched[2])
