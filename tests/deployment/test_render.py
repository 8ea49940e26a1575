"""render.yaml: valid fields, references that resolve, and what our design demands of it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from app.core.config import Settings
from tests.deployment.render_schema import BLUEPRINT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def blueprint() -> Any:
    return yaml.safe_load((ROOT / "render.yaml").read_text())


def service(blueprint: Any, kind: str) -> Any:
    (found,) = [one for one in blueprint["services"] if one["type"] == kind]
    return found


def variables(blueprint: Any, kind: str) -> dict[str, Any]:
    """All variables of a service by name, those of its groups included."""
    groups = {group["name"]: group["envVars"] for group in blueprint["envVarGroups"]}
    known: dict[str, Any] = {}
    for entry in service(blueprint, kind)["envVars"]:
        for one in groups[entry["fromGroup"]] if "fromGroup" in entry else [entry]:
            assert one["key"] not in known
            known[one["key"]] = one
    return known


def test_it_uses_documented_fields_only(blueprint: Any) -> None:
    jsonschema.Draft202012Validator(BLUEPRINT).validate(blueprint)


def test_every_reference_resolves(blueprint: Any) -> None:
    services = {(one["type"], one["name"]): one for one in blueprint["services"]}
    databases = {one["name"] for one in blueprint["databases"]}
    groups = {one["name"] for one in blueprint["envVarGroups"]}
    assert len(services) == len(blueprint["services"])
    for kind in ("web", "worker"):
        for entry in service(blueprint, kind)["envVars"]:
            if "fromDatabase" in entry:
                assert entry["fromDatabase"]["name"] in databases
            if "fromGroup" in entry:
                assert entry["fromGroup"] in groups
            if "fromService" in entry:
                source = entry["fromService"]
                target = services[source["type"], source["name"]]
                if "envVarKey" in source:
                    keys = {one.get("key") for one in target["envVars"]}
                    assert source["envVarKey"] in keys


def test_both_roles_get_the_same_settings(blueprint: Any) -> None:
    web, worker = variables(blueprint, "web"), variables(blueprint, "worker")
    # The worker answers nobody, and has no use for what opens doors.
    assert set(web) - set(worker) == {
        *("PORT", "FORWARDED_ALLOW_IPS", "ADMIN_API_KEY", "METRICS_TOKEN")
    }
    assert set(worker) <= set(web)
    required = {"DATABASE_URL", "REDIS_URL", "REPLICATE_API_TOKEN", "STORAGE_URL"}
    assert required <= set(worker)
    known = {name.upper() for name in Settings.model_fields}
    assert {name for name in worker if not name.startswith("AWS_")} <= known


def test_secrets_are_asked_for_and_never_written_down(blueprint: Any) -> None:
    web = variables(blueprint, "web")
    for name in ("REPLICATE_API_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert web[name] == {"key": name, "sync": False}


def test_callers_need_a_key_and_the_first_one_is_made_by_render(blueprint: Any) -> None:
    web, worker = variables(blueprint, "web"), variables(blueprint, "worker")
    assert web["AUTH_REQUIRED"]["value"] == "true"
    for name in ("ADMIN_API_KEY", "METRICS_TOKEN", "MEDIA_SIGNING_KEYS"):
        assert web[name] == {"key": name, "generateValue": True}
    assert worker["MEDIA_SIGNING_KEYS"]["fromService"]["name"] == "mediagen-api"


def test_pictures_never_go_to_a_disk_of_one_service(blueprint: Any) -> None:
    for kind in ("web", "worker"):
        assert "disk" not in service(blueprint, kind)
        assert "STORAGE_PATH" not in variables(blueprint, kind)


def test_the_roles_run_what_the_documents_prescribe(blueprint: Any) -> None:
    web, worker = service(blueprint, "web"), service(blueprint, "worker")
    assert web["preDeployCommand"] == "alembic upgrade head"
    assert web["healthCheckPath"] == "/api/v1/health/ready"
    prescribed = "celery -A worker.celery_app worker --loglevel=info"
    assert worker["dockerCommand"] == prescribed
    assert (ROOT / web["dockerfilePath"]).is_file()


async def client_of(trusted: str, peer: str, forwarded: str) -> str:
    """Say whose request the API takes it for."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["client"][0])

    scope = {
        "type": "http",
        "client": (peer, 4711),
        "headers": [(b"x-forwarded-for", forwarded.encode())],
    }
    await ProxyHeadersMiddleware(app, trusted)(scope, None, None)  # type: ignore[arg-type]
    return seen[0]


@pytest.mark.parametrize("edge", ["104.22.17.40", "162.158.1.2", "2606:4700::6810:1"])
async def test_a_clients_address_is_what_the_proxies_say(
    blueprint: Any, edge: str
) -> None:
    trusted = variables(blueprint, "web")["FORWARDED_ALLOW_IPS"]["value"]
    for network in trusted.split(","):
        ipaddress.ip_network(network)

    for said in ("", "192.0.2.1, ", "192.0.2.1, 10.0.0.1, ", "104.16.0.1, "):
        chain = f"{said}198.51.100.7, {edge}"
        assert await client_of(trusted, "10.21.157.68", chain) == "198.51.100.7"
    # Whoever comes another way is not believed.
    assert await client_of(trusted, "203.0.113.9", "192.0.2.1") == "203.0.113.9"


def test_a_full_broker_refuses_instead_of_forgetting(blueprint: Any) -> None:
    bell = service(blueprint, "keyvalue")
    assert bell["maxmemoryPolicy"] == "noeviction"
    assert bell["ipAllowList"] == []
