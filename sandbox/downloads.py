"""Serving the output files, faults included."""

from __future__ import annotations

import asyncio
import hashlib

from aiohttp import web

from sandbox import answers
from sandbox.catalogue import CONTENT_TYPES
from sandbox.create import BOOK, FAULTS
from sandbox.faults import Strike, Subject
from sandbox.gallery import GALLERY
from sandbox.painter import bomb
from sandbox.prediction import Prediction

routes = web.RouteTableDef()


@routes.get("/files-out/{id}/{name}")
async def serve_output(request: web.Request) -> web.StreamResponse:
    """Serve an output file to anybody who has its address, until the hour is over."""
    prediction = request.app[BOOK].find(request.match_info["id"])
    index = (
        None if prediction is None else _index(prediction, request.match_info["name"])
    )
    if prediction is None or index is None:
        return web.Response(status=404, text="Not found\n")
    subject = Subject(
        prompt=prediction.prompt,
        model=prediction.model.ref,
        prediction_id=prediction.id,
    )
    strike = request.app[FAULTS].strike("download", subject)
    if strike is not None and strike.name in _WITHOUT_PICTURE:
        return _spoil_without_picture(strike, CONTENT_TYPES[prediction.order.format])
    picture = await request.app[GALLERY].picture(prediction, index)
    headers = {
        "Content-Type": CONTENT_TYPES[prediction.order.format],
        "ETag": f'"{hashlib.md5(picture, usedforsecurity=False).hexdigest()}"',
        "Cache-Control": "public, max-age=3600",
        "X-Sandbox": "not made by the real model",
    }
    if strike is not None:
        return await _spoil_picture(request, strike, picture, headers)
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return web.Response(status=304, headers={"ETag": headers["ETag"]})
    return web.Response(body=picture, headers=headers)


def _index(prediction: Prediction, name: str) -> int | None:
    """Return which output has this name, None when there is none (any more)."""
    if prediction.output_at is None or prediction.data_removed:
        return None
    names = [prediction.file_name(index) for index in range(prediction.plan.count)]
    return names.index(name) if name in names else None


_WITHOUT_PICTURE = frozenset(
    {
        "download.error",
        "download.not_found",
        "download.html",
        "download.redirect",
        "download.bomb",
    }
)


def _spoil_without_picture(strike: Strike, content_type: str) -> web.Response:
    match strike.name:
        case "download.not_found":
            return web.Response(status=404, text="Not found\n")
        case "download.redirect":
            return web.Response(
                status=302, headers={"Location": str(strike.params["location"])}
            )
        case "download.bomb":
            body = bomb(int(strike.params["side"]))
            return web.Response(body=body, content_type="image/png")
        case "download.html":
            page = answers.HTML.format(status=200).encode()
            return web.Response(body=page, content_type=content_type)
    return answers.spoilt(strike)


async def _spoil_picture(
    request: web.Request, strike: Strike, picture: bytes, headers: dict[str, str]
) -> web.StreamResponse:
    params = strike.params
    match strike.name:
        case "download.truncated":
            sent = int(len(picture) * float(params["share"]))
            return await answers.cut_short(request, picture, sent=sent, headers=headers)
        case "download.slow":
            return await _trickle(
                request, picture, headers, int(params["bytes_per_second"])
            )
        case "download.wrong_magic":
            return web.Response(body=b"\x00" * 16 + picture[16:], headers=headers)
        case "download.wrong_type":
            headers["Content-Type"] = str(params["content_type"])
            return web.Response(body=picture, headers=headers)
        case "download.oversized":
            return await _inflate(request, picture, headers, int(params["bytes"]))
    return web.Response(body=picture, headers=headers)


async def _trickle(
    request: web.Request, picture: bytes, headers: dict[str, str], per_second: int
) -> web.StreamResponse:
    """Send the picture slowly, ten pieces a second."""
    response = web.StreamResponse(headers=headers)
    response.content_length = len(picture)
    await response.prepare(request)
    piece = max(1, per_second // 10)
    for start in range(0, len(picture), piece):
        await response.write(picture[start : start + piece])
        await asyncio.sleep(0.1)
    return response


async def _inflate(
    request: web.Request, picture: bytes, headers: dict[str, str], size: int
) -> web.StreamResponse:
    """Send the picture and then zeros, without saying how much there will be."""
    response = web.StreamResponse(headers=headers)
    response.enable_chunked_encoding()
    await response.prepare(request)
    await response.write(picture)
    left = size - len(picture)
    zeros = bytes(64 * 1024)
    while left > 0:
        await response.write(zeros[: min(left, len(zeros))])
        left -= len(zeros)
    return response
