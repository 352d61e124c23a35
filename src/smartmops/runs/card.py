"""What lies in an adapter's folder beside its tensors: the template it was trained with, and a card for people.

Knows PEFT's folders and templates. Trains nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from smartmops.base.builtin import BUILT_IN
from smartmops.base.names import HUB_ID, local
from smartmops.data.several import names_of
from smartmops.rows.example import Example
from smartmops.tokens.template import FILE, Template

from .folder import Run, versions, write_text

SHOWN = Example("Name the animal.", "A cat sat on the mat.", "The cat.")
CARD = """---
library_name: peft
pipeline_tag: text-generation
{front}tags:
- smartmops
---
# {method} on {base}

An adapter for the frozen model `{base}`, trained with smartmops {version} (method `{method}`, data `{data}`). It works
on that model only. {licence}
{numbers}
## Load it

```python
import smartmops  # enters the method into PEFT
from peft import PeftModel

model, tokenizer = smartmops.load_base("{base}"){template_line}
model = PeftModel.from_pretrained(model, "{place}")
inputs = smartmops.render(tokenizer, "Your question", template="{kind}").input_ids
print(tokenizer.decode(model.generate(inputs=torch.tensor([inputs]), max_new_tokens=48)[0]))
```

## How text is put to it

{how} An instruction with a context and its answer look like this:

{shown}

The answer is learnt up to and including `{end}`, where generation stops.
"""
PLACE = "THIS FOLDER"
UNMEASURED = "\nWhat it was measured to do stands in `metrics.json` of its run; nothing else is claimed.\n"
# The licences of bases that need only a name; what others have stands in their own card.
LICENCES = {"smollm2": "apache-2.0"}
ORIGINS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def keep(run: Run, model: Any, template: Template) -> None:
    """Save an adapter into its run, with the template and a card.

    Raises:
        AdapterError: as `Run.save_adapter`.
    """
    run.save_adapter(lambda folder: _save(model, folder, template, run.config))


def number(run: Run, template: Template, metrics: Mapping[str, Any]) -> None:
    """Put a run's numbers into the card of its adapter."""
    write_text(run.adapter_dir / "README.md", card(template, run.config, metrics))


def _save(model: Any, folder: Path, template: Template, config: Mapping[str, Any]) -> None:
    model.save_pretrained(folder)
    if template.source is not None:
        (folder / FILE).write_text(template.source, encoding="utf-8")
    (folder / "README.md").write_text(card(template, config), encoding="utf-8")


def card(
    template: Template, config: Mapping[str, Any], metrics: Mapping[str, Any] | None = None, place: str = PLACE
) -> str:
    """The card of an adapter: base, method, numbers, template, how to load it. Folders are named without where they are.

    Args:
        template: It was trained with.
        config: Of its run: `base`, `method`, `data` and `arguments`.
        metrics: Of its run; None: not measured yet.
        place: Where it is loaded from: this folder, or a repository of the hub.
    """
    named = str(config.get("base", "unknown"))
    base, data = (
        " ".join(map(shown_name, names_of(config.get(key, "unknown")))) for key in ("base", "data")
    )
    chat, opened = template.source is not None, template.words(template.parts([SHOWN]))
    licence, origin = licence_of(named), ORIGINS.get(named, named if base == named and "/" in named else None)
    file = f'open("{place}/{FILE}").read()' if place == PLACE else f'open(hf_hub_download("{place}", "{FILE}")).read()'
    front = [f"base_model: {origin}"] * (origin is not None) + [f"license: {licence}"] * (licence is not None)
    found = CARD.format(
        method=config.get("method", "unknown"), base=base, data=data, version=versions().get("smartmops", ""),
        kind="chat" if chat else "plain", end=template.end, place=place, front="".join(f"{line}\n" for line in front),
        licence=f"The base's licence is {licence}." if licence else "The base's own licence holds; its card names it.",
        template_line=f"\ntokenizer.chat_template = {file}" if chat else "",
        numbers=UNMEASURED if metrics is None else _numbers(config, metrics),
        how=f"With the chat template in `{FILE}`." if chat else "In a plain frame.",
        shown=_quoted(opened + template.answer([SHOWN], opened) + template.end),
    )  # fmt: skip
    imports = "import torch\n" if not (chat and place != PLACE) else "import torch\nfrom huggingface_hub import hf_hub_download\n"
    return found.replace("from peft import PeftModel\n", imports + "from peft import PeftModel\n", 1)


def _numbers(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Perplexity by task, frozen and adapted, and the run that measured it."""
    adapted, frozen = metrics.get("perplexity"), metrics.get("perplexity_frozen")
    if not adapted or not frozen:
        return UNMEASURED
    lines = ["", "## What it was measured to do", "", "Perplexity over the answers' tokens of the run's test split:", "",
             "| task | frozen | adapted |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {task or 'no task'} | {frozen['per_task'][task]:.2f} | {value:.2f} |"
              for task, value in adapted["per_task"].items()]  # fmt: skip
    lines.append(f"| **overall** | {frozen['overall']:.2f} | {adapted['overall']:.2f} |")
    arguments, counts = config.get("arguments", {}), metrics.get("examples", {})
    told = [f"{name} {arguments[name]}" for name in ("steps", "seed") if arguments.get(name) is not None]
    told += [f"{count} examples to {'train on' if name == 'train' else name}" for name, count in counts.items() if count]
    lines += ["", f"One run: {', '.join(told)}." if told else "One run."]
    if metrics.get("gained") is False:
        lines += ["", "**Nothing was gained: it answers as the frozen base does.**"]
    return "\n".join([*lines, ""])


def licence_of(base: str) -> str | None:
    """The licence that a base's own card names in its front matter; None where there is no such card at hand."""
    if base in LICENCES:
        return LICENCES[base]
    found = Path(local(base)) / "README.md" if base in BUILT_IN else Path(base) / "README.md"
    if not found.is_file():
        cached = try_to_load_from_cache(base, "README.md") if HUB_ID.fullmatch(base) else None
        if not isinstance(cached, str):
            return None
        found = Path(cached)
    front = found.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    named = re.search(r"^license:\s*[\"']?([\w.-]+)", front, re.MULTILINE) if front.startswith("---") else None
    return named[1] if named else None


def shown_name(name: str) -> str:
    """A name without where it lies, where it is a path."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))
