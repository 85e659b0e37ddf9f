"""Fisher-weighted factors and what is assembled from them, against the original layer and explicit quadratic forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import LAYERS, Layer, layers

from mla_compile.config import make_config
from mla_compile.passes.factorise import factorise_mha2mla
from mla_compile.passes.fisher import assemble, joint_factors
from mla_compile.passes.rope_split import rotary_channels, split_rope
from mla_compile.plan import plan_layers

# Both sides compute in float64 on numbers of size one; the roots of metrics and their inverses, with condition numbers
# up to some 1e3, multiply the rounding of 1e-16.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def parts(layer, components=None, own=None):
    """A split, all components of it unless said otherwise, and the factors of the rest."""
    count = layer.kv_heads * layer.pairs
    components = count if components is None else components
    site, weights, statistics = layer.site(), layer.weights(), layer.statistics()
    split = split_rope(site, rotary_channels(site, weights, statistics), components, components if own is None else own)
    return split, joint_factors(site, weights, statistics, split)


def converted(layer, rank=None):
    split, factors = parts(layer)
    site = layer.site()
    full = len(factors.loss) + int(site.needs_constant(site.qk_dim))  # the constant entry is one of the rank
    return assemble(site, layer.weights(), split, factors, full if rank is None else rank)


# ---- nothing lost


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "narrow input"])
def test_everything_kept_reproduces_the_layer(name):
    """All components and the full rank, biases of queries, keys and values included."""
    layer = LAYERS[name]
    x = layer.inputs()
    torch.testing.assert_close(layer.attend_latent(converted(layer), x), layer.attend(x), **EXACT)


def test_everything_kept_of_a_narrow_input_reproduces_the_layer():
    """Fewer inputs than channels: the latent is no longer than the input."""
    layer = replace(LAYERS["narrow input"], v_dim=8)
    latent = converted(layer)
    assert latent.key_up.shape[2] == layer.width
    x = layer.inputs()
    torch.testing.assert_close(layer.attend_latent(latent, x), layer.attend(x), **EXACT)


@pytest.mark.parametrize("window", [None, 3])
def test_a_soft_cap_without_biases_is_no_matter(window):
    layer = Layer(softcap=2.0, window=window)
    split, factors = parts(layer)
    latent = assemble(layer.site(), layer.weights(False), split, factors, len(factors.loss))
    x = layer.inputs()
    torch.testing.assert_close(layer.attend_latent(latent, x), layer.attend(x, biased=False), **EXACT)


NEEDS_CONSTANT = {
    "soft-cap": Layer(softcap=2.0, pairs=2, first=3),
    "soft-cap, no rope": Layer(softcap=2.0, pairs=0),
    "sinks": Layer(sinks=True),
    "soft-cap and sinks": Layer(softcap=2.0, sinks=True, pairs=2, first=3),
    "normed keys": Layer(key_norm=True, pairs=0),
    "normed values": Layer(value_norm=True),
}


OTHER_GROUPS = {
    f"{k} key heads, {v} value heads": Layer(kv_heads=k, value_heads=v) for k, v in ((4, 2), (2, 4), (1, 2))
}


@pytest.mark.parametrize("name", [*NEEDS_CONSTANT, *OTHER_GROUPS])
def test_weights_without_any_loss_exist_for_these_layers(name):
    """The other method finds them, so that it is not the layers of these tests that are impossible."""
    layer, config = (NEEDS_CONSTANT | OTHER_GROUPS)[name], make_config(exact=True, selection="uniform")
    (plan,) = plan_layers([layer.site()], [layer.width], config)
    latent, x = factorise_mha2mla(layer.site(), layer.weights(), plan, config, None), layer.inputs()
    torch.testing.assert_close(layer.attend_latent(latent, x), layer.attend(x), **EXACT)


@pytest.mark.parametrize("name", NEEDS_CONSTANT)
def test_biases_that_softmax_sees_are_kept(name):
    """Of keys that stand still under a soft-cap or a norm, and of values beside a sink (T5 and its exclusions)."""
    layer = NEEDS_CONSTANT[name]
    x = layer.inputs()
    torch.testing.assert_close(layer.attend_latent(converted(layer), x), layer.attend(x), **EXACT)


@pytest.mark.parametrize("name", OTHER_GROUPS)
def test_values_in_other_groups_than_keys_are_kept(name):
    layer = OTHER_GROUPS[name]
    x = layer.inputs()
    torch.testing.assert_close(layer.attend_latent(converted(layer), x), layer.attend(x), **EXACT)


# ---- the latent


def entries(factors):
    """Latent entries that say something: the rest's channels that components hold leave none."""
    real = factors.loss > 1e-10 * factors.loss[0]
    assert real.sum() > 1
    return real


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("components", [0, 2])
def test_latent_entries_have_zero_mean_and_unit_variance(name, components):
    layer, statistics = LAYERS[name], LAYERS[name].statistics()
    _, factors = parts(layer, components)
    real = entries(factors)
    covariance = statistics.moment - torch.outer(statistics.mean, statistics.mean)
    torch.testing.assert_close(factors.mean, statistics.mean, **EXACT)
    got = factors.down[real] @ covariance @ factors.down[real].T
    # The smallest entries are those of a thousandth of the largest's size, and squares of that are divided by.
    torch.testing.assert_close(got, torch.eye(len(got)).double(), rtol=1e-6, atol=1e-6)


