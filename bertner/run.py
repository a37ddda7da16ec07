"""What the commands do once their arguments are understood: build the parts and call them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from bertner import kernels
from bertner.card import RunFacts, early_stop, model_card
from bertner.checkpoint import (
    WEIGHTS,
    Checkpoint,
    check_free_space,
    copy_checkpoint,
    save_checkpoint,
    verify_checkpoint,
    write_state,
)
from bertner.config import TrainConfig
from bertner.data_check import check_data
from bertner.distributed import Ranks, join
from bertner.errors import BertnerError, CheckpointError, DataError, RunStoppedError, UsageError
from bertner.evaluation import Evaluation, Stopped, evaluate
from bertner.files import write_json, write_text
from bertner.findings import format_check
from bertner.html_report import write_report
from bertner.loop import class_weights, train
from bertner.outcome import assess_run, read_events, run_facts
from bertner.output_dir import RECORD, REPORT, lock_output_dir, remove_run
from bertner.parts import Parts, announce, build_parts, find_device, products_for, read_corpora
from bertner.progress import TrainResult, TrainState
from bertner.record import differences, machine_facts, run_record
from bertner.report import RunReport, escape_unknown, progress_bar, say
from bertner.resume import (
    Start,
    find_start,
    keep_choices,
    load_weights,
    naming,
    settle_start,
    share_state,
    state_of,
)
from bertner.stopping import StopSignals
from bertner.tables import format_scores
from bertner.tensorboard import check_tensorboard
from bertner.weights import TensorFile

logger = logging.getLogger("bertner")


def run_training(config: TrainConfig, recipe: str, arguments: Sequence[str]) -> None:
    """`bertner-train`: from a configuration to a model folder.

    Args:
        config: All settings.
        recipe: The one that they start from.
        arguments: Of the command, to name it in messages.

    Raises:
        BertnerError: See the exit codes in `errors`.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(join_ranks(config))
        parts, start, record = open_run(config, recipe, stack, ranks)
        if start.finished:
            say(f"{config.output_dir} holds just this run, and it is finished: nothing to do.")
            return
        announce(config, parts, ranks)
        # From here on there is something to lose; before, a signal ends the process as usual.
        stop = stack.enter_context(StopSignals())
        train_run(config, parts, start, record, arguments, stop, ranks)
        say_what_next(Path(config.output_dir))


@contextmanager
def join_ranks(config: TrainConfig) -> Iterator[Ranks]:
    """Takes this process' place among the ranks; all but the first say nothing while it is open."""
    with join(config.device, config.ddp_backend, config.ddp_timeout) as ranks, ExitStack() as stack:
        if not ranks.is_first:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield ranks


def open_run(
    config: TrainConfig,
    recipe: str,
    stack: ExitStack,
    ranks: Ranks,
    parts: Parts | None = None,
) -> tuple[Parts, Start, dict[str, Any]]:
    """Takes the output directory, builds the parts, and finds what there is to carry on.

    Args:
        config: All settings.
        recipe: The one that they start from.
        stack: Keeps the directory locked, and choices as the run began, until it is closed.
        ranks: Of the run; only the first looks into the directory.
        parts: Of a run that differs only in its seed, if there was one: they are read only once.

    Returns:
        The parts with their first weights, where to begin, and the contents of run.json.
    """
    output_dir = Path(config.output_dir)
    device = ranks.together(partial(_check_machine, config, ranks))

    def find() -> Start:
        stack.enter_context(lock_output_dir(output_dir))
        return find_start(config, output_dir)  # before minutes of downloading

    on_device = kernels.on_device(device, tf32=config.tf32, deterministic=config.deterministic)
    stack.enter_context(on_device)
    start = ranks.lead(find) or Start()
    machine = machine_facts(device, ranks)
    if " + " in f"{machine['processor']}{machine['instructions']}":
        logger.warning(
            "the processes have unlike processors: their weights may drift apart in the last bits"
        )
    stack.enter_context(keep_choices(start, config, device, machine))
    # All multiply as the first does, whose choice is recorded.
    products = ranks.share(ranks.together(partial(products_for, config, device)))
    matmul = config.matmul if config.packing else "default"
    stack.enter_context(kernels.keep_products(matmul, device, config.dtype, products))
    commit = ranks.share(start.commit_of(config))
    if parts is None:
        parts = ranks.in_turn(partial(build_parts, config, commit))
    else:
        parts = ranks.together(partial(parts.with_first_weights, config))
    record = run_record(config, recipe, parts, machine)
    ranks.together(partial(_check_same, ranks.share(record), record))
    settled = ranks.lead(partial(settle_start, start, config, record)) or start
    return parts, Start(finished=True) if ranks.share(settled.finished) else settled, record


