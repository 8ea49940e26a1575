"""A worker that ends where a test wants it: `celery -A tests.support.crashing_worker worker`."""

from __future__ import annotations

from tests.support import crashing_build

crashing_build.prepare()

from worker.celery_app import app  # noqa: E402

__all__ = ["app"]
