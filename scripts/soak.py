"""Many clients at once, honest and hostile, over real sockets; then whether anything was lost or kept.

    python scripts/soak.py [--requests 500] [--run RUN]

Without RUN, a tiny one is trained. Honest clients ask whole and in streams; the others send half a head or half a body
and hang up or stall, hang up within a stream, send no HTTP, or too much. Fails unless every honest client gets the
answer that is given alone, and afterwards nothing waits, runs or is connected, no question is kept, and the server
still answers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smartmops.serving.answering import Answerer, Question, Settings
from smartmops.serving.batching import Batcher
from smartmops.web.bodies import Limits
from smartmops.web.server import Server, Site, make_app

PATIENCE = 600  # seconds that any one thing may take before it counts as lost
LIMITS = Limits(head=0.2, reading=0.2)  # seconds; a client that stalls does so for good
TOKENS, AT_ONCE = 8, 24
TEXTS = ("apple number 3.", "banana number 4, and much more of it.", "And now?")


class Soak:
    """A server, and clients that are good or bad to it."""

    def __init__(self, answerer: Any, size: int = 8) -> None:
        self.answerer, self.batcher = answerer, Batcher(answerer, size, room=2 * AT_ONCE).start()
        self.site = Site(answerer, self.batcher, TOKENS, [], LIMITS)
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=2 * AT_ONCE)
        self.server = Server(make_app(self.site), self.batcher, lambda: None, LIMITS)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()
        self.alone = {text: alone(answerer, text) for text in TEXTS}
        self.kinds: dict[str, Callable[[random.Random], str]] = {
            "whole": self.whole, "stream": self.stream,
            "half a head": self.half_a_head, "half a body": self.half_a_body,
            "gone within a body": self.gone_within_a_body, "gone within a stream": self.gone_within_a_stream,
            "gone before an answer": self.gone_before_an_answer, "no HTTP": self.no_http, "too much": self.too_much,
        }  # fmt: skip

    def ask(self, sent: bytes, hang_up_after: bytes | None = None) -> bytes:
        """What comes of some bytes until the server closes, or until these have come."""
        with socket.create_connection(self.listening.getsockname(), PATIENCE) as raw:
            found = b""
            try:
                raw.sendall(sent)
                while hang_up_after is None or hang_up_after not in found:
                    if not (piece := raw.recv(2**16)):
                        break
                    found += piece
            except (ConnectionResetError, BrokenPipeError):
                pass  # the server closed; what it said may be lost with the connection
            return found

    def asked(self, chance: random.Random, **how: Any) -> tuple[str, bytes]:
        """A text, and a request for it."""
        text = chance.choice(TEXTS)
        body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": text}]} | how).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return text, head.encode() + body

    def whole(self, chance: random.Random) -> str:
        """Asks, and is answered as alone."""
        text, sent = self.asked(chance)
        told = json.loads(self.ask(sent).partition(b"\r\n\r\n")[2])
        return "answered" if told["choices"][0]["message"]["content"] == self.alone[text] else f"wrong: {told}"

    def stream(self, chance: random.Random) -> str:
        """Reads a stream to its end."""
        text, sent = self.asked(chance, stream=True)
        events = [line for line in self.ask(sent).decode().splitlines() if line.startswith("data: {")]
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in events]
        said = "".join(delta.get("content", "") for delta in deltas)
        return "answered" if said == self.alone[text] else f"wrong: {said}"

    def half_a_head(self, chance: random.Random) -> str:
        """Stalls within the head."""
        self.ask(b"POST /v1/chat/completions HTTP/1.1\r\nHos")
        return "closed"

    def half_a_body(self, chance: random.Random) -> str:
        """Stalls within the body."""
        self.ask(self.asked(chance)[1][:-5])
        return "closed"

    def gone_within_a_body(self, chance: random.Random) -> str:
        """Hangs up within the body."""
        self.ask(self.asked(chance)[1][:-5], b"")
        return "gone"

    def gone_within_a_stream(self, chance: random.Random) -> str:
        """Hangs up after the first event."""
        self.ask(self.asked(chance, stream=True)[1], b"data: ")
        return "gone"

    def gone_before_an_answer(self, chance: random.Random) -> str:
        """Hangs up once it has asked."""
        self.ask(self.asked(chance, n=2)[1], b"")
        return "gone"

    def no_http(self, chance: random.Random) -> str:
        """Sends bytes by chance."""
        self.ask(chance.randbytes(200) + b"\r\n\r\n")
        return "closed"

    def too_much(self, chance: random.Random) -> str:
        """Says that it will send more than a body may have."""
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMITS.body + 1}\r\n\r\n"
        told = self.ask(head.encode() + b" ", b"}}")
        return "refused" if b" 413 " in told else f"wrong: {told!r}"

    def run(self, requests: int, seed: int = 0) -> Counter[tuple[str, str]]:
        """What became of so many clients, by kind; as many honest ones as others."""
        bad = list(self.kinds)[2:]
        names = [(("whole", "stream")[number // 2 % 2] if number % 2 else bad[number // 2 % len(bad)])
                 for number in range(requests)]  # fmt: skip
        with ThreadPoolExecutor(AT_ONCE) as clients:
            told = list(clients.map(lambda pair: self.kinds[pair[1]](random.Random(seed + pair[0])), enumerate(names)))
        return Counter(zip(names, told, strict=True))

    def settle(self) -> None:
        """Wait until nothing is under way; whoever waits in vain is told by `left`."""
        pause = threading.Event()
        for _ in range(PATIENCE * 20):
            if not any(self.left().values()):
                return
            pause.wait(0.05)

    def left(self) -> dict[str, int]:
        """What is kept although nobody asks any more."""
        gc.collect()
        state = self.server.server_state
        kept = sum(isinstance(each, Question) for each in gc.get_objects())
        return {"waiting": self.batcher.waiting, "running": self.batcher.running, "questions": kept,
                "connections": len(state.connections), "tasks": len(state.tasks)}  # fmt: skip

    def end(self) -> None:
        """Close it."""
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(PATIENCE)
        self.batcher.join()
        self.listening.close()


def alone(answerer: Any, text: str) -> str:
    """The answer that is given where nobody else asks."""
    from smartmops.rows.example import Example

    found: str = answerer.answer([answerer.ask(Example(text, "", ""), Settings(TOKENS))])[0].text
    return found


def resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def tiny_run(folder: Path) -> Path:
    """A run of two steps."""
    from smartmops.flow.trainer import TrainConfig, train

    rows = [{"instruction": f"{word} number {i}.", "response": word[0].upper() * 4, "category": word}
            for i in range(20) for word in ("apple", "banana")]  # fmt: skip
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(TrainConfig(model="tiny", dtype="float32", data=str(folder / "two.jsonl"), out=folder / "run", experts=2,
                      steps=2, batch_size=4, samples_per_task=0, null_expert=False, validation_share=0.0))  # fmt: skip
    return folder / "run"


def main(requests: int, run: Path | None) -> int:
    """Print what became of the clients and the memory after each fifth of them; 1 where something was lost or kept."""
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Answerer.open(run or tiny_run(Path(folder))))
    told: Counter[tuple[str, str]] = Counter()
    for part in range(5):
        told += soak.run(requests // 5, seed=part * requests)
        soak.settle()
        print(f"{sum(told.values())} clients, {resident():.0f} MiB, kept: {soak.left()}", flush=True)
    for (kind, what), count in sorted(told.items()):
        print(f"{count:5} {kind}: {what}")
    wrong = [what for _, what in told if what.startswith("wrong")]
    kept, still = soak.left(), soak.whole(random.Random(0))
    soak.end()
    print(f"kept {sum(kept.values())}, afterwards an honest client is {still}")
    return int(bool(wrong) or any(kept.values()) or still != "answered")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=500, help="clients altogether")
    parser.add_argument("--run", type=Path, help="a run that answers")
    arguments = parser.parse_args()
    sys.exit(main(arguments.requests, arguments.run))
