"""The Triton kernels, interpreted on the CPU, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
from absorbed_cases import Problem, chunked_problems, expected, problems
from hypothesis import Phase, given, settings

from mla_compile.runtime.kernels import Codes, RowLayout, folded, launch
from mla_compile.runtime.kernels.decode import decode_kernel
from mla_compile.runtime.kernels.schedule import DecodeSpec, choose_tiles

F16, BF16 = torch.float16, torch.bfloat16
INT8, FP8, INT4 = Codes
# Relative to the largest result or 1. Weights and results are each rounded to the type (fp16 5e-4, bf16 4e-3 at most);
# in float32, sums of some hundred products and exponentials keep 5 digits.
TOLERANCE = {torch.float32: 2e-5, F16: 1.5e-3, BF16: 1.2e-2}
# Inputs are exact in every type, products of halves are exact in float32: logits are the same in all of them.
LSE = 2e-5

SHARED = RowLayout(64, 1, 16)
GROUPS = RowLayout(48, 3, 8)
SCALED = RowLayout(32, 2, 8, key_scales=2, value_scales=4)
KINDS = {
    "shared rope": Problem(SHARED, 8, lengths=(70, 9)),
    "no rope": Problem(RowLayout(64), 8),
    "rope per group": Problem(GROUPS, 9, dtype=F16),
    "rope per head": Problem(RowLayout(32, 16, 8), 16, page=16),
    "rank of three parts": Problem(RowLayout(576, 1, 16), 4, codes=INT8, dtype=F16),
    "rank of two parts": Problem(RowLayout(576, 1, 64), 16, page=64, dtype=BF16),
    "one padded part": Problem(RowLayout(24, 1, 2), 3),
    "128 heads": Problem(RowLayout(64, 1, 16), 128, dtype=F16),
    "64 tokens": Problem(SHARED, 2, new=64, lengths=(64, 100, 30), splits=2),
    "several row blocks and tokens": Problem(GROUPS, 6, new=25, lengths=(130, 26), page=32, dtype=F16),
    "no keys": Problem(SHARED, 4, new=2, lengths=(0, 1, 40), splits=2),
    "more splits than tiles": Problem(SHARED, 4, lengths=(3, 150), splits=5, page=16),
    "one key scale": Problem(RowLayout(32, 1, 8, key_scales=1), 4, dtype=BF16),
    "key and value scales": Problem(SCALED, 8, page=48, splits=2),
    "scaled rope": Problem(replace(SCALED, scaled_rope=True), 8, dtype=F16),
    "int8": Problem(SHARED, 8, codes=INT8, page=64, dtype=F16, splits=3),
    "int8 with scales in bfloat16": Problem(SCALED, 8, codes=INT8, dtype=BF16),
    "fp8": Problem(SHARED, 8, codes=FP8, page=64, dtype=F16, splits=3),
    "fp8 with scales in bfloat16": Problem(SCALED, 8, codes=FP8, dtype=BF16),
    "int4": Problem(RowLayout(96, 1, 16), 8, codes=INT4, page=64, dtype=F16, splits=3),
    "int4 of an odd rank": Problem(RowLayout(33, 3, 8), 9, codes=INT4, new=2),
    "int4 of two parts": Problem(RowLayout(576, 1, 16), 4, codes=INT4, dtype=BF16),
    "window": Problem(SHARED, 4, new=3, lengths=(100, 7, 2), window=20, splits=2),
    "chunks": Problem(SHARED, 4, new=3, lengths=(100, 7, 2), window=20, chunked=True, splits=2),
    "chunks, their first key": Problem(SHARED, 4, lengths=(65, 64, 1), window=32, chunked=True, page=16),
    "chunks, several of the new tokens": Problem(SHARED, 4, new=30, lengths=(100, 30, 9), window=7, chunked=True),
    "chunks, int8": Problem(SHARED, 8, codes=INT8, page=64, dtype=F16, window=50, chunked=True, splits=3),
    "softcap and sinks": Problem(SHARED, 4, softcap=3.0, sinks=True, lengths=(60, 0), splits=2),
    "sinks, one split": Problem(SHARED, 4, sinks=True, lengths=(60, 0), splits=1),
    "slopes": Problem(SHARED, 4, new=4, slopes=True, window=30),
    "not causal": Problem(SHARED, 4, new=20, lengths=(15, 33), causal=False),
}


def check(problem: Problem) -> None:
    x = problem.arguments()
    context, lse = launch.attend(**x, splits=problem.splits)
    exact, exact_lse = expected(**x)
    assert context.dtype == problem.dtype
    bound = max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(context.double(), exact, rtol=0, atol=TOLERANCE[problem.dtype] * bound)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=LSE)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_equals_the_reference(kind):
    check(KINDS[kind])


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in every third place of memory, with others between them."""
    return torch.stack([tensor, tensor + 5, tensor * 0 - 1], -1)[..., 0]


