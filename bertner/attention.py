"""Attention as functions: the readable reference (`eager`), PyTorch's own (`sdpa`), and packed.

Shape legend of the whole package: B batch, T padded length, P packed tokens, D hidden size,
N heads, H head size, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from bertner.packing import Block, HeadPlaces

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
    qkv: Tensor, places: HeadPlaces, draw_keep: Callable[[tuple[int, ...]], Tensor] | None
) -> Tensor:
    """Attention within the rows of a packed batch.

    Args:
        qkv: (P, 3 * D) query, key and value, one beside the other.
        places: Of this batch and the model's number of heads; see `packing.Packing.places`.
        draw_keep: Draws what attention weights of a shape are multiplied by: 0 where one is
            dropped, 1 / (1 - p) elsewhere. None to drop nothing.

    Returns:
        (P, D).
    """
    # Not in bfloat16 under autocast: a small share of the time, and the more exact.
    with torch.autocast(qkv.device.type, enabled=False):
        wide = qkv if qkv.dtype == torch.float64 else qkv.float()
        if draw_keep is None and not (torch.is_grad_enabled() and qkv.requires_grad):
            return _attend(wide, places).to(qkv.dtype)
        keep = None if draw_keep is None else draw_keep((places.num_scores,))
        context: Tensor = _PackedAttention.apply(wide, places, keep)  # type: ignore[no-untyped-call]
        return context.to(qkv.dtype)


def attention_jagged(
    qkv: Tensor, cu_seqlens: Tensor, max_length: int, num_heads: int, dropout: float
) -> Tensor:
    """Attention within the rows of a packed batch, by PyTorch's fused kernels for rows of any size.

    Args:
        qkv: (P, 3 * D) query, key and value, one beside the other.
        cu_seqlens: (B + 1,) where each row begins, and the number of tokens.
        max_length: No row has more tokens.
        num_heads: N.
        dropout: Probability with which an attention weight is dropped; 0 outside training.

    Returns:
        (P, D).
    """
    parts = qkv.view(len(qkv), 3, num_heads, -1)
    head_size = parts.shape[-1]
    scale = None  # as ever
    if head_size % 8:
        # The kernels take heads of a multiple of eight; zeros change neither scores nor values.
        parts, scale = F.pad(parts, (0, -head_size % 8)), head_size**-0.5
    query, key, value = parts.unbind(1)  # (P, N, H)
    if not torch.is_grad_enabled() and dropout == 0.0 and _has_varlen(qkv):
        from torch.nn.attention.varlen import varlen_attn  # takes a second, so where it is needed

        borders = cu_seqlens.to(torch.int32)
        flat = varlen_attn(query, key, value, borders, borders, max_length, max_length, scale=scale)
        return cast(Tensor, flat)[..., :head_size].flatten(1)

    def jagged(part: Tensor) -> Tensor:
        if part.device.type == "cpu":  # where it is computed row by row
            part = part.contiguous()
        # No row is empty; what it is told here it need not ask the device for.
        rows = nested_tensor_from_jagged(part, cu_seqlens, min_seqlen=1, max_seqlen=max_length)
        return rows.transpose(1, 2)  # (B, N, length, H)

    context = F.scaled_dot_product_attention(
        jagged(query), jagged(key), jagged(value), dropout_p=dropout, scale=scale
    )
    return context.transpose(1, 2).values()[..., :head_size].flatten(1)


def _has_varlen(qkv: Tensor) -> bool:
    """Whether there is a flash kernel for packed rows, which knows no dropout."""
    return (
        qkv.device.type == "cuda"
        and qkv.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(qkv.device) >= (8, 0)
    )


# Without dropout or gradients PyTorch's flash kernel, which keeps no scores, is the faster one for
# rows longer than this; with the shorter ones of most text the products are, by a fifth to a third.
LONGEST_WITH_SCORES = 64


def _attend(qkv: Tensor, places: HeadPlaces) -> Tensor:
    """Without dropout or gradients."""
    by_head = _by_head(qkv, places)
    context = torch.empty_like(by_head[0])
    for block, mask in zip(places.blocks, places.masks, strict=True):
        query, key, value = _of(block, by_head, places)  # (num_rows * N, length, H) each
        (into,) = _of(block, context[None], places)
        if block.length <= LONGEST_WITH_SCORES:
            scores = _scores(query, key, mask)
            torch.bmm(torch.softmax(scores, dim=-1, out=scores), value, out=into)
        else:
            query, key, value, into = (
                part.view(block.num_rows, places.num_heads, block.length, -1)
                for part in (query, key, value, into)
            )
            if mask is not None:
                mask = mask.to(qkv.dtype).view(block.num_rows, -1, 1, block.length)
            into.copy_(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    return _by_token(context, places.to_context, qkv)


class _PackedAttention(torch.autograd.Function):
    """Forward and backward written out: PyTorch has no fused CPU kernel with dropout.

    All heads of a block go in one product, and all blocks share the way there and back.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, places: HeadPlaces, keep: Tensor | None) -> Tensor:
        by_head = _by_head(qkv, places)
        context = torch.empty_like(by_head[0])
        keeps = _split_scores(keep, places)
        weights = []
        for k, block in enumerate(places.blocks):
            query, key, value = _of(block, by_head, places)
            scores = _scores(query, key, places.masks[k])  # (num_rows * N, length, length)
            weights.append(F.softmax(scores, dim=-1))
            kept = weights[k] if keep is None else weights[k] * keeps[k]
            torch.bmm(kept, value, out=_of(block, context[None], places)[0])
        ctx.save_for_backward(by_head, *weights)
        ctx.places, ctx.keep = places, keep
        return _by_token(context, places.to_context, qkv)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor, None, None]:
        by_head, *weights = ctx.saved_tensors
        places, keep = ctx.places, ctx.keep
        head_size = by_head.shape[-1]
        grad_out = grad_context.reshape(-1, head_size).index_select(0, places.from_context)
        grad_out.index_fill_(0, places.empty, 0.0)  # what an empty place looked up counts nothing
        grad = torch.empty_like(by_head)
        keeps = _split_scores(keep, places)
        scale = head_size**-0.5
        for k, block in enumerate(places.blocks):
            query, key, value = _of(block, by_head, places)
            grad_query, grad_key, grad_value = _of(block, grad, places)
            (grad_block,) = _of(block, grad_out[None], places)
            kept = weights[k] if keep is None else weights[k] * keeps[k]
            torch.bmm(kept.transpose(1, 2), grad_block, out=grad_value)
            grad_weights = grad_block @ value.transpose(1, 2)
            if keep is not None:
                grad_weights *= keeps[k]
            grad_scores = torch._softmax_backward_data(grad_weights, weights[k], -1, grad.dtype)
            torch.baddbmm(grad_query, grad_scores, key, beta=0, alpha=scale, out=grad_query)
            grad_scores = grad_scores.transpose(1, 2)
            torch.baddbmm(grad_key, grad_scores, query, beta=0, alpha=scale, out=grad_key)
        return _by_token(grad.flatten(0, 1), places.to_qkv, grad_context), None, None


