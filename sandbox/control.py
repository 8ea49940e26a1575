"""The sandbox's own routes, outside /v1 and without a token: faults, figures, reset."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from sandbox import answers
from sandbox.create import BOOK, FAULTS
from sandbox.faults import FAULTS as KINDS
from sandbox.faults import BadRule
from sandbox.gallery import GALLERY
from sandbox.purchases import fingerprint
from sandbox.uploads import SHELF
from sandbox.webhooks import Courier

COURIER: web.AppKey[Courier] = web.AppKey("courier", Courier)
_YES = ("1", "true", "yes")

routes = web.RouteTableDef()


@routes.get("/")
async def welcome(request: web.Request) -> web.Response:
    """Say what this is."""
    return answers.reply(
        {
            "what": "a sandbox: a local Replicate. Its pictures come from no real model.",
            "api": f"{answers.base_url(request)}/v1",
            "control": ["/sandbox/stats", "/sandbox/faults", "/sandbox/reset"],
        }
    )


@routes.get("/sandbox/health")
async def health(request: web.Request) -> web.Response:
    """Say that the sandbox is up."""
    return answers.reply({"status": "ok"})


@routes.get("/sandbox/faults")
async def get_faults(request: web.Request) -> web.Response:
    """Answer the rules in force, and every fault there is with its parameters."""
    known = {
        name: {"point": kind.point, "does": kind.promise, "params": dict(kind.defaults)}
        for name, kind in KINDS.items()
    }
    return answers.reply({"rules": request.app[FAULTS].rules(), "known": known})


@routes.put("/sandbox/faults")
async def put_faults(request: web.Request) -> web.Response:
    """Put these rules in force instead of all others."""
    try:
        body = await request.json()
        rules = body["rules"] if isinstance(body, dict) and "rules" in body else body
        request.app[FAULTS].replace(rules if isinstance(rules, list) else [rules])
    except (BadRule, ValueError, TypeError) as exc:
        return answers.problem(422, str(exc), title="Bad fault rule")
    return answers.reply({"rules": request.app[FAULTS].rules()})


@routes.post("/sandbox/faults")
async def post_fault(request: web.Request) -> web.Response:
    """Put one more rule in force."""
    try:
        rule = request.app[FAULTS].add(await request.json())
    except (BadRule, ValueError, TypeError) as exc:
        return answers.problem(422, str(exc), title="Bad fault rule")
    return answers.reply(rule, 201)


@routes.delete("/sandbox/faults")
async def delete_faults(request: web.Request) -> web.Response:
    """Take all rules out of force."""
    request.app[FAULTS].clear()
    return web.Response(status=204)


@routes.delete(r"/sandbox/faults/{number:\d+}")
async def delete_fault(request: web.Request) -> web.Response:
    """Take one rule out of force."""
    if not request.app[FAULTS].remove(int(request.match_info["number"])):
        return answers.not_found()
    return web.Response(status=204)


@routes.get("/sandbox/stats")
async def stats(request: web.Request) -> web.Response:
    """Answer the figures: purchases above all.

    ``?full=1`` adds every prediction; ``?brief=1`` leaves out the counts by input and webhook.
    """
    book = request.app[BOOK]
    purchases = book.purchases
    counts = dict(book.status_counts())
    body: dict[str, Any] = {
        "purchases": purchases.total,
        "purchases_repeated": purchases.repeated(),
        "by_status": counts,
        "running": counts.get("starting", 0) + counts.get("processing", 0),
        "webhooks": dict(request.app[COURIER].outcomes),
    }
    if request.query.get("brief") not in _YES:
        body["purchases_by_input"] = dict(purchases.by_input)
        body["purchases_by_webhook"] = dict(purchases.by_webhook)
    if request.query.get("full") in _YES:
        now = time.time()
        base = answers.base_url(request)
        body["predictions"] = [
            {
                **prediction.as_json(base, now),
                "webhook": prediction.webhook,
                "input_hash": fingerprint(prediction.model.ref, prediction.given),
                "seed": prediction.seed,
            }
            for prediction in book
        ]
    return answers.reply(body)


@routes.post("/sandbox/reset")
async def reset(request: web.Request) -> web.Response:
    """Forget predictions, uploads, faults, figures and webhooks under way."""
    request.app[BOOK].reset()
    request.app[FAULTS].clear()
    request.app[COURIER].drop_all()
    request.app[SHELF].clear()
    request.app[GALLERY].clear()
    return web.Response(status=204)