def _check_machine(config: TrainConfig, ranks: Ranks) -> torch.device:
    """Finds the device, and what cannot be had here."""
    if config.report_to == "tensorboard":
        check_tensorboard()
    if ranks.world_size > 1:
        for path in (config.train_file, config.validation_file, config.test_file):
            if path is not None and Path(path).exists() and not Path(path).is_file():
                raise UsageError(f"{path} is no file: several processes cannot all read it")
    return find_device(config.device)


def _check_same(first: Mapping[str, Any], record: dict[str, Any]) -> None:
    """Lets no rank train on something else than the first one."""
    found = _names_that_differ(first["config"], record["config"], _OWN)
    found += _names_that_differ(first["model"], record["model"], ("name", "folder", "commit"))
    if other := str(differences(first, record)):
        found.append(other)
    if found:
        raise DataError(
            f"does not train what rank 0 does: {', '.join(dict.fromkeys(found))}\n"
            "Make flags, data, model and versions the same for all ranks."
        )


def _names_that_differ(
    first: Mapping[str, Any], other: Mapping[str, Any], free: Sequence[str]
) -> list[str]:
    return [name for name in first if name not in free and first[name] != other.get(name)]


# Settings that each rank may have for itself: where things lie, and what the first alone does.
_OWN = (
    "model_name_or_path train_file validation_file test_file data_cache device output_dir "
    "overwrite_output_dir resume_from_checkpoint disable_tqdm"
).split()


def train_run(
    config: TrainConfig,
    parts: Parts,
    start: Start,
    record: dict[str, Any],
    arguments: Sequence[str],
    stop: StopSignals,
    ranks: Ranks,
) -> None:
    """Trains what `open_run` has found to do, and writes the results."""
    with ExitStack() as stack:
        stack.enter_context(naming(start.checkpoint))

        def begin() -> RunReport:
            _begin(config, parts, start, record)
            total_steps = parts.schedule(config, ranks.world_size).total_steps
            return stack.enter_context(_open_report(config, total_steps, start))

        report = ranks.lead(begin)
        state = None if start.checkpoint is None else state_of(start.checkpoint)
        state = share_state(state, parts.model, ranks)
        _Run(config, parts, start, record, list(arguments), stop, ranks, report).train(state)


def _begin(config: TrainConfig, parts: Parts, start: Start, record: dict[str, Any]) -> None:
    """Makes the directory this run's; weights of a checkpoint take the place of the first ones."""
    output_dir = Path(config.output_dir)
    if start.record is not None and start.checkpoint is None:
        logger.info("the run in %s had no checkpoint yet: it begins again", output_dir)
    if start.checkpoint is not None:  # which is looked at before another run is removed
        state_of(start.checkpoint)
        load_weights(start.checkpoint.weights, parts.model, start.checkpoint.folder)
    if config.save_strategy != "no":
        # Now rather than after hours: weights, and two averages of each.
        num_bytes = 3 * sum(t.nbytes for t in parts.model.state_dict().values())
        check_free_space(output_dir, num_bytes, "a checkpoint")
    if start.replaces:
        remove_run(output_dir)
    write_json(output_dir / RECORD, record)
    if start.checkpoint is not None and config.load_best_model_at_end:
        _keep_best(start.checkpoint, output_dir)


