"""`smartmops federate-keys`: an authority of your own, the server's certificate, and one key pair for each client.

Knows files and curves. What leaves this folder, and to whom, is said by its layout: `server/` goes to the server, each
`clients/NAME/` to that client's machine, and `ca.key` to nobody.
"""

from __future__ import annotations

import os
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from smartmops.checks.errors import FederationError, MissingExtra
from smartmops.checks.limits import check
from smartmops.options.federation import KeysConfig
from smartmops.progress.bars import console

from .knocks import KEY, SIGNATURE, TIME


def make_keys(config: KeysConfig) -> list[Path]:
    """Write what is missing; returns the files written.

    Raises:
        FederationError: no clients are named, one twice, or by a name that is no file name; or no host.
        MissingExtra: `cryptography` is missing.
    """
    check(config)
    written = []
    if not (config.out / "ca.key").is_file():
        written += _authority_and_server(config)
    certificate = (config.out / "server" / "ca.crt").read_bytes()
    for name in config.clients:
        private = config.out / "clients" / name / "client.key"
        if not private.is_file():
            written.append(_write(config.out, private.with_name("ca.crt"), certificate))
            written += _node_key(config.out, private, config.out / "server" / "clients" / f"{name}.pub")
    console.print(f"{len(written)} files written to {config.out}: copy {config.out / 'server'} to the server, each "
                  f"folder in {config.out / 'clients'} to that client, {config.out / 'ca.key'} nowhere")  # fmt: skip
    return written


def _write(out: Path, file: Path, content: bytes, secret: bool = False) -> Path:
    """A file, whole or not at all; a secret one is nobody else's from its first moment on.

    What a kill leaves lies in `out` itself, which is copied to nobody.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = out / f".{file.name}.tmp"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if secret else 0o644), "wb") as handle:
        handle.write(content)
    os.replace(fresh, file)
    return file


def _authority_and_server(config: KeysConfig) -> list[Path]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise MissingExtra("keys need cryptography: pip install 'smartmops[federated]'") from error

    def named(words: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, words)])

    def begun(subject: Any, key: Any) -> Any:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder().subject_name(subject).issuer_name(authority).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=config.days))
        )  # fmt: skip

    def usage(**allowed: bool) -> Any:
        every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
                 "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
        return x509.KeyUsage(**dict.fromkeys(every, False) | allowed)

    def pem(key: Any) -> bytes:
        found: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                         serialization.NoEncryption())  # fmt: skip
        return found

    authority = named("smartmops federation")
    ca, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    itself = x509.SubjectKeyIdentifier.from_public_key(ca.public_key())
    root = (
        begun(authority, ca).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True).add_extension(itself, critical=False)
        .sign(ca, hashes.SHA384())
    )  # fmt: skip
    # Flower's own processes on the server's machine come over loopback, whatever the clients call it.
    hosts = dict.fromkeys([*config.hosts, "localhost", "127.0.0.1"])
    leaf = (
        begun(named(config.hosts[0]), server)
        .add_extension(x509.SubjectAlternativeName([_alternative(x509, host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(itself), critical=False)
        .sign(ca, hashes.SHA384())
    )  # fmt: skip
    place = config.out / "server"
    return [
        _write(config.out, place / "ca.crt", root.public_bytes(serialization.Encoding.PEM)),
        _write(config.out, place / "server.crt", leaf.public_bytes(serialization.Encoding.PEM)),
        _write(config.out, place / "server.key", pem(server), secret=True),
        _write(config.out, config.out / "ca.key", pem(ca), secret=True),  # the last: where it is, all are
    ]


def _alternative(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _node_key(out: Path, private: Path, public: Path) -> list[Path]:
    """As Flower reads them: P-384 in OpenSSH's format."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
                               serialization.NoEncryption())  # fmt: skip
    shown = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return [_write(out, public, shown + b"\n"), _write(out, private, secret, secret=True)]  # where the last is, all are


def signed_now(private: Path) -> dict[str, str]:
    """Headers by which the holder of a client's key shows who it is, as Flower's nodes make them.

    Raises:
        FederationError: the file holds no key that `federate-keys` made.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_ssh_private_key(private.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FederationError(f"{private} holds no client's key ({error}): copy it again from where `smartmops "
                              "federate-keys` made it") from error  # fmt: skip
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FederationError(f"{private} holds a {type(key).__name__}, a client's key is one of an elliptic curve: "
                              "make it with `smartmops federate-keys`")  # fmt: skip
    stamp = datetime.now(UTC).isoformat()
    shown = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {KEY: b64encode(shown).decode(), TIME: stamp, SIGNATURE: b64encode(signature).decode()}
