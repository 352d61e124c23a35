"""Answer one text with one exported expert: torch, transformers and safetensors, nothing else.

python answer.py BASE EXPERT.safetensors "text as the base's template writes it, up to the answer" [TOKENS]

BASE is the folder or hub id of the model that the expert was trained on. The file holds, for each layer that the
expert enters, `layers.N.keys` and `layers.N.values` [columns, kv heads, width] and `layers.N.log_weights` [columns].
Keys are rotated for a text whose first token is at position 0. A log weight is added to the attention logits of its
column; here, where attention takes no such bias, a column stands exp(log weight) times instead, which is the same.

One row, attention "sdpa", no sliding window: a single query needs no mask, so layers may hold different numbers of
columns.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def load(file: str) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
    """Keys and values of each layer, [1, kv heads, columns, width], and what the file says of itself."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        about = json.loads(opened.metadata()["about"])
    layers = {}
    for number in sorted({int(name.split(".")[1]) for name in tensors}):
        times = tensors[f"layers.{number}.log_weights"].double().exp().round().long()
        pair = (tensors[f"layers.{number}.{kind}"].repeat_interleave(times, 0) for kind in ("keys", "values"))
        key, value = (each.transpose(0, 1)[None] for each in pair)
        layers[number] = key, value
    return layers, about


def first_seeing(ids: list[int], about: dict[str, Any]) -> int:
    """The token from which on the text sees the expert: all of it, or header and answer alone."""
    if about["visible_to"] == "all":
        return 0
    header = about["answer_header"] or []
    for at in range(len(ids) - len(header), -1, -1):
        if header and ids[at : at + len(header)] == header:
            return at
    return len(ids) - 1


@torch.no_grad()
def read(model: Any, ids: list[int], file: str) -> tuple[torch.Tensor, DynamicCache, int]:
    """Read a text under the expert; logits of its last token, the cache, and how many tokens were read."""
    layers, about = load(file)
    cache, start = DynamicCache(), first_seeing(ids, about)
    if start > 0:  # read by the bare base
        model(input_ids=torch.tensor([ids[:start]], device=model.device), past_key_values=cache, use_cache=True)
    for number, pair in layers.items():
        cache.update(*(each.to(model.device, model.dtype) for each in pair), number)
    counts = {pair[0].shape[2] for pair in layers.values()}
    alike = start == 0 and len(counts) == 1 and len(layers) == model.config.num_hidden_layers
    first = len(ids) if alike else start
    if alike:  # layers hold as many columns each, so one mask serves all, and the text is read in one pass
        logits = steps(model, ids, 0, cache)
    for at in range(first, len(ids)):
        logits = steps(model, [ids[at]], at, cache)
    return logits, cache, len(ids)


@torch.no_grad()
def steps(model: Any, ids: list[int], at: int, cache: DynamicCache) -> torch.Tensor:
    """Logits behind more tokens, of which the first stands at position `at` of the text."""
    positions = torch.arange(at, at + len(ids), device=model.device)[None]
    out = model(input_ids=torch.tensor([ids], device=model.device), position_ids=positions, past_key_values=cache,
                use_cache=True)  # fmt: skip
    return out.logits[0, -1]  # type: ignore[no-any-return]


def follow(model: Any, ids: list[int], answer: list[int], file: str) -> torch.Tensor:
    """Logits [tokens, vocabulary] from which each token of a given answer would be chosen."""
    logits, cache, at = read(model, ids, file)
    found = [logits]
    for token in answer[:-1]:
        found.append(steps(model, [token], at, cache))
        at += 1
    return torch.stack(found)


def answer(model: Any, ids: list[int], file: str, most: int, stops: set[int]) -> list[int]:
    """The most likely token, one after the other, up to one of `stops` (left out) or `most` tokens."""
    logits, cache, at = read(model, ids, file)
    found: list[int] = []
    while len(found) < most and (token := int(logits.argmax())) not in stops:
        found.append(token)
        logits = steps(model, [token], at, cache)
        at += 1
    return found


def main(base: str, file: str, text: str, most: str = "48") -> None:
    """Print the answer."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stops = set(load(file)[1]["stops"])
    print(tokenizer.decode(answer(model, ids, file, int(most), stops)))


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 5 or {"-h", "--help"} & {*sys.argv}:
        sys.exit("python answer.py BASE EXPERT.safetensors TEXT [TOKENS]")
    main(*sys.argv[1:])
