"""Keys: who may read what, what they certify, and that nothing there is overwritten."""

from __future__ import annotations

import os
import stat
from datetime import datetime, timedelta, tzinfo
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key, load_ssh_public_key

from smartmops.checks.errors import FederationError
from smartmops.deployment.keys import KeysConfig, make_keys


def test_secret_files_are_their_owners_alone_and_the_authority_signed_the_server(tmp_path: Path) -> None:
    written = make_keys(KeysConfig(out=tmp_path, clients=("berlin",), hosts=("fed.example.org", "10.0.0.7")))
    secret = {file for file in written if file.suffix == ".key"}
    assert {file.name for file in secret} == {"ca.key", "server.key", "client.key"}
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in secret)
    authority = x509.load_pem_x509_certificate((tmp_path / "server" / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server" / "server.crt").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("10.0.0.7"), ip_address("127.0.0.1")]
    key = load_pem_private_key((tmp_path / "server" / "server.key").read_bytes(), None)
    assert key.public_key() == server.public_key()
    private = load_ssh_private_key((tmp_path / "clients" / "berlin" / "client.key").read_bytes(), None)
    assert load_ssh_public_key((tmp_path / "server" / "clients" / "berlin.pub").read_bytes()) == private.public_key()
    assert (tmp_path / "clients" / "berlin" / "ca.crt").read_bytes() == (tmp_path / "server" / "ca.crt").read_bytes()


def test_a_client_is_added_later_and_nothing_else_changes(tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in make_keys(KeysConfig(out=tmp_path, clients=("berlin",)))}
    added = make_keys(KeysConfig(out=tmp_path, clients=("berlin", "paris")))
    assert sorted(file.name for file in added) == ["ca.crt", "client.key", "paris.pub"]
    assert all(file.read_bytes() == content for file, content in before.items())


def certificate(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def test_a_host_is_added_later_under_the_same_keys(tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in make_keys(KeysConfig(out=tmp_path, clients=("berlin",)))}
    written = make_keys(KeysConfig(out=tmp_path, clients=("berlin",), hosts=("fed.example.org",)))
    assert written == [tmp_path / "server" / "server.crt"]
    made = certificate(written[0])
    made.verify_directly_issued_by(certificate(tmp_path / "clients" / "berlin" / "ca.crt"))
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fed.example.org"]
    assert all(file.read_bytes() == content for file, content in before.items() if file not in written)
    assert make_keys(KeysConfig(out=tmp_path, clients=("berlin",))) == []  # what is certified stays so


def test_days_are_added_later_and_the_authority_lasts_as_long(tmp_path: Path) -> None:
    place = tmp_path / "server"
    make_keys(KeysConfig(out=tmp_path, clients=("berlin",), days=30))
    old = certificate(place / "ca.crt")
    assert make_keys(KeysConfig(out=tmp_path, clients=("berlin",), days=30)) == []
    written = make_keys(KeysConfig(out=tmp_path, clients=("berlin", "paris"), days=400))
    assert {"server.crt", "ca.crt", "client.key", "paris.pub"} == {file.name for file in written}
    for folder in (place, tmp_path / "clients" / "berlin", tmp_path / "clients" / "paris"):
        root = certificate(folder / "ca.crt")
        made = certificate(place / "server.crt")
        made.verify_directly_issued_by(root)
        made.verify_directly_issued_by(old)  # whose copies are out there
        assert root.not_valid_after_utc - old.not_valid_after_utc > timedelta(days=369)
        assert made.not_valid_after_utc - old.not_valid_after_utc > timedelta(days=369)


def test_an_expired_certificate_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_keys(KeysConfig(out=tmp_path, clients=("berlin",), days=1))

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=2)

    monkeypatch.setattr("smartmops.deployment.keys.datetime", Later)
    assert {file.name for file in make_keys(KeysConfig(out=tmp_path, clients=("berlin",)))} == {"server.crt", "ca.crt"}


def test_a_file_of_the_authority_that_holds_nothing_is_named(tmp_path: Path) -> None:
    make_keys(KeysConfig(out=tmp_path, clients=("berlin",)))
    (tmp_path / "ca.key").write_text("nothing")
    with pytest.raises(FederationError, match=r"ca\.key holds no key .*give another --out"):
        make_keys(KeysConfig(out=tmp_path, clients=("berlin",), hosts=("fed.example.org",)))
    (tmp_path / "server" / "server.crt").write_text("nothing")
    with pytest.raises(FederationError, match=r"server\.crt holds no certificate"):
        make_keys(KeysConfig(out=tmp_path, clients=("berlin",)))


@pytest.mark.parametrize("whole", range(7))
def test_keys_that_could_not_all_be_written_are_made_by_the_same_command_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    left, replace = iter(range(whole)), os.replace

    def stopped(fresh: Path, file: Path) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        replace(fresh, file)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(OSError, match="No space left"):
        make_keys(KeysConfig(out=tmp_path, clients=("berlin",)))
    monkeypatch.setattr(os, "replace", replace)
    make_keys(KeysConfig(out=tmp_path, clients=("berlin",)))
    authority = x509.load_pem_x509_certificate((tmp_path / "clients" / "berlin" / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server" / "server.crt").read_bytes())
    server.verify_directly_issued_by(authority)
    private = load_ssh_private_key((tmp_path / "clients" / "berlin" / "client.key").read_bytes(), None)
    assert load_ssh_public_key((tmp_path / "server" / "clients" / "berlin.pub").read_bytes()) == private.public_key()


@pytest.mark.parametrize("whole", range(7))
def test_what_a_kill_leaves_is_copied_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    left, replace = iter(range(whole)), os.replace

    def killed(fresh: Path, file: Path) -> None:
        if next(left, None) is None:
            raise SystemExit(143)
        replace(fresh, file)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        make_keys(KeysConfig(out=tmp_path, clients=("berlin",)))
    assert {file.parent for file in tmp_path.rglob(".*")} == {tmp_path}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clients": ()}, "--clients is given nothing: name at least one"),
        ({"clients": ("a", "a")}, "named twice"),
        ({"clients": ("../a",)}, "no file name"),
        ({"clients": ("a",), "hosts": ()}, "--hosts is given nothing"),
    ],
)
def test_bad_names_are_refused_before_anything_is_written(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_keys(KeysConfig(out=tmp_path / "keys", **settings))
    assert not (tmp_path / "keys").exists()
