"""BERT with a token-classification head, written out.

The module tree spells the state-dict keys of `transformers`, so that weights go back and forth with
no converter. The computation follows Devlin et al. (2019) as the original code has it: embeddings
add word and token type, then position; LayerNorm comes after each residual; GELU is exact.

Rows come in one of two layouts. Padded, (B, T), they go through PyTorch's own modules, number for
number as in `transformers`: the reference. Packed, (P,) with `cu_seqlens`, there are real tokens
only, and the layers take the shorter ways of `kernels` and `attention`: the hot path. What the
layers are given as `layout` tells which it is: the attention's mask, or a `Packing`.

Shape legend: B batch, T padded length, P packed tokens, D hidden size, N heads, H head size,
C labels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertner import kernels
from bertner.attention import (
    ATTENTION,
    attention_jagged,
    attention_mask_for,
    attention_packed,
)
from bertner.config import BertConfig
from bertner.errors import ModelError, UsageError, visible
from bertner.files import read_json
from bertner.hub import find_model
from bertner.labels import IGNORE_INDEX, LabelSet
from bertner.packing import JaggedPacking, Packing
from bertner.weights import Weights, check_weights, save_model

logger = logging.getLogger("bertner")

PackedLayout = Packing | JaggedPacking


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


# Every name of config.ACTIVATIONS; prelu alone has a weight of its own and is a module.
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10.0, 10.0),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "gelu_new": _gelu_tanh,
    "gelu_python": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}


class BertEmbeddings(nn.Module):
    """Word, token-type and position embeddings, added and normed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """(B, T) ids to (B, T, D); no `token_type_ids` means all zero."""
        length = input_ids.shape[1]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = torch.arange(length, device=input_ids.device)[None]  # (1, T)
        hidden_states = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        hidden_states = hidden_states + self.position_embeddings(positions)
        return cast(Tensor, self.dropout(self.LayerNorm(hidden_states)))

    def packed(
        self, input_ids: Tensor, token_type_ids: Tensor | None, packing: PackedLayout
    ) -> Tensor:
        """The same for packed tokens: (P,) ids to (P, D)."""
        if token_type_ids is None:
            token_type = self.token_type_embeddings.weight[0]  # (D,)
        else:
            token_type = self.token_type_embeddings(token_type_ids)
        hidden_states = kernels.embedding(input_ids, self.word_embeddings) + token_type
        position = kernels.embedding(packing.position_ids, self.position_embeddings)
        hidden_states = self.LayerNorm(hidden_states + position)
        return packing.dropout(hidden_states, self.dropout.p)


class BertSelfAttention(nn.Module):
    """Multi-head self-attention, without its output projection."""

    def __init__(self, config: BertConfig, attention: str) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.attention = ATTENTION[attention]
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, layout: Tensor | PackedLayout | None) -> Tensor:
        """(B, T, D) to (B, T, D), or (P, D) to (P, D)."""
        if isinstance(layout, PackedLayout):
            return self.packed(hidden_states, layout)
        batch, length, _ = hidden_states.shape

        def split_heads(x: Tensor) -> Tensor:
            return x.view(batch, length, self.num_attention_heads, -1).transpose(1, 2)

        query = split_heads(self.query(hidden_states))  # (B, N, T, H)
        key = split_heads(self.key(hidden_states))  # (B, N, T, H)
        value = split_heads(self.value(hidden_states))  # (B, N, T, H)
        dropout = self.dropout_prob if self.training else 0.0
        context = self.attention(query, key, value, layout, dropout)  # (B, N, T, H)
        return context.transpose(1, 2).reshape(batch, length, -1)

    def packed(self, hidden_states: Tensor, packing: PackedLayout) -> Tensor:
        """(P, D) to (P, D)."""
        qkv = kernels.linear(hidden_states, self.query, self.key, self.value)  # (P, 3 * D)
        if isinstance(packing, JaggedPacking):
            dropout = self.dropout_prob if packing.training else 0.0
            borders, length = packing.cu_seqlens, packing.max_length
            return attention_jagged(qkv, borders, length, self.num_attention_heads, dropout)
        draw_keep = None
        if packing.dropout_masks is not None and self.dropout_prob > 0.0:
            draw_keep = partial(packing.dropout_masks.draw, p=self.dropout_prob)
        return attention_packed(qkv, packing.places(self.num_attention_heads), draw_keep)


