"""A message comes out as it went in; what is no message is refused with a reason."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartmops.checks.errors import FederationError
from smartmops.clients import admission
from smartmops.clients.messages import VERSION, Failure, Hello, Job, Local, Reply, pack, unpack

LOCAL = Local(steps=3, batch_size=2, prompt_lr=0.1, gate_lr=1e-3, seed=7)


@given(st.lists(st.integers(0, 4), max_size=3), st.booleans(), st.text(max_size=20))
def test_a_job_and_its_reply_come_out_as_they_went_in(shape: list[int], half: bool, name: str) -> None:
    value = torch.randn(shape).to(torch.float16 if half else torch.float32)
    job = Job(2, 5, LOCAL, {"r": 8, "name": name}, "abc", {"a.b": value})
    got = unpack(pack(job))
    assert isinstance(got, Job)
    assert (got.round, got.client, got.local, got.adapter, got.base) == (2, 5, LOCAL, {"r": 8, "name": name}, "abc")
    assert got.arrays.keys() == {"a.b"} and got.arrays["a.b"].dtype == value.dtype
    assert torch.equal(got.arrays["a.b"], value)
    reply = Reply(2, 5, 9, 1.5, 0.1, [0.25, 0.75], [1], half, {"x": value})
    again = unpack(pack(reply))
    assert isinstance(again, Reply)
    assert (again.mass, again.experts, again.difference, again.loss) == ([0.25, 0.75], [1], half, 1.5)
    assert torch.equal(again.arrays["x"], value)


@pytest.mark.parametrize("message", [Failure(1, 2, "no"), Hello('é "x"', 3, ["a"], "f", {"torch": "2"})])
def test_messages_without_arrays_do_too(message: Failure | Hello) -> None:
    assert unpack(pack(message)) == message


def damaged(kind: str) -> bytes:
    whole = pack(Failure(1, 2, "no"))
    header = {"kind": "Reply", "version": VERSION, "words": {"round": 1}}
    if kind == "version":
        header["version"] = 99
    if kind == "kind":
        header["kind"] = "Order"
    body = json.dumps({"__metadata__": {"message": json.dumps(header)}}).encode()
    made = struct.pack("<Q", len(body)) + body
    return {
        "empty": b"",
        "cut": whole[:-1],
        "short": whole[:20],
        "noise": b"\xff" * 64,
        "text": b"hello, how are you",
    }.get(kind, made)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("empty", "damaged"), ("cut", "damaged"), ("short", "damaged"), ("noise", "damaged"), ("text", "damaged"),
     ("version", "version 99"), ("kind", "'Order'"), ("fields", "does not have the fields")],
)  # fmt: skip
def test_what_is_no_message_is_refused(kind: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unpack(damaged(kind))


LONG = "two\nlines\x1b[2J" * 500
HOSTILE = {
    "version": {"kind": "Failure", "version": LONG, "words": {}},
    "kind": {"kind": LONG, "version": VERSION, "words": {}},
    "a kind that is a list": {"kind": [LONG], "version": VERSION, "words": {}},
    "a word": {"kind": "Failure", "version": VERSION, "words": {"round": 1, "client": 0, "reason": "no", LONG: 1}},
    "a value": {"kind": "Failure", "version": VERSION, "words": {"round": LONG, "client": 0, "reason": "no"}},
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_whatever_a_stranger_writes_is_said_on_one_short_line(header: dict[str, object]) -> None:
    body = json.dumps({"__metadata__": {"message": json.dumps(header)}}).encode()
    with pytest.raises(FederationError) as caught:
        unpack(struct.pack("<Q", len(body)) + body)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("message", [Failure(0, 0, LONG), Hello("a", 3, ["a"], "f", {"messages": LONG})])
def test_so_is_what_a_client_says_that_cannot_take_part(message: Failure | Hello) -> None:
    with pytest.raises(FederationError) as caught:
        admission._check_versions(admission.greeting(pack(message), "a client"), allow=False)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
