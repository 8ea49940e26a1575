"""Certificates to sign pictures with, made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Kind = Literal["es256", "es384", "ed25519"]
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of two certificates and the key of the first, as files."""

    certificate: Path
    key: Path
    root: str  # PEM


def make_chain(folder: Path, *, kind: Kind = "es256", lives: timedelta = _DAY) -> Chain:
    """Make a root, and a certificate that may sign; with a negative life it is over."""
    folder.mkdir(parents=True, exist_ok=True)
    root_key = ec.generate_private_key(ec.SECP256R1())
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
    if kind == "ed25519":
        key = ed25519.Ed25519PrivateKey.generate()
    else:
        curve = ec.SECP256R1() if kind == "es256" else ec.SECP384R1()
        key = ec.generate_private_key(curve)
    end = datetime.now(UTC) + lives
    root = _signed(_name("root"), root_key.public_key(), root_key, end, is_root=True)
    leaf = _signed(_name("leaf"), key.public_key(), root_key, end, is_root=False)
    pem = serialization.Encoding.PEM
    chain = Chain(
        folder / "chain.pem", folder / "key.pem", root.public_bytes(pem).decode()
    )
    chain.certificate.write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    chain.key.write_bytes(
        key.private_bytes(
            pem,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return chain


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _signed(
    name: x509.Name,
    public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
    root_key: ec.EllipticCurvePrivateKey,
    end: datetime,
    *,
    is_root: bool,
) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=not is_root,
        key_cert_sign=is_root,
        crl_sign=is_root,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    draft = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(_name("root"))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - 30 * _DAY)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(is_root, 1 if is_root else None), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
    )
    if not is_root:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(
            root_key.public_key()
        )
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        draft = draft.add_extension(issuer, False).add_extension(purpose, False)
    return draft.sign(root_key, hashes.SHA256())
