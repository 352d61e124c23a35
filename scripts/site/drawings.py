"""Drawings of the method and of the choices before a run. Knows how things hang together; holds no measured number."""

from __future__ import annotations

from svg import AMBER, BLUE, FAINT, INK, RED, TEAL, Drawing

FOLDER = "docs/figures"


def files() -> dict[str, str]:
    """Each drawing, by its path."""
    made = {"layers": layers(), "bias": bias(), "mask": mask(), "null": null(), "flow": flow()}
    return {f"{FOLDER}/{name}.svg": str(drawing) for name, drawing in made.items()}


def layers() -> Drawing:
    """Where experts and gate stand in the stack of decoder layers."""
    sheet = Drawing(680, 430, "Experts enter in the middle of a frozen decoder")
    sheet.text(16, 24, sheet.title, size=15, weight="bold")
    left, width = 230, 210
    sheet.box(left, 372, width, 36, ["tokens X¹"], colour=INK)
    for number, (y, words) in enumerate([(312, "layer 1"), (264, "… to layer L_int − 1")]):
        sheet.box(left, y, width, 38, [words], colour=FAINT)
        sheet.arrow((left + width / 2, y + 60 if number == 0 else y + 48), (left + width / 2, y + 38))
    for y, words in ((184, "layer L_int"), (136, "…"), (88, "layer L")):
        sheet.box(left, y, width, 38, [words], colour=BLUE)
    sheet.arrow((left + width / 2, 264), (left + width / 2, 222))
    sheet.arrow((left + width / 2, 184), (left + width / 2, 174))
    sheet.arrow((left + width / 2, 136), (left + width / 2, 126))
    sheet.arrow((left + width / 2, 88), (left + width / 2, 62))
    sheet.text(left + width / 2, 54, "next token", size=14, anchor="middle")
    sheet.box(
        18, 88, 168, 134, ["E experts", "P columns of keys and", "values in each of", "these layers"], colour=TEAL
    )
    for y in (107, 155, 203):
        sheet.arrow((186, y), (left, y), colour=TEAL)
    sheet.box(490, 234, 172, 76, ["gate", "reads the mean of the", "instruction's states"], colour=AMBER)
    sheet.arrow((left + width, 276), (490, 276), colour=AMBER)
    sheet.arrow((576, 234), (576, 155), (left + width, 155), colour=AMBER)
    sheet.text(452, 126, "log(E·g) on the logits of", size=13, colour=AMBER)
    sheet.text(452, 143, "each expert's columns", size=13, colour=AMBER)
    sheet.text(18, 286, "never trained, records no", size=13, colour="#5d666e")
    sheet.text(18, 304, "graph: computed once for", size=13, colour="#5d666e")
    sheet.text(18, 322, "every example, and kept", size=13, colour="#5d666e")
    return sheet


