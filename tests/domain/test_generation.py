"""What a prediction says about itself."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.domain.generation import Phase, Prediction

BEGAN = datetime(2026, 9, 1, 12, tzinfo=UTC)
ENDED = BEGAN + timedelta(seconds=3)


@pytest.mark.parametrize(
    ("phase", "told", "busy"),
    [
        (Phase.SUCCEEDED, {"predict_seconds": 2.5}, 2.5),
        (Phase.FAILED, {"started_at": BEGAN, "completed_at": ENDED}, 3.0),
        (Phase.CANCELLED, {"started_at": BEGAN}, None),
        (Phase.FAILED, {}, None),
        (Phase.ABORTED, {"started_at": BEGAN, "completed_at": ENDED}, 0.0),
    ],
)
def test_how_long_the_hardware_was_busy_is_what_the_provider_tells(
    phase: Phase, told: dict[str, Any], busy: float | None
) -> None:
    assert Prediction("handle", phase, **told).busy_seconds == busy
