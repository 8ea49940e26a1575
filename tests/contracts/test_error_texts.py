"""What the provider's error texts mean, and what of them reaches a user."""

from __future__ import annotations

import pytest

from app.domain.generation import Phase
from app.services.providers import replicate_wire as wire
from app.services.providers.replicate_errors import (
    classify_failure,
    clean_text,
)

DIRECTOR = "Director: unexpected error handling prediction "
HIGH_DEMAND = "Service is currently unavailable due to high demand. Please try again"

# text, code, buy again by ourselves, may be sent again by the user
TEXTS = [
    ("Prediction interrupted; please retry (code: PA)", "provider_interrupted", 1, 1),
    (DIRECTOR + "(E9828)", "provider_error", 1, 1),
    (DIRECTOR + "(E1001)", "out_of_memory", 0, 0),
    (DIRECTOR + "(E8765)", "provider_error", 1, 1),
    (DIRECTOR + "(E9243)", "provider_error", 1, 1),
    (DIRECTOR + "(E9825)", "provider_error", 1, 1),
    (DIRECTOR + "(E1000)", "provider_error", 1, 1),
    (DIRECTOR + "(E6716)", "provider_interrupted", 1, 1),
    (DIRECTOR + "(E8367)", "provider_interrupted", 1, 1),
    (DIRECTOR + "(E7777)", "provider_error", 1, 1),
    (DIRECTOR + "(E4875)", "provider_rejected", 0, 0),
    (HIGH_DEMAND + " later. (E003)", "provider_overloaded", 1, 1),
    (HIGH_DEMAND + " (E003) (gNkw1bZ)", "provider_overloaded", 1, 1),
    ("Service is temporarily unavailable. (E004)", "provider_overloaded", 1, 1),
    ("Something is wrong on our side (E001)", "provider_error", 1, 1),
    ("Something is wrong on our side (E002)", "provider_error", 1, 1),
    (
        "The input or output was flagged as sensitive. Please try again with different "
        "inputs. (E005) (x7JqPk)",
        "content_policy",
        0,
        0,
    ),
    (
        "NSFW content detected. Try running it again, or try a different prompt.",
        "content_policy",
        0,
        1,
    ),
    (
        "All generated images contained NSFW content. Try running it again with a "
        "different prompt.",
        "content_policy",
        0,
        1,
    ),
    ("Prediction input failed validation: {'a': 1}", "invalid_input", 0, 0),
    ("CUDA out of memory. Tried to allocate 2.50 GiB", "out_of_memory", 0, 0),
    ("list index out of range", "model_error", 0, 0),
    ("Expected E6716x in input", "model_error", 0, 0),
    ("", "provider_error", 1, 1),
    ("  \n", "provider_error", 1, 1),
    (None, "provider_error", 1, 1),
    ({"detail": "odd"}, "model_error", 0, 0),
]


@pytest.mark.parametrize("text, code, is_transient, retryable", TEXTS)
def test_error_texts_are_classified(
    text: object, code: str, is_transient: int, retryable: int
) -> None:
    failure, transient = classify_failure(text)
    assert (failure.code, transient, failure.retryable) == (
        code,
        bool(is_transient),
        bool(retryable),
    )
    assert failure.message


@pytest.mark.parametrize("text", [row[0] for row in TEXTS])
def test_codes_of_the_platform_do_not_reach_users(text: object) -> None:
    failure, _ = classify_failure(text)
    if failure.code != "model_error":
        assert "Director" not in failure.message
        assert "(E" not in failure.message


def test_only_failed_predictions_have_a_failure() -> None:
    for word, phase in (("failed", Phase.FAILED), ("aborted", Phase.ABORTED)):
        found = wire.parse_prediction(
            {"id": "p1", "status": word, "error": "Prediction interrupted (code: PA)"}
        )
        assert found is not None and found.phase is phase
        assert (found.failure is not None) is (word == "failed")
        assert found.is_transient is (word == "failed")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\n\tb\x00c", "a b c"),
        ("see https://x.y/z?token=abc, please", "see [link] please"),
        ("(https://u:pw@x.y/z)", "([link])"),
        ("postgres://u:pw@h/db failed", "[link] failed"),
        ("got data:image/png;base64,AAAA== here", "got [data] here"),
        ("token r8_AbCdEf0123 refused", "token [secret] refused"),
        ("Authorization: Bearer abc.def", "Authorization: [secret]"),
    ],
)
def test_texts_for_people_are_clean(text: str, expected: str) -> None:
    assert clean_text(text) == expected


def test_texts_for_people_are_short() -> None:
    assert len(clean_text("word " * 100_000)) <= 300
    assert clean_text("word " * 100).endswith("…")