def _keep_best(checkpoint: Checkpoint, output_dir: Path) -> None:
    """Makes sure now that the best weights so far can be loaded at the end."""
    best_step = state_of(checkpoint).best_step
    if best_step is None:
        return
    best = checkpoint.folder.resolve().with_name(f"checkpoint-{best_step}")
    try:
        verify_checkpoint(best)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nIt was the best so far: put back a copy, or go on without it, with "
            "--load_best_model_at_end false --allow_inexact_resume."
        ) from None
    if best.parent != output_dir.resolve():
        copy_checkpoint(best, output_dir)


def _open_report(config: TrainConfig, total_steps: int, start: Start) -> RunReport:
    restored: dict[str, Any] = {}
    if start.checkpoint is not None:
        logger.info("carrying on after step %d of %d", start.checkpoint.step, total_steps)
        restored = {
            "step": start.checkpoint.step,
            "state": start.checkpoint.state.get("report", {}),
            "metrics": start.checkpoint.metrics,
        }
    return RunReport(
        Path(config.output_dir),
        total_steps,
        config.logging_steps,
        not config.disable_tqdm,
        report_to=config.report_to,
        **restored,
    )


@dataclasses.dataclass
class _Run:
    """A run that has begun: what it is made of, and what it leaves on the disk.

    Attributes:
        watcher: The report; None on all ranks but the first.
        saved_step: Of the newest checkpoint that is of this run, as it is now: one of a later step
            or the same can be left of a run that went back.
    """

    config: TrainConfig
    parts: Parts
    start: Start
    record: dict[str, Any]
    arguments: Sequence[str]
    stop: StopSignals
    ranks: Ranks
    watcher: RunReport | None
    saved_step: int | None = None

    def __post_init__(self) -> None:
        checkpoint = self.start.checkpoint
        if checkpoint and checkpoint.folder.resolve().parent == self.output_dir.resolve():
            self.saved_step = checkpoint.step

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def report(self) -> RunReport:
        assert self.watcher is not None, "only the first rank writes"
        return self.watcher

    def train(self, state: TrainState | None) -> None:
        """Trains, evaluates and writes the results; asked to stop, leaves a checkpoint.

        Args:
            state: Where the run stood; None for the first step.
        """
        train_data = self.parts.datasets["train"]
        if self.ranks.is_first and state is None:
            facts = {"total_steps": self.report.total_steps, "num_rows": len(train_data)}
            self.report.event("start", facts)
        result = train(
            self.parts.model,
            train_data,
            self.config,
            evaluation=self.parts.datasets.get("validation"),
            watcher=self.watcher,
            save=self.save,
            state=state,
            should_stop=self.stop,
            ranks=self.ranks,
        )
        if result.stopped:
            self.leave(result.state)
        if result.stopped_early:
            logger.info("stopped early after %s", early_stop(self.config, result))
        kept_step = self.choose_weights(result)
        try:
            evaluations = self.evaluate(result, kept_step)
        except Stopped:
            self.leave(result.state)
        self.ranks.lead(partial(self.write_results, result, kept_step, evaluations))

    def save(self, state: TrainState) -> None:
        """Makes a checkpoint that is due, unless the run was carried on from just that one."""
        with self.report.saving(state.step) as metrics:
            if self.saved_step != state.step:
                self.write_checkpoint(state, metrics)

    def write_checkpoint(self, state: TrainState, metrics: bytes) -> None:
        """Makes a checkpoint, and removes older ones."""
        if self.start.checkpoint is not None:  # may be one of those
            self.start.checkpoint.weights.close()
            self.start.checkpoint.optimizer.close()

        def write(folder: Path) -> None:
            values = {
                "counters": dict(state.counters),
                "report": self.report.state(),
                "run": self.record,
            }
            # Two large files at a time: much of it is waiting, for memory and for the disk.
            with ThreadPoolExecutor(1) as pool:
                model = pool.submit(self.parts.save_model, folder)
                write_state(folder, values, state.optimizer, metrics)
                model.result()
            self.ranks.meet()  # or it does not become a checkpoint

        tensors = [*self.parts.model.state_dict().values(), *state.optimizer.values()]
        save_checkpoint(
            self.output_dir,
            state.step,
            write,
            num_bytes=sum(tensor.nbytes for tensor in tensors) + len(metrics) + (4 << 20),
            # Without regular saves there are those of a stop, and the best to be loaded at the end.
            keep=1 if self.config.save_strategy == "no" else self.config.save_total_limit,
            best_step=state.best_step if self.config.load_best_model_at_end else None,
        )
        self.saved_step = state.step

    def leave(self, state: TrainState) -> NoReturn:
        """Ends a run that was asked to stop."""

        def keep() -> Path:
            folder = self.keep_last(state)
            verify_checkpoint(folder)
            return folder

        self.stop.is_leaving = self.ranks.world_size > 1
        folder = self.ranks.lead(keep)
        names = filter(None, self.ranks.gather(self.stop.name))
        raise RunStoppedError(
            f"stopped by {next(names)} after step {state.step}; {folder} is saved and verified\n"
            f"{how_to_carry_on(self.arguments, self.ranks)}"
        )

    def keep_last(self, state: TrainState) -> Path:
        """Makes sure that there is a checkpoint of where the run stands."""
        folder = self.output_dir / f"checkpoint-{state.step}"
        if self.saved_step != state.step:
            logger.info("saving %s", folder)
            self.write_checkpoint(state, self.report.metrics())
        return folder

    def choose_weights(self, result: TrainResult) -> int:
        """Gives the model the best weights, if they are to be kept.

        Returns:
            The step that the model's weights are of.
        """
        best_step = result.best_step
        if not self.config.load_best_model_at_end or best_step in (None, result.step):
            return result.step

        def load() -> None:
            self.keep_last(result.state)  # the last weights leave the memory
            folder = self.output_dir / f"checkpoint-{best_step}"
            verify_checkpoint(folder)
            load_weights(TensorFile(folder / WEIGHTS), self.parts.model, folder)

        self.ranks.lead(load)
        self.ranks.broadcast(list(self.parts.model.state_dict().values()))
        return int(best_step)

    def evaluate(self, result: TrainResult, kept_step: int) -> dict[str, Evaluation]:
        """Scores of the kept weights; what has just been computed is not computed again."""
        evaluations: dict[str, Evaluation] = {}
        for split in ("validation", "test"):
            if split not in self.parts.datasets:
                continue
            if split == "validation" and result.evaluation and kept_step == result.step:
                evaluations[split] = result.evaluation
            else:
                dataset = self.parts.datasets[split]
                evaluations[split] = evaluate(
                    self.parts.model,
                    dataset,
                    self.config.per_device_eval_batch_size,
                    dtype=self.config.dtype,
                    packing=self.config.packing,
                    batch_tokens=self.config.eval_batch_tokens,
                    matmul=self.config.matmul,
                    on_batch=self.watcher.evaluating(len(dataset)) if self.watcher else None,
                    should_stop=self.stop,
                    ranks=self.ranks,
                )
        return evaluations

    def write_results(
        self, result: TrainResult, kept_step: int, evaluations: dict[str, Evaluation]
    ) -> None:
        """Writes model, scores and card, and last of all that the run is finished."""
        self.parts.save_model(self.output_dir)
        results = _all_results(result, evaluations)
        self.report.event("end", results)
        write_json(self.output_dir / "all_results.json", results)
        write_json(
            self.output_dir / "eval_results.json",
            {name: value for name, value in results.items() if name.startswith("eval_")},
        )
        train_data = self.parts.datasets["train"]
        facts = RunFacts(
            config=self.config,
            base_model=self.parts.source.name,
            base_commit=self.parts.source.commit,
            corpora=self.parts.corpora,
            num_train_tokens=train_data.num_read,
            class_weights=class_weights(train_data, self.config.class_weights),
            model=self.parts.model.config,
            num_parameters=self.parts.model.num_parameters,
            max_length=self.parts.tokenizer.row_limit(self.config.max_seq_length),
            lowercase=self.parts.tokenizer.lowercase,
            result=result,
            rows=self.report.rows,
            evaluations=evaluations,
            kept_step=kept_step,
            versions=self.record["versions"],
            device=self.record["device"],
            resumes=self.record["resumes"],
            reliability=self.write_report(evaluations),
        )
        write_text(self.output_dir / "README.md", model_card(facts))
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(self.output_dir / RECORD, {**self.record, "finished": finished})
        for split, evaluation in evaluations.items():
            say(f"\n{format_scores(evaluation.word, f'{split}, word level')}")

    def write_report(self, evaluations: dict[str, Evaluation]) -> Mapping[str, Any] | None:
        """Writes the calibration and the report; the results do not hang on them.

        Returns:
            How reliable the confidence of entities is on the validation data.
        """
        try:
            pages = assess_run(self.config, self.parts, evaluations, self.output_dir)
            if self.config.report:
                write_report(
                    self.output_dir / REPORT,
                    title=self.output_dir.resolve().name,
                    evaluations=pages,
                    events=read_events(self.report.path),
                    facts=run_facts(self.record, self.arguments),
                )
        except BertnerError as error:
            logger.warning("no report: %s", error)
            return None
        if "validation" not in pages:
            return None
        reliability: Mapping[str, Any] = pages["validation"][0]["reliability"]
        return reliability


