"""Reading what Replicate writes: everything but the id may be missing, new or odd."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from app.domain.generation import Phase
from app.services.providers import replicate_wire as wire

ID = "ufawqhfynnddngldkgtslldrkq"

# The shape of replicate.com/docs/topics/predictions/create-a-prediction and of recorded
# exchanges (replicate/replicate-python tests/cassettes).
FULL = {
    "id": ID,
    "model": "black-forest-labs/flux-schnell",
    "version": "hidden",
    "input": {"prompt": "a fox", "seed": 7},
    "output": ["https://replicate.delivery/xezq/a/out-0.webp"],
    "logs": "seed 7\r  0%|     | 0/4\r 50%|██▌  | 2/4\r 75%|███▊ | 3/4",
    "error": None,
    "status": "succeeded",
    "source": "api",
    "data_removed": False,
    "created_at": "2026-11-22T10:00:00.123Z",
    "started_at": "2026-11-22T10:00:01.123456Z",
    "completed_at": "2026-11-22T10:00:02.123456789Z",
    "metrics": {"total_time": 2.0, "predict_time": 1.25, "image_count": 1},
    "urls": {"get": "https://api.replicate.com/v1/predictions/x"},
    "webhook": "https://example.com/hook",
    "webhook_completed": None,
    "brand_new": {"nested": True},
}


def test_a_full_answer_is_read_whole() -> None:
    found = wire.parse_prediction(FULL)
    assert found is not None
    assert found.phase is Phase.SUCCEEDED
    assert found.outputs == ("https://replicate.delivery/xezq/a/out-0.webp",)
    assert found.progress == 0.75
    assert found.predict_seconds == 1.25
    assert found.webhook == "https://example.com/hook"
    assert found.input == {"prompt": "a fox", "seed": 7}
    utc = timezone.utc
    assert found.created_at == datetime(2026, 11, 22, 10, 0, 0, 123_000, utc)
    assert found.started_at == datetime(2026, 11, 22, 10, 0, 1, 123_456, utc)
    assert found.completed_at == datetime(2026, 11, 22, 10, 0, 2, 123_456, utc)
    assert not found.data_removed


@pytest.mark.parametrize("key", sorted(set(FULL) - {"id", "status"}))
@pytest.mark.parametrize("odd", ["absent", None, 7, "text", [1], {"a": 1}, True])
def test_any_other_field_may_be_missing_or_odd(key: str, odd: object) -> None:
    data = {k: v for k, v in FULL.items() if k != key}
    if odd != "absent":
        data[key] = odd
    found = wire.parse_prediction(data)
    assert found is not None and found.phase is Phase.SUCCEEDED


@pytest.mark.parametrize(
    "word, phase",
    [
        ("starting", Phase.QUEUED),
        ("processing", Phase.RUNNING),
        ("succeeded", Phase.SUCCEEDED),
        ("successful", Phase.SUCCEEDED),
        ("failed", Phase.FAILED),
        ("canceled", Phase.CANCELLED),
        ("aborted", Phase.ABORTED),
        ("hibernating", Phase.RUNNING),
        (None, Phase.RUNNING),
    ],
)
def test_status_words_are_mapped(word: str | None, phase: Phase) -> None:
    found = wire.parse_prediction({"id": ID, "status": word})
    assert found is not None and found.phase is phase


A, B, C = "https://a/1.png", "http://localhost:9/2.png", "data:image/png;base64,AA=="


@pytest.mark.parametrize(
    "output, expected",
    [
        (None, ()),
        (A, (A,)),
        ([A, B, C], (A, B, C)),
        ({"images": [B, {"uri": A}], "mask": C}, (B, A, C)),
        ({"text": "see https://a", "n": 3, "ok": True, "u": A}, (A,)),
        (["ftp://a/x", "file:///etc/passwd", " https://a", ""], ()),
    ],
)
def test_outputs_are_collected_in_order(
    output: object, expected: tuple[str, ...]
) -> None:
    found = wire.parse_prediction({"id": ID, "status": "succeeded", "output": output})
    assert found is not None and found.outputs == expected


def test_outputs_nested_without_end_do_not_hurt() -> None:
    deep: object = A
    for _ in range(100_000):
        deep = [deep]
    found = wire.parse_prediction({"id": ID, "status": "succeeded", "output": deep})
    assert found is not None and found.outputs == (A,)


@pytest.mark.parametrize(
    "logs, progress",
    [
        ("", None),
        (" 45%|████", 0.45),
        ("100%|█", 1.0),
        ("5% done", None),
        ("999%|", 1.0),
    ],
)
def test_progress_is_the_last_bar(logs: str, progress: float | None) -> None:
    found = wire.parse_prediction({"id": ID, "status": "processing", "logs": logs})
    assert found is not None and found.progress == progress


@pytest.mark.parametrize("odd", [None, 7, "", "../x", "a b", ["x"], "x" * 200])
def test_without_a_usable_id_there_is_no_prediction(odd: object) -> None:
    assert wire.parse_prediction({"id": odd, "status": "starting"}) is None
