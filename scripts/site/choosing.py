"""docs/choosing.md, its charts, and the table in docs/relatives.md, from results files. Words here, numbers from there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import mean

import charts
import results
from charts import COUNTS, FAMILIES, PATTERNS, PROMPTS, SETS
from results import (
    answered,
    below,
    by_hand,
    change,
    claim,
    family,
    figure,
    loaded,
    means,
    on,
    pruned,
    real,
    said,
    signed,
    worded,
)

PAGE, RELATIVES, FIGURES = "docs/choosing.md", "docs/relatives.md", "docs/figures"
WHOLE = "mops separate seen by all from the first layer"
APART = "one lora for each task behind our gate"
KINDS = {
    "mops": "MoPs, the defaults",
    "mops shared half": "half of the columns shared",
    "mops separate": "a softmax of their own",
    "mops from the first layer": "from the first layer",
    "mops seen by all": "seen by instructions too",
    WHOLE: "all three: own softmax, seen by all, from the first layer",
    "mops linear": "linear attention",
    "mops hidden states": "hidden states",
}


def files() -> dict[str, str]:
    """Page, charts, and the other page with its table."""
    page = "\n\n".join(part.strip() for part in parts()) + "\n"
    return {
        PAGE: page,
        RELATIVES: relatives(),
        **{f"{FIGURES}/{name}.svg": str(each) for name, each in charts.drawn().items()},
    }


def parts() -> Iterator[str]:
    """Of the page, in order: each a question, its answer, the picture, the table, and how to measure it on one's own."""
    yield opening()
    yield gate_or_not()
    yield left_alone()
    yield how_many_experts()
    yield many_tasks()
    yield how_many_prompts()
    yield which_layer()
    yield which_kind()
    yield which_compression()
    yield federated()
    yield closing()


def opening() -> str:
    """The chart of choices."""
    return """# How to choose

Written by `python scripts/site/write.py` from the results files of this repository; what a number is of stands beside it. The
defaults are a good start: name your data, and each of its tasks gets an expert. What follows says when to depart.

![Flow chart: from a situation to settings](figures/flow.svg)

Two bases were measured on. **SmolLM2** is SmolLM2-135M-Instruct, a model one would use. **The embedded base** has 6 M
parameters, comes with the package and reads its context poorly, so what is known from it alone is a hint."""


def gate_or_not() -> str:
    """Gated experts, one prompt, or one LoRA."""
    answer = []
    for data, what in SETS.items():
        ours, ungated, lora = (on(data, family(data, name), "test") for name in ("mops", "ungated", "lora"))
        answer.append(f"- On {what}, MoPs' perplexity is {worded(ours, ungated)} that of ungated prompts "
                      f"({below(ours, ungated)} lower) and {worded(ours, lora)} that of one tuned LoRA.")  # fmt: skip
    table = ["| data | frozen | ungated | MoPs | one LoRA | gate told tasks apart |", "|---|---|---|---|---|---|"]
    for data, what in SETS.items():
        cells = [said(on(data, family(data, name), "test")) for name in FAMILIES]
        gate = mean(cell["gate_accuracy"] for cell in real(data)["mops"].values())
        table.append(f"| {what} | {' | '.join(cells)} | {100 * gate:.0f} % |")
    chosen = ", ".join(f"{family(data, 'lora').split()[-1]}" for data in SETS)
    tasks = {data: means(data, "test", FAMILIES) for data in SETS}
    gated = claim(all((each["mops"] < each["ungated"]) == (data != "dolly") for data, each in tasks.items()),
                  "Where tasks conflict, gated experts beat one shared prompt; where they are styles of one kind, they do "
                  "not.")  # fmt: skip
    first = claim(all(each["lora"] < min(each["mops"], each["ungated"]) for each in tasks.values()),
                  "For quality on the tasks alone, one tuned LoRA is ahead of both.")  # fmt: skip
    apart = [
        f"{signed(change(on(data, APART, 'test'), on(data, 'mops', 'test')))} on {what}" for data, what in SETS.items()
    ]
    return f"""## A gate, one prompt, or one LoRA?

**{gated} {first}**

{chr(10).join(answer)}

![Test perplexity by method and data](figures/methods.svg)

{chr(10).join(table)}

SmolLM2, perplexity over the answers of the test split, mean ± standard deviation over seeds; as many trained numbers in the same
layers for all, 150 steps of 4 examples. LoRA's rate was chosen on validation data of each set ({chosen}), where the other two
have their defaults. A LoRA for each task, of which our gate chooses one for each request, against MoPs: {", ".join(apart)}. On your data: `smartmops compare MODEL --data DATA --out RUN --methods mops None prompt-tuning None lora None`.
All variants: [the ablation on SmolLM2](../experiments/smollm2/README.md)."""


