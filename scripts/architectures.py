#!/usr/bin/env python3
"""Every causal model of transformers, built tiny with random weights: does it carry the method, or why not?

    PYTHONPATH=src python scripts/architectures.py [NAME...]     # all that docs/architectures.json does not hold yet
                                                                 # (some minutes); names: those alone, printed only

writes docs/architectures.json and, from it, docs/architectures.md. For both kinds of experts an architecture works
where a padded row gives the logits of that row alone, decoding over a cache gives those of one pass, experts that
nobody attends to leave the model as it was, and others do not.
"""

from __future__ import annotations

import copy
import inspect
import json
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from smartmops import MoPsConfig
from smartmops.attention.context import ForwardContext

FOLDER = Path(__file__).resolve().parents[1] / "docs"
KINDS = ("hidden_states", "keys_values")
TOLERANCE = 1e-4  # of the largest logit
LIMIT = 20e6  # parameters: what is larger was not made tiny
SECONDS = 40  # for each architecture
LAYERS, VOCABULARY = 4, 300
WIDTHS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "moe_shared_expert_intermediate_size": 32,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "head_dim"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "o_lora_rank", "index_head_dim"), 16),
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "is_decoder": True,
    "first_k_dense_replace": 1, "encoder_layers": 1, "encoder_attention_heads": 4, "layerdrop": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 8, "index_n_heads": 2,
    "num_kv_shared_layers": 0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # what the general numbers do not fit
    "moshi": dict(num_key_value_heads=4), "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2), "xlnet": dict(d_head=16, d_inner=96),
}  # fmt: skip


def build(name: str) -> Any:
    """A tiny random model in eval mode.

    Raises:
        Exception: whatever its own code raises for these sizes.
        ValueError: it is not tiny.
    """
    kind = type(AutoConfig.for_model(name))
    config = _small(kind, OWN.get(name, {}))
    torch.manual_seed(0)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if (count := sum(p.numel() for p in empty.parameters())) > LIMIT:
        raise ValueError(f"{count / 1e6:.0f} M parameters under these sizes")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)  # weights of deviation 0.02 attend almost evenly, which would show nothing
    return model


def _small(kind: type, own: dict[str, Any]) -> Any:
    whole = kind()
    sizes = {name: value for name, value in WIDTHS.items() if hasattr(whole, name) and not _fixed(kind, name)}
    if hasattr(whole, "kv_lora_rank"):
        sizes["num_key_value_heads"] = 4  # keys and values of every head come from one small vector
    sizes |= own
    if hasattr(whole, "text_config") and whole.text_config is not None:
        sizes["text_config"] = _small(type(whole.text_config), own)
    return kind(**sizes)


def _fixed(kind: type, name: str) -> bool:
    """Whether a size is worked out from others."""
    found = getattr(kind, name, None)
    return isinstance(found, property) and found.fset is None


def rows() -> dict[str, torch.Tensor]:
    """Two rows, the first with three columns of padding before it."""
    ids = torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def examine(name: str) -> dict[str, str]:
    """For each kind of experts: "works", or why not; "built" says why there is no model to try."""
    try:
        with torch.no_grad():
            build(name)(**rows(), use_cache=False)
    except Exception as error:
        return {"built": _line(error)}
    return {experts: _verdict(name, experts) for experts in KINDS}


def _verdict(name: str, experts: str) -> str:
    plain, base = build(name), build(name)
    try:
        config = MoPsConfig(num_experts=2, prompts_per_expert=3, injection_layer=1, experts=experts)
        model = get_peft_model(base, config).eval()
    except ValueError as error:
        return f"refused: {_line(error)}"
    except Exception as error:
        return f"fails: {_line(error)}"
    try:
        with torch.no_grad():
            for part, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape) * (0.3 if "gate" in part else 1))
            return _compare(plain, model)
    except Exception as error:
        return f"fails: {_line(error)}"


def _compare(plain: Any, model: Any) -> str:
    both = rows()
    logits, bare = model(**both).logits, _bare(plain, both)
    apart = {
        "padded = alone": max(_apart(logits[i : i + 1, own], model(**each).logits) for i, own, each in _alone(both)),
        "cached = uncached": _apart(_stepwise(model, both), logits[:, -1:]),
    }
    real = both["attention_mask"].bool()
    with _nobody_looks():
        apart["inert = bare"] = _apart(model(**both).logits[real], bare[real])
    if _apart(logits[real], bare[real]) < 1e-3:
        return "fails: experts change nothing"
    bad = {name: f"{name} is {value:.0e} off" for name, value in apart.items() if not value < TOLERANCE}
    if bad and set(bad) <= _bare_differs(plain, both):
        return f"as the bare model, {', '.join(bad.values())}: its own rows or cache are not exact there either"
    return f"fails: {', '.join(bad.values())}" if bad else "works"


