"""Webhooks: signed, sent once; the terminal one is tried again for about a minute.

Signature: Standard Webhooks (replicate.com/docs/topics/webhooks/verify-webhook, 2026-06).
Retries: only the terminal event, with growing pauses, the last about one minute after the end;
redirects are not followed (replicate.com/docs/topics/webhooks/receive-webhook, 2026-06).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

import aiohttp

from sandbox.faults import FaultBoard, Subject
from sandbox.prediction import Event, Prediction, new_id

log = logging.getLogger("sandbox.webhooks")

#: Pauses between tries, as shares of the whole window: 1, 2, 4, 8, 15 and 30 seconds of 60.
RETRY_SHARES = (1 / 60, 2 / 60, 4 / 60, 8 / 60, 15 / 60, 30 / 60)
ANSWER_TIMEOUT = 10.0
AT_ONCE = 256


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the ``webhook-signature`` of a body under a ``whsec_…`` secret."""
    key = base64.b64decode(secret.partition("_")[2])
    text = f"{message_id}.{timestamp}.".encode() + body
    digest = hmac.new(key, text, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


@dataclass(slots=True)
class Message:
    """One event on its way to one address; its id is the same in every try."""

    id: str
    url: str
    body: bytes
    event: Event
    signature: str = "true"
    tries: int = 0


class Courier:
    """Deliver messages without making anybody wait for them."""

    def __init__(self, secret: str, window: timedelta, faults: FaultBoard) -> None:
        self._secret = secret
        self._wrong_secret = (
            "whsec_" + base64.b64encode(b"somebody else's key").decode()
        )
        self._window = window.total_seconds()
        self._faults = faults
        self._session: aiohttp.ClientSession | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._waiting: set[asyncio.TimerHandle] = set()
        self.outcomes: Counter[str] = Counter()

    async def open(self) -> None:
        """Start; must be called in the loop that will deliver."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=AT_ONCE),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_read=ANSWER_TIMEOUT, sock_connect=5
            ),
            headers={"User-Agent": "Replicate-Sandbox-Webhooks/1", "Accept": "*/*"},
        )

    async def close(self) -> None:
        """Stop at once; undelivered messages are lost."""
        self.drop_all()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def drop_all(self) -> None:
        """Forget every message that is under way or waits for its next try."""
        for timer in self._waiting:
            timer.cancel()
        self._waiting.clear()
        for task in self._running:
            task.cancel()
        self.outcomes.clear()

    def post(self, prediction: Prediction, event: Event, body: bytes) -> None:
        """Send an event about a prediction, faults included."""
        url = prediction.webhook
        if url is None:
            return
        strike = self._faults.strike(
            "webhook",
            Subject(
                prompt=prediction.prompt,
                model=prediction.model.ref,
                prediction_id=prediction.id,
                webhook=url,
                event=event,
            ),
        )
        message = Message(f"msg_{new_id()}", url, body, event)
        fault = "" if strike is None else strike.name
        if strike is None:
            self._send(message)
        elif fault == "webhook.lost":
            self.outcomes["lost"] += 1
        elif fault == "webhook.duplicated":
            for _ in range(int(strike.params["copies"])):
                self._send(Message(message.id, url, body, event))
        elif fault == "webhook.late":
            self._send_later(message, float(strike.params["seconds"]))
        else:
            message.signature = "none" if fault == "webhook.unsigned" else "wrong"
            self._send(message)

    def _send(self, message: Message) -> None:
        task = asyncio.get_running_loop().create_task(self._deliver(message))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _send_later(self, message: Message, delay: float) -> None:
        def ring() -> None:
            self._waiting.discard(timer)
            self._send(message)

        timer = asyncio.get_running_loop().call_later(delay, ring)
        self._waiting.add(timer)

    async def _deliver(self, message: Message) -> None:
        status = await self._try(message)
        if 200 <= status < 300:
            self.outcomes["delivered"] += 1
            return
        log.info("webhook refused: status=%s tries=%s", status, message.tries)
        retries_used = message.tries - 1
        if message.event != "completed" or retries_used >= len(RETRY_SHARES):
            self.outcomes["given_up"] += 1
            return
        self.outcomes["retried"] += 1
        self._send_later(message, RETRY_SHARES[retries_used] * self._window)

    async def _try(self, message: Message) -> int:
        """Send once and return the status code, 0 when there was no answer."""
        assert self._session is not None, "open() comes first"
        message.tries += 1
        try:
            async with self._session.post(
                message.url,
                data=message.body,
                headers=self._headers(message),
                allow_redirects=False,
            ) as answer:
                return answer.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return 0

    def _headers(self, message: Message) -> dict[str, str]:
        now = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": message.id,
            "webhook-timestamp": str(now),
        }
        if message.signature != "none":
            genuine = message.signature == "true"
            secret = self._secret if genuine else self._wrong_secret
            headers["webhook-signature"] = sign(secret, message.id, now, message.body)
        return headers
