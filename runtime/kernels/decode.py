"""The Triton kernels of decoding: attention of a few query tokens to a latent cache, in splits, and their combination.

A program takes one sequence, one block of rows and one split of the keys. A row is a (query token, head): one token of
32 heads and 4 tokens of 8 heads are the same work, and a row's own token bounds what it sees. A tile of latents is
loaded once and is keys (transposed) and values.

``N`` keys of a tile, ``M`` rows of a block, ``r`` rank. A tile's columns are cut into ``WIDTHS``, powers of two that
together hold ``r``: 96 is 64 + 32, of which no column is wasted.

What other forms of this kernel cost, seen in the compiler's output (Triton 3.7.1, sm_90, 512 + 64, 32 keys):

* The page of the *next* tile is read one turn early and carried through the loop. Read where it is used, it is the page
  index that is pipelined, and one tile is buffered instead of two, whatever ``num_stages`` says: no load overlaps
  arithmetic.
* Scales per token multiply logits and weights (``M x N`` numbers), never the tile.
* Codes become half precision by assembly that is called impure, at most 256 columns at a time. What is pure is computed
  again for each of the tile's two products, of which only registers hold the tile: its loads are not asynchronous any
  more. 512 columns of int8 at once spill 504 bytes.
* A byte of int4 holds a column of the left half of a row and one of the right half: two blocks of columns, each a part
  of its own, and nothing is interleaved.
* Rope keys of several groups are one wide key, which meets queries that are zero outside their own group's slot. That
  is up to twice the multiplications and no more bytes; decoding is bound by bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine_kernel", "decode_kernel"]

# The interpreter's product of two bfloat16 blocks multiplies their bit patterns; it has no assembly either.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LOG2E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(float("-inf"))
# Else there would be kernels for one head, for 16 tokens and so on, which nobody compiled ahead of time.
_SIZES = ("scales_page", "table_row", "new", "heads", "window", "splits", "least_tiles")


# A name that is given a number inside a kernel holds a tensor from then on, so these stand where they are used.
@triton.constexpr_function
def _halves(codes: str) -> int:
    """Columns that a stored element holds."""
    return 2 if codes == "int4" else 1


@triton.constexpr_function
def _start(widths: tuple[int, ...], part: int) -> int:
    """First element of a part of what is stored."""
    return sum(widths[:part])


@triton.constexpr_function
def _width(widths: tuple[int, ...], part: int) -> int:
    """Elements that hold a part."""
    return widths[part]


@triton.constexpr_function
def _used(widths: tuple[int, ...], part: int, rank: int, half: int, halves: int) -> int:
    """Columns of a half of the rank that a part has; of the left half, which is no shorter, elements too."""
    left = -(-rank // halves)
    return min(widths[part], (rank - left if half else left) - sum(widths[:part]))


@triton.constexpr_function
def _column(widths: tuple[int, ...], part: int, rank: int, half: int, halves: int) -> int:
    """First column of a part of a half of the rank."""
    return half * -(-rank // halves) + sum(widths[:part])


@triton.jit
def _product(x: tl.tensor, y: tl.tensor, total: tl.tensor) -> tl.tensor:
    """``total + x y`` in float32; ``tf32x3`` keeps float32 operands' precision on tensor cores."""
    if _INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total)
    return tl.dot(x, y, total, input_precision="tf32x3")


