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

AUTHORITY = "smartmops federation"


def make_keys(config: KeysConfig) -> list[Path]:
    """Write what is missing, and certify hosts and days that the server's certificate lacks; returns the files written.

    The authority's key and the server's stay as they are, so that clients go on trusting a certificate made later.

    Raises:
        FederationError: no clients are named, one twice, or by a name that is no file name; no host; or a file there
            holds no key or certificate.
        MissingExtra: `cryptography` is missing.
    """
    check(config)
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingExtra("keys need cryptography: pip install 'smartmops[federated]'") from error
    begun = (config.out / "ca.key").is_file()
    written = _renewed(config) if begun else _authority_and_server(config)
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
    from cryptography.hazmat.primitives.asymmetric import ec

    ca, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    place = config.out / "server"
    return [
        _write(config.out, place / "ca.crt", _root(ca, config.days)),
        _write(config.out, place / "server.crt", _leaf(ca, server, _hosts(config), config.days)),
        _write(config.out, place / "server.key", _pem(server), secret=True),
        _write(config.out, config.out / "ca.key", _pem(ca), secret=True),  # the last: where it is, all are
    ]


def _hosts(config: KeysConfig) -> list[str]:
    """Flower's own processes on the server's machine come over loopback, whatever the clients call it."""
    return [*dict.fromkeys([*config.hosts, "localhost", "127.0.0.1"])]


def _renewed(config: KeysConfig) -> list[Path]:
    """Certificates of the keys that are there, where hosts or days are asked for that they lack."""
    place, by_default = config.out / "server", KeysConfig(clients=()).days
    had, root = _certificate(place / "server.crt"), _certificate(place / "ca.crt")
    known = _certified(had)
    hosts = [*dict.fromkeys([*known, *_hosts(config)])]
    ends = datetime.now(UTC) + timedelta(days=config.days - 1)
    asked = config.days != by_default or had.not_valid_after_utc < datetime.now(UTC)
    if hosts == known and not (asked and had.not_valid_after_utc < ends):
        return []
    ca, server = _private(config.out / "ca.key"), _private(place / "server.key")
    written = [_write(config.out, place / "server.crt", _leaf(ca, server, hosts, config.days))]
    if root.not_valid_after_utc < ends:  # what an authority signs is trusted as long as itself, and no longer
        clients = sorted(each.parent for each in (config.out / "clients").glob("*/client.key"))
        content = _root(ca, config.days)
        written += [_write(config.out, folder / "ca.crt", content) for folder in [*clients, place]]
    return written


def _certificate(file: Path) -> Any:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError as error:
        raise FederationError(f"{file} holds no certificate ({error}): give another --out, for keys of a new "
                              "federation") from error  # fmt: skip


def _certified(certificate: Any) -> list[str]:
    """Names and addresses that a certificate is for."""
    from cryptography import x509

    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(each.value) for each in names]


def _private(file: Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        return serialization.load_pem_private_key(file.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FederationError(f"{file} holds no key that `smartmops federate-keys` made ({error}): give another --out, "
                              "for keys of a new federation") from error  # fmt: skip


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    found: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                     serialization.NoEncryption())  # fmt: skip
    return found


def _root(ca: Any, days: int) -> bytes:
    """The authority's certificate, which vouches for itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    itself = x509.SubjectKeyIdentifier.from_public_key(ca.public_key())
    root = (
        _begun(AUTHORITY, ca, days).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True).add_extension(itself, critical=False)
        .sign(ca, hashes.SHA384())
    )  # fmt: skip
    return root.public_bytes(serialization.Encoding.PEM)  # type: ignore[no-any-return]


def _leaf(ca: Any, server: Any, hosts: list[str], days: int) -> bytes:
    """The server's certificate for these hosts, signed by the authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import ExtendedKeyUsageOID

    itself = x509.SubjectKeyIdentifier.from_public_key(ca.public_key())
    leaf = (
        _begun(hosts[0], server, days)
        .add_extension(x509.SubjectAlternativeName([_alternative(x509, host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(itself), critical=False)
        .sign(ca, hashes.SHA384())
    )  # fmt: skip
    return leaf.public_bytes(serialization.Encoding.PEM)  # type: ignore[no-any-return]


def _begun(subject: str, key: Any, days: int) -> Any:
    """A certificate of a key, from five minutes ago on, for clocks differ."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    def named(words: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, words)])

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named(AUTHORITY))
        .public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(days=days))
    )  # fmt: skip


def _usage(**allowed: bool) -> Any:
    from cryptography import x509

    every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**dict.fromkeys(every, False) | allowed)


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
