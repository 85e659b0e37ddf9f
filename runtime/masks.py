"""Which keys a query sees, which rows a cache keeps for that, and what is added to logits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["additive", "kept_rows", "open_keys", "score_mask", "visible_keys"]


def kept_rows(tokens: int, window: int) -> int:
    """How many rows a cache keeps of so many tokens: later tokens see no more than ``window - 1`` of them."""
    return torch.sym_min(tokens, window - 1) if window else tokens


def visible_keys(attention_mask: Tensor, new: int, window: int) -> Tensor:
    """Which of all keys each of the last ``new`` tokens sees, ``[B, new, T]`` bool.

    Earlier real tokens and itself (padding too, so that no row is empty); with a window, only keys fewer than
    ``window`` real tokens back.
    """
    total = attention_mask.shape[1]
    real = attention_mask != 0
    key = torch.arange(total, device=real.device)
    own = key[total - new :, None]
    seen = real[:, None, :] & (key <= own)
    if window:
        seen = seen & (_distances(attention_mask, new) < window)
    return seen | (key == own)


def open_keys(attention_mask: Tensor, new: int) -> Tensor:
    """Which keys each of ``new`` queries sees when attention is not causal, ``[B, new, T]`` bool: the real ones.

    Where none is real all are seen, so that no row is empty.
    """
    real = attention_mask != 0
    return (real | ~real.any(1, keepdim=True)).unsqueeze(1).expand(-1, new, -1)


def score_mask(attention_mask: Tensor, new: int, window: int, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to logits: ``[B, 1, new, T]`` bool (seen or not), or with slopes ``[B, H, new, T]`` numbers."""
    seen = visible_keys(attention_mask, new, window).unsqueeze(1)
    if slopes is None:
        return seen
    # Distances are exact in float32 and not in half precision.
    exact = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
    bias = -exact[:, None, None] * _distances(attention_mask, new).unsqueeze(1)
    return bias.masked_fill(~seen, -torch.inf).to(dtype)


def _distances(attention_mask: Tensor, new: int) -> Tensor:
    """How many real tokens each of all keys lies before each of the last ``new`` tokens, ``[B, new, T]``."""
    rank = (attention_mask != 0).long().cumsum(-1)
    return rank[:, rank.shape[1] - new :, None] - rank[:, None, :]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to logits."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
