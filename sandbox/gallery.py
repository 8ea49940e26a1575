"""The output pictures: drawn when somebody first asks for them, kept while there is room."""

from __future__ import annotations

import asyncio
import base64
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from sandbox.catalogue import CONTENT_TYPES
from sandbox.config import SandboxConfig
from sandbox.painter import Commission, paint, paint_plain
from sandbox.prediction import Prediction

#: Drawing is CPU work in C that mostly lets go of the interpreter; more threads do not help.
PAINTERS = 2


class Gallery:
    """Every output picture, by content: the same model, input and seed give the same bytes."""

    def __init__(self, config: SandboxConfig) -> None:
        self._plain = config.pictures == "plain"
        self._room = config.cache_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._used = 0
        self._under_way: dict[str, asyncio.Future[bytes]] = {}
        self._painters = ThreadPoolExecutor(PAINTERS, thread_name_prefix="painter")

    def close(self) -> None:
        """Let the painters go; a picture under way is finished and thrown away."""
        self._painters.shutdown(wait=False, cancel_futures=True)

    def clear(self) -> None:
        """Throw the kept pictures away."""
        self._kept.clear()
        self._used = 0

    async def picture(self, prediction: Prediction, index: int) -> bytes:
        """Return the bytes of one output, drawing it if need be."""
        commission = commission_of(prediction, index)
        if self._plain:
            return paint_plain(commission)
        key = commission.key()
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        under_way = self._under_way.get(key)
        if under_way is None:
            loop = asyncio.get_running_loop()
            under_way = loop.run_in_executor(self._painters, paint, commission)
            self._under_way[key] = under_way
            under_way.add_done_callback(lambda done: self._keep(key, done))
        return await asyncio.shield(under_way)

    async def inline(self, prediction: Prediction) -> list[str] | str:
        """Return the output with the pictures inside, as data: URIs."""
        kind = CONTENT_TYPES[prediction.order.format]
        uris = []
        for index in range(prediction.plan.count):
            picture = await self.picture(prediction, index)
            uris.append(f"data:{kind};base64,{base64.b64encode(picture).decode()}")
        return uris if prediction.model.makes_list else uris[0]

    def _keep(self, key: str, done: asyncio.Future[bytes]) -> None:
        self._under_way.pop(key, None)
        if done.cancelled() or done.exception() is not None:
            return
        picture = done.result()
        self._kept[key] = picture
        self._used += len(picture)
        while self._used > self._room and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self._used -= len(dropped)


GALLERY: web.AppKey[Gallery] = web.AppKey("gallery", Gallery)


def commission_of(prediction: Prediction, index: int) -> Commission:
    """Say what is to be drawn for one output of a prediction."""
    order = prediction.order
    given = {
        k: v for k, v in prediction.given.items() if k not in ("seed", "output_format")
    }
    return Commission(
        prompt=prediction.prompt,
        subject=f"{prediction.model.ref} {sorted(given.items())}",
        seed=prediction.seed,
        index=index,
        width=order.width,
        height=order.height,
        format=order.format,
        quality=order.quality,
        transparent=order.transparent,
    )
