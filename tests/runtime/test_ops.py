"""``mla::latent_attention`` in both of its forms, against the reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latent_cases import Case, cases

from mla_compile.runtime import ops, reference

# Both sides compute in float64 and differ in the order of additions only: some 1e-15 per number of size one.
EXACT = {"rtol": 1e-10, "atol": 1e-11}
# Gradients of sums over the whole output are larger, and so is their rounding.
GRADIENT = {"rtol": 1e-9, "atol": 1e-10}
FLOATS = ("query", "row", "past", "cos", "sin", "key_up", "value_up")
KINDS = {
    "no rope": Case(half=0, rope_groups=1),
    "all rope": Case(nope=0),
    "decoding": Case(new=1, past=6),
    "prefill": Case(new=6, past=0),
    "window": Case(window=2),
}


def expected_of(case: Case, x):
    return reference.latent_attention(**x, **case.settings("reference"))


def form(name):
    """One of the two forms as a function of the operator's arguments."""

    def attend(query, row, past, attention_mask, cos, sin, key_up, value_up, scale, window):
        query, present = ops.rotate_and_append(query, row, past, cos, sin, key_up.shape[2])
        seen = ops.visible_keys(attention_mask, query.shape[1], window)
        return getattr(ops, name)(query, present, seen, key_up, value_up, cos.shape[2], scale), present

    return attend


@pytest.mark.parametrize(
    "attend", [Case.operator, form("attend_folded"), form("attend_unfolded")], ids=["op", "folded", "unfolded"]
)
@given(cases())
def test_equals_the_reference(attend, case: Case):
    x = case.tensors()
    got, cache = attend(**x, **case.settings())
    expected, expected_cache = expected_of(case, x)
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(cache, expected_cache, **EXACT)


@given(cases())
def test_sees_the_keys_the_reference_sees(case: Case):
    mask = case.mask(case.past + case.new)
    got = ops.visible_keys(mask, case.new, case.window)
    assert torch.equal(got, reference.visible_keys(mask, case.new, case.window or None))


@given(cases(), st.data())
def test_chunks_equal_the_whole(case: Case, data):
    """Every token may be fed in a call of its own or together with its neighbours."""
    x, settings = case.tensors(), case.settings()
    expected, expected_cache = case.operator(**x, **settings)
    outputs, cache, done = [], x["past"], 0
    while done < case.new:
        size = data.draw(st.integers(1, case.new - done))
        part = {name: x[name][:, done : done + size] for name in ("query", "row", "cos", "sin")}
        mask = x["attention_mask"][:, : case.past + done + size]
        output, cache = case.operator(**x | part | {"past": cache, "attention_mask": mask}, **settings)
        outputs.append(output)
        done += size
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **EXACT)
    torch.testing.assert_close(cache, expected_cache, **EXACT)


@given(cases(), st.integers(0, 2**16))
def test_padding_and_later_tokens_are_not_read(case: Case, seed):
    """Whatever stands in rows no query may see, the outputs of real tokens are the same."""
    x = case.tensors()
    expected, _ = case.operator(**x, **case.settings())
    real = x["attention_mask"] != 0
    noise = 1e3 * torch.randn(case.batch, case.past + case.new, 1, generator=torch.Generator().manual_seed(seed))
    noise = (noise * ~real[..., None]).double()
    changed = {"past": x["past"] + noise[:, : case.past], "row": x["row"] + noise[:, case.past :]}
    got, _ = case.operator(**x | changed, **case.settings())
    mine = real[:, case.past :]
    torch.testing.assert_close(got[mine], expected[mine], **EXACT)


def test_sequences_of_padding_alone_are_finite():
    case = Case(padding=((0, 7), (7, 0)), window=2)
    output, cache = case.operator(**case.tensors(), **case.settings())
    assert output.isfinite().all()
    assert cache.isfinite().all()


@pytest.mark.parametrize("tokens", [6, 8])
def test_mask_of_another_length_is_an_error(tokens):
    x = Case().tensors() | {"attention_mask": torch.ones(2, tokens, dtype=torch.long)}
    with pytest.raises(ValueError, match=f"covers {tokens} tokens, but 3 are cached and 4 are new"):
        Case.operator(**x, **Case().settings())


@pytest.mark.parametrize(
    ("kind", "training"), [*((kind, False) for kind in KINDS), ("no rope", True), ("window", True)]
)
def test_schema_shapes_and_registrations(kind, training):
    case = KINDS[kind]
    x = case.tensors(torch.float32)
    for name in FLOATS:
        x[name].requires_grad_(training)
    names = ("query", "row", "past", "attention_mask", *FLOATS[3:])
    torch.library.opcheck(ops.latent_attention, (*(x[n] for n in names), case.scale, case.window))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_slope(kind):
    case = KINDS[kind]
    case = replace(case, heads=2, rank=3, v_dim=2, new=min(case.new, 3), padding=((0, 0), (1, 1)))
    x = case.tensors()

    def attend(*values):
        return case.operator(**x | dict(zip(FLOATS, values, strict=True)), **case.settings())

    assert torch.autograd.gradcheck(attend, [x[n].requires_grad_() for n in FLOATS])


@given(cases())
def test_gradient_is_the_references(case: Case):
    x = case.tensors()
    inputs = [x[name].requires_grad_() for name in FLOATS]
    found, wanted = (
        torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs, allow_unused=True)
        for outputs in (case.operator(**x, **case.settings()), expected_of(case, x))
    )
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected, **GRADIENT)


SUBSETS = [*combinations(FLOATS, 1), ("query", "value_up"), ("row", "key_up")]


@pytest.mark.parametrize(
    ("result", "trained"),
    [("output", names) for names in SUBSETS]
    + [("cache", names) for names in SUBSETS if {"row", "past", "cos", "sin"} & {*names}],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_gradient_of_some_inputs(result, trained):
    """Frozen weights get no gradient, and either result alone may be what the loss reads."""
    case, place = Case(), ("output", "cache").index(result)
    x = case.tensors()
    inputs = [x[name].requires_grad_() for name in trained]
    expected = expected_of(case, x)[place]
    wanted = torch.autograd.grad(expected.square().sum(), inputs, allow_unused=True)
    found = torch.autograd.grad(case.operator(**x, **case.settings())[place].square().sum(), inputs)
    for got, reference_gradient in zip(found, wanted, strict=True):
        exact = torch.zeros_like(got) if reference_gradient is None else reference_gradient
        torch.testing.assert_close(got, exact, **GRADIENT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["decoding", "prefill"])
def test_half_precision_keeps_its_type_with_float32_angles(dtype, kind):
    """The rewrite computes angles in float32 whatever the model's type; the cache must not grow to float32."""
    case = KINDS[kind]
    x = case.tensors(dtype)
    angles = {name: x[name].float() for name in ("cos", "sin")}
    output, cache = case.operator(**x | angles, **case.settings())
    assert (output.dtype, cache.dtype) == (dtype, dtype)
    expected, _ = expected_of(case, x | angles)
    # bfloat16 keeps 8 bits: 4e-3 per rounding, and logits of some 10 pass through the exponential.
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.1)
