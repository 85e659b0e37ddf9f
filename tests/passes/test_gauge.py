"""Scales that cancel: the same layer and the same model, with both sides of every product of one size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from conversion import difference, latent_weights
from layers import LAYERS, Layer

from mla_compile.passes.fisher import assemble, joint_factors
from mla_compile.passes.gauge import balanced
from mla_compile.passes.insert_latent import insert_latent
from mla_compile.passes.rope_split import rotary_channels, split_rope
from mla_compile.runtime.module import LatentModel

NAMES = [n for n in LAYERS if n != "no rope"]
NORMED = Layer(key_norm=True)
CONSTANT = Layer(softcap=2.0, pairs=2, first=3)


def assembled(layer, rank):
    site, weights, statistics = layer.site(), layer.weights(), layer.statistics()
    split = split_rope(site, rotary_channels(site, weights, statistics), 2, 1)
    return assemble(site, weights, split, joint_factors(site, weights, statistics, split), rank)


def torn(weights, first=0.01):
    """The same layer in a bad gauge: latent entries and rope components 0.01, 0.1, 1, 10, ... times as large."""
    rank, half = weights.key_up.shape[2], weights.inv_freq.shape[1]
    latent = first * 10.0 ** (torch.arange(rank).double() % 6)
    rope = (first * 10.0 ** torch.arange(half).double()).repeat(2)
    scales = torch.cat([latent, rope])
    query = weights.query.clone()
    query[:, -2 * half :] /= rope[:, None]
    return replace(
        weights,
        query=query,
        query_bias=None,
        row=weights.row * scales[:, None],
        row_bias=weights.row_bias * scales,
        key_up=weights.key_up / latent,
        value_up=weights.value_up / latent[:, None],
    )


@pytest.mark.parametrize("layer", [*(LAYERS[n] for n in NAMES), NORMED], ids=[*NAMES, "normed keys"])
def test_balancing_changes_the_sizes_and_not_what_is_computed(layer):
    bad = torn(replace(assembled(layer, 5), query_bias=None))
    good = balanced(bad)
    x = layer.inputs()
    # Float64 on both sides; scales of up to 1e3 multiply the rounding of 1e-16.
    torch.testing.assert_close(layer.attend_latent(good, x), layer.attend_latent(bad, x), rtol=1e-9, atol=1e-9)
    for entry in range(5 - layer.site().needs_constant(layer.dim)):
        up = torch.cat([good.key_up[..., entry].flatten(), good.value_up[:, entry].flatten()])
        assert float(good.row[entry].norm()) == pytest.approx(float(up.norm()))
    half = good.inv_freq.shape[1]
    for component in range(half):
        key = torch.cat([good.row[5 + component], good.row[5 + half + component]])
        query = torch.cat([good.query[:, -2 * half + component], good.query[:, -half + component]])
        assert float(key.norm()) == pytest.approx(float(query.norm()))


def test_balancing_is_done_once_for_all():
    once = balanced(torn(replace(assembled(LAYERS["grouped"], 5), query_bias=None)))
    for field in ("query", "row", "row_bias", "key_up", "value_up"):
        torch.testing.assert_close(getattr(balanced(once), field), getattr(once, field))


def test_the_constant_entry_stays_one():
    weights = assembled(CONSTANT, 4)
    assert not weights.row[3].any()
    assert weights.row_bias[3] == 1
    assert weights.key_up[..., 3].any()


def test_weights_of_zero_stay_finite():
    weights = assembled(LAYERS["grouped"], 4)
    rows = weights.row.clone()
    rows[1] = 0
    found = balanced(replace(weights, row=rows))
    assert torch.equal(found.row[1], rows[1])
    assert all(x.isfinite().all() for x in (found.query, found.row, found.key_up, found.value_up))


def test_a_model_of_every_kind_of_attention_has_the_same_logits(mixed):
    """Rope keys of every head, norms in front of them with and without shifts, biases, constant entries."""
    weights = latent_weights(mixed.program, mixed.sites)

    def logits(found):
        graph = insert_latent(mixed.program, mixed.sites, found, torch.float32)
        with torch.no_grad():
            return LatentModel(graph.module, graph.rows)(ids).logits

    ids = torch.randint(0, zoo.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    # Float32 through two dozen layers, rounded elsewhere.
    assert difference(logits([balanced(w) for w in weights]), logits(weights)) < 1e-5
