"""What a page tells a reader to type is taken, and does what it says: each line is run, at a size for tests."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from shown import PAGES, ROOT, Block, blocks, elsewhere, options, shell, small

from smartmops import cli
from smartmops.data.tasks import read
from smartmops.settings.line import asked

COMMANDS = re.compile(r"(?:`|> ?)smartmops ([a-z-]+)")  # in code, or in a drawing
# Options of other programs that pages name.
FOREIGN = {"--no-python", "--no_python", "--nproc_per_node", "--multi_gpu", "--num_processes", "--cpu", "--trl", "--check",
           "--help", "COMMAND", "--replicas", "--use_fsdp", "--fsdp_version", "--fsdp_auto_wrap_policy",
           "--fsdp_transformer_layer_cls_to_wrap", "--fsdp_cpu_ram_efficient_loading", "--nodes", "--ntasks-per-node",
           "--gpus-per-node", "--cpus-per-task", "--time", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id",
           "--max-restarts"}  # fmt: skip
LINES = list(dict.fromkeys(line for _, line in shell()))


@pytest.mark.parametrize("line", LINES)
def test_each_line_is_something_that_can_be_typed(line: str) -> None:
    first, *words = shlex.split(line)
    if "smartmops " in line and first in ("smartmops", "torchrun", "accelerate"):
        call, _ = asked(cli.COMMANDS, small(line))
        assert callable(call)
    elif first == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif first == "pip":
        assert words[0] == "install" and (words[1] == "." or words[1][10:-1] in extras())
    elif first == "python" and words[0] == "-m":
        assert (ROOT / "src" / words[1].replace(".", "/")).with_suffix(".py").is_file()
    elif first == "python":
        # A file of the repository, or one that `export` lays beside what it writes.
        assert (ROOT / words[0]).is_file() or list((ROOT / "src").rglob(Path(words[0]).name))
    else:
        assert (ROOT / first).is_file() and first.startswith("scripts/"), f"{line!r}: teach this test what it is"


def extras() -> list[str]:
    """Optional parts of the package."""
    part = (
        (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
    )
    return re.findall(r"^([\w-]+) = ", part, re.MULTILINE)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that pages speak of."""
    folder = tmp_path_factory.mktemp("desk")
    rows = [row for task in ("open_qa", "classification", "summarization")
            for row in [each for each in read("office") if each.category == task][:14]]  # fmt: skip
    made = [{"instruction": row.instruction, "context": row.context, "response": row.response, "category": row.category}
            for row in rows]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in made)
    for name in ("yours.jsonl", "server.jsonl", "mine.jsonl"):
        (folder / name).write_text(text)
    (folder / "clients").mkdir()
    for number in range(3):
        (folder / "clients" / f"{number}.jsonl").write_text("".join(text.splitlines(keepends=True)[number::3]))
    (folder / "prompts.jsonl").write_text('{"instruction": "Name three rivers."}\n')
    (folder / "tickets.csv").write_text(
        "question,answer,team\n" + "Is it open?,Yes.,desk\nWhere is it?,Here.,field\n" * 6
    )
    (folder / "more.csv").write_text("instruction,response\n" + "Count to ten.,One two three.\n" * 14)
    (folder / "keys.txt").write_text("secret\n")
    return folder


Run = Callable[[str], None]


@pytest.fixture
def run(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a line in this process; one that was run before is not run again."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name three rivers.\n/base\n/quit\n"))
    done = desk / "done.txt"

    def run(line: str) -> None:
        words = small(line)
        before = done.read_text().splitlines() if done.exists() else []
        if shlex.join(words) in before:
            return
        if "--out" in words:
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["smartmops", *words])
        cli.main()
        if "--out" in words:
            assert Path(words[words.index("--out") + 1]).exists(), f"{line} wrote nothing"
        done.write_text("\n".join([*before, shlex.join(words)]))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.page == page for block, _ in shell())])
def test_the_lines_of_a_page_run_one_after_the_other(page: str, run: Run, desk: Path) -> None:
    if not (desk / "runs/mine").exists():  # what pages call runs/mine was made on another page
        run("smartmops train smollm2 --data yours.jsonl --steps 150 --batch-size 4 --out runs/mine")
    lines = [line for block, line in shell()
             if block.page == page and line.startswith("smartmops ") and not elsewhere(line)]  # fmt: skip
    for line in lines:
        run(line)
    assert {shlex.join(small(line)) for line in lines} <= set((desk / "done.txt").read_text().splitlines())


def test_every_option_and_command_that_is_named_is_there() -> None:
    known = {option for command in cli.COMMANDS for option in options(command)} | FOREIGN
    texts = {page: (ROOT / page).read_text() for page in PAGES}
    texts |= {file.name: file.read_text() for file in (ROOT / "docs/figures").glob("*.svg")}
    named = {(page, option) for page, text in texts.items() for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert len(named) > 100
    assert {pair for pair in named if pair[1] not in known} == set()
    commands = {(page, word) for page, text in texts.items() for word in COMMANDS.findall(text)}
    assert len(commands) > 15
    assert {pair for pair in commands if pair[1] not in cli.COMMANDS} == set()


def test_a_synopsis_lists_all_commands_with_options_they_have() -> None:
    (found,) = [block for block in blocks() if block.synopsis]
    lines = [line for line in found.text.splitlines() if line.startswith("smartmops ")]
    listed = {word for line in lines for word in re.split(r" \| ", line.split("  ")[0].removeprefix("smartmops "))}
    assert {word.split()[0] for word in listed} >= cli.COMMANDS.keys() - {"quickstart"}
    for line in lines:
        command = line.split()[1]
        for option, values in re.findall(r"(--[a-z0-9-]+)(?: ([a-z0-9|-]+\|[a-z0-9|-]+))?", line.split("   ")[0]):
            assert option in options(command), line
            choices = options(command)[option]
            assert not (values and choices) or set(values.split("|")) <= set(choices), line


@pytest.mark.parametrize("language", ["json", "csv"])
def test_rows_that_a_page_shows_are_read(language: str, tmp_path: Path) -> None:
    found: list[Block] = [block for block in blocks() if block.language == language]
    assert found
    for number, block in enumerate(found):
        file = tmp_path / f"{number}.{'jsonl' if language == 'json' else 'csv'}"
        file.write_text(block.text)
        examples = read(str(file))
        assert examples and all(example.response for example in examples)