@triton.jit
def _int8_to_half(x: tl.tensor) -> tl.tensor:
    """int8 as float16, exactly, four at a time: the half with bits ``0x6400 | (x ^ 0x80)`` is ``1152 + x``."""
    if _INTERPRETED:
        return x.to(tl.float16)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t, m;
        xor.b32 t, $2, 0x80808080;
        mov.b32 m, 0x64646464;
        prmt.b32 $0, t, m, 0x4140;
        prmt.b32 $1, t, m, 0x4342;
        mov.b32 m, 0x64806480;
        sub.f16x2 $0, $0, m;
        sub.f16x2 $1, $1, m;
        }""",
        "=&r,=&r,r",
        args=[x],
        dtype=tl.float16,
        is_pure=False,
        pack=4,
    )


@triton.jit
def _fp8_to_half(x: tl.tensor) -> tl.tensor:
    """The bytes of e4m3 numbers as float16, exactly, times 2 ** -8: its exponent has one bit more, and another bias.

    By bits and not by the instruction, for that came with compute capability 8.9.
    """
    if _INTERPRETED:
        wide = x.to(tl.uint16)
        return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 s, t, z;
        mov.b32 z, 0;
        prmt.b32 s, $2, z, 0x1404;
        shr.b32 t, s, 1;
        and.b32 t, t, 0x3F803F80;
        lop3.b32 $0, s, 0x80008000, t, 0xEA;
        prmt.b32 s, $2, z, 0x3424;
        shr.b32 t, s, 1;
        and.b32 t, t, 0x3F803F80;
        lop3.b32 $1, s, 0x80008000, t, 0xEA;
        }""",
        "=&r,=&r,r",
        args=[x],
        dtype=tl.float16,
        is_pure=False,
        pack=4,
    )


