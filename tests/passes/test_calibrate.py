"""Mean lengths of rotary pairs, against the same means over what the modules themselves print."""

from __future__ import annotations

import models
import pytest
import torch
import zoo

from mla_compile.passes.calibrate import PairNorms, pair_norms
from mla_compile.passes.recognise import recognise

# The model runs in float32, which rounds by 6e-8; lengths and sums are float64 on both sides.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
WINDOWS, LENGTH = 5, 11


def hooked(model, modules, ids):
    """What the modules print for these tokens, in float64."""
    seen = {}
    handles = [
        m.register_forward_hook(lambda _, __, output, m=m: seen.__setitem__(m, output.double())) for m in modules
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return [seen[m] for m in modules]


def mean_lengths(outputs, heads, dim):
    """``[heads, dim / 2]`` of ``[batch, length, heads * dim]`` with half-split pairs."""
    real, imaginary = outputs.reshape(-1, heads, 2, dim // 2).unbind(2)
    return (real.square() + imaginary.square()).sqrt().mean(0)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-attention-bias", "smollm"])
def test_norms_of_a_llama_are_those_of_its_projections(programs, name):
    captured = programs[name]
    ids = models.tokens(WINDOWS, LENGTH)
    found = pair_norms(captured.program, captured.sites, ids)
    for layer, site, norms in zip(captured.module.model.layers, captured.sites, found, strict=True):
        attention = layer.self_attn
        query, key = hooked(captured.module, [attention.q_proj, attention.k_proj], ids)
        expected = PairNorms(
            mean_lengths(query, site.heads, site.qk_dim), mean_lengths(key, site.kv_heads, site.qk_dim)
        )
        torch.testing.assert_close(norms.query, expected.query, **CLOSE)
        torch.testing.assert_close(norms.key, expected.key, **CLOSE)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 100])
def test_norms_do_not_depend_on_the_batch_size(programs, batch):
    captured = programs["llama-gqa"]
    ids = models.tokens(WINDOWS, LENGTH)
    for got, expected in zip(
        pair_norms(captured.program, captured.sites, ids, batch=batch),
        pair_norms(captured.program, captured.sites, ids),
        strict=True,
    ):
        torch.testing.assert_close(got.query, expected.query, **CLOSE)
        torch.testing.assert_close(got.key, expected.key, **CLOSE)


def test_progress_sees_every_batch_once(programs):
    captured, sizes = programs["llama-gqa"], []

    def count(batches):
        for ids in batches:
            sizes.append(tuple(ids.shape))
            yield ids

    pair_norms(captured.program, captured.sites, models.tokens(WINDOWS, LENGTH), batch=2, progress=count)
    assert sizes == [(2, LENGTH), (2, LENGTH), (1, LENGTH)]


def operands(kind, layer, x):
    """Queries and keys before rotation, ``[batch, length, heads * dim]``, by the module's own weights."""
    heads = (zoo.HEADS, zoo.DIM)
    if kind is zoo.FusedProjection:
        return layer.qkv(x).chunk(3, -1)[:2]
    if kind is zoo.InterleavedProjection:
        return layer.qkv(x).unflatten(-1, (zoo.HEADS, 3, zoo.DIM))[..., :2, :].unbind(-2)
    if kind is zoo.ScaledQueries:
        return layer.q(x).unflatten(-1, heads) * layer.gain * 0.25, layer.k(x)
    if kind is zoo.ParameterProduct:
        return x @ layer.w[0] + layer.bias, x @ (layer.w[1] + layer.low[0] @ layer.low[1])
    return layer.q(x), layer.k(x)


@pytest.mark.parametrize(
    "kind",
    [
        zoo.FlatProduct,
        zoo.FusedProjection,
        zoo.GroupedByRepetition,
        zoo.InterleavedProjection,
        zoo.ParameterProduct,
        zoo.ScaledQueries,
    ],
)
def test_norms_of_any_arrangement_of_projections(zoo_programs, kind):
    program, module = zoo_programs[kind], zoo.model(kind)
    ids = torch.randint(0, zoo.VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    (norms,) = pair_norms(program, recognise(program).sites, ids)
    with torch.no_grad():
        query, key = operands(kind, module.layers[0], module.norms[0](module.tokens(ids)))
    for got, outputs, heads in ((norms.query, query, zoo.HEADS), (norms.key, key, kind.kv_heads)):
        torch.testing.assert_close(got, mean_lengths(outputs.double(), heads, zoo.DIM), **CLOSE)


def test_layers_without_rotation_have_no_pairs(programs):
    captured = programs["nanogpt"]
    for norms in pair_norms(captured.program, captured.sites, models.tokens(2, LENGTH)):
        assert norms.query.shape == norms.key.shape == (models.HEADS, 0)
