"""The oracle itself, against torch's attention and complex numbers, which were written by others."""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from latent_cases import CachedCase, Case, cached_cases, cases, problems

from mla_compile.runtime import reference

# Both sides compute in float64 and differ in the order of additions only: some 1e-15 per number of size one.
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def test_is_short_enough_to_be_read():
    source = inspect.getsource(reference)
    lines = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert len(lines) <= 145


@pytest.mark.parametrize(
    ("window", "chunked"), [(None, False), (1, False), (3, False), (20, False), (3, True), (20, True)]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_is_torchs_with_complex_rotations(heads, kv_heads, window, chunked):
    batch, length, dim, v_dim, scale = 2, 7, 6, 5, 0.37
    pairs, inv_freq = [(0, 5), (4, 1)], [0.9, 0.05]  # channels 2 and 3 do not rotate
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, length, n, d, generator=generator, dtype=torch.float64)
        for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, v_dim))
    )

    def turned(x):
        x = x.clone()
        for (a, b), frequency in zip(pairs, inv_freq, strict=True):
            turn = torch.polar(torch.ones(length).double(), frequency * torch.arange(length).double())
            z = torch.complex(x[..., a], x[..., b]) * turn[None, :, None]
            x[..., a], x[..., b] = z.real, z.imag
        return x.transpose(1, 2)

    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or math.inf))
    if chunked:
        blocks = torch.block_diag(*[torch.ones(window, window)] * math.ceil(length / window)).bool()
        seen = blocks[:length, :length] & (distance >= 0)
    expected = F.scaled_dot_product_attention(
        turned(query), turned(key), value.transpose(1, 2), attn_mask=seen, scale=scale, enable_gqa=True
    ).transpose(1, 2)
    got = reference.attention(query, key, value, pairs, inv_freq, scale, window, chunked=chunked)
    torch.testing.assert_close(got, expected, **EXACT)


