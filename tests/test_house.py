"""The house stays as it was drawn: imports go one way, starting is cheap, names do not move."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from bertner.cli import _train_parser
from tests.conftest import REPOSITORY

# A module may import only modules that stand before its group.
ORDER = [
    ["__init__", "errors"],
    ["config", "labels"],
    ["metrics", "files", "stopping", "decoding", "significance", "charts", "distributed"],
    ["kernels", "weights", "corpus", "windows", "hub", "figures", "operating", "tables"],
    ["packing", "readers", "tokenizer", "checkpoint", "analysis", "tensorboard", "html_report"],
    ["calibration", "repeats", "findings"],
    ["attention", "hub_datasets", "data", "output_dir", "predictions"],
    ["batches", "data_cache", "data_check"],
    ["model", "optimizer", "decisions"],
    ["evaluation", "predict"],
    ["progress", "graphs", "text_input"],
    ["loop"],
    ["report", "parts", "tag_output"],
    ["card", "record", "outcome", "tagging"],
    ["resume", "assess"],
    ["run", "verify"],
    ["seeds"],
    ["cli"],
]
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}
MODULES = sorted((REPOSITORY / "bertner").glob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(str(node.module))
            if node.module == "bertner":
                names |= {f"bertner.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_one_way(path: Path) -> None:
    assert path.stem in RANK, f"{path.name} has no place in the order yet"
    for name in imported_modules(path):
        package, _, module = name.partition(".")
        assert package not in ("transformers", "accelerate")
        if package == "bertner" and module in RANK:
            assert RANK[module] < RANK[path.stem], f"{path.stem} imports {module}"


def modules_after(code: str) -> set[str]:
    """Names of the top-level packages that are loaded after running some code."""
    report = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_package_and_asking_for_help_load_no_torch() -> None:
    loaded = modules_after(
        "import bertner, bertner.cli\n"
        "for main in (bertner.cli.train_main, bertner.cli.eval_main, bertner.cli.predict_main):\n"
        "    try: main(['--help'])\n"
        "    except SystemExit: pass"
    )
    assert not loaded & {"torch", "numpy", "datasets", "tokenizers", "huggingface_hub", "sklearn"}


def test_training_loads_neither_datasets_nor_transformers() -> None:
    loaded = modules_after("import bertner.run, bertner.predict")
    assert "torch" in loaded
    assert not loaded & {
        *("datasets", "pyarrow", "transformers", "sklearn", "seqeval", "pandas"),
        *("jinja2", "matplotlib", "tensorboard"),
    }


def test_the_flags_of_bertner_train() -> None:
    """Scripts depend on these names: add to the list, but take nothing away."""
    flags = sorted(
        flag
        for action in _train_parser()._actions
        for flag in action.option_strings
        if flag.startswith("--") and not flag.startswith("--no_")
    )
    recorded = REPOSITORY / "tests" / "golden" / "flags.txt"
    assert flags == recorded.read_text(encoding="utf-8").split()


def test_the_state_dict_keys_of_bert_base() -> None:
    """Files depend on these names and shapes."""
    import torch

    from bertner.config import BertConfig
    from bertner.model import BertForNER

    with torch.device("meta"):
        model = BertForNER(BertConfig(vocab_size=28996, id2label={k: f"L{k}" for k in range(9)}))
    lines = [f"{k} {list(v.shape)} {v.dtype}" for k, v in model.state_dict().items()]
    recorded = REPOSITORY / "tests" / "golden" / "bert_base_state_dict.txt"
    assert lines == recorded.read_text(encoding="utf-8").splitlines()
