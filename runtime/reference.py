"""The maths in float64, as plainly as possible: the oracle every kernel, operator and lowering is tested against.

``B`` batch, ``S`` new tokens, ``P`` past tokens, ``T = P + S``, ``H`` query heads, ``n`` key/value heads or rope
groups, ``m`` key scales, ``w`` value scales, ``R = rank + n * rope_dim + m + w`` numbers in a cache row
``[latent | rope keys | key scales | value scales]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["attention", "cached_attention", "latent_attention", "visible_keys"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: Sequence[tuple[int, int]],
    inv_freq: Sequence[float],
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    chunked: bool = False,
) -> Tensor:
    """Grouped-query attention with rotary pairs from position 0 (Vaswani 2017 eq. 1, Su 2021 eq. 34).

    Args:
        query: ``[B, S, H, D]``, not rotated.
        key: ``[B, T, n, D]``, not rotated; ``T = S`` in causal attention.
        value: ``[B, T, n', Dv]``; ``n'`` may be another divisor of ``H`` than ``n``.
        pairs: Channel pairs ``(real, imaginary)``.
        inv_freq: Radians per position of every pair.
        scale: Factor of ``q . k``.
        window: Keys a query sees, itself included; None for all before it.
        sinks: ``[H]``, or None; these three as in :func:`mla_compile.runtime.ops.latent_attention`.
        slopes: ``[H]``, or None.
        softcap: Bound of the logits, or 0.
        causal: Whether a query sees no key behind its own; otherwise it sees all.
        chunked: Whether the window does not slide, see :class:`~mla_compile.site.Mask`.

    Returns:
        ``[B, S, H, Dv]`` in float64.
    """
    query, key, value = (x.double() for x in (query, key, value))
    length, group = max(query.shape[1], key.shape[1]), query.shape[2] // key.shape[2]
    angle = torch.outer(torch.arange(length, dtype=torch.float64), torch.tensor(inv_freq, dtype=torch.float64))
    turned = []
    for x in (query, key.repeat_interleave(group, 2)):
        y = x.clone()
        for i, (a, b) in enumerate(pairs):
            turn = angle[None, : x.shape[1], None, i]
            cos, sin = turn.cos(), turn.sin()
            y[..., a], y[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
        turned.append(y)
    value = value.repeat_interleave(query.shape[2] // value.shape[2], 2)
    mask = torch.ones(key.shape[:2], dtype=torch.long)
    return _attend(turned[0], turned[1], value, mask, scale, window, sinks, slopes, softcap, causal, chunked)


def visible_keys(attention_mask: Tensor, new: int, window: int | None, chunked: bool = False) -> Tensor:
    """Which of ``T`` keys each of the last ``new`` tokens sees.

    A token sees itself and the real tokens before it; with a window, those fewer than ``window`` real tokens back, or
    those of its own chunk of ``window`` real tokens. A padding token sees itself, so that no row is empty.

    Args:
        attention_mask: ``[B, T]``, non-zero for real tokens.
        new: How many of the last tokens are queries.
        window: Window size in tokens, or None.
        chunked: Whether there are chunks of this size.

    Returns:
        Bool ``[B, new, T]``.
    """
    total = attention_mask.shape[1]
    real = attention_mask != 0
    place = torch.arange(total)
    rank = real.long().cumsum(-1)
    seen = real[:, None, :] & (place[None, None, :] <= place[None, total - new :, None])
    if window is not None and chunked:
        chunk = torch.div(rank - 1, window, rounding_mode="floor")
        seen = seen & (chunk[:, total - new :, None] == chunk[:, None, :])
    elif window is not None:
        seen = seen & (rank[:, total - new :, None] - rank[:, None, :] < window)
    return seen | (place[None, None, :] == place[None, total - new :, None])


def _open_keys(attention_mask: Tensor, new: int) -> Tensor:
    """Which of ``T`` keys each of ``new`` queries sees regardless of place: the real ones, or all if none is real."""
    real = attention_mask != 0
    real = real | ~real.any(1, keepdim=True)
    return real[:, None].expand(-1, new, -1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    softcap: float,
    causal: bool = True,
    chunked: bool = False,
) -> Tensor:
    """Attention of ``[B, S, H, D]`` queries to ``[B, T, H, D]`` keys and ``[B, T, H, Dv]`` values."""
    (new, heads), keys = query.shape[1:3], key.shape[1]
    logits = torch.einsum("bshd,bthd->bhst", query, key) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if slopes is not None:
        rank = (attention_mask != 0).long().cumsum(-1)
        distance = rank[:, -new:, None] - rank[:, None, -keys:]
        logits = logits - slopes.double()[:, None, None] * distance[:, None]
    seen = visible_keys(attention_mask, new, window, chunked) if causal else _open_keys(attention_mask, new)
    seen = seen[..., -keys:]
    logits = logits.masked_fill(~seen[:, None], -math.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(len(logits), heads, new, 1)], -1)
    weights = logits.softmax(-1)[..., :keys]
    return torch.einsum("bhst,bthd->bshd", weights, value)


def latent_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float = 0.0,
    value_scales: int = 0,
    causal: bool = True,
    scaled_rope: bool = False,
    chunked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Multi-head latent attention with explicit keys and values (MHA2MLA eq. 8-11; DeepSeek-V2 eq. 9-19).

    Arguments and results are those of :func:`mla_compile.runtime.ops.latent_attention`, in float64.
    """
    query, row, past, cos, sin, key_up, value_up = (x.double() for x in (query, row, past, cos, sin, key_up, value_up))
    heads, groups, half = query.shape[2], cos.shape[2], cos.shape[3]
    rank, nope = key_up.shape[2], key_up.shape[1]

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        real, imaginary = x[..., :half], x[..., half:]
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)

    widths = [rank, groups * 2 * half, row.shape[-1] - rank - groups * 2 * half]
    latent, rope_keys, scales = row.split(widths, -1)
    rope_keys = rotate(rope_keys.unflatten(-1, (groups, 2 * half)), cos, sin).flatten(-2)
    rows = torch.cat([past, torch.cat([latent, rope_keys, scales], -1)], 1)
    latent, rope_keys, scales = rows.split(widths, -1)
    rope_keys = rope_keys.unflatten(-1, (groups, 2 * half)).repeat_interleave(heads // groups, 2)
    keys = torch.einsum("btr,gdr->btgd", latent, key_up).repeat_interleave(heads // key_up.shape[0], 2)
    of_keys, of_values = scales.split([widths[2] - value_scales, value_scales], -1)
    if widths[2] > value_scales:
        of_keys = of_keys.repeat_interleave(heads // of_keys.shape[-1], 2)[..., None]
        keys, rope_keys = keys * of_keys, rope_keys * of_keys if scaled_rope else rope_keys
    keys = torch.cat([keys, rope_keys], -1)
    values = torch.einsum("btr,grd->btgd", latent, value_up).repeat_interleave(heads // value_up.shape[0], 2)
    if value_scales:
        values = values * of_values.repeat_interleave(heads // value_scales, 2)[..., None]
    per_head = [x.repeat_interleave(heads // groups, 2) for x in (cos, sin)]
    queries = torch.cat([query[..., :nope], rotate(query[..., nope:], *per_head)], -1)
    settings = (attention_mask, scale, window, sinks, slopes, softcap, causal, chunked)
    return _attend(queries, keys, values, *settings), _kept(rows, window)


def cached_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    kv_heads: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    softcap: float = 0.0,
    chunked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention with a cache (Ainslie et al. 2023).

    Arguments and results are those of :func:`mla_compile.runtime.ops.cached_attention`, in float64.
    """
    rows = torch.cat([past.double(), row.double()], 1)
    group, width = query.shape[2] // kv_heads, kv_heads * query.shape[3]
    parts = rows[..., :width], rows[..., width:]
    key, value = (x.unflatten(-1, (kv_heads, -1)).repeat_interleave(group, 2) for x in parts)
    settings = (attention_mask, scale, window, sinks, slopes, softcap, True, chunked)
    return _attend(query.double(), key, value, *settings), _kept(rows, window)


def _kept(rows: Tensor, window: int | None) -> Tensor:
    """What later tokens can see of ``[B, T, R]``: all, or the last ``window - 1``."""
    return rows if window is None else rows[:, max(rows.shape[1] - window + 1, 0) :]
