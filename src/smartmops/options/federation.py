"""Options of `federate`, and of its server, clients and keys on machines of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from smartmops.checks.errors import RunError
from smartmops.checks.folders import Existing, OutFolder, refused
from smartmops.checks.limits import Count, NotNegative, Number, Options, Port, Positive, Several, Text, Whole, unused
from smartmops.traits import CENTRAL, METHODS, Traits

from .method import CHOOSE
from .training import Activations, Base, Columns, TaskConfig, Template

METHOD = "mops; fedprompt: the same prompts in one group, without a gate; fedlora: LoRA"
ENGINES = Literal["in-process", "flower-simulation"]
LARGEST_ALPHA = 1e6  # clients are alike long before; sums of draws for far larger ones overflow
Alpha = Annotated[float, Number("a number above 0 and at most 1000000, such as 0.5", 0, LARGEST_ALPHA, above=True)]
Skew = Annotated[float, Number("1 or more (15 in the paper)", 1)]
Trim = Annotated[float, Number("a share from 0 up to, but not, 0.5", 0, 0.5, below=True)]
Chance = Annotated[float, Number("a chance between 0 and 1, below 1 / clients", 0, 1, above=True, below=True)]
LEAST_NOISE = 0.1  # in multiples of the clipping norm
Mass = Annotated[float, Number("a gate weight from 0 to below 1", 0, 1, below=True)]
Clients = Annotated[Path, Existing("a folder with one JSONL file for each client", folder=True)]


@dataclass
class PartitionConfig(Options):
    """How examples are shared out among clients."""

    ABOUT: ClassVar[str] = "partition"

    clients: Count = 100  # number of clients; with --partition source there is one for each source
    partition: Literal["skewed", "dirichlet", "source"] = "skewed"
    """how examples are shared out: skewed (the paper's appendix A), by Dirichlet, or by the data's source"""
    skew: Skew = 15.0  # how many times larger a category's largest part is than its other parts (--partition skewed)
    skew_of: Literal["each", "rest"] = "each"
    """whether skew compares with each other part, or with all other parts together"""
    dirichlet_alpha: Alpha = 0.5  # concentration: near 0 a category has one holder, above 100 all clients are alike


@dataclass(kw_only=True)
class RoundsConfig(Options):
    """How many rounds of what length, with whom."""

    ABOUT: ClassVar[str] = "rounds"

    clients_per_round: Count = 10  # number of clients drawn for each round
    rounds: Count = 20  # rounds of local training and averaging
    local_steps: Count = 250  # optimiser steps of a client in a round
    quorum: Count | None = None  # answers below which a round does not count; by default half of --clients-per-round
    attempts: Count = 3  # attempts at a round without a quorum, each with other clients
    timeout: Positive | None = None  # seconds a round waits for its clients; no limit by default
    eval_every: Count = 1  # rounds between evaluations; the last round is always evaluated
    payload: Literal["float32", "float16"] = "float32"  # type of the numbers that are sent, both ways
    share_above: Mass = 0.0  # mean gate weight below which a client does not send an expert
    proximal: NotNegative = 0.0  # mu of FedProx; 0: plain local training, as in FedAvg
    server_steps: Whole = 0  # optimiser steps on the server's own examples after every round


@dataclass(kw_only=True)
class AggregationConfig(Options):
    """How the clients' updates become one."""

    ABOUT: ClassVar[str] = "aggregation"

    aggregation: Literal["fedavg", "uniform", "fedadam", "trimmed-mean", "median", "expert-weighted"] = "fedavg"
    """how the server combines the clients' updates"""
    trim: Trim = 0.1
    """share of clients left out at either end for each number, one at least (--aggregation trimmed-mean)"""
    server_lr: Positive = 0.01  # learning rate of the server (--aggregation fedadam)
    norm_limit: Positive = 10.0  # an update is refused if its norm exceeds this multiple of the round's median


@dataclass(kw_only=True)
class PrivacyConfig(Options):
    """Differential privacy of clients."""

    ABOUT: ClassVar[str] = "privacy"

    noise_multiplier: Positive | None = None
    """standard deviation of the noise, in multiples of --clip-norm; no privacy by default"""
    clip_norm: Positive = 1.0  # L2 norm to which a client's update is clipped
    delta: Chance | None = None  # probability with which epsilon may fail to hold; by default 1 / clients^1.1
    epsilon_budget: Positive | None = None  # training ends before a round that would exceed this epsilon


@dataclass(kw_only=True)
class FederateConfig(TaskConfig, PartitionConfig, RoundsConfig, AggregationConfig, PrivacyConfig):
    """Train one adapter over clients whose data stay with them. DATA is partitioned, or the server's own."""

    ABOUT: ClassVar[str] = "run"

    out: OutFolder  # run folder to write
    method: Annotated[Literal["mops", "fedprompt", "fedlora"], tyro.conf.arg(help=METHOD)] = "mops"  # type: ignore[assignment]
    recovery_prompts: Whole = 0
    """of the server, which would train them on data that clients hold; give it data of its own"""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # of the frozen base; the same on every client's machine
    expert_kind: Literal["keys_values", "hidden_states"] = "hidden_states"  # of one layer, as in the paper: fewer bytes
    batch_size: Count = 1  # examples of a local step, as in the paper
    clients_data: Clients | None = None  # folder with one JSONL file for each client; --data is then the server's own
    skip_empty: bool = False  # leave out clients without examples instead of refusing to start
    engine: ENGINES = "in-process"
    """clients run one after another in this process, or in the processes of Flower's simulation"""
    actors: Count = 2  # number of processes of Flower's simulation, each with a model of its own
    allow_other_versions: bool = False  # accept clients with other versions of torch, transformers or peft
    samples_per_task: Whole = 2
    """answers per task of the frozen and the adapted model, shown side by side in the report"""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # continue a run that was killed

    @property
    def traits(self) -> Traits:
        """As `MethodConfig`."""
        return METHODS[CENTRAL[self.method]]

    def central(self) -> TaskConfig:
        """The same adapter and data as `train` knows them."""
        given = {f.name: getattr(self, f.name) for f in fields(TaskConfig)}
        return TaskConfig(**given | {"method": CENTRAL[self.method]})

    @property
    def shares_data_out(self) -> bool:
        """Whether DATA is cut into as many parts as there are clients."""
        return self.clients_data is None and self.partition != "source"

    def trained(self) -> list[str]:
        """As `TaskConfig`."""
        return [CENTRAL[self.method]]

    def problems(self) -> Iterator[str]:
        """What options have to do with each other."""
        yield from super().problems()
        asked, there = self.clients_per_round, self.clients
        if self.shares_data_out and asked > there:
            yield f"--clients-per-round {asked}, but there are {there} clients: choose 1 to {there}"
        if self.quorum is not None and self.quorum > asked:
            yield f"--quorum {self.quorum}, but {asked} clients are asked in a round: choose 1 to {asked}"
        cores = os.cpu_count() or 1
        if self.engine == "flower-simulation" and self.actors > cores:
            yield f"--actors {self.actors}, but this machine has {cores} cores: choose 1 to {cores}"
        yield from self._privacy_problems()
        plain = self.aggregation == "fedavg" and not self.share_above and not self.server_steps
        if self.noise_multiplier is not None and not plain:
            yield (f"--noise-multiplier {self.noise_multiplier} goes with plain averaging: leave --aggregation, "
                   "--share-above and --server-steps at their defaults")  # fmt: skip
        if self.aggregation == "expert-weighted":
            weighs = "--aggregation expert-weighted goes by how much each client uses which expert"
            if not self.traits.reads:
                yield (f"{weighs}, and --method {self.method} has none to choose from: choose --method mops, or "
                       "another --aggregation")  # fmt: skip
            elif not self.several:
                yield (f"{weighs}, and --experts {self.experts} is one alone, which all use alike: choose 2 or more, "
                       "or another --aggregation")  # fmt: skip

    def _privacy_problems(self) -> Iterator[str]:
        """Noise that is missing, or too little for an account of it."""
        given = {"--epsilon-budget": self.epsilon_budget, "--delta": self.delta,
                 "--clip-norm": self.clip_norm if self.clip_norm != PrivacyConfig.clip_norm else None}  # fmt: skip
        if self.noise_multiplier is None:
            for name, value in given.items():
                if value is not None:
                    yield (f"{name} {value} goes with --noise-multiplier, without which nothing is clipped and nothing "
                           "is private: give that, or leave this away")  # fmt: skip
        elif self.noise_multiplier < LEAST_NOISE:
            yield (f"--noise-multiplier {self.noise_multiplier}: choose {LEAST_NOISE} or more; with less, epsilon says "
                   "nothing, and takes the memory of a machine to work out")  # fmt: skip

    def idle(self) -> Iterator[str]:
        """As `Options`."""
        yield from super().idle()
        yield from self._shared_out()
        for name, aggregation in (("trim", "trimmed-mean"), ("server_lr", "fedadam")):
            yield from unused(self, (name,), self.aggregation == aggregation,
                              f"is of --aggregation {aggregation}: choose that, or leave it away")  # fmt: skip
        yield from unused(self, ("share_above",), self.traits.reads and self.several,
                          f"is of a gate over several experts, and there is none: {CHOOSE}, or "
                          "leave it away")  # fmt: skip
        yield from unused(self, ("relative_lr",), not self.traits.ours or self.expert_kind == "keys_values",
                          "does not reach clients with --expert-kind hidden_states, whose rate is absolute: give "
                          "--prompt-lr")  # fmt: skip
        yield from unused(self, ("quorum", "attempts", "norm_limit"), self.noise_multiplier is None,
                          "gives way to --noise-multiplier, under which every update that comes counts: "
                          "leave one of them away")  # fmt: skip
        yield from unused(self, ("relative_gate_lr",), False, "does not reach the clients: give --gate-lr")

    def _shared_out(self) -> Iterator[str]:
        """What does nothing of the options that share data out among clients on this machine."""
        own, away = self.clients_data is None, "choose that, or leave it away"
        yield from unused(self, ("clients",), self.shares_data_out,
                          "is of DATA that are shared out, and each source or file is a client: "
                          "leave it away")  # fmt: skip
        yield from unused(self, ("partition",), own, "is of DATA that are shared out, and each client has a file of "
                          "its own in --clients-data: leave one of them away")  # fmt: skip
        yield from unused(self, ("skew", "skew_of"), own and self.partition == "skewed",
                          f"is of --partition skewed: {away}")  # fmt: skip
        yield from unused(self, ("dirichlet_alpha",), own and self.partition == "dirichlet",
                          f"is of --partition dirichlet: {away}")  # fmt: skip
        yield from unused(self, ("allow_other_versions",), False, "is of `smartmops federate-server`, and clients here "
                          "have the same versions: leave it away")  # fmt: skip
        yield from unused(self, ("actors",), self.engine == "flower-simulation",
                          f"is of --engine flower-simulation: {away}")  # fmt: skip

    def taken(self) -> RunError | None:
        """As `Options`."""
        return refused(self.out, self.resume)


@dataclass(kw_only=True)
class ServerConfig(FederateConfig):
    """The server of a real federation. DATA is the server's own: it is what perplexity is measured on."""

    ABOUT: ClassVar[str] = "server"

    keys: Annotated[Path, Existing("the folder `server` that `smartmops federate-keys` made", folder=True)]  # of those
    clients: Count  # clients to wait for
    host: Annotated[str, Text("a name or address of this machine, such as 0.0.0.0")] = "0.0.0.0"  # address to listen at
    port: Port = 9092  # port to listen at
    message_limit: Count = 256  # largest message of a client, in MB
    patience: Positive = 600.0  # seconds to wait for the clients

    @property
    def shares_data_out(self) -> bool:
        """As `FederateConfig`: clients bring data of their own."""
        return False

    def problems(self) -> Iterator[str]:
        """As `FederateConfig`; and whether the keys are there."""
        yield from super().problems()
        if self.clients_per_round > self.clients:
            yield (f"--clients-per-round {self.clients_per_round}, but there are {self.clients} clients: choose 1 to "
                   f"{self.clients}")  # fmt: skip
        missing = [
            name for name in ("ca.crt", "server.crt", "server.key", "clients") if not (self.keys / name).exists()
        ]
        if missing:
            yield (f"--keys {self.keys} has no {missing[0]}: give the folder `server` that `smartmops federate-keys` "
                   "made")  # fmt: skip
            return
        known = len(list((self.keys / "clients").glob("*.pub")))
        if known < self.clients:
            yield (f"--clients {self.clients}, but there are keys of {known} in {self.keys / 'clients'}: make more "
                   f"with `smartmops federate-keys`, or choose 1 to {known}")  # fmt: skip

    def _shared_out(self) -> Iterator[str]:
        """As `FederateConfig`: here nothing is."""
        here = ("clients_data", "partition", "skew", "skew_of", "dirichlet_alpha", "skip_empty", "engine", "actors")
        yield from unused(self, here, False, "is of `smartmops federate`, and this server's clients hold their data on "
                          "machines of their own: leave it away")  # fmt: skip


@dataclass(frozen=True)
class Address:
    """HOST:PORT."""

    def wrong(self, value: str) -> str | None:
        """As `limits.Limit`."""
        host, _, port = value.rpartition(":")
        good = host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536
        return None if good else ": give HOST:PORT, such as server.example.org:9092"


@dataclass(kw_only=True)
class ClientConfig(Options):
    """One client of a real federation: a model, a file of examples, and the server's address."""

    data: Annotated[Path, Existing("a JSONL file")]  # JSONL; it stays on this machine
    server: Annotated[str, Address()]  # HOST:PORT
    keys: Annotated[Path, Existing("the folder that `smartmops federate-keys` made for this client", folder=True)]
    """the folder that `smartmops federate-keys` made for this client"""
    columns: Columns = ()  # FIELD=COLUMN where columns of the data have names of their own: response=answer
    model: Base  # the same as the server's
    name: Annotated[str, Text("a name")] | None = None  # name of the client; by default the data's file name
    template: Template = "auto"  # as the server's
    max_length: Count = 512  # tokens; as the server's
    activations: Activations = "auto"  # as for `train`
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"  # of the frozen weights; as the server's
    max_wait: Positive | None = None  # seconds without a server after which the client ends; no limit by default

    def problems(self) -> Iterator[str]:
        """Whether the keys are there."""
        for name in ("client.key", "ca.crt"):
            if not (self.keys / name).is_file():
                yield (f"--keys {self.keys} has no {name}: give the folder that `smartmops federate-keys` made for "
                       "this client")  # fmt: skip


@dataclass(frozen=True)
class FileNames:
    """Names that files can have."""

    def wrong(self, value: tuple[str, ...]) -> str | None:
        """As `limits.Limit`."""
        for name in value:
            if not name or name.startswith(".") or set(name) & set("/\\\0"):
                return f": {name!r} is no file name, choose letters, digits, - and _"
        return None


@dataclass(kw_only=True)
class KeysConfig(Options):
    """Keys of a federation. Keys that are there stay; a client or a host is added by naming it."""

    out: OutFolder = Path("keys")  # folder the keys are written to
    clients: Annotated[tuple[str, ...], Several("berlin paris"), FileNames()]  # names of the client machines
    hosts: Annotated[tuple[Annotated[str, Text("a name")], ...], Several("server.example.org")] = (
        "localhost",
        "127.0.0.1",
    )
    """names and addresses under which clients reach the server"""
    days: Annotated[int, Number("1 to 36500 days", 1, 36500)] = 365  # that the server's certificate is valid
