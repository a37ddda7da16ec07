"""Model folders: every naming and packing that loads, and everything that must not."""

from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from bertner import files
from bertner.errors import ModelError, StorageError
from bertner.model import BertForNER
from bertner.weights import canonical_name, tensor_chunks
from tests.conftest import write_model_folder


def state_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def replace_weights(folder: Path, state: dict[str, Tensor]) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def encoder_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("bert.")}


def old_names(folder: Path) -> None:
    """LayerNorm.gamma and beta, as in checkpoints converted from TensorFlow in 2018."""
    state = state_of(folder)
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    assert any("gamma" in name for name in state)
    replace_weights(folder, state)


def pretraining(folder: Path) -> None:
    """BertForPreTraining: heads, pooler and position ids that NER has no use for."""
    state = encoder_only(state_of(folder))
    state["cls.predictions.bias"] = torch.zeros(5)
    state["cls.predictions.transform.LayerNorm.gamma"] = torch.zeros(5)
    state["cls.seq_relationship.weight"] = torch.zeros(2, 5)
    state["bert.pooler.dense.weight"] = torch.zeros(5, 5)
    state["bert.embeddings.position_ids"] = torch.arange(128)[None]
    replace_weights(folder, state)
    set_config(folder, architectures=["BertForPreTraining"])


def bare_encoder(folder: Path) -> None:
    """BertModel: no `bert.` in front."""
    state = encoder_only(state_of(folder))
    replace_weights(folder, {name.removeprefix("bert."): tensor for name, tensor in state.items()})
    set_config(folder, architectures=["BertModel"])


def sharded(folder: Path) -> None:
    state = state_of(folder)
    names = sorted(state)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": [],
    }
    shards["model-00002-of-00002.safetensors"] = names[1::2]
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def pytorch_bin(folder: Path) -> None:
    torch.save(state_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded_bin(folder: Path) -> None:
    torch.save(state_of(folder), folder / "pytorch_model-00001-of-00001.bin")
    weight_map = dict.fromkeys(state_of(folder), "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "change", [old_names, pretraining, bare_encoder, sharded, pytorch_bin, sharded_bin]
)
def test_other_layouts_load_to_the_same_weights(
    model_folder: Path, change: Callable[[Path], None]
) -> None:
    expected = state_of(model_folder)
    change(model_folder)
    state = BertForNER.from_pretrained(model_folder).state_dict()
    for name, tensor in encoder_only(expected).items():
        assert torch.equal(state[name], tensor), name
    if change not in (pretraining, bare_encoder):
        assert torch.equal(state["classifier.weight"], expected["classifier.weight"])


def test_half_precision_is_widened(model_folder: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in state_of(model_folder).items()}
    replace_weights(model_folder, half)
    for name, tensor in BertForNER.from_pretrained(model_folder).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half[name].float())


@pytest.mark.parametrize("change", [None, pytorch_bin])
def test_quantised_weights_are_refused(
    model_folder: Path, change: Callable[[Path], None] | None
) -> None:
    state = state_of(model_folder)
    name = "bert.encoder.layer.0.output.dense.weight"
    replace_weights(model_folder, {**state, name: state[name].to(torch.int8)})
    if change is not None:
        change(model_folder)
    with pytest.raises(ModelError, match=f"{name} holds integers"):
        BertForNER.from_pretrained(model_folder)


def test_canonical_names() -> None:
    assert canonical_name("embeddings.LayerNorm.gamma") == "bert.embeddings.LayerNorm.weight"
    assert canonical_name("bert.encoder.layer.0.output.LayerNorm.beta") == (
        "bert.encoder.layer.0.output.LayerNorm.bias"
    )
    assert canonical_name("cls.predictions.decoder.weight") is None
    assert canonical_name("pooler.dense.bias") is None
    assert canonical_name("classifier.weight") == "classifier.weight"


def test_a_wrong_checkpoint_names_every_key(model_folder: Path) -> None:
    state = state_of(model_folder)
    missing = ["bert.embeddings.LayerNorm.bias", "bert.encoder.layer.1.output.dense.weight"]
    for name in missing:
        del state[name]
    extra = ["bert.encoder.layer.2.output.dense.weight", "bert.adapter.weight"]
    for name in extra:
        state[name] = torch.zeros(2)
    wrong_shape = "bert.encoder.layer.0.intermediate.dense.bias"
    state[wrong_shape] = torch.zeros(7)
    replace_weights(model_folder, state)
    with pytest.raises(ModelError) as caught:
        BertForNER.from_pretrained(model_folder)
    message = str(caught.value)
    for name in (*missing, *extra, wrong_shape):
        assert name in message
    assert "[7] instead of [48]" in message
    assert str(model_folder) in message
    assert caught.value.exit_code == 65


