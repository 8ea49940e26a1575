"""Processes die, brokers forget, databases restart: what was accepted completes, bought once."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from app.embedded import Postgres, Valkey
from tests.support.servers import FAST_AND_LOOSE, ROOT, migrate
from tests.support.stack import Stack
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

Env = Callable[..., dict[str, str]]

SCHNELL = "black-forest-labs/flux-schnell"
MODELS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    SCHNELL: {
        "num_outputs": (1, 2, 3, 4),
        "aspect_ratio": ("1:1", "16:9", "9:16"),
        "output_format": ("webp", "png", "jpg"),
    },
    "black-forest-labs/flux-dev": {
        "num_outputs": (1, 4),
        "aspect_ratio": ("3:2", "21:9"),
        "output_format": ("webp", "png"),
    },
    "stability-ai/sdxl": {
        "num_outputs": (1, 2),
        "width": (512, 1024),
        "height": (512, 768),
    },
    "black-forest-labs/flux-1.1-pro": {
        "width": (512, 1024),
        "height": (768,),
        "output_format": ("webp", "png", "jpg"),
    },
    "stability-ai/stable-diffusion-3.5-large": {
        "aspect_ratio": ("1:1", "2:3"),
        "output_format": ("webp", "png", "jpg"),
    },
}


def mixed_requests(count: int) -> Iterator[dict[str, Any]]:
    """Give requests of every model in turn, with ever other options."""
    options = {
        name: itertools.cycle(
            [
                dict(zip(fields, values, strict=True))
                for values in itertools.product(*fields.values())
            ]
        )
        for name, fields in MODELS.items()
    }
    for number, name in zip(range(count), itertools.cycle(MODELS), strict=False):
        yield {"prompt": f"picture {number}", "model": name, **next(options[name])}


def check_bought_once(stack: Stack, jobs: Sequence[Mapping[str, Any]]) -> None:
    """See that each job completed, whole, with one attempt and one purchase."""
    assert Counter(job["status"] for job in jobs) == {"completed": len(jobs)}, [
        job["error"] for job in jobs if job["error"]
    ]
    assert Counter(job["attempts"] for job in jobs) == {1: len(jobs)}
    bought = stack.purchases()
    assert bought["purchases"] == len(jobs)
    assert bought["purchases_repeated"] == 0
    for job in jobs:
        assert len(job["outputs"]) == job["num_outputs"]
        stack.check_files(job)


def wait_for_stages(stack: Stack, ids: Sequence[str], count: int, *stages: str) -> None:
    """Wait until so many of the jobs are in one of the stages."""
    wait_for(
        lambda: sum(job["stage"] in stages for job in stack.jobs(ids)) >= count,
        within=20,
        what=f"{count} jobs are {stages}",
    )


def test_two_hundred_mixed_jobs_complete_bought_once(
    tmp_path: Path, child_env: Env
) -> None:
    with Stack(tmp_path, child_env, sandbox=("--speed", "10")) as stack:
        ids = [stack.submit(**request) for request in mixed_requests(200)]
        check_bought_once(stack, stack.finish(ids, within=60))


def test_a_killed_worker_loses_nothing(tmp_path: Path, child_env: Env) -> None:
    with Stack(tmp_path, child_env) as stack:
        ids = [stack.submit(prompt=f"fox {n}") for n in range(20)]
        wait_for_stages(stack, ids, 10, "generating")
        stack.worker.kill()
        stack.worker.start()
        check_bought_once(stack, stack.finish(ids, within=60))


def test_a_worker_killed_while_it_buys_buys_nothing_again(
    tmp_path: Path, child_env: Env
) -> None:
    """Between the request and the saved handle: nobody knows, so the list is asked."""
    with Stack(tmp_path, child_env) as stack:
        stack.trouble({"fault": "create.slow_after", "params": {"seconds": 20}})
        ids = [stack.submit(prompt=f"owl {n}") for n in range(8)]
        wait_for(
            lambda: stack.purchases()["purchases"] == 8,
            within=20,
            what="all are bought",
        )
        stack.worker.kill()
        stack.heal()
        stack.worker.start()
        check_bought_once(stack, stack.finish(ids, within=60))


def test_lost_answers_to_purchases_are_adopted(tmp_path: Path, child_env: Env) -> None:
    with Stack(tmp_path, child_env) as stack:
        stack.trouble(
            {"fault": "create.lost_response", "times": 5},
            {"fault": "create.error_after", "times": 5},
            {"fault": "create.bad_json", "times": 5},
        )
        ids = [stack.submit(prompt=f"heron {n}") for n in range(20)]
        check_bought_once(stack, stack.finish(ids, within=60))
        told = 'mgs_orphans_adopted_total{by="list"} 15.0'
        # The worker's counts come once a second.
        wait_for(
            lambda: told in stack.client.get("/metrics").text,
            within=10,
            what="all adoptions are counted",
        )


def test_a_wiped_broker_loses_nothing(
    tmp_path: Path, child_env: Env, redis_url: str
) -> None:
    with Stack(tmp_path, child_env) as stack, redis.from_url(redis_url) as broker:
        ids = [stack.submit(prompt=f"crane {n}") for n in range(10)]
        broker.flushall()
        ids += [stack.submit(prompt=f"stork {n}") for n in range(10)]
        broker.flushall()
        check_bought_once(stack, stack.finish(ids, within=60))


def test_a_broker_that_dies_and_returns_only_costs_time(
    tmp_path: Path, child_env: Env
) -> None:
    with Valkey(tmp_path / "valkey") as broker:
        url = broker.url

        def env(**changes: str) -> dict[str, str]:
            return child_env(REDIS_URL=url, **changes)

        with Stack(tmp_path, env) as stack:
            broker.kill()
            began = time.monotonic()
            ids = [stack.submit(prompt=f"wren {n}") for n in range(5)]
            took = (time.monotonic() - began) / len(ids)
            check_bought_once(stack, stack.finish(ids, within=60))
            broker.start()
            stack.wait_until_ready()
            assert not stack.worker.has_ended(), stack.worker.said()
            late = stack.submit(prompt="after the storm")
            (job,) = stack.finish([late], within=30)
            assert job["status"] == "completed"
    assert took < 0.6


def test_an_api_killed_after_it_accepted_loses_nothing(
    tmp_path: Path, child_env: Env
) -> None:
    with Stack(tmp_path, child_env) as stack:
        stack.worker.end(signal.SIGTERM)
        ids = [stack.submit(prompt=f"seal {n}") for n in range(5)]
        stack.api.kill()
        with pytest.raises(httpx.HTTPError):
            stack.job(ids[0])
        stack.worker.start()
        stack.api.start()
        stack.wait_until_ready()
        check_bought_once(stack, stack.finish(ids, within=60))


def test_a_restarted_postgresql_loses_nothing(tmp_path: Path, redis_url: str) -> None:
    with Postgres(tmp_path / "postgres", settings=FAST_AND_LOOSE) as postgres:
        migrate(postgres.url)

        def env(**changes: str) -> dict[str, str]:
            return _environment(tmp_path, postgres.url, redis_url) | changes

        with Stack(tmp_path, env) as stack:
            ids = [stack.submit(prompt=f"hare {n}") for n in range(20)]
            wait_for_stages(stack, ids, 5, "generating")
            postgres.stop()
            answer = stack.client.post("/api/v1/generate", json={"prompt": "too early"})
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            postgres.start()
            check_bought_once(stack, stack.finish(ids, within=60))


def test_a_worker_asked_to_stop_leaves_nothing_half_done(
    tmp_path: Path, child_env: Env
) -> None:
    with Stack(tmp_path, child_env) as stack:
        ids = [stack.submit(prompt=f"lynx {n}") for n in range(20)]
        wait_for_stages(stack, ids, 10, "generating", "submitting")
        assert stack.worker.end(signal.SIGTERM, within=25) == 0, stack.worker.said()
        stages = Counter(job["stage"] for job in stack.jobs(ids))
        assert "submitting" not in stages, stages
        stack.worker.start()
        check_bought_once(stack, stack.finish(ids, within=60))


def test_two_workers_share_the_work_and_never_a_job(
    tmp_path: Path, child_env: Env
) -> None:
    with Stack(tmp_path, child_env, WORKER_CONCURRENCY="4") as stack:
        second = stack.another_worker()
        second.start()
        wait_for(
            lambda: "worker.ready" in second.said(), within=20, what="a second worker"
        )
        ids = [stack.submit(prompt=f"elk {n}") for n in range(40)]
        wait_for_stages(stack, ids, 5, "generating")
        stack.worker.kill()
        check_bought_once(stack, stack.finish(ids, within=60))


def test_a_forking_pool_is_refused_in_one_line(tmp_path: Path, child_env: Env) -> None:
    stack = Stack(tmp_path, child_env)
    stack.worker.add("--pool=processes")
    stack.worker.start()
    assert stack.worker.wait(20) == 2
    (line,) = [text for text in stack.worker.said().splitlines() if "--pool" in text]
    assert "leave --pool out" in line


def test_the_default_pool_named_on_the_command_line_works(
    tmp_path: Path, child_env: Env
) -> None:
    """Celery cannot tell `--pool=prefork` from its default, so ours is used."""
    stack = Stack(tmp_path, child_env, sandbox=("--speed", "10"))
    stack.worker.add("--pool=prefork")
    with stack:
        check_bought_once(stack, stack.finish([stack.submit(prompt="a vole")], 30))


def _environment(folder: Path, database_url: str, redis_url: str) -> dict[str, str]:
    """The environment of processes on a database server of the test's own."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "REPLICATE_API_TOKEN": "r8_for_tests_only",
        "AUTH_REQUIRED": "false",
        "LOG_DIR": str(folder / "logs"),
        "LOG_FORMAT": "json",
    }
