"""The kernels with the parameters that a TensorRT plugin launches them by.

A quickly deployable plugin's kernel takes inputs, 32-bit integers and outputs, in this order: there are no
floating-point parameters, so what a kernel takes of these is a constant here. Only ``decode_entry`` is launched by code
of our own, with what it likes.
The latent and what is behind it lie in the same rows ``[B, T, RANK + ROPE_GROUPS * ROPE_DIM]``, one behind another.
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
    output: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
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
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Attend to one split of the keys: :func:`mla_compile.runtime.kernels.decode.decode_kernel`.

    Args:
        q_latent: ``[B, S, H, RANK]``.
        q_rope: ``[B, S, H, ROPE_DIM]``, rotated.
        rows: ``[B, T, RANK + ROPE_GROUPS * ROPE_DIM]``.
        lengths: ``[B]`` int32.
        output: ``[B, S, H, splits, RANK]``, float32 if there are several splits.
        lse: ``[B, S, H, splits]`` float32.
        scale: Factor of the dot products.
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
        CAUSAL: See there.
        WINDOWED: See there.
        ROWS: See there.
        KEYS: See there.
    """
    width: tl.constexpr = RANK + ROPE_GROUPS * ROPE_DIM
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
        None,
        None,
        output,
        lse,
        scale,
        0.0,
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
        0,
        0,
        16,
        False,
        0,
        CAUSAL,
        WINDOWED,
        False,
        ROWS,
        KEYS,
    )


@triton.jit(do_not_specialize=["room", "new", "heads"])
def partial_entry(
    q_latent: tl.tensor,
    q_rope: tl.tensor,
    rows: tl.tensor,
    lengths: tl.tensor,
    room: tl.tensor,
    new: tl.tensor,
    heads: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    RANK: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROPE_GROUPS: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Attend to one split of the keys, as :func:`decode_entry`, of which most arguments are constants here.

    Args:
        q_latent: ``[B, S, H, RANK]``.
        q_rope: ``[B, S, H, ROPE_DIM]``, rotated.
        rows: ``[B, T, RANK + ROPE_GROUPS * ROPE_DIM]``.
        lengths: ``[B]`` int32.
        room: ``T``.
        new: ``S``.
        heads: ``H``.
        partial: ``[B, S, H, SPLITS, RANK]`` float32.
        partial_lse: ``[B, S, H, SPLITS]`` float32.
        SCALE: Factor of the dot products.
        WINDOW: How many keys a query sees; 0 for all.
        SPLITS: In how many pieces the keys are cut.
        LEAST_TILES: See there; likewise all that follow.
        RANK: See there.
        WIDTHS: See there.
        ROPE_GROUPS: See there.
        ROPE_DIM: See there.
        ROPE_WIDTH: See there.
        CAUSAL: See there.
        ROWS: See there.
        KEYS: See there.
    """
    decode_entry(
        q_latent,
        q_rope,
        rows,
        lengths,
        partial,
        partial_lse,
        SCALE,
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
        CAUSAL,
        WINDOW > 0,
        ROWS,
        KEYS,
    )


@triton.jit
def combine_entry(
    partial: tl.tensor,
    partial_lse: tl.tensor,
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
        output: ``[B, S, H, RANK]``.
        RANK: See there.
        COLUMNS: See there.
        PARTS: How many splits there are.
        SPLITS: Power of two that holds ``PARTS``.
    """
    combine_kernel(partial, partial_lse, None, output, None, 1, PARTS, RANK, COLUMNS, SPLITS)


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
) -> None:
    """Write one new token's row: :func:`mla_compile.runtime.kernels.append.append_kernel`.

    Args:
        row: ``[B, S, RANK + ROPE_GROUPS * 2 * HALF]``, rope keys not rotated.
        cos: ``[B, S, ROPE_GROUPS, HALF]`` float32.
        sin: Like ``cos``.
        rows: The cache, which ``output`` is too.
        lengths: ``[B]`` int32.
        room: Rows of the cache, ``T``.
        new: ``S``.
        output: ``[B, T, RANK + ROPE_GROUPS * 2 * HALF]``.
        RANK: See there.
        WIDTH: See there.
        ROPE_GROUPS: See there.
        GROUPS: See there.
        HALF: See there.
        HALF_WIDTH: See there.
    """
    width: tl.constexpr = RANK + ROPE_GROUPS * 2 * HALF
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
        RANK,
        WIDTH,
        ROPE_GROUPS,
        GROUPS,
        HALF,
        HALF_WIDTH,
        0,
        16,
    )
