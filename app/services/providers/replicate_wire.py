"""Reads what Replicate writes: lenient about everything but the id of a prediction.

Two back ends answer, so that field order, absent-versus-null keys and the precision of time
stamps vary between answers (recorded exchanges in replicate/replicate-python,
tests/cassettes, 2023-2024).  Every field but the id may be missing, unknown keys are ignored,
and a status we do not know is a prediction still running: our own deadline bounds it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import orjson

from app.domain.generation import JSON, ModelDescription, Phase, Prediction
from app.services.providers.replicate_errors import classify_failure

# replicate.com/docs/topics/predictions/lifecycle; `aborted` since the changelog of
# 2025-10-16.  The create page has examples with "successful"; real traffic says "succeeded".
_PHASES = {
    "starting": Phase.QUEUED,
    "processing": Phase.RUNNING,
    "succeeded": Phase.SUCCEEDED,
    "successful": Phase.SUCCEEDED,
    "failed": Phase.FAILED,
    "canceled": Phase.CANCELLED,
    "aborted": Phase.ABORTED,
}

_HANDLE = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PROGRESS = re.compile(r"(\d{1,3})%\|")  # tqdm's bar, e.g. " 45%|████▌     |"
_LOG_TAIL = 4096  # characters; the newest bar is at the end
_OUTPUT_PREFIXES = ("https://", "http://", "data:")
_SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True, slots=True)
class Page:
    """One page of the account's predictions, and the URL of the next one if there is one."""

    predictions: list[Prediction]
    next_url: str | None


def parse_object(body: bytes) -> dict[str, Any] | None:
    """Read a JSON object; None when the bytes are anything else."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def is_handle(value: object) -> bool:
    """Tell whether this can be a prediction's id, safe as one segment of a path."""
    return isinstance(value, str) and _HANDLE.fullmatch(value) is not None


def parse_prediction(data: Mapping[str, Any] | None) -> Prediction | None:
    """Read a prediction object; None when it has no usable id."""
    if data is None or not is_handle(data.get("id")):
        return None
    phase = _PHASES.get(_text(data.get("status")) or "", Phase.RUNNING)
    metrics = data.get("metrics")
    given = data.get("input")
    failure, is_transient = (
        classify_failure(data.get("error")) if phase is Phase.FAILED else (None, False)
    )
    return Prediction(
        handle=data["id"],
        phase=phase,
        model=_text(data.get("model")),
        input=given if isinstance(given, dict) else None,
        outputs=tuple(_walk_outputs(data.get("output"))),
        progress=_progress(data.get("logs")),
        failure=failure,
        is_transient=is_transient,
        data_removed=data.get("data_removed") is True,
        webhook=_text(data.get("webhook")),
        created_at=parse_moment(data.get("created_at")),
        started_at=parse_moment(data.get("started_at")),
        completed_at=parse_moment(data.get("completed_at")),
        predict_seconds=_number(
            metrics.get("predict_time") if isinstance(metrics, dict) else None
        ),
    )


def parse_page(data: Mapping[str, Any] | None) -> Page | None:
    """Read a page of the list; rows without a usable id are left out, None for nonsense."""
    if data is None or not isinstance(data.get("results"), list):
        return None
    rows = [row for row in data["results"] if isinstance(row, dict)]
    predictions = [found for row in rows if (found := parse_prediction(row))]
    return Page(predictions, _text(data.get("next")))


def describe_model(name: str, data: Mapping[str, Any]) -> ModelDescription:
    """Read a model object (`GET /models/{owner}/{name}`) with its latest version.

    Official models may hide their version; then `version` is None.  A model without a
    readable schema takes any input: the provider checks it.
    """
    latest = data.get("latest_version")
    latest = latest if isinstance(latest, dict) else {}
    labels = ("official",) if data.get("is_official") is True else ()
    return ModelDescription(
        name=name,
        description=_text(data.get("description")) or "",
        version=_visible_version(latest.get("id")),
        input_schema=_input_schema(latest.get("openapi_schema")),
        labels=labels,
    )


def describe_version(name: str, data: Mapping[str, Any]) -> ModelDescription:
    """Read a version object (`GET /models/{owner}/{name}/versions/{id}`)."""
    return ModelDescription(
        name=name,
        description="",
        version=_visible_version(data.get("id")),
        input_schema=_input_schema(data.get("openapi_schema")),
    )


def _input_schema(openapi: Any) -> dict[str, JSON]:
    """Cut the model's input out of its OpenAPI document as one self-contained schema.

    References stay as they are (`#/components/schemas/X`): the components come along.
    """
    schema: dict[str, JSON] = {"$schema": _SCHEMA_DIALECT, "type": "object"}
    components = openapi.get("components") if isinstance(openapi, dict) else None
    schemas = components.get("schemas") if isinstance(components, dict) else None
    given = schemas.get("Input") if isinstance(schemas, dict) else None
    if not isinstance(given, dict):
        return schema
    properties, required = given.get("properties"), given.get("required")
    schema["properties"] = properties if isinstance(properties, dict) else {}
    schema["required"] = required if isinstance(required, list) else []
    schema["additionalProperties"] = False
    schema["components"] = {"schemas": schemas}
    return schema


def _walk_outputs(value: Any) -> Iterator[str]:
    """Find the URLs of the files in whatever shape the model answers, in order."""
    pending = [value]  # a stack, not recursion: the depth is the model's choice
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if item.startswith(_OUTPUT_PREFIXES):
                yield item
        elif isinstance(item, list):
            pending.extend(reversed(item))
        elif isinstance(item, dict):
            pending.extend(reversed(item.values()))


def _progress(logs: Any) -> float | None:
    if not isinstance(logs, str):
        return None
    bars = _PROGRESS.findall(logs[-_LOG_TAIL:])
    return min(int(bars[-1]) / 100, 1.0) if bars else None


def parse_moment(value: Any) -> datetime | None:
    """Read RFC 3339 with 3, 6 or 9 digits of a second; what we cannot keep is cut off."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        return moment.replace(tzinfo=timezone.utc)
    return moment.astimezone(timezone.utc)


def _visible_version(value: Any) -> str | None:
    version = _text(value)
    return None if version == "hidden" else version


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None
