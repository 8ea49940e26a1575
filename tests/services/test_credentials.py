"""Pictures signed with the operator's certificate, read back by the library of C2PA."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import c2pa
import pytest
from PIL import Image
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain.policy import Policy
from app.domain.provenance import Provenance, SourceType
from app.services import credentials
from app.services.credentials import (
    Certificate,
    Credentials,
    UnusableCertificate,
    load_certificate,
)
from app.services.housekeeping import REST, RemoveStrays
from app.services.ledger import Ledger
from app.services.media_store import MediaStore, StoredFile, open_media_store
from app.services.pictures import FORMATS
from tests.support.certificates import Chain, Kind, make_chain
from tests.support.drawings import draw
from tests.support.jobs import JobTable
from tests.support.servers import ROOT
from tests.api.two_owners import completed_job

MADE, OF_PICTURES = SourceType.MADE, SourceType.MADE_OF_PICTURES


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def certificate(chain: Chain) -> Certificate:
    return load_certificate(chain.certificate, chain.key)


@pytest.fixture
def ledger(engine: AsyncEngine) -> Ledger:
    return Ledger(engine, Policy())


@pytest.fixture
async def store(
    tmp_path: Path, ledger: Ledger, certificate: Certificate
) -> AsyncIterator[MediaStore]:
    found = open_media_store((tmp_path / "media").as_uri())
    found.sign_with(Credentials(ledger, certificate))
    yield found
    await found.aclose()


async def put(
    store: MediaStore, data: bytes, origin: SourceType | None = MADE
) -> StoredFile:
    async def stream() -> AsyncIterator[bytes]:
        yield data

    return await store.put(stream(), max_bytes=10**7, origin=origin)


def read(content_type: str, content: bytes, root: str | None = None) -> dict[str, Any]:
    """Read credentials as anybody does; with a root, as one who trusts it."""
    context = None
    if root is not None:
        trust = {"trust": {"trust_anchors": root}, "verify": {"verify_trust": True}}
        context = c2pa.Context(c2pa.Settings.from_dict(trust))
    reader = c2pa.Reader(content_type, io.BytesIO(content), context=context)
    return dict(json.loads(reader.json()))


def action_in(told: dict[str, Any]) -> dict[str, Any]:
    active = told["manifests"][told["active_manifest"]]
    (actions,) = [
        one["data"]["actions"]
        for one in active["assertions"]
        if one["label"].startswith("c2pa.actions")
    ]
    (action,) = actions
    return dict(action)


def pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("RGBA").tobytes()


@pytest.mark.parametrize("extension", FORMATS)
async def test_what_was_made_is_signed_and_marked(
    store: MediaStore, tmp_path: Path, chain: Chain, extension: str
) -> None:
    data = draw(1, kind=FORMATS[extension].pillow_name)

    stored = await put(store, data, OF_PICTURES)

    content = (tmp_path / "media" / stored.key).read_bytes()
    assert stored.provenance is Provenance.SIGNED
    assert stored.size_bytes == len(content)
    told = read(stored.content_type, content, chain.root)
    assert told["validation_state"] == "Trusted", told
    assert action_in(told) == {
        "action": "c2pa.created",
        "digitalSourceType": OF_PICTURES.value,
    }
    assert OF_PICTURES.value.encode() in content.replace(b"\0", b"")
    assert pixels(content) == pixels(data)


async def test_a_signed_picture_that_is_changed_is_found_out(
    store: MediaStore, tmp_path: Path
) -> None:
    stored = await put(store, draw(2))
    content = bytearray((tmp_path / "media" / stored.key).read_bytes())
    content[-20] ^= 1

    assert read("image/png", bytes(content))["validation_state"] == "Invalid"


async def test_what_comes_with_credentials_stays_as_it_came(
    store: MediaStore, tmp_path: Path, certificate: Certificate
) -> None:
    for extension, kind in FORMATS.items():
        data = io.BytesIO(draw(3, kind=kind.pillow_name))
        signed = certificate.sign(data, kind.content_type, MADE)
        signed.seek(0)
        content = signed.read()
        signed.close()

        stored = await put(store, content)

        assert stored.provenance is Provenance.CREDENTIALS, extension
        assert (tmp_path / "media" / stored.key).read_bytes() == content


async def test_what_came_in_is_not_signed(store: MediaStore, tmp_path: Path) -> None:
    stored = await put(store, draw(4), None)

    assert stored.provenance is None
    assert (tmp_path / "media" / stored.key).read_bytes() == draw(4)


async def test_many_are_signed_at_once(store: MediaStore, tmp_path: Path) -> None:
    stored = await asyncio.gather(*(put(store, draw(seed)) for seed in range(12)))

    assert {one.provenance for one in stored} == {Provenance.SIGNED}
    for one in stored:
        content = (tmp_path / "media" / one.key).read_bytes()
        assert read("image/png", content)["validation_state"] == "Valid"


async def test_a_picture_that_cannot_be_signed_is_stored_all_the_same(
    store: MediaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> Any:
        raise ValueError("not today")

    monkeypatch.setattr(Certificate, "sign", refuse)

    assert (await put(store, draw(5))).provenance is Provenance.MARKED


# ------------------------------------------------------------------- files nobody recorded


async def _age(engine: AsyncEngine) -> None:
    async with engine.begin() as conn:
        await conn.execute(
            text("UPDATE strays SET noted_at = noted_at - interval '61 minutes'")
        )


async def _noted(engine: AsyncEngine) -> int:
    async with engine.connect() as conn:
        return int(await conn.scalar(text("SELECT count(*) FROM strays")) or 0)


async def test_a_signed_file_that_was_never_recorded_is_removed(
    store: MediaStore, ledger: Ledger, engine: AsyncEngine, tmp_path: Path
) -> None:
    """Two puts of one picture: a worker died after the first, another did it again."""
    lost, recorded = await put(store, draw(6)), await put(store, draw(6))
    await completed_job(JobTable(engine), recorded)
    duty = RemoveStrays(ledger, store)
    assert lost.key != recorded.key

    assert await duty.perform() == REST
    assert (tmp_path / "media" / lost.key).exists(), "it may yet be recorded"
    await _age(engine)
    assert await duty.perform() == REST

    assert not (tmp_path / "media" / lost.key).exists()
    assert (tmp_path / "media" / recorded.key).exists()
    assert await _noted(engine) == 0


async def test_what_is_the_same_each_time_is_not_noted(
    store: MediaStore, engine: AsyncEngine
) -> None:
    await put(store, draw(7), None)

    assert await _noted(engine) == 0


# ----------------------------------------------------------------------- wrong certificates


@pytest.mark.parametrize("kind", ["es384", "ed25519"])
def test_other_kinds_of_keys_are_fine(tmp_path: Path, kind: Kind) -> None:
    made = make_chain(tmp_path, kind=kind)

    signed = load_certificate(made.certificate, made.key).sign(
        io.BytesIO(draw(8)), "image/png", MADE
    )

    signed.seek(0)
    assert read("image/png", signed.read())["validation_state"] == "Valid"
    signed.close()


def test_what_cannot_be_signed_with_is_told(tmp_path: Path, chain: Chain) -> None:
    other = make_chain(tmp_path / "other")
    over = make_chain(tmp_path / "over", lives=timedelta(days=-1))
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN NOTHING-----")
    wrong = {
        "cannot be read": (chain.certificate, tmp_path / "missing.pem"),
        "no PEM file": (chain.certificate, ROOT / "pyproject.toml"),
        "PEM error": (chain.certificate, nonsense),
        "claimSignature": (chain.certificate, other.key),
        "not valid at time": (over.certificate, over.key),
        "parsing certificate": (nonsense, chain.key),
    }
    for words, (certificate, key) in wrong.items():
        with pytest.raises(UnusableCertificate, match=words):
            load_certificate(certificate, key)


def test_without_the_package_the_remedy_is_told(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)

    with pytest.raises(UnusableCertificate, match="pip install"):
        load_certificate(chain.certificate, chain.key)
    assert "c2pa-python" in credentials.INSTALL


def test_a_worker_with_a_wrong_certificate_does_not_start(
    chain: Chain, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none",
        "REDIS_URL": "redis://127.0.0.1:9/0",
        "REPLICATE_API_TOKEN": "r8_for_tests_only",
        "C2PA_CERTIFICATE_FILE": str(chain.certificate),
        "C2PA_PRIVATE_KEY_FILE": str(tmp_path / "missing.pem"),
    }
    for name, wrong in (("C2PA_CERTIFICATE_FILE", "cannot be used: the key"), ("", "")):
        if not name:
            del environment["C2PA_PRIVATE_KEY_FILE"]
            name, wrong = "C2PA_PRIVATE_KEY_FILE", "go together"
        done = subprocess.run(
            [sys.executable, "-c", "import worker.celery_app"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert name in line and wrong in line
