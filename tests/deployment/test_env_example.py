""".env.example: every setting, explained, and usable as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from dotenv import dotenv_values
from pydantic import SecretStr

from app.core.config import Settings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / ".env.example"


def test_it_has_every_setting_and_no_other() -> None:
    assert set(dotenv_values(EXAMPLE)) == {
        name.upper() for name in Settings.model_fields
    }


def test_every_setting_has_its_line_of_explanation() -> None:
    lines = EXAMPLE.read_text().splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if "=" in line and not line.startswith("#"):
            assert before.startswith("# ") and before.endswith("."), line


def test_its_values_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("REPLICATE_API_TOKEN", "r8_mine")
    loaded = Settings(_env_file=EXAMPLE)
    assert loaded.replicate_api_token == SecretStr("r8_mine")
    for name, field in Settings.model_fields.items():
        if not field.is_required():
            assert getattr(loaded, name) == field.default, name
