"""Have a picture say that a model made it, without touching a pixel.

The marker is an XMP packet with IPTC's digital source type, put into the file's container.  It
is the same for all pictures of a kind, so that equal pictures stay one file.  Whatever cannot
be marked is stored as it came: a marker is never a reason to lose a picture.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Final

from app.domain.provenance import Provenance, SourceType
from app.services import bmff, xmp_places
from app.services.patched import patched
from app.services.pictures import AVIF, GIF, JPEG, PNG, WEBP
from app.services.xmp_places import Place, Unmarkable

_PLACES: Final[Mapping[str, Callable[[memoryview], Place]]] = {
    PNG.extension: xmp_places.png,
    JPEG.extension: xmp_places.jpeg,
    WEBP.extension: xmp_places.webp,
    GIF.extension: xmp_places.gif,
    AVIF.extension: bmff.avif,
}

_RDF: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_IPTC: Final = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
# An element, or an attribute, of that name: its prefix is the writer's own.
_DECLARED: Final = re.compile(
    rb"<[\w.-]+:DigitalSourceType[\s/>]|\s[\w.-]+:DigitalSourceType\s*="
)
_END_OF_RDF: Final = re.compile(rb"</(?:[\w.-]+:)?RDF\s*>")
_ABOUT: Final = re.compile(rb"""\sr[\w.-]*:about\s*=\s*("[^"<]*"|'[^'<]*')""")


@dataclass(frozen=True, slots=True)
class Marked:
    """A file as it is to be stored, and what it says of its origin."""

    file: IO[bytes]
    provenance: Provenance


def mark(file: IO[bytes], extension: str, source: SourceType) -> Marked:
    """Give the file with the marker; as it is where it has one, or credentials, or no room.

    The file is a picture of the kind, and stays open; what is given reads through it.  Takes
    no copy.  Whatever the container is like, this raises nothing.
    """
    try:
        with _viewed(file) as data:
            place, size = _PLACES[extension](data), len(data)
        if place.has_credentials:
            return Marked(file, Provenance.CREDENTIALS)
        if place.packet is not None and _DECLARED.search(place.packet):
            return Marked(file, Provenance.PRESENT)
        edits = place.put(packet_for(source, place.packet))
        return Marked(patched(file, size, edits), Provenance.MARKED)
    except (Unmarkable, IndexError, ValueError, struct.error):
        return Marked(file, Provenance.NONE)


def packet_for(source: SourceType, old: bytes | None = None) -> bytes:
    """Give the packet with the marker: a new one, or the old one and one property more."""
    if old is None:
        return _NEW % _description(source, b'""')
    ends = list(_END_OF_RDF.finditer(old))
    if not ends:
        raise Unmarkable("a packet without properties")
    about = _ABOUT.search(old)
    added = _description(source, about[1] if about else b'""')
    at = ends[-1].start()
    return old[:at] + added + old[at:]


_NEW: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<rdf:RDF xmlns:rdf="{_RDF}">%s</rdf:RDF>'
    '</x:xmpmeta><?xpacket end="w"?>'
).encode()


def _description(source: SourceType, about: bytes) -> bytes:
    """Give the property, with names of its own: those of the packet may mean anything."""
    opened = f'<rdf:Description xmlns:rdf="{_RDF}" rdf:about='.encode() + about
    told = (
        f' xmlns:Iptc4xmpExt="{_IPTC}"><Iptc4xmpExt:DigitalSourceType>{source.value}'
        "</Iptc4xmpExt:DigitalSourceType></rdf:Description>"
    )
    return opened + told.encode()


@contextmanager
def _viewed(file: IO[bytes]) -> Iterator[memoryview]:
    """Look at all bytes of a file without reading them."""
    if isinstance(file, io.BytesIO):
        with file.getbuffer() as view:
            yield view
        return
    file.flush()
    with (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        yield view
