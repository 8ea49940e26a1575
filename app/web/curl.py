"""A job as a command line that asks for the same again."""

from __future__ import annotations

import json
import shlex
from typing import Final

from fastapi import Request

from app.api.deps import runtime_of
from app.domain.generation import JSON
from app.services.job_queries import JobRecord

_PROMPT: Final = "prompt"


def curl_of(request: Request, record: JobRecord) -> str:
    """Write the command; the key is for its reader to put in."""
    runtime = runtime_of(request)
    origin = runtime.settings.public_base_url or str(request.base_url).rstrip("/")
    lines = [f"curl {origin}{runtime.settings.api_v1_prefix}/generate"]
    if runtime.gatekeeper.demands_keys:
        lines.append('-H "Authorization: Bearer $MEDIAGEN_API_KEY"')
    lines.append("-H 'Content-Type: application/json'")
    body = json.dumps(request_of(record), ensure_ascii=False, indent=2)
    lines.append(f"-d {shlex.quote(body)}")
    return " \\\n  ".join(lines)


def request_of(record: JobRecord) -> dict[str, JSON]:
    """Give a body for `POST /generate` that asks for the same, seed included.

    Uploads are named as a caller names them: their addresses come to an end.
    """
    row = record.row
    parameters = {
        name: _named(value, row.uploads.get(name))
        for name, value in row.input.items()
        if name != _PROMPT
    }
    body: dict[str, JSON] = {"prompt": row.prompt, "model": row.model}
    if row.num_outputs > 1:
        body["num_outputs"] = row.num_outputs
    return body | {"parameters": parameters}


def _named(value: JSON, upload: JSON) -> JSON:
    if isinstance(upload, str):
        return f"upload:{upload}"
    if isinstance(upload, list) and isinstance(value, list):
        return [
            item if one is None else f"upload:{one}" for item, one in zip(value, upload)
        ]
    return value
