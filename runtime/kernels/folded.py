"""Absorbed attention to a latent cache in plain torch: for CPUs, and for gradients anywhere."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_compile.runtime.kernels.cache import LatentCache
from mla_compile.runtime.kernels.codes import encode

__all__ = ["append", "attend", "attend_explicitly"]


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: LatentCache,
    lengths: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    chunked: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Attend the fast way, for whose sake lengths are read: they must lie in host memory.

    Arguments and results are those of :func:`mla_compile.runtime.kernels.op.latent_attention`.

    Raises:
        ValueError: A sequence has more rows than the cache has room for.
    """
    layout = cache.layout
    scaled = layout.key_scales or layout.value_scales or softcap or sinks is not None or slopes is not None
    tokens = _most(lengths, cache)
    if scaled or return_lse or not tokens:
        settings = scale, window, softcap, causal, chunked, return_lse
        return attend_explicitly(q_latent, q_rope, cache, lengths, sinks, slopes, *settings, tokens=tokens)
    latent, rest = cache.parts(q_latent.dtype, tokens)
    there, seen, _ = _visible(lengths, q_latent.shape[1], tokens, window, causal, chunked)
    if not bool(there.all()):
        latent, rest = latent.where(there[..., None], 0), rest.where(there[..., None], 0)
    context = _fused(
        q_latent, q_rope, _joined(latent, rest), None if bool(seen.all()) else seen, layout.rope_groups, scale
    )
    return context, context.new_empty(0, dtype=torch.float32)