def left_alone() -> str:
    """What text of no task loses."""
    found, table = [], ["| data trained on | frozen | ungated | MoPs | one LoRA |", "|---|---|---|---|---|"]
    for data, what in SETS.items():
        frozen = on(data, "frozen", "unrelated")
        moved = {
            name: change(on(data, family(data, name), "unrelated"), frozen) for name in ("ungated", "mops", "lora")
        }
        table.append(f"| {what} | {figure(frozen[0])} | {' | '.join(signed(moved[name]) for name in moved)} |")
        found.append(moved["mops"])
    kept = sum(abs(each) <= 0.5 for each in found)
    changed = claim(all(abs(mean(on(data, family(data, name), "unrelated")) / on(data, "frozen", "unrelated")[0] - 1) > 0.05
                        for data in SETS for name in ("ungated", "lora")),
                    "Ungated prompts and LoRA changed it in each of them.")  # fmt: skip
    return f"""## Must other text stay as it was?

**Then take MoPs with their null expert, which is the default: encyclopedic text of no task kept its perplexity, within half a
percent, in {kept} of {len(found)} data sets. {changed}**

![Perplexity of unrelated text by method and data](figures/forgetting.svg)

{chr(10).join(table)}

SmolLM2, change of the perplexity of Wikipedia text that nobody trained on. A lower perplexity there is no gain to rely on: the
model has changed where nobody asked it to. On Dolly, whose instructions are about anything, the null expert lets some text
through. `--null-threshold` says how sure it has to be, `--null-expert False` takes it away."""


def how_many_experts() -> str:
    """E."""
    table = ["| data | " + " | ".join(name.replace("mops", "7 experts") for name in COUNTS) + " | clusters for labels |",
             "|---|" + "---|" * (len(COUNTS) + 1)]  # fmt: skip
    for data in ("superni", "dolly"):
        cells = [said(by_hand(data, name)) for name in (*COUNTS, "gate pretrained on clusters")]
        table.append(f"| {data} | {' | '.join(cells)} |")
    growth = {each["experts"]: each for each in loaded("benchmarks/speed.json")["growth"]["experts"]}
    least = min(growth)
    steps = ", ".join(
        f"{count} experts {growth[count]['seconds'] / growth[least]['seconds']:.1f} times"
        for count in sorted(growth)[1:4]
    )
    few, labels = by_hand("superni", "2 experts"), by_hand("superni", "mops")
    return f"""## How many experts?

**One for each task. Fewer than tasks costs where tasks conflict ({signed(change(few, labels))} perplexity with 2 experts for six tasks);
twice or four times as many bring no more than seeds differ by.**

![Perplexity by number of experts](figures/experts.svg)

{chr(10).join(table)}

The embedded base, experts of 10 prompts; `superni` are six tasks that conflict. **Without task labels**, `--gate-pretraining
clusters` groups instructions by what the base makes of them, and was {worded(by_hand("superni", "gate pretrained on clusters"), labels)}
what labels gave on `superni` and {worded(by_hand("dolly", "gate pretrained on clusters"), by_hand("dolly", "mops"))} it on Dolly. **Time**: against {least} experts, a step with
{steps} as long ([speed](../benchmarks/speed.md))."""


