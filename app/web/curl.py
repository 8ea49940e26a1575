"""A job as a command line that asks for the same again."""

from __future__ import annotations

import json
import shlex
from fastapi import Request

from app.api.deps import runtime_of
from app.api.manifest import manifest_body
from app.services.job_queries import JobRecord


def curl_of(request: Request, record: JobRecord) -> str:
    """Write the command; the key is for its reader to put in."""
    runtime = runtime_of(request)
    origin = runtime.settings.public_base_url or str(request.base_url).rstrip("/")
    lines = [f"curl {origin}{runtime.settings.api_v1_prefix}/generate"]
    if runtime.gatekeeper.demands_keys:
        lines.append('-H "Authorization: Bearer $MEDIAGEN_API_KEY"')
    lines.append("-H 'Content-Type: application/json'")
    body = json.dumps(manifest_body(record)["request"], ensure_ascii=False, indent=2)
    lines.append(f"-d {shlex.quote(body)}")
    return " \\\n  ".join(lines)
