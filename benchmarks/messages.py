"""What a server of a federation takes where all clients act in every round: memory, seconds and bytes over their number.

    python benchmarks/messages.py measure messages   each number of clients in a process of its own -> messages.json
    python benchmarks/messages.py measure ray        some once more with real training in Flower's simulation on Ray
    python benchmarks/messages.py measure small      fewer clients, in seconds, to see that it works
    (points that messages.json has already stay as they are)
    python benchmarks/messages.py page               messages.md and messages.png from messages.json

Messages alone: nobody trains. A client unpacks its job, adds noise of its own to the arrays, and answers with a packed
reply, as a trained one would; the server draws, sends, checks, averages, and writes its checkpoint as it always does."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
POINTS = [*((n, "fedavg") for n in (10, 100, 1_000, 10_000)), *((n, "trimmed-mean") for n in (10, 100, 1_000, 10_000))]
RAY = [(10, 10), (100, 100), (1_000, 1_000), (1_000, 10)]  # clients, and those that act in a round
SMALL, ROUNDS, RAY_ROUNDS, RAY_EXAMPLES = (10, 100), 3, 3, 4_000
EXPERTS, PROMPTS, WIDTH, INNER = 7, 10, 512, 64  # the arrays of an adapter of hidden states


class Noisy:
    """A transport whose clients answer with what they were sent, and noise by their number."""

    def __init__(self, clients: int) -> None:
        self.clients, self.answered = clients, 0.0

    def hello(self) -> dict[int, bytes]:
        return {}

    def exchange(self, jobs: Mapping[int, bytes], timeout: float | None) -> Iterable[tuple[int, bytes]]:
        for client, blob in jobs.items():
            began = time.perf_counter()
            answer = self._answer(blob)
            self.answered += time.perf_counter() - began
            yield client, answer

    def _answer(self, blob: bytes) -> bytes:
        import torch

        from smartmops.clients.messages import Job, Reply, pack, unpack

        job = unpack(blob)
        assert isinstance(job, Job)
        noise = torch.Generator().manual_seed(job.local.seed)
        arrays = {name: value + 0.01 * torch.randn(value.shape, generator=noise) for name, value in job.arrays.items()}
        mass = [1 / EXPERTS] * EXPERTS
        return pack(Reply(job.round, job.client, 1 + job.client % 9, 1.0, 0.0, mass, None, False, arrays))

    def heard(self, clients: Iterable[int]) -> set[int]:
        return set(clients)

    def close(self) -> None:
        pass


def one(clients: int, aggregation: str) -> dict[str, Any]:
    """Some rounds in this process; the first warms up."""
    import torch

    from smartmops.clients.messages import Local
    from smartmops.clients.roster import Roster
    from smartmops.evaluation.perplexity import Evaluation
    from smartmops.federated.aggregation import Aggregator, Layout
    from smartmops.federated.rounds import Server, State
    from smartmops.options.federation import AggregationConfig, RoundsConfig

    torch.set_num_threads(1)
    shapes = {"gate_in": (INNER, WIDTH), "gate_out": (EXPERTS, INNER), "prompts": (EXPERTS * PROMPTS, WIDTH)}
    arrays = {name: torch.randn(shape) for name, shape in shapes.items()}
    layout = Layout(EXPERTS, frozenset({"prompts"}))
    transport = Noisy(clients)
    seen = Evaluation.of({"all": 1.0}, {"all": 1})
    server = Server(
        config=RoundsConfig(rounds=ROUNDS, clients_per_round=clients), seed=0, local=Local(1, 1, 0.1, 0.1, 0),
        adapter={}, base="", constants={}, roster=Roster({i: f"client {i}" for i in range(clients)}), layout=layout,
        aggregator=Aggregator(AggregationConfig(aggregation=aggregation), layout), transport=transport,  # type: ignore[arg-type]
        look=lambda arrays: (seen, {}),
    )  # fmt: skip
    ends: list[tuple[float, float]] = []
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:

        def keep(state: State) -> None:
            state.save(Path(folder) / "round.safetensors")
            ends.append((time.perf_counter(), transport.answered))

        state = server.run(State(0, arrays), keep)
    (began, idle), (ended, busy) = ends[1], ends[-1]
    rounds = len(ends) - 2
    return {
        "clients": clients, "aggregation": aggregation, "seconds_per_round": (ended - began) / rounds,
        "of_clients": (busy - idle) / rounds, "peak_mib": _peak(), "idle_mib": before,
        "bytes_down": state.rows[-1]["bytes_down"], "bytes_up": state.rows[-1]["bytes_up"],
        "clients_ok": state.rows[-1]["clients_ok"], "load": os.getloadavg(),
    }  # fmt: skip


def on_ray(clients: int, acting: int) -> dict[str, Any]:
    """Real training of the embedded base in Flower's simulation; this process is the driver, Ray's actors are others."""
    from smartmops.flower.simulation import simulate
    from smartmops.options.federation import FederateConfig

    ends: list[tuple[float, float]] = []
    _watched(ends)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made_up.jsonl"
        with open(file, "w") as out:
            for i in range(RAY_EXAMPLES):
                row = {"instruction": f"Say number {i}.", "response": f"It is {i}.", "category": f"task {i % 3}",
                       "source": f"client {i % clients:05}"}  # fmt: skip
                out.write(json.dumps(row) + "\n")
        metrics = simulate(FederateConfig(
            model="tiny", data=str(file), out=Path(folder) / "run", partition="source", clients=clients, experts=3,
            rounds=RAY_ROUNDS, clients_per_round=acting, local_steps=1, batch_size=1, test_share=0.01,
            eval_every=RAY_ROUNDS, samples_per_task=0, engine="flower-simulation", actors=2,
        ))  # fmt: skip
    seconds = [row["seconds"] for row in metrics["rounds"] if row["round"] > 1]
    return {"clients": clients, "acting": acting, "seconds_per_round": sum(seconds) / len(seconds),
            "resident_mib": [mib for _, mib in ends], "peak_mib": _peak(), "load": os.getloadavg()}  # fmt: skip


def _watched(ends: list[tuple[float, float]]) -> None:
    """Note this process's memory at the end of every round."""
    from smartmops.runs.folder import Run

    append = Run.append_curve

    def appended(self: Run, row: dict[str, Any]) -> None:
        append(self, row)
        ends.append((time.perf_counter(), _resident()))

    Run.append_curve = appended  # type: ignore[method-assign,assignment]


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(*words: Any) -> dict[str, Any]:
    """One point, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


# ---------------------------------------------------------------------------------------------------------------- page
def lines(found: dict[str, Any]) -> Iterator[str]:
    points, ray = found["messages"], found.get("ray", [])
    down = points[0]["bytes_down"] / points[0]["clients"] / 1e3
    yield "# A server of a federation, where all clients act in every round\n"
    yield "Written by `python benchmarks/messages.py page` from `messages.json`.\n"
    yield (f"Messages alone: a client adds noise to the arrays that it is sent ({down:.0f} kB there, as much back) and answers "
           "with them, in the server's own process; nobody trains. The server draws, packs, unpacks, checks, averages and writes "
           f"its checkpoint as it always does. Means over {ROUNDS - 1} rounds, the first left out; each number in a process of its "
           f"own, with one thread, on a machine of {found['cores']} cores. Peak memory is that of the process, with Python, "
           "torch and the libraries loaded.\n")  # fmt: skip
    yield ("| averaging | clients that act | s a round | of them for what clients do | ms of the server for a client | peak memory, "
           "MiB | MiB above a process that has only started | MB down a round | load before |")  # fmt: skip
    yield "|---" * 9 + "|"
    for p in points:
        own = p["seconds_per_round"] - p["of_clients"]
        yield (f"| {p['aggregation']} | {p['clients']:,} | {p['seconds_per_round']:.2f} | {p['of_clients']:.2f} | "
               f"{1e3 * own / p['clients']:.2f} | {p['peak_mib']:.0f} | {p['peak_mib'] - p['idle_mib']:.0f} | "
               f"{p['bytes_down'] / 1e6:.1f} | {p['load'][0]:.1f} |")  # fmt: skip
    yield "\n![Memory and seconds of a server over the clients that act in a round](messages.png)\n"
    yield ("Answers wait on disk (64 MiB of them in memory) until all are in, since the norm limit is a multiple of the round's "
           "median; then sums run over them one by one, in the order of clients, to the last bit as over a list of all. "
           "`trimmed-mean` and `median` sort every number over all clients, two million numbers at a time, from a second file "
           "on disk.\n")  # fmt: skip
    if ray:
        yield from _of_ray(ray)


def _of_ray(points: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Flower's simulation on Ray, with real training\n"
    yield (f"The embedded base, {RAY_EXAMPLES:,} made-up examples, 1 local step of one example, 2 actors; the driver is the "
           "process that holds the server's model and runs the rounds. Seconds are means over the rounds but the first.\n")  # fmt: skip
    yield "| clients | that act in a round | rounds/s | s a round | driver's memory after each round, MiB | its peak | load after |"
    yield "|---" * 7 + "|"
    for p in points:
        each = ", ".join(f"{mib:.0f}" for mib in p["resident_mib"])
        yield (f"| {p['clients']:,} | {p['acting']:,} | {1 / p['seconds_per_round']:.3f} | {p['seconds_per_round']:.1f} | {each} | "
               f"{p['peak_mib']:.0f} | {p['load'][0]:.1f} |")  # fmt: skip
    measured = [(p["clients"], p["acting"]) for p in points]
    if missing := [
        f"{acting:,} of {clients:,} clients" for clients, acting in RAY if (clients, acting) not in measured
    ]:
        yield f"\n**Not measured:** rounds of {' and of '.join(missing)}; `python benchmarks/messages.py measure ray` does."


def picture(points: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for kind, colour in (("fedavg", "#0072b2"), ("trimmed-mean", "#d55e00")):
        own = [p for p in points if p["aggregation"] == kind]
        count = [p["clients"] for p in own]
        left.plot(count, [p["peak_mib"] for p in own], "o-", color=colour, label=kind)
        right.plot(count, [p["seconds_per_round"] for p in own], "o-", color=colour, label=kind)
    left.set(xscale="log", xlabel="clients that act in a round", ylabel="peak memory of the server, MiB")
    left.set_ylim(bottom=0)
    right.set(xscale="log", yscale="log", xlabel="clients that act in a round", ylabel="seconds a round")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    command = sys.argv[1:]
    store = HERE / "messages.json"
    if command[:1] == ["one"]:
        print(json.dumps(one(int(command[1]), command[2])))
    elif command[:1] == ["one-on-ray"]:
        print(json.dumps(on_ray(int(command[1]), int(command[2]))))
    elif command == ["measure", "small"]:
        print("\n".join(lines({"cores": os.cpu_count(), "messages": [apart("one", n, "fedavg") for n in SMALL]})))
    elif command in (["measure", "messages"], ["measure", "ray"]):
        known = json.loads(store.read_text()) if store.is_file() else {}
        kind = command[1]
        word, places = ("one", POINTS) if kind == "messages" else ("one-on-ray", RAY)
        made = list(known.get(kind, []))
        for place in places[len(made) :]:
            made.append(apart(word, *place))
            store.write_text(json.dumps(known | {"cores": os.cpu_count(), kind: made}, indent=1) + "\n")
    elif command == ["page"]:
        known = json.loads(store.read_text())
        picture(known["messages"], HERE / "messages.png")
        (HERE / "messages.md").write_text("\n".join(lines(known)) + "\n")
    else:
        sys.exit(__doc__)