def test_lengths_and_pages_may_lie_anywhere():
    x = KINDS["rope per head"].arguments()
    exact, exact_lse = launch.attend(**x)
    table = x["cache"].page_table
    for lengths, pages in (
        (apart(x["lengths"]), table),
        (x["lengths"], apart(table)),
        (x["lengths"], table.T.contiguous().T),
    ):
        given = x | {"lengths": lengths, "cache": replace(x["cache"], page_table=pages)}
        assert not (lengths.is_contiguous() and pages.is_contiguous())
        got = launch.attend(**given)
        assert torch.equal(got[0], exact)
        assert torch.equal(got[1], exact_lse)


def test_one_length_may_be_all_sequences():
    problem = Problem(SHARED, 4, lengths=(20, 20, 20))
    x = problem.arguments()
    exact, _ = launch.attend(**x)
    got, _ = launch.attend(**x | {"lengths": x["lengths"][:1].expand(3)})
    assert torch.equal(got, exact)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_sink_of_no_weight_is_none(splits):
    x = Problem(SHARED, 4, lengths=(60, 0)).arguments()
    expected_context, expected_lse = launch.attend(**x, splits=splits)
    context, lse = launch.attend(**x | {"sinks": torch.full((4,), -torch.inf)}, splits=splits)
    assert torch.equal(context, expected_context)
    assert torch.equal(lse, expected_lse)


# Without shrinking: a smaller failure is not worth the minutes that the interpreter takes to find it.
@settings(max_examples=30, phases=[Phase.generate])
@given(problems(dtypes=(torch.float32, F16, BF16)))
def test_decode_equals_the_reference_anywhere(problem):
    check(problem)


@settings(max_examples=60, phases=[Phase.generate])
@given(chunked_problems(dtypes=(torch.float32, F16, BF16)))
def test_chunks_equal_the_reference_anywhere(problem):
    check(problem)


@pytest.mark.parametrize("chunked", [False, True])
def test_tiles_before_a_window_are_not_read(chunked):
    """The last two tokens see keys from 80 on, in a tile that begins at 64 or later."""
    x = Problem(SHARED, 4, new=2, lengths=(100,), window=20 if chunked else 19, chunked=chunked).arguments()
    exact, _ = expected(**x)
    x["cache"].latent[:, :64] = torch.nan
    for splits in (1, 3):
        context, _ = launch.attend(**x, splits=splits)
        torch.testing.assert_close(context.double(), exact, rtol=0, atol=TOLERANCE[torch.float32])


