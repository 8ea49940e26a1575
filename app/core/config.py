"""Settings: every knob of the service, validated at start.

Read only by composition roots; everything below takes what it needs as parameters.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Never, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from app.core.signing import signing_key
from app.core.trusted_hosts import parse_trusted

CONFIGURATION_ERROR = 2  # exit code
SHORTEST_SECRET, LONGEST_SECRET = 24, 512  # characters

_REMEDIES = {
    "database_url": "set it to postgresql://user:password@host:5432/database",
    "redis_url": "set it to redis://host:6379/0",
    "admin_api_key": "make one with: openssl rand -hex 32",
    "metrics_token": "make one with: openssl rand -hex 32",
    "outbound_hosts": "write each as host:port, like hooks.internal:8080",
    "media_signing_keys": "make each with: openssl rand -hex 32",
    "replicate_webhook_secret": "set it to the account's whsec_…, or to nothing to have it "
    "fetched",
    "replicate_api_token": "create one at replicate.com/account/api-tokens, or run "
    "`make run` without it to use the local sandbox",
}

S = TypeVar("S", bound="DatabaseSettings")


def _split_list(value: object) -> object:
    """Accept `a,b c` from the environment where a tuple is wanted."""
    if isinstance(value, str):
        return tuple(part for part in value.replace(",", " ").split() if part)
    return value


WordList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)]


SecretList = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_list)]


class DatabaseSettings(BaseSettings):
    """What migrations need, and no more.  URLs are normalised; wrong ones are named."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: SecretStr = Field(
        description="PostgreSQL URL; any driver part, both processes normalise it"
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: dict[str, object]) -> dict[str, object]:
        """Read `NAME=` as not set, so that an edited `.env.example` works.

        LOG_DIR is the exception: there, empty means stdout only.
        """
        return {
            name: value
            for name, value in values.items()
            if value != "" or name == "log_dir"
        }

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, value: SecretStr) -> SecretStr:
        try:
            url = make_url(value.get_secret_value())
        except ArgumentError:
            raise ValueError("is not a database URL") from None
        if url.get_backend_name() not in ("postgresql", "postgres"):
            raise ValueError("must be a PostgreSQL URL")
        return value


