"""What lies in an adapter's folder beside its tensors: the template it was trained with, and a card for people.

Knows PEFT's folders and templates. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smartmops.rows.example import Example
from smartmops.tokens.template import FILE, Template

from .folder import Run, versions

SHOWN = Example("Name the animal.", "A cat sat on the mat.", "The cat.")
CARD = """---
library_name: peft
tags:
- smartmops
---
# {method} on {base}

An adapter for the frozen model `{base}`, trained with smartmops {version} (method `{method}`, data `{data}`). It works
on that model only. What it was measured to do stands in `metrics.json` of its run; nothing else is claimed.

## Load it

```python
import smartmops  # enters the method into PEFT
from peft import PeftModel
from smartmops.base import load_base

model, tokenizer = load_base("{base}"){template_line}
model = PeftModel.from_pretrained(model, "THIS FOLDER")
text = smartmops.render(tokenizer, "Your question", template="{kind}")
```

## How text is put to it

{how} An instruction with a context and its answer look like this:

{shown}

The answer is learnt up to and including `{end}`, where generation stops.
"""


def keep(run: Run, model: Any, template: Template) -> None:
    """Save an adapter into its run, with the template and a card.

    Raises:
        ValueError: as `Run.save_adapter`.
    """
    run.save_adapter(lambda folder: _save(model, folder, template, run.config))


def _save(model: Any, folder: Path, template: Template, config: Mapping[str, Any]) -> None:
    model.save_pretrained(folder)
    if template.source is not None:
        (folder / FILE).write_text(template.source, encoding="utf-8")
    (folder / "README.md").write_text(card(template, config), encoding="utf-8")


def card(template: Template, config: Mapping[str, Any]) -> str:
    """The card of an adapter: base, method, template, how to load it. Folders are named without where they are.

    Args:
        template: It was trained with.
        config: Of its run: `base`, `method` and `data`.
    """
    base, data = (_named(str(config.get(key, "unknown"))) for key in ("base", "data"))
    chat, opened = template.source is not None, template.words(template.parts([SHOWN]))
    return CARD.format(
        method=config.get("method", "unknown"), base=base, data=data, version=versions().get("smartmops", ""),
        kind="chat" if chat else "plain", end=template.end,
        template_line=f'\ntokenizer.chat_template = open("THIS FOLDER/{FILE}").read()' if chat else "",
        how=f"With the chat template in `{FILE}`." if chat else "In a plain frame.",
        shown=_quoted(opened + template.answer([SHOWN], opened) + template.end),
    )  # fmt: skip


def _named(name: str) -> str:
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))
