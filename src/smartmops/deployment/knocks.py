"""Who is let in: the keys of the clients, each time they signed taken once, and a record of who was refused.

Knows headers and files. Knows no bodies, no Flower and no model: all is decided before a byte of a body is read.
"""

from __future__ import annotations

import binascii
import time
from base64 import b64decode
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

KEY, TIME, SIGNATURE = "flwr-public-key", "flwr-timestamp", "flwr-signature"  # headers, as Flower's nodes send them
KNOCK = "/v1/fleet/knock"  # the front's own, never passed on: whose key this is, and whether its client is there
OLD, AHEAD = 305.0, 5.0  # seconds that a signed time may lie behind and before this machine's clock; Flower's own
MOST = 20_000  # signed times of one key that are remembered: 60 a second for as long as they count
TOLD, EVERY = 256, 60.0  # strangers told apart in one stretch of time; its seconds


class Refused(Exception):
    """A request that is not passed on.

    Attributes:
        status: Of HTTP.
        kind: Why, in words that are the same for all of their kind; all that whoever is refused hears.
        detail: What is known beyond that, for the operator.
    """

    def __init__(self, status: int, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.status, self.kind = status, kind


@dataclass
class Keyring:
    """The public keys in a folder, by their files' names; read again when one is added or taken away."""

    folder: Path
    _read: int = -1  # when the folder had last changed, ns
    _known: dict[bytes, tuple[str, Any]] = field(default_factory=dict)

    def find(self, pem: bytes) -> tuple[str, Any] | None:
        """Whose key this is, and the key; None for a stranger's."""
        changed = self.folder.stat().st_mtime_ns
        if changed != self._read:
            self._known, self._read = dict(map(_opened, sorted(self.folder.glob("*.pub")))), changed
        return self._known.get(pem)


def _opened(file: Path) -> tuple[bytes, tuple[str, Any]]:
    """A key as Flower's nodes send it, and whose it is; of a damaged file one that nobody can send."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    try:
        key = load_ssh_public_key(file.read_bytes())
    except (ValueError, OSError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return b"\0" + file.name.encode(), (file.stem, None)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), (file.stem, key)


@dataclass
class Door:
    """Lets in who signed the time with a key of the ring, each time once.

    What is remembered is the signed time, not the signature: of one time a key can make any number of signatures, and
    whoever listens can make a second one of a first. Strangers leave nothing behind here.

    Attributes:
        keys: Of the clients.
        clock: Seconds since 1970.
    """

    keys: Keyring
    clock: Callable[[], float] = time.time
    used: dict[str, OrderedDict[str, float]] = field(default_factory=dict)

    def admit(self, headers: Mapping[str, str]) -> str:
        """The name of the client whose request this is.

        Raises:
            Refused: there is no signature, or not one of a known key over a time of now that was not used before.
        """
        name, stamp, signed = self._verified(headers)
        used, now = self.used.setdefault(name, OrderedDict()), self.clock()
        while used and next(iter(used.values())) < now - OLD:
            used.popitem(last=False)
        if stamp in used:
            raise Refused(401, "a request that was seen before", f"of {name!r}, signed at {stamp}")
        if len(used) >= MOST:
            raise Refused(503, "too many requests", f"{MOST} of {name!r} within {OLD:.0f} s: let it come back later")
        used[stamp] = signed
        return name

    def _verified(self, headers: Mapping[str, str]) -> tuple[str, str, float]:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            pem, signature = (b64decode(headers[name], validate=True) for name in (KEY, SIGNATURE))
            stamp = headers[TIME]
            signed = datetime.fromisoformat(stamp).timestamp()
        except (KeyError, ValueError, OverflowError, OSError, binascii.Error):
            raise Refused(401, "no signature") from None
        if (found := self.keys.find(pem)) is None:
            raise Refused(401, "a key that is none of the clients'", f"no file in {self.keys.folder} holds it")
        name, key = found
        try:
            key.verify(signature, stamp.encode(), ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, UnicodeError):
            raise Refused(401, "a signature that does not fit its key", f"the key is that of {name!r}") from None
        age = self.clock() - signed
        if not -AHEAD < age < OLD:
            raise Refused(401, "signed at another time than the server's clock shows, set both clocks",
                          f"{name!r} signed {age:.0f} s ago, and -{AHEAD:.0f} to {OLD:.0f} s are taken")  # fmt: skip
        return name, stamp, signed


@dataclass
class Knocks:
    """Who was refused: the first time at once, then as a number once a minute, however many come.

    Attributes:
        say: Takes a line.
        clock: Seconds.
    """

    say: Callable[[str], Any]
    clock: Callable[[], float] = time.monotonic
    since: float = 0.0
    counted: Counter[tuple[str, str]] = field(default_factory=Counter)
    others: int = 0

    def note(self, address: str, refused: Refused) -> None:
        """One refusal of whoever called from `address`."""
        if self.clock() - self.since >= EVERY:
            self.sum_up()
        who = (address, refused.kind)
        if who not in self.counted and len(self.counted) >= TOLD:
            self.others += 1
            return
        self.counted[who] += 1
        if self.counted[who] == 1:
            self.say(f"refused {address}: {refused}")

    def sum_up(self) -> None:
        """Say how many more there were, and begin anew."""
        for (address, kind), count in self.counted.items():
            if count > 1:
                self.say(f"refused {address} {count - 1} more times: {kind}")
        if self.others:
            self.say(f"refused {self.others} more requests of others")
        self.counted, self.others, self.since = Counter(), 0, self.clock()
