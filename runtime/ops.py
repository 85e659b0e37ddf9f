"""``mla::latent_attention``: the one operator a converted graph calls, with shapes, gradient and a CPU implementation.

The operator owns the whole step from projected queries and a new cache row to attention outputs and the grown cache, so
that each backend may choose how to compute it: keys and values up-projected from the latent (cheap for many queries at
once), or the up-projections folded into queries and outputs so that the latent itself is attended to (cheap for one
query over a long cache, as in decoding).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend_folded", "attend_unfolded", "latent_attention", "rotate_and_append", "visible_keys"]


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
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Attend with a latent cache (DeepSeek-V2 eq. 9-19; MHA2MLA eq. 8-11).

    ``B`` batch, ``S`` new tokens, ``P`` cached tokens, ``H`` query heads, ``n`` rope groups, ``G`` up-projection groups
    (``n`` and ``G`` divide ``H``; head ``h`` uses group ``h // (H / n)``), ``r`` latent rank, ``R = r + n * rope_dim``.

    Args:
        query: ``[B, S, H, nope_dim + rope_dim]``, not rotated; rotating channels last, as ``[real | imaginary]``.
        row: ``[B, S, R]``, the new tokens' ``[latent | rope keys]``, not rotated.
        past: ``[B, P, R]``, earlier rows, rope keys rotated.
        attention_mask: ``[B, P + S]``, non-zero for real tokens.
        cos: ``[B, S, n, rope_dim / 2]`` at the new tokens' positions.
        sin: Like ``cos``.
        key_up: ``[G, nope_dim, r]``.
        value_up: ``[G, r, v_dim]``.
        scale: Factor between dot products and softmax logits.
        window: How many real tokens a query sees, itself included; 0 for all.

    Returns:
        Attention outputs ``[B, S, H, v_dim]`` and the cache with the new rows ``[B, P + S, R]``.

    Raises:
        ValueError: The mask does not cover past and new tokens.
    """
    if attention_mask.shape[1] != past.shape[1] + row.shape[1]:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but {past.shape[1]} are cached and "
            f"{row.shape[1]} are new. Pass a mask over all of them."
        )
    return _attend(query, row, past, attention_mask, cos, sin, key_up, value_up, scale, window)


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
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    batch, new, heads, _ = query.shape
    present = row.new_empty(batch, past.shape[1] + new, row.shape[2])
    return query.new_empty(batch, new, heads, value_up.shape[2]), present


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
    latent, rope = row.split([rank, groups * 2 * half], -1)
    rope = rotate(rope.unflatten(2, (groups, 2 * half)), cos, sin).flatten(2)
    return torch.cat([plain, turned], -1), torch.cat([past, torch.cat([latent, rope], -1)], 1)


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
        rank = real.long().cumsum(-1)
        seen = seen & (rank[:, total - new :, None] - rank[:, None, :] < window)
    return seen | (key == own)


def attend_folded(
    query: Tensor, present: Tensor, seen: Tensor, key_up: Tensor, value_up: Tensor, groups: int, scale: float
) -> Tensor:
    """Attend to the latent rows themselves: ``key_up`` folded into queries, ``value_up`` into outputs.

    Args:
        query: ``[B, S, H, nope_dim + rope_dim]``, rotated.
        present: ``[B, T, R]``.
        seen: ``[B, S, T]``.
        key_up: ``[G, nope_dim, r]``.
        value_up: ``[G, r, v_dim]``.
        groups: Rope groups ``n``.
        scale: Factor of the dot products.

    Returns:
        ``[B, S, H, v_dim]``.
    """
    heads, rank, nope = query.shape[2], key_up.shape[2], key_up.shape[1]
    plain, turned = query.split([nope, query.shape[-1] - nope], -1)
    latent_query = torch.einsum("bsghd,gdr->bsghr", plain.unflatten(2, (key_up.shape[0], -1)), key_up).flatten(2, 3)
    # A head's rotating channels belong in its group's slot of the row; the other slots get zeros.
    slots = torch.eye(groups, dtype=query.dtype, device=query.device)
    turned = torch.einsum("bsghd,gk->bsghkd", turned.unflatten(2, (groups, -1)), slots).flatten(4).flatten(2, 3)
    rows = torch.cat([latent_query, turned], -1).transpose(1, 2)  # [B, H, S, R]
    context = F.scaled_dot_product_attention(
        rows.flatten(1, 2),
        present,
        present[..., :rank],
        attn_mask=seen.unsqueeze(1).expand(-1, heads, -1, -1).flatten(1, 2),
        scale=scale,
    )
    context = context.unflatten(1, (heads, -1)).transpose(1, 2).unflatten(2, (value_up.shape[0], -1))
    return torch.einsum("bsghr,grd->bsghd", context, value_up).flatten(2, 3)


def attend_unfolded(
    query: Tensor, present: Tensor, seen: Tensor, key_up: Tensor, value_up: Tensor, groups: int, scale: float
) -> Tensor:
    """Attend to keys and values up-projected from the latent; arguments as in :func:`attend_folded`."""
    heads, rank = query.shape[2], key_up.shape[2]
    latent, rope = present.split([rank, present.shape[-1] - rank], -1)
    plain = torch.einsum("btr,gdr->bgtd", latent, key_up)
    value = torch.einsum("btr,grd->bgtd", latent, value_up)
    rope = rope.unflatten(2, (groups, -1)).transpose(1, 2)
    plain, rope, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (plain, rope, value))
    return F.scaled_dot_product_attention(
        query.transpose(1, 2), torch.cat([plain, rope], -1), value, attn_mask=seen.unsqueeze(1), scale=scale
    ).transpose(1, 2)


def _attend(
    query: Tensor,
    row: Tensor,
    past: Tensor,
    attention_mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    groups, rank = cos.shape[2], key_up.shape[2]
    query, present = rotate_and_append(query, row, past, cos, sin, rank)
    seen = visible_keys(attention_mask, query.shape[1], window)
    attend = attend_folded if _folding_pays(query, present, key_up, value_up) else attend_unfolded
    return attend(query, present, seen, key_up, value_up, groups, scale).contiguous(), present


def _folding_pays(query: Tensor, present: Tensor, key_up: Tensor, value_up: Tensor) -> bool:
    """Compare multiplications of the two forms for this many queries over this many keys."""
    new, heads, head_dim = query.shape[1:]
    total, width = present.shape[1:]
    nope, rank = key_up.shape[1:]
    v_dim = value_up.shape[2]
    folded = heads * new * (total * (width + rank) + rank * (nope + v_dim))
    unfolded = heads * new * total * (head_dim + v_dim) + total * rank * (
        key_up.shape[0] * nope + value_up.shape[0] * v_dim
    )
    return folded <= unfolded


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's context
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_output: Tensor, grad_present: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Recompute the forward pass with gradients on: no intermediate of size ``S x T`` is kept between passes."""
    saved = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[: len(saved)])
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_(w) for x, w in zip(saved, wanted, strict=True)]
        outputs = _attend(*inputs, ctx.scale, ctx.window)  # type: ignore[call-arg]
    chosen = [x for x, w in zip(inputs, wanted, strict=True) if w]
    # An output that no wanted input leads to (the cache, for queries alone) has no gradient to send back.
    sent = [(o, g) for o, g in zip(outputs, (grad_output, grad_present), strict=True) if o.requires_grad]
    results, gradients = zip(*sent, strict=True)
    found = iter(torch.autograd.grad(results, chosen, gradients, allow_unused=True))
    return (*(next(found) if w else None for w in wanted), None, None)


latent_attention.register_autograd(_backward, setup_context=_remember)
