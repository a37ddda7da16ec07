"""Attention as functions: the readable reference (`eager`), PyTorch's own (`sdpa`), and packed.

Shape legend of the whole package: B batch, T padded length, P packed tokens, D hidden size,
N heads, H head size, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertner.packing import Block

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


def attention_packed(
    qkv: Tensor,
    num_heads: int,
    blocks: Sequence[Block],
    draw_keep: Callable[[tuple[int, ...]], Tensor] | None,
) -> Tensor:
    """Attention within the rows of a packed batch.

    Args:
        qkv: (P, 3 * D) query, key and value, one beside the other.
        num_heads: N.
        blocks: See `packing.plan_blocks`.
        draw_keep: Draws what attention weights of a shape are multiplied by: 0 where one is
            dropped, 1 / (1 - p) elsewhere. None to drop nothing.

    Returns:
        (P, D).
    """
    # Not in bfloat16 under autocast: a small share of the time, and the more exact.
    with torch.autocast(qkv.device.type, enabled=False):
        wide = qkv if qkv.dtype == torch.float64 else qkv.float()
        if draw_keep is None and not (torch.is_grad_enabled() and qkv.requires_grad):
            return _attend(wide, num_heads, blocks).to(qkv.dtype)
        keeps = None
        if draw_keep is not None:
            keeps = [draw_keep((b.batch * num_heads, b.length, b.length)) for b in blocks]
        context: Tensor = _PackedAttention.apply(wide, num_heads, blocks, keeps)  # type: ignore[no-untyped-call]
        return context.to(qkv.dtype)


def _attend(qkv: Tensor, num_heads: int, blocks: Sequence[Block]) -> Tensor:
    """Without dropout or gradients: PyTorch's flash kernel, which keeps no scores."""
    context = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
    for block in blocks:
        query, key, value = (
            part.view(block.batch, block.length, num_heads, -1).transpose(1, 2)
            for part in qkv[block.start : block.stop].chunk(3, dim=-1)
        )
        mask = None if block.mask is None else block.mask.to(qkv.dtype)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        into = context[block.start : block.stop]
        into.view(block.batch, block.length, num_heads, -1).copy_(found.transpose(1, 2))
    return context


class _PackedAttention(torch.autograd.Function):
    """Forward and backward written out: PyTorch has no fused CPU kernel with dropout.

    All heads of a block go in one product, and gradients straight to where they belong.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, blocks: Sequence[Block], keeps: list[Tensor] | None
    ) -> Tensor:
        context = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        weights = []
        for k, block in enumerate(blocks):
            query, key, value = _heads(qkv, block, num_heads, 3)  # (batch * N, length, H) each
            scores = _scores(query, key, block.mask)  # (batch * N, length, length)
            weights.append(F.softmax(scores, dim=-1))
            kept = weights[k] if keeps is None else weights[k] * keeps[k]
            _put_heads(context, block, [kept @ value])
        ctx.save_for_backward(qkv, *weights)
        ctx.rest = num_heads, blocks, keeps
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, *weights = ctx.saved_tensors
        num_heads, blocks, keeps = ctx.rest
        grad = torch.empty_like(qkv)
        for k, block in enumerate(blocks):
            query, key, value = _heads(qkv, block, num_heads, 3)
            (grad_out,) = _heads(grad_context, block, num_heads, 1)
            kept = weights[k] if keeps is None else weights[k] * keeps[k]
            grad_value = kept.transpose(1, 2) @ grad_out
            grad_weights = grad_out @ value.transpose(1, 2)
            if keeps is not None:
                grad_weights *= keeps[k]
            grad_scores = torch._softmax_backward_data(grad_weights, weights[k], -1, qkv.dtype)
            grad_scores *= query.shape[-1] ** -0.5
            grad_query = grad_scores @ key
            grad_key = grad_scores.transpose(1, 2) @ query
            _put_heads(grad, block, [grad_query, grad_key, grad_value])
        return grad, None, None, None


def _heads(packed: Tensor, block: Block, num_heads: int, parts: int) -> list[Tensor]:
    """The `parts` tensors side by side in (P, parts * D), each as (batch * N, length, H).

    Views where the block is one sequence; copies otherwise.
    """
    view = packed[block.start : block.stop].view(block.batch, block.length, parts, num_heads, -1)
    by_head = view.permute(2, 0, 3, 1, 4)  # (parts, batch, N, length, H)
    return list(by_head.reshape(parts, block.batch * num_heads, block.length, -1))


def _put_heads(packed: Tensor, block: Block, parts: list[Tensor]) -> None:
    """The reverse of `_heads`."""
    batch, length = block.batch, block.length
    view = packed[block.start : block.stop].view(batch, length, len(parts), -1, parts[0].shape[-1])
    for k, part in enumerate(parts):
        view[:, :, k].copy_(part.view(batch, -1, length, part.shape[-1]).transpose(1, 2))


def _scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot products, with the mask added in the same call."""
    scale = query.shape[-1] ** -0.5
    if mask is None:
        return torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=scale)
    return torch.baddbmm(mask.to(query.dtype), query, key.transpose(1, 2), alpha=scale)
