"""Logs: structlog everywhere, one line per state change, to stdout and to files.

    logs/api.log, logs/worker.log   what that process did
    logs/database.log               slow and failed statements of all processes

Files are reopened when something moved them away, so logrotate needs no signal.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, Literal

import orjson
import structlog

DATABASE_LOGGER = "app.database"

# Never logged, whoever passes them: what callers wrote, and what opens doors.
_SECRET_KEYS = frozenset(
    ("prompt", "token", "authorization", "password", "secret", "input", "headers")
)
# What follows the path: signatures of files, and what callers searched for.  Quotes do not end
# it: not every client escapes them.
_QUERY = re.compile(r"((?:https?:/)?/[^\s?]*)\?\S+")
# SQLAlchemy and PostgreSQL repeat the row they complain about; a row holds a prompt.
_ROW = re.compile(
    r"(?m)(^\[parameters: |invalid input for query argument \$\d+: ).*$"
    r"|(DETAIL: )(?s:.*?)(?=\n\[SQL: |\n\nThe above exception |\n\nDuring handling |\Z)"
)
# Keys of ours, tokens and secrets of the provider, whatever text they got into.
_DOOR = re.compile(
    r"\b(?:mgs_[\w-]{32,}|r8_\w{20,}|whsec_[\w+/=-]{16,})"
    r"|(?<=[Bb]earer )[\w.~+/=-]{16,}"
)


def configure_logging(
    role: Literal["api", "worker", "cli"],
    *,
    log_dir: Path | None,
    log_format: Literal["console", "json"],
    debug: bool = False,
) -> None:
    """Send all logs of this process to stdout and, with a folder, to its files.

    Replaces whatever handlers the root logger had.  A folder that cannot be written is one
    warning, and stdout only.
    """
    level = logging.DEBUG if debug else logging.INFO
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redact,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    as_json = structlog.processors.JSONRenderer(serializer=_to_json)
    to_screen: Any = as_json
    if log_format == "console":
        to_screen = structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(_formatter(shared, to_screen))
    handlers: list[logging.Handler] = [screen]
    database_handlers: list[logging.Handler] = []
    problem = None
    if log_dir is not None:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            to_file = _formatter(shared, as_json)
            handlers.append(_file(log_dir / f"{role}.log", to_file))
            database_handlers.append(_file(log_dir / "database.log", to_file))
        except OSError as error:
            problem = error
    _install(logging.getLogger(), level, handlers)
    _install(logging.getLogger(DATABASE_LOGGER), level, database_handlers)
    _quiet_others()
    if problem is not None:
        structlog.get_logger(__name__).warning(
            "log_dir.unusable", reason=problem.strerror, remedy="set LOG_DIR"
        )


def redact(
    logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Keep prompts, tokens and the queries of URLs out of a log line, however deep."""
    for key, value in event.items():
        event[key] = _redacted(key, value)
    return event


def _redacted(key: object, value: Any) -> Any:
    if isinstance(key, str) and key.lower() in _SECRET_KEYS:
        return "[redacted]"
    match value:
        case str():
            if "?" in value:
                value = _QUERY.sub(r"\1?[redacted]", value)
            if "_" in value or "earer " in value:
                value = _DOOR.sub("[redacted]", value)
            return _ROW.sub(r"\1\2[redacted]", value) if "\n" in value else value
        case dict():
            return {name: _redacted(name, item) for name, item in value.items()}
        case list() | tuple():
            return [_redacted(None, item) for item in value]
        case _:
            return value


def _to_json(event: Mapping[str, Any], **options: Any) -> str:
    """Write one line: a fifth of a worker's time under load went into lines."""
    text = orjson.dumps(event, default=options.get("default", repr))
    return text.decode()


def _formatter(shared: Sequence[Any], renderer: Any) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=list(shared),
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            renderer,
        ],
    )


def _file(path: Path, formatter: logging.Formatter) -> logging.Handler:
    handler = WatchedFileHandler(path, encoding="utf-8")
    handler.setFormatter(formatter)
    return handler


def _install(
    logger: logging.Logger, level: int, handlers: Sequence[logging.Handler]
) -> None:
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(level)


def _quiet_others() -> None:
    """Let servers and libraries log through us, and only what somebody wants to read."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "celery"):
        logger = logging.getLogger(name)
        if name == "uvicorn.access" and not logger.hasHandlers():
            continue  # --no-access-log
        logger.handlers.clear()
        logger.propagate = True
    for name in (
        *("httpx", "httpcore", "asyncio", "botocore", "urllib3", "PIL"),
        *("celery.worker.strategy", "celery.app.trace"),  # two lines per bell
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Reconnecting is our own news; kombu's tracebacks of it are not.
    logging.getLogger("celery.worker.consumer.consumer").addFilter(_short)


def _short(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True
