"""What the service says about itself, and what it does around every request."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openapi_spec_validator
import pytest

from app.models import schemas
from sandbox.runner import Sandbox
from tests.api.conftest import Serve, emptied
from tests.api.served import Api, check_problem

PROMPT = "a mill by the river"
PAGE = "https://gallery.example"


@pytest.fixture
async def api(shared: Api, shared_sandbox: Sandbox) -> Api:
    return await emptied(shared, shared_sandbox)


async def document(api: Api) -> dict[str, Any]:
    return dict((await api.client.get("/openapi.json")).json())


# ---------------------------------------------------------------------------- OpenAPI


async def test_the_document_is_valid_and_complete_in_itself(api: Api) -> None:
    found = await document(api)

    openapi_spec_validator.validate(found)
    known = set(found["components"]["schemas"])
    used = set(re.findall(r'"#/([^"]+)"', json.dumps(found)))
    assert used == {f"components/schemas/{name}" for name in known}


async def test_every_route_is_described(api: Api) -> None:
    found = await document(api)

    for path, route in found["paths"].items():
        for method, operation in route.items():
            name = f"{method} {path}"
            assert operation["tags"], name
            assert operation["summary"] and operation["description"], name
            answers = operation["responses"]
            assert any(code.startswith("2") for code in answers), name
            assert all(answer["description"] for answer in answers.values()), name
            for code, answer in answers.items():
                if code.startswith(("4", "5")) and "/health" not in path:
                    assert set(answer["content"]) == {"application/problem+json"}, name
    assert set(found["paths"]) == {
        *("/api/v1/generate", "/api/v1/status/{job_id}", "/api/v1/jobs"),
        *("/api/v1/jobs/{job_id}/cancel", "/api/v1/jobs/{job_id}/retry"),
        *("/api/v1/jobs/{job_id}", "/api/v1/models", "/api/v1/health"),
        *("/api/v1/health/live", "/api/v1/health/ready", "/metrics"),
        *("/media/{key}", "/api/v1/callbacks/replicate/{attempt_id}"),
        *("/api/v1/keys", "/api/v1/keys/{key_id}", "/api/v1/audit"),
        "/api/v1/usage",
        *("/api/v1/uploads", "/api/v1/uploads/{upload_id}"),
    }


async def test_an_operation_has_a_name_of_its_own(api: Api) -> None:
    found = await document(api)

    ids = [
        one["operationId"]
        for route in found["paths"].values()
        for one in route.values()
    ]
    assert len(ids) == len(set(ids))


async def test_examples_work_as_printed(api: Api) -> None:
    examples = (await document(api))["components"]["schemas"]["GenerateRequest"][
        "examples"
    ]

    assert len(examples) >= 2
    for example in examples:
        answer = await api.client.post("/api/v1/generate", json=example)
        assert answer.status_code == 202, answer.text
        assert answer.json()["prompt"] == example["prompt"]


async def test_the_example_of_a_problem_is_one() -> None:
    (example,) = schemas.Problem.model_json_schema()["examples"]

    schemas.Problem.model_validate(example)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_documentation_is_served(api: Api, path: str) -> None:
    answer = await api.client.get(path)

    assert answer.status_code == 200
    assert "/openapi.json" in answer.text


async def test_a_program_is_led_to_the_documentation(api: Api) -> None:
    answer = await api.client.get("/")

    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")


async def test_static_files_are_served(api: Api) -> None:
    answer = await api.client.get("/static/robots.txt")
    missing = await api.client.get("/static/nothing.txt")
    outside = await api.client.get("/static/%2e%2e/main.py")

    assert answer.status_code == 200
    assert missing.status_code == outside.status_code == 404
    assert check_problem(missing).code == "not_found"


async def test_the_name_and_the_prefix_come_from_settings(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox, api_v1_prefix="/pictures", project_name="Atelier")

    answer = await api.client.post("/pictures/generate", json={"prompt": PROMPT})

    assert answer.status_code == 202
    assert answer.headers["location"].startswith("/pictures/status/")
    assert (await api.client.get(answer.headers["location"])).status_code == 200
    assert (await document(api))["info"]["title"] == "Atelier"
    assert (await api.client.get("/api/v1/jobs")).status_code == 404


# ------------------------------------------------------------------------------- CORS


async def preflight(api: Api, origin: str, method: str = "POST") -> httpx.Response:
    return await api.client.options(
        "/api/v1/generate",
        headers={
            "origin": origin,
            "access-control-request-method": method,
            "access-control-request-headers": "content-type,x-request-id",
        },
    )


async def test_listed_pages_may_call(serve: Serve, sandbox: Sandbox) -> None:
    api: Api = await serve(sandbox, cors_origins=(PAGE,))

    assert (await preflight(api, PAGE)).status_code == 200
    answer = await api.client.post(
        "/api/v1/generate", json={"prompt": PROMPT}, headers={"origin": PAGE}
    )
    refused = await api.client.post(
        "/api/v1/generate", json={"prompt": ""}, headers={"origin": PAGE}
    )

    for one in (answer, refused):
        assert one.headers["access-control-allow-origin"] == PAGE
    exposed = answer.headers["access-control-expose-headers"].lower()
    for name in ("etag", "location", "retry-after", "x-request-id"):
        assert name in exposed


async def test_a_body_over_the_limit_can_be_read_by_a_listed_page(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox, cors_origins=(PAGE,))

    answer = await api.client.post(
        "/api/v1/generate", content=b"x" * 300_000, headers={"origin": PAGE}
    )

    assert answer.status_code == 413
    assert answer.headers["access-control-allow-origin"] == PAGE


async def test_other_pages_may_not(serve: Serve, sandbox: Sandbox) -> None:
    api: Api = await serve(sandbox, cors_origins=(PAGE,))

    async with httpx.AsyncClient(base_url=api.origin) as client:
        answer = await client.get(
            "/api/v1/jobs", headers={"origin": "https://evil.example"}
        )

    assert "access-control-allow-origin" not in answer.headers


async def test_without_the_setting_no_page_may(api: Api) -> None:
    answer = await api.client.get("/api/v1/jobs", headers={"origin": PAGE})

    assert "access-control-allow-origin" not in answer.headers


# ------------------------------------------------------------------- request id, crash


@pytest.mark.parametrize("given", ["abc", "A-z_0:9.x", "x" * 128])
async def test_a_request_id_comes_back(api: Api, given: str) -> None:
    for path in ("/api/v1/jobs", "/api/v1/jobs?limit=0", "/nothing"):
        answer = await api.client.get(path, headers={"x-request-id": given})
        assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize(
    "given", ["", "x" * 129, "a b", 'a"b', "<script>", "a;b", "ü", "{}", "a/b"]
)
async def test_a_harmful_request_id_is_replaced(api: Api, given: str) -> None:
    answer = await api.client.get(
        "/api/v1/jobs?limit=0", headers={"x-request-id": given.encode()}
    )

    (ours,) = answer.headers.get_list("x-request-id")
    assert re.fullmatch("[0-9a-f]{32}", ours)


async def test_every_request_has_an_id_of_its_own(api: Api) -> None:
    ids = {
        (await api.client.get("/api/v1/health/live")).headers["x-request-id"]
        for _ in range(5)
    }

    assert len(ids) == 5


async def test_a_crash_is_a_problem_that_tells_nothing(api: Api) -> None:
    async def crash() -> None:
        raise RuntimeError("SELECT password FROM users")

    api.app.add_api_route("/crash", crash, include_in_schema=False)

    answer = await api.client.get("/crash", headers={"x-request-id": "find-me"})

    assert answer.status_code == 500
    problem = check_problem(answer)
    assert (problem.code, problem.request_id) == ("internal_error", "find-me")
    assert "password" not in answer.text
    assert api.settings.log_dir is not None
    assert "find-me" in (api.settings.log_dir / "api.log").read_text()


# ------------------------------------------------------------------------------- logs


async def test_what_happened_is_in_the_log_with_its_request(
    api: Api, worker: None
) -> None:
    answer = await api.client.post(
        "/api/v1/generate", json={"prompt": PROMPT}, headers={"x-request-id": "mine"}
    )
    await api.finished(schemas.Job.model_validate_json(answer.content).job_id)
    await api.listed(q="mill by the")

    assert api.settings.log_dir is not None
    text = (api.settings.log_dir / "api.log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    events = [line["event"] for line in lines]
    assert "api.ready" in events
    assert any("POST /api/v1/generate" in event for event in events)
    assert any(line.get("request_id") == "mine" for line in lines)
    # That nothing private is in it, every test here checks at its end.


async def test_slow_and_failed_statements_are_in_the_log_of_the_database(
    api: Api,
) -> None:
    runtime = api.app.state.runtime
    async with runtime.database.connect() as conn:
        await conn.exec_driver_sql("SELECT pg_sleep(0.3)")
    with pytest.raises(Exception, match="no_such_table"):
        async with runtime.database.connect() as conn:
            await conn.exec_driver_sql("SELECT * FROM no_such_table")
    await api.listed()

    assert api.settings.log_dir is not None
    text = (api.settings.log_dir / "database.log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    slow, failed = [
        line for line in lines if re.search("pg_sleep|no_such", line["statement"])
    ]
    assert (slow["event"], slow["level"]) == ("statement.slow", "warning")
    assert slow["seconds"] >= 0.3 and "pg_sleep" in slow["statement"]
    assert (failed["event"], failed["level"]) == ("statement.failed", "error")
    assert failed["sqlstate"] == "42P01" and "no_such_table" in failed["statement"]


async def test_without_a_folder_no_file_is_written(
    serve: Serve, sandbox: Sandbox
) -> None:
    api: Api = await serve(sandbox, log_dir="")

    await api.generate(PROMPT)

    assert api.settings.log_dir is None
    assert not (api.settings.storage_path.parent / "logs").exists()


@pytest.mark.parametrize(
    "scheme", ["postgresql", "postgres", "postgresql+asyncpg", "postgresql+psycopg"]
)
async def test_any_form_of_the_database_url_works(
    serve: Serve, sandbox: Sandbox, database_url: str, scheme: str
) -> None:
    url = database_url.replace("postgresql", scheme, 1)

    api: Api = await serve(sandbox, database_url=url)

    assert (await api.generate(PROMPT)).status == "pending"
