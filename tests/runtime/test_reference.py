"""The oracle itself, against torch's attention and complex numbers, which were written by others."""

from __future__ import annotations

import ast
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from latent_cases import Case, cases

from mla_compile.runtime import reference

# Both sides compute in float64 and differ in the order of additions only: some 1e-15 per number of size one.
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def test_is_short_enough_to_be_read():
    source = inspect.getsource(reference)
    lines = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert len(lines) <= 100


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_is_torchs_with_complex_rotations(heads, kv_heads, window):
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
    expected = F.scaled_dot_product_attention(
        turned(query), turned(key), value.transpose(1, 2), attn_mask=seen, scale=scale, enable_gqa=True
    ).transpose(1, 2)
    got = reference.attention(query, key, value, pairs, inv_freq, scale, window)
    torch.testing.assert_close(got, expected, **EXACT)


@given(cases())
def test_latent_attention_is_attention_with_the_keys_it_stands_for(case: Case):
    """Without padding and past, expanding the latent gives ordinary attention over ``[no rope | rope]`` keys."""
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
    expected = reference.attention(x["query"], torch.cat([key, rope], -1), value, pairs, inv_freq, case.scale, window)
    got, _ = reference.latent_attention(**x, scale=case.scale, window=window)
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
        return torch.cat([row[..., : case.rank], shared(row[..., case.rank :])], -1)

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
