"""The kernels with the parameters that a TensorRT plugin launches them by.

A quickly deployable plugin's kernel takes inputs, 32-bit integers and outputs, in this order: there are no
floating-point parameters, so what a kernel takes of these is a constant here. Only ``decode_entry`` is launched by code
of our own, with what it likes.

The latent and what is behind it lie in the same rows ``[B, 1, T, R]``, one behind another, where ``R`` is ``RANK +
ROPE_GROUPS * ROPE_DIM + KEY_SCALES + VALUE_SCALES``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mla_compile.runtime.kernels.append import append_kernel
from mla_compile.runtime.kernels.decode import combine_kernel, decode_kernel

__all__ = ["append_entry", "combine_entry", "decode_entry", "partial_entry"]


@triton.jit(do_not_specialize=["room", "new", "heads", "window", "splits", "least_tiles"])
def decode_entry(
    q_latent: tl.tensor,
    q_rope: tl.tensor,
    rows: tl.tensor,
    lengths: tl.tensor,
    slopes: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    sinks: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    room: tl.tensor,
    new: tl.tensor,
    heads: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    least_tiles: tl.tensor,
    RANK: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROPE_GROUPS: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    SCALES_WIDTH: tl.constexpr,
    SCALED_ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Attend to one split of the keys: :func:`mla_compile.runtime.kernels.decode.decode_kernel`.

    Args:
        q_latent: ``[B, S, H, RANK]``.
        q_rope: ``[B, S, H, ROPE_DIM]``, rotated.
        rows: ``[B, 1, T, R]``.
        lengths: ``[B]`` int32.
        slopes: ``[H]`` float32, or None.
        output: ``[B, S, H, splits, RANK]``, float32 if there are several splits.
        lse: ``[B, S, H, splits]`` float32.
        sinks: ``[H]`` float32, or None, as with several splits.
        scale: Factor of the dot products.
        softcap: Bound of the logits, if ``CAPPED``.
        room: ``T``.
        new: ``S``.
        heads: ``H``.
        window: See there; likewise all that follow.
        splits: See there.
        least_tiles: See there.
        RANK: See there.
        WIDTHS: See there.
        ROPE_GROUPS: See there.
        ROPE_DIM: See there.
        ROPE_WIDTH: See there.
        KEY_SCALES: See there.
        VALUE_SCALES: See there.
        SCALES_WIDTH: See there.
        SCALED_ROPE: See there.
        CAUSAL: See there.
        WINDOWED: See there.
        CHUNKED: See there.
        CAPPED: See there.
        ROWS: See there.
        KEYS: See there.
    """
    width: tl.constexpr = RANK + ROPE_GROUPS * ROPE_DIM + KEY_SCALES + VALUE_SCALES
    sequence = room * width
    decode_kernel(
        q_latent,
        q_rope,
        rows,
        rows + RANK,
        None,
        None,
        lengths,
        sequence,
        width,
        sequence,
        width,
        0,
        0,
        sinks,
        slopes,
        output,
        lse,
        scale,
        softcap,
        new,
        heads,
        window,
        splits,
        least_tiles,
        RANK,
        WIDTHS,
        ROPE_GROUPS,
        ROPE_DIM,
        ROPE_WIDTH,
        KEY_SCALES,
        VALUE_SCALES,
        SCALES_WIDTH,
        SCALED_ROPE,
        0,
        "",
        CAUSAL,
        WINDOWED,
        CHUNKED,
        CAPPED,
        ROWS,
        KEYS,
    )