def say_what_next(output_dir: Path) -> None:
    """Says where everything is, and how to use it."""
    say(f"\nModel, model card and scores: {output_dir}")
    if (output_dir / REPORT).is_file():
        say(f"Report, to open in a browser: {output_dir / REPORT}")
    predict = f"{_command('bertner-predict')} --model {shlex.quote(str(output_dir))}"
    say(f"Try it: echo 'Angela Merkel visited Paris .' | {predict}")


def how_to_carry_on(arguments: Sequence[str], ranks: Ranks) -> str:
    """What to type to carry the run of a command on."""
    command = shlex.join([_command("bertner-train"), *_without_resume(arguments)])
    if ranks.world_size == 1:
        return f"Carry on with: {command}"
    return f"Carry on under torchrun, with {ranks.world_size} processes again: {command}"


def _without_resume(arguments: Sequence[str]) -> list[str]:
    """The same command, but for the checkpoint that it named: there is a newer one now."""
    kept: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.replace("-", "_") == "__resume_from_checkpoint":
            if not equals:
                kept.append(_NEXT)
        elif kept and kept[-1] == _NEXT:
            kept.pop()
        else:
            kept.append(argument)
    return kept


_NEXT = "\0"  # no argument can be this


def _command(name: str) -> str:
    """How to call one of our commands from where this one was called."""
    beside = Path(sys.argv[0]).with_name(name)
    return str(beside) if shutil.which(name) is None and beside.is_file() else name


