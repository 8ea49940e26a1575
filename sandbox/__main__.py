"""``python -m sandbox``: start a local Replicate and print where it is."""

from __future__ import annotations

import argparse
import asyncio
import base64
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
    _add_place(parser)
    _add_behaviour(parser)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    """Add where it listens, who may come and what it says about it."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_port, default=9009, help="port to listen on; 0: a free one")
    add("--public-url", help="start of the URLs in answers; else the Host header")
    add("--token-check", default="any", metavar="any|TOKEN", help="accepted token")
    levels = ("debug", "info", "warning", "error")
    add("--log-level", choices=levels, default="warning", help="of what is on stderr")


def _add_behaviour(parser: argparse.ArgumentParser) -> None:
    """Add how fast, how limited and how forgetful it is."""
    add = parser.add_argument
    add("--speed", type=_speed, default=1.0, metavar="N|instant", help="times faster")
    add(
        "--pictures",
        type=_pictures,
        default=os.environ.get("SANDBOX_PICTURES", "painted"),
        metavar="painted|plain",
        help="plain is cheap, for load tests (also SANDBOX_PICTURES)",
    )
    add(
        "--creates-per-minute",
        default=600,
        help="0: no limit",
        type=_count,
        metavar="N",
    )
    add(
        "--requests-per-minute",
        default=3000,
        help="0: no limit",
        type=_count,
        metavar="N",
    )
    add(
        "--burst",
        help="creates at once; else a minute's worth",
        type=_count,
        metavar="N",
    )
    add(
        "--expiry",
        default=3600.0,
        help="seconds data are kept",
        type=_seconds,
        metavar="S",
    )
    retries = "seconds over which the last webhook is tried again"
    add("--webhook-window", default=60.0, help=retries, type=_seconds, metavar="S")
    secret = "secret to sign webhooks with; else a fixed one"
    add("--webhook-secret", metavar="whsec_…", type=_secret, help=secret)
    shown = "show webhook in GET and LIST too"
    add("--echo-webhook", action="store_true", help=shown)


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


def _pictures(text: str) -> str:
    if text not in ("painted", "plain"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither painted nor plain")
    return text


def _secret(text: str) -> str:
    """Check that it is whsec_ and standard base64."""
    prefix, _, key = text.partition("_")
    try:
        base64.b64decode(key, validate=True)
    except ValueError as exc:
        raise argparse.ArgumentTypeError("the part after whsec_ is no base64") from exc
    if prefix != "whsec" or not key:
        raise argparse.ArgumentTypeError("a secret is whsec_ and base64")
    return text


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
