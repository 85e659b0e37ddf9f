"""``mla::latent_attention`` in both of its forms and ``mla::cached_attention``, against the reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latent_cases import CachedCase, Case, cases, problems

from mla_compile.runtime import ops, reference
from mla_compile.runtime.attention import rotate_and_append
from mla_compile.runtime.masks import kept_rows, score_mask, visible_keys

# Both sides compute in float64 and differ in the order of additions only: some 1e-15 per number of size one.
EXACT = {"rtol": 1e-10, "atol": 1e-11}
# Gradients of sums over the whole output are larger, and so is their rounding.
GRADIENT = {"rtol": 1e-9, "atol": 1e-10}
KINDS = {
    "no rope": Case(half=0, rope_groups=1),
    "all rope": Case(nope=0),
    "decoding": Case(new=1, past=6),
    "prefill": Case(new=6, past=0),
    "window": Case(window=2),
    "one key scale": Case(key_scales=1),
    "key scales, decoding": Case(key_scales=2, new=1, past=6),
    "key scales, no rope": Case(key_scales=4, half=0),
    "one value scale": Case(value_scales=1),
    "value scales, decoding": Case(value_scales=4, new=1, past=6),
    "both scales, no rope": Case(key_scales=4, value_scales=2, half=0),
    "scaled rope": Case(key_scales=2, rope_groups=1, scaled_rope=True),
    "scaled rope, decoding": Case(key_scales=2, rope_groups=1, scaled_rope=True, new=1, past=6),
    "scaled rope, groups": Case(key_scales=4, value_scales=1, scaled_rope=True),
    "scaled rope, all rope": Case(key_scales=1, nope=0, scaled_rope=True),
    "softcap": Case(softcap=1.5),
    "slopes": Case(slopes=True),
    "sinks": Case(sinks=True),
    "sinks, decoding": Case(sinks=True, new=1, past=6),
    "chunks": Case(window=3, chunked=True),
    "everything": Case(key_scales=2, value_scales=2, softcap=1.5, slopes=True, sinks=True, window=3),
    "everything, decoding": Case(
        key_scales=2, value_scales=1, softcap=1.5, slopes=True, sinks=True, window=3, new=1, past=6
    ),
    "scaled rope and everything": Case(
        key_scales=2, value_scales=2, softcap=1.5, slopes=True, sinks=True, window=3, scaled_rope=True
    ),
    "cached": CachedCase(),
    "cached, decoding": CachedCase(new=1, past=6, kv_heads=1),
    "cached, everything": CachedCase(softcap=1.5, slopes=True, sinks=True, window=3),
    "cached, sinks and slopes": CachedCase(slopes=True, sinks=True),
}
TRAINED = ("no rope", "window", "scaled rope", "everything", "cached, everything")


def form(name):
    """One of the two forms as a function of the operator's arguments."""

    def attend(
        query,
        row,
        past,
        attention_mask,
        cos,
        sin,
        key_up,
        value_up,
        scale,
        window,
        softcap,
        value_scales,
        scaled_rope,
        chunked,
        sinks=None,
        slopes=None,
    ):
        query, rows = rotate_and_append(query, row, past, cos, sin, key_up.shape[2])
        mask = score_mask(attention_mask, query.shape[1], window, slopes, query.dtype, chunked, rows.shape[1])
        return getattr(ops, name)(
            query, rows, mask, key_up, value_up, cos.shape[2], sinks, scale, softcap, value_scales, scaled_rope
        )

    return attend


@given(problems)
def test_equals_the_reference(case):
    x = case.tensors()
    got, cache = case.operator(**x, **case.settings())
    expected, expected_cache = case.expected(x)
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(cache, expected_cache, **EXACT)


@pytest.mark.parametrize("attend", [form("attend_folded"), form("attend_unfolded")], ids=["folded", "unfolded"])
@given(cases())
def test_both_forms_equal_the_reference(attend, case: Case):
    x = case.tensors()
    torch.testing.assert_close(attend(**x, **case.settings()), case.expected(x)[0], **EXACT)


@pytest.mark.parametrize(("case", "folds"), [(Case(new=1, past=60), True), (Case(new=60, past=0, rank=30), False)])
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"key_scales": 2},
        {"key_scales": 2, "scaled_rope": True},
        {"value_scales": 2},
        {"softcap": 1.0},
        {"sinks": True, "slopes": True},
    ],
)
def test_takes_the_cheaper_form(case, folds, features, monkeypatch):
    """One query over many keys must not expand them; many queries must not carry a wide latent."""
    case = replace(case, rank=case.rank if not folds else 2, nope=8, half=1, **features)
    other = "attend_unfolded" if folds else "attend_folded"
    monkeypatch.setattr(ops, other, None)
    case.operator(**case.tensors(), **case.settings())


@given(cases())
def test_sees_the_keys_the_reference_sees(case: Case):
    mask = case.mask(case.past + case.new)
    got = visible_keys(mask, case.new, case.window, case.chunked)
    assert torch.equal(got, reference.visible_keys(mask, case.new, case.window or None, case.chunked))


