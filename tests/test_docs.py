"""README and docs/ keep their word: what a page shows is run, from its top, in an empty folder.

A page's blocks are run in order, by their language:

- `sh` must succeed, as must `python`, a program each;
- `console` has commands after `$`, and exactly what they print; `...` is what is left out of it;
- anything with `file=NAME` is put into that file first;
- `json` with `like=NAME` shows parts of what that file holds: the same keys, values of the same
  types;
- `text` and what else is only shown holds no command.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import TrainingArguments

from bertner.cli import _train_parser, eval_main, predict_main
from bertner.config import TrainConfig
from bertner.errors import BertnerError
from tests.conftest import REPOSITORY, needs_minilm, write_model_folder
from tests.terminal import Terminal

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))

# What begins a line of a block that somebody would type, or run.
_COMMAND = re.compile(
    r"\s*(\$ |(\S*/)?(bertner-\w+|pip|python3?|pytest|tensorboard) |import \w|from \w+.* import )"
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page; `options` are what stands after its language."""

    language: str
    options: dict[str, str]
    text: str
    line: int


def blocks_of(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", content, flags=re.MULTILINE):
        language, *options = match[2].split() or [""]
        line = content[: match.start()].count("\n") + 1
        assert not match[1], f"{page.name}:{line}: a block that is indented"
        yield Block(language, dict(each.split("=") for each in options), match[3], line)


def prose_of(page: Path) -> str:
    return re.sub(r"^```(?:.*\n)*?```$", "", page.read_text("utf-8"), flags=re.MULTILINE)


@by_page
def test_every_command_is_one_that_is_run(page: Path) -> None:
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        assert block.language in {
            *("sh", "console", "python"),
            *("text", "json", "jsonl", "toml", "diff"),
        }, where
        assert set(block.options) <= {"file", "like"}, where
        if block.language not in ("sh", "console", "python") and "file" not in block.options:
            lines = [line for line in block.text.splitlines() if _COMMAND.match(line)]
            assert not lines, f"{where}: not run: {lines}"
    assert not re.search("```|~~~", prose_of(page)), "a block that is not seen here"
    for line in prose_of(page).splitlines():  # indented, it would be shown as a block
        assert not line.startswith("    ") or not _COMMAND.match(line), line


@pytest.fixture(scope="module")
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


@by_page
def test_what_a_page_shows_is_so(page: Path, terminal: Terminal, tmp_path: Path) -> None:
    run_page(page, terminal, tmp_path)


@needs_minilm
@pytest.mark.slow
def test_the_readme_at_full_length(tmp_path: Path) -> None:
    """With MiniLM itself, and all steps; its scores are about those that the README shows."""
    terminal = Terminal(stand_ins=False)
    run_page(PAGES[0], terminal, tmp_path)
    terminal.close()
    results = json.loads((tmp_path / "bertner-quickstart" / "all_results.json").read_text())
    (shown,) = re.findall(r"^all( +[\d.]+){3}", PAGES[0].read_text("utf-8"), flags=re.MULTILINE)
    assert results["test_word_f1"] == pytest.approx(float(shown), abs=0.03)


def run_page(page: Path, terminal: Terminal, folder: Path) -> None:
    """Runs a page's blocks in a folder that is empty, but for what stands for the Hub.

    The README's commands are given in a clone.
    """
    write_model_folder(folder / "bert-base-cased")
    if page.name == "README.md":
        for name in ("bertner", "constraints.txt", "pyproject.toml"):
            (folder / name).symlink_to(REPOSITORY / name)
        for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
            shutil.copy(REPOSITORY / "bertner" / "sample" / f"{split}.txt", folder / f"{name}.txt")
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        if "file" in block.options:
            (folder / block.options["file"]).write_text(block.text, encoding="utf-8")
        elif "like" in block.options:
            content = (folder / block.options["like"]).read_text(encoding="utf-8")
            found = read_json(content, block.language)
            for shown in read_json(block.text, block.language):
                assert any(is_like(shown, each) for each in found), f"{where}: {shown}\n{content}"
        elif block.language == "sh":
            status, output = terminal.run(f"set -eo pipefail\n{block.text}", folder)
            assert status == 0, f"{where}:\n{output}"
        elif block.language == "python":
            (folder / ".program.py").write_text(block.text, encoding="utf-8")
            status, output = terminal.run("python .program.py", folder)
            assert status == 0, f"{where}:\n{output}"
        elif block.language == "console":
            _, output = terminal.run(typed(block.text), folder)
            output = re.sub(r"^.*\r", "", output, flags=re.MULTILINE)  # what a bar has overwritten
            assert re.fullmatch(pattern_of(block.text), output), f"{where}:\n{output}"


# Printed before each command of a console, which must not be seen by `$?`.
_PROMPT = "\x1e"


def typed(text: str) -> str:
    """The script of what is typed in a console."""
    commands = re.findall(r"^\$ ((?:.*\\\n)*.*)", text, flags=re.MULTILINE)
    prompt = f"_status=$?; printf '{_PROMPT}'; (exit $_status)"
    return "\n".join(f"{prompt}\n{command}" for command in commands)


def pattern_of(text: str) -> str:
    """What a console must show."""
    text = re.sub(r"^\$ (?:.*\\\n)*.*\n", _PROMPT, text, flags=re.MULTILINE)
    pattern = re.escape(text)
    pattern = re.sub(rf"(^|(?<=\n|{_PROMPT}))\\\.\\\.\\\.\\\n", r"(?:[^\\x1e]*\\n)?", pattern)
    return pattern.replace(r"\.\.\.", r"[^\n]*")


def read_json(text: str, language: str) -> list[Any]:
    return [json.loads(line) for line in (text.splitlines() if language == "jsonl" else [text])]


def is_like(shown: Any, found: Any) -> bool:
    """Whether what a page shows is a part of what is there, but for numbers and strings."""
    if isinstance(shown, dict) and isinstance(found, dict):
        if shown.get("event") != found.get("event"):
            return False
        return all(key in found and is_like(shown[key], found[key]) for key in shown)
    if isinstance(shown, list) and isinstance(found, list):
        return not shown or bool(found and is_like(shown[0], found[0]))
    return type(shown) is type(found)


def heading_anchors(page: Path) -> set[str]:
    """Links to a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose_of(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in heading_anchors(path), target


def test_the_index_names_every_page() -> None:
    index = (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


# Flags of other programs, and a mistake that is shown.
_OTHERS = set(
    "--logdir --preserve_status --signal --learning_rat --data --nproc_per_node --no_python "
    "--nnodes --node_rank --master_addr --master_port --max_restarts --shutdown_timeout".split()
)


@by_page
def test_the_flags_that_are_named_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {flag for action in _train_parser()._actions for flag in action.option_strings}
    for main in (eval_main, predict_main):
        with pytest.raises(SystemExit):
            main(["--help"])
        flags.update(re.findall(r"--\w+", capsys.readouterr().out))
    text = page.read_text(encoding="utf-8")
    if page.name == "from-the-trainer.md":  # begins with the flags of another program
        text = text.replace(next(blocks_of(page)).text, "")
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    unknown = {flag.replace("-", "_").replace("__", "--", 1) for flag in named} - flags
    assert not unknown - _OTHERS


def test_the_map_of_the_house_is_complete() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    for path in (REPOSITORY / "bertner").glob("*.py"):
        assert path.name == "__init__.py" or re.search(rf"\b{path.name}\b", readme), path.name


def test_every_exit_code_is_explained_and_provoked() -> None:
    codes = {"0", "130"}
    kinds: list[type[BertnerError]] = [BertnerError]
    while kinds:
        kinds += kinds.pop().__subclasses__()
        codes |= {str(kind.exit_code) for kind in kinds}
    page = REPOSITORY / "docs" / "exit-codes.md"
    for path in (PAGES[0], page):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"^\| \[?(\d+)(?:\]\(#\d+\))? \|", text, re.MULTILINE)) == codes
    consoles = [block.text for block in blocks_of(page) if block.language == "console"]
    provoked = re.findall(r"^\$ echo \$\?\n(\d+)\n", "\n".join(consoles), flags=re.MULTILINE)
    assert set(provoked) == codes - {"130"}


# The arguments of run_ner.py, which is no part of the package.
_RUN_NER = set(
    "model_name_or_path config_name tokenizer_name cache_dir model_revision token "
    "trust_remote_code ignore_mismatched_sizes task_name dataset_name dataset_config_name "
    "train_file validation_file test_file text_column_name label_column_name overwrite_cache "
    "preprocessing_num_workers max_seq_length pad_to_max_length max_train_samples "
    "max_eval_samples max_predict_samples label_all_tokens return_entity_level_metrics".split()
)


def table_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, but for its own."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def test_every_flag_of_the_trainer_has_its_place() -> None:
    page = (REPOSITORY / "docs" / "from-the-trainer.md").read_text(encoding="utf-8")
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    same = {row[0].strip("`"): row[1:] for row in table_of(page, "The same")}
    for name, defaults in same.items():
        their_default = f"`{theirs[name]}`" if name in theirs else defaults[0]
        assert defaults == [their_default, f"`{ours[name]}`"], name
    different = [row[0].strip("`") for row in table_of(page, "Different")]
    absent = re.findall(r"\w+", " ".join(row[0] for row in table_of(page, "Not there, and why")))
    assert not set(absent) & ours.keys()
    named = [*same, *different, *absent]
    assert len(set(named)) == len(named)
    release = ".".join(transformers.__version__.split(".")[:2])
    if f"transformers {release} " not in page:
        pytest.skip(f"the page is of another release than {release}")
    assert set(named) == theirs.keys() | _RUN_NER


def test_the_proofs_of_parity_are_there() -> None:
    page = (REPOSITORY / "docs" / "parity.md").read_text(encoding="utf-8")
    proofs = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(proofs) > 10
    for name, test in proofs:
        text = (REPOSITORY / "tests" / "parity" / name).read_text(encoding="utf-8")
        assert f"def {test}(" in text, test
