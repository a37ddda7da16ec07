"""Attention as functions: the readable reference (`eager`) and PyTorch's own (`sdpa`).

Shape legend of the whole package: B batch, T padded length, D hidden size, N heads, H head size,
C labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (query, key, value, mask, dropout probability) -> context; see attention_eager for shapes.
Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]


def attention_mask_for(
    implementation: str, attention_mask: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Makes the mask that an attention function takes out of the one that users give.

    Args:
        implementation: "eager" or "sdpa".
        attention_mask: (B, T), non-zero where there is a token; None where all are.
        dtype: Of the hidden states.

    Returns:
        (B, 1, T, T) for "sdpa", True where a query may look; (B, 1, 1, T) for "eager", to be added
        to the scores; None for no mask.
    """
    if attention_mask is None:
        return None
    visible = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
    if implementation == "sdpa":
        return visible.expand(-1, -1, attention_mask.shape[1], -1)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )


def attention_eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Scaled dot-product attention, step by step (Vaswani et al., 2017, section 3.2).

    Args:
        query: (B, N, T, H).
        key: (B, N, T, H).
        value: (B, N, T, H).
        mask: Added to the scores, broadcast to (B, N, T, T); None for none.
        dropout: Probability with which an attention weight is dropped; 0 outside training.

    Returns:
        (B, N, T, H).
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, N, T, T)
    if mask is not None:
        scores = scores + mask
    weights = F.dropout(F.softmax(scores, dim=-1), p=dropout, training=dropout > 0.0)
    return weights @ value


def attention_sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """The same by PyTorch's fused kernels; `mask` is boolean, True where a query may look."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


ATTENTION: dict[str, Attention] = {"eager": attention_eager, "sdpa": attention_sdpa}
