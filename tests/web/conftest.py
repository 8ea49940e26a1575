"""The fixtures of the API's tests, for pages."""

from tests.api.conftest import (  # noqa: F401 - fixtures of these tests, too
    api,
    sandbox,
    serve,
    shared,
    shared_sandbox,
    worker,
)