class Settings(DatabaseSettings):
    """All settings of API and worker.  Names in the environment are upper case."""

    # Required.
    redis_url: SecretStr = Field(description="Redis or Valkey: bell and token buckets")
    replicate_api_token: SecretStr = Field(description="the provider account's token")

    # Optional, from the product's contract.
    debug: bool = Field(False, description="verbose logs and SQL warnings")
    project_name: str = Field(
        "Media Generation Service", description="title shown in the API documentation"
    )
    api_v1_prefix: str = Field("/api/v1", description="prefix of the JSON API")
    storage_path: Path = Field(
        Path("./media"), description="local folder for stored files"
    )
    max_retries: int = Field(
        3, ge=0, le=20, description="attempts a job gets after the first"
    )
    retry_backoff_base: float = Field(
        2.0,
        ge=1.0,
        le=10.0,
        description="seconds before the first retry, and the factor between retries",
    )

    # Ours.
    storage_url: str | None = Field(
        None, description="file:// or s3://bucket/prefix; overrides STORAGE_PATH"
    )
    replicate_api_base_url: str = Field(
        "https://api.replicate.com/v1", description="the provider, or a sandbox"
    )
    replicate_webhook_secret: SecretStr | None = Field(
        None,
        description="whsec_…, signs the provider's webhooks; unset: asked from its API",
    )
    public_base_url: str | None = Field(
        None,
        description="our own URL as the internet sees it; set: provider webhooks are"
        " requested, and output URLs are absolute",
    )
    output_hosts: WordList = Field(
        ("replicate.delivery",),
        description="hosts outputs may be downloaded from; host:port is trusted as is",
    )
    provider_creates_per_minute: int = Field(
        600, ge=1, description="purchases a minute, all workers together"
    )
    provider_requests_per_minute: int = Field(
        3000, ge=1, description="other provider requests a minute, all workers together"
    )
    default_model: str = Field(
        "black-forest-labs/flux-schnell", description="model when a job names none"
    )
    job_deadline_seconds: int = Field(
        900, ge=10, le=86_400, description="a job not generated by then is failed"
    )
    max_output_bytes: int = Field(
        50 * 1024 * 1024, ge=1024, description="largest output file accepted"
    )
    log_dir: Path | None = Field(
        Path("./logs"), description="folder for log files; empty: stdout only"
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="console for people, json for machines"
    )
    worker_concurrency: int = Field(
        256, ge=1, le=4096, description="looks a worker makes at once"
    )
    cors_origins: WordList = Field(
        (), description="origins browsers may call from; * for any"
    )

    # Whose job, whose money.
    auth_required: bool | None = Field(
        None, description="demand an API key; unset: yes, unless DEBUG"
    )
    admin_api_key: SecretStr | None = Field(
        None, description="a key that may do everything, to make the others with"
    )
    metrics_token: SecretStr | None = Field(
        None, description="may read /metrics and the detailed health, and no more"
    )
    media_signing_keys: SecretList = Field(
        (),
        description="sign links to private files: the first one signs, all are believed;"
        " unset: derived from REPLICATE_API_TOKEN",
    )
    media_link_seconds: int = Field(
        3600,
        ge=60,
        le=7 * 86_400,
        description="how long a link to a private file works at least",
    )
    price_file: Path | None = Field(
        None, description="TOML with prices that win over the built-in ones"
    )
    budget_job_usd: Decimal | None = Field(
        None, ge=0, description="what one job may cost at worst"
    )
    budget_day_usd: Decimal | None = Field(
        None, ge=0, description="what all jobs of a UTC day together may cost"
    )
    budget_month_usd: Decimal | None = Field(
        None, ge=0, description="what all jobs of a UTC month together may cost"
    )
    max_pending_jobs: int = Field(
        100_000, ge=1, description="jobs that may wait to start; more are refused"
    )
    max_upload_bytes: int = Field(
        20 * 1024 * 1024, ge=1024, description="largest picture taken as an input"
    )
    c2pa_certificate_file: Path | None = Field(
        None, description="PEM chain to sign pictures with; unset: they are not signed"
    )
    c2pa_private_key_file: Path | None = Field(
        None, description="PEM key of the first certificate of the chain"
    )
    outbound_hosts: WordList = Field(
        (),
        description="host:port that inputs and webhook_url may name although it is plain"
        " http or not public",
    )

    @field_validator("log_dir", mode="before")
    @classmethod
    def _empty_means_stdout_only(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: SecretStr) -> SecretStr:
        parts = urlsplit(value.get_secret_value())
        if parts.scheme not in ("redis", "rediss"):
            raise ValueError("must start with redis:// or rediss://")
        try:
            parts.port
        except ValueError:
            raise ValueError("has a port that is no number below 65536") from None
        return value

    @field_validator("api_v1_prefix")
    @classmethod
    def _is_path(cls, value: str) -> str:
        if not value.startswith("/") or value.endswith("/"):
            raise ValueError("must start with / and not end with it, like /api/v1")
        return value

    @field_validator("storage_url")
    @classmethod
    def _is_known_store(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in ("file", "s3"):
            raise ValueError("must start with file:// or s3://")
        return value

    @field_validator("replicate_api_base_url", "public_base_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http:// or https:// URL")
        return value.rstrip("/")

    @field_validator("replicate_webhook_secret")
    @classmethod
    def _is_signing_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            signing_key(value.get_secret_value())
        return value

    @field_validator("replicate_api_token")
    @classmethod
    def _is_not_empty(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().strip():
            raise ValueError("must not be empty")
        return value

    @field_validator("admin_api_key", "metrics_token")
    @classmethod
    def _is_long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        secret = value.get_secret_value()
        if len(secret) < SHORTEST_SECRET:
            raise ValueError(f"must have at least {SHORTEST_SECRET} characters")
        # It is sent in a header, and longer ones are not looked at.
        if len(secret) > LONGEST_SECRET or not re.fullmatch(r"[!-~]+", secret):
            raise ValueError(
                f"must be at most {LONGEST_SECRET} characters, ASCII, without spaces"
            )
        return value

    @field_validator("outbound_hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            try:
                parse_trusted(entry)
            except ValueError as error:
                raise ValueError(f"has an entry that is wrong: {error}") from None
        return value

    @field_validator("media_signing_keys")
    @classmethod
    def _are_long(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(one.get_secret_value()) < SHORTEST_SECRET for one in value):
            raise ValueError(f"must have at least {SHORTEST_SECRET} characters each")
        return value

    @model_validator(mode="after")
    def _signs_with_both(self) -> Self:
        both = (self.c2pa_certificate_file, self.c2pa_private_key_file)
        if any(both) and not all(both):
            raise ValueError(
                "C2PA_CERTIFICATE_FILE and C2PA_PRIVATE_KEY_FILE go together"
            )
        return self

    @property
    def demands_keys(self) -> bool:
        """Tell whether callers must bring an API key."""
        return not self.debug if self.auth_required is None else self.auth_required

    @property
    def effective_storage_url(self) -> str:
        """Where files are stored, as a URL: STORAGE_URL, else the folder STORAGE_PATH."""
        return self.storage_url or self.storage_path.resolve().as_uri()

    @property
    def job_deadline(self) -> timedelta:
        """How long a job may take from submission to a finished prediction."""
        return timedelta(seconds=self.job_deadline_seconds)

    @property
    def callback_base_url(self) -> str | None:
        """Where the provider's webhooks start; None when none are to be requested.

        Replicate takes https addresses only (api.replicate.com/openapi.json, 2026-03): one it
        refuses must not cost the purchase.
        """
        if self.public_base_url is None:
            return None
        is_https = self.public_base_url.startswith("https://")
        if self.buys_from_replicate and not is_https:
            return None
        return self.public_base_url + self.api_v1_prefix

    @property
    def buys_from_replicate(self) -> bool:
        """Tell whether money is spent: false for a sandbox or any other base URL."""
        return urlsplit(self.replicate_api_base_url).hostname == "api.replicate.com"


def libpq_url(url: SecretStr) -> str:
    """Give the URL in libpq's form (`postgresql://…?sslmode=…`), whatever form it came in.

    psycopg takes it as it is, asyncpg but for what `database.asyncpg_dsn` leaves out.
    `ssl` is asyncpg's spelling in SQLAlchemy URLs; it becomes `sslmode`.
    """
    parsed = make_url(url.get_secret_value())
    query: dict[str, Any] = dict(parsed.query)
    if "ssl" in query:
        query.setdefault("sslmode", query["ssl"])
        del query["ssl"]
    rewritten = parsed.set(drivername="postgresql", query=query)
    return rewritten.render_as_string(hide_password=False)


def load_settings(kind: Callable[[], S]) -> S:
    """Read and check settings; a wrong one is one clear line on stderr and exit code 2."""
    try:
        return kind()
    except ValidationError as error:
        _exit_with(error)


def _exit_with(error: ValidationError) -> Never:
    for problem in error.errors(include_input=False, include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else "settings"
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            text = "is not set"
        remedy = _REMEDIES.get(name, "see .env.example")
        print(f"{name.upper()} {text}: {remedy}", file=sys.stderr)
    raise SystemExit(CONFIGURATION_ERROR)


def refuse_to_start(name: str, text: str) -> Never:
    """Say in one clear line on stderr what is wrong with a setting; end with exit code 2.

    For what shows only when a setting is put to use.
    """
    print(f"{name.upper()} {text}", file=sys.stderr)
    raise SystemExit(CONFIGURATION_ERROR)


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Load the process's settings once, from the environment and `.env`."""
    return load_settings(Settings)
