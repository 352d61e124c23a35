"""Pretrain the embedded base: a 6 M-parameter Llama that reads its task and its style from context.

Each optimiser step sees two micro-batches: episodes of office examples (one task, one random style per row), and rows
that are either plain text or few-shot episodes of Natural Instructions tasks. Data are a function of (seed, step), so a
killed run resumes exactly. Run:

    python experiments/tiny_base/pretrain.py --data DIR [--steps 2600] [--work experiments/tiny_base/work]

DIR is laid out as `text/*.xz` and `superni/`. The result is written by `export.py` in this folder.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smartmops.data.superni import read_superni
from smartmops.rows.example import Example
from smartmops.rows.office import TASKS, contents, episode, random_style
from smartmops.tokens.template import prompt_text

# Tasks of the paper, and tasks built from the same passages or questions: never in pretraining.
EXCLUDED = ("subtask044", "subtask043", "task002_quoref", "task1510_evalution")
OFFICE_ROWS, OFFICE_TOKENS = 16, 288
TEXT_ROWS, TEXT_TOKENS = 4, 512
IGNORED, PROMPT_WEIGHT = -100, 0.2  # loss weight of instruction tokens; response and text tokens weigh 1
HEADERS = ["### Instruction:\n", "\n\n### Context:\n", "\n\n### Response:\n"]


def documents(data: Path, characters: int) -> tuple[str, str]:
    """Training text (three parts encyclopaedia, one part books) and a held-out slice of the encyclopaedia."""
    with lzma.open(data / "text/wiki_en.txt.xz", "rt", encoding="utf-8") as file:
        wiki = file.read(characters)
    with lzma.open(data / "text/shard_00.txt.xz", "rt", encoding="utf-8") as file:
        books = file.read(characters // 3)
    return wiki[300_000:] + books, wiki[:300_000]


def superni(data: Path) -> list[list[Example]]:
    """Natural Instructions tasks fit for few-shot rows: definitions cut to 200 characters, long inputs dropped."""
    tasks = []
    for file in sorted([*data.glob("superni/ni_v1/*.json"), *data.glob("superni/sapt_superni/*/train.json")]):
        if any(name in str(file) for name in EXCLUDED):
            continue
        short = [e for e in read_superni(file) if len(e.context) < 400 and 0 < len(e.response) < 150]
        if len(short) > 20:
            tasks.append([Example(e.instruction[:200], e.context, e.response, e.category) for e in short])
    return tasks


def train_tokenizer(folder: Path, text: str, tasks: list[list[Example]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 3,072 entries on text, office episodes and Natural Instructions."""
    rng = random.Random(1)
    office = ["\n".join(prompt_text(e) + e.response for e in episode(rng, 4)) for _ in range(5000)]
    natural = [prompt_text(e) + e.response for task in tasks for e in task[:200]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3072 - len(HEADERS),
        special_tokens=["<|pad|>", "<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text[i : i + 2000] for i in range(0, len(text), 6000)] + office + natural, trainer)
    tokenizer.add_tokens([AddedToken(h, normalized=False) for h in HEADERS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", model_max_length=1024
    )
    fast.save_pretrained(folder)
    return fast


class Rows:
    """Batches as a function of the step. Each row is (tokens, loss weight of each token)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str, tasks: list[list[Example]], seed: int) -> None:
        self.tokenizer, self.tasks, self.seed = tokenizer, tasks, seed
        pieces = [text[i : i + 50_000] for i in range(0, len(text), 50_000)]
        encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
        self.text = torch.tensor([t for piece in encoded for t in piece], dtype=torch.int32)

    def join(self, examples: list[Example], length: int) -> tuple[list[int], list[float], list[int]]:
        """Examples one after another, cut at `length`; the third list names the example each response token is of."""
        ids, weight, shot = [self.tokenizer.bos_token_id], [0.0], [IGNORED]
        prompts = self.tokenizer([prompt_text(e) for e in examples], add_special_tokens=False)["input_ids"]
        answers = self.tokenizer([e.response for e in examples], add_special_tokens=False)["input_ids"]
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            answer = [*answer, self.tokenizer.eos_token_id]
            ids += prompt + answer
            weight += [PROMPT_WEIGHT] * len(prompt) + [1.0] * len(answer)
            shot += [IGNORED] * len(prompt) + [i] * len(answer)
        pad = max(0, length - len(ids))
        return (
            (ids + [0] * pad)[:length],
            (weight + [0.0] * pad)[:length],
            (shot + [IGNORED] * pad)[:length],
        )

    def office(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(f"{self.seed} office {step}")
        rows = [self.join(episode(rng, 9), OFFICE_TOKENS) for _ in range(OFFICE_ROWS)]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])

    def natural(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Half plain text, half few-shot rows of one task each; half of those in a random house's dress."""
        rng, rows = random.Random(f"{self.seed} text {step}"), []
        for i in range(TEXT_ROWS):
            if i % 2:
                start = rng.randrange(len(self.text) - TEXT_TOKENS)
                rows.append((self.text[start : start + TEXT_TOKENS].tolist(), [1.0] * TEXT_TOKENS))
                continue
            shots = rng.sample(rng.choice(self.tasks), 12)
            if rng.random() < 0.5:
                style = random_style(rng)
                shots = [Example(e.instruction, e.context, style.dress([e.response])) for e in shots]
            rows.append(self.join(shots, TEXT_TOKENS)[:2])
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])


@torch.no_grad()
def in_context(model: LlamaForCausalLM, rows: Rows, held_out: torch.Tensor) -> dict[str, object]:
    """Nats per response token on the 1st to 5th example of held-out episodes, and per token of held-out text."""
    rng, losses, shots = random.Random("in-context"), [], []
    for i in range(42):
        task, style = sorted(TASKS)[i % 7], random_style(rng)
        stream = contents(task, "adaptation", rng)
        chosen = [(c[0], c[1], style.dress(c[2])) for c in (next(stream) for _ in range(5))]
        ids, _, shot = rows.join([Example(*c, task) for c in chosen], 384)
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
        shots.append(torch.tensor(shot[1:]))
    loss, shot_of = torch.cat(losses), torch.cat(shots)
    logits = model(input_ids=held_out).logits[:, :-1].float()
    text = F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()
    return {"by_shot": [round(loss[shot_of == i].mean().item(), 4) for i in range(5)], "text": round(text, 4)}


def optimisers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "layers" not in n]
    return [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(folder: Path, step: int, model: LlamaForCausalLM, optimisers_: list[torch.optim.Optimizer]) -> None:
    """One file with weights, optimiser state and step, replaced atomically."""
    tensors = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters()}
    for i, optimiser in enumerate(optimisers_):
        for j, state in optimiser.state_dict()["state"].items():
            tensors |= {f"opt.{i}.{j}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    save_file(tensors, folder / "state.tmp", metadata={"step": str(step)})
    (folder / "state.tmp").replace(folder / "state.safetensors")
    (folder / "step.json").write_text(json.dumps({"step": step}))


def restore(folder: Path, model: LlamaForCausalLM, optimisers_: list[torch.optim.Optimizer]) -> int:
    """Undo `save`; 0 where nothing was saved."""
    if not (folder / "state.safetensors").exists():
        return 0
    tensors = load_file(folder / "state.safetensors")
    model.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model.")}, strict=False)
    for i, optimiser in enumerate(optimisers_):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"opt.{i}."):
                _, _, j, key = name.split(".")
                state.setdefault(int(j), {})[key] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(json.loads((folder / "step.json").read_text())["step"])


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: 100 steps up, flat, the last 40 % linearly down to 2 %."""
    return min((step + 1) / 100, 1.0, 0.02 + (steps - step) / (0.4 * steps))


def network(vocabulary: int) -> LlamaForCausalLM:
    """The base, untrained: 8 layers of width 256."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, rope_theta=10_000.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train, or go on training, until `--steps`."""
    arguments = options()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    text, held = documents(arguments.data, 16_000_000)
    tasks = superni(arguments.data)
    folder = arguments.work / "tokenizer"
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(folder) if folder.exists() else train_tokenizer(folder, text, tasks)
    )
    rows = Rows(tokenizer, text, tasks, arguments.seed)
    held_out = torch.tensor(tokenizer(held, add_special_tokens=False)["input_ids"][: 8 * 512]).view(8, 512)
    model = network(len(tokenizer))
    opts = optimisers(model)
    first = restore(arguments.work, model, opts)
    peaks = [[g["lr"] for g in o.param_groups] for o in opts]
    print(
        f"{model.num_parameters():,} parameters, {len(rows.text):,} text tokens, {len(tasks)} tasks, from step {first}"
    )

    def loss_of(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        each = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (each * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()

    step_loss = torch.compile(loss_of) if arguments.compile else loss_of
    started, tokens = time.time(), OFFICE_ROWS * OFFICE_TOKENS + TEXT_ROWS * TEXT_TOKENS
    for step in range(first, arguments.steps):
        for opt, peak in zip(opts, peaks, strict=True):
            for group, lr in zip(opt.param_groups, peak, strict=True):
                group["lr"] = lr * rate(step, arguments.steps)
        office = step_loss(*rows.office(step))
        (0.65 * office).backward()
        natural = step_loss(*rows.natural(step))
        (0.35 * natural).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if (step + 1) % 20 == 0:
            row: dict[str, object] = {
                "step": step + 1,
                "office": round(office.item(), 4),
                "natural": round(natural.item(), 4),
            }
            row["tokens_per_second"] = round((step + 1 - first) * tokens / (time.time() - started))
            if (step + 1) % 100 == 0 or step + 1 == arguments.steps:
                row |= in_context(model, rows, held_out)
                for opt, peak in zip(opts, peaks, strict=True):
                    for group, lr in zip(opt.param_groups, peak, strict=True):
                        group["lr"] = lr
                save(arguments.work, step + 1, model, opts)
            with (arguments.work / "loss.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
