"""Creating predictions: the three routes, their checks, and the two headers that matter."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import replace
from typing import Any

import orjson
from aiohttp import web

from sandbox import answers
from sandbox.catalogue import Catalogue, Complaint, Model
from sandbox.faults import FaultBoard, Strike, Subject
from sandbox.gallery import GALLERY
from sandbox.prediction import EVENTS, Plan, Prediction
from sandbox.predictions import PredictionBook
from sandbox.purchases import fingerprint

JSON = dict[str, Any]
CATALOGUE: web.AppKey[Catalogue] = web.AppKey("catalogue", Catalogue)
BOOK: web.AppKey[PredictionBook] = web.AppKey("book", PredictionBook)
FAULTS: web.AppKey[FaultBoard] = web.AppKey("faults", FaultBoard)

#: Exactly these keys; anything else is refused (OpenAPI document, additionalProperties=false).
_KEYS = {"input", "webhook", "webhook_events_filter", "stream"}
_CANCEL_AFTER = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
_SHORTEST, _LONGEST = 5, 24 * 3600
_LONGEST_WAIT = 60
_HEX64 = re.compile(r"[0-9a-f]{64}")

routes = web.RouteTableDef()


class Refusal(Exception):
    """A create that makes nothing; carries the answer."""

    def __init__(self, answer: web.Response) -> None:
        super().__init__(answer.status)
        self.answer = answer


@routes.post("/v1/predictions")
async def create_by_version(request: web.Request) -> web.StreamResponse:
    """Create from ``version``: owner/name, owner/name:64hex or 64hex."""

    def choose(body: JSON) -> tuple[Model, str]:
        spelling = body["version"]
        model = request.app[CATALOGUE].by_version(spelling)
        if model is None:
            raise Refusal(
                answers.problem(
                    422,
                    "The specified version does not exist (or perhaps you don't have "
                    "permission to use it?)",
                    title="Invalid version or not permitted",
                )
            )
        return model, model.version if _HEX64.search(spelling) else "hidden"

    return await _create(request, choose, version_needed=True)


@routes.post("/v1/models/{owner}/{name}/predictions")
async def create_by_model(request: web.Request) -> web.StreamResponse:
    """Create from an official model; 404 for community models."""

    def choose(_body: JSON) -> tuple[Model, str]:
        model = request.app[CATALOGUE].find(_ref(request))
        if model is None or not model.official:
            raise Refusal(answers.not_found())
        return model, "hidden"

    return await _create(request, choose)


@routes.post("/v1/deployments/{owner}/{name}/predictions")
async def create_by_deployment(request: web.Request) -> web.StreamResponse:
    """Create on a deployment; the sandbox has ``sandbox/<model name>`` for each model."""

    def choose(_body: JSON) -> tuple[Model, str]:
        model = request.app[CATALOGUE].named(request.match_info["name"])
        if model is None or request.match_info["owner"] != "sandbox":
            raise Refusal(answers.not_found())
        return model, model.version

    return await _create(request, choose, deployment=_ref(request))


def _ref(request: web.Request) -> str:
    return f"{request.match_info['owner']}/{request.match_info['name']}"


async def _create(
    request: web.Request,
    choose: Any,
    *,
    version_needed: bool = False,
    deployment: str | None = None,
) -> web.StreamResponse:
    try:
        body = await _read_body(request, version_needed)
        model, version = choose(body)
        complaints = model.complaints(body["input"])
        if complaints:
            raise Refusal(answers.invalid(complaints))
        cancel_after = _cancel_after(request.headers.get("Cancel-After"))
        wait = _wait(request.headers.get("Prefer"))
    except Refusal as refusal:
        return refusal.answer
    subject = Subject(
        prompt=str(model.value(body["input"], "prompt") or ""),
        model=model.ref,
        webhook=body.get("webhook") or "",
    )
    faults = request.app[FAULTS]
    refused = await _spoil_before(request, faults.strike("create_before", subject))
    if refused is not None:
        return refused
    prediction = _make(request, body, model, version, cancel_after, deployment, subject)
    after = replace(subject, prediction_id=prediction.id)
    strike = faults.strike("create_after", after)
    if strike is not None and strike.name == "create.slow_after":
        await answers.pause(strike)
    elif strike is not None and strike.name != "create.inline_outputs":
        return await _spoil_after(request, prediction, strike)
    status, body = await _answer(request, prediction, wait)
    if (
        strike is not None
        and strike.name == "create.inline_outputs"
        and body.get("output")
    ):
        body["output"] = await request.app[GALLERY].inline(prediction)
    return answers.reply(body, status, _create_headers(request, prediction, wait))


def _make(
    request: web.Request,
    body: JSON,
    model: Model,
    version: str,
    cancel_after: float | None,
    deployment: str | None,
    subject: Subject,
) -> Prediction:
    given = body["input"]
    chosen = model.value(given, "seed") if model.has_seed else None
    speed = request.app[answers.CONFIG].speed
    plan = plan_for(model, given, speed, request.app[FAULTS].strike("plan", subject))
    events = body.get("webhook_events_filter")
    return request.app[BOOK].create(
        model,
        given,
        plan,
        version=version,
        seed=random.getrandbits(31) if chosen is None else int(chosen),
        base_url=answers.base_url(request),
        webhook=body.get("webhook"),
        events=None if events is None else tuple(events),
        cancel_after=cancel_after,
        deployment=deployment,
    )


def plan_for(model: Model, given: JSON, speed: float, strike: Strike | None) -> Plan:
    """Decide what becomes of an input: the same input takes the same time, always.

    Times vary by a third around the model's usual ones; ``speed`` 0 means no time at all.
    """
    digest = hashlib.sha256(fingerprint(model.ref, given).encode()).digest()
    queue_jitter, run_jitter = (0.67 + 0.66 * byte / 255 for byte in digest[:2])
    factor = 1 / speed if speed else 0.0
    queue = model.queue.total_seconds() * queue_jitter * factor
    run = model.run.total_seconds() * run_jitter * factor
    count = model.order(given).count
    plan = Plan(queue=queue, run=run, count=count)
    if strike is None:
        return plan
    params = strike.params
    match strike.name:
        case "prediction.fails":
            return replace(plan, ending="failed", error=str(params["error"]))
        case "prediction.aborted":
            return replace(plan, ending="aborted")
        case "prediction.stuck_starting":
            return replace(plan, queue=None)
        case "prediction.stuck_processing":
            return replace(plan, run=None)
        case "prediction.unknown_status":
            return replace(plan, shown_status=str(params["status"]))
        case "prediction.fewer_outputs":
            return replace(plan, count=min(count, int(params["count"])))
        case "prediction.no_output":
            return replace(plan, count=0)
        case "prediction.slow":
            return replace(plan, run=run + float(params["seconds"]))
        case "prediction.data_removed":
            return replace(plan, wiped_at_end=True)
    return plan


async def _answer(
    request: web.Request, prediction: Prediction, wait: int | None
) -> tuple[int, JSON]:
    """Return status and body: at once, or at the end; one that waited never says processing."""
    base = answers.base_url(request)
    if wait is None:
        return 201, prediction.as_created(base)
    if await request.app[BOOK].wait(prediction, wait):
        moment = prediction.completed_at or prediction.created_at
        return 201, prediction.as_json(base, moment)
    return 202, prediction.as_created(base)


def _create_headers(
    request: web.Request, prediction: Prediction, wait: int | None
) -> dict[str, str]:
    base = answers.base_url(request)
    headers = {"Location": f"{base}/v1/predictions/{prediction.id}"}
    if wait is not None:
        headers["Preference-Applied"] = f"wait={wait}"
    return headers


async def _spoil_before(
    request: web.Request, strike: Strike | None
) -> web.Response | None:
    """Return the answer of a create that makes nothing, None when it shall go on."""
    if strike is None:
        return None
    match strike.name:
        case "create.dropped":
            return answers.drop_connection(request)
        case "create.throttled":
            return answers.throttled(int(strike.params["retry_after"]))
        case "create.unauthorized":
            return answers.unauthenticated()
        case "create.no_credit":
            return answers.no_credit()
        case "create.slow_before":
            await answers.pause(strike)
            return None
    return answers.spoilt(strike)


async def _spoil_after(
    request: web.Request, prediction: Prediction, strike: Strike
) -> web.StreamResponse:
    """Answer badly although the prediction was made."""
    if strike.name == "create.lost_response":
        return answers.drop_connection(request)
    body = orjson.dumps(prediction.as_created(answers.base_url(request)))
    if strike.name == "create.bad_json":
        half = body[: len(body) // 2]
        return web.Response(body=half, status=201, content_type="application/json")
    if strike.name == "create.truncated":
        return await answers.cut_short(
            request,
            body,
            sent=len(body) // 2,
            status=201,
            headers={"Content-Type": "application/json"},
        )
    return answers.spoilt(strike)


async def _read_body(request: web.Request, version_needed: bool) -> JSON:
    """Return the body, checked against Replicate's strict schema."""
    try:
        body = json.loads(await request.text())
    except ValueError as exc:
        raise Refusal(
            answers.problem(400, f"The request body is not valid JSON: {exc}")
        ) from exc
    if not isinstance(body, dict):
        text = "Invalid type. Expected: object"
        raise Refusal(answers.invalid([Complaint("invalid_type", "", text)]))
    complaints = list(_body_complaints(body, version_needed))
    if complaints:
        raise Refusal(answers.invalid(complaints))
    return body