def test_a_row_of_the_cache_has_zero_mean_on_the_calibration_text():
    layer = LAYERS["grouped"]
    split, factors = parts(layer, 2)
    latent = assemble(layer.site(), layer.weights(), split, factors, 4)
    mean = latent.row[:4] @ layer.statistics().mean + latent.row_bias[:4]
    torch.testing.assert_close(mean, torch.zeros(4).double(), **EXACT)


def test_inputs_are_not_centred_where_their_mean_cannot_be_moved():
    layer = Layer(softcap=2.0)
    _, factors = parts(layer, 2)
    assert not factors.mean.any()
    down = factors.down[entries(factors)]
    got = down @ layer.statistics().moment @ down.T
    torch.testing.assert_close(got, torch.eye(len(got)).double(), rtol=1e-6, atol=1e-6)


# ---- the loss of leaving entries out


def loss_of(layer, split, key_up, value_up, down):
    """Second-order loss of errors of keys and values, per token: one quadratic form per query head, written out."""
    site, weights, statistics = layer.site(), layer.weights(), layer.statistics()
    covariance = statistics.moment - torch.outer(statistics.mean, statistics.mean)
    keys = (split.key_rest @ weights.key.weight.flatten(0, 1)).unflatten(0, (layer.kv_heads, -1))
    total = 0.0
    for head in range(layer.heads):
        own = head * layer.kv_heads // layer.heads
        query = split.query_rest[head] @ statistics.query[head] @ split.query_rest[head].T * site.scale**2
        output = statistics.output[head] * statistics.attended[head]
        for metric, rows, up in ((query, keys[own], key_up[own]), (output, weights.value.weight[own], value_up[own])):
            error = rows - up @ down
            total += 0.5 * float((metric * (error @ covariance @ error.T)).sum())
    return total


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [0, 1, 5, 11])
def test_loss_is_what_the_truncated_factors_lose(name, rank):
    """Eckart-Young: the entries that are left out cost the sum of their losses."""
    layer = LAYERS[name]
    split, factors = parts(layer, 2)
    rank = min(rank, len(factors.loss) - 1)
    lost = loss_of(layer, split, factors.key_up[..., :rank], factors.value_up[..., :rank], factors.down[:rank])
    assert (factors.loss.diff() <= 1e-12 * factors.loss[0]).all()
    assert (factors.loss >= 0).all()
    # Metrics have a floor of 1e-7, which is of no weight where they are positive definite.
    assert lost == pytest.approx(float(factors.loss[rank:].sum()), rel=1e-6)


@given(layers(), st.integers(1, 6), st.integers(0, 99))
def test_no_other_factors_of_the_rank_lose_less(layer, rank, salt):
    """Neither random latents with their best up-projections, nor neighbours of the ones that were chosen."""
    split, factors = parts(layer, min(1, layer.pairs * layer.kv_heads))
    rank = min(rank, len(factors.loss))
    best = float(factors.loss[rank:].sum())
    noise = layer.draw(100 + salt, rank, layer.width)
    statistics = layer.statistics()
    covariance = statistics.moment - torch.outer(statistics.mean, statistics.mean)
    rows = torch.cat(
        [split.key_rest @ layer.weights().key.weight.flatten(0, 1), layer.weights().value.weight.flatten(0, 1)]
    )
    for down in (noise, factors.down[:rank] + 1e-2 * noise):
        up = torch.linalg.solve(down @ covariance @ down.T, down @ covariance @ rows.T).T
        keys = layer.kv_heads * layer.dim
        key_up, value_up = (u.unflatten(0, (layer.kv_heads, -1)) for u in (up[:keys], up[keys:]))
        other = loss_of(layer, split, key_up, value_up, down)
        assert best <= other * (1 + 1e-6) + 1e-9


def test_truncated_weights_are_the_leading_part_of_the_full_ones():
    layer = LAYERS["grouped"]
    full, part = converted(layer), converted(layer, 3)
    rank = full.key_up.shape[2]
    assert torch.equal(part.key_up, full.key_up[..., :3])
    assert torch.equal(part.value_up, full.value_up[:, :3])
    assert torch.equal(part.row, torch.cat([full.row[:3], full.row[rank:]]))
    assert torch.equal(part.query, full.query)


def test_layers_without_biases_get_none_that_are_zero():
    layer = LAYERS["grouped"]
    statistics = layer.statistics()
    centred = replace(statistics, mean=0 * statistics.mean)
    site, weights = layer.site(), layer.weights(False)
    split = split_rope(site, rotary_channels(site, weights, centred), 2, 2)
    latent = assemble(site, weights, split, joint_factors(site, weights, centred, split), 4)
    assert latent.query_bias is None
    assert latent.row_bias is None


def test_a_layer_that_the_loss_does_not_see_has_finite_factors():
    """A block whose output projection is still zero (LLaMA Pro's new blocks): no gradient comes back to it."""
    layer = Layer(pairs=0)
    site, weights, statistics = layer.site(), layer.weights(), layer.statistics()
    unseen = replace(
        statistics, query=0 * statistics.query, distance=0 * statistics.distance, output=0 * statistics.output
    )
    split = split_rope(site, rotary_channels(site, weights, unseen), 0, 0)
    latent = assemble(site, weights, split, joint_factors(site, weights, unseen, split), 4)
    assert all(x.isfinite().all() for x in (latent.row, latent.key_up, latent.value_up))