def attend_explicitly(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: LatentCache,
    lengths: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    chunked: bool,
    return_lse: bool,
    *,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Product, softmax in float32 or wider, product: for all that a fused kernel does not take, and for gradients.

    No shape depends on a value, so this can be traced.

    Arguments and results are those of :func:`mla_compile.runtime.kernels.op.latent_attention`; ``tokens`` is how many
    rows of each sequence are looked at, all by default.
    """
    layout, (new, heads) = cache.layout, q_latent.shape[1:3]
    tokens = cache.capacity if tokens is None else tokens
    there, seen, distance = _visible(lengths, new, tokens, window, causal, chunked)
    latent, rest = (part.where(there[..., None], 0) for part in cache.parts(q_latent.dtype, tokens))
    rope, key_scales, value_scales = rest.split([layout.rope_width, layout.key_scales, layout.value_scales], -1)
    exact = torch.promote_types(latent.dtype, torch.float32)

    def per_head(scales: Tensor) -> Tensor:
        """``[B, T, m]`` as ``[B, 1, H, T]``."""
        return scales.repeat_interleave(heads // scales.shape[-1], -1).mT.unsqueeze(1)

    logits = torch.einsum("bshr,btr->bsht", q_latent, latent).to(exact)
    if layout.key_scales and not layout.scaled_rope:
        logits = logits * per_head(key_scales)
    if layout.rope_dim:
        grouped = q_rope.unflatten(2, (layout.rope_groups, -1)), rope.unflatten(2, (layout.rope_groups, -1))
        logits = logits + torch.einsum("bsghd,btgd->bsght", *grouped).flatten(2, 3)
    if layout.scaled_rope:
        logits = logits * per_head(key_scales)
    logits = logits * scale
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    if slopes is not None:
        logits = logits - slopes.to(exact)[:, None] * distance[:, :, None]
    logits = logits.masked_fill(~seen[:, :, None], -math.inf)
    ends = logits.new_full((1,), -math.inf) if sinks is None else sinks.to(exact)
    lse = torch.cat([logits, ends[:, None].expand(*logits.shape[:3], 1)], -1).logsumexp(-1)
    weights = (logits - lse.where(lse > -math.inf, 0)[..., None]).exp()
    if layout.value_scales:
        weights = weights * per_head(value_scales)
    context = torch.einsum("bsht,btr->bshr", weights.to(latent.dtype), latent)
    return context, lse.float() if return_lse else lse.new_empty(0, dtype=torch.float32)


def _most(lengths: Tensor, cache: LatentCache) -> int:
    """Rows of the longest sequence."""
    tokens = max(lengths.tolist(), default=0)
    if tokens > cache.capacity:
        raise ValueError(
            f"A sequence has {tokens} rows, and the cache room for {cache.capacity}. Pass lengths no larger than that."
        )
    return tokens


def _visible(
    lengths: Tensor, new: int, tokens: int, window: int, causal: bool, chunked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows there are ``[B, T]``, which each query sees ``[B, S, T]``, and how far it lies behind them."""
    key = torch.arange(tokens, device=lengths.device)
    there = key < lengths[:, None]  # what stands behind the end may be NaN, which a weight of 0 does not hide
    own = (lengths[:, None] - new + torch.arange(new, device=lengths.device))[..., None]
    distance = own - key
    seen = there[:, None].expand_as(distance)
    if causal:
        seen = seen & (distance >= 0)
    if window:
        seen = seen & (distance < (own % window + 1 if chunked else window))
    return there, seen, distance


def _fused(q_latent: Tensor, q_rope: Tensor, rows: Tensor, seen: Tensor | None, groups: int, scale: float) -> Tensor:
    """All heads as queries of one head, whose keys and values are whole rows: so torch's fused kernel takes them."""
    heads, rank = q_latent.shape[2:]
    slots = torch.eye(groups, dtype=q_rope.dtype, device=q_rope.device)
    placed = torch.einsum("bsghd,gk->bsghkd", q_rope.unflatten(2, (groups, -1)), slots).flatten(4).flatten(2, 3)
    queries = torch.cat([q_latent, placed], -1).flatten(1, 2).unsqueeze(1)
    mask = None if seen is None else seen.repeat_interleave(heads, 1).unsqueeze(1)
    keys = rows.unsqueeze(1)
    attended = F.scaled_dot_product_attention(queries, keys, keys, attn_mask=mask, scale=scale)
    context: Tensor = attended.squeeze(1).unflatten(1, (-1, heads))[..., :rank]
    return context.contiguous() if seen is None else context.where(seen.any(-1)[..., None, None], 0)


def _joined(latent: Tensor, rest: Tensor) -> Tensor:
    """Whole rows: a view where both are parts of the same rows in memory, for decoding is bound by reading them."""
    together = latent.untyped_storage().data_ptr() == rest.untyped_storage().data_ptr()
    beside = rest.storage_offset() == latent.storage_offset() + latent.shape[-1]
    if not (together and beside and latent.stride() == rest.stride()):
        return torch.cat([latent, rest], -1)
    width = latent.shape[-1] + rest.shape[-1]
    return latent.as_strided((*latent.shape[:2], width), latent.stride(), latent.storage_offset())


def append(row: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache, lengths: Tensor) -> None:
    """Write new rows; arguments are those of :func:`mla_compile.runtime.kernels.op.append_latent`.

    Raises:
        ValueError: A sequence has more rows than the cache has room for.
    """
    _most(lengths, cache)
    layout, new = cache.layout, row.shape[1]
    latent, rope, scales = row.split(
        [layout.rank, layout.rope_width, row.shape[2] - layout.rank - layout.rope_width], -1
    )
    real, imaginary = rope.unflatten(2, (layout.rope_groups, 2, layout.rope_dim // 2)).unbind(3)
    turned = torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).flatten(2).to(row.dtype)
    place = lengths[:, None].long() - new + torch.arange(new, device=row.device)
    token, kept = place.clamp(min=0), place >= 0
    block = torch.arange(len(row), device=row.device)[:, None].expand_as(token)
    if cache.page_table is not None:
        page = cache.latent.shape[1]
        block, token = cache.page_table.long()[block, token // page], token % page
    where = block[kept], token[kept]
    cache.rest[where] = torch.cat([turned, scales], -1)[kept].to(cache.rest.dtype)
    if cache.token_scales is None or cache.codes is None:
        cache.latent[where] = latent[kept].to(cache.latent.dtype)
    else:
        cache.latent[where], cache.token_scales[where] = encode(latent[kept], cache.codes)
