"""A file with some bytes replaced, without copying it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer  # exists for type checkers only


@dataclass(frozen=True, slots=True)
class Edit:
    """Put `new` in place of the bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int
    new: bytes


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the result: bytes of its own, or `length` bytes of the file at `at`."""

    begin: int
    length: int
    at: int = 0
    own: bytes | None = None


class Patched(io.RawIOBase):
    """Reads the file as it would be after the edits; the file stays as it is, and open.

    Edits must not overlap.  Memory use does not depend on the size of the file.
    """

    def __init__(self, file: IO[bytes], size: int, edits: Iterable[Edit]) -> None:
        self._file = file
        self._pieces = _pieces(size, sorted(edits, key=lambda edit: edit.start))
        last = self._pieces[-1]
        self.size = last.begin + last.length
        self._position = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read from anywhere."""
        return True

    def tell(self) -> int:
        """Say where the next read starts."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere, as any file does."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        self._position = max(0, base[whence] + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer as far as one piece reaches; 0 at the end."""
        target = memoryview(buffer).cast("B")
        for piece in self._pieces:
            skipped = self._position - piece.begin
            if 0 <= skipped < piece.length:
                wanted = min(len(target), piece.length - skipped)
                found = self._read(piece, skipped, wanted)
                target[: len(found)] = found
                self._position += len(found)
                return len(found)
        return 0

    def _read(self, piece: _Piece, skipped: int, wanted: int) -> bytes:
        if piece.own is not None:
            return piece.own[skipped : skipped + wanted]
        self._file.seek(piece.at + skipped)
        return self._file.read(wanted)


def patched(file: IO[bytes], size: int, edits: Sequence[Edit]) -> IO[bytes]:
    """Give the file as it would be after the edits; `size` is what it has before."""
    return io.BufferedReader(Patched(file, size, edits), 256 * 1024)


def _pieces(size: int, edits: Sequence[Edit]) -> list[_Piece]:
    found: list[_Piece] = []
    position, begin = 0, 0
    for edit in edits:
        if not position <= edit.start <= edit.stop <= size:
            raise ValueError("edits must lie inside the file and not overlap")
        found.append(_Piece(begin, edit.start - position, at=position))
        begin += edit.start - position
        found.append(_Piece(begin, len(edit.new), own=edit.new))
        begin += len(edit.new)
        position = edit.stop
    found.append(_Piece(begin, size - position, at=position))
    return found