@triton.jit
def _int4_to_halves(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Low and high nibbles, less 8, as float16: the half with bits ``0x6400 | n`` is ``1024 + n``."""
    if _INTERPRETED:
        return (x & 15).to(tl.float16) - 8, (x >> 4).to(tl.float16) - 8
    low, high = tl.inline_asm_elementwise(
        """{
        .reg .b32 t, m, n;
        mov.b32 m, 0x64646464;
        mov.b32 n, 0x64086408;
        and.b32 t, $4, 0x0F0F0F0F;
        prmt.b32 $0, t, m, 0x4140;
        prmt.b32 $1, t, m, 0x4342;
        shr.b32 t, $4, 4;
        and.b32 t, t, 0x0F0F0F0F;
        prmt.b32 $2, t, m, 0x4140;
        prmt.b32 $3, t, m, 0x4342;
        sub.f16x2 $0, $0, n;
        sub.f16x2 $1, $1, n;
        sub.f16x2 $2, $2, n;
        sub.f16x2 $3, $3, n;
        }""",
        "=&r,=&r,=&r,=&r,r",
        args=[x],
        dtype=(tl.float16, tl.float16),
        is_pure=False,
        pack=4,
    )
    return low, high


@triton.jit
def _numbers(stored: tl.tensor, dtype: tl.constexpr, CODES: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Columns of what is stored, one block per half of the rank."""
    if CODES == "int4":
        low, high = _int4_to_halves(stored)
        return low.to(dtype), high.to(dtype)
    elif CODES == "fp8":
        return (_fp8_to_half(stored).to(dtype),)
    elif CODES == "int8":
        return (_int8_to_half(stored).to(dtype),)
    else:
        return (stored,)


@triton.jit
def _load(
    base: tl.tensor, place: tl.tensor, stride: tl.tensor, live: tl.tensor, WIDTH: tl.constexpr, USED: tl.constexpr
) -> tl.tensor:
    """``[places, WIDTH]`` numbers, of which ``USED`` columns are there; zero beyond them and where not ``live``."""
    column = tl.arange(0, WIDTH)
    pointers = base + place[:, None] * stride + column[None, :]
    if USED < WIDTH:
        return tl.load(pointers, mask=live[:, None] & (column < USED)[None, :], other=0)
    return tl.load(pointers, mask=live[:, None], other=0)


@triton.jit
def _per_row(
    base: tl.tensor,
    key: tl.tensor,
    stride: tl.tensor,
    live: tl.tensor,
    group: tl.tensor,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """``COUNT`` scales per key as ``[M, N]`` or ``[1, N]``, each row's own: by a product with one-hot rows."""
    if COUNT == 1:
        return tl.load(base + key * stride, mask=live, other=0).to(tl.float32)[None, :]
    else:  # the compiler reads on behind a return, and would find results of two shapes
        tile = _load(base, key, stride, live, WIDTH, COUNT)
        # By way of float32: the interpreter's cast of truths to bfloat16 is wrong.
        one_hot = (group[:, None] == tl.arange(0, WIDTH)[None, :]).to(tl.float32).to(tile.dtype)
        return _product(one_hot, tl.trans(tile), tl.zeros([group.shape[0], key.shape[0]], tl.float32))


@triton.jit
def _capped(x: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """``cap * tanh(x / cap)``, of which no part overflows."""
    small = tl.exp2(tl.abs(x) / cap * (-2 * _LOG2E))
    size = cap * (1 - small) / (1 + small)
    return tl.where(x < 0, -size, size)


@triton.jit(do_not_specialize=_SIZES)
def decode_kernel(
    q_latent: tl.tensor,
    q_rope: tl.tensor,
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
    sinks: tl.tensor,
    slopes: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
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
    PAGE: tl.constexpr,
    CODES: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Attend to one split of the keys.

    Args:
        q_latent: ``[B, S * H, r]``.
        q_rope: ``[B, S * H, ROPE_DIM]``, rotated.
        latent: ``[pages, PAGE, r]`` floats, or codes beside ``token_scales``, of int4 half as many bytes, of fp8 bytes;
            without a page table ``[B, T, ...]``.
        rest: ``[pages, PAGE, n * ROPE_DIM + m + w]``, what a row has behind its latent.
        token_scales: ``[pages, PAGE]`` float32, or None.
        page_table: ``[B, pages of a sequence]`` int32, or None.
        lengths: ``[B]`` int32, keys of every sequence, the new tokens' own among them.
        latent_page: Elements from one page of ``latent`` to the next; likewise the other strides.
        latent_row: From one row to the next.
        rest_page: From page to page.
        rest_row: From row to row.
        scales_page: From page to page.
        table_row: From one sequence's pages to the next's.
        sinks: ``[H]`` float32, or None; with several splits None too, for the combination adds them.
        slopes: ``[H]`` float32, or None.
        output: ``[B, S * H, splits, r]``: float32 partial results, or with one split the result.
        lse: ``[B, S * H, splits]`` float32, natural logarithm of the softmax denominators.
        scale: Factor of the dot products.
        softcap: Bound of the logits, if ``CAPPED``.
        new: ``S``.
        heads: ``H``.
        window: How many keys a query sees, if ``WINDOWED``; if ``CHUNKED``, how many a chunk has.
        splits: In how many pieces the keys are cut.
        least_tiles: Tiles a split has at least, so that short sequences fill fewer splits.
        RANK: ``r``.
        WIDTHS: Powers of two that together hold what is stored of ``r`` numbers.
        ROPE_GROUPS: ``n``.
        ROPE_DIM: Channels of a rope key; 0 for none.
        ROPE_WIDTH: Power of two that holds ``n * ROPE_DIM``.
        KEY_SCALES: ``m``.
        VALUE_SCALES: ``w``.
        SCALES_WIDTH: Power of two that holds the larger of both.
        SCALED_ROPE: Whether key scales multiply the rope product too.
        PAGE: Tokens of a page, a multiple of ``KEYS``; of no account without a page table.
        CODES: What latents are stored as, a :class:`~mla_compile.runtime.kernels.codes.Codes`, or an empty string.
        CAUSAL: Whether a row sees no key behind its own token's.
        WINDOWED: Whether there is a window.
        CHUNKED: Whether it does not slide: a row sees the keys of its own chunk, the first of which begins at key 0.
        CAPPED: Whether there is a soft-cap.
        ROWS: Rows of a block.
        KEYS: ``N``.
    """
    # Row blocks of one split run side by side: the second finds its latents in the L2 cache.
    block, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dtype = q_latent.dtype.element_ty
    length = tl.load(lengths + sequence)

    row = block * ROWS + tl.arange(0, ROWS)
    alive = row < new * heads
    head = row % heads
    position = length - new + row // heads
    first, end = 0, length
    if CAUSAL:
        end = tl.minimum(length, length - new + (block * ROWS + ROWS - 1) // heads + 1)
    if WINDOWED:
        reach = window
        oldest = length - new + block * ROWS // heads  # its first key comes before those of all other rows
        if CHUNKED:
            reach = (position % window + 1)[:, None]
            oldest = tl.maximum(oldest, 0)  # what lies before the first key is no query
            first = (oldest - oldest % window) // KEYS
        else:
            first = tl.maximum(oldest - window + 1, 0) // KEYS
    tiles = tl.maximum(tl.cdiv(end, KEYS) - first, 0)
    share = tl.maximum(tl.cdiv(tiles, splits), least_tiles)
    first_tile = first + split * share
    last_tile = tl.minimum(first_tile + share, first + tiles)

    queries, sums = (), ()
    # Queries may be more than 2 ** 31 numbers: a block's first is found in 64 bits, its others from there in 32.
    begin = sequence * new * heads + block * ROWS
    base = q_latent + begin * RANK
    for part in tl.static_range(len(WIDTHS)):
        for half in tl.static_range(_halves(CODES)):
            source = base + _column(WIDTHS, part, RANK, half, _halves(CODES))
            columns = _load(
                source,
                tl.arange(0, ROWS),
                RANK,
                alive,
                _width(WIDTHS, part),
                _used(WIDTHS, part, RANK, half, _halves(CODES)),
            )
            queries = queries + (columns,)
            sums = sums + (tl.zeros([ROWS, _width(WIDTHS, part)], tl.float32),)
    if ROPE_DIM > 0:
        column = tl.arange(0, ROPE_WIDTH)
        own = (column // ROPE_DIM)[None, :] == (head * ROPE_GROUPS // heads)[:, None]
        pointers = q_rope + (sequence * new * heads + row)[:, None] * ROPE_DIM + (column % ROPE_DIM)[None, :]
        turned = tl.load(pointers, mask=alive[:, None] & own, other=0)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=alive, other=0) * _LOG2E
    largest = tl.full([ROWS], _NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    page = sequence
    following = sequence
    if page_table is not None:
        table = page_table + sequence * table_row
        following = tl.load(table + first_tile * KEYS // PAGE, mask=first_tile < last_tile, other=0).to(tl.int64)
    for tile in tl.range(first_tile, last_tile):
        place = tile * KEYS
        if page_table is not None:
            page = following
            ahead = tl.load(table + (place + KEYS) // PAGE, mask=tile + 1 < last_tile, other=0)
            following = ahead.to(tl.int64)
            place = place % PAGE
        key = tile * KEYS + tl.arange(0, KEYS)
        there = key < end
        slot = tl.arange(0, KEYS)
        inside = latent + page * latent_page + place.to(tl.int64) * latent_row
        behind = rest + page * rest_page + place.to(tl.int64) * rest_row

        # Numbers behind the end may be NaN, which a weight of 0 would not hide: they are not read.
        latents = ()
        logits = tl.zeros([ROWS, KEYS], tl.float32)
        for part in tl.static_range(len(WIDTHS)):
            stored = _load(
                inside + _start(WIDTHS, part),
                slot,
                latent_row,
                there,
                _width(WIDTHS, part),
                _used(WIDTHS, part, RANK, 0, _halves(CODES)),
            )
            blocks = _numbers(stored, dtype, CODES)
            latents = latents + blocks
            for half in tl.static_range(_halves(CODES)):
                logits = _product(queries[part * _halves(CODES) + half], tl.trans(blocks[half]), logits)
        if token_scales is not None:
            token_scale = tl.load(token_scales + page * scales_page + place + slot, mask=there, other=0)[None, :]
            if CODES == "fp8":
                token_scale = token_scale * 256  # see _fp8_to_half
            logits = logits * token_scale
        if KEY_SCALES > 0:
            key_scale = _per_row(
                behind + ROPE_GROUPS * ROPE_DIM,
                slot,
                rest_row,
                there,
                head * KEY_SCALES // heads,
                KEY_SCALES,
                SCALES_WIDTH,
            )
            if not SCALED_ROPE:
                logits = logits * key_scale
        if ROPE_DIM > 0:
            rope = _load(behind, slot, rest_row, there, ROPE_WIDTH, ROPE_GROUPS * ROPE_DIM)
            logits = _product(turned, tl.trans(rope), logits)
        if SCALED_ROPE:
            logits = logits * key_scale

        if CAPPED:
            logits = _capped(logits * scale, softcap) * _LOG2E
        else:
            logits = logits * (scale * _LOG2E)
        distance = position[:, None] - key[None, :]
        if slopes is not None:
            logits = logits - slope[:, None] * distance
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (distance >= 0)
        if WINDOWED:
            seen = seen & (distance < reach)
        logits = tl.where(seen, logits, _NOTHING)

        larger = tl.maximum(largest, tl.max(logits, 1))
        origin = tl.where(larger == _NOTHING, 0, larger)  # a row that has seen nothing yet: exp2(-inf - 0) is 0
        fade = tl.exp2(largest - origin)
        weights = tl.exp2(logits - origin[:, None])
        total = total * fade + tl.sum(weights, 1)
        largest = larger
        if token_scales is not None:
            weights = weights * token_scale
        if VALUE_SCALES > 0:
            weights = weights * _per_row(
                behind + ROPE_GROUPS * ROPE_DIM + KEY_SCALES,
                slot,
                rest_row,
                there,
                head * VALUE_SCALES // heads,
                VALUE_SCALES,
                SCALES_WIDTH,
            )
        weights = weights.to(dtype)
        grown = ()
        for part in tl.static_range(len(latents)):
            grown = grown + (_product(weights, latents[part], sums[part] * fade[:, None]),)
        sums = grown

    fade = tl.full([ROWS], 1, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=alive, other=0) * _LOG2E
        larger = tl.maximum(largest, sink)
        origin = tl.where(larger == _NOTHING, 0, larger)  # neither a token was seen nor is there a sink
        fade = tl.exp2(largest - origin)
        total = total * fade + tl.exp2(sink - origin)
        largest = larger
    target = (sequence * new * heads + row) * splits + split
    some = total > 0
    divisor = tl.where(some, total, 1)
    for part in tl.static_range(len(WIDTHS)):
        for half in tl.static_range(_halves(CODES)):
            place = tl.arange(0, _width(WIDTHS, part))
            column = _column(WIDTHS, part, RANK, half, _halves(CODES)) + place
            result = (sums[part * _halves(CODES) + half] * (fade / divisor)[:, None]).to(output.dtype.element_ty)
            mask = alive[:, None] & (place < _used(WIDTHS, part, RANK, half, _halves(CODES)))[None, :]
            tl.store(output + target[:, None] * RANK + column[None, :], result, mask=mask)
    tl.store(lse + target, tl.where(some, (largest + tl.log2(divisor)) / _LOG2E, _NOTHING), mask=alive)


@triton.jit(do_not_specialize=["heads", "splits"])
def combine_kernel(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    sinks: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    heads: tl.tensor,
    splits: tl.tensor,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Combine the splits of one row: their results, weighted by their softmax denominators.

    Args:
        partial: ``[B * S * H, splits, r]`` float32.
        partial_lse: ``[B * S * H, splits]``; minus infinity for a split that saw nothing, whose result is not read.
        sinks: ``[H]`` float32, or None.
        output: ``[B * S * H, r]``.
        lse: ``[B * S * H]``, or None.
        heads: ``H``.
        splits: How many there are.
        RANK: ``r``.
        COLUMNS: How many columns a program combines.
        SPLITS: Power of two that holds ``splits``.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    parts = tl.load(partial_lse + row * splits + split, mask=split < splits, other=_NOTHING)
    largest = tl.max(parts, 0)
    if sinks is not None:
        sink = tl.load(sinks + row % heads)
        largest = tl.maximum(largest, sink)
    origin = tl.where(largest == _NOTHING, 0, largest)
    weights = tl.exp2((parts - origin) * _LOG2E)
    total = tl.sum(weights, 0)
    if sinks is not None:
        total += tl.exp2((sink - origin) * _LOG2E)
    some = total > 0
    divisor = tl.where(some, total, 1)
    pointers = partial + (row * splits + split)[:, None] * RANK + column[None, :]
    found = tl.load(pointers, mask=(parts > _NOTHING)[:, None] & (column < RANK)[None, :], other=0)
    result = tl.sum(found * weights[:, None], 0) / divisor
    tl.store(output + row * RANK + column, result.to(output.dtype.element_ty), mask=column < RANK)
    if lse is not None and tl.program_id(1) == 0:
        tl.store(lse + row, tl.where(some, origin + tl.log2(divisor) / _LOG2E, _NOTHING))
