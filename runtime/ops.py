"""``mla::latent_attention`` and ``mla::cached_attention``: what a rewritten graph calls, with shapes and gradients.

``latent_attention`` owns the whole step from projected queries and a new cache row to attention outputs and the grown
cache, so that each backend may choose how to compute it: keys and values up-projected from the latent (cheap for many
queries at once), or the up-projections folded into queries and outputs so that the latent itself is attended to (cheap
for one query over a long cache, as in decoding).

``cached_attention`` is ordinary attention with an ordinary cache, for layers that are not converted but decode beside
those that are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

__all__ = [
    "attend",
    "attend_folded",
    "attend_unfolded",
    "cached_attention",
    "kept_rows",
    "latent_attention",
    "open_keys",
    "register_gradient",
    "rotate_and_append",
    "score_mask",
    "visible_keys",
]


@torch.library.custom_op("mla::latent_attention", mutates_args=())
def latent_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    value_scales: int = 0,
    causal: bool = True,
    scaled_rope: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend with a latent cache (DeepSeek-V2 eq. 9-19; MHA2MLA eq. 8-11).

    ``B`` batch, ``S`` new tokens, ``P`` cached tokens, ``H`` query heads, ``n`` rope groups, ``G`` up-projection
    groups, ``m`` key scales, ``w`` value scales (``n``, ``G``, ``m`` and ``w`` divide ``H``; head ``h`` uses group
    ``h // (H / n)``, and so on), ``r`` latent rank, ``R = r + n * rope_dim + m + w``; ``m`` and ``w`` may be 0.

    The logit of a query and a key is ``cap(scale * (s * q_plain . key_up c + q_rope . k_rope)) - slope * distance``:
    ``s`` is the key's scale for this head (1 without scales), ``cap(x) = softcap * tanh(x / softcap)`` (Gemma 2), and
    ``distance`` counts real tokens (ALiBi, Press et al. 2022). A key normalised after its up-projection (QK-norm) is
    linear in the latent but for one number per norm: that number is the scale. Values normalised after theirs are so
    too: a value is ``s' * value_up c`` with the value's scale ``s'`` for this head.

    Rope keys that are one per norm are cached behind it, and ``s`` is not theirs. One rope key made from keys that have
    several norms cannot be: with ``scaled_rope`` it is cached in front of them all, and the scale of a head's own norm
    belongs to both products, ``cap(scale * s * (q_plain . key_up c + q_rope . k_rope)) - slope * distance``.

    Attention that is not causal (an encoder's, or a decoder's to an encoder) sees every real key, before or behind, of
    a sequence that may be another one: there are ``N`` new rows, not one per query. It has neither window nor slopes;
    keys of another sequence do not rotate.

    Args:
        query: ``[B, S, H, nope_dim + rope_dim]``, not rotated; rotating channels last, as ``[real | imaginary]``.
        row: ``[B, S, R]``, the new tokens' ``[latent | rope keys | key scales | value scales]``, rope keys normed
            unless ``scaled_rope``, not rotated; ``[B, N, R]`` if not causal.
        past: ``[B, P, R]``, earlier rows, rope keys rotated; with a window at most its last ``window - 1``.
        attention_mask: ``[B, T + S]``, non-zero for real tokens; ``T`` are all earlier tokens, cached or not. ``[B, P +
            N]`` if not causal.
        cos: ``[B, S, n, rope_dim / 2]`` at the new tokens' positions; ``[B, 1, n, 0]`` where ``N`` is not ``S``.
        sin: Like ``cos``.
        key_up: ``[G, nope_dim, r]``.
        value_up: ``[G, r, v_dim]``.
        sinks: ``[H]``, a further logit in every softmax that has no value (gpt-oss), or None.
        slopes: ``[H]``, what a logit loses per real token of distance, or None.
        scale: Factor between dot products and softmax logits.
        window: How many real tokens a query sees, itself included; 0 for all.
        softcap: Bound of the logits before ``slopes``; 0 for none.
        value_scales: ``w``, how many of a row's last numbers are value scales.
        causal: Whether a query sees no key behind its own. If none of the keys is real, all are seen.
        scaled_rope: Whether key scales multiply the whole product, and not only that of the latent.

    Returns:
        Attention outputs ``[B, S, H, v_dim]`` and the cache with the new rows ``[B, P + S, R]``, of which no more is
        kept than the window lets later tokens see: the last ``window - 1`` rows. (Padding has a row too: with a window
        it belongs to the left of all real tokens.)

    Raises:
        ValueError: Sizes do not fit, ``window`` or ``softcap`` is negative, there is a window or a slope although
            attention is not causal, or ``scaled_rope`` without key scales.
    """
    if value_scales < 0 or (value_scales and query.shape[2] % value_scales):
        raise ValueError(
            f"{value_scales} value scales do not divide {query.shape[2]} heads. Pass 0 for none, or a divisor of them."
        )
    scales, heads = _scales(row, cos, key_up) - value_scales, query.shape[2]
    if scales < 0 or (scales and heads % scales):
        raise ValueError(
            f"A row of {row.shape[2]} numbers leaves {scales} for key scales behind a latent of {key_up.shape[2]} and "
            f"{cos.shape[2]} rope keys of {2 * cos.shape[3]}. Pass none, or a number that divides {heads} heads."
        )
    if scaled_rope and not scales:
        raise ValueError("Rope keys cannot be scaled by key scales that the rows do not have. Pass scaled_rope=False.")
    _check_arguments(query, row, past, attention_mask, sinks, slopes, window, softcap)
    if causal and query.shape[1] != row.shape[1]:
        raise ValueError(f"There are {query.shape[1]} queries but {row.shape[1]} new rows. Pass one row per query.")
    if not causal and (window or slopes is not None):
        raise ValueError("Attention that is not causal has neither a window nor slopes. Pass 0 and None.")
    return _latent_attention(
        query,
        row,
        past,
        attention_mask,
        cos,
        sin,
        key_up,
        value_up,
        sinks,
        slopes,
        scale,
        window,
        softcap,
        value_scales,
        causal,
        scaled_rope,
    )


