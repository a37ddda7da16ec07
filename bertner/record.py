"""run.json: what a run is made of, and what must be the same for it to be carried on exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertner import __version__
from bertner.config import TrainConfig
from bertner.distributed import ALONE, Ranks
from bertner.errors import visible
from bertner.parts import Parts, products_for

# Whose versions are recorded, besides PyTorch's.
PACKAGES = ["tokenizers", "safetensors", "numpy", "huggingface_hub", "datasets"]

# Settings that decide no bit of what is trained, or whose effect is compared in their place: the
# data and the base model by their hashes, the device by what it is.
_FREE = (
    "model_name_or_path model_revision dataset_name dataset_config_name train_file validation_file "
    "test_file data_cache device logging_steps save_strategy save_steps save_total_limit "
    "output_dir overwrite_output_dir resume_from_checkpoint allow_inexact_resume disable_tqdm "
    "report report_to seeds ddp_timeout"
).split()
# Settings that only watch, unless they say which model or seed is the best, or when to stop.
_WATCHING = (
    "eval_strategy eval_steps eval_batch_tokens per_device_eval_batch_size metric_for_best_model"
).split()
# Packages whose release may decide bits.
_VERSIONS = ["bertner", "torch", "numpy", "tokenizers"]


def run_record(
    config: TrainConfig, recipe: str, parts: Parts, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of run.json: everything that it takes to do this run again.

    Args:
        config: All settings.
        recipe: The one that they start from.
        parts: As built: the model has its first weights.
        machine: See `machine_facts`.
    """
    source, device = parts.source, parts.model.device
    processes = f"{machine['world_size']} processes with " if machine["world_size"] > 1 else ""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recipe": recipe,
        "config": config.to_dict(),
        "model": {
            "name": source.name,
            "folder": str(source.folder.resolve()),
            "commit": source.commit,
            **dataclasses.asdict(parts.model.config),
        },
        "labels": parts.model.config.label_names,
        "data": {
            split: {
                "source": corpus.source,
                "sha256": corpus.sha256,
                "scheme": corpus.scheme,
                "documents": corpus.num_documents,
                "sentences": corpus.num_sentences,
                "words": corpus.num_words,
                "entities": corpus.entity_counts,
            }
            for split, corpus in parts.corpora.items()
        },
        "sha256": {
            "first weights": hash_tensors(parts.model.state_dict()),
            "tokenizer": parts.tokenizer.sha256,
        },
        "versions": {
            "bertner": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # says which build, as the package's metadata may not
            **{package: version(package) for package in PACKAGES},
        },
        "machine": dict(machine),
        "device": f"{machine['device']}, {machine['processor']}, "
        f"{processes}{machine['threads']} threads",
        # Another choice, another sum of roundings: it is part of what the bits depend on.
        "products": dataclasses.asdict(products_for(config, device)),
        # Each time that the run was carried on: after which step, and what was not the same.
        "resumes": [],
    }


def machine_facts(device: torch.device, ranks: Ranks = ALONE) -> dict[str, Any]:
    """What the bits depend on besides the software; of unlike machines, what each of them is."""
    is_cuda = device.type == "cuda"
    facts = {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if is_cuda else processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    of_ranks = ranks.gather(facts)
    for name in facts:
        values = list(dict.fromkeys(each[name] for each in of_ranks))
        facts[name] = values[0] if len(values) == 1 else " + ".join(map(str, values))
    return {**facts, "world_size": ranks.world_size}


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Differences:
    """What makes a run another one than that to be carried on, each in words.

    Attributes:
        task: Settings, data, labels, base model, tokenizer.
        machine: Versions of software, processor, threads.
    """

    task: list[str]
    machine: list[str]

    def __bool__(self) -> bool:
        return bool(self.task or self.machine)

    def __str__(self) -> str:
        return "; ".join([*self.task, *self.machine])


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """Compares the record of a run with what a command would do now.

    Args:
        then: A `run_record`, read from a file: anything may be missing or of another type.
        now: A `run_record`.
    """
    old, new = part_of(then, "config"), now["config"]
    free = set(_FREE)
    decide = ("load_best_model_at_end", "early_stopping_patience")
    if new["seeds"] == 1 and not any(old.get(name) or new[name] for name in decide):
        free |= set(_WATCHING)
    task = [
        f"{name} {_shown(old.get(name))} -> {_shown(value)}"
        for name, value in new.items()
        if name not in free and old.get(name) != value
    ]
    data = part_of(then, "data")
    for split in {**data, **now["data"]}:
        sums = [part_of(part, split).get("sha256") for part in (data, now["data"])]
        if sums[0] != sums[1]:
            task.append(f"{visible(split)} data {_hash(sums[0])} -> {_hash(sums[1])}")
    if then.get("labels") != now["labels"]:
        task.append(f"labels {_shown(then.get('labels'))} -> {_shown(now['labels'])}")
    for name, value in now["sha256"].items():
        before = part_of(then, "sha256").get(name)
        if before != value:
            task.append(f"{name} {_hash(before)} -> {_hash(value)}")
    machine = [
        f"{name} {_shown(part_of(then, part).get(name))} -> {_shown(value)}"
        for part, names in (("versions", _VERSIONS), ("machine", now["machine"]))
        for name in names
        if part_of(then, part).get(name) != (value := now[part][name])
    ]
    return Differences(task, machine)


def part_of(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a record that comes from a file; empty if it is not there or no object."""
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = visible(",".join(map(str, value)) if isinstance(value, list) else str(value))
    return text if len(text) <= 500 else f"{text[:500]}..."


def _hash(value: Any) -> str:
    return "none" if value is None else f"SHA-256 {visible(str(value)[:8])}"
