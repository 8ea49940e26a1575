"""What does not change: models, versions, deployments, hardware, account, webhook secret."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from sandbox import answers
from sandbox.catalogue import Model
from sandbox.create import CATALOGUE

JSON = dict[str, Any]
CREATED_AT = "2026-01-01T00:00:00.000Z"
#: Price and name list of replicate.com/pricing, 2026.
HARDWARE = (
    ("CPU", "cpu"),
    ("Nvidia T4 GPU", "gpu-t4"),
    ("Nvidia L40S GPU", "gpu-l40s"),
    ("2x Nvidia L40S GPU", "gpu-2x-l40s"),
    ("Nvidia A100 (80GB) GPU", "gpu-a100-large"),
    ("2x Nvidia A100 (80GB) GPU", "gpu-2x-a100-large"),
    ("Nvidia H100 GPU", "gpu-h100"),
)

routes = web.RouteTableDef()


@routes.get("/v1/account")
async def account(request: web.Request) -> web.Response:
    """Answer who the token belongs to: nobody real."""
    return answers.reply(
        {
            "type": "user",
            "username": "sandbox",
            "name": "Sandbox (a local Replicate)",
            "github_url": None,
            "avatar_url": None,
        }
    )


@routes.get("/v1/hardware")
async def hardware(request: web.Request) -> web.Response:
    """Answer the bare array of hardware."""
    return answers.reply([{"name": name, "sku": sku} for name, sku in HARDWARE])


@routes.get("/v1/webhooks/default/secret")
async def webhook_secret(request: web.Request) -> web.Response:
    """Answer the secret that webhooks are signed with."""
    return answers.reply({"key": request.app[answers.CONFIG].webhook_secret})


@routes.get("/v1/models")
async def list_models(request: web.Request) -> web.Response:
    """Answer all models on one page."""
    base = answers.base_url(request)
    results = [_model_json(model, base) for model in request.app[CATALOGUE]]
    return answers.reply({"previous": None, "next": None, "results": results})


@routes.get("/v1/models/{owner}/{name}")
async def get_model(request: web.Request) -> web.Response:
    """Answer one model with its latest version inside."""
    model = _asked(request)
    if model is None:
        return answers.not_found()
    return answers.reply(_model_json(model, answers.base_url(request)))


@routes.get("/v1/models/{owner}/{name}/versions")
async def list_versions(request: web.Request) -> web.Response:
    """Answer the one version there is."""
    model = _asked(request)
    if model is None:
        return answers.not_found()
    return answers.reply(
        {"previous": None, "next": None, "results": [_version_json(model)]}
    )


@routes.get("/v1/models/{owner}/{name}/versions/{version}")
async def get_version(request: web.Request) -> web.Response:
    """Answer a version with its schema."""
    model = _asked(request)
    if model is None or model.version != request.match_info["version"]:
        return answers.not_found()
    return answers.reply(_version_json(model))


@routes.get("/v1/deployments")
async def list_deployments(request: web.Request) -> web.Response:
    """Answer one deployment for each model, owned by ``sandbox``."""
    results = [_deployment_json(model) for model in request.app[CATALOGUE]]
    return answers.reply({"previous": None, "next": None, "results": results})


@routes.get("/v1/deployments/{owner}/{name}")
async def get_deployment(request: web.Request) -> web.Response:
    """Answer one deployment."""
    model = request.app[CATALOGUE].named(request.match_info["name"])
    if model is None or request.match_info["owner"] != "sandbox":
        return answers.not_found()
    return answers.reply(_deployment_json(model))


def _asked(request: web.Request) -> Model | None:
    return request.app[CATALOGUE].find(
        f"{request.match_info['owner']}/{request.match_info['name']}"
    )


def _model_json(model: Model, base_url: str) -> JSON:
    return {
        "url": f"{base_url}/{model.ref}",
        "owner": model.owner,
        "name": model.name,
        "description": model.description,
        "visibility": "public",
        "is_official": model.official,
        "github_url": None,
        "paper_url": None,
        "license_url": None,
        "run_count": 0,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": _version_json(model),
        "sandbox": True,
    }


def _version_json(model: Model) -> JSON:
    return {
        "id": model.version,
        "created_at": CREATED_AT,
        "cog_version": "0.16.0",
        "openapi_schema": model.openapi_schema,
    }


def _deployment_json(model: Model) -> JSON:
    return {
        "owner": "sandbox",
        "name": model.name,
        "current_release": {
            "number": 1,
            "model": model.ref,
            "version": model.version,
            "created_at": CREATED_AT,
            "created_by": {
                "type": "user",
                "username": "sandbox",
                "name": "Sandbox (a local Replicate)",
                "github_url": None,
                "avatar_url": None,
            },
            "configuration": {
                "hardware": model.hardware,
                "min_instances": 0,
                "max_instances": 1,
            },
        },
    }
