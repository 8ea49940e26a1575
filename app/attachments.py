"""Pictures given on the command line: uploaded, and named in the inputs of the job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from app.client import Client
from app.services.file_inputs import FileInput, file_inputs

_USUAL = "image"  # what most models call it, where the API does not know the model


def attach(
    client: Client, model: str | None, files: Sequence[tuple[str | None, Path]]
) -> dict[str, Any]:
    """Upload the files; give the parameters that name them.

    A file without a name goes to the first input of the model that takes a picture.
    """
    inputs = _inputs_of(client, model)
    by_name: dict[str, list[Path]] = {}
    for given, path in files:
        by_name.setdefault(given or _first_of(inputs), []).append(path)
    for name, paths in by_name.items():
        if len(paths) > 1 and not _is_list(inputs, name, paths):
            raise typer.BadParameter(f"{name} takes one picture, not {len(paths)}")
    found: dict[str, Any] = {}
    for name, paths in by_name.items():
        uris = [client.upload(path) for path in paths]
        found[name] = uris if _is_list(inputs, name, paths) else uris[0]
    return found


def _inputs_of(client: Client, model: str | None) -> dict[str, FileInput] | None:
    """Ask which files the model takes; None for one the API does not list."""
    listed = client.ask("GET", "/models").json()
    name = (model or listed["default"]).partition(":")[0]
    for one in listed["items"]:
        if one["name"] == name:
            return file_inputs(one["input_schema"])
    return None


def _first_of(inputs: dict[str, FileInput] | None) -> str:
    if inputs is None:
        return _USUAL
    for one in inputs.values():
        if one.is_picture:
            return one.name
    raise typer.BadParameter("the model takes no picture", param_hint="--image")


def _is_list(
    inputs: dict[str, FileInput] | None, name: str, paths: Sequence[Path]
) -> bool:
    """Tell whether an input takes a list; where nobody knows, the number of files decides."""
    if inputs is None or name not in inputs:
        return len(paths) > 1
    return inputs[name].is_list
