"""Evaluation and prediction: bertner against the Trainer, the pipeline and ONNX Runtime.

    python -m benchmarks.bench_evaluation --data DATA

Scores MiniLM on CoNLL-2003's validation split, then tags its text, from strings to entities; both
sides interleaved. ONNX Runtime takes part if `onnxruntime`, `onnx` and `onnxscript` are installed:
the model and argmax alone, without tokenising, on length-sorted batches of 32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from seqeval.metrics import f1_score
from transformers import AutoTokenizer, EvalPrediction, pipeline

from benchmarks.common import Parts, arguments, interleave, load, ratios, seconds_of, spread
from benchmarks.machine import write_result
from benchmarks.trainer_side import make_trainer
from bertner.batches import collate
from bertner.labels import IGNORE_INDEX
from bertner.loop import evaluate
from bertner.predict import Tagger
from bertner.readers import read_file


def seqeval_f1(names: tuple[str, ...]) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metric function of the Hugging Face course."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        gold, found = [], []
        for labels, logits in zip(prediction.label_ids, prediction.predictions, strict=True):
            keep = labels != IGNORE_INDEX
            gold.append([names[k] for k in labels[keep]])
            found.append([names[k] for k in logits[keep].argmax(-1)])
        return {"f1": float(f1_score(gold, found))}

    return compute


def onnx_side(parts: Parts, folder: Path) -> Callable[[], Any] | None:
    """ONNX Runtime's model and argmax over the padded, sorted rows; None if it is not installed."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - the exporter needs it
    except ImportError:
        print("without ONNX Runtime: pip install onnxruntime onnx onnxscript")
        return None
    device = torch.device("cpu")
    order = np.argsort(parts.validation.row_lengths, kind="stable")
    inputs = [
        collate(parts.validation, order[i : i + 32], device) for i in range(0, len(order), 32)
    ]
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = parts.model.eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids, attention_mask).logits
            return logits

    example = (inputs[9].input_ids, inputs[9].attention_mask)
    path = str(folder / "model.onnx")
    torch.onnx.export(Logits(), example, path, dynamic_shapes=(dynamic, dynamic), dynamo=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feeds = [
        dict(zip(names, (b.input_ids.numpy(), b.attention_mask.numpy()), strict=True))
        for b in inputs
    ]
    return lambda: [session.run(None, feed)[0].argmax(-1) for feed in feeds]


def table(title: str, seconds: dict[str, list[float]], base: str, items: int) -> dict[str, Any]:
    """Prints and returns rates and ratios."""
    print(f"\n{title}\n{'':26s} seconds (spread)   sentences/s   x {base} (spread)")
    result = {}
    for side, values in seconds.items():
        took, ratio = spread(values), ratios(seconds[base], values)
        result[side] = {
            "seconds": values,
            "sentences_per_second": items / took["median"],
            f"times_{base}": ratio,
        }
        print(
            f"{side:26s} {took['median']:6.2f} ({took['min']:.2f}-{took['max']:.2f})"
            f"{items / took['median']:12.0f}      {ratio['median']:6.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="also these batch sizes")
    options = parser.parse_args()
    parts = load("minilm", options.data)
    corpus = read_file(options.data / "conll2003" / "valid.txt")
    texts = [" ".join(corpus.sentence(k)) for k in range(corpus.num_sentences)]
    rows = len(parts.validation)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts.save(folder)
        trainer = make_trainer(folder, parts)
        scored = make_trainer(folder, parts)
        scored.compute_metrics = seqeval_f1(parts.validation.label_set.names)
        model = parts.model.eval()
        sides: dict[str, Callable[[], Any]] = {
            "Trainer, loss only": trainer.evaluate,
            "Trainer, with seqeval": scored.evaluate,
            "bertner float32": lambda: evaluate(model, parts.validation),
            "bertner bfloat16": lambda: evaluate(model, parts.validation, dtype="bfloat16"),
        }
        for tokens in options.tokens:
            sides[f"bertner, {tokens} a batch"] = partial(
                evaluate, model, parts.validation, batch_tokens=tokens
            )
        timed = {name: partial(seconds_of, side) for name, side in sides.items()}
        seconds = interleave(timed, options.rounds)
        result["evaluation"] = table("evaluation", seconds, "Trainer, loss only", rows)

        tagger = Tagger.from_pretrained(folder)
        pipe = pipeline(
            "token-classification",
            model=str(folder),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            aggregation_strategy="simple",
            device="cpu",
        )
        sides = {
            "pipeline": lambda: pipe(texts, batch_size=8),
            "bertner": lambda: tagger(texts),
        }
        onnx = onnx_side(parts, folder)
        if onnx is not None:
            sides["ONNX Runtime, model only"] = onnx
        timed = {name: partial(seconds_of, side) for name, side in sides.items()}
        seconds = interleave(timed, options.rounds)
        result["prediction"] = table("prediction", seconds, "pipeline", len(texts))
    print(write_result("evaluation", result))


if __name__ == "__main__":
    main()