class BertResidual(nn.Module):
    """The end of each sublayer: project, drop, add what came in, norm."""

    def __init__(self, in_size: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, sublayer_output: Tensor, sublayer_input: Tensor, layout: Tensor | PackedLayout | None
    ) -> Tensor:
        """(B, T, in_size) and (B, T, D) to (B, T, D), or the same packed."""
        if isinstance(layout, PackedLayout):
            projected = layout.dropout(kernels.linear(sublayer_output, self.dense), self.dropout.p)
            # In place, unless autocast has rounded one of them alone.
            same = projected.dtype == sublayer_input.dtype
            total = projected.add_(sublayer_input) if same else projected + sublayer_input
            return kernels.recomputed(self.LayerNorm, total)
        projected = self.dropout(self.dense(sublayer_output))
        return cast(Tensor, self.LayerNorm(projected + sublayer_input))


class BertAttention(nn.Module):
    """The attention sublayer."""

    def __init__(self, config: BertConfig, attention: str) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, attention)
        self.output = BertResidual(config.hidden_size, config)

    def forward(self, hidden_states: Tensor, layout: Tensor | PackedLayout | None) -> Tensor:
        """(B, T, D) to (B, T, D), or the same packed."""
        return cast(Tensor, self.output(self.self(hidden_states, layout), hidden_states, layout))


class BertIntermediate(nn.Module):
    """The wide half of the feed-forward sublayer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = (
            nn.PReLU() if config.hidden_act == "prelu" else ACTIVATION_FUNCTIONS[config.hidden_act]
        )

    def forward(self, hidden_states: Tensor, layout: Tensor | PackedLayout | None) -> Tensor:
        """(B, T, D) to (B, T, intermediate_size), or the same packed."""
        if isinstance(layout, PackedLayout):
            wide = kernels.linear(hidden_states, self.dense)
            return kernels.recomputed(self.intermediate_act_fn, wide)
        return cast(Tensor, self.intermediate_act_fn(self.dense(hidden_states)))


class BertLayer(nn.Module):
    """Attention, then feed-forward, each with its residual and norm."""

    def __init__(self, config: BertConfig, attention: str) -> None:
        super().__init__()
        self.attention = BertAttention(config, attention)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidual(config.intermediate_size, config)

    def forward(self, hidden_states: Tensor, layout: Tensor | PackedLayout | None) -> Tensor:
        """(B, T, D) to (B, T, D), or the same packed."""
        attended = self.attention(hidden_states, layout)
        return cast(Tensor, self.output(self.intermediate(attended, layout), attended, layout))


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig, attention: str) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            BertLayer(config, attention) for _ in range(config.num_hidden_layers)
        )

    def forward(self, hidden_states: Tensor, layout: Tensor | PackedLayout | None) -> Tensor:
        """(B, T, D) to (B, T, D), or the same packed."""
        for layer in self.layer:
            hidden_states = layer(hidden_states, layout)
        return hidden_states


class BertModel(nn.Module):
    """Embeddings and encoder; no pooler, which token classification does not use."""

    def __init__(self, config: BertConfig, attention: str) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config, attention)
        self.attention_implementation = attention
        self.max_position_embeddings = config.max_position_embeddings

    def forward(
        self, input_ids: Tensor, layout: Tensor | PackedLayout | None, token_type_ids: Tensor | None
    ) -> Tensor:
        """(B, T) ids and their attention mask to (B, T, D), or (P,) and their packing to (P, D)."""
        length = layout.max_length if isinstance(layout, PackedLayout) else input_ids.shape[1]
        if length > self.max_position_embeddings:
            raise ValueError(
                f"{length} tokens in a row, but the model has "
                f"{self.max_position_embeddings} positions; cut the text into shorter rows"
            )
        if isinstance(layout, PackedLayout):
            hidden_states = self.embeddings.packed(input_ids, token_type_ids, layout)
        else:
            hidden_states = self.embeddings(input_ids, token_type_ids)
            layout = attention_mask_for(self.attention_implementation, layout, hidden_states.dtype)
        return cast(Tensor, self.encoder(hidden_states, layout))


@dataclass(frozen=True)
class TokenClassifierOutput:
    """What `BertForNER` returns.

    Attributes:
        logits: (B, T, C) scores of each label; (P, C) of packed tokens.
        loss: Scalar, mean over the labels that are not -100; None if no labels were given.
    """

    logits: Tensor
    loss: Tensor | None = None


def token_loss(
    logits: Tensor,
    labels: Tensor,
    reduction: str,
    label_smoothing: float = 0.0,
    label_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the labelled tokens, in float32.

    Args:
        logits: (B, T, C), or (P, C).
        labels: (B, T), or (P,); IGNORE_INDEX where a token has none.
        reduction: "mean" or "sum" over the labelled tokens, for a scalar; "none" for a loss for
            each token, zero where there is no label.
        label_smoothing: Share of each target that is spread evenly over all labels (Szegedy et al.,
            2016).
        label_weights: (C,) what the loss of a token with that label is multiplied by; "mean" then
            divides by the sum of these factors.
    """
    # Flattened: the 2-d kernel of the loss has no deterministic form on CUDA.
    loss = F.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none" if label_weights is not None else reduction,
        label_smoothing=label_smoothing,
    )
    if label_weights is not None:
        # Not by cross_entropy's own weights: with smoothing these also weigh the labels that a
        # target is spread over, which draws every token towards the rare ones.
        labelled = labels.flatten() != IGNORE_INDEX
        weights = label_weights[labels.flatten().clamp(min=0)] * labelled
        loss = loss * weights
        if reduction != "none":
            loss = loss.sum() / (weights.sum() if reduction == "mean" else 1)
    return loss.view_as(labels) if reduction == "none" else loss


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Arithmetic in `dtype`; weights and optimizer state stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