@given(problems, st.data())
def test_chunks_equal_the_whole(case, data):
    """Every token may be fed in a call of its own or together with its neighbours."""
    x, settings = case.tensors(), case.settings()
    expected, expected_cache = case.operator(**x, **settings)
    outputs, cache, done = [], x["past"], 0
    while done < case.new:
        size = data.draw(st.integers(1, case.new - done))
        part = {name: x[name][:, done : done + size] for name in case.PER_TOKEN}
        mask = x["attention_mask"][:, : case.past + done + size]
        output, cache = case.operator(**x | part | {"past": cache, "attention_mask": mask}, **settings)
        outputs.append(output)
        done += size
    # A padding row behind real ones takes up room in a window's cache; what padding itself sees is nobody's business.
    mine = x["attention_mask"][:, case.past :] != 0 if case.window else slice(None)
    torch.testing.assert_close(torch.cat(outputs, 1)[mine], expected[mine], **EXACT)
    torch.testing.assert_close(cache, expected_cache, **EXACT)


@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 6))
def test_a_window_keeps_what_later_tokens_see(window, past, new):
    case = CachedCase(window=window, past=past, new=new + 1, padding=((0, 0), (2, 0)))
    x = case.tensors()
    _, cache = case.operator(**x, **case.settings())
    rows = torch.cat([x["past"], x["row"]], 1)
    kept = min(past + new + 1, window - 1)
    assert cache.shape[1] == kept == kept_rows(past + new + 1, window)
    assert torch.equal(cache, rows[:, rows.shape[1] - kept :])
    assert cache.untyped_storage().nbytes() == cache.nbytes  # no view that keeps the other rows alive


@given(problems, st.integers(0, 2**16))
def test_padding_and_later_tokens_are_not_read(case, seed):
    """Whatever stands in rows no query may see, the outputs of real tokens are the same."""
    x = case.tensors()
    expected, _ = case.operator(**x, **case.settings())
    real = x["attention_mask"] != 0
    noise = 1e3 * torch.randn(case.batch, case.past + case.new, 1, generator=torch.Generator().manual_seed(seed))
    noise = (noise * ~real[..., None]).double()
    kept = x["past"].shape[1]
    changed = {"past": x["past"] + noise[:, case.past - kept : case.past], "row": x["row"] + noise[:, case.past :]}
    got, _ = case.operator(**x | changed, **case.settings())
    mine = real[:, case.past :]
    torch.testing.assert_close(got[mine], expected[mine], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_padding_alone_are_finite(kind):
    case = replace(KINDS[kind], padding=((0, 7), (7, 0)))
    output, cache = case.operator(**case.tensors(), **case.settings())
    assert output.isfinite().all()
    assert cache.isfinite().all()


@pytest.mark.parametrize("case", [Case(), CachedCase()], ids=["latent", "cached"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_mask": torch.ones(2, 6).long()}, "covers 6 tokens, of which 4 are new, but 3 are cached. Pass"),
        ({"attention_mask": torch.ones(2, 8).long()}, "covers 8 tokens, of which 4 are new, but 3 are cached. Pass"),
        ({"attention_mask": torch.ones(1, 7).long()}, "2 sequences of queries.* 1 in attention_mask. Pass as many"),
        ({"sinks": torch.ones(3)}, r"sinks has shape \[3\]. Pass one number for each of 4 heads"),
        ({"slopes": torch.ones(4, 1)}, r"slopes has shape \[4, 1\]. Pass one number for each of 4 heads"),
        ({"window": 3}, "3 are cached for a window of 3"),
        ({"window": -1}, "window is -1"),
        ({"softcap": -0.5}, "softcap -0.5"),
        ({"past": torch.ones(2, 3, 99)}, "but a cached one 99"),
    ],
)
def test_misuse_is_an_error(case, changed, message):
    with pytest.raises(ValueError, match=message):
        case.operator(**case.tensors() | case.settings() | changed)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(key_scales=3), "A row of 16 numbers leaves 3 for key scales .* divides 4 heads"),
        (Case(key_scales=-1), "leaves -1 for key scales"),
        (Case(value_scales=3), "3 value scales do not divide 4 heads"),
        (replace(Case(key_scales=-2), value_scales=2), "leaves -2 for key scales"),
        (Case(scaled_rope=True), "key scales that the rows do not have"),
        (Case(value_scales=2, scaled_rope=True), "key scales that the rows do not have"),
        (CachedCase(kv_heads=3), "3 key/value heads do not divide 4 query heads"),
        (CachedCase(v_dim=0), "A row of 10 numbers does not hold 2 keys of 5 and as many values"),
    ],
)
def test_rows_of_another_width_are_an_error(case, message):
    with pytest.raises(ValueError, match=message):
        case.operator(**case.tensors() | case.settings())