def many_tasks() -> str:
    """Growth, few examples, wrong labels: where the pages are, with what they found."""
    few, many = ({v: on(f"growth-{size}", v, "test") for v in ("mops top-2", "ungated 20 columns")} for size in (2, 32))
    gains = {size: change(found["mops top-2"], found["ungated 20 columns"]) for size, found in ((2, few), (32, many))}
    order = claim(gains[2] < 0 < gains[32], "a gain with two tasks and none with many")
    kept = claim(all(abs(change(on(f"growth-{n}", "mops", "unrelated"), on(f"growth-{n}", "frozen", "unrelated"))) < 0.5
                     for n in (4, 8, 16, 32)), "text of no task keeps its perplexity at any number")  # fmt: skip
    wrong, own = ({data: change(on(data, v, "test"), on("mixture", v, "test")) for data in ("wrong-10", "wrong-30", "split")}
                  for v in ("mops", "one lora for each task"))  # fmt: skip
    eight, lora = (change(on("few-8", "mops", "test"), on("few-8", v, "test")) for v in ("ungated", "lora rate 0.003"))
    return f"""## Many tasks, few examples, wrong labels?

**At as many active columns, routing to two experts of many is {order}; {kept}. With few
examples experts are ahead of one prompt and behind LoRA, and wrong labels hurt them little.**

- Two of 2 experts against 20 ungated columns: {signed(gains[2])} in perplexity; two of 32 experts: {signed(gains[32])}
  ([as tasks are added](../experiments/smollm2/growth.md)).
- From 8 examples of each of nine tasks: {signed(eight)} against ungated columns, {signed(lora)} against LoRA.
- With a tenth of the training labels wrong: MoPs {signed(wrong["wrong-10"])}, a LoRA for each task {signed(own["wrong-10"])}; with three tenths
  {signed(wrong["wrong-30"])} and {signed(own["wrong-30"])}; with one task under two labels {signed(wrong["split"])} and {signed(own["split"])}
  ([few examples, wrong labels](../experiments/smollm2/examples.md))."""


def how_many_prompts() -> str:
    """P."""
    ours = {count: by_hand("dolly", f"mops, {count} prompts an expert") for count in PROMPTS}
    table = ["| | " + " | ".join(map(str, PROMPTS)) + " |", "|---|" + "---|" * len(PROMPTS)]
    for name, label in (("mops", "MoPs"), ("prompt-tuning", "ungated, as many in all")):
        cells = [said(by_hand("dolly", f"{name}, {count} prompts an expert")) for count in PROMPTS]
        table.append(f"| {label} | {' | '.join(cells)} |")
    first, second = change(ours[10], ours[1]), change(ours[40], ours[10])
    return f"""## How many prompts in each expert?

**Ten. From 1 to 10, perplexity changed by {signed(first)}; from 10 to 40, by {signed(second)}, for four times as many columns that
every token of an answer attends to.**

![Perplexity by prompts of an expert](figures/prompts.svg)

{chr(10).join(table)}

The embedded base, Dolly, seven experts, one seed. `--prompts-per-expert`. With several hundred examples a task and a base that
infers little, more are worth a try; validation data decide ([the best state is kept](commands.md#train))."""


def which_layer() -> str:
    """L_int."""
    saved = loaded("benchmarks/saved_activations.json")
    whole = saved["peft_prompt_tuning_bytes"]
    layers = sorted(map(int, saved["bytes"]))
    table = ["| injection layer | " + " | ".join(f"{each} of {saved['layers']}" for each in layers) + " |",
             "|---|" + "---|" * len(layers),
             "| kept for the backward pass | " + " | ".join(f"{saved['bytes'][str(each)] / whole:.0%}" for each in layers) + " |"]  # fmt: skip
    early, late = by_hand("dolly", "mops at layer 0"), by_hand("dolly", "mops at layer 7")
    middle = by_hand("dolly", "mops at layer 2")
    return f"""## Which layer?

**The default, 9 of 32 layers from the bottom (and the same share of other depths). Lower costs time and memory, higher costs
quality: layer 7 of 8 has {signed(change(late, middle))} perplexity against the default, layer 0 {signed(change(early, middle))}.**

![Perplexity by injection layer](figures/injection.svg)

{chr(10).join(table)}

Above, the embedded base of 8 layers, Dolly, one seed; the table, against PEFT's prompt tuning at the input
([saved activations](../benchmarks/saved_activations.md)). `--injection-layer` counts from 0. The gate may read another layer
(`--gate-layer`): by default the one where held-out instructions are told apart best."""


