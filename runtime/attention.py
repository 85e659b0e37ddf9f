"""Attention to a latent cache in plain torch, in its two forms, and which of them multiplies less.

Unfolded, keys and values are up-projected from the latent: cheap for many queries at once. Folded, the up-projections
move into queries and outputs, so that the latent itself is attended to: cheap for one query over a long cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_compile.runtime.masks import additive

__all__ = ["attend", "attend_folded", "attend_unfolded", "folding_pays", "rotate_and_append", "scales_of"]


def rotate_and_append(
    query: Tensor, row: Tensor, past: Tensor, cos: Tensor, sin: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Rotate the rotating channels of queries and new rope keys, and append the new rows to the cache.

    Shapes are those of :func:`mla_compile.runtime.ops.latent_attention`; ``rank`` is ``r``.
    """
    groups, half = cos.shape[2:]

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Angles may be float32 beside half-precision activations; the cache keeps the activations' type.
        real, imaginary = x.split([half, half], -1)
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1).to(x.dtype)

    plain, turning = query.split([query.shape[-1] - 2 * half, 2 * half], -1)
    turned = rotate(turning.unflatten(2, (groups, -1)), cos.unsqueeze(3), sin.unsqueeze(3)).flatten(2, 3)
    latent, rope, scales = _split_row(row, rank, groups * 2 * half)
    rope = rotate(rope.unflatten(2, (groups, 2 * half)), cos, sin).flatten(2)
    return torch.cat([plain, turned], -1), torch.cat([past, torch.cat([latent, rope, scales], -1)], 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Softmax attention to keys and values per head.

    Args:
        query: ``[B, H, S, D]``.
        key: ``[B, n, T, D]``; ``n`` divides ``H``.
        value: ``[B, n, T, Dv]``.
        mask: ``[B, 1 or H, S, T]``, from :func:`score_mask`.
        sinks: ``[H]``, or ``[H, S]``, or None.
        scale: Factor of the dot products.
        softcap: Bound of the logits, or 0.

    Returns:
        ``[B, H, S, Dv]``.
    """
    heads, groups = query.shape[1], key.shape[1]
    if softcap:  # between product and mask, where scaled_dot_product_attention has no place for it
        weights = _weights(_product(query, key.mT) * scale, mask, sinks, softcap)
        return _product(weights.to(value.dtype), value)
    if sinks is not None:  # one more key: zeros have logit 0, to which the mask adds the sink; its value is zeros
        mask = additive(mask, query.dtype).expand(-1, heads, -1, -1)
        mask = torch.cat([mask, _column(sinks, mask)], -1)
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=bool(heads != groups)
    )


def attend_folded(
    query: Tensor,
    present: Tensor,
    mask: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    groups: int,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    value_scales: int = 0,
    scaled_rope: bool = False,
) -> Tensor:
    """Attend to the latent rows themselves: ``key_up`` folded into queries, ``value_up`` into outputs.

    Args:
        query: ``[B, S, H, nope_dim + rope_dim]``, rotated.
        present: ``[B, T, R]``.
        mask: ``[B, 1 or H, S, T]``, from :func:`score_mask`.
        key_up: ``[G, nope_dim, r]``.
        value_up: ``[G, r, v_dim]``.
        groups: Rope groups ``n``.
        sinks: ``[H]``, or None.
        scale: Factor of the dot products.
        softcap: Bound of the logits, or 0.
        value_scales: How many of a row's last numbers are value scales.
        scaled_rope: Whether key scales multiply the whole product.

    Returns:
        ``[B, S, H, v_dim]``.
    """
    new, heads, head_dim = query.shape[1:]
    nope, rank = key_up.shape[1:]
    plain, turned = query.split([nope, head_dim - nope], -1)
    latent_query = torch.einsum("bsghd,gdr->bsghr", plain.unflatten(2, (key_up.shape[0], -1)), key_up).flatten(2, 3)
    latent, rope, scales = _split_row(present, rank, groups * turned.shape[-1])
    if softcap or scales.shape[-1]:
        of_keys, of_values = scales.split([scales.shape[-1] - value_scales, value_scales], -1)
        if scaled_rope:
            keys = present[..., : rank + rope.shape[-1]]
            rows = torch.cat([latent_query, _placed(turned, groups)], -1)
            logits = _scaled(_product(rows.transpose(1, 2), keys.mT.unsqueeze(1)), of_keys)
        else:
            logits = _scaled(_product(latent_query.transpose(1, 2), latent.mT.unsqueeze(1)), of_keys)
            rope_key = rope.unflatten(2, (groups, turned.shape[-1])).permute(0, 2, 3, 1)
            logits = logits + _product(turned.transpose(1, 2), rope_key)
        weights = _scaled(_weights(logits * scale, mask, sinks, softcap), of_values)
        context = _product(weights.to(latent.dtype), latent.unsqueeze(1)).transpose(1, 2)
    else:
        rows = torch.cat([latent_query, _placed(turned, groups)], -1).transpose(1, 2)  # [B, H, S, R]
        # All heads attend to the same rows: as queries of one head they read them once.
        context = attend(
            rows.flatten(1, 2).unsqueeze(1),
            present.unsqueeze(1),
            latent.unsqueeze(1),
            mask.expand(-1, heads, -1, -1).flatten(1, 2).unsqueeze(1),
            None if sinks is None else sinks.repeat_interleave(new)[None],
            scale,
            softcap,
        )
        context = context.unflatten(2, (heads, new)).squeeze(1).transpose(1, 2)
    return torch.einsum("bsghr,grd->bsghd", context.unflatten(2, (value_up.shape[0], -1)), value_up).flatten(2, 3)


def attend_unfolded(
    query: Tensor,
    present: Tensor,
    mask: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    groups: int,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    value_scales: int = 0,
    scaled_rope: bool = False,
) -> Tensor:
    """Attend to keys and values up-projected from the latent; arguments as in :func:`attend_folded`."""
    heads, rope_dim = query.shape[2], query.shape[3] - key_up.shape[1]
    latent, rope, scales = _split_row(present, key_up.shape[2], groups * rope_dim)
    plain = torch.einsum("btr,gdr->bgtd", latent, key_up)
    value = torch.einsum("btr,grd->bgtd", latent, value_up)
    rope = rope.unflatten(2, (groups, rope_dim)).transpose(1, 2)
    plain, rope, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (plain, rope, value))
    of_keys, of_values = scales.split([scales.shape[-1] - value_scales, value_scales], -1)
    value = _scaled(value.mT, of_values).mT
    if scaled_rope:
        key = _scaled(torch.cat([plain, rope], -1).mT, of_keys).mT
    else:
        key = torch.cat([_scaled(plain.mT, of_keys).mT, rope], -1)
    return attend(query.transpose(1, 2), key, value, mask, sinks, scale, softcap).transpose(1, 2)


def folding_pays(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    cos: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    value_scales: int,
    *,
    capped: bool,
    scaled_rope: bool,
) -> bool:
    """Compare multiplications of the two forms for this many queries over this many keys."""
    new, heads, head_dim = query.shape[1:]
    total, width = past.shape[1] + row.shape[1], row.shape[2]
    nope, rank = key_up.shape[1:]
    v_dim, scales = value_up.shape[2], scales_of(row, cos, key_up) - value_scales
    if capped or scales or value_scales:
        # Logits of latent and rope keys are products of their own, unless both are scaled; nothing meets the scales.
        rope = cos.shape[2] * (head_dim - nope) if scaled_rope else head_dim - nope
        width = rank + rope + (scales > 0)
    folded = heads * new * (total * (width + rank) + rank * (nope + v_dim))
    unfolded = heads * new * total * (head_dim + v_dim) + total * rank * (
        key_up.shape[0] * nope + value_up.shape[0] * v_dim
    )
    if scales:
        unfolded += heads * total * (head_dim if scaled_rope else nope)
    if value_scales:
        folded += heads * new * total
        unfolded += heads * total * v_dim
    return folded <= unfolded


def scales_of(row: Tensor, cos: Tensor, key_up: Tensor) -> int:
    """``m + w``, what a row holds behind latent and rope keys."""
    return row.shape[2] - key_up.shape[2] - cos.shape[2] * 2 * cos.shape[3]


def _split_row(row: Tensor, rank: int, rope_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latent, rope keys of all groups, and scales of keys and values of ``[B, T, R]``."""
    latent, rope, scales = row.split([rank, rope_width, row.shape[-1] - rank - rope_width], -1)
    return latent, rope, scales


def _placed(turned: Tensor, groups: int) -> Tensor:
    """Rotating channels ``[B, S, H, rope_dim]`` in their group's slot of all rope keys, ``[B, S, H, n * rope_dim]``."""
    slots = torch.eye(groups, dtype=turned.dtype, device=turned.device)
    return torch.einsum("bsghd,gk->bsghkd", turned.unflatten(2, (groups, -1)), slots).flatten(4).flatten(2, 3)


def _scaled(x: Tensor, scales: Tensor) -> Tensor:
    """``[B, H, S, T]`` times ``[B, T, m]``, one number per key and ``H / m`` heads; ``m`` of 0 changes nothing."""
    if not scales.shape[-1]:
        return x
    scaled: Tensor = (x.unflatten(1, (scales.shape[-1], -1)) * scales.mT[:, :, None, None]).flatten(1, 2)
    return scaled


def _column(sinks: Tensor, logits: Tensor) -> Tensor:
    """Sinks ``[H]`` or ``[H, S]`` as one more column of ``[B, H, S, T]`` logits."""
    return sinks.to(logits.dtype).reshape(logits.shape[1], -1, 1).expand(*logits.shape[:3], 1)


def _weights(logits: Tensor, mask: Tensor, sinks: Tensor | None, softcap: float) -> Tensor:
    """Softmax of ``[B, H, S, T]`` logits after cap, mask and sinks; in float32 or wider, as fused kernels do."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    logits = logits + additive(mask, logits.dtype)
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, _column(sinks, logits)], -1).softmax(-1)[..., :-1]


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``[B, H, S, K]`` times ``[B, n, K, L]``, ``n`` dividing ``H``: heads that share ``y`` read it once."""
    batch, heads, new, width = x.shape
    groups = y.shape[1]
    return (x.reshape(batch, groups, heads // groups * new, width) @ y).reshape(batch, heads, new, y.shape[3])
