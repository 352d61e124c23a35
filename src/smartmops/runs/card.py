"""What lies in an adapter's folder beside its tensors: the template it was trained with, and a card for people.

Knows PEFT's folders and templates. Trains nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from smartmops.base.builtin import BUILT_IN
from smartmops.base.names import HUB_ID, local, shown_name
from smartmops.checks.errors import ConfigError
from smartmops.data.several import names_of
from smartmops.rows.example import Example
from smartmops.settings.writing import versions
from smartmops.tokens.frames import gate_frame
from smartmops.tokens.template import FILE, Template
from smartmops.traits import METHODS

from .folder import PATHS, Run, write_text

SHOWN = Example("Name the animal.", "A cat sat on the mat.", "The cat.")
CARD = """---
library_name: peft
pipeline_tag: text-generation
{front}tags:
- smartmops
---
# {method} on {base}

An adapter for the frozen model `{base}`, trained with smartmops {version} (method `{method}`, data `{data}`). It works
on that model only{where}. {licence}{changed}
{numbers}
## Load it

```python
import smartmops  # enters the method into PEFT
from peft import PeftModel

model, tokenizer = smartmops.load_base("{base}"){template_line}
model = PeftModel.from_pretrained(model, "{place}")
asked = smartmops.render(tokenizer, "Your question", template="{kind}")
answer = model.generate(inputs=torch.tensor([asked.input_ids]), {mask}max_new_tokens=48)
print(tokenizer.decode(answer[0]))
```

## How text is put to it

{how} An instruction with a context and its answer look like this:

{shown}

The answer is learnt up to and including `{end}`, where generation stops.
"""
PLACE = "THIS FOLDER"
COMPARED = "mops"  # of several methods that are compared, the one whose adapter is kept
USES = {"train": "train on", "validation": "choose the state by", "test": "test on"}  # of the parts of the data
SETTINGS = ("rounds", "local_steps", "clients_per_round", "steps", "seed")  # that tell how long it was trained
UNMEASURED = "\nWhat it was measured to do stands in `metrics.json` of its run; nothing else is claimed.\n"
# The licences of bases that need only a name; what others have stands in their own card.
LICENCES = {"smollm2": "apache-2.0"}
ORIGINS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def keep(run: Run, model: Any, template: Template) -> None:
    """Save an adapter into its run, with the template and a card.

    Raises:
        AdapterError: as `Run.save_adapter`.
    """
    run.save_adapter(lambda folder: save(model, folder, template, run.config))


def number(run: Run, template: Template, metrics: Mapping[str, Any]) -> None:
    """Put a run's numbers into the card of its adapter."""
    write_text(run.adapter_dir / "README.md", card(template, run.config, metrics))


