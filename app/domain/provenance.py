"""Where a picture came from, in the words of IPTC; and what a stored file says of it."""

from __future__ import annotations

from enum import StrEnum

_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"


class SourceType(StrEnum):
    """IPTC's digital source type (cv.iptc.org/newscodes/digitalsourcetype, 2026-11)."""

    MADE = _VOCABULARY + "trainedAlgorithmicMedia"
    MADE_OF_PICTURES = _VOCABULARY + "compositeWithTrainedAlgorithmicMedia"

    @classmethod
    def of(cls, *, has_pictures: bool) -> SourceType:
        """Name what a model made, from words alone or with pictures among its inputs."""
        return cls.MADE_OF_PICTURES if has_pictures else cls.MADE


class Provenance(StrEnum):
    """What a stored output says of its origin, and who put it there."""

    MARKED = "marked"  # the marker, added here
    PRESENT = "present"  # a source type it came with; kept byte for byte
    CREDENTIALS = "credentials"  # C2PA credentials it came with; kept byte for byte
    SIGNED = "signed"  # marked and signed here, with the operator's certificate
    NONE = "none"  # nothing: its container takes no marker; kept byte for byte