def test_queries_may_be_more_than_32_bits_count(monkeypatch):
    """The block that begins with number 2 ** 31 of the queries, alone, in memory of which only these pages exist."""
    heads, rank, window, billions = 128, 512, 16, 2**31
    rows = billions // rank
    new = rows // heads + 1
    spec = DecodeSpec(RowLayout(rank), heads, new, windowed=True)
    tiles = choose_tiles(spec, 90)

    # Before the queries are as many zeros, which an offset that wraps would find.
    queries = torch.from_numpy(np.zeros(2 * billions + tiles.rows * rank, np.float16))[billions:]
    output = torch.from_numpy(np.zeros(billions + tiles.rows * rank, np.float16))
    numbers = torch.Generator().manual_seed(0)
    asked = torch.randn(tiles.rows, rank, generator=numbers).div(8).to(F16)
    queries[billions : billions + asked.numel()] = asked.flatten()
    latent = torch.zeros(1, new, rank, dtype=F16)
    seen = latent[0, -window:] = torch.randn(window, rank, generator=numbers).to(F16)
    interpreter = triton.runtime.interpreter
    numbered = interpreter.interpreter_builder.create_get_program_id
    first = (rows // tiles.rows, 0, 0)
    monkeypatch.setattr(
        interpreter.interpreter_builder,
        "create_get_program_id",
        lambda axis: interpreter.TensorHandle(numbered(axis).data + first[axis], triton.language.int32),
    )
    # It would copy all memory onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    decode_kernel[1, 1, 1](
        queries,
        queries,
        latent,
        latent,
        None,
        None,
        torch.tensor([new], dtype=torch.int32),
        *(0, rank, 0, 0, 0, 0),
        None,
        None,
        output,
        torch.empty(rows + tiles.rows),
        *(1.0, 0.0, new, heads, window, 1, 1),
        **spec.constants(tiles),
    )
    exact = torch.softmax(asked.double() @ seen.double().T, -1) @ seen.double()
    got = output[billions : billions + asked.numel()].view(asked.shape).double()
    torch.testing.assert_close(got, exact, rtol=0, atol=TOLERANCE[F16] * max(1.0, float(exact.abs().max())))


ROTATED = RowLayout(24, 3, 4, key_scales=3, value_scales=1)
APPENDED = {
    "contiguous": Problem(ROTATED, 3, new=3, lengths=(37, 5, 1)),
    "pages, float16": Problem(ROTATED, 3, new=2, lengths=(37, 5), page=16, dtype=F16),
    "int8, bfloat16": Problem(ROTATED, 3, new=2, lengths=(37, 5), page=16, dtype=BF16, codes=INT8),
    "fp8": Problem(ROTATED, 3, new=3, lengths=(37, 5), codes=FP8),
    "fp8, pages, float16": Problem(RowLayout(320), 3, new=16, lengths=(37, 15), page=16, dtype=F16, codes=FP8),
    "int4": Problem(ROTATED, 3, new=3, lengths=(37, 5), codes=INT4),
    "int4 of an odd rank, bfloat16": Problem(RowLayout(33), 3, new=2, lengths=(37, 5), page=16, dtype=BF16, codes=INT4),
    "no rope": Problem(RowLayout(40), 3, lengths=(37, 5)),
}


@pytest.mark.parametrize("kind", APPENDED)
def test_append_writes_what_torch_writes(kind):
    """The CPU's form is tested against the graph operator; numbers may differ in their last bit, by order or fusing."""
    problem = APPENDED[kind]
    cache, lengths = problem.cache(), torch.tensor(problem.lengths, dtype=torch.int32)
    other = replace(problem).cache()
    shape, layout = (len(problem.lengths), problem.new), problem.layout
    row = problem.draw(*shape, layout.rank + layout.rest_width)
    angle = problem.draw(*shape, layout.rope_groups, layout.rope_dim // 2).float()
    launch.append(row, angle.cos(), angle.sin(), cache, lengths)
    folded.append(row, angle.cos(), angle.sin(), other, lengths)
    got, wanted = (c.latent.view(torch.uint8) if c.codes else c.latent.nan_to_num(7) for c in (cache, other))
    assert torch.equal(got, wanted)
    rounding = torch.finfo(problem.dtype).eps
    torch.testing.assert_close(cache.rest, other.rest, rtol=rounding, atol=rounding, equal_nan=True)
    if problem.codes:
        torch.testing.assert_close(cache.token_scales, other.token_scales, rtol=1e-6, atol=0, equal_nan=True)