def save(
    model: Any, folder: Path, template: Template, config: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter, its template and its card into an empty folder; arguments as `card`."""
    model.save_pretrained(folder)
    if template.source is not None:
        (folder / FILE).write_text(template.source, encoding="utf-8")
    (folder / "README.md").write_text(card(template, config, metrics), encoding="utf-8")


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
    named, paths = str(config.get("base", "unknown")), config.get(PATHS, ())
    base, data = (
        " ".join(shown_name(name, paths) for name in names_of(config.get(key, "unknown"))) for key in ("base", "data")
    )
    chat, licence = template.source is not None, licence_of(named, paths)
    origin = ORIGINS.get(named, named if base == named and "/" in named else None)
    file = f'open("{place}/{FILE}").read()' if place == PLACE else f'open(hf_hub_download("{place}", "{FILE}")).read()'
    front = [f"base_model: {origin}"] * (origin is not None) + [f"license: {licence}"] * (licence is not None)
    found = CARD.format(
        method=COMPARED if config.get("command") == "compare" else config.get("method", "unknown"), base=base, data=data, version=versions().get("smartmops", ""),
        kind="chat" if chat else "plain", end=template.end, place=place, front="".join(f"{line}\n" for line in front),
        where=", a folder of its author's: below, put where it lies with you in its place" if named in paths or named != base else "",
        licence=f"The base's licence is {licence}." if licence else "The base's own licence holds; its card names it.",
        changed="".join(f"\n\nChanged after training: {each['command']}." for each in config.get("changed", [])),
        mask="gate_mask=torch.tensor([asked.gate_mask]), " if _needs_mask(template, config) else "",
        template_line=f"\ntokenizer.chat_template = {file}" if chat else "",
        numbers=UNMEASURED if metrics is None else _numbers(config, metrics) or UNMEASURED,
        how=f"With the chat template in `{FILE}`." if chat else "In a plain frame.",
        shown=_quoted(_example(template)),
    )  # fmt: skip
    imports = "import torch\n" if not (chat and place != PLACE) else "import torch\nfrom huggingface_hub import hf_hub_download\n"
    return found.replace("from peft import PeftModel\n", imports + "from peft import PeftModel\n", 1)


def _example(template: Template) -> str:
    """An example as the template writes it; of a template that refuses it, why."""
    try:
        opened = template.words(template.parts([SHOWN]))
        return opened + template.answer([SHOWN], opened) + template.end
    except ConfigError as error:
        return f"No example: {error}."


def _needs_mask(template: Template, config: Mapping[str, Any]) -> bool:
    """Whether the gate has to be told what the user wrote, since no token ids around it say so."""
    named = COMPARED if config.get("command") == "compare" else config.get("method")
    gated = named in METHODS and METHODS[named].reads
    return gated and template.tokenizer.is_fast and gate_frame(template) is None


def _numbers(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Perplexity by task, frozen and adapted, and the runs that measured it; empty where nothing was measured."""
    found = metrics.get("perplexity")
    if not found:
        return ""
    compared = "per_seed" in metrics
    if compared:
        sides = {name: {"overall": value, "per_task": metrics["per_task"][name]} for name, value in found.items()}
    elif "perplexity_frozen" in metrics:
        sides = {"frozen": metrics["perplexity_frozen"], "adapted": found}
    else:
        return ""
    what = metrics.get("measured_on", "the run's test split")
    lines = ["", "## What it was measured to do", "", f"Perplexity over the answers' tokens of {what}:", "",
             f"| task | {' | '.join(name.replace('_', ' ') for name in sides)} |", f"|{'---|' * (len(sides) + 1)}"]  # fmt: skip
    for task in next(reversed(sides.values()))["per_task"]:
        lines.append(_row(task or "no task", (side["per_task"].get(task) for side in sides.values())))
    lines.append(_row("**overall**", (side["overall"] for side in sides.values())))
    lines += ["", _means(config, metrics) if compared else f"One run{_told(config, metrics)}."]
    lines += [line for name, each in metrics.get("added", {}).items() for line in ("", _added(name, each))]
    if metrics.get("gained") is False and not metrics.get("added"):
        closed = metrics.get("best", {}).get("adapter") == "closed"
        lines += ["", f"**Nothing was gained{': it answers as' if closed else ' over'} the frozen base{' does' * closed}.**"]
    return "\n".join([*lines, ""])


def _added(name: str, new: Mapping[str, Any]) -> str:
    """One sentence about an expert that came after training, as it was measured then."""
    return (f"Expert `{name}`, added later: {new['frozen']:.2f} frozen, {new['before']:.2f} before and {new['after']:.2f} "
            f"with it, on {new['rows']} test examples of its own.")  # fmt: skip


def _row(name: str, values: Iterable[float | None]) -> str:
    """One line of the table; a task that a side did not measure says so."""
    return f"| {name} | {' | '.join('not run' if value is None else f'{value:.2f}' for value in values)} |"


def _means(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Over which seeds several methods were compared, and which of all adapters this is."""
    seeds = [str(seed) for seed in metrics["seeds"]]
    own = metrics["per_seed"].get(COMPARED, [None])[0]
    several = f"Means over seeds {', '.join(seeds)}" if len(seeds) > 1 else f"One seed, {seeds[0]}"
    this = f"; this adapter is `{COMPARED}` of seed {seeds[0]}" + ("" if own is None else f", {own:.2f} overall")
    return f"{several}{_told(config, metrics)}{this}."


def _told(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """How long it was trained, on how much; with a colon in front."""
    arguments, counts = config.get("arguments", {}), metrics.get("examples", {})
    federated, compared = config.get("command", "").startswith("federate"), "per_seed" in metrics
    left_out = {"steps"} if federated else {"rounds", "local_steps", "clients_per_round"}
    names = [name for name in SETTINGS if name not in left_out | ({"seed"} if compared else set())]
    if arguments.get("patience") and (last := metrics.get("best", {}).get("last_step", 0)) < arguments["steps"]:
        arguments = arguments | {"steps": f"{last} of {arguments['steps']}"}
    told = [f"{name.replace('_', ' ')} {arguments[name]}" for name in names if arguments.get(name) is not None]
    told += [f"{metrics['clients']} clients"] if federated and metrics.get("clients") else []
    told += [f"{count} examples to {USES.get(name, name)}" for name, count in counts.items() if count]
    return f": {', '.join(told)}" if told else ""


def licence_of(base: str, paths: Collection[str] = ()) -> str | None:
    """The licence that a base's own card names in its front matter; None where there is no such card at hand.

    `paths` are names that were paths when the run began: where one of them is gone, what the hub calls so is another's.
    """
    if base in LICENCES:
        return LICENCES[base]
    found = Path(local(base)) / "README.md" if base in BUILT_IN else Path(base) / "README.md"
    if not found.is_file():
        of_hub = HUB_ID.fullmatch(base) and shown_name(base, paths) == base
        cached = try_to_load_from_cache(base, "README.md") if of_hub else None
        if not isinstance(cached, str):
            return None
        found = Path(cached)
    front = found.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    named = re.search(r"^license:\s*[\"']?([\w.-]+)", front, re.MULTILINE) if front.startswith("---") else None
    return named[1] if named else None


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))
