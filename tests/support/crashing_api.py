"""An API that ends where a test wants it: `uvicorn tests.support.crashing_api:app`."""

from __future__ import annotations

from tests.support import crashing_build

crashing_build.prepare()

from app.main import app  # noqa: E402

__all__ = ["app"]