def which_kind() -> str:
    """Keys and values or hidden states; who sees them."""
    found = loaded("benchmarks/experts.json")
    lines = ["| experts | a step | kept for the backward pass |", "|---|---|---|"]
    lines += [
        f"| {name} | {found['ratios'][name]:.2f} | {found['memory_ratios'][name]:.2f} |" for name in found["ratios"]
    ]
    table = ["| | " + " | ".join(SETS.values()) + " |", "|---|" + "---|" * len(SETS)]
    for variant, label in KINDS.items():
        table.append(f"| {label} | " + " | ".join(said(on(data, variant, "test")) for data in SETS) + " |")
    best = claim(all(mean(on(data, WHOLE, "validation")) < mean(on(data, "mops", "validation")) for data in SETS),
                 "is below the defaults on validation data of each set")  # fmt: skip
    pairs = [[answered(data, v, what) for v in ("mops", "mops seen by all")]
             for data in ("mixture", "paper7") for what in ("exact_match", "rouge_l")]  # fmt: skip
    level = claim(all(worded(*pair).startswith("level") for pair in pairs),
                  "share of exact ones and ROUGE-L are level with the default's on both sets of tasks "
                  "([answers](../experiments/smollm2/answers.md))")  # fmt: skip
    return f"""## Which kind of expert, and who sees it?

**Keys and values, seen by answers alone (both defaults): a step takes {found["ratios"]["keys and values, seen by answers"]:.0%} of the time it
takes with hidden states, and keeps {found["memory_ratios"]["keys and values, seen by answers"]:.0%} of the memory.**

{chr(10).join(lines)}

SmolLM2, relative to hidden states ([a step by kind of expert](../benchmarks/experts.md)). `--visible-to all` lets instructions see the
experts too, which costs the difference between the last two rows, and the base's own cache of an instruction no longer serves every
task. Where quality is worth that: on the paper's tasks, whose instructions are long, it is {signed(change(on("paper7", "mops seen by all", "test"), on("paper7", "mops", "test")))} in perplexity, and together with a
softmax of the experts' own and all layers (`--visible-to all --prefix-attention separate --injection-layer 0`) it {best}
(three seeds). The answers that are generated do not show it: {level}. `--expert-kind hidden_states` is the paper's, and the one to take for its tables. Columns that all tasks share
(`--shared-prompts`), or a softmax of their own alone, gained nothing beyond the seeds where tasks conflict, and a little on Dolly:

{chr(10).join(table)}

[All variants](../experiments/smollm2/README.md), and [what else one would pick](../experiments/smollm2/choices.md)."""


