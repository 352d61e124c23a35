"""The README.md of an export: what the files are, and how they are loaded without this package."""

from __future__ import annotations

from typing import Any

from smartmops.base.builtin import BUILT_IN

PEFT = """# Experts as prefixes for `{base}`

Each folder is one expert of a smartmops run as a prefix that plain PEFT loads, seen by every token as in the run.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{first}")
```

{save}The gate does not come along: whoever loads an expert has chosen it. Texts are written as in training. In a batch
padded on the left PEFT's `forward` puts the padding between prefix and text; `generate` counts positions without it.

{table}
"""
KV = """# Experts as keys and values for `{base}`

Each `.safetensors` file is one expert of a smartmops run: for every layer N that it enters, `layers.N.keys` and
`layers.N.values` [columns, kv heads, width], and `layers.N.log_weights` [columns], which are added to the attention
logits of the columns (or a column stands exp(log weight) times, which is the same). Keys are rotated for a text whose
first token is at position 0. `about` in the metadata names the base, which tokens see the columns (`visible_to`: all,
or the answer's header and the answer alone) and the token ids of that header.

{save}`answer.py` does it in plain transformers, and is short enough to be copied from:

```
python answer.py {base} {first}.safetensors "a text up to the answer, as the base's template writes it"
```

{table}
"""
ROUTER = """# The gate of a smartmops run on `{base}`

`router.onnx` takes {inputs} and gives `weights` [rows, experts], which sum to {sum}, and
`left_to_base` [rows], the share of all weight that no expert gets.
Experts, in order: {experts}.{by_name}

{use}
Compared with the run on {texts} texts: the same expert for {same}, weights differ by {largest:.1g} at most.
"""
SCRIPT = """```
python route.py . "Name three rivers."
```

`route.py` needs onnxruntime, tokenizers and numpy.
"""


SAVE = """`{base}` is a name that smartmops alone knows. Where it is installed, this makes a folder of that name here,
which transformers loads:

```
python -c 'import smartmops; [each.save_pretrained("{base}") for each in smartmops.load_base("{base}")]'
```

"""


def peft_page(found: dict[str, Any]) -> str:
    """Of prefixes for PEFT."""
    return PEFT.format(base=found["base"], first=_first(found), table=_table(found), save=_save(found["base"]))


def kv_page(found: dict[str, Any]) -> str:
    """Of keys and values."""
    return KV.format(base=found["base"], first=_first(found), table=_table(found), save=_save(found["base"]))


def _save(base: str) -> str:
    """How a base that comes with this package becomes one that transformers finds."""
    return SAVE.format(base=base) if base in BUILT_IN else ""


def router_page(found: dict[str, Any], about: dict[str, Any]) -> str:
    """Of the gate."""
    features = about.get("features")
    inputs = (f"`features` [rows, inputs], an {features}," if features else
              "`input_ids` and `reads` [rows, tokens], 1 on the tokens of the user's text,")  # fmt: skip
    total = "one" if about.get("sum_to_one", True) else "one or less (what is not kept goes to no expert)"
    silent = "".join(
        f"\n`{name}` answers by name only, so its weight is always 0." for name in about.get("by_name", ())
    )
    return ROUTER.format(base=found["base"], inputs=inputs, sum=total, by_name=silent,
                         use="" if features else SCRIPT, texts=found["texts"], same=found["same"],
                         largest=found["largest_difference"],
                         experts=", ".join(f"`{name}`" for name in found["experts"]))  # fmt: skip


def _first(found: dict[str, Any]) -> str:
    return str(next(iter(found["experts"].values()))["file"])


def _table(found: dict[str, Any]) -> str:
    """What was compared with the run when it was written."""
    lines = ["| expert | columns | tokens compared | the same | largest difference, nats |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {each['columns']} | {each['tokens']} | {each['same']} | {each['largest_difference']:.1e} |"
              for name, each in found["experts"].items()]  # fmt: skip
    return "\n".join(lines)
