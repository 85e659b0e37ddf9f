"""How problems are cut: every key and column once, tiles that fit, splits that pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_compile.errors import UsageError
from mla_compile.runtime.kernels import Codes, RowLayout
from mla_compile.runtime.kernels.schedule import DecodeSpec, choose_splits, choose_tiles, cut_rank, shared_bytes

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# What a block may use, of NVIDIA's table of compute capabilities: 163, 99 and 227 KiB.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
HOPPER = 132


@pytest.mark.parametrize(
    ("rank", "widths"),
    [
        *((n, (n,)) for n in (16, 32, 64, 128, 256, 512)),
        *((96, (64, 32)), (160, (128, 32)), (576, (512, 64)), (384, (256, 128))),
        *((1, (16,)), (24, (32,)), (48, (64,)), (80, (64, 32)), (100, (128,)), (112, (128,)), (528, (512, 32))),
    ],
)
def test_ranks_of_two_powers_waste_little(rank, widths):
    assert cut_rank(rank, 512) == widths


@given(st.integers(1, 2048), st.sampled_from([256, 512]))
def test_parts_hold_the_rank(rank, widest):
    widths = cut_rank(rank, widest)
    assert all(width & (width - 1) == 0 and 16 <= width <= widest for width in widths)
    assert list(widths) == sorted(widths, reverse=True)
    assert sum(widths[:-1]) < rank <= sum(widths), "the last part holds something, and all hold everything"


@given(
    st.integers(1, 576),
    st.sampled_from([(1, 0), (1, 64), (8, 16), (3, 8)]),
    st.sampled_from([1, 9, 32, 128]),
    st.integers(1, 64),
    st.sampled_from([0, 16, 48, 64, 256]),
    st.sampled_from([None, *Codes]),
    st.sampled_from(ARCHITECTURES),
)
def test_tiles_fit(rank, rope, heads, new, page, codes, architecture):
    spec = DecodeSpec(RowLayout(rank, *rope), heads, new, 2, codes, page)
    tiles = choose_tiles(spec, architecture)
    assert shared_bytes(spec, tiles) <= SHARED[architecture] * 1024
    assert page % tiles.keys == 0
    assert tiles.rows >= min(16, spec.rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_fits(architecture):
    spec = DecodeSpec(RowLayout(512, 1, 64), 32, itemsize=4)
    assert shared_bytes(spec, choose_tiles(spec, architecture)) <= SHARED[architecture] * 1024


def test_a_row_that_is_too_wide_is_an_error():
    with pytest.raises(ValueError, match=r"Latents of 4096 .* capability 8.6. Convert to a smaller rank"):
        choose_tiles(DecodeSpec(RowLayout(4096), 32), 86)


@pytest.mark.parametrize("architecture", [70, 75])
def test_an_older_gpu_is_an_error(architecture):
    has = architecture / 10
    with pytest.raises(UsageError, match=rf"need a GPU of compute capability 8.0 or later, and this one has {has}\."):
        choose_tiles(DecodeSpec(RowLayout(512, 1, 64), 32), architecture)


@pytest.mark.parametrize(
    ("batch", "blocks", "rows", "tokens", "splits"),
    [
        (1, 1, 32, 512, 1),  # too short to cut
        (1, 1, 32, 4096, 8),  # 512 tokens each: more would cost more in partial results than they save
        (32, 1, 32, 4096, 4),  # 128 programs in one turn; 5 pieces would need a second turn
        (128, 1, 32, 4096, 1),  # the batch alone fills the processors
        (132, 1, 32, 65536, 1),
        (1, 1, 9, 65536, 132),
        (66, 1, 32, 8192, 2),
        (0, 0, 0, 65536, 1),
        (100, 1, 32, 65536, 13),  # whole sequences would leave 32 of 132 processors idle; 10 turns of 130 pieces do not
    ],
)
def test_splits_fill_the_processors(batch, blocks, rows, tokens, splits):
    assert choose_splits(batch, blocks, rows, tokens, HOPPER) == splits


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 128), st.integers(1, 200_000), st.integers(1, 200))
def test_splits_keep_their_partial_results_small(batch, blocks, rows, tokens, processors):
    """At rank 512 in halves a split of 16 tokens per row writes and reads a fifth of what it caches."""
    splits = choose_splits(batch, blocks, rows, tokens, processors)
    assert splits >= 1
    assert splits == 1 or tokens / splits >= 16 * rows


@pytest.mark.parametrize(("heads", "new", "rows"), [(9, 1, 16), (32, 1, 32), (128, 1, 64), (32, 4, 64), (1, 1, 16)])
def test_rows_are_tokens_times_heads(heads, new, rows):
    assert choose_tiles(DecodeSpec(RowLayout(512, 1, 64), heads, new), 90).rows == rows


def test_a_short_sequence_fills_few_splits():
    spec = DecodeSpec(RowLayout(512, 1, 64), 32, page=64)
    tiles = choose_tiles(spec, 90)
    assert spec.least_tiles(tiles) * tiles.keys >= 512
