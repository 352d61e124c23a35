"""One expert more: trained on new examples, moved from another run, or made of a written prompt; and advice about it.

The others stay as they are, and so does every answer that the new expert's rule does not claim. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from smartmops.base.names import shown_name
from smartmops.checks.errors import DataError
from smartmops.data.several import names_of
from smartmops.data.tasks import read
from smartmops.options.finished.surgery import AddConfig, AdviseConfig, Trial
from smartmops.reading.early import look_at_data
from smartmops.reading.task import Task
from smartmops.runs.adapters import load_adapter
from smartmops.runs.folder import Run
from smartmops.tokens.batches import Encoded

from . import grow
from .adapter import claims, parts
from .adapter.parts import Parts
from .change import both
from .subject import SEEN, Subject, fingerprints, instructions_of, one_at_a_time, some
from .written import Change, trained_on, write

HELPS = 0.97  # of the perplexity that is had already: below it, a trial's new expert is worth having
Columns = dict[str, Tensor]


@one_at_a_time
def add(run: Path, config: AddConfig) -> dict[str, Any]:
    """Add one expert to a run.

    Returns:
        `name`; `rule` {`sent`, `taken`}: shares of new and of old instructions that the gate sends to it, on
        instructions the rule was not fitted on (None: it answers by name only); `old` {`before`, `after`, `untouched`,
        `added`, `unchecked`}: perplexity on the run's test rows, the share of them whose weights are the same numbers,
        that share for instructions of each expert added before, and those of them of which no instructions were kept;
        `new` {`frozen`, `before`, `after`, `alone`}: perplexity on new test rows of the base, of the run as it was and
        as it is, and of the expert answering alone; for a prompt `agreement`, `agreement_without` and `tokens_saved`;
        `out`.

    Raises:
        ValueError: the expert's name is taken, bases differ, data cannot be read or are too few.
    """
    look_at_data(config.data, config.columns)
    look_at_data(config.inputs, config.columns)
    subject = Subject.open(run, config.old, config.columns, config.rows)
    subject.known()  # what is added is measured on them, so they are missed before anything is trained
    if config.prompt is not None:
        return _of_prompt(subject, config)
    if config.source is not None:
        return _moved(subject, config)
    assert config.data is not None
    task = subject.task(config.data, config.columns, share=config.test_share, seed=config.seed)
    name = config.name or _named(task, config.data)
    parts.check_new(subject.parts, name)
    columns, scale = _trained(subject, task, config)
    seen = trained_on(config.data, config.columns, config.test_share, config.seed, task)
    return _with(subject, config, name, columns, scale, task, seen=seen)


def _trained(subject: Subject, task: Task, trial: Trial) -> tuple[Columns, float]:
    """A new expert's columns, from text of its task through training, and what its weight is multiplied by."""
    scale = float(subject.parts.config.num_experts + 1)
    start = grow.started(subject, instructions_of(task, SEEN), task, scale, trial.seed)
    return grow.trained(subject, task, start, scale, trial)[0], scale


def _named(task: Task, data: str) -> str:
    """The category of the examples, where they agree on one; else the data's own name."""
    tasks = {example.category for example in task.train_examples} - {""}
    return tasks.pop() if len(tasks) == 1 else Path(data).stem


