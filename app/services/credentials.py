"""Put C2PA credentials of the operator's into pictures that were made here.

Off unless there is a certificate.  The library is asked for then, and not before: it is large,
and most deployments do without.  Time stamps are not asked for: each picture would wait for
somebody else's server.
"""

from __future__ import annotations

import importlib
import io
import json
import tempfile
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Final, cast

from PIL import Image

from app import __version__
from app.core.patience import within
from app.domain.errors import Unavailable
from app.domain.provenance import SourceType
from app.services import strays
from app.services.ledger import PATIENCE, Ledger

INSTALL: Final = "pip install 'c2pa-python>=0.38'"
_ALGORITHMS: Final = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")
_IN_MEMORY: Final = 8 * 1024 * 1024  # bytes of one signed picture
_SETTINGS: Final = {
    "builder": {"thumbnail": {"enabled": False}},
    # Read back once, at start: see `load_certificate`.
    "verify": {"verify_after_sign": False},
}


class UnusableCertificate(Exception):
    """The certificate or its key cannot be signed with; says why, without showing either."""


class Certificate:
    """Signs pictures.  May be used by several threads at once."""

    def __init__(
        self, library: ModuleType, algorithm: str, chain: bytes, key: bytes
    ) -> None:
        self._library = library
        self._algorithm = algorithm
        self._chain = chain
        self._key = key

    def sign(self, file: IO[bytes], content_type: str, source: SourceType) -> IO[bytes]:
        """Give a signed copy, the caller's to close; raise `ValueError` where none can be."""
        library = self._library
        signed = tempfile.SpooledTemporaryFile(_IN_MEMORY)
        try:
            settings = library.Settings.from_dict(_SETTINGS)
            info = library.C2paSignerInfo(self._algorithm, self._chain, self._key, None)
            builder = library.Builder(_definition(source), library.Context(settings))
            signer = library.Signer.from_info(info)
            builder.sign(signer, content_type, file, signed)
        except library.C2paError as error:
            signed.close()
            raise ValueError(f"the library refused: {error}") from error
        return cast(IO[bytes], signed)


class Credentials:
    """Signs what is stored, and sees that no signed file is left over."""

    def __init__(self, ledger: Ledger, certificate: Certificate) -> None:
        self._ledger = ledger
        self._certificate = certificate

    async def announce(self, key: str) -> None:
        """Note that the file is about to be stored; raise `Unavailable`."""
        try:
            await within(PATIENCE, self._note(key))
        except TimeoutError as error:
            raise Unavailable("The database does not answer in time.") from error

    async def _note(self, key: str) -> None:
        async with self._ledger.transaction() as conn:
            await strays.note(conn, key)

    def sign(self, file: IO[bytes], content_type: str, source: SourceType) -> IO[bytes]:
        """Give a signed copy: see `Certificate.sign`."""
        return self._certificate.sign(file, content_type, source)


def load_certificate(chain: Path, key: Path) -> Certificate:
    """Read a chain of certificates and the key of the first, both PEM, and try them.

    Raise `UnusableCertificate` for whatever would keep pictures from being signed.
    """
    try:
        library = importlib.import_module("c2pa")
    except (ImportError, OSError) as error:
        raise UnusableCertificate(
            f"needs a package that is not installed: {INSTALL}"
        ) from error
    found = _read(chain, "the certificate"), _read(key, "the key")
    why = "the key is of no kind that C2PA signs with"
    for algorithm in _ALGORITHMS:
        certificate = Certificate(library, algorithm, *found)
        try:
            why = _objection(library, certificate)
        except ValueError as error:
            # Most say only that the key is of another kind.
            if "private key" not in str(error):
                why = str(error)
            continue
        if not why:
            return certificate
        break
    raise UnusableCertificate(f"cannot be signed with: {why}")


def _read(path: Path, what: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableCertificate(
            f"cannot be used: {what} cannot be read ({error.strerror})"
        ) from error
    if b"-----BEGIN" not in content:
        raise UnusableCertificate(f"cannot be used: {what} is no PEM file")
    return content


def _objection(library: ModuleType, certificate: Certificate) -> str:
    """Sign a sample and read it back; say what is wrong, nothing when it is well."""
    sample = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sample, "PNG")
    sample.seek(0)
    with closing(certificate.sign(sample, "image/png", SourceType.MADE)) as signed:
        signed.seek(0)
        reader = library.Reader("image/png", signed)
        told: dict[str, Any] = json.loads(reader.json())
    if told.get("validation_state") in ("Valid", "Trusted"):
        return ""
    codes = [one["code"] for one in told.get("validation_status", ())]
    return ", ".join(codes) or "its signature is not valid"


def _definition(source: SourceType) -> dict[str, Any]:
    """Say what is claimed: that this software created the picture with a model."""
    software = {"name": "mediagen", "version": __version__}
    created = {"action": "c2pa.created", "digitalSourceType": source.value}
    actions = {"label": "c2pa.actions.v2", "data": {"actions": [created]}}
    return {"claim_generator_info": [software], "assertions": [actions]}
