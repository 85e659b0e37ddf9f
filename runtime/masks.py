"""Which keys a query sees, which rows a cache keeps for that, and what is added to logits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["additive", "kept_rows", "open_keys", "score_mask", "visible_keys"]


def kept_rows(tokens: int, window: int) -> int:
    """How many rows a cache keeps of so many tokens: later tokens see no more than ``window - 1`` of them."""
    return torch.sym_min(tokens, window - 1) if window else tokens


def visible_keys(
    attention_mask: Tensor, new: int, window: int, chunked: bool = False, rows: int | None = None
) -> Tensor:
    """Which of the last ``rows`` keys, all by default, each of the last ``new`` tokens sees, ``[B, new, rows]`` bool.

    Earlier real tokens and itself (padding too, so that no row is empty); with a window, only keys fewer than
    ``window`` real tokens back, or of its own chunk of ``window`` real tokens.
    """
    total = attention_mask.shape[1]
    rows = total if rows is None else rows
    real = attention_mask != 0
    place = torch.arange(total, device=real.device)
    key, own = place[total - rows :], place[total - new :, None]
    seen = real[:, None, total - rows :] & (key <= own)
    if window:
        distance, rank = _distances(attention_mask, new, rows)
        seen = seen & (distance < ((rank - 1) % window + 1 if chunked else window))
    return seen | (key == own)


def open_keys(attention_mask: Tensor, new: int) -> Tensor:
    """Which keys each of ``new`` queries sees when attention is not causal, ``[B, new, T]`` bool: the real ones.

    Where none is real all are seen, so that no row is empty.
    """
    real = attention_mask != 0
    return (real | ~real.any(1, keepdim=True)).unsqueeze(1).expand(-1, new, -1)


def score_mask(
    attention_mask: Tensor,
    new: int,
    window: int,
    slopes: Tensor | None,
    dtype: torch.dtype,
    chunked: bool = False,
    rows: int | None = None,
) -> Tensor:
    """What is added to logits of the last ``rows`` keys, all by default.

    ``[B, 1, new, rows]`` bool (seen or not), or with slopes ``[B, H, new, rows]`` numbers.
    """
    rows = attention_mask.shape[1] if rows is None else rows
    seen = visible_keys(attention_mask, new, window, chunked, rows).unsqueeze(1)
    if slopes is None:
        return seen
    # Distances are exact in float32 and not in half precision.
    exact = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
    bias = -exact[:, None, None] * _distances(attention_mask, new, rows)[0].unsqueeze(1)
    return bias.masked_fill(~seen, -torch.inf).to(dtype)


def _distances(attention_mask: Tensor, new: int, rows: int) -> tuple[Tensor, Tensor]:
    """How many real tokens keys lie before new tokens, and which of the real ones these are.

    ``[B, new, rows]`` of the last ``rows`` keys, and ``[B, new, 1]``, counted from 1.
    """
    rank = (attention_mask != 0).long().cumsum(-1)
    total = rank.shape[1]
    own = rank[:, total - new :, None]
    return own - rank[:, None, total - rows :], own


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to logits."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
