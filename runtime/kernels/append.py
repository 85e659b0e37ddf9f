"""The Triton kernel that appends new tokens to a latent cache: rotate rope keys, quantise, write, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["append_kernel"]


@triton.jit
def _rounded(x: tl.tensor) -> tl.tensor:
    """Halves to even, as torch's are: adding 1.5 * 2 ** 23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _fp8_bits(x: tl.tensor) -> tl.tensor:
    """The byte of the nearest e4m3 number, halves to even; ``x`` is no larger than 448.

    By bits and not by the instruction, for that came with compute capability 8.9.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 20 bits of the fraction are dropped, and the exponent's bias is 7 instead of 127.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    tiny = _rounded(tl.abs(x) * 512).to(tl.int32)  # below 2 ** -6 numbers are multiples of 2 ** -9
    return (tl.where(tl.abs(x) < 0.015625, tiny, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["scales_page", "table_row", "new"])
def append_kernel(
    row: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    latent: tl.tensor,
    rest: tl.tensor,
    token_scales: tl.tensor,
    page_table: tl.tensor,
    lengths: tl.tensor,
    latent_page: tl.tensor,
    latent_row: tl.tensor,
    rest_page: tl.tensor,
    rest_row: tl.tensor,
    scales_page: tl.tensor,
    table_row: tl.tensor,
    new: tl.tensor,
    PAGE: tl.constexpr,
    CODES: tl.constexpr,
    RANK: tl.constexpr,
    STORED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_WIDTH: tl.constexpr,
) -> None:
    """Write one new token's row.

    Args:
        row: ``[B, S, r + n * 2 * HALF + SCALES]``, rope keys not rotated.
        cos: ``[B, S, n, HALF]``.
        sin: Like ``cos``.
        latent: The cache, as :func:`mla_compile.runtime.kernels.decode.decode_kernel` reads it; likewise all to
            ``table_row``.
        rest: See there.
        token_scales: See there.
        page_table: See there.
        lengths: See there; a token before a sequence's first is not written.
        latent_page: See there.
        latent_row: See there.
        rest_page: See there.
        rest_row: See there.
        scales_page: See there.
        table_row: See there.
        new: ``S``.
        PAGE: Tokens of a page.
        CODES: See there.
        RANK: ``r``.
        STORED: Numbers or bytes that are stored of a latent.
        WIDTH: Power of two that holds ``STORED``.
        ROPE_GROUPS: ``n``.
        GROUPS: Power of two that holds ``n``.
        HALF: Half a rope key's channels; 0 for no rope keys.
        HALF_WIDTH: Power of two that holds ``HALF``.
        SCALES: Key and value scales of a row.
        SCALES_WIDTH: Power of two that holds them.
    """
    token, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.load(lengths + sequence) - new + token
    if place >= 0:
        page = sequence
        if page_table is not None:
            page = tl.load(page_table + sequence * table_row + place // PAGE).to(tl.int64)
            place = place % PAGE
        slot = place.to(tl.int64)
        source = row + (sequence * new + token) * (RANK + ROPE_GROUPS * 2 * HALF + SCALES)
        column = tl.arange(0, WIDTH)
        numbers = tl.load(source + column, mask=column < STORED, other=0)
        if CODES != "":
            exact = numbers.to(tl.float32)
            largest = tl.max(tl.abs(exact), 0)
            if CODES == "int4":
                right = tl.load(source + STORED + column, mask=column < RANK - STORED, other=0).to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(right), 0))
                step = largest / 7
            elif CODES == "fp8":
                step = largest / 448
            else:
                step = largest / 127
            tl.store(token_scales + page * scales_page + slot, step)
            divisor = tl.where(step > 0, step, 1)
            if CODES == "int4":
                low, high = _rounded(exact / divisor) + 8, _rounded(right / divisor) + 8
                # The right half of an odd rank is one shorter, and its last nibble is 0 as torch's.
                high = tl.where(column < RANK - STORED, high, 0)
                numbers = (low + 16 * high).to(tl.int32).to(tl.uint8)
            elif CODES == "fp8":
                numbers = _fp8_bits(exact / divisor)
            else:
                numbers = _rounded(exact / divisor).to(tl.int8)
        target = latent + page * latent_page + slot * latent_row + column
        tl.store(target, numbers.to(latent.dtype.element_ty), mask=column < STORED)

        behind = rest + page * rest_page + slot * rest_row
        if HALF > 0:
            group, channel = tl.arange(0, GROUPS)[:, None], tl.arange(0, HALF_WIDTH)[None, :]
            there = (group < ROPE_GROUPS) & (channel < HALF)
            turn = ((sequence * new + token) * ROPE_GROUPS + group) * HALF + channel
            c, s = tl.load(cos + turn, mask=there, other=0), tl.load(sin + turn, mask=there, other=0)
            key = group * (2 * HALF) + channel
            real = tl.load(source + RANK + key, mask=there, other=0)
            imaginary = tl.load(source + RANK + HALF + key, mask=there, other=0)
            kind = rest.dtype.element_ty
            tl.store(behind + key, (real * c - imaginary * s).to(kind), mask=there)
            tl.store(behind + HALF + key, (imaginary * c + real * s).to(kind), mask=there)
        if SCALES > 0:
            index = tl.arange(0, SCALES_WIDTH)
            scale = tl.load(source + RANK + ROPE_GROUPS * 2 * HALF + index, mask=index < SCALES, other=0)
            tl.store(behind + ROPE_GROUPS * 2 * HALF + index, scale.to(rest.dtype.element_ty), mask=index < SCALES)