def _all_results(result: TrainResult, evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    results: dict[str, Any] = {
        "epoch": result.epoch,
        "step": result.step,
        "train_loss": result.loss,
        "train_runtime": result.runtime,
        "train_steps_per_second": result.steps_per_second,
        "train_tokens_per_second": result.tokens_per_second,
    }
    prefixes = {"validation": "eval_", "test": "test_"}
    for split, evaluation in evaluations.items():
        for name, value in evaluation.metrics().items():
            results[prefixes[split] + name] = value
        results[f"{prefixes[split]}word_per_type"] = {
            kind: {"precision": s.precision, "recall": s.recall, "f1": s.f1, "entities": s.num_gold}
            for kind, s in evaluation.word.per_type.items()
        }
    return results


def run_data_check(config: TrainConfig, form: str) -> None:
    """`bertner-train --check_data`: what is to be said of the data before anything is trained.

    Args:
        config: All settings; only those of data and tokens matter.
        form: Of what is printed, "text" or "json".
    """
    corpora, tokenizer = read_corpora(config)
    with progress_bar(len(corpora) + 2, " step", "check", not config.disable_tqdm) as bar:
        check = check_data(corpora, tokenizer, config.reading, bar.update)
    escape_unknown()
    if form == "json":
        say(json.dumps(dataclasses.asdict(check), indent=2))
    else:
        say(format_check(check))
