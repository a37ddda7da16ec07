"""Models and datasets from the Hub, through the real client libraries, from a server of our own.

Those libraries read where the Hub is when they are imported, so each scenario is a process of its
own. Its traffic to any other host goes to the same server, as to a proxy, and is refused.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from bertner.hub_datasets import CONLL2003_LABELS, CONLL2003_ROWS
from bertner.model import BertForNER
from tests.conftest import REPOSITORY, write_conll, write_model_folder
from tests.hub_server import HubServer

EVERYTHING = ("",)
PARQUET_BRANCH = "refs/convert/parquet"
QUICKSTART = "Use a local folder, or try `bertner-train --quickstart`, which needs no network."

FIND_MODELS = """
import json, logging, sys
from bertner.errors import BertnerError
from bertner.hub import find_model
logging.basicConfig()
for name, revision in json.loads(sys.argv[1]):
    try:
        source = find_model(name, revision)
        print(json.dumps([str(source.folder), source.commit]))
    except BertnerError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""

READ_DATASETS = """
import json, logging, sys
from bertner.errors import BertnerError
from bertner.hub_datasets import read_dataset
logging.basicConfig()
logging.getLogger("bertner").setLevel(logging.INFO)
for name, options in json.loads(sys.argv[1]):
    try:
        corpora = read_dataset(name, **options).items()
        print(json.dumps({s: [c.source, c.num_sentences, c.entity_counts()] for s, c in corpora}))
    except BertnerError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""

TRAIN = """
import contextlib, json, sys
from bertner.cli import train_main
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(sys.stderr):
        exit_code = train_main(arguments)
    print(exit_code)
    print("(end)", file=sys.stderr)
"""

LOAD_MODEL = """
import sys
from bertner.model import BertForNER
BertForNER.from_pretrained(sys.argv[2]).save_pretrained("loaded")
"""

# The client waits a second before it tries again, five times.
NO_PAUSES = "import time; time.sleep = lambda seconds: None\n"


class Client:
    """Processes that use the Hub at `url` and share a cache."""

    def __init__(self, url: str, cache: Path) -> None:
        self.url = url
        self.cache = cache

    def start(self, program: str, *arguments: Any, **settings: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment |= {
            "PYTHONPATH": str(REPOSITORY),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "http_proxy": self.url,
            "https_proxy": self.url,
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            **settings,
        }
        command = [sys.executable, "-c", program]
        command += [each if isinstance(each, str) else json.dumps(each) for each in arguments]
        return subprocess.Popen(
            command,
            env=environment,
            cwd=self.cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, program: str, *arguments: Any, timeout: int = 60, **settings: str
    ) -> tuple[list[Any], str]:
        """The JSON values that a program prints, one a line, and its stderr."""
        return finish(self.start(program, *arguments, **settings), timeout)


def finish(process: subprocess.Popen[str], timeout: int = 60) -> tuple[list[Any], str]:
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.communicate()
    assert "Traceback" not in errors
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()], errors


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
        assert {request.host for request in server.requests} <= {""}


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    cache = tmp_path / "cache"
    cache.mkdir()
    return Client(hub.url, cache)


@pytest.fixture
def nowhere(tmp_path: Path) -> Client:
    """A client of a Hub that cannot be reached, with an empty cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    cache = tmp_path / "empty-cache"
    cache.mkdir()
    return Client(url, cache)


# Models