def bias() -> Drawing:
    """One token's attention over the columns of three experts and the text, before and after the gate."""
    sheet = Drawing(680, 330, "The gate shifts attention logits; the softmax does the rest")
    sheet.text(16, 24, sheet.title, size=15, weight="bold")
    logits = [0.9, 0.5, 0.8, 0.6, 0.7, 1.0, 1.1, 0.4, 0.8]
    gate = (0.90, 0.08, 0.02)
    for across, (words, weights) in enumerate(
        (("even gate, g = ⅓, ⅓, ⅓: ungated", (1 / 3,) * 3), ("g = 0.90, 0.08, 0.02", gate))
    ):
        left, floor = 30 + across * 330, 250
        lifted = [e**1.0 for e in _exp(logits)]
        lifted = [value * (3 * weights[i // 2] if i < 6 else 1) for i, value in enumerate(lifted)]
        total = sum(lifted)
        sheet.text(left, 58, words, size=14, weight="bold")
        for i, value in enumerate(lifted):
            height, x = 420 * value / total, left + i * 32 + (14 if i >= 6 else 0)
            sheet.rectangle(x, floor - height, 25, height, (TEAL, AMBER, BLUE)[i // 2] if i < 6 else FAINT)
        sheet.arrow((left - 6, floor), (left + 308, floor), head=False)
        for expert in range(3):
            sheet.text(left + expert * 64 + 28, floor + 20, f"expert {expert + 1}", size=12, anchor="middle")
        sheet.text(left + 14 + 6 * 32 + 44, floor + 20, "text", size=12, anchor="middle")
    sheet.text(
        16, 300, "Height: attention weight of one query on each column. Logits are the same on both sides;", size=13
    )
    sheet.text(16, 318, "to those of expert e, log(E·gₑ) is added. The numbers are made up.", size=13)
    return sheet


def _exp(values: list[float]) -> list[float]:
    return [2.718281828**value for value in values]


def mask() -> Drawing:
    """Who sees what, with experts seen by answers alone."""
    sheet = Drawing(680, 372, "Who attends to what (experts of two columns, seen by answers alone)")
    sheet.text(16, 24, sheet.title, size=15, weight="bold")
    columns = ["e1", "e1", "e2", "e2", "s", "i", "i", "i", "h", "a", "a"]
    rows = ["system", "instruction", "instruction", "instruction", "header", "answer", "answer"]
    left, top, size = 150, 78, 32
    for across, name in enumerate(columns):
        x = left + across * size + (12 if across >= 4 else 0)
        sheet.text(x + size / 2, top - 8, name, size=13, anchor="middle", colour=TEAL if across < 4 else INK)
        for down in range(len(rows)):
            inside = (down >= 4 and across < 4) or (across >= 4 and across - 4 <= down)
            fill = "#ffffff" if not inside else (TEAL if across < 2 else "#8cc9c5") if across < 4 else "#b9c2ca"
            sheet.rectangle(x, top + down * size, size - 3, size - 3, fill, "#d5dade")
    for down, name in enumerate(rows):
        sheet.text(left - 12, top + down * size + 20, name, size=13, anchor="end")
    sheet.text(left + 2 * size, top + 7 * size + 22, "experts", size=13, anchor="middle", colour=TEAL)
    sheet.text(left + 7.9 * size, top + 7 * size + 22, "text, causally", size=13, anchor="middle")
    sheet.text(
        16,
        350,
        "Rows are queries. Darker and lighter green: the gate gives expert 1 more weight than expert 2.",
        size=13,
    )
    sheet.text(540, top + 40, "instructions", size=13)
    sheet.text(540, top + 57, "are read by the", size=13)
    sheet.text(540, top + 74, "base alone", size=13)
    sheet.text(540, top + 150, "answers see the", size=13)
    sheet.text(540, top + 167, "experts as well", size=13)
    return sheet


def null() -> Drawing:
    """What the null expert does to an instruction that is near the training instructions, and to one that is not."""
    sheet = Drawing(680, 226, "Text like no training instruction is left to the base")
    sheet.text(16, 24, sheet.title, size=15, weight="bold")
    sheet.box(16, 96, 138, 52, ["instruction"], colour=INK)
    sheet.box(
        204,
        86,
        186,
        72,
        ["null weight ν", "distance to the nearest task,", "direction to other text"],
        colour=AMBER,
        size=12,
    )
    sheet.arrow((154, 122), (204, 122))
    for y, words, colour, label in ((44, ["bias log(E·g) + log(1 − ν)", "experts, a little dimmed"], TEAL, "ν below ½"),
                                    (140, ["no column is seen at all", "the base, bit for bit"], RED, "ν from ½ on")):  # fmt: skip
        sheet.box(458, y, 206, 60, words, colour=colour, size=13)
        sheet.arrow((390, 122), (424, 122), (424, y + 30), (458, y + 30))
        sheet.text(386, y + 30 + (-8 if y < 100 else 20), label, size=12, style="italic")
    return sheet


def flow() -> Drawing:
    """From a user's situation to settings."""
    steps = [
        (["Do the same words call for", "different answers by task?"], "no", ["one LoRA, or one prompt", "--method lora | prompt-tuning"]),
        (["Must other text stay as the", "base has it, or tasks share", "one batch?"], "no", ["try both: smartmops compare", "one LoRA may be ahead"]),
        (["Do rows name their task?"], "no", ["--gate-pretraining clusters", "--experts N: kinds you expect"]),
        (["Do data stay at", "several places?"], "yes", ["smartmops federate", "--aggregation expert-weighted"]),
        (["Is the base too large", "for the machine?"], "yes", ["smartmops compress", "--int8, or --nf4"]),
    ]  # fmt: skip
    sheet = Drawing(680, 60 + 92 * len(steps) + 54, "From a situation to settings")
    sheet.text(16, 24, sheet.title, size=15, weight="bold")
    for number, (question, way, answer) in enumerate(steps):
        y = 46 + 92 * number
        ends = number < 2
        sheet.box(20, y, 264, 66, question, colour=INK, size=14, bold=False)
        sheet.box(384, y + 6, 276, 54, answer, colour=AMBER if ends else TEAL, size=14)
        sheet.arrow((284, y + 33), (384, y + 33), label=way)
        on = "yes" if ends else "either way" if number > 2 else "yes, or then"
        sheet.arrow((152, y + 66), (152, y + 92), label=on)
    y = 46 + 92 * len(steps)
    sheet.box(
        20, y, 640, 44, ["smartmops train MODEL --data DATA --out RUN, with what was collected"], colour=BLUE, size=13
    )
    return sheet
