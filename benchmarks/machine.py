"""What a result must say of where it comes from: commit, versions, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bertner.record import processor_name

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Commit, time, versions, processor and threads."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--", ":/", ":!results"], capture_output=True, text=True
    )
    return {
        "commit": commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else ""),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("torch", "transformers", "tokenizers")},
        "python": platform.python_version(),
        "machine": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes `results/<name>.json` and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**provenance(), **result}, indent=2) + "\n", encoding="utf-8")
    return path
