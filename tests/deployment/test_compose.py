"""docker-compose.yml: valid, and made for .env.example and the Dockerfile."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml
from dotenv import dotenv_values

from app.core.config import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_it_follows_the_compose_specification(compose: Any) -> None:
    # check-jsonschema carries the schema of github.com/compose-spec/compose-spec.
    vendored = resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((vendored / "compose-spec.json").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(compose)


def test_by_default_only_the_infrastructure_starts(compose: Any) -> None:
    services = compose["services"]
    assert {name for name, one in services.items() if not one.get("profiles")} == {
        "postgres",
        "redis",
    }
    in_app = {
        name for name, one in services.items() if "app" in one.get("profiles", [])
    }
    assert in_app == {"migrate", "api", "worker"}


def test_the_infrastructure_is_where_the_example_settings_look_for_it(
    compose: Any,
) -> None:
    example = dotenv_values(ROOT / ".env.example")
    database = urlsplit(example["DATABASE_URL"] or "")
    postgres = compose["services"]["postgres"]
    assert f"127.0.0.1:{database.port}:5432" in postgres["ports"]
    assert postgres["environment"] == {
        "POSTGRES_USER": database.username,
        "POSTGRES_PASSWORD": database.password,
        "POSTGRES_DB": database.path.removeprefix("/"),
    }
    broker = urlsplit(example["REDIS_URL"] or "")
    assert f"127.0.0.1:{broker.port}:6379" in compose["services"]["redis"]["ports"]


def test_every_service_is_pinned_and_what_others_wait_for_has_a_health_check(
    compose: Any,
) -> None:
    for name, service in compose["services"].items():
        tag = service["image"].partition(":")[2]
        assert tag and tag != "latest", name
        for other, wanted in service.get("depends_on", {}).items():
            target = compose["services"][other]
            if wanted["condition"] == "service_healthy":
                assert target["healthcheck"]["test"], other
            assert set(target.get("profiles", [])) <= set(service["profiles"]), other


def test_both_roles_share_settings_and_the_pictures(compose: Any) -> None:
    api, worker = compose["services"]["api"], compose["services"]["worker"]
    assert api["environment"] == worker["environment"]
    assert api["volumes"] == worker["volumes"] == ["media:/data/media"]
    assert set(api["environment"]) <= {name.upper() for name in Settings.model_fields}
    named = {
        volume.partition(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
    }
    assert named == set(compose["volumes"])
    assert " ".join(worker["command"]) == (
        "celery -A worker.celery_app worker --loglevel=info"
    )


def test_without_a_key_the_api_is_reached_from_this_machine_only(compose: Any) -> None:
    api = compose["services"]["api"]
    assert api["environment"]["AUTH_REQUIRED"] == "${AUTH_REQUIRED:-false}"
    assert all(port.startswith("127.0.0.1:") for port in api["ports"])
    # What is set in .env reaches the containers.
    for name in ("ADMIN_API_KEY", "METRICS_TOKEN", "MEDIA_SIGNING_KEYS"):
        assert api["environment"][name] == f"${{{name}:-}}"


def test_a_full_broker_refuses_instead_of_forgetting(compose: Any) -> None:
    command = compose["services"]["redis"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