@pytest.mark.parametrize(
    ("kind", "training"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in TRAINED)]
)
def test_schema_shapes_and_registrations(kind, training):
    case = KINDS[kind]
    x = case.tensors(torch.float32)
    for name in case.floats:
        x[name].requires_grad_(training)
    operator = ops.latent_attention if isinstance(case, Case) else ops.cached_attention
    schema = operator._opoverload._schema.arguments
    arguments = x | case.settings() | {"causal": True}
    torch.library.opcheck(operator, tuple(arguments.get(a.name) for a in schema))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_slope(kind):
    case = KINDS[kind]
    smaller = {"rank": 3} if isinstance(case, Case) else {}
    case = replace(case, heads=2, v_dim=2, new=min(case.new, 3), padding=((0, 0), (1, 1)), **smaller)
    if isinstance(case, Case):
        case = replace(case, key_scales=min(case.key_scales, 2), value_scales=min(case.value_scales, 2))
    x = case.tensors()

    def attend(*values):
        return case.operator(**x | dict(zip(case.floats, values, strict=True)), **case.settings())

    assert torch.autograd.gradcheck(attend, [x[n].requires_grad_() for n in case.floats])


@given(problems)
def test_gradient_is_the_references(case):
    x = case.tensors()
    inputs = [x[name].requires_grad_() for name in case.floats]
    found, wanted = (
        torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs, allow_unused=True)
        for outputs in (case.operator(**x, **case.settings()), case.expected(x))
    )
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected, **GRADIENT)


FLOATS = Case(sinks=True, slopes=True).floats
SUBSETS = [*combinations(FLOATS, 1), ("query", "value_up"), ("row", "key_up"), ("sinks", "slopes")]


@pytest.mark.parametrize(
    ("result", "trained"),
    [("output", names) for names in SUBSETS]
    + [("cache", names) for names in SUBSETS if {"row", "past", "cos", "sin"} & {*names}],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
@pytest.mark.parametrize("key_scales", [0, 2])
def test_gradient_of_some_inputs(result, trained, key_scales):
    """Frozen weights get no gradient, and either result alone may be what the loss reads."""
    case = Case(key_scales=key_scales, **{name: True for name in ("sinks", "slopes") if name in trained})
    place = ("output", "cache").index(result)
    x = case.tensors()
    inputs = [x[name].requires_grad_() for name in trained]
    expected = case.expected(x)[place]
    wanted = torch.autograd.grad(expected.square().sum(), inputs, allow_unused=True)
    found = torch.autograd.grad(case.operator(**x, **case.settings())[place].square().sum(), inputs)
    for got, reference_gradient in zip(found, wanted, strict=True):
        exact = torch.zeros_like(got) if reference_gradient is None else reference_gradient
        torch.testing.assert_close(got, exact, **GRADIENT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_its_type_with_float32_angles(dtype, kind):
    """The rewrite computes angles in float32 whatever the model's type; the cache must not grow to float32."""
    case = KINDS[kind]
    x = case.tensors(dtype)
    x |= {name: x[name].float() for name in ("cos", "sin") if name in x}
    output, cache = case.operator(**x, **case.settings())
    assert (output.dtype, cache.dtype) == (dtype, dtype)
    expected, _ = case.expected(x)
    # bfloat16 keeps 8 bits: 4e-3 per rounding, and logits of some 10 pass through the exponential.
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("kind", ["window", "sinks"])
def test_gradient_by_differences(kind):
    """The derivative itself, whatever the reference says of it."""
    case = replace(KINDS[kind], new=3, past=0)
    x = case.tensors()
    names = [name for name in case.floats if x[name].numel()]
    inputs = [x[name].requires_grad_() for name in names]

    def attended(*values):
        return case.operator(**{**x, **dict(zip(names, values, strict=True))}, **case.settings())

    assert torch.autograd.gradcheck(attended, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["prefill", "cached"])
def test_autocast_leaves_float64_as_it_is(kind):
    """As torch does with products of it, which are beside these operators."""
    case = KINDS[kind]
    x = case.tensors(torch.float64)
    expected = case.operator(**x, **case.settings())
    with torch.autocast("cpu", torch.bfloat16):
        assert (x["query"] @ x["query"].mT).dtype == torch.float64
        assert all(map(torch.equal, case.operator(**x, **case.settings()), expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["prefill", "everything", "cached"])
def test_autocast_computes_in_its_type(kind, dtype):
    """Weights stay float32 beside activations in it; gradients come back in each tensor's own type."""
    case = KINDS[kind]
    x = case.tensors(torch.float32)
    x["query"] = x["query"].to(dtype)
    inputs = [x[name].requires_grad_() for name in case.floats if x[name].numel()]
    with torch.autocast("cpu", dtype):
        output, cache = case.operator(**x, **case.settings())
        assert (x["query"] @ x["query"].mT.float()).dtype == dtype, "autocast goes on behind the operator"
    assert (output.dtype, cache.dtype) == (dtype, dtype)
    expected, _ = case.expected({name: value.double() for name, value in x.items()})
    # bfloat16 keeps 8 bits: 4e-3 per rounding, and logits of some 10 pass through the exponential.
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.1)
    output.float().square().sum().backward()
    assert all(i.grad is not None and i.grad.dtype == i.dtype and i.grad.isfinite().all() for i in inputs)
