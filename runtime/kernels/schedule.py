"""How a problem is cut into programs: columns of a tile, blocks of rows, tiles and splits of keys. Pure arithmetic."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import product

from mla_compile.errors import UsageError
from mla_compile.runtime.kernels.cache import RowLayout
from mla_compile.runtime.kernels.codes import Codes

__all__ = [
    "TOKENS_PER_ROW",
    "DecodeSpec",
    "Tiles",
    "append_constants",
    "choose_splits",
    "choose_tiles",
    "combine_constants",
    "cut_rank",
    "power_of_two",
    "shared_bytes",
]

_LEAST = 16
"""Rows, columns and keys that a product of blocks has at least."""
TOKENS_PER_ROW = 16
"""A split's tokens per row: at 32 rows and rank 512, partial results of 512 tokens' split are a fifth of its cache."""


_SHARED = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 120: 101376}
"""Bytes of shared memory that a block may use, from this compute capability to the next (CUDA C guide, table 30)."""


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """What a decode kernel is compiled for.

    Attributes:
        layout: The cache's rows.
        heads: Query heads ``H``.
        new: Query tokens ``S``.
        itemsize: Bytes of one of the queries' numbers.
        codes: What latents are stored as; None for numbers like the queries'.
        page: Tokens of a page; 0 for a contiguous cache.
        causal: Whether a query sees no key behind its own.
        windowed: Whether there is a window.
        capped: Whether there is a soft-cap.
        chunked: Whether the window does not slide (only beside ``windowed``).
    """

    layout: RowLayout
    heads: int
    new: int = 1
    itemsize: int = 2
    codes: Codes | None = None
    page: int = 0
    causal: bool = True
    windowed: bool = False
    capped: bool = False
    chunked: bool = False

    @property
    def rows(self) -> int:
        """Pairs of query token and head."""
        return self.new * self.heads

    @property
    def stored(self) -> int:
        """What is stored of a latent: numbers, or bytes of codes."""
        return self.layout.rank if self.codes is None else self.codes.stored(self.layout.rank)

    def least_tiles(self, tiles: Tiles) -> int:
        """Tiles of keys that a split has at least."""
        return -(-TOKENS_PER_ROW * self.rows // tiles.keys)

    def constants(self, tiles: Tiles) -> dict[str, object]:
        """The kernel's compile-time arguments."""
        layout = self.layout
        return {
            "RANK": layout.rank,
            "WIDTHS": tiles.widths,
            "ROPE_GROUPS": layout.rope_groups,
            "ROPE_DIM": layout.rope_dim,
            "ROPE_WIDTH": tiles.rope_width,
            "KEY_SCALES": layout.key_scales,
            "VALUE_SCALES": layout.value_scales,
            "SCALES_WIDTH": power_of_two(max(layout.key_scales, layout.value_scales)),
            "SCALED_ROPE": layout.scaled_rope,
            "PAGE": self.page,
            "CODES": "" if self.codes is None else self.codes.value,
            # The only query token is the last key: it has none to hide.
            "CAUSAL": self.causal and self.new > 1,
            "WINDOWED": self.windowed,
            "CHUNKED": self.chunked,
            "CAPPED": self.capped,
            "ROWS": tiles.rows,
            "KEYS": tiles.keys,
        }


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program works on, and with how many threads.

    Attributes:
        widths: Powers of two that together hold what is stored of a latent.
        rope_width: Power of two that holds all rope keys; 0 without any.
        rows: Rows of a block.
        keys: Keys of a tile.
        warps: Groups of 32 threads.
        stages: Depth of the load pipeline; a tile is buffered ``stages - 1`` times.
    """

    widths: tuple[int, ...]
    rope_width: int
    rows: int
    keys: int
    warps: int
    stages: int


def power_of_two(number: int) -> int:
    """The smallest power of two that is no less than ``number``, and at least 16."""
    return max(_LEAST, 1 << (number - 1).bit_length())


def cut_rank(rank: int, widest: int) -> tuple[int, ...]:
    """Powers of two in falling order that hold the rank: 96 is 64 + 32.

    No part beside another is narrower than 32, where threads would repeat each other's products: 48 is 64, of which 16
    columns are not loaded.

    Args:
        rank: Columns to hold.
        widest: Power of two that no part exceeds.
    """
    widths = []
    while rank > widest:
        widths.append(widest)
        rank -= widest
    whole = power_of_two(rank)
    half, remainder = whole // 2, max(32, power_of_two(max(1, rank - whole // 2)))
    if half >= 64 and half < rank and half + remainder < whole:
        return (*widths, half, remainder)
    return (*widths, max(32, whole) if widths else whole)


def shared_bytes(spec: DecodeSpec, tiles: Tiles) -> int:
    """Shared memory that a block of the decode kernel needs: in halves what the compiler allots, or a little more.

    The queries, one block of weights, ``stages - 1`` tiles under way (as many as ``stages`` in blocks of 64 rows, whose
    products read the tile in use from there too), and that in use as halves if it comes as codes. Products of float32
    numbers come in three parts, copies of which take some more.
    """
    stored, size = sum(tiles.widths), spec.itemsize
    columns = stored if spec.codes is None else stored * spec.codes.halves
    several = [n for n in (spec.layout.key_scales, spec.layout.value_scales) if n > 1]
    beside = tiles.rope_width + sum(map(power_of_two, several))
    key = (stored * size if spec.codes is None else stored + 4) + beside * size
    buffers = tiles.stages if tiles.rows == 64 else tiles.stages - 1
    converted = 0 if spec.codes is None else tiles.keys * columns * size
    queries = tiles.rows * (columns + beside) * size
    copies = 16384 if size > 2 else 0
    return buffers * tiles.keys * key + converted + queries + tiles.rows * tiles.keys * size + copies


@functools.cache
def choose_tiles(spec: DecodeSpec, architecture: int) -> Tiles:
    """The largest tiles that a block's registers and shared memory hold.

    What registers do not hold was found by compiling: 64 rows but for Hopper's own products of halves, 64 keys of 512
    codes, of codes in several parts (96 is 64 + 32) or with scales per head, 512 bytes of codes or 256 of float32 at
    once. Blocks of 4 warps leave room for a second one beside them, whose arithmetic fills the pauses of the first.

    Args:
        spec: The kernel.
        architecture: Compute capability, as 90 for 9.0.

    Raises:
        UsageError: The GPU is older than the kernels can use.
        ValueError: A row is too wide for any tile.
    """
    if architecture < min(_SHARED):
        raise UsageError(
            f"The kernels need a GPU of compute capability {min(_SHARED) / 10} or later, and this one has "
            f"{architecture / 10}.",
            "Use another GPU, or pass tensors on the CPU.",
        )
    layout, exact = spec.layout, spec.itemsize > 2
    widths = cut_rank(spec.stored, 128 if exact else 512 if spec.codes is None else 256)
    columns = sum(widths) * (1 if spec.codes is None else spec.codes.halves)
    rope_width = power_of_two(layout.rope_width) if layout.rope_dim else 0
    shared = _SHARED[max(a for a in _SHARED if a <= architecture)]
    most_rows = 16 if exact else 64 if architecture == 90 and spec.codes is None else 32
    scaled = layout.key_scales + layout.value_scales > 0
    several_codes = spec.codes is not None and (layout.rank > 256 or len(widths) > 1)
    most_keys = 16 if exact else 32 if scaled or several_codes else 64
    for rows in (r for r in (64, 32, 16) if r <= min(most_rows, power_of_two(spec.rows))):
        warps = 8 if exact or rows * (columns + rope_width) > 16 * 576 else 4
        fitting = [k for k in (64, 32, 16) if k <= most_keys and spec.page % k == 0]
        for room, stages, keys in product((shared * warps // 8, shared), (2,) if exact else (3, 2), fitting):
            tiles = Tiles(widths, rope_width, rows, keys, warps, stages)
            if shared_bytes(spec, tiles) <= room:
                return tiles
    raise ValueError(
        f"Latents of {layout.rank} and rope keys of {layout.rope_width} numbers do not fit into the {shared} bytes of "
        f"shared memory of compute capability {architecture / 10}. Convert to a smaller rank."
    )


@functools.cache
def choose_splits(batch: int, blocks: int, rows: int, tokens: int, processors: int) -> int:
    """How many pieces to cut every sequence's keys into, so that all processors work and partial results stay small.

    The time of ``s`` pieces is that of their turns on the processors, each as long as a piece and what it costs beyond
    its keys: to begin, and to write and read partial results. Of several best the fewest is taken.

    Args:
        batch: Sequences.
        blocks: Blocks of rows per sequence.
        rows: Query tokens times heads.
        tokens: Keys of the longest sequence.
        processors: Streaming multiprocessors.
    """
    least = TOKENS_PER_ROW * max(1, rows)
    most = max(1, min(tokens // least, processors))

    def time(splits: int) -> int:
        turns = -(-batch * blocks * splits // processors)
        return turns * (-(-tokens // splits) + (least // 4 if splits > 1 else 0))

    return min(range(1, most + 1), key=time)


def append_constants(layout: RowLayout, page: int, codes: Codes | None = None) -> dict[str, object]:
    """The append kernel's compile-time arguments for pages of so many tokens, or 0."""
    stored = layout.rank if codes is None else codes.stored(layout.rank)
    half, scales = layout.rope_dim // 2, layout.key_scales + layout.value_scales
    return {
        "PAGE": page,
        "CODES": "" if codes is None else codes.value,
        "RANK": layout.rank,
        "STORED": stored,
        "WIDTH": power_of_two(stored),
        "ROPE_GROUPS": layout.rope_groups,
        "GROUPS": power_of_two(layout.rope_groups),
        "HALF": half,
        "HALF_WIDTH": power_of_two(half),
        "SCALES": scales,
        "SCALES_WIDTH": power_of_two(scales),
    }


def combine_constants(rank: int, splits: int) -> dict[str, int]:
    """The combination's compile-time arguments; a thread of four warps holds 32 numbers or less."""
    padded = 1 << (splits - 1).bit_length()
    return {"RANK": rank, "COLUMNS": min(power_of_two(rank), max(16, 4096 // padded)), "SPLITS": padded}
