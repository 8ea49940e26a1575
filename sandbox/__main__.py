"""``python -m sandbox``: start a local Replicate and print where it is."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta

import uvloop

from sandbox.config import SandboxConfig
from sandbox.runner import Sandbox

BAD_START = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGINT or SIGTERM; return the exit code, 2 when it could not start."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(
        level=given.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    sandbox = Sandbox(_config(given), host=given.host, port=given.port)
    try:
        uvloop.run(_serve(sandbox))
    except OSError as exc:
        remedy = (
            "choose another with --port"
            if exc.errno == errno.EADDRINUSE
            else exc.strerror
        )
        where = f"{given.host}:{given.port}"
        print(f"sandbox: cannot listen on {where}: {remedy}", file=sys.stderr)
        return BAD_START
    return 0


async def _serve(sandbox: Sandbox) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with sandbox:
        print(f"sandbox: a local Replicate is ready at {sandbox.url}/v1", flush=True)
        await stopping.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sandbox",
        description="A local Replicate: the provider's HTTP API at no cost. See docs/sandbox.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add(
        "--port", type=_port, default=9009, help="port to listen on; 0 takes a free one"
    )
    add("--public-url", help="start of the URLs in answers; else from the Host header")
    add(
        "--token-check",
        default="any",
        metavar="any|TOKEN",
        help="which token is accepted",
    )
    add(
        "--speed", type=_speed, default=1.0, metavar="N|instant", help="how much faster"
    )
    add(
        "--pictures",
        choices=("painted", "plain"),
        default=os.environ.get("SANDBOX_PICTURES", "painted"),
        help="plain is cheap, for load tests (also SANDBOX_PICTURES)",
    )
    add(
        "--creates-per-minute",
        type=_count,
        default=600,
        metavar="N",
        help="0: no limit",
    )
    add(
        "--requests-per-minute",
        type=_count,
        default=3000,
        metavar="N",
        help="0: no limit",
    )
    add(
        "--burst",
        type=_count,
        metavar="N",
        help="creates at once; else a minute's worth",
    )
    add(
        "--expiry",
        type=_seconds,
        default=3600.0,
        metavar="S",
        help="seconds data are kept",
    )
    add(
        "--webhook-window",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds over which the last webhook is tried again",
    )
    add(
        "--webhook-secret",
        metavar="whsec_…",
        help="secret to sign with; else a fixed one",
    )
    add("--echo-webhook", action="store_true", help="show webhook in GET and LIST too")
    add(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="how much to log on stderr",
    )
    return parser


def _config(given: argparse.Namespace) -> SandboxConfig:
    usual = SandboxConfig()
    return SandboxConfig(
        public_url=given.public_url.rstrip("/") if given.public_url else None,
        token=None if given.token_check == "any" else given.token_check,
        speed=given.speed,
        pictures=given.pictures,
        creates_per_minute=given.creates_per_minute,
        requests_per_minute=given.requests_per_minute,
        burst=given.burst or None,
        retention=timedelta(seconds=given.expiry),
        webhook_secret=given.webhook_secret or usual.webhook_secret,
        webhook_window=timedelta(seconds=given.webhook_window),
        echo_webhook=given.echo_webhook,
    )


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError("a port is between 0 and 65535")
    return number


def _speed(text: str) -> float:
    if text == "instant":
        return 0.0
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError("a speed is above 0, or 'instant'")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("a limit is 0 (none) or more")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError("seconds are above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
