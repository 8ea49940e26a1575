"""Read the one file of a request as it streams in: a multipart part, or the whole body.

Nothing is spooled here and no part is held: what the parser finds in a chunk of the request is
passed on before the next chunk is asked for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from email.message import Message
from typing import Final

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from starlette.exceptions import HTTPException

from app.api.bodies import timed_chunks
from app.domain.errors import InvalidRequest

FIELD: Final = "file"
_AROUND: Final = 16 * 1024  # bytes of a multipart body that are not the file's
_MOST_HEADERS: Final = 8  # of a part
_LONGEST_HEADER: Final = 4096
_LONGEST_TYPE: Final = 512
_LONGEST_BOUNDARY: Final = 70  # RFC 2046, section 5.1.1


def file_of(request: Request, *, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Give the bytes of the request's file.

    Raises, here or while it is read: 415 for another media type, 413 beyond `max_bytes`, 408 and
    400 as `timed_chunks` does; `InvalidRequest` for a form that is not one part named `file`.
    """
    kind, boundary = _media_type(request)
    limit = max_bytes + (_AROUND if boundary is not None else 0)
    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise _too_large(max_bytes)
    chunks = timed_chunks(request)
    if boundary is None:
        return _bounded(chunks, max_bytes)
    return _part_of(chunks, boundary, max_bytes)


def _media_type(request: Request) -> tuple[str, str | None]:
    """Name the media type, and the boundary of a form; raise for what is not taken."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    given = request.headers.get("content-type", "")
    said = Message()
    # Reading many semicolons within quotes takes the library the square of their number.
    said["content-type"] = given if len(given) <= _LONGEST_TYPE else ""
    kind = said.get_content_type() if said["content-type"] else ""
    is_form = kind == "multipart/form-data"
    if encoding != "identity" or not (is_form or kind.startswith("image/")):
        raise HTTPException(
            415,
            "Send multipart/form-data with one part named file, or the picture itself "
            "with its image/… type, not compressed once more.",
        )
    if not is_form:
        return kind, None
    boundary = _parameter(said, "boundary", "content-type")
    if not isinstance(boundary, str) or not 0 < len(boundary) <= _LONGEST_BOUNDARY:
        raise _broken("The Content-Type has no sensible boundary.")
    return kind, boundary


async def _bounded(
    chunks: AsyncGenerator[bytes, None], max_bytes: int
) -> AsyncGenerator[bytes, None]:
    size = 0
    async with aclosing(chunks):
        async for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            yield chunk


async def _part_of(
    chunks: AsyncGenerator[bytes, None], boundary: str, max_bytes: int
) -> AsyncGenerator[bytes, None]:
    """Give the bytes of the one part; ends only after the whole form was seen to be right."""
    form = _Form(boundary)
    size, around = 0, _AROUND
    async with aclosing(chunks):
        async for chunk in chunks:
            pieces = form.feed(chunk)
            found = sum(len(piece) for piece in pieces)
            size += found
            around -= len(chunk) - found
            if size > max_bytes:
                raise _too_large(max_bytes)
            if around < 0:
                raise _broken("The form has too much in it besides the file.")
            for piece in pieces:
                yield piece
    if not form.is_whole:
        raise _broken("The form breaks off.")
    if not form.has_file:
        raise InvalidRequest(f"{FIELD} is required: one part.", field=FIELD)


def _parameter(said: Message, name: str, header: str) -> object:
    """Read a parameter of a header: a text when it is written plainly, once."""
    try:
        return said.get_param(name, header=header)
    except (TypeError, ValueError):
        # Pieces (RFC 2231) whose numbers the library cannot sort, or read.
        return None


class _Form:
    """What is known of a form so far."""

    def __init__(self, boundary: str) -> None:
        self.is_whole = False
        self.has_file = False
        self._pieces: list[bytes] = []
        self._name = bytearray()
        self._value = bytearray()
        self._said: Message = Message()
        self._parser = MultipartParser(
            boundary.encode("latin-1", "replace"),
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_name,
                "on_header_value": self._add_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._add_data,
                "on_end": self._end,
            },
            max_header_count=_MOST_HEADERS,
            max_header_size=_LONGEST_HEADER,
        )

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take a chunk of the form; give the bytes of the file that were in it."""
        self._pieces = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _broken("The form is malformed.") from error
        return self._pieces

    def _begin_part(self) -> None:
        self._said = Message()

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        name, value = self._name.decode("latin-1"), self._value.decode("latin-1")
        self._name.clear()
        self._value.clear()
        if name.lower() == "content-disposition" and name not in self._said:
            self._said[name] = value

    def _end_headers(self) -> None:
        name = _parameter(self._said, "name", "content-disposition")
        if name != FIELD:
            # The name is a stranger's, and not repeated.
            raise InvalidRequest(
                f"The form may have one part named {FIELD}, and no other.", field=FIELD
            )
        if self.has_file:
            raise InvalidRequest("Send one file at a time.", field=FIELD)
        self.has_file = True

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _end(self) -> None:
        self.is_whole = True


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"The file must be at most {max_bytes} bytes.")


def _broken(text: str) -> HTTPException:
    return HTTPException(400, text)
