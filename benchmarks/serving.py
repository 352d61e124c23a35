"""What serving costs: the server over HTTP beside bare batched `generate`, and mixed traffic beside PEFT LoRA.

    python benchmarks/serving.py [--run RUN] [--data FILE]      writes serving.json and serving.md beside itself

RUN is a run on SmolLM2; without one, an adapter is trained for a few steps on rows of FILE, Dolly-15k. All sides answer the same prompts greedily, in one process, and take turns. Ours is asked over a socket by
clients in the same process, whose work counts as ours; the others are called directly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import torch
from peft import get_peft_model

from smartmops.base import load_base
from smartmops.flow.trainer import TrainConfig, train
from smartmops.methods.baselines import peft_config
from smartmops.options.method import MethodConfig
from smartmops.rows.example import Example
from smartmops.serving.answering import Answerer, Settings
from smartmops.serving.batching import Batcher
from smartmops.tokens.batches import padded
from smartmops.web.server import Server, Site, make_app

HERE = Path(__file__).resolve().parent
DOLLY = HERE.parents[1] / "shared/data/dolly15k/dolly-15k.jsonl"
BATCH, REQUESTS, TOKENS, REPEATS, THREADS = 16, 32, 24, 3, 1
GOALS = {"base": 0.95, "grouped": 3.0}
NAMES = {
    "bare": "the bare model, `generate` on batches of {batch}",
    "server_base": "our server, `model` base",
    "server_auto": "our server, `model` auto",
    "lora_in_order": "PEFT LoRA, one adapter at a time, in the order of the requests",
    "lora_grouped": "PEFT LoRA, one adapter at a time, all that waits for one task together",
}


@dataclass
class Asked:
    """A request of some task, and the tokens of its prompt."""

    task: str
    text: str
    ids: list[int]


@dataclass
class Told:
    """What one repeat of one side took."""

    seconds: float
    cpu: float  # seconds of a core that this process took, clients and server included
    tokens: int
    latencies: list[float]  # seconds from the start, when all requests are there, to each answer


def dolly(data: Path, per_task: int, skip: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Short rows of each task of Dolly-15k, in the order of the file."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in data.open(encoding="utf-8"):
        row = json.loads(line)
        if len(row["instruction"]) + len(row["context"]) < 400 and len(row["response"]) < 300:
            found[row["category"]].append(row)
    return {task: rows[skip : skip + per_task] for task, rows in found.items() if task != "general_qa"}


def trained(folder: Path, data: Path) -> Path:
    """A run of 8 steps: what its answers are worth is no matter here."""
    rows = [row for rows in dolly(data, 20).values() for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(TrainConfig(model="smollm2", dtype="float32", data=str(folder / "rows.jsonl"), out=folder / "run", steps=8, batch_size=4,
                      max_length=256, samples_per_task=0, validation_share=0.0))  # fmt: skip
    return folder / "run"


def traffic(answerer: Answerer, data: Path) -> list[Asked]:
    """Requests of all tasks, mixed; none of them was trained on."""
    rows = [(task, row) for task, rows in dolly(data, REQUESTS, 20).items() for row in rows]
    random.Random(0).shuffle(rows)
    by_task: dict[str, list[Asked]] = defaultdict(list)
    for task, row in rows:
        text = f"{row['instruction']}\n\n{row['context']}".strip()
        by_task[task].append(Asked(task, text, answerer.ask(Example(text, "", ""), Settings()).prompt.input_ids))
    tasks = sorted(by_task)
    found = [by_task[tasks[i % len(tasks)]][i // len(tasks)] for i in range(REQUESTS)]
    random.Random(1).shuffle(found)
    return found


class Bare:
    """`generate` of a model, batch after batch."""

    def __init__(self, model: Any, answerer: Answerer) -> None:
        self.model, self.stops, self.pad = model, answerer.stops, answerer.pad

    @torch.no_grad()
    def batch(self, some: Sequence[Asked]) -> int:
        """Tokens up to the end of each answer."""
        ids = padded([each.ids for each in some], self.pad, "left")
        mask = padded([[1] * len(each.ids) for each in some], 0, "left")
        out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False,
                                  pad_token_id=self.pad, eos_token_id=self.stops)  # fmt: skip
        ends = set(self.stops)
        rows = out[:, ids.shape[1] :].tolist()
        return sum(next((at + 1 for at, token in enumerate(row) if token in ends), len(row)) for row in rows)

    def all(self, batches: Sequence[Sequence[Asked]], before: Callable[[str], None] = lambda task: None) -> Told:
        """All batches, one after another."""
        begun, start, tokens, latencies = time.process_time(), time.perf_counter(), 0, list[float]()
        for batch in batches:
            before(batch[0].task)
            tokens += self.batch(batch)
            latencies += [time.perf_counter() - start] * len(batch)
        return Told(time.perf_counter() - start, time.process_time() - begun, tokens, latencies)


def in_order(asked: Sequence[Asked]) -> list[list[Asked]]:
    """Neighbours of one task together."""
    found: list[list[Asked]] = []
    for each in asked:
        if found and found[-1][0].task == each.task and len(found[-1]) < BATCH:
            found[-1].append(each)
        else:
            found.append([each])
    return found


def grouped(asked: Sequence[Asked]) -> list[list[Asked]]:
    """All that waits for one task, up to the size of a batch."""
    return in_order(sorted(asked, key=lambda each: each.task))


@contextmanager
def served(answerer: Answerer) -> Any:
    """The URL of a server in a thread of its own."""
    batcher = Batcher(answerer, BATCH, REQUESTS).start()
    server = Server(make_app(Site(answerer, batcher, TOKENS, [])), batcher, lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join()
            batcher.join()


def over_http(url: str, asked: Sequence[Asked], model: str) -> Told:
    """One client for each request, all at once."""

    async def one(client: httpx.AsyncClient, each: Asked) -> tuple[float, int]:
        body = {"model": model, "messages": [{"role": "user", "content": each.text}], "max_tokens": TOKENS}
        reply = await client.post("/v1/chat/completions", json=body)
        return time.perf_counter(), reply.raise_for_status().json()["usage"]["completion_tokens"]

    async def every() -> Told:
        async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
            begun, start = time.process_time(), time.perf_counter()
            found = await asyncio.gather(*(one(client, each) for each in asked))
            took, cpu = time.perf_counter() - start, time.process_time() - begun
            return Told(took, cpu, sum(n for _, n in found), [end - start for end, _ in found])

    return asyncio.run(every())


@contextmanager
def sides(answerer: Answerer, asked: Sequence[Asked]) -> Any:
    """What each side does with some requests, by name."""
    tasks = sorted({each.task for each in asked})
    bare = Bare(load_base("smollm2", "float32")[0], answerer)
    settings: Any = peft_config(MethodConfig(method="lora"))
    adapted = get_peft_model(load_base("smollm2", "float32")[0], settings, adapter_name=tasks[0])
    for task in tasks[1:]:
        adapted.add_adapter(task, settings)
    lora = Bare(adapted.eval(), answerer)
    with served(answerer) as url:
        yield {
            "bare": lambda some: bare.all([some[at : at + BATCH] for at in range(0, len(some), BATCH)]),
            "server_base": lambda some: over_http(url, some, "base"),
            "server_auto": lambda some: over_http(url, some, "auto"),
            "lora_grouped": lambda some: lora.all(grouped(some), adapted.set_adapter),
            "lora_in_order": lambda some: lora.all(in_order(some), adapted.set_adapter),
        }


def measured(answerer: Answerer, asked: Sequence[Asked], keep: Callable[[dict[str, list[Told]]], None]) -> None:
    """All sides, taking turns, after two requests that do not count; what is found is kept after each turn."""
    with sides(answerer, asked) as every:
        found: dict[str, list[Told]] = {name: [] for name in every}
        for side in every.values():
            side(asked[:2])
        for turn in range(1, REPEATS + 1):
            for name, side in every.items():
                told = side(asked)
                found[name].append(told)
                print(turn, name, f"{told.seconds:.1f} s, {told.cpu:.1f} s of a core, {told.tokens} tokens", flush=True)
            keep(found)


def summary(told: Sequence[Told]) -> dict[str, Any]:
    """Medians over repeats."""
    percent = [quantiles(each.latencies, n=20, method="inclusive") for each in told]
    return {
        "tokens_per_second": median(each.tokens / each.seconds for each in told),
        "tokens_per_core_second": median(each.tokens / each.cpu for each in told),
        "p50": median(each[9] for each in percent), "p95": median(each[18] for each in percent),
        "tokens": told[0].tokens, "all_seconds": [round(each.seconds, 3) for each in told],
        "all_core_seconds": [round(each.cpu, 3) for each in told],
    }  # fmt: skip


def ratio(found: dict[str, list[Told]], ours: str, other: str, clock: str) -> float:
    """Median over repeats of tokens a second, ours through the other's of the same turn."""
    pairs = zip(found[ours], found[other], strict=True)
    return median((a.tokens / getattr(a, clock)) / (b.tokens / getattr(b, clock)) for a, b in pairs)