@given(cases())
def test_latent_attention_is_attention_with_the_keys_it_stands_for(case: Case):
    """Without padding and past, expanding the latent gives ordinary attention over ``[no rope | rope]`` keys."""
    case = replace(case, key_scales=0, value_scales=0, scaled_rope=False)
    x, heads = case.tensors(real=True, past=0), case.heads
    inv_freq = [0.8, 0.11, 0.02][: case.half]
    angle = torch.outer(torch.arange(case.new).double(), torch.tensor(inv_freq, dtype=torch.float64))
    x["cos"], x["sin"] = (f(angle)[None, :, None].expand_as(x["cos"]) for f in (torch.cos, torch.sin))
    latent, rope = x["row"].split([case.rank, x["row"].shape[2] - case.rank], -1)
    key, value = (torch.stack([latent @ m for m in up], 2) for up in (x["key_up"].mT, x["value_up"]))
    rope = rope.reshape(case.batch, case.new, case.rope_groups, 2 * case.half)
    key, value, rope = (y.repeat_interleave(heads // y.shape[2], 2) for y in (key, value, rope))
    pairs = [(case.nope + i, case.nope + case.half + i) for i in range(case.half)]
    window = case.window or None
    features = {"softcap": case.softcap, "chunked": case.chunked} | {
        name: x[name] for name in ("sinks", "slopes") if name in x
    }
    key = torch.cat([key, rope], -1)
    expected = reference.attention(x["query"], key, value, pairs, inv_freq, case.scale, window, **features)
    got, _ = reference.latent_attention(**x, **case.settings("reference"))
    torch.testing.assert_close(got, expected, **EXACT)


@given(cases(), st.sampled_from(["reference", "op"]))
def test_rope_key_per_head_is_one_shared_rope_key_with_padded_queries(case: Case, implementation):
    x, groups, half = case.tensors(), case.rope_groups, case.half
    attend = reference.latent_attention if implementation == "reference" else case.operator
    expected, expected_cache = attend(**x, **case.settings(implementation))

    def shared(rope):
        """``[..., groups, real | imaginary]`` to ``[..., real of all groups | imaginary of all groups]``."""
        return rope.unflatten(-1, (groups, 2, half)).transpose(-2, -3).flatten(-3)

    def shared_row(row):
        latent, rope, scales = row.split([case.rank, groups * 2 * half, case.key_scales + case.value_scales], -1)
        return torch.cat([latent, shared(rope), scales], -1)

    plain, turning = x["query"].split([case.nope, 2 * half], -1)
    slot = torch.eye(groups).double().repeat_interleave(case.heads // groups, 0)
    padded = shared((turning[..., None, :] * slot[:, :, None]).flatten(-2))
    merged = x | {
        "query": torch.cat([plain, padded], -1),
        "row": shared_row(x["row"]),
        "past": shared_row(x["past"]),
        "cos": x["cos"].flatten(2).unsqueeze(2),
        "sin": x["sin"].flatten(2).unsqueeze(2),
    }
    got, cache = attend(**merged, **case.settings(implementation))
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(cache, shared_row(expected_cache), **EXACT)


def evaluate(implementation, case, x):
    """Outputs of the reference or of the operator."""
    return case.expected(x) if implementation == "reference" else case.operator(**x, **case.settings())


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "op"])


@IMPLEMENTATIONS
@given(problems)
def test_features_that_say_nothing_change_nothing(implementation, case):
    """A sink of no weight, slopes of 0, and a cap no logit comes near."""
    case = replace(case, softcap=0.0)
    x = {name: value for name, value in case.tensors().items() if name not in {"sinks", "slopes"}}
    expected = evaluate(implementation, case, x)[0]
    nothing = torch.zeros(case.heads, dtype=torch.float64)
    for extra in ({"sinks": nothing - torch.inf}, {"sinks": nothing - 1e4}, {"slopes": nothing}):
        torch.testing.assert_close(evaluate(implementation, case, x | extra)[0], expected, **EXACT)
    # tanh(z) = z - z^3 / 3: logits of some 30 under a cap of 1e9 are off by 1e-14.
    torch.testing.assert_close(evaluate(implementation, replace(case, softcap=1e9), x)[0], expected, **EXACT)


@IMPLEMENTATIONS
@given(cases(), st.integers(1, 4))
def test_scales_of_one_change_nothing_but_the_row(implementation, case: Case, scales):
    case = replace(case, key_scales=0, value_scales=0, scaled_rope=False)
    x = case.tensors()
    expected, cache = evaluate(implementation, case, x)
    scales = math.gcd(scales, case.heads)
    longer = {
        name: torch.cat([x[name], torch.ones(*x[name].shape[:2], scales).double()], -1) for name in ("row", "past")
    }
    for of_values in (False, True):
        kind = replace(case, **{"value_scales" if of_values else "key_scales": scales})
        got, longer_cache = evaluate(implementation, kind, x | longer)
        torch.testing.assert_close(got, expected, **EXACT)
        torch.testing.assert_close(longer_cache[..., :-scales], cache, **EXACT)
        assert (longer_cache[..., -scales:] == 1).all()


@IMPLEMENTATIONS
@given(cases())
def test_scales_normalise_keys_and_values_after_their_projections(implementation, case: Case):
    """What scales are for: ``k / |k|`` and ``v / |v|`` per up-projection group, with the norms cached beside ``c``."""
    groups = case.up_groups
    case = replace(case, half=0, nope=max(case.nope, 1), key_scales=groups, value_scales=groups, scaled_rope=False)
    x = case.tensors()
    rows = torch.cat([x["past"], x["row"]], 1)
    key, value = (
        torch.einsum(f"btr,{axes}->btgd", rows[..., : case.rank], up)
        for axes, up in (("gdr", x["key_up"]), ("grd", x["value_up"]))
    )
    norms = [y.norm(dim=-1, keepdim=True) for y in (key, value)]
    rows = torch.cat([rows[..., : case.rank], *(1 / norm.squeeze(-1) for norm in norms)], -1)
    unit = [y / norm for y, norm in zip((key, value), norms, strict=True)]
    kept = x["past"].shape[1]
    got, _ = evaluate(implementation, case, x | {"past": rows[:, :kept], "row": rows[:, kept:]})
    cached = torch.cat([y.repeat_interleave(case.heads // y.shape[2], 2).flatten(2) for y in unit], -1)
    extras = {name: x[name] for name in ("sinks", "slopes") if name in x}
    settings = {n: s for n, s in case.settings("reference").items() if n not in {"value_scales", "scaled_rope"}} | {
        "kv_heads": case.heads
    }
    past, row = cached.split([kept, case.new], 1)
    expected, _ = reference.cached_attention(x["query"], row, past, x["attention_mask"], **settings, **extras)
    torch.testing.assert_close(got, expected, **EXACT)


@IMPLEMENTATIONS
@given(cases(), st.data())
def test_a_shared_rope_key_in_front_of_all_norms_is_one_behind_each(implementation, case: Case, data):
    """``s (q . k)`` is ``q . (s k)``: a rope key cached once, or once per scale and behind it."""
    scales = data.draw(st.sampled_from([d for d in range(1, case.heads + 1) if case.heads % d == 0]))
    case = replace(case, rope_groups=1, key_scales=scales, scaled_rope=True)
    x = case.tensors()
    got, cache = evaluate(implementation, case, x)

    def behind(row):
        latent, rope, scale, rest = row.split([case.rank, 2 * case.half, scales, case.value_scales], -1)
        normed = (rope[..., None, :] * scale[..., None]).flatten(2)
        return torch.cat([latent, normed, scale, rest], -1)

    each = replace(case, rope_groups=scales, scaled_rope=False)
    angles = {name: x[name].expand(-1, -1, scales, -1) for name in ("cos", "sin")}
    expected, longer = evaluate(implementation, each, x | angles | {name: behind(x[name]) for name in ("row", "past")})
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(behind(cache), longer, **EXACT)


@IMPLEMENTATIONS
@given(cached_cases())
def test_cached_attention_is_latent_attention_with_identities_for_up_projections(implementation, case: CachedCase):
    """The row itself is the latent: every head's key and value are slices of it."""
    x = case.tensors()
    expected, cache = evaluate(implementation, case, x)
    rank, keys = cache.shape[2], case.kv_heads * case.head_dim
    angles = torch.zeros(case.batch, case.new, 1, 0, dtype=torch.float64)
    identity = torch.eye(rank, dtype=torch.float64)
    up = {
        "key_up": identity[:keys].unflatten(0, (case.kv_heads, -1)),
        "value_up": identity[keys:].unflatten(0, (case.kv_heads, -1)).mT,
    }
    attend = reference.latent_attention if implementation == "reference" else Case.operator
    settings = {name: value for name, value in case.settings(implementation).items() if name != "kv_heads"}
    got, latent_cache = attend(**x, **up, cos=angles, sin=angles, **settings)
    torch.testing.assert_close(got, expected, **EXACT)
    assert torch.equal(latent_cache, cache)


@IMPLEMENTATIONS
@given(cached_cases())
def test_a_sink_takes_its_share_of_the_softmax_and_gives_nothing(implementation, case: CachedCase):
    """The outputs without a sink, times the share that the keys keep: the output for values of 1."""
    case = replace(case, sinks=True)
    x = case.tensors()
    keys = case.kv_heads * case.head_dim
    ones = {
        name: torch.cat([x[name][..., :keys], torch.ones_like(x[name][..., keys:])], -1) for name in ("row", "past")
    }
    share, _ = evaluate(implementation, case, x | ones)
    assert ((share > 0) & (share < 1)).all()
    without = {name: value for name, value in x.items() if name != "sinks"}
    expected, _ = evaluate(implementation, case, without)
    got, _ = evaluate(implementation, case, x)
    torch.testing.assert_close(got, expected * share, **EXACT)


@IMPLEMENTATIONS
@given(cached_cases())
def test_slopes_are_the_linear_biases_of_alibi(implementation, case: CachedCase):
    """Press et al. 2022: without padding, a key ``d`` tokens back loses ``slope * d``."""
    case = replace(case, slopes=True, sinks=False, softcap=0.0, window=0)
    x = case.tensors(real=True)
    got, cache = evaluate(implementation, case, x)
    key, value = (
        y.unflatten(-1, (case.kv_heads, -1)).transpose(1, 2).repeat_interleave(case.heads // case.kv_heads, 1)
        for y in cache.split([case.kv_heads * case.head_dim, case.kv_heads * case.v_dim], -1)
    )
    place = torch.arange(case.past + case.new)
    back = place[case.past :, None] - place
    bias = (-x["slopes"][:, None, None] * back).masked_fill(back < 0, -torch.inf)
    expected = F.scaled_dot_product_attention(x["query"].transpose(1, 2), key, value, attn_mask=bias, scale=case.scale)
    torch.testing.assert_close(got, expected.transpose(1, 2), **EXACT)


@IMPLEMENTATIONS
@pytest.mark.parametrize("softcap", [0.5, 2.0])
def test_softcap_bounds_logits_before_the_mask(implementation, softcap):
    """Gemma 2: however large the products, two keys seen differ by at most ``2 * softcap``; padding stays hidden."""
    case = CachedCase(
        heads=1, kv_heads=1, new=1, past=2, head_dim=1, v_dim=1, batch=1, padding=((1, 0),), softcap=softcap
    )
    row = torch.tensor([[[9.0, 1.0], [9.0, 0.0], [-9.0, 1.0]]]).double()  # [key | value]; the first is padding
    x = case.tensors() | {"query": torch.full((1, 1, 1, 1), 100.0).double(), "past": row[:, :2], "row": row[:, 2:]}
    got, _ = evaluate(implementation, case, x)
    # The last key has value 1 and logit -softcap, the one before it 0 and +softcap.
    assert got.item() == pytest.approx(1 / (1 + math.exp(2 * softcap)), rel=1e-12)