def _with(subject: Subject, config: AddConfig, name: str, columns: Columns, scale: float, task: Task,
          more: dict[str, Any] | None = None, seen: dict[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """The run with an expert whose columns are there, trained on `seen`: its rule, what it changes, its folder."""
    rule = None if config.by_name else _rule(subject, task)
    earlier = dict(subject.added)
    if rule is not None:
        subject.added[name] = subject.pooled["new"]
    claim = claims.never(len(subject.parts.tensors["mops_gate_mean"])) if rule is None else rule.claim
    after = parts.grown(subject.parts, name, columns, scale, claim)
    metrics, said = _measured(subject, after, earlier)
    said = {"name": name, "rule": None if rule is None else rule.shares(), "old": said}
    said["new"] = _new(subject, after, task, columns, scale)
    source = config.source or config.data or config.inputs or ""
    command = " ".join(["experts add", name, *(f"from {shown_name(each)}" for each in names_of(source) if each)])
    out = write(subject, after, config.out, Change(command, said | (more or {}), metrics, seen))
    return said | (more or {}) | {"out": str(out)}


def _rule(subject: Subject, task: Task) -> claims.Fitted:
    own = subject.read("new", instructions_of(task, SEEN))
    return claims.fit(own, subject.others(), subject.unrelated())


def _measured(subject: Subject, after: Parts, earlier: Columns) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's own test rows before and after, also as `metrics.json` holds them; and who answers `earlier` tasks."""
    task, rows = subject.known(), subject.held()
    metrics, was, now = both(subject, task, rows, after)
    subject.read("test", rows)
    share = _untouched(subject, subject.pooled["test"], after)
    added = {name: _untouched(subject, pooled, after) for name, pooled in earlier.items()}
    return metrics, {"before": was.overall, "after": now.overall, "untouched": share, "added": added,
                     "unchecked": [name for name in parts.by_rule(subject.parts) if name not in added],
                     "tasks": {each: [was.per_task[each], now.per_task[each]] for each in was.per_task}}  # fmt: skip


def _untouched(subject: Subject, pooled: Tensor, after: Parts) -> float:
    """Share of instructions that are answered with the same weights, bit for bit."""
    weighed = []
    for each in (subject.parts, after):
        parts.put(subject.model, each)
        weighed.append(subject.weigh(pooled))
    before, then = weighed
    count = before.gate.shape[1]
    same = (before.gate == then.gate[:, :count]).all(-1) & (then.gate[:, count:] == 0).all(-1)
    return float((same & (before.lost == then.lost)).float().mean())


def _new(subject: Subject, after: Parts, task: Task, columns: Columns, scale: float) -> dict[str, Any]:
    """The new test rows."""
    rows = some(task.test, subject.rows)
    if not len(rows):
        return {}
    return {
        "frozen": subject.frozen(task, rows).overall, "before": subject.measure(task, rows).overall,
        "after": subject.measure(task, rows, after).overall, "rows": len(rows),
        "alone": subject.measure(task, rows, parts.alone(subject.parts, columns, scale)).overall,
    }  # fmt: skip


def _moved(subject: Subject, config: AddConfig) -> dict[str, Any]:
    """An expert of another run on the same base; its rule is fitted here, by the instructions that it is sent there."""
    assert config.source is not None
    there, _, name = config.source.rpartition(":")
    if fingerprints(subject.run) != fingerprints(Run.open(there)):
        raise DataError(f"--from {config.source}: that run stands on another base or template: experts move between "
                         "runs on the same one")  # fmt: skip
    other = _other(subject, Path(there))
    expert, own = other.parts.number(name), config.name or name
    parts.check_new(subject.parts, own)
    if (why := parts.fits(subject.parts.config, other.parts.config)) is not None:
        raise DataError(f"--from {config.source}: {why}")
    scale = other.parts.scale[expert]
    columns = parts.moved(other.parts.columns(expert), other.parts, subject.parts)
    if config.data is not None:
        task = subject.task(config.data, config.columns, share=config.test_share, seed=config.seed)
    else:
        task = _sent_there(other, expert, config.source)
    parts.put(subject.model, subject.parts)
    return _with(subject, config, own, columns, scale, task, seen={"run": config.source})


def _other(subject: Subject, path: Path) -> Subject:
    """Another run, its adapter read on the base that is loaded already."""
    run = Run.open(path)
    plain = subject.model.unload()
    other = load_adapter(plain, run.adapter_dir)
    found = Subject.open(path, None, (), subject.rows, (other, subject.tokenizer, run))
    subject.model = found.model
    return found


def _sent_there(other: Subject, expert: int, source: str) -> Task:
    """The rows of another run that its gate sends to an expert."""
    if other.own is None:
        raise DataError(f"--from {source}: the data of that run cannot be used ({other.why}): give examples of the "
                         "expert's task by --data")  # fmt: skip
    found: dict[str, Any] = {}
    for part in ("train", "test"):
        rows = some(getattr(other.own, part), 4 * SEEN)
        of = other.weights(rows, part).gate.argmax(-1).tolist()
        found[part] = [row for row, each in zip(rows, of, strict=True) if each == expert]
    if len(found["train"]) < claims.FEWEST:
        raise DataError(f"--from {source}: {len(found['train'])} instructions of that run go to this expert: give "
                         f"{claims.FEWEST} or more examples of its task by --data")  # fmt: skip
    return replace(other.own, train=found["train"], test=found["test"], validation=[])


def _of_prompt(subject: Subject, config: AddConfig) -> dict[str, Any]:
    """An expert under which the base answers as it does under a system prompt."""
    assert config.prompt is not None
    prompt, name = config.prompt.read_text(encoding="utf-8").strip(), config.name or config.prompt.stem
    parts.check_new(subject.parts, name)
    asked = read(config.inputs, columns=config.columns) if config.inputs else list(subject.known().train_examples)
    questions = some([replace(each, category=name) for each in asked], config.questions)
    lesson = grow.lesson(subject, prompt, questions, config.answer_tokens)
    kept = max(1, len(lesson.plain) // 10) if len(lesson.plain) > 1 else 0
    scale = float(subject.parts.config.num_experts + 1)
    targets = grow.teacher(subject, lesson.told)
    task = Task.of(subject.model, subject.tokenizer, lesson.examples[kept:], lesson.examples[:kept],
                   subject.config("", validation_share=0.0))  # fmt: skip
    start = grow.started(subject, lesson.plain[kept:], task, scale, config.seed)
    columns = grow.distilled(subject, lesson.plain[kept:], targets[kept:], start, scale, config)
    held = (lesson.plain[:kept], targets[:kept]) if kept else (lesson.plain, targets)
    after = grow.agreement(subject, *held, parts.alone(subject.parts, columns, scale))
    before = grow.agreement(subject, *held, None)
    more = {"agreement": vars(after), "agreement_without": vars(before), "tokens_saved": lesson.saved,
            "questions": {"trained": len(lesson.plain) - kept, "held out": kept}}  # fmt: skip
    # The run's own instructions are the other experts': no rule can tell them apart.
    by_name = config.by_name or config.inputs is None
    return _with(subject, replace(config, by_name=by_name), name, columns, scale, task, more)


def advise(config: AdviseConfig) -> dict[str, Any]:
    """Whether a new task needs an expert of its own.

    Returns:
        `advice`, one sentence; `gate` {expert: mean weight}; `left_to_base` (share of instructions); `perplexity`
        {`frozen`, `now`, `trial`} on examples that the trial did not see; `rule` {`sent`, `taken`} as `add` returns it;
        `examples` {`trained`, `measured`}.

    Raises:
        FileNotFoundError, ValueError: as `add`.
    """
    look_at_data(config.data, config.columns)
    subject = Subject.open(config.run, config.old, config.columns, config.rows)
    task = subject.task(config.data, config.columns, share=config.test_share, limit=config.part,
                        seed=config.seed)  # fmt: skip
    rows = some(task.test, subject.rows)
    seen = subject.weights(rows, "advised")
    found = {"frozen": subject.frozen(task, rows).overall, "now": subject.measure(task, rows).overall, "trial": None}
    rule = None
    if config.steps:
        found["trial"] = _tried(subject, task, rows, config)
        if subject.own is not None and len(task.train) >= claims.FEWEST:
            rule = _rule(subject, task)
    told = {"gate": dict(zip(subject.parts.names, seen.mean(), strict=True)), "left_to_base": seen.left(),
            "perplexity": found, "rule": None if rule is None else rule.shares(),
            "examples": {"trained": len(task.train), "measured": len(rows)}}  # fmt: skip
    return {"advice": sentence(told, config.steps)} | told


def _tried(subject: Subject, task: Task, rows: Sequence[Encoded], trial: Trial) -> float:
    columns, scale = _trained(subject, task, trial)
    return subject.measure(task, rows, parts.alone(subject.parts, columns, scale)).overall


def sentence(told: dict[str, Any], steps: int) -> str:
    """One plain sentence, from what `advise` found."""
    frozen, now, trial = (told["perplexity"][name] for name in ("frozen", "now", "trial"))
    most = max(told["gate"], key=lambda name: told["gate"][name])
    serves = (f"{told['left_to_base']:.0%} of its instructions are left to the base" if told["left_to_base"] > 0.5
              else f"most goes to {most!r}")  # fmt: skip
    state = f"the run has perplexity {now:.2f} on it now, the base {frozen:.2f} ({serves})"
    if trial is None:
        return f"No trial was made: {state}."
    if trial < HELPS * min(now, frozen):
        said = f"A new expert helps: {trial:.2f} after {steps} steps; {state}"
        rule = told["rule"]
        if rule is not None and rule["sent"] < 0.5:
            said += (f"; but the gate could tell only {rule['sent']:.0%} of its instructions from those of the others, "
                     "so it would have to be asked for by name")  # fmt: skip
        return said + "."
    better = "the run serves it as well already" if now <= frozen else "neither does the run as it is help"
    return f"A new expert would not help: {trial:.2f} after {steps} steps; {state}, and {better}."