class BertForNER(nn.Module):
    """BERT that gives each token a label.

    Args:
        config: Shape and labels.
        attn_implementation: "sdpa" (PyTorch's fused attention) or "eager" (written out), for padded
            rows.
    """

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        if attn_implementation not in ATTENTION:
            raise UsageError(
                f"attn_implementation must be one of {' '.join(ATTENTION)}, "
                f"not {attn_implementation!r}"
            )
        self.config = config
        self.bert = BertModel(config, attn_implementation)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights, zero biases, zero for the padding's embedding (Devlin et al., 2019)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        dropout_seeds: Sequence[int] | None = None,
    ) -> TokenClassifierOutput:
        """Scores every token of rows that are padded, (B, T), or packed one after another, (P,).

        Args:
            input_ids: (B, T) or (P,) integer ids.
            attention_mask: (B, T), non-zero for tokens, zero for padding; None for no padding.
            token_type_ids: (B, T) or (P,), None for all zero.
            labels: (B, T) or (P,) label ids, -100 where a token has none.
            cu_seqlens: (B + 1,) for packed rows: where each begins, and the number of tokens.
            max_seqlen: For packed rows on a CUDA device: no row has more tokens. None to ask the
                device, which takes time.
            dropout_seeds: (B,) for packed rows on a CPU, in training: what a row drops then does
                not depend on the rows beside it.
        """
        if cu_seqlens is None:
            hidden_states = self.dropout(self.bert(input_ids, attention_mask, token_type_ids))
        else:
            if attention_mask is not None:
                raise ValueError("packed rows have no padding: attention_mask must be None")
            packing = self._packing(len(input_ids), cu_seqlens, max_seqlen, dropout_seeds)
            hidden_states = self.bert(input_ids, packing, token_type_ids)
            hidden_states = packing.dropout(hidden_states, self.dropout.p)
        logits = self.classifier(hidden_states)  # (B, T, C) or (P, C)
        loss = None if labels is None else token_loss(logits, labels, "mean")
        return TokenClassifierOutput(logits, loss)

    def _packing(
        self,
        num_tokens: int,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        dropout_seeds: Sequence[int] | None,
    ) -> PackedLayout:
        """What the layers need to know of packed rows, where they are."""
        if not kernels.is_queued(cu_seqlens.device):
            return Packing(cu_seqlens, self.training, dropout_seeds)
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        return JaggedPacking(cu_seqlens, num_tokens, max_seqlen, self.training)

    @property
    def label_set(self) -> LabelSet:
        """The labels as tags.

        Raises:
            ModelError: They are no tags, so this is not a trained model for named entities.
        """
        label_set = LabelSet(tuple(self.config.label_names))
        try:
            _ = label_set.types, label_set.outside
        except (ValueError, KeyError):
            raise ModelError(
                f"the model's labels ({', '.join(label_set.names[:4])}, ...) are not O and B-/I- "
                "tags: it is not a trained model for named entities; train one with bertner-train"
            ) from None
        for name in label_set.names:
            if visible(name) != name:
                raise ModelError(f"the model's label {name!r} has characters that steer a terminal")
        return label_set

    def stack_projections(self) -> None:
        """Lays query, key and value side by side in memory, for `kernels.linear`; same values."""
        for module in self.modules():
            if isinstance(module, BertSelfAttention):
                kernels.stack([module.query, module.key, module.value])

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.classifier.weight.device

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        *,
        id2label: Mapping[int, str] | None = None,
        num_labels: int | None = None,
        attn_implementation: str = "sdpa",
        revision: str | None = None,
    ) -> BertForNER:
        """Loads a BERT checkpoint; only the head may be new.

        The head is taken from the checkpoint where that is a token classifier with the same labels;
        otherwise it is drawn from the global random generator (seed it first).

        Args:
            model_name_or_path: A folder, `package:NAME/FOLDER`, or a Hub id.
            id2label: Names of the labels; None for the checkpoint's own.
            num_labels: Number of labels, in place of their names.
            attn_implementation: "sdpa" or "eager", for padded rows.
            revision: Branch, tag or commit on the Hub.

        Returns:
            The model in evaluation mode, in float32 on the CPU.

        Raises:
            ModelError: The files are missing, damaged, unsafe, or not those of a BERT encoder.
            StorageError: The Hub cannot be reached.
        """
        folder = find_model(model_name_or_path, revision).folder
        values = read_json(folder / "config.json")
        saved = BertConfig.from_dict(values, folder / "config.json")
        config = _with_labels(saved, id2label, num_labels)

        with torch.device("meta"):
            model = cls(config, attn_implementation)
        weights = Weights(folder)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        new, other_head = check_weights(weights.shapes, wanted, folder)
        # A head counts as the same only if its labels are: same names, or none were ever given.
        if not new and not _same_head(values, saved, config):
            new = ["classifier.weight", "classifier.bias"]
        state: dict[str, Tensor] = {name: weights[name] for name in wanted if name not in new}
        if new:
            logger.info("new head for %d labels: %s", config.num_labels, ", ".join(new))
            state["classifier.weight"] = torch.empty(wanted["classifier.weight"]).normal_(
                std=config.initializer_range
            )
            state["classifier.bias"] = torch.zeros(wanted["classifier.bias"])
        if other_head:
            logger.info("not used from %s: %s", folder, ", ".join(other_head))
        model.load_state_dict(state, strict=True, assign=True)
        model.stack_projections()
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, which `transformers` opens.

        The tokenizer's files are written by `Tokenizer.save`.
        """
        save_model(Path(directory), self.config, self.state_dict())


def _with_labels(
    saved: BertConfig, id2label: Mapping[int, str] | None, num_labels: int | None
) -> BertConfig:
    if id2label is not None:
        if num_labels is not None and num_labels != len(id2label):
            raise UsageError(f"num_labels is {num_labels}, but id2label names {len(id2label)}")
        return replace(saved, id2label=dict(id2label))
    if num_labels is not None and num_labels != saved.num_labels:
        return replace(saved, id2label={label: f"LABEL_{label}" for label in range(num_labels)})
    return saved


def _same_head(values: Mapping[str, Any], saved: BertConfig, wanted: BertConfig) -> bool:
    architectures = values.get("architectures") or ["BertForTokenClassification"]
    if architectures != ["BertForTokenClassification"]:
        return False
    generic = [f"LABEL_{label}" for label in range(saved.num_labels)]
    return saved.label_names in (wanted.label_names, generic)