RATIOS = {
    "base": ("server_base", "bare"), "auto": ("server_auto", "bare"), "grouped": ("server_auto", "lora_grouped"),
    "in_order": ("server_auto", "lora_in_order"),
}  # fmt: skip


def main(run: Path | None, data: Path) -> None:
    """Measure and write both files."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        answerer = Answerer.open(run or trained(Path(folder), data))
    asked = traffic(answerer, data)
    setting = {
        "torch": torch.__version__, "cores": os.cpu_count(), "threads": THREADS, "batch": BATCH,
        "requests": REQUESTS, "tokens": TOKENS, "experts": len(answerer.experts),
        "tasks": len({each.task for each in asked}), "prompt_tokens": median(len(each.ids) for each in asked),
        "groups": {"grouped": len(grouped(asked)), "in_order": len(in_order(asked))},
    }  # fmt: skip

    def keep(told: dict[str, list[Told]]) -> None:
        found = setting | {"repeats": len(told["bare"]), "sides": {name: summary(each) for name, each in told.items()}}
        for clock, name in (("seconds", "ratios"), ("cpu", "ratios_of_core_seconds")):
            found[name] = {key: ratio(told, *pair, clock) for key, pair in RATIOS.items()}
        found["clock"] = median(each.seconds / each.cpu for side in told.values() for each in side)
        (HERE / "serving.json").write_text(json.dumps(found, indent=1) + "\n")
        write(found)

    measured(answerer, asked, keep)


def write(found: dict[str, Any]) -> None:
    (HERE / "serving.md").write_text("\n".join(lines(found)) + "\n")


def lines(found: dict[str, Any]) -> list[str]:
    """The page."""
    wall, core, groups = found["ratios"], found["ratios_of_core_seconds"], found["groups"]
    rows = [
        f"| {NAMES[name].format(**found)} | {side['tokens_per_second']:.1f} | {side['tokens_per_core_second']:.1f} | "
        f"{side['p50']:.1f} | {side['p95']:.1f} |"
        for name, side in found["sides"].items()
    ]
    whats = {"base": "our server, base, to the bare model", "auto": "our server, auto, to the bare model",
             "grouped": f"our server, auto, to LoRA of one task after another ({groups['grouped']} batches)",
             "in_order": f"our server, auto, to LoRA in the order of the requests ({groups['in_order']} batches)"}  # fmt: skip
    return [
        "# Serving",
        "",
        f"Written by `python benchmarks/serving.py` from `serving.json`: SmolLM2-135M in float32 on {found['cores']} cores, "
        f"{found['threads']} thread, torch {found['torch']}; an adapter of {found['experts']} experts. {found['requests']} requests of "
        f"{found['tasks']} tasks of Dolly-15k, mixed (median {found['prompt_tokens']:.0f} tokens of prompt), come at once; each is answered "
        f"greedily with at most {found['tokens']} tokens, up to {found['batch']} at a time. Sides take turns in one process; medians of "
        f"{found['repeats']} repeats, and of the ratios within each. Ours is asked over HTTP by clients in the same process, the others "
        "are called directly.",
        "",
        f"Seconds of a core are those that the process itself took, clients and server included; goals are judged by them. The clock ran "
        f"{found['clock']:.1f} times as long, which is how much the machine had to do beside.",
        "",
        "| side | tokens/s | tokens per second of a core | p50 of latency, s | p95, s |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "| ratio of tokens/s | by seconds of a core | by the clock | goal | |",
        "|---|---|---|---|---|",
        *(f"| {what} | {core[name]:.2f} | {wall[name]:.2f} | {said(name, core)} |" for name, what in whats.items()),
        "",
        "Tokens are counted up to the end of each answer. `generate` computes the padding of shorter prompts, which the server leaves "
        "out, and carries rows that have ended along until its batch ends, "
        "and a request that waits for the next batch waits for all of this one; the server gives a free place to the next request. "
        "The LoRA adapters (rank 2, query and value) are fresh ones: their time does not depend on their values.",
    ]  # fmt: skip


def said(name: str, ratios: dict[str, float]) -> str:
    if name not in GOALS:
        return "| "
    return f"at least {GOALS[name]:g} | {'met' if ratios[name] >= GOALS[name] else '**not reached**'}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, help="a run on SmolLM2")
    parser.add_argument("--data", type=Path, default=DOLLY, help="rows of Dolly-15k")
    arguments = parser.parse_args()
    main(arguments.run, arguments.data)
