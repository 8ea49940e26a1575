from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from app.core.config import (
    CONFIGURATION_ERROR,
    DatabaseSettings,
    Settings,
    load_settings,
)

NEEDED = {
    "DATABASE_URL": "postgresql://user:hidden-password@db/media",
    "REDIS_URL": "redis://:hidden-password@cache:6379/0",
    "REPLICATE_API_TOKEN": "r8_hidden",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the environment to what is needed, changed as told; None removes."""

    def set_up(**changes: str | None) -> None:
        for name, value in (NEEDED | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_up


def test_the_environment_of_the_developer_does_not_reach_tests() -> None:
    with pytest.raises(SystemExit):
        load_settings(Settings)


def test_what_is_needed_is_enough(environment: Callable[..., None]) -> None:
    environment()

    settings = load_settings(Settings)

    assert settings.default_model == "black-forest-labs/flux-schnell"
    assert settings.job_deadline == timedelta(minutes=15)
    assert settings.buys_from_replicate
    assert settings.log_dir == Path("logs")


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_missing_setting_is_named_with_its_remedy(
    environment: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str | None,
) -> None:
    environment(**{name: value})

    with pytest.raises(SystemExit) as caught:
        load_settings(Settings)

    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == CONFIGURATION_ERROR == 2
    assert line.startswith(f"{name} is not set: ")
    assert len(line) > len(f"{name} is not set: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://user:hidden-password@db/media"),
        ("DATABASE_URL", "hidden-password"),
        ("REDIS_URL", "http://:hidden-password@cache"),
        ("REPLICATE_API_TOKEN", "  "),
        ("API_V1_PREFIX", "api/v1"),
        ("API_V1_PREFIX", "/api/v1/"),
        ("STORAGE_URL", "ftp://somewhere"),
        ("REPLICATE_API_BASE_URL", "api.replicate.com"),
        ("PUBLIC_BASE_URL", "ftp://us.example"),
        ("REPLICATE_WEBHOOK_SECRET", "hidden"),
        ("REPLICATE_WEBHOOK_SECRET", "whsec_"),
        ("REPLICATE_WEBHOOK_SECRET", "whsec_hidden-hidden"),
        ("MAX_RETRIES", "-1"),
        ("MAX_RETRIES", "many"),
        ("RETRY_BACKOFF_BASE", "0.5"),
        ("JOB_DEADLINE_SECONDS", "9"),
        ("WORKER_CONCURRENCY", "0"),
        ("LOG_FORMAT", "xml"),
        ("DEBUG", "perhaps"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_and_no_secret(
    environment: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
) -> None:
    environment(**{name: value})

    with pytest.raises(SystemExit) as caught:
        load_settings(Settings)

    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == CONFIGURATION_ERROR
    assert line.startswith(f"{name} ")
    assert "hidden" not in line


def test_every_wrong_setting_gets_its_line(
    environment: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    environment(DATABASE_URL=None, MAX_RETRIES="99", LOG_FORMAT="xml")

    with pytest.raises(SystemExit):
        load_settings(Settings)

    names = {line.split()[0] for line in capsys.readouterr().err.splitlines()}
    assert names == {"DATABASE_URL", "MAX_RETRIES", "LOG_FORMAT"}


def test_migrations_need_only_the_database(environment: Callable[..., None]) -> None:
    environment(REDIS_URL=None, REPLICATE_API_TOKEN=None)

    settings = load_settings(DatabaseSettings)

    assert settings.database_url.get_secret_value() == NEEDED["DATABASE_URL"]


def test_secrets_do_not_show(environment: Callable[..., None]) -> None:
    environment(REPLICATE_WEBHOOK_SECRET="whsec_hidden")

    assert "hidden" not in repr(load_settings(Settings))


@pytest.mark.parametrize(
    "given", ["a.example,b.example:81", " a.example  b.example:81"]
)
def test_lists_may_be_separated_by_commas_or_spaces(
    environment: Callable[..., None], given: str
) -> None:
    environment(OUTPUT_HOSTS=given)

    assert load_settings(Settings).output_hosts == ("a.example", "b.example:81")


def test_an_empty_value_is_the_default_but_an_empty_log_dir_means_no_files(
    environment: Callable[..., None],
) -> None:
    environment(LOG_DIR="", MAX_RETRIES="", STORAGE_URL="")

    settings = load_settings(Settings)

    assert settings.log_dir is None
    assert settings.max_retries == 3
    assert settings.storage_url is None


def test_files_are_stored_in_the_folder_unless_a_url_is_given(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    urls = {"database_url": "postgresql://db/x", "redis_url": "redis://cache"}

    folder = settings(storage_path=tmp_path / "a b", **urls)
    bucket = settings(storage_url="s3://bucket/prefix", **urls)

    assert folder.effective_storage_url == (tmp_path / "a b").as_uri()
    assert bucket.effective_storage_url == "s3://bucket/prefix"


def test_base_urls_lose_their_last_slash(settings: Callable[..., Settings]) -> None:
    made = settings(
        database_url="postgresql://db/x",
        redis_url="redis://cache",
        public_base_url="https://us.example/",
    )

    assert made.public_base_url == "https://us.example"
    assert not made.buys_from_replicate


@pytest.mark.parametrize(
    ("provider", "public", "callbacks"),
    [
        ("https://api.replicate.com/v1", None, None),
        (
            "https://api.replicate.com/v1",
            "https://us.example/media/",
            "https://us.example/media/api/v2",
        ),
        ("https://api.replicate.com/v1", "http://localhost:8000", None),
        (
            "http://127.0.0.1:9/v1",
            "http://127.0.0.1:8000",
            "http://127.0.0.1:8000/api/v2",
        ),
    ],
)
def test_webhooks_are_requested_where_the_provider_can_send_them(
    settings: Callable[..., Settings],
    provider: str,
    public: str | None,
    callbacks: str | None,
) -> None:
    made = settings(
        database_url="postgresql://db/x",
        redis_url="redis://cache",
        replicate_api_base_url=provider,
        public_base_url=public,
        api_v1_prefix="/api/v2",
    )

    assert made.callback_base_url == callbacks