def write_repository(folder: Path, layout: str) -> Path:
    """A model repository as found on the Hub, with the weights in one of three layouts."""
    write_model_folder(folder)
    weights = load_file(folder / "model.safetensors")
    if layout != "whole":
        (folder / "model.safetensors").unlink()
    if layout == "sharded":
        names, shards = sorted(weights), ["model-00001-of-00002", "model-00002-of-00002"]
        parts = {f"{shards[k]}.safetensors": names[k::2] for k in range(2)}
        for shard, part in parts.items():
            save_file({name: weights[name] for name in part}, folder / shard)
        index = {"weight_map": {name: shard for shard in parts for name in parts[shard]}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if layout == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(b"must not be fetched")
    for other in ("README.md", "flax_model.msgpack", "tf_model.h5", "rust_model.ot", "onnx/m.onnx"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"must not be fetched")
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


def test_the_layouts_of_a_model(hub: HubServer, client: Client, tmp_path: Path) -> None:
    layouts = ["whole", "sharded", "pickle"]
    for layout in layouts:
        hub.add("models", f"org/{layout}", write_repository(tmp_path / layout, layout))
    answers, _ = client.run(FIND_MODELS, [[f"org/{layout}", None] for layout in layouts])
    weights = {
        "whole": ["model.safetensors"],
        "sharded": [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ],
        "pickle": ["pytorch_model.bin"],
    }
    wanted = BertForNER.from_pretrained(tmp_path / "whole").state_dict()
    for layout, (folder, _) in zip(layouts, answers, strict=True):
        fetched = sorted(hub.downloads(f"org/{layout}"))
        assert fetched == ["config.json", *weights[layout], "vocab.txt"]
        found = BertForNER.from_pretrained(folder).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_commits_revisions_and_old_names(
    hub: HubServer, client: Client, nowhere: Client, tmp_path: Path
) -> None:
    first = hub.add("models", "google-bert/bert-base-cased", write_model_folder(tmp_path / "1"))
    second = hub.add(
        "models",
        "google-bert/bert-base-cased",
        write_model_folder(tmp_path / "2", hidden_size=16),
        branch="small",
    )
    assert first != second
    hub.rename("models", "bert-base-cased", "google-bert/bert-base-cased")
    questions = [["bert-base-cased", None], ["bert-base-cased", "small"]]
    questions += [["google-bert/bert-base-cased", second], ["google-bert/bert-base-cased", "main"]]
    answers, _ = client.run(FIND_MODELS, questions)
    assert [commit for _, commit in answers] == [first, second, second, first]
    sizes = [json.loads((Path(a) / "config.json").read_text())["hidden_size"] for a, _ in answers]
    assert sizes == [32, 16, 16, 32]

    # Once more from the cache: asked not to connect, and not able to.
    hub.requests.clear()
    again, _ = client.run(FIND_MODELS, questions, HF_HUB_OFFLINE="1")
    assert again == answers
    assert hub.requests == []
    again, errors = Client(nowhere.url, client.cache).run(FIND_MODELS, questions)
    assert again == answers
    assert "bert-base-cased: using the cached copy (ConnectError: " in errors


def test_a_new_commit_is_fetched(hub: HubServer, client: Client, tmp_path: Path) -> None:
    old = hub.add("models", "org/tiny", write_model_folder(tmp_path / "1"))
    answers, _ = client.run(FIND_MODELS, [["org/tiny", None]])
    new = hub.add("models", "org/tiny", write_model_folder(tmp_path / "2", hidden_size=16))
    answers += client.run(FIND_MODELS, [["org/tiny", None]])[0]
    assert [commit for _, commit in answers] == [old, new]


def test_what_the_hub_refuses(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add("models", "org/tiny", write_model_folder(tmp_path / "tiny"))
    hub.add("models", "org/gated", write_model_folder(tmp_path / "gated"), gated=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing yet")
    hub.add("models", "org/empty", tmp_path / "empty")
    train = write_conll(tmp_path / "train.txt")
    restricted = "access to this model is restricted: ask for it on the Hub, then run"
    cases = [
        ("org/nope", None, "no such folder here and no such model on the Hub (private ones need"),
        ("org/no--such", None, "no such folder here and no such model on the Hub"),
        ("org/tiny", "v9", "has no revision 'v9' on the Hub"),
        ("org/tiny", "0" * 40, f"has no revision '{'0' * 40}' on the Hub"),
        ("org/gated", None, f"{restricted} `hf auth login`"),
        ("org/empty", None, "has no config.json on the Hub"),
    ]
    commands = [
        ["--model", name, *(["--model_revision", revision] if revision else [])]
        for name, revision, _ in cases
    ]
    commands = [[*each, "--train_file", str(train)] for each in commands]
    exit_codes, errors = client.run(TRAIN, commands)
    assert exit_codes == [65] * len(cases)
    for (name, _, message), text in zip(cases, errors.split("(end)"), strict=False):
        last = text.strip().replace("\r", "\n").split("\n")[-1]
        assert last.startswith(f"bertner-train: {name}: {message}")
    assert not (client.cache / "bert-finetuned-ner").exists()


def test_a_bad_token_is_named(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.add("models", "org/tiny", write_model_folder(tmp_path / "tiny"))
    [[code, message]], _ = client.run(FIND_MODELS, [["org/tiny", None]], HF_TOKEN="hf_expired")
    assert code == 65
    assert message.startswith("org/tiny: the Hub refuses your token: run `hf auth login` or unset")


def test_connections_that_fail(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """However the connection breaks, the HTTP library's own exceptions stay inside."""
    hub.add("models", "org/tiny", write_model_folder(tmp_path / "tiny"))
    for split in ("train", "test"):
        folder = write_dataset(tmp_path / split, {split: 3}, layout="{}.parquet")
        hub.add("datasets", f"org/{split}", folder)
    question = [["org/tiny", None]]
    hub.cut = ("/api/models/org/tiny",)
    [[code, message]], _ = client.run(FIND_MODELS, question)
    assert code == 74
    assert "RemoteProtocolError" in message
    assert message.endswith(QUICKSTART)
    [[code, message]], _ = client.run(FIND_MODELS, question, no_proxy="", http_proxy="ftp://x")
    assert code == 74
    assert "Unknown scheme for proxy URL" in message

    # In the midst of a file, and just before it.
    hub.cut, hub.failing = ("model.safetensors", "train.parquet"), ("test.parquet",)
    data: list[Any] = [["org/train", {}], ["org/test", {}]]
    processes = [
        client.start(NO_PAUSES + FIND_MODELS, question),
        client.start(NO_PAUSES + READ_DATASETS, data),
    ]
    answers = [answer for process in processes for answer in finish(process)[0]]
    assert [code for code, _ in answers] == [74, 74, 74]
    assert "peer closed connection" in answers[0][1]
    assert answers[1][1].startswith("org/train: cannot be loaded: peer closed connection")
    assert answers[2][1].startswith("org/test: cannot be loaded: An error happened while trying")
    # What was left half-done is not taken for the model, or the data, later on.
    processes = [
        client.start(FIND_MODELS, question, HF_HUB_OFFLINE="1"),
        client.start(READ_DATASETS, data, HF_HUB_OFFLINE="1"),
    ]
    answers = [answer for process in processes for answer in finish(process)[0]]
    assert [code for code, _ in answers] == [74, 74, 74]
    assert all("OfflineModeIsEnabled" in message for _, message in answers)


def test_a_hub_that_never_answers(hub: HubServer, client: Client) -> None:
    """The client would wait without end; one question decides, and in the client's own time."""
    hub.silent = True
    settings = {"HF_HUB_ETAG_TIMEOUT": "1"}
    processes = [
        client.start(FIND_MODELS, [["org/tiny", None]], **settings),
        client.start(READ_DATASETS, [["org/data", {}], ["conll2003", {}]], **settings),
    ]
    answers = [answer for process in processes for answer in finish(process, timeout=30)[0]]
    for (code, message), name in zip(answers, ["org/tiny", "org/data", "conll2003"], strict=True):
        assert code == 74
        assert message == (
            f"cannot get {name!r} from the Hugging Face Hub, and it is not in the local cache "
            f"(ReadTimeout: timed out)\n{QUICKSTART}"
        )
    assert len(hub.requests) == 3


def test_no_arguments_and_no_hub(nowhere: Client) -> None:
    [exit_code], errors = nowhere.run(TRAIN, [[]], timeout=30)
    assert exit_code == 74
    lines = errors.replace("(end)", "").strip().split("\n")
    assert len(lines) == 2
    assert lines[0].startswith(
        (
            "bertner-train: cannot get 'bert-base-cased' from the Hugging Face Hub, and it is not",
            "bertner-train: cannot get 'conll2003' from the Hugging Face Hub, and it is not",
        )
    )
    assert lines[1] == QUICKSTART
    assert not (nowhere.cache / "bert-finetuned-ner").exists()


def test_no_hub_for_the_data(nowhere: Client, model_folder: Path) -> None:
    """The client alone would try again for half a minute, for each of the mirrors."""
    answers, errors = nowhere.run(READ_DATASETS, [["conll2003", {}], ["org/data", {}]], timeout=30)
    for (code, message), name in zip(answers, ["conll2003", "org/data"], strict=True):
        assert code == 74
        assert message.startswith(f"cannot get {name!r} from the Hugging Face Hub")
        assert message.endswith(QUICKSTART)
    assert errors == ""


def test_a_run_from_the_hub(hub: HubServer, client: Client, tmp_path: Path) -> None:
    commit = hub.add("models", "org/tiny", write_model_folder(tmp_path / "tiny"))
    train = write_conll(tmp_path / "train.txt")
    command = ["--model", "org/tiny", "--train_file", str(train), "--max_steps", "2"]
    command += ["--output_dir", str(tmp_path / "out"), "--disable_tqdm"]
    [exit_code], errors = client.run(TRAIN + LOAD_MODEL, [command], "org/tiny")
    assert exit_code == 0, errors
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["model"]["name"], run["model"]["commit"]) == ("org/tiny", commit)
    assert commit[:12] in (tmp_path / "out" / "README.md").read_text()
    # And from Python, by the same name.
    loaded = load_file(client.cache / "loaded" / "model.safetensors")
    wanted = load_file(tmp_path / "tiny" / "model.safetensors")
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    # Had it been interrupted, it would go on with this commit, though the Hub has a newer one.
    del run["finished"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    hub.add("models", "org/tiny", tmp_path / "tiny", branch="before")
    hub.add("models", "org/tiny", write_model_folder(tmp_path / "new", initializer_range=0.03))
    [exit_code], errors = client.run(TRAIN + LOAD_MODEL, [command], "org/tiny")
    assert exit_code == 0, errors
    assert "carrying on after step 2 of 2" in errors
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"]["commit"] == commit


# Datasets


def write_dataset(
    folder: Path,
    rows: dict[str, int],
    layout: str = "data/{}-00000-of-00001.parquet",
    labels: list[str] = CONLL2003_LABELS,
) -> Path:
    """A dataset repository with the columns of CoNLL-2003, each row one place of two words."""
    integers = datasets.List(datasets.Value("int64"))
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "tokens": datasets.List(datasets.Value("string")),
            "pos_tags": integers,
            "chunk_tags": integers,
            "ner_tags": datasets.List(datasets.ClassLabel(names=labels)),
        }
    )
    place = [labels.index("B-LOC"), labels.index("I-LOC")]
    for split, count in rows.items():
        columns = {
            "id": [str(number) for number in range(count)],
            "tokens": [["New", "York"]] * count,
            "pos_tags": [[22, 22]] * count,
            "chunk_tags": [[11, 12]] * count,
            "ner_tags": [place] * count,
        }
        path = folder / layout.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return folder


def write_json_lines(path: Path, tags: list[Any], count: int = 2, key: str = "ner_tags") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"tokens": ["New", "York"], key: tags}) + "\n"
    path.write_text(line * count)


@pytest.fixture(scope="module")
def conll_mirrors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CoNLL-2003 as its mirrors lay it out, and two that are not quite it."""
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("mirrors")
    other_order = [*CONLL2003_LABELS[:3], *CONLL2003_LABELS[5:7], *CONLL2003_LABELS[3:5]]
    other_order += CONLL2003_LABELS[7:]
    return {
        "right, converted": write_dataset(
            folder / "a", CONLL2003_ROWS, layout="conll2003/{}/0000.parquet"
        ),
        "right": write_dataset(folder / "b", CONLL2003_ROWS),
        "rows": write_dataset(folder / "c", {**CONLL2003_ROWS, "test": 3684}),
        "order": write_dataset(folder / "d", CONLL2003_ROWS, labels=other_order),
        "splits": write_dataset(folder / "e", {"train": 14041, "test": 3453}),
    }


def conll_from(mirror: str) -> dict[str, Any]:
    rows = CONLL2003_ROWS.items()
    return {split: [f"{mirror}[{split}]", count, {"LOC": count}] for split, count in rows}


def test_conll2003_and_another_dataset_and_again_from_the_cache(
    hub: HubServer, client: Client, conll_mirrors: dict[str, Path], tmp_path: Path
) -> None:
    mirror = "eriktks/conll2003"
    hub.add("datasets", mirror, conll_mirrors["right, converted"], branch=PARQUET_BRANCH)
    hub.add("datasets", "lhoestq/conll2003", conll_mirrors["right"])
    hub.add("datasets", "org/data", write_dataset(tmp_path / "data", {"train": 5}))
    # Public code also names the configuration.
    questions = [["conll2003", {"config_name": "conll2003"}], ["org/data", {}]]
    wanted = [conll_from(mirror), {"train": ["org/data[train]", 5, {"LOC": 5}]}]
    answers, errors = client.run(READ_DATASETS, questions)
    assert answers == wanted
    assert f"conll2003 from {mirror} at {PARQUET_BRANCH}" in errors
    assert not any("lhoestq" in request.path for request in hub.requests)

    hub.requests.clear()
    answers, _ = client.run(READ_DATASETS, questions, HF_HUB_OFFLINE="1")
    assert answers == wanted
    assert hub.requests == []
    hub.failing = EVERYTHING
    answers, errors = client.run(READ_DATASETS, questions, timeout=30)
    assert answers == wanted
    assert "Using the latest cached version of the dataset" in errors


@pytest.mark.parametrize(
    ("mirrors", "taken"),
    [
        ({"lhoestq": "right", "tomaarsen": "right"}, "lhoestq"),
        ({"eriktks": "rows", "lhoestq": "order", "tomaarsen": "right"}, "tomaarsen"),
    ],
    ids=["the first is missing", "two are wrong"],
)
def test_conll2003_from_another_mirror(
    hub: HubServer,
    client: Client,
    conll_mirrors: dict[str, Path],
    mirrors: dict[str, str],
    taken: str,
) -> None:
    for owner, content in mirrors.items():
        branch = PARQUET_BRANCH if owner == "eriktks" else "main"
        hub.add("datasets", f"{owner}/conll2003", conll_mirrors[content], branch=branch)
    [answer], _ = client.run(READ_DATASETS, [["conll2003", {}]])
    assert answer == conll_from(f"{taken}/conll2003")


@pytest.mark.parametrize("branch", [PARQUET_BRANCH, "main"])
def test_conll2003_with_documents(
    hub: HubServer, client: Client, conll_mirrors: dict[str, Path], branch: str
) -> None:
    content = conll_mirrors["right, converted"]
    hub.add("datasets", "eriktks/conll2003", content, branch=PARQUET_BRANCH)
    hub.add("datasets", "tomaarsen/conll2003", content, branch=branch)
    questions = [["conll2003", {"with_documents": wanted}] for wanted in (True, False)]
    answers, _ = client.run(READ_DATASETS, questions)
    assert answers == [conll_from(f"{owner}/conll2003") for owner in ("tomaarsen", "eriktks")]


def test_conll2003_when_no_mirror_is_right(
    hub: HubServer, client: Client, conll_mirrors: dict[str, Path]
) -> None:
    hub.add("datasets", "eriktks/conll2003", conll_mirrors["right, converted"])  # no such branch
    hub.add("datasets", "lhoestq/conll2003", conll_mirrors["rows"])
    hub.add("datasets", "tomaarsen/conll2003", conll_mirrors["splits"])
    [[code, message]], _ = client.run(READ_DATASETS, [["conll2003", {}]])
    assert code == 65
    assert message == (
        "conll2003: no mirror holds it: "
        f"eriktks/conll2003: has no revision '{PARQUET_BRANCH}' on the Hub; "
        "lhoestq/conll2003: has 3684 rows in test instead of 3453; "
        "tomaarsen/conll2003: has no validation split"
    )


DATASETS: dict[str, tuple[list[Any], Any]] = {
    "class labels": (
        ["org/classes", {}],
        {
            "train": ["org/classes[train]", 5, {"LOC": 5}],
            "validation": ["org/classes[validation]", 4, {"LOC": 4}],
            "test": ["org/classes[test]", 3, {"LOC": 3}],
        },
    ),
    "string tags, dev": (
        ["org/strings", {}],
        {
            "train": ["org/strings[train]", 2, {"LOC": 2}],
            "validation": ["org/strings[dev]", 1, {"LOC": 1}],
        },
    ),
    "a configuration": (
        ["org/strings-2", {"config_name": "b"}],
        {"train": ["org/strings-2[train]", 3, {"LOC": 3}]},
    ),
    "no configuration": (
        ["org/strings-2", {}],
        "org/strings-2: cannot be loaded as a dataset: Config name is missing. Please pick one "
        "among the available configs: ['a', 'b']",
    ),
    "other columns": (
        ["org/tags", {"label_column": "tags", "label_names": ["O", "B-ORG", "I-ORG"]}],
        {"train": ["org/tags[train]", 2, {"ORG": 2}]},
    ),
    "an id without owner": (["wnut", {}], {"train": ["wnut[train]", 2, {"LOC": 2}]}),
    "folder of parquet": (
        ["folders/parquet", {}],
        {
            "train": ["folders/parquet[train]", 5, {"LOC": 5}],
            "validation": ["folders/parquet[validation]", 4, {"LOC": 4}],
        },
    ),
    "folder of jsonl": (
        ["folders/jsonl", {}],
        {
            "train": ["folders/jsonl[train]", 2, {"LOC": 2}],
            "validation": ["folders/jsonl[validation]", 1, {"LOC": 1}],
        },
    ),
    "no train split": (["org/eval", {}], "org/eval: has no train split but test"),
    "no columns": (["org/tags", {}], "org/tags[train]: has no column 'ner_tags'..."),
    "integers without names": (
        ["org/tags", {"label_column": "tags"}],
        "org/tags[train]:1: tag 1 is an integer; name them...",
    ),
    "a script": (
        ["org/script", {}],
        "org/script: cannot be loaded as a dataset: Dataset scripts...",
    ),
    "broken": (
        ["org/broken", {}],
        "org/broken: cannot be loaded as a dataset: JSON parse error...",
    ),
    "a broken folder": (
        ["folders/broken", {}],
        "folders/broken: cannot be loaded as a dataset: while parsing a flow node...",
    ),
    "an empty folder": (
        ["folders/empty", {}],
        "folders/empty: cannot be loaded as a dataset: The directory at ...",
    ),
    "a file": (
        ["folders/jsonl/dev.jsonl", {}],
        "folders/jsonl/dev.jsonl: is a file; give it as --train_file",
    ),
    "no folder": (["/no/such/folder", {}], "/no/such/folder: no such folder"),
    "unknown": (
        ["org/nope", {}],
        "org/nope: no such folder here and no such dataset on the Hub (private ones need "
        "`hf auth login`)",
    ),
    "gated": (
        ["org/gated", {}],
        "org/gated: cannot be loaded as a dataset: Dataset 'org/gated' is a gated dataset on the "
        "Hub. You must be authenticated to access it.",
    ),
}


@pytest.fixture(scope="module")
def dataset_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `read_dataset` says to each of DATASETS; one process asks for all."""
    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("datasets")
    two, cache = root / "org/strings-2", root / "cache"
    place = ["B-LOC", "I-LOC"]
    write_dataset(root / "org/classes", {"train": 5, "validation": 4, "test": 3})
    write_json_lines(root / "org/strings/one.jsonl", place)
    write_json_lines(root / "org/strings/two.jsonl", place, count=1)
    (root / "org/strings/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: one.jsonl}\n  - {split: dev, path: two.jsonl}\n---\n"
    )
    write_json_lines(two / "a.jsonl", place, count=1)
    write_json_lines(two / "b.jsonl", place, count=3)
    (two / "README.md").write_text(
        "---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n"
        "- {config_name: b, data_files: b.jsonl}\n---\n"
    )
    write_json_lines(root / "org/tags/train.jsonl", [1, 2], key="tags")
    write_json_lines(root / "org/wnut/train.jsonl", place)
    write_json_lines(root / "org/eval/test.jsonl", place)
    write_json_lines(root / "org/gated/train.jsonl", place)
    write_json_lines(root / "org/script/train.jsonl", place)
    (root / "org/script/script.py").write_text("print('must not run')\n")
    write_json_lines(root / "org/broken/train.jsonl", place)
    with (root / "org/broken/train.jsonl").open("a") as file:
        file.write('{"tokens": ["New')
    write_dataset(cache / "folders/parquet", {"train": 5, "validation": 4})
    write_json_lines(cache / "folders/jsonl/train.jsonl", place)
    write_json_lines(cache / "folders/jsonl/dev.jsonl", place, count=1)
    write_json_lines(cache / "folders/broken/train.jsonl", place)
    (cache / "folders/broken/README.md").write_text("---\nconfigs: [\n---\n")
    (cache / "folders/empty").mkdir()
    with HubServer() as hub:
        for folder in (root / "org").iterdir():
            gated = folder.name == "gated"
            hub.add("datasets", f"org/{folder.name}", folder, gated=gated)
        hub.rename("datasets", "wnut", "org/wnut")
        client = Client(hub.url, cache)
        answers, errors = client.run(READ_DATASETS, [question for question, _ in DATASETS.values()])
        # Only the Hub itself is asked: not the server of the dataset viewer, say.
        assert {request.host for request in hub.requests} == {""}
    assert "must not run" not in errors
    return dict(zip(DATASETS, answers, strict=True))


@pytest.mark.parametrize("case", DATASETS)
def test_any_other_dataset(dataset_answers: dict[str, Any], case: str) -> None:
    _, wanted = DATASETS[case]
    answer = dataset_answers[case]
    if isinstance(wanted, dict):
        assert answer == wanted
    else:
        code, message = answer
        assert code == 65
        beginning, dots, _ = wanted.partition("...")
        assert message.startswith(beginning) if dots else message == wanted
