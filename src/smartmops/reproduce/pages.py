"""Results of a study in, its page out, pictures written beside it. Runs nothing.

A kind of study has a function of its own; what is said of the setting is read from the results, not from the plan.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smartmops.base.names import shown_name
from smartmops.evidence import figures, tables
from smartmops.evidence.page import Block, Gates, Page, Picture, Table, Text
from smartmops.evidence.paper import printed
from smartmops.evidence.tables import figure, gain, gains, label, perplexities, spread
from smartmops.traits import BASELINE, BY_NAME, PROPOSED

from .plan import Plan
from .studies import FEDERATED

Result = dict[str, Any]
WORDS = ("Perplexity over response tokens of the test split: mean ± standard deviation over seeds. A gain is the "
         "reduction of the first method's perplexity in percent, paired by seed.")  # fmt: skip


def page_of(name: str, plan: Plan, found: Sequence[Result], out: Path) -> Page:
    """The page of a study; pictures go to `out`."""
    makers: dict[str, Callable[[str, Plan, Sequence[Result], Path], Iterator[Block]]] = {
        "bases": _bases, "variants": _by_variant, "curve": _curve, "gates": _gates, "unseen": _unseen,
        "answers": _answers, "interference": _interference,
    }  # fmt: skip
    blocks: list[Block] = [Text(f"Written by `smartmops reproduce {name}` from `results/`. {WORDS}")]
    if plan.study.note:
        blocks.append(Text(plan.study.note))
    if found:
        blocks += [*_setting(found), *makers[plan.study.kind](name, plan, found, out)]
    else:
        blocks.append(Text("Not run."))
    return Page(name, plan.study.title, blocks)


def _setting(found: Sequence[Result]) -> Iterator[Text]:
    s = found[0]["settings"]
    usual = {name: statistics.mode(each["settings"].get(name) for each in found) for name in ("experts", "steps")}
    sizes = {each["settings"]["prompts_per_expert"] for each in found}
    if found[0]["command"] == "train":
        what = f"{usual['steps']:,} steps of {s['batch_size']}"
    else:
        what = (f"{s['rounds']} rounds of {s['clients_per_round']} of {s['clients']} clients, {s['local_steps']} local "
                f"steps of {s['batch_size']}, one part of each category {s['skew']:g} times the others")  # fmt: skip
    if model := next((each["model"] for each in found if "model" in each), None):  # older results do not say
        examples = f"at most {s['limit']:,} examples" if s["limit"] else "all examples"
        yield Text(f"Model: {shown_name(model)}; {examples} of each data set.")
    prompts = f" of {s['prompts_per_expert']} prompts" if len(sizes) == 1 else ""
    count = usual["experts"]
    experts = f"An expert{prompts} for each task" if count is None else f"{count} experts{prompts}"
    yield Text(f"{experts} unless said otherwise; {what}; examples of at most {s['max_length']} tokens.")
    for data in dict.fromkeys(each["data"] for each in found):
        own = next(each for each in found if each["data"] == data)
        tokens = own["metrics"]["tokens"]
        yield Text(f"{data}: {len(tokens)} tasks, {sum(tokens.values()):,} response tokens in the test split.")
    yield from _rates(found)


def _rates(found: Sequence[Result]) -> Iterator[Text]:
    rates: dict[str, dict[str, str]] = {}
    methods = {label(each["method"]): label(each["settings"]["method"]) for each in found}
    for each in found:
        s = each["settings"]
        words = "by default" if s["prompt_lr"] is None else f"{s['prompt_lr']:g}"
        if BY_NAME[s["method"]].adapter == "lora" and s.get("lora_match", "none") != "none":
            words += f" at matched {s['lora_match']}"
        rates.setdefault(label(each["method"]), {})[each["data"]] = words
    several = {name: list(dict.fromkeys(by.values())) for name, by in rates.items()}
    if len({tuple(words) for words in several.values()}) == 1:
        yield Text(f"Adam's rate: {', '.join(next(iter(several.values())))}.")
        return
    alike: dict[str, list[str]] = {}
    for name, own in several.items():
        both = " and ".join(f"{word} ({data})" for data, word in rates[name].items()) if len(own) > 1 else own[0]
        alike.setdefault(both, []).append(name)
    said = [f"{', '.join(names) if len(names) < 4 else f'{methods[names[0]]} and what takes its settings'} {both}"
            for both, names in alike.items()]  # fmt: skip
    yield Text(f"Adam's rates, chosen on a part of the training split where nothing else is said: {'; '.join(said)}.")


def _labels(plan: Plan, found: Sequence[Result]) -> list[str]:
    """In the order of the study."""
    return list(dict.fromkeys(v.label for data in plan.datas for v in plan.variants(data)))


def _datas(found: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(each["data"] for each in found))


def _bases(name: str, plan: Plan, found: Sequence[Result], out: Path) -> Iterator[Block]:
    values, (baseline, *others) = perplexities(found), _labels(plan, found)
    for data in _datas(found):
        yield tables.table(name, values, data, plan.names(), baseline, others, tables.frozen_of(found))
    for method in others:
        lower, all_ = tables.won(values, baseline, method)
        if all_:
            yield Text(f"{label(method)} is below {label(baseline)} in {lower} of {all_} pairs of runs.")
    if plan.study.command == "federate":
        for data in _datas(found):
            figures.rounds(found, plan.names(), data, out / f"{name}_rounds_{data}")
            yield Picture(f"{name}_rounds_{data}", f"Perplexity by round on {data}")
    else:
        figures.bases(found, plan.names(), out / name)
        yield Picture(name, "Gain over the first method by base, each seed a dot")


def skew_page(central: Sequence[Result], federated: Sequence[Result]) -> Page:
    """The gain of gating, in the centre and over skewed clients, where the paper finds it larger."""
    inside, outside = perplexities(central), perplexities(federated)
    frozen = [tables.frozen_of(central), tables.frozen_of(federated)]
    rows, more = [], []
    ungated, gated, weighted_gate = (variant.label for variant in FEDERATED)
    for data, base, method in sorted(inside, key=lambda key: key[0]):
        if method != PROPOSED or (data, base, gated) not in outside:
            continue
        first, other = inside.get((data, base, BASELINE), {}), outside.get((data, base, ungated), {})
        own, theirs = inside[data, base, PROPOSED], outside[data, base, gated]
        here, there = gains(first, own), gains(other, theirs)
        points = [there[seed] - here[seed] for seed in sorted(here.keys() & there.keys())]
        if points:
            more.append(statistics.mean(points) > 0)
            weighted = outside.get((data, base, weighted_gate), {})
            deviation = f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else ""
            rows.append([data, base, *(figure(each[data, base]) for each in frozen), gain(first, own),
                         gain(other, theirs), gain(other, weighted),
                         f"{statistics.mean(points):+.1f}{deviation}"])  # fmt: skip
    heads = ["data", "base", "frozen, central", "frozen, federated", "gain of MoPs, central", "federated",
             "federated, expert-weighted", "federated minus central, points"]  # fmt: skip
    blocks: list[Block] = [
        Text("Written by `smartmops reproduce all` from `results/`: the gains of tables 2 and 3, paired by seed. Where "
             "frozen perplexities differ, bases were compressed apart: compare gains, not perplexities."),
        Table("", heads, rows),
        Text(f"Gating gained more over skewed clients than in the centre in {sum(more)} of {len(more)} rows (means)."),
    ]  # fmt: skip
    return Page("skew", "Does gating help more under skew?", blocks)


def _by_variant(name: str, plan: Plan, found: Sequence[Result], out: Path) -> Iterator[Block]:
    values, labels = perplexities(found), _labels(plan, found)
    for data in _datas(found):
        base = plan.names()[0]
        theirs = [printed(name, data, method, base) for method in labels]
        paper = any(value is not None for value in theirs)
        rows = []
        first = values.get((data, base, labels[0]), {})
        for method, value in zip(labels, theirs, strict=True):
            own = values.get((data, base, method), {})
            lower = sum(own[seed] < first[seed] for seed in own if seed in first)
            rows.append([label(method), spread(own.values()), gain(first, own),
                         f"{lower} of {len(own.keys() & first.keys())}",
                         *(["–" if value is None else figure(value)] if paper else [])])  # fmt: skip
        heads = ["", "perplexity", f"gain over {label(labels[0])}", "seeds below it", *["paper (Phi-2)"] * paper]
        yield Table(f"{data}, {base}", heads, rows)
        if len(labels) > 4:
            figures.variants(found, labels, data, base, out / f"{name}_{data}")
            yield Picture(f"{name}_{data}", f"Perplexity by choice on {data}, each seed a dot")


def _curve(name: str, plan: Plan, found: Sequence[Result], out: Path) -> Iterator[Block]:
    values = perplexities(found)
    for data in plan.datas:
        lines: dict[str, dict[int, str]] = {}
        for variant in plan.variants(data):
            assert variant.like is not None and variant.at is not None
            lines.setdefault(variant.like.label, {})[variant.at] = variant.label
        for base in plan.names():
            places = list(next(iter(lines.values())))
            rows = []
            for at in places:
                runs = [values.get((data.name, base, by[at]), {}) for by in lines.values()]
                rows.append([str(at), *(spread(own.values()) for own in runs), gain(*runs)])
            yield Table(f"{data.name}, {base}", [plan.study.axis, *map(label, lines), "gain"], rows)
            figures.curve(values, lines, (data.name, base), plan.study.axis, out / f"{name}_{data.name}_{base}")
            yield Picture(f"{name}_{data.name}_{base}", f"{plan.study.axis}, {data.name}, {base}")


def _gates(name: str, plan: Plan, found: Sequence[Result], out: Path) -> Iterator[Block]:
    for each in found:
        file = f"{name}_{each['data']}_{each['base']}".replace(":", "-").replace("%", "").replace("+", "-")
        title = f"{each['data']}, {each['base']}, seed {each['seed']}"
        figures.gates(each["gates"], title, out / file)
        yield Gates(title, each["gates"], file)


def _methods(found: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(each["settings"]["method"] for each in found))


def _is(each: Result, data: str, method: str, **settings: Any) -> bool:
    own = each["settings"]
    return (each["data"], own["method"]) == (data, method) and all(own[k] == v for k, v in settings.items())


def _unseen(name: str, plan: Plan, found: Sequence[Result], out: Path) -> Iterator[Block]:
    for data in _datas(found):
        rows, lower = [], []
        for task in dict.fromkeys(each["settings"]["hold_out"] for each in found if each["data"] == data):
            ungated, gated = ([each for each in found if _is(each, data, method, hold_out=task)]
                              for method in (BASELINE, PROPOSED))  # fmt: skip
            before, first, own = _at(ungated or gated, task, "perplexity_frozen"), _at(ungated, task), _at(gated, task)
            lower += [own[seed] < first[seed] for seed in own.keys() & first.keys()]
            gates = [each["metrics"]["gate"][task] for each in gated]
            rows.append([task, figure(next(iter(before.values()))), spread(first.values()), spread(own.values()),
                         gain(first, own), gain(dict.fromkeys(own, next(iter(before.values()))), own),
                         f"{statistics.mean(gate['entropy'] for gate in gates):.2f}" if gates else "not run",
                         ", ".join(sorted({gate["nearest"] for gate in gates}))])  # fmt: skip
        yield Table(data, ["task held out", "frozen", "ungated", "MoPs", "gain over ungated", "gain over frozen",
                           "gate's entropy, nats", "expert with most weight"], rows)  # fmt: skip
        yield Text(f"{data}: on a held-out task MoPs are below ungated prompts in {sum(lower)} of {len(lower)} pairs.")


def _at(runs: Sequence[Result], task: str, key: str = "perplexity") -> dict[int, float]:
    """Perplexity on a task, by seed."""
    return {each["seed"]: each["metrics"][key]["per_task"][task] for each in runs}


def _answers(name: str, plan: Plan, found: Sequence[Result], out: Path) -> Iterator[Block]:
    for data in _datas(found):
        first = next(each for each in found if each["data"] == data)["metrics"]["answers"]
        for key, words in (("rouge_l", "ROUGE-L"), ("exact_match", "exact match")):
            rows = []
            for task in (*sorted(first["count"]), None):
                runs = [[_score(each["metrics"]["answers"][key], task) for each in found if _is(each, data, method)]
                        for method in _methods(found)]  # fmt: skip
                frozen = f"{_score(first['frozen'][key], task):.3f}"
                rows.append([task or "all", frozen, *(share(values) for values in runs)])
            title = f"{data}: {words} of {sum(first['count'].values())} greedy answers"
            yield Table(title, ["task", "frozen", *map(label, _methods(found))], rows)


def _score(found: Mapping[str, Any], task: str | None) -> float:
    return float(found["overall"] if task is None else found["per_task"][task])


def share(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of shares or cosines."""
    if not values:
        return "not run"
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _interference(name: str, plan: Plan, found: Sequence[Result], out: Path) -> Iterator[Block]:
    yield Text("The cosine between the gradients of two tasks' mean losses with respect to the shared prompts; below "
               "zero, a step for one task is a step against the other.")  # fmt: skip
    columns = [(stage, key) for stage in ("before", "after") for key in ("mean_cosine", "conflicting")]
    rows = []
    for data in _datas(found):
        for method in _methods(found):
            own = [each["metrics"]["interference"] for each in found if _is(each, data, method)]
            rows.append([data, label(method), *(share([each[stage][key] for each in own]) for stage, key in columns)])
    words = {"mean_cosine": "mean cosine", "conflicting": "pairs below 0"}
    yield Table("", ["data", "", *(f"{words[key]}, {stage}" for stage, key in columns)], rows)