def _body_complaints(body: JSON, version_needed: bool) -> Any:
    """Yield what is wrong with the top level of a create."""
    needed = {"version", "input"} if version_needed else {"input"}
    for key in sorted(needed - set(body)):
        yield Complaint("required", "", f"{key} is required")
    for key in sorted(set(body) - _KEYS - needed):
        text = f"Additional property {key} is not allowed"
        yield Complaint("additional_property_not_allowed", "", text)
    kinds = (
        ("version", str, "string"),
        ("input", dict, "object"),
        ("webhook", str, "string"),
        ("webhook_events_filter", list, "array"),
        ("stream", bool, "boolean"),
    )
    for key, kind, name in kinds:
        if body.get(key) is not None and not isinstance(body[key], kind):
            yield Complaint("invalid_type", key, f"Invalid type. Expected: {name}")
        elif key in needed and key in body and body[key] is None:
            yield Complaint(
                "invalid_type", key, f"Invalid type. Expected: {name}, given: null"
            )
    webhook = body.get("webhook")
    if isinstance(webhook, str) and not webhook.startswith(("http://", "https://")):
        yield Complaint("format", "webhook", "Does not match format 'uri'")
    events = body.get("webhook_events_filter")
    if isinstance(events, list) and set(map(str, events)) - set(EVENTS):
        text = "must be one of the following: " + ", ".join(
            json.dumps(e) for e in EVENTS
        )
        yield Complaint(
            "enum", "webhook_events_filter", f"webhook_events_filter {text}"
        )