def _bare(plain: Any, both: dict[str, torch.Tensor]) -> torch.Tensor:
    return plain(**both, **_positions(plain, both["attention_mask"])).logits


def _positions(plain: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Counted over real tokens, as the adapter counts them, for models that name them."""
    if "position_ids" not in inspect.signature(type(plain).forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _bare_differs(plain: Any, both: dict[str, torch.Tensor]) -> set[str]:
    """The comparisons in which the model fails by itself, by numbers that are numbers."""
    whole = _bare(plain, both)
    alone = max(_apart(whole[i : i + 1, own], _bare(plain, each)) for i, own, each in _alone(both))
    short = {name: each[:, :-1] for name, each in both.items()}
    first = plain(**short, **_positions(plain, short["attention_mask"]), use_cache=True)
    at = {name: each[:, -1:] for name, each in _positions(plain, both["attention_mask"]).items()}
    step = {"input_ids": both["input_ids"][:, -1:], "attention_mask": both["attention_mask"], **at}
    stepped = _apart(plain(**step, past_key_values=first.past_key_values).logits, whole[:, -1:])
    return {name for name, off in (("padded = alone", alone), ("cached = uncached", stepped)) if off >= TOLERANCE}


def _alone(both: dict[str, torch.Tensor]) -> Iterator[tuple[int, slice, dict[str, torch.Tensor]]]:
    for i in range(2):
        own = slice(int((both["attention_mask"][i] == 0).sum()), None)
        yield i, own, {name: each[i : i + 1, own] for name, each in both.items()}


def _stepwise(model: Any, both: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the last token, which comes alone over a cache of the others; the gate reads the others both times."""
    chosen = both["attention_mask"].clone()
    out = model(**{name: each[:, :-1] for name, each in both.items()}, gate_mask=chosen[:, :-1], use_cache=True)
    step = {"input_ids": both["input_ids"][:, -1:], "attention_mask": both["attention_mask"]}
    found = model(**step, past_key_values=out.past_key_values).logits
    chosen[:, -1] = 0
    whole = model(**both, gate_mask=chosen).logits[:, -1:]
    return found - whole + model(**both).logits[:, -1:]


@contextmanager
def _nobody_looks() -> Iterator[None]:
    put = ForwardContext.put
    ForwardContext.put = lambda self, kv, bias: put(self, kv, torch.full_like(bias, -1e30))  # type: ignore[method-assign]
    try:
        yield
    finally:
        ForwardContext.put = put  # type: ignore[method-assign]


def _apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def _line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def page(found: dict[str, dict[str, str]], version: str) -> str:
    """The page, from results."""
    tried = {name: each for name, each in found.items() if "built" not in each}
    works = [name for name, each in tried.items() if all(each[kind] == "works" for kind in KINDS)]
    refused = [name for name, each in tried.items() if all(each[kind].startswith("refused") for kind in KINDS)]
    left = len(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(found))
    told_apart = len(tried) - len(works) - len(refused)
    lines = [
        "# Architectures", "",
        f"Every causal model of transformers {version} that can be built tiny with random weights, tried by",
        "`scripts/architectures.py` with both kinds of experts. It works where a padded row gives the logits of that",
        "row alone, decoding over a cache gives those of one pass, and experts that nobody attends to leave the model",
        f"as it was (to {TOLERANCE:.0e} of the largest logit, float32).", "",
        f"{len(works)} work with both kinds, {len(refused)} are refused with both, {told_apart} are told apart below,",
        f"{len(found) - len(tried)} could not be tried, {left} are still to be.", "",
        "| architecture | hidden_states | keys_values |", "|---|---|---|",
        *[f"| {name} | {each['hidden_states']} | {each['keys_values']} |" for name, each in tried.items()],
        "", "Not tried, since no tiny one could be built that runs by itself:", "",
        *[f"- {name}: {each['built']}" for name, each in found.items() if "built" in each],
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    """Try all, or those named."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    stored = FOLDER / "architectures.json"
    before = json.loads(stored.read_text()) if stored.is_file() and not names else {}
    found = before["architectures"] if before.get("transformers") == transformers.__version__ else {}
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if name in found:
            continue
        signal.signal(signal.SIGALRM, _late)
        signal.alarm(SECONDS)
        try:
            found[name] = examine(name)
        except TimeoutError as error:
            found[name] = {"built": str(error)}
        finally:
            signal.alarm(0)
        print(name, found[name], flush=True)
        if not names:
            found = dict(sorted(found.items()))
            results = {"transformers": transformers.__version__, "architectures": found}
            stored.write_text(json.dumps(results, indent=1) + "\n")
            (FOLDER / "architectures.md").write_text(page(found, transformers.__version__))


def _late(*_: Any) -> None:
    raise TimeoutError(f"not done in {SECONDS} s")


if __name__ == "__main__":
    main(sys.argv[1:])