@latent_attention.register_fake
def _(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    value_scales: int = 0,
    causal: bool = True,
    scaled_rope: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, new, heads, _ = query.shape
    present = row.new_empty(batch, kept_rows(past.shape[1] + row.shape[1], window), row.shape[2])
    return query.new_empty(batch, new, heads, value_up.shape[2]), present


@torch.library.custom_op("mla::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attend with an ordinary cache: grouped-query attention (Ainslie et al. 2023), keys and values in one row.

    Sizes and the last arguments are those of :func:`latent_attention`; ``n`` key/value heads, ``R = n * (D + Dv)``.

    Args:
        query: ``[B, S, H, D]``, as it enters the dot product.
        row: ``[B, S, R]``, the new tokens' ``[keys | values]``, keys as they enter the dot product.
        past: ``[B, P, R]``, earlier rows; with a window at most its last ``window - 1``.
        attention_mask: ``[B, T + S]``, non-zero for real tokens; ``T`` are all earlier tokens, cached or not.
        sinks: ``[H]``, or None.
        slopes: ``[H]``, or None.
        kv_heads: ``n``, a divisor of ``H``.
        scale: Factor between dot products and softmax logits.
        window: How many real tokens a query sees, itself included; 0 for all.
        softcap: Bound of the logits before ``slopes``; 0 for none.

    Returns:
        Attention outputs ``[B, S, H, Dv]`` and the cache as :func:`latent_attention` keeps it.

    Raises:
        ValueError: Sizes do not fit, or ``window`` or ``softcap`` is negative.
    """
    heads, head_dim = query.shape[2:]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads do not divide {heads} query heads. Pass a divisor of them.")
    if row.shape[2] % kv_heads or row.shape[2] <= kv_heads * head_dim:
        raise ValueError(
            f"A row of {row.shape[2]} numbers does not hold {kv_heads} keys of {head_dim} and as many values. "
            "Pass [keys | values] of all key/value heads."
        )
    _check_arguments(query, row, past, attention_mask, sinks, slopes, window, softcap)
    return _cached_attention(query, row, past, attention_mask, sinks, slopes, kv_heads, scale, window, softcap)


@cached_attention.register_fake
def _(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    batch, new, heads, head_dim = query.shape
    present = row.new_empty(batch, kept_rows(past.shape[1] + new, window), row.shape[2])
    return query.new_empty(batch, new, heads, row.shape[2] // kv_heads - head_dim), present


def kept_rows(tokens: int, window: int) -> int:
    """How many rows a cache keeps of so many tokens: later tokens see no more than ``window - 1`` of them."""
    return torch.sym_min(tokens, window - 1) if window else tokens


def rotate_and_append(
    query: Tensor, row: Tensor, past: Tensor, cos: Tensor, sin: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Rotate the rotating channels of queries and new rope keys, and append the new rows to the cache.

    Shapes are those of :func:`latent_attention`; ``rank`` is ``r``.
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
        mask = _additive(mask, query.dtype).expand(-1, heads, -1, -1)
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


def _latent_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    value_scales: int = 0,
    causal: bool = True,
    scaled_rope: bool = False,
) -> tuple[Tensor, Tensor]:
    folds = _folding_pays(
        query, row, past, cos, key_up, value_up, value_scales, capped=softcap != 0, scaled_rope=scaled_rope
    )
    query, rows = rotate_and_append(query, row, past, cos, sin, key_up.shape[2])
    if causal:
        mask = score_mask(attention_mask[:, -rows.shape[1] :], query.shape[1], window, slopes, query.dtype)
    else:
        mask = open_keys(attention_mask, query.shape[1]).unsqueeze(1)
    form = attend_folded if folds else attend_unfolded
    up = (key_up, value_up, cos.shape[2])
    attended = form(query, rows, mask, *up, sinks, scale, softcap, value_scales, scaled_rope)
    return attended.contiguous(), _kept(rows, window)


def _cached_attention(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    rows = torch.cat([past, row], 1)
    keys = kv_heads * query.shape[3]
    key, value = (x.unflatten(2, (kv_heads, -1)).transpose(1, 2) for x in rows.split([keys, rows.shape[2] - keys], -1))
    mask = score_mask(attention_mask[:, -rows.shape[1] :], query.shape[1], window, slopes, query.dtype)
    attended = attend(query.transpose(1, 2), key, value, mask, sinks, scale, softcap).transpose(1, 2)
    return attended.contiguous(), _kept(rows, window)


def _kept(rows: Tensor, window: int) -> Tensor:
    """The last rows of all, in memory of their own: a view would keep the others alive."""
    count = kept_rows(rows.shape[1], window)
    return rows if count == rows.shape[1] else rows[:, rows.shape[1] - count :].clone()


def _check_arguments(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    window: int,
    softcap: float,
) -> None:
    """Refuse what both operators refuse."""
    if window < 0 or softcap < 0:
        raise ValueError(f"window is {window} and softcap {softcap}. Pass 0 for none, or a positive number.")
    if row.shape[2] != past.shape[2]:
        raise ValueError(
            f"A new row has {row.shape[2]} numbers, but a cached one {past.shape[2]}. Pass rows of one width."
        )
    earlier = attention_mask.shape[1] - row.shape[1]
    if earlier < 0 or past.shape[1] != kept_rows(earlier, window):
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, of which {row.shape[1]} are new, but "
            f"{past.shape[1]} are cached{f' for a window of {window}' if window else ''}. Pass a mask over all of them."
        )
    for name, per_head in (("sinks", sinks), ("slopes", slopes)):
        if per_head is not None and per_head.shape != query.shape[2:3]:
            raise ValueError(
                f"{name} has shape {list(per_head.shape)}. Pass one number for each of {query.shape[2]} heads."
            )


def _scales(row: Tensor, cos: Tensor, key_up: Tensor) -> int:
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


def _distances(attention_mask: Tensor, new: int) -> Tensor:
    """How many real tokens each of all keys lies before each of the last ``new`` tokens, ``[B, new, T]``."""
    rank = (attention_mask != 0).long().cumsum(-1)
    return rank[:, rank.shape[1] - new :, None] - rank[:, None, :]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to logits."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _column(sinks: Tensor, logits: Tensor) -> Tensor:
    """Sinks ``[H]`` or ``[H, S]`` as one more column of ``[B, H, S, T]`` logits."""
    return sinks.to(logits.dtype).reshape(logits.shape[1], -1, 1).expand(*logits.shape[:3], 1)


def _weights(logits: Tensor, mask: Tensor, sinks: Tensor | None, softcap: float) -> Tensor:
    """Softmax of ``[B, H, S, T]`` logits after cap, mask and sinks; in float32 or wider, as fused kernels do."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    logits = logits + _additive(mask, logits.dtype)
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, _column(sinks, logits)], -1).softmax(-1)[..., :-1]


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``[B, H, S, K]`` times ``[B, n, K, L]``, ``n`` dividing ``H``: heads that share ``y`` read it once."""
    batch, heads, new, width = x.shape
    groups = y.shape[1]
    return (x.reshape(batch, groups, heads // groups * new, width) @ y).reshape(batch, heads, new, y.shape[3])


def _folding_pays(
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
    v_dim, scales = value_up.shape[2], _scales(row, cos, key_up) - value_scales
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


def register_gradient(op: CustomOpDef, compute: Callable[..., tuple[Tensor, Tensor]], tensors: int) -> None:
    """Give an operator whose first ``tensors`` arguments are tensors or None the gradient of ``compute``.

    The forward pass is recomputed with gradients on: no intermediate of size ``S x T`` is kept between passes.
    """

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's
        ctx.save_for_backward(*inputs[:tensors])
        ctx.settings = inputs[tensors:]

    def backward(ctx: Any, grad_output: Tensor, grad_present: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        wanted = ctx.needs_input_grad[:tensors]
        with torch.enable_grad():
            pairs = zip(ctx.saved_tensors, wanted, strict=True)
            inputs = [None if x is None else x.detach().requires_grad_(w) for x, w in pairs]
            outputs = compute(*inputs, *ctx.settings)
        chosen = [x for x, w in zip(inputs, wanted, strict=True) if x is not None and w]
        # An output that no wanted input leads to (the cache, for queries alone) has no gradient to send back.
        sent = [(o, g) for o, g in zip(outputs, (grad_output, grad_present), strict=True) if o.requires_grad]
        results, gradients = zip(*sent, strict=True)
        found = iter(torch.autograd.grad(results, chosen, gradients, allow_unused=True))
        return (*(next(found) if w else None for w in wanted), *(None for _ in ctx.settings))

    op.register_autograd(backward, setup_context=remember)


register_gradient(latent_attention, _latent_attention, tensors=10)
register_gradient(cached_attention, _cached_attention, tensors=6)
for _device in ("cpu", "cuda"):  # beside products in bfloat16, all that an operator reads is bfloat16 too
    latent_attention.register_autocast(_device, torch.bfloat16)
    cached_attention.register_autocast(_device, torch.bfloat16)