@triton.jit(do_not_specialize=["room", "new", "heads"])
def partial_entry(
    q_latent: tl.tensor,
    q_rope: tl.tensor,
    rows: tl.tensor,
    lengths: tl.tensor,
    slopes: tl.tensor,
    room: tl.tensor,
    new: tl.tensor,
    heads: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    RANK: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROPE_GROUPS: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    SCALES_WIDTH: tl.constexpr,
    SCALED_ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHUNKED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Attend to one split of the keys, as :func:`decode_entry`, of which many arguments are constants here.

    Args:
        q_latent: ``[B, S, H, RANK]``.
        q_rope: ``[B, S, H, ROPE_DIM]``, rotated.
        rows: ``[B, 1, T, R]``.
        lengths: ``[B]`` int32.
        slopes: ``[H]`` float32, or None.
        room: ``T``.
        new: ``S``.
        heads: ``H``.
        partial: ``[B, S, H, SPLITS, RANK]`` float32.
        partial_lse: ``[B, S, H, SPLITS]`` float32.
        SCALE: Factor of the dot products.
        SOFTCAP: Bound of the logits; 0 for none.
        WINDOW: How many keys a query sees, or if ``CHUNKED`` a chunk has; 0 for all.
        SPLITS: In how many pieces the keys are cut.
        LEAST_TILES: See there; likewise all that follow.
        RANK: See there.
        WIDTHS: See there.
        ROPE_GROUPS: See there.
        ROPE_DIM: See there.
        ROPE_WIDTH: See there.
        KEY_SCALES: See there.
        VALUE_SCALES: See there.
        SCALES_WIDTH: See there.
        SCALED_ROPE: See there.
        CAUSAL: See there.
        CHUNKED: See there.
        ROWS: See there.
        KEYS: See there.
    """
    decode_entry(
        q_latent,
        q_rope,
        rows,
        lengths,
        slopes,
        partial,
        partial_lse,
        None,
        SCALE,
        SOFTCAP,
        room,
        new,
        heads,
        WINDOW,
        SPLITS,
        LEAST_TILES,
        RANK,
        WIDTHS,
        ROPE_GROUPS,
        ROPE_DIM,
        ROPE_WIDTH,
        KEY_SCALES,
        VALUE_SCALES,
        SCALES_WIDTH,
        SCALED_ROPE,
        CAUSAL,
        WINDOW > 0,
        CHUNKED,
        SOFTCAP > 0,
        ROWS,
        KEYS,
    )


@triton.jit(do_not_specialize=["heads"])
def combine_entry(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    sinks: tl.tensor,
    heads: tl.tensor,
    output: tl.tensor,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Combine the splits of one row: :func:`mla_compile.runtime.kernels.decode.combine_kernel`.

    Args:
        partial: ``[B, S, H, PARTS, RANK]`` float32.
        partial_lse: ``[B, S, H, PARTS]`` float32.
        sinks: ``[H]`` float32, or None.
        heads: ``H``.
        output: ``[B, S, H, RANK]``.
        RANK: See there.
        COLUMNS: See there.
        PARTS: How many splits there are.
        SPLITS: Power of two that holds ``PARTS``.
    """
    combine_kernel(partial, partial_lse, sinks, output, None, heads, PARTS, RANK, COLUMNS, SPLITS)


@triton.jit(do_not_specialize=["room", "new"])
def append_entry(
    row: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows: tl.tensor,
    lengths: tl.tensor,
    room: tl.tensor,
    new: tl.tensor,
    output: tl.tensor,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_WIDTH: tl.constexpr,
) -> None:
    """Write one new token's row: :func:`mla_compile.runtime.kernels.append.append_kernel`.

    Args:
        row: ``[B, S, R]``, rope keys not rotated.
        cos: ``[B, S, ROPE_GROUPS, HALF]`` float32.
        sin: Like ``cos``.
        rows: The cache, which ``output`` is too.
        lengths: ``[B]`` int32.
        room: Rows of the cache, ``T``.
        new: ``S``.
        output: ``[B, 1, T, R]``.
        RANK: See there.
        WIDTH: See there.
        ROPE_GROUPS: See there.
        GROUPS: See there.
        HALF: See there.
        HALF_WIDTH: See there.
        SCALES: See there.
        SCALES_WIDTH: See there.
    """
    width: tl.constexpr = RANK + ROPE_GROUPS * 2 * HALF + SCALES
    sequence = room * width
    append_kernel(
        row,
        cos,
        sin,
        output,
        output + RANK,
        None,
        None,
        lengths,
        sequence,
        width,
        sequence,
        width,
        0,
        0,
        new,
        0,
        "",
        RANK,
        RANK,
        WIDTH,
        ROPE_GROUPS,
        GROUPS,
        HALF,
        HALF_WIDTH,
        SCALES,
        SCALES_WIDTH,
    )