def which_compression() -> str:
    """Pruning and quantisation."""
    dense = loaded("experiments/compression/results.json")["wiki"]["dense"]
    base = dense["perplexity"]
    table = ["| | SparseGPT | Wanda | magnitude | SparseGPT + int8 | + NF4 |", "|---|---|---|---|---|---|",
             f"| dense | {figure(base)} | | | {figure(dense['int8'])} | {figure(dense['nf4'])} |"]  # fmt: skip
    for setting, name in PATTERNS.items():
        cells = [pruned("sparsegpt", setting), pruned("wanda", setting), pruned("magnitude", setting),
                 pruned("sparsegpt", setting, "int8"), pruned("sparsegpt", setting, "nf4")]  # fmt: skip
        table.append(f"| {name} | {' | '.join(said(each) for each in cells)} |")
    half, three = (change(pruned("sparsegpt", each), [base]) for each in ("0.5", "0.75"))
    gains = {data: ", ".join(f"{signed(change(by_hand(data, 'mops', base), by_hand(data, 'prompt-tuning', base)))} {where}"
                             for base, where in (("dense", "dense"), ("75%", "at 75 %"), ("90%", "at 90 % zeros")))
             for data in ("superni", "dolly")}  # fmt: skip
    real_gains = " and ".join(f"{signed(change(on('mixture-50', 'mops', 'test'), on('mixture-50', variant, 'test')))} against {words}"
                              for variant, words in (("ungated", "ungated prompts"), ("lora rate 0.003", "one LoRA")))  # fmt: skip
    return f"""## Which compression?

**If memory is short: `--int8`, or `--nf4` where that is not enough. They changed perplexity by {signed(change([dense["int8"]], [base]))} and
{signed(change([dense["nf4"]], [base]))}. Pruning saves neither memory nor time in dense kernels; where zeros are what you need, SparseGPT at 50 %
costs {signed(half)}, at 75 % {signed(three)}.**

![Perplexity by pattern and solver](figures/compression.svg)

{chr(10).join(table)}

The embedded base, held-out Wikipedia text ([compression](../experiments/compression/README.md)). `--pattern 2:4` zeroes 2 of every 4,
as GPUs' sparse kernels want it. Adapters train on all of these. What a gate is
worth on a pruned base depends on the tasks more than on the zeros: against ungated prompts MoPs had {gains["superni"]} on six tasks
that conflict, and {gains["dolly"]} on Dolly. SmolLM2 of which SparseGPT left half of the weights, on nine tasks that conflict: {real_gains}
([compressed bases](../experiments/smollm2/bases.md), one seed)."""


def federated() -> str:
    """Which averaging."""
    table = ["| data | FedPrompt | MoPs, FedAvg | MoPs, weighted by use |", "|---|---|---|---|"]
    wins = total = 0
    for data in ("superni", "dolly"):
        for base in ("dense", "75%", "85%", "7:8"):
            cells = [by_hand(data, name, base, "federate") for name in ("fedprompt", "mops", "mops-expert-weighted")]
            wins += sum(a < b for a, b in zip(cells[2], cells[1], strict=True))
            total += len(cells[1])
            table.append(f"| {data}, {base} | {' | '.join(said(each) for each in cells)} |")
    return f"""## Federated: which average?

**`--aggregation expert-weighted` where clients' tasks are skewed: each expert is averaged by how much each client's gate used it, and
that was lower than FedAvg in {wins} of {total} pairs of runs. Whether to gate at all is the first question above.**

{chr(10).join(table)}

The embedded base, a hundred skewed clients, ten a round ([federated](../experiments/federated/README.md), [federation](federation.md))."""


def closing() -> str:
    """How to let one's own data decide."""
    return """## Let your data decide

Hold a part out, try few things, and keep the test split for the end:

```
smartmops compare smollm2 --data yours.jsonl --out runs/choice --validation --steps 150 --batch-size 4 \\
    --methods mops None prompt-tuning None lora None --seeds 0 1 2
smartmops report runs/choice
```

`--validation` measures on a part of the training split instead of the test split. The report has perplexity by task and seed, what
each expert is used for, and answers side by side."""


def relatives() -> str:
    """docs/relatives.md, whose block of measured numbers is written anew."""
    speed, table = loaded("benchmarks/speed.json")["ratios"], []
    for words, key in (("training, examples a second against PEFT's prompt tuning", "train_vs_prompt_tuning"),
                       ("the same against PEFT's LoRA", "train_vs_lora"),
                       ("memory at the peak of training against prompt tuning", "train_memory_vs_prompt_tuning"),
                       ("reading an instruction, seconds against the bare model", "prefill_vs_bare"),
                       ("a token at batch 1, seconds against the bare model", "decode_vs_bare_batch_1"),
                       ("one batch of all tasks, tokens a second against a LoRA for each row in PEFT", "mixed_batch_vs_lora")):  # fmt: skip
        table.append(f"| {words} | {speed[key]:.2f} |")
    block = "\n".join(["| measured | ratio |", "|---|---|", *table])
    text = (results.ROOT / RELATIVES).read_text(encoding="utf-8")
    return re.sub(r"(<!-- written -->\n).*?(\n<!-- /written -->)", lambda m: m[1] + block + m[2], text, flags=re.DOTALL)