def _by_head(qkv: Tensor, places: HeadPlaces) -> Tensor:
    """(P, 3 * D) token by token to (3, N * G, H) head by head."""
    head_size = qkv.shape[1] // (3 * places.num_heads)
    rows = qkv.reshape(-1, head_size).index_select(0, places.from_qkv)
    return rows.view(3, -1, head_size)


def _by_token(rows: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The reverse: vectors of size H to one row for each token of `like`."""
    return rows.index_select(0, index).view(len(like), -1)


def _of(block: Block, by_head: Tensor, places: HeadPlaces) -> tuple[Tensor, ...]:
    """The part of a block in (k, N * G, H), as k tensors (num_rows * N, length, H)."""
    heads = places.num_heads
    part = by_head[:, block.start * heads : block.stop * heads]
    return part.view(len(by_head), -1, block.length, by_head.shape[-1]).unbind(0)


def _split_scores(keep: Tensor | None, places: HeadPlaces) -> list[Tensor]:
    """What the attention weights of each block are multiplied by."""
    if keep is None:
        return []
    shapes = [(b.num_rows * places.num_heads, b.length, b.length) for b in places.blocks]
    parts = torch.split(keep, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot products, with the mask added in the same call."""
    scale = query.shape[-1] ** -0.5
    if mask is None:
        return torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=scale)
    return torch.baddbmm(mask.to(query.dtype), query, key.transpose(1, 2), alpha=scale)
