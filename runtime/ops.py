"""``mla::latent_attention`` and ``mla::cached_attention``: what a rewritten graph calls, with shapes and gradients.

``latent_attention`` owns the whole step from projected queries and a new cache row to attention outputs and the grown
cache, so that each backend may choose how to compute it: keys and values up-projected from the latent (cheap for many
queries at once), or the up-projections folded into queries and outputs so that the latent itself is attended to (cheap
for one query over a long cache, as in decoding).

``cached_attention`` is ordinary attention with an ordinary cache, for layers that are not converted but decode beside
those that are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mla_compile.runtime.attention import (
    attend,
    attend_folded,
    attend_unfolded,
    folding_pays,
    rotate_and_append,
    scales_of,
)
from mla_compile.runtime.autocast import register_autocast
from mla_compile.runtime.gradient import register_gradient
from mla_compile.runtime.masks import kept_rows, open_keys, score_mask

__all__ = ["cached_attention", "latent_attention"]


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
    chunked: bool = False,
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
        chunked: Whether the window does not slide: a query sees the real tokens of its own chunk of ``window``, counted
            from the first real one.

    Returns:
        Attention outputs ``[B, S, H, v_dim]`` and the cache with the new rows ``[B, P + S, R]``, of which no more is
        kept than the window lets later tokens see: the last ``window - 1`` rows. (Padding has a row too: with a window
        it belongs to the left of all real tokens.)

    Raises:
        ValueError: Sizes do not fit, ``window`` or ``softcap`` is negative, there is a window or a slope although
            attention is not causal, ``scaled_rope`` without key scales, or ``chunked`` without a window.
    """
    if value_scales < 0 or (value_scales and query.shape[2] % value_scales):
        raise ValueError(
            f"{value_scales} value scales do not divide {query.shape[2]} heads. Pass 0 for none, or a divisor of them."
        )
    scales, heads = scales_of(row, cos, key_up) - value_scales, query.shape[2]
    if scales < 0 or (scales and heads % scales):
        raise ValueError(
            f"A row of {row.shape[2]} numbers leaves {scales} for key scales behind a latent of {key_up.shape[2]} and "
            f"{cos.shape[2]} rope keys of {2 * cos.shape[3]}. Pass none, or a number that divides {heads} heads."
        )
    if scaled_rope and not scales:
        raise ValueError("Rope keys cannot be scaled by key scales that the rows do not have. Pass scaled_rope=False.")
    _check_arguments(query, row, past, attention_mask, sinks, slopes, window, softcap, chunked)
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
        chunked,
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
    chunked: bool = False,
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
    chunked: bool = False,
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
        chunked: Whether the window does not slide.

    Returns:
        Attention outputs ``[B, S, H, Dv]`` and the cache as :func:`latent_attention` keeps it.

    Raises:
        ValueError: Sizes do not fit, ``window`` or ``softcap`` is negative, or ``chunked`` without a window.
    """
    heads, head_dim = query.shape[2:]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads do not divide {heads} query heads. Pass a divisor of them.")
    if row.shape[2] % kv_heads or row.shape[2] <= kv_heads * head_dim:
        raise ValueError(
            f"A row of {row.shape[2]} numbers does not hold {kv_heads} keys of {head_dim} and as many values. "
            "Pass [keys | values] of all key/value heads."
        )
    _check_arguments(query, row, past, attention_mask, sinks, slopes, window, softcap, chunked)
    return _cached_attention(query, row, past, attention_mask, sinks, slopes, kv_heads, scale, window, softcap, chunked)


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
    chunked: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, new, heads, head_dim = query.shape
    present = row.new_empty(batch, kept_rows(past.shape[1] + new, window), row.shape[2])
    return query.new_empty(batch, new, heads, row.shape[2] // kv_heads - head_dim), present


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
    chunked: bool = False,
) -> tuple[Tensor, Tensor]:
    folds = folding_pays(
        query, row, past, cos, key_up, value_up, value_scales, capped=softcap != 0, scaled_rope=scaled_rope
    )
    query, rows = rotate_and_append(query, row, past, cos, sin, key_up.shape[2])
    if causal:
        mask = score_mask(attention_mask, query.shape[1], window, slopes, query.dtype, chunked, rows.shape[1])
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
    chunked: bool = False,
) -> tuple[Tensor, Tensor]:
    rows = torch.cat([past, row], 1)
    keys = kv_heads * query.shape[3]
    key, value = (x.unflatten(2, (kv_heads, -1)).transpose(1, 2) for x in rows.split([keys, rows.shape[2] - keys], -1))
    mask = score_mask(attention_mask, query.shape[1], window, slopes, query.dtype, chunked, rows.shape[1])
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
    chunked: bool,
) -> None:
    """Refuse what both operators refuse."""
    if chunked and not window:
        raise ValueError("Chunks have no length. Pass it as window, or chunked=False.")
    if window < 0 or softcap < 0:
        raise ValueError(f"window is {window} and softcap {softcap}. Pass 0 for none, or a positive number.")
    if row.shape[2] != past.shape[2]:
        raise ValueError(
            f"A new row has {row.shape[2]} numbers, but a cached one {past.shape[2]}. Pass rows of one width."
        )
    batches = {len(x) for x in (query, row, past, attention_mask)}
    if len(batches) > 1:
        raise ValueError(
            f"There are {len(query)} sequences of queries, {len(row)} of new rows, {len(past)} of cached ones, and "
            f"{len(attention_mask)} in attention_mask. Pass as many of each."
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


register_gradient(latent_attention, _latent_attention, tensors=10)
register_gradient(cached_attention, _cached_attention, tensors=6)
for _name, _operator in (("latent_attention", latent_attention), ("cached_attention", cached_attention)):
    register_autocast(f"mla::{_name}", _operator)