def test_another_model_altogether_names_what_it_holds(model_folder: Path) -> None:
    replace_weights(model_folder, {"transformer.h.0.attn.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"37 missing.*transformer\.h\.0\.attn\.weight"):
        BertForNER.from_pretrained(model_folder)


def test_the_head_alone_may_be_new(model_folder: Path) -> None:
    saved = state_of(model_folder)["classifier.weight"]
    same = BertForNER.from_pretrained(model_folder)
    assert torch.equal(same.classifier.weight, saved)
    torch.manual_seed(5)
    first = BertForNER.from_pretrained(model_folder, num_labels=5)
    torch.manual_seed(5)
    again = BertForNER.from_pretrained(model_folder, id2label={k: f"X{k}" for k in range(5)})
    assert first.classifier.weight.shape == (5, 32)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert first.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert not first.classifier.bias.any()
    assert first.config.id2label[4] == "LABEL_4"


def test_a_head_with_other_label_names_is_not_reused(model_folder: Path) -> None:
    trained = BertForNER.from_pretrained(model_folder, id2label={0: "O", 1: "B-PER"})
    trained.save_pretrained(model_folder)
    same = BertForNER.from_pretrained(model_folder, id2label={0: "O", 1: "B-PER"})
    assert torch.equal(same.classifier.weight, trained.classifier.weight)
    other = BertForNER.from_pretrained(model_folder, id2label={0: "O", 1: "B-LOC"})
    assert not torch.equal(other.classifier.weight, trained.classifier.weight)


class Bomb:
    """A pickle that leaves a trace if it is run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.trace),))


def test_a_pickle_that_would_run_code_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    trace = tmp_path / "executed"
    for save in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
        save({"bert.x": Bomb(trace)}, model_folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="a pickle that would run code") as caught:
            BertForNER.from_pretrained(model_folder)
        assert "pytorch_model.bin" in str(caught.value)
        assert not trace.exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold one JSON object"),
        (lambda f: set_config(f, model_type="roberta"), "'roberta'; bertner computes only BERT"),
        (lambda f: set_config(f, is_decoder=True), "is_decoder is set"),
        (lambda f: set_config(f, position_embedding_type="relative_key"), "relative_key"),
        (lambda f: set_config(f, hidden_act="swoosh"), "hidden_act 'swoosh' is not supported"),
        (lambda f: set_config(f, hidden_size="32"), "hidden_size must be an integer"),
        (lambda f: set_config(f, num_attention_heads=5), "not a multiple"),
        (lambda f: set_config(f, hidden_size=64), r"\[32\] instead of \[64\]"),
        (lambda f: set_config(f, vocab_size=10**7), "instead of"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: truncate(f / "model.safetensors"), "not a readable safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "not a readable"),
        (lambda f: sharded(f) or (f / "model-00002-of-00002.safetensors").unlink(), "is missing"),
    ],
)
def test_damaged_folders_are_refused(
    model_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(model_folder)
    with pytest.raises(ModelError, match=message) as caught:
        BertForNER.from_pretrained(model_folder)
    assert caught.value.exit_code == 65


def test_an_index_cannot_point_outside_its_folder(model_folder: Path) -> None:
    sharded(model_folder)
    index = {"weight_map": {"bert.x": "../elsewhere.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not a weight file beside it"):
        BertForNER.from_pretrained(model_folder)


def test_saved_files_follow_the_umask(model_folder: Path) -> None:
    umask = os.umask(0o027)
    try:
        BertForNER.from_pretrained(model_folder).save_pretrained(model_folder / "out")
    finally:
        os.umask(umask)
    for name in ("model.safetensors", "config.json"):
        assert stat.S_IMODE((model_folder / "out" / name).stat().st_mode) == 0o640


def test_a_failed_save_leaves_the_old_file(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BertForNER.from_pretrained(model_folder)
    before = (model_folder / "model.safetensors").read_bytes()

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_file", full_disk)
    with pytest.raises(StorageError, match="No space left") as caught:
        model.save_pretrained(model_folder)
    assert caught.value.exit_code == 74
    assert (model_folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in model_folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]


def test_files_of_tensors_are_those_of_safetensors() -> None:
    tensors = {
        "b": torch.randn(3, 5)[:, ::2],
        "ä": torch.arange(4),
        "a": torch.tensor(1.5),
        "none": torch.zeros(0, 7),
    }
    for metadata in (None, {"format": "pt"}):
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        ours = b"".join(bytes(chunk) for chunk in tensor_chunks(tensors, metadata))
        assert ours == to_bytes(whole, metadata)


def test_prelu_has_a_weight_of_its_own(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "prelu", hidden_act="prelu")
    assert "bert.encoder.layer.1.intermediate.intermediate_act_fn.weight" in state_of(folder)
    BertForNER.from_pretrained(folder)
