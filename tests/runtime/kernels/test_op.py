"""The operators on a latent cache as a CPU computes them, against the reference; shapes, gradients and refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from absorbed_cases import Problem, chunked_problems, expected, numbers_of, problems
from hypothesis import given, settings

from mla_compile.errors import UsageError
from mla_compile.runtime.attention import rotate_and_append
from mla_compile.runtime.kernels import Codes, LatentCache, RowLayout, append_latent, folded, latent_attention, op
from mla_compile.runtime.kernels.codes import decode, encode

# Both sides compute in float64 and differ in the order of additions only; denominators are told from shares in the
# oracle, which keeps 7 digits of them.
EXACT, LSE = {"rtol": 1e-10, "atol": 1e-11}, {"rtol": 0, "atol": 1e-6}
LAYOUT = RowLayout(16, 2, 8, key_scales=2, value_scales=4)
KINDS = {
    "plain": Problem(),
    "pages": Problem(page=16, new=3),
    "int8": Problem(codes=Codes.INT8, page=32),
    "fp8": Problem(codes=Codes.FP8),
    "int4": Problem(RowLayout(17, 1, 8), codes=Codes.INT4, page=16),
    "everything": Problem(LAYOUT, 4, new=2, window=9, softcap=2.0, sinks=True, slopes=True),
    "chunks": Problem(LAYOUT, 4, new=2, window=3, chunked=True, slopes=True),
    "no rope": Problem(RowLayout(16), 2),
    "not causal": Problem(new=4, causal=False),
}


@settings(max_examples=80)
@given(problems(dtypes=(torch.float64,)) | chunked_problems(dtypes=(torch.float64,)))
def test_equals_the_reference(problem):
    x = problem.arguments()
    context, lse = latent_attention(**x)
    exact, exact_lse = expected(**x)
    # float32 scales of codes are what the cache holds, exactly.
    torch.testing.assert_close(context, exact, **EXACT)
    torch.testing.assert_close(lse.double(), exact_lse, **LSE)
    alone, nothing = latent_attention(**x | {"return_lse": False})
    torch.testing.assert_close(alone, exact, **EXACT)
    assert nothing.numel() == 0


def test_reads_contiguous_rows_where_they_lie(monkeypatch):
    """Decoding on a CPU is bound by reading the cache, of which a copy would triple that."""
    x = replace(KINDS["plain"], lengths=(40, 40)).arguments() | {"return_lse": False}
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(folded.F, "scaled_dot_product_attention", lambda *a, **k: seen.append(a) or attend(*a, **k))
    latent_attention(**x)
    ((_, key, value),) = seen
    assert key.data_ptr() == value.data_ptr() == x["cache"].latent.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("codes", [None, *Codes])
def test_rows_begin_at_multiples_of_16_numbers(codes, dtype):
    """Which kernels that are compiled ahead of time are told; 16 bytes, the widest load, are no more."""
    for layout in (RowLayout(24, 3, 2, 3), RowLayout(32, 1, 8)):
        cache = LatentCache.empty(layout, 2, 5, dtype=dtype, codes=codes)
        strides = [stride for part in (cache.latent, cache.rest) for stride in part.stride()[:2]]
        assert [stride % 16 for stride in strides] == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codes", Codes)
def test_what_a_code_stands_for_is_rounded_once(codes, dtype):
    """As kernels do, whose scales are float32; oracle: the product in float64."""
    latent = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored, scale = encode(latent, codes)
    expected = torch.stack([numbers_of(row, 16) for row in stored]) * scale[:, None].double()
    assert torch.equal(decode(stored, scale, 16, dtype), expected.float().to(dtype))


def test_no_sequences_have_no_result():
    x = Problem().arguments()
    cache = LatentCache.empty(x["cache"].layout, 0, 40, dtype=torch.float32)
    none = {"cache": cache, "lengths": torch.zeros(0, dtype=torch.int32)}
    context, lse = latent_attention(**x | {"q_latent": x["q_latent"][:0], "q_rope": x["q_rope"][:0]} | none)
    assert (context.shape, lse.shape) == ((0, 1, 2, 16), (0, 1, 2))
    append_latent(torch.zeros(0, 1, 24), *[torch.zeros(0, 1, 1, 4)] * 2, cache, none["lengths"])


@pytest.mark.parametrize("page", [0, 16])
def test_more_rows_than_there_is_room_for_are_an_error(page):
    x = Problem(page=page).arguments()
    cache = x["cache"]
    lengths = torch.tensor([cache.capacity, cache.capacity + 1])
    message = f"has {cache.capacity + 1} rows, and the cache room for {cache.capacity}"
    for wanted in (False, True):
        with pytest.raises(ValueError, match=message):
            latent_attention(**x | {"lengths": lengths, "return_lse": wanted})
    before = cache.rest.clone()
    with pytest.raises(ValueError, match=message):
        append_latent(torch.zeros(2, 1, 24), *[torch.zeros(2, 1, 1, 4)] * 2, cache, lengths)
    torch.testing.assert_close(cache.rest, before, rtol=0, atol=0, equal_nan=True)


def test_parts_merge_by_their_denominators():
    """What the logarithms are for: attention to 40 keys is that to 25 and that to 15, weighted."""
    x = Problem(lengths=(40,), dtype=torch.float64).arguments()
    cache = x["cache"]
    parts = []
    for first, last in ((0, 25), (25, 40)):
        part = LatentCache(cache.layout, cache.latent[:, first:last], cache.rest[:, first:last])
        parts.append(latent_attention(**x | {"cache": part, "lengths": torch.tensor([last - first])}))
    weights = torch.stack([lse.double() for _, lse in parts]).softmax(0)
    merged = sum(weight[..., None] * context for weight, (context, _) in zip(weights, parts, strict=True))
    # The logarithms are float32.
    torch.testing.assert_close(merged, latent_attention(**x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind):
    """Logits of some 10 are products of halves here, which round to 5e-3: a hundredth of a weight."""
    x = replace(KINDS[kind], dtype=torch.float16).arguments()
    for wanted in (True, False):
        context, _ = latent_attention(**x | {"return_lse": wanted})
        assert context.dtype == torch.float16
        torch.testing.assert_close(context.double(), expected(**x)[0], rtol=0.02, atol=0.03)


@pytest.mark.parametrize("codes", [None, *Codes])
@pytest.mark.parametrize("page", [0, 16])
def test_appended_rows_are_those_of_the_graph_operator(page, codes):
    """Rotated as in a rewritten graph, at their place; codes within half a step of it."""
    problem = Problem(LAYOUT, 4, new=3, lengths=(37, 5, 1), page=page, codes=codes, dtype=torch.float64)
    cache, lengths = problem.cache(), torch.tensor(problem.lengths, dtype=torch.int32)
    row = problem.draw(3, 3, 16 + 16 + 2 + 4)
    angle = problem.draw(3, 3, 2, 4)
    before = torch.cat(cache.parts(torch.float64, 37), -1)
    append_latent(row, angle.cos(), angle.sin(), cache, lengths)
    query = torch.zeros(3, 3, 4, 8, dtype=torch.float64)
    _, exact = rotate_and_append(query, row, row[:, :0], angle.cos(), angle.sin(), 16)
    after = torch.cat(cache.parts(torch.float64, 37), -1)
    for sequence, length in enumerate(problem.lengths):
        count = min(3, length)
        old, new = after[sequence, : length - count], after[sequence, length - count : length]
        torch.testing.assert_close(old, before[sequence, : length - count], rtol=0, atol=0)
        torch.testing.assert_close(new[:, 16:], exact[sequence, 3 - count :, 16:], **EXACT)
        latent = exact[sequence, 3 - count :, :16]
        largest = latent.abs().amax(-1, keepdim=True)
        # The largest code; of fp8, 3 bits of fraction, and 2 ** -9 of the largest 448 where numbers are smallest.
        step = {None: 0 * largest, "int8": largest / 127, "int4": largest / 7}.get(codes)
        step = torch.maximum(latent.abs() / 8, largest / 448 / 512) if step is None else step
        assert ((new[:, :16] - latent).abs() <= 0.5001 * step + 1e-12).all()


@pytest.mark.parametrize("codes", Codes)
def test_a_row_of_zeros_has_codes(codes):
    cache = LatentCache.empty(RowLayout(16), 1, 4, dtype=torch.float32, codes=codes)
    angles = torch.empty(1, 1, 1, 0)
    append_latent(torch.zeros(1, 1, 16), angles, angles, cache, torch.tensor([1]))
    assert torch.equal(cache.parts(torch.float32, 1)[0], torch.zeros(1, 1, 16))


@pytest.mark.parametrize(
    ("kind", "training"), [*((kind, False) for kind in KINDS), ("pages", True), ("everything", True)]
)
def test_schema_shapes_and_registrations(kind, training):
    x = replace(KINDS[kind], lengths=(37, 37)).arguments()
    cache, names = x.pop("cache"), ("latent", "rest")
    if training:
        tensors = [x["q_latent"], x["q_rope"], *(getattr(cache, n) for n in names)]
        x["q_latent"], x["q_rope"], *parts = (
            t.detach().nan_to_num().requires_grad_(t.is_floating_point()) for t in tensors
        )
        cache = replace(cache, **dict(zip(names, parts, strict=True)))
    arguments = (
        *(x["q_latent"], x["q_rope"], cache.latent, cache.rest, cache.token_scales, cache.page_table),
        *(x["lengths"], x["sinks"], x["slopes"], *op._sizes(cache.layout)),
        *(x[name] for name in ("scale", "window", "softcap", "causal", "chunked", "return_lse")),
    )
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # The first compares arguments before and after by allclose, which torch's CPU has not for float8.
    torch.library.opcheck(op._attend_latent, arguments, test_utils=checks[kind == "fp8" :])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_slope(kind):
    problem = replace(KINDS[kind], lengths=(5, 3), new=2, dtype=torch.float64)
    x = problem.arguments()
    cache = x["cache"]
    names = ["q_latent", "q_rope", *(n for n in ("sinks", "slopes") if x[n] is not None)]
    parts = ["rest"] if problem.codes else ["latent", "rest"]
    values = [x[n].detach() for n in names] + [getattr(cache, n).nan_to_num() for n in parts]

    def attend(*values):
        given = dict(zip([*names, *parts], values, strict=True))
        memory = replace(cache, **{n: given.pop(n) for n in parts})
        return latent_attention(**x | given | {"cache": memory})[0]

    # The whole cache is perturbed, so the page that none owns has a gradient of 0.
    assert torch.autograd.gradcheck(attend, [v.clone().requires_grad_() for v in values], fast_mode=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q_latent": torch.zeros(2, 1, 2, 15)}, r"q_latent has shape \[2, 1, 2, 15\]"),
        ({"q_rope": None}, r"q_rope \[2, 1, 2, 0\], but rows have a latent of 16 and rope keys of 8"),
        ({"lengths": torch.tensor([3])}, "has 2 sequences and lengths has shape"),
        ({"q_rope": torch.zeros(2, 1, 2, 8).half()}, "several types: torch.float16, torch.float32"),
        ({"window": -1}, "window is -1"),
        ({"softcap": -1.0}, "softcap -1"),
        ({"chunked": True}, r"Chunks have no length\. Pass it as window, or chunked=False"),
        ({"causal": False, "window": 4}, "neither a window nor slopes"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \[3\]. Pass one number for each of 2 heads"),
        ({"cache": Problem(RowLayout(16, 1, 8, key_scales=3)).cache()}, "key_scales is 3, which does not divide 2"),
        ({"cache": Problem(page=40).cache()}, "A page has 40 tokens. Pass a multiple of 16"),
    ],
)
def test_misuse_is_an_error(changed, message):
    with pytest.raises(ValueError, match=message):
        latent_attention(**Problem().arguments() | changed)


def test_rows_that_are_none_are_an_error():
    with pytest.raises(ValueError, match="sizes that no row has"):
        RowLayout(0)
    with pytest.raises(ValueError, match="key scales that the rows do not have"):
        RowLayout(16, scaled_rope=True)
    cache = Problem().cache()
    with pytest.raises(ValueError, match="A new row has 7 numbers, but a cached one 24"):
        append_latent(torch.zeros(2, 1, 7), *[torch.zeros(2, 1, 1, 4)] * 2, cache, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"cos has shape \[2, 1, 1, 3\]"):
        append_latent(torch.zeros(2, 1, 24), *[torch.zeros(2, 1, 1, 3)] * 2, cache, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"cannot be stored as 'int3'\. Pass int8, fp8, int4, or None"):
        LatentCache.empty(RowLayout(16), 1, 4, dtype=torch.float32, codes="int3")
    x = Problem().arguments()
    with pytest.raises(ValueError, match=r"Pass token scales with latents of torch.int8, .* only"):
        latent_attention(**x | {"cache": replace(x["cache"], token_scales=torch.zeros(2, 40))})


def test_without_triton_only_cuda_is_missed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    op._kernels.cache_clear()
    with pytest.raises(UsageError, match=r"needs Triton, which is not installed\. Install it with: pip"):
        op._kernels()


def test_the_operators_import_no_triton():
    code = "import sys, mla_compile.runtime.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
