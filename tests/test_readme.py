"""What the README promises in code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, needs_minilm

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@needs_minilm
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "max_steps=100" in example
    example = example.replace("max_steps=100", "max_steps=25")  # enough to find some entity
    example = example.replace('"my-model"', repr(str(tmp_path / "my-model")))
    monkeypatch.chdir(REPOSITORY)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert 0.0 <= float(printed[0]) <= 1.0
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_map_of_the_house_is_complete() -> None:
    for path in (REPOSITORY / "bertner").glob("*.py"):
        assert path.name == "__init__.py" or re.search(rf"\b{path.name}\b", README), path.name


def test_the_flags_that_the_readme_names_exist() -> None:
    flags = (REPOSITORY / "tests" / "golden" / "flags.txt").read_text(encoding="utf-8").split()
    commands = README.replace("-", "_")
    named = set(re.findall(r"(?<!\w)__([a-z]\w+)", commands))
    assert len(named) > 8
    missing = {"resume_from_checkpoint"}  # which the README says
    known = {flag[2:] for flag in flags} | missing
    known |= {"file", "help", "batch_tokens", "predictions", "compare"}  # of the other commands
    known |= {f"no_{name}" for name in known}
    assert named <= known, named - known
