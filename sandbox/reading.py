"""Reading and cancelling predictions: get, list, cancel."""

from __future__ import annotations

import base64
import binascii
import time
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

import orjson
from aiohttp import web

from sandbox import answers
from sandbox.create import BOOK, FAULTS
from sandbox.faults import Strike, Subject
from sandbox.prediction import Prediction

routes = web.RouteTableDef()


@routes.get("/v1/predictions/{id}")
async def get_prediction(request: web.Request) -> web.StreamResponse:
    """Answer one prediction."""
    prediction = request.app[BOOK].find(request.match_info["id"])
    if prediction is None:
        return answers.not_found()
    subject = Subject(
        prompt=prediction.prompt,
        model=prediction.model.ref,
        prediction_id=prediction.id,
        webhook=prediction.webhook or "",
    )
    strike = request.app[FAULTS].strike("get", subject)
    if strike is not None and strike.name == "get.not_found":
        return answers.not_found()
    spoilt, age = await _spoil(request, strike)
    return spoilt or answers.reply(_shown(request, prediction, time.time() - age))


@routes.post("/v1/predictions/{id}/cancel")
async def cancel_prediction(request: web.Request) -> web.StreamResponse:
    """Cancel; one that has ended is answered unchanged."""
    prediction = request.app[BOOK].find(request.match_info["id"])
    if prediction is None:
        return answers.not_found()
    request.app[BOOK].cancel(prediction)
    return answers.reply(_shown(request, prediction, time.time()))


@routes.get("/v1/predictions")
async def list_predictions(request: web.Request) -> web.StreamResponse:
    """Answer a page of 100, newest first, with absolute cursor addresses.

    ``created_after`` is inclusive, ``created_before`` exclusive (replicate.com/docs/reference/http,
    2026-06).  ``source=web`` finds nothing here: all predictions come from the API.
    """
    strike = request.app[FAULTS].strike("list", Subject())
    spoilt, age = await _spoil(request, strike)
    if spoilt is not None:
        return spoilt
    try:
        asked = _read_query(request)
    except ValueError as exc:
        return answers.problem(400, str(exc), title="Bad request")
    moment = time.time() - age
    if age:
        asked["until"] = min(asked.get("until") or moment, moment)
    if request.query.get("source") == "web":
        return answers.reply({"previous": None, "next": None, "results": []})
    found, newer, older = request.app[BOOK].page(**asked)
    body = {
        "previous": (
            _link(request, "after", found[0].number) if newer and found else None
        ),
        "next": _link(request, "before", found[-1].number) if older and found else None,
        "results": [_shown(request, prediction, moment) for prediction in found],
    }
    return answers.reply(body)


def _shown(
    request: web.Request, prediction: Prediction, moment: float
) -> dict[str, Any]:
    """Return the object as a reader sees it.

    Whether GET and LIST show ``webhook`` is not documented, so they do not unless asked to.
    """
    shown = prediction.as_json(answers.base_url(request), moment)
    if request.app[answers.CONFIG].echo_webhook and prediction.webhook is not None:
        shown["webhook"] = prediction.webhook
        shown["webhook_events_filter"] = list(prediction.events)
    return shown


async def _spoil(
    request: web.Request, strike: Strike | None
) -> tuple[web.StreamResponse | None, float]:
    """Return a spoilt answer, or None and how old the truth shall be in seconds."""
    if strike is None:
        return None, 0.0
    effect = strike.name.partition(".")[2]
    if effect == "dropped":
        return answers.drop_connection(request), 0.0
    if effect == "stale":
        return None, float(strike.params["seconds"])
    if effect == "slow":
        await answers.pause(strike)
        return None, 0.0
    return answers.spoilt(strike), 0.0


def _read_query(request: web.Request) -> dict[str, Any]:
    """Return what a list request asks for; ValueError says what is wrong."""
    query = request.query
    asked: dict[str, Any] = {
        "since": _moment(query, "created_after"),
        "until": _moment(query, "created_before"),
    }
    if "cursor" in query:
        try:
            word, number = orjson.loads(base64.urlsafe_b64decode(query["cursor"]))
            if word not in ("before", "after"):
                raise ValueError(word)
            asked[word] = int(number)
        except (binascii.Error, TypeError, ValueError) as exc:
            raise ValueError("Invalid cursor") from exc
    return asked


def _moment(query: Any, name: str) -> float | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        # A plus sign that was not escaped arrives as a space.
        moment = datetime.fromisoformat(text.replace(" ", "+"))
    except ValueError as exc:
        raise ValueError(f"{name} must be an ISO 8601 time") from exc
    if moment.tzinfo is None:
        raise ValueError(f"{name} must have a time zone")
    return round(moment.timestamp(), 6)


def _link(request: web.Request, word: str, number: int) -> str:
    """Return the address of a neighbouring page, filters kept."""
    cursor = base64.urlsafe_b64encode(orjson.dumps([word, number])).decode()
    kept = {key: value for key, value in request.query.items() if key != "cursor"}
    return f"{answers.base_url(request)}/v1/predictions?{urlencode({**kept, 'cursor': cursor})}"
