"""Who is let in: known keys, each signed time once, by a clock of the test's own; what strangers leave behind, and what is said."""

from __future__ import annotations

from base64 import b64decode, b64encode
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

from smartmops.deployment import knocks
from smartmops.deployment.keys import KeysConfig, make_keys, signed_now
from smartmops.deployment.knocks import AHEAD, KEY, OLD, SIGNATURE, TIME, Door, Keyring, Knocks, Refused

START = 1_900_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("keys")
    make_keys(KeysConfig(out=found, clients=("berlin", "paris")))
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def door(folder: Path, clock: Clock) -> Door:
    return Door(Keyring(folder / "server" / "clients"), clock)


def private(folder: Path, name: str) -> ec.EllipticCurvePrivateKey:
    found = load_ssh_private_key((folder / "clients" / name / "client.key").read_bytes(), None)
    assert isinstance(found, ec.EllipticCurvePrivateKey)
    return found


def signed(
    key: ec.EllipticCurvePrivateKey, when: float, shown: ec.EllipticCurvePrivateKey | None = None
) -> dict[str, str]:
    stamp = datetime.fromtimestamp(when, UTC).isoformat()
    pem = (shown or key).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {KEY: b64encode(pem).decode(), TIME: stamp, SIGNATURE: b64encode(signature).decode()}


def test_a_known_key_is_let_in_once_for_each_time_it_signed(door: Door, folder: Path) -> None:
    berlin = private(folder, "berlin")
    assert door.admit(signed(berlin, START)) == "berlin"
    assert door.admit(signed(private(folder, "paris"), START)) == "paris"
    assert door.admit(signed(berlin, START + 0.000001)) == "berlin"
    with pytest.raises(Refused, match="seen before: of 'berlin'") as found:
        door.admit(signed(berlin, START))
    assert found.value.status == 401


def test_a_second_signature_that_a_listener_makes_of_a_first_is_refused(door: Door, folder: Path) -> None:
    """(r, n - s) is as good a signature as (r, s), and nobody needs the key to make it."""
    berlin = private(folder, "berlin")
    headers = signed(berlin, START)
    door.admit(headers)
    r, s = decode_dss_signature(b64decode(headers[SIGNATURE]))
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
    other = b64encode(encode_dss_signature(r, order - s)).decode()
    berlin.public_key().verify(encode_dss_signature(r, order - s), headers[TIME].encode(), ec.ECDSA(hashes.SHA256()))
    with pytest.raises(Refused, match="seen before"):
        door.admit(headers | {SIGNATURE: other})


@pytest.mark.parametrize(("age", "taken"), [(OLD - 1, True), (OLD + 1, False), (-AHEAD + 1, True), (-AHEAD - 1, False)])
def test_only_times_of_now_are_taken(door: Door, folder: Path, age: float, taken: bool) -> None:
    headers = signed(private(folder, "berlin"), START - age)
    if taken:
        assert door.admit(headers) == "berlin"
    else:
        with pytest.raises(Refused, match=rf"set both clocks: 'berlin' signed {age:.0f} s ago"):
            door.admit(headers)


def test_strangers_are_told_why_and_leave_nothing_behind(door: Door, folder: Path) -> None:
    mallory, berlin = ec.generate_private_key(ec.SECP384R1()), private(folder, "berlin")
    good = signed(berlin, START)
    for headers, why in [
        ({}, "no signature"),
        ({k: v for k, v in good.items() if k != TIME}, "no signature"),
        (good | {SIGNATURE: "not base64!"}, "no signature"),
        (good | {TIME: "yesterday"}, "no signature"),
        (good | {TIME: "0001-01-01T00:00:00"}, "no signature|does not fit"),
        (signed(mallory, START), "none of the clients'"),
        (signed(mallory, START, shown=berlin), "does not fit its key: the key is that of 'berlin'"),
        (good | {TIME: good[TIME].replace("00:00", "00:01")}, "does not fit"),
        (good | {SIGNATURE: b64encode(b"short").decode()}, "does not fit"),
    ]:
        with pytest.raises(Refused, match=why) as found:
            door.admit(headers)
        assert found.value.status == 401
    assert door.used == {}
    assert door.admit(good) == "berlin"


def test_what_is_remembered_is_forgotten_once_it_cannot_come_again_and_is_never_much(
    door: Door, folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knocks, "MOST", 5)
    berlin = private(folder, "berlin")
    for second in range(5):
        door.admit(signed(berlin, START + second / 10))
    with pytest.raises(Refused, match="5 of 'berlin' within 305 s") as found:
        door.admit(signed(berlin, START + 1))
    assert found.value.status == 503  # after which a node comes back
    assert door.admit(signed(private(folder, "paris"), START)) == "paris"  # one key's haste is not another's
    clock.now = START + OLD + 0.25
    assert door.admit(signed(berlin, clock.now)) == "berlin"
    assert len(door.used["berlin"]) == 3


def test_a_key_taken_back_or_added_counts_from_the_next_request_on(folder: Path, tmp_path: Path, clock: Clock) -> None:
    ring = tmp_path / "clients"
    ring.mkdir()
    door, berlin = Door(Keyring(ring), clock), private(folder, "berlin")
    with pytest.raises(Refused, match="none of the clients'"):
        door.admit(signed(berlin, START))
    (ring / "berlin.pub").write_bytes((folder / "server" / "clients" / "berlin.pub").read_bytes())
    (ring / "broken.pub").write_text("no key")
    assert door.admit(signed(berlin, START)) == "berlin"
    (ring / "berlin.pub").unlink()
    with pytest.raises(Refused, match=rf"none of the clients': no file in {ring} holds it"):
        door.admit(signed(berlin, START + 1))


def test_a_client_signs_as_the_door_wants_it(folder: Path, tmp_path: Path) -> None:
    door = Door(Keyring(folder / "server" / "clients"))
    assert door.admit(signed_now(folder / "clients" / "paris" / "client.key")) == "paris"
    (tmp_path / "client.key").write_text("no key")
    with pytest.raises(ValueError, match=r"client\.key holds no client's key .* copy it again"):
        signed_now(tmp_path / "client.key")


def test_strangers_are_noted_at_once_then_counted_and_however_many_come_the_record_stays_small(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knocks, "TOLD", 2)
    lines: list[str] = []
    record = Knocks(lines.append, clock)
    stranger, curious = Refused(401, "no signature"), Refused(404, "not for nodes", "GET '/docs'")
    for _ in range(1000):
        record.note("10.0.0.1", stranger)
    record.note("10.0.0.1", curious)
    for last in range(200):
        record.note(f"10.0.1.{last}", stranger)
    assert lines == ["refused 10.0.0.1: no signature", "refused 10.0.0.1: not for nodes: GET '/docs'"]
    assert len(record.counted) == 2
    clock.now += knocks.EVERY
    record.note("10.0.0.2", stranger)
    assert lines[2:] == ["refused 10.0.0.1 999 more times: no signature", "refused 200 more requests of others",
                         "refused 10.0.0.2: no signature"]  # fmt: skip