def _cancel_after(header: str | None) -> float | None:
    """Read ``Cancel-After``: ``90``, ``90s``, ``5m``, ``1h30m45s``; 5 seconds to 24 hours.

    What Replicate answers to a bad value is not documented; the sandbox answers 422.
    """
    if header is None:
        return None
    match = _CANCEL_AFTER.fullmatch(header.strip())
    parts = (
        [int(part or 0) for part in match.groups()] if match and match.group() else []
    )
    seconds = sum(n * unit for n, unit in zip(parts, (3600, 60, 1), strict=False))
    if not _SHORTEST <= seconds <= _LONGEST:
        raise Refusal(
            answers.problem(
                422,
                "Cancel-After must be a duration between 5s and 24h, like 90, 90s or 1h30m",
                title="Invalid Cancel-After header",
            )
        )
    return float(seconds)


def _wait(header: str | None) -> int | None:
    """Read ``Prefer: wait`` (60 seconds) and ``wait=n`` (1 to 60); other preferences pass."""
    for preference in (header or "").replace(";", ",").split(","):
        name, equals, value = preference.strip().partition("=")
        if name.strip().lower() != "wait":
            continue
        if not equals:
            return _LONGEST_WAIT
        if value.strip().isdigit():
            return max(1, min(_LONGEST_WAIT, int(value)))
    return None
