"""Budgets split between rope and latent, layer by layer and among layers; the conversions that come of it."""

from __future__ import annotations

import math

import models
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from layers import Layer, layers

from mla_compile.config import make_config
from mla_compile.errors import RefusedError, UsageError
from mla_compile.passes.fisher import joint_rows
from mla_compile.passes.layers import MeasuredLayer
from mla_compile.passes.methods import METHODS
from mla_compile.passes.rope_split import rotary_channels, split_rope
from mla_compile.passes.search import Shares
from mla_compile.passes.sizes import LayerSizes, same_ranks, shared_ranks, split_budget
from mla_compile.passes.task import Task
from mla_compile.passes.transmla import _collapses, balanced_factors
from mla_compile.plan import latent_budget, liked_ranks, shared_rope_plan


def measured(layer: Layer) -> MeasuredLayer:
    return MeasuredLayer(layer.site(), layer.weights, layer.statistics())


WIDE = measured(Layer(heads=8, kv_heads=8, dim=32, pairs=16, v_dim=32, width=256))
SHARES = st.builds(Shares, st.floats(0.05, 0.7), st.floats(0.4, 1.0))


@given(layers().map(measured), st.floats(0.05, 1.0), SHARES)
def test_budgets_are_kept_and_used(layer, ratio, shares):
    config = make_config(cache_ratio=ratio)
    sizes, budget = split_budget(layer, config, shares), latent_budget(layer.site, config)
    assert sizes.rank + 2 * sizes.components <= max(budget, 2)
    assert 0 <= sizes.own <= sizes.components <= layer.pairs
    assert layer.pairs == len(rotary_channels(layer.site, layer.original(), layer.statistics()).moment)
    exact = shared_rope_plan(layer.site, layer.width, 0, 1).exact_rank
    assert sizes.rank < 1 or sizes.rank == exact or sizes.rank in liked_ranks(exact)
    if 1 <= sizes.rank < exact and sizes.components < layer.pairs:
        assert budget - sizes.rank - 2 * sizes.components <= 1, "rope takes what is left"


@pytest.mark.parametrize("rank", [1, 77, 129])
def test_a_rank_that_was_asked_for_is_not_rounded(rank):
    assert split_budget(WIDE, make_config(kv_rank=rank), Shares(0.3)).rank == rank


def test_rope_dims_that_were_asked_for_stay():
    sizes = split_budget(WIDE, make_config(cache_ratio=0.5, rope_dims=22), Shares(0.3))
    assert (sizes.components, sizes.rank) == (11, 192)  # of 256 - 22


def falling(count, scale=1.0):
    return scale * torch.arange(count, 0.0, -1.0).double()


def test_layers_share_what_rounding_leaves():
    """Two times 234 entries: 192 each, or more for the layer that is worth more."""
    config = make_config(cache_ratio=0.5, rope_dims=22)
    sizes = [split_budget(WIDE, config, Shares(0.3))] * 2
    ranks = [s.rank for s in shared_ranks([WIDE, WIDE], config, sizes, [falling(256, 3.0), falling(256)])]
    assert ranks == [272 - 16, 192] if sum([256, 192]) <= 468 else None


def test_the_same_rank_is_the_smallest():
    sizes = [LayerSizes(2, 1, 9), LayerSizes(3, 1, 7)]
    assert same_ranks(sizes) == (LayerSizes(2, 1, 7), LayerSizes(3, 1, 7))


# ---- whole conversions

LENGTH = 24


def choose(captured, **settings):
    task = Task(captured.program, captured.sites, (), make_config(**settings), models.tokens(6, LENGTH))
    return METHODS[settings["method"]](task)


@pytest.fixture(scope="module")
def chosen(programs):
    """Conversions of one model."""
    found = {}

    def call(**settings):
        key = tuple(settings.items())
        if key not in found:
            found[key] = choose(programs["llama-gqa"], cache_ratio=0.6, **settings)
        return found[key]

    return call


@pytest.mark.parametrize("method", ["fisher", "transmla"])
def test_deepseek_layout_is_one_table_and_one_rank(chosen, programs, method):
    choice, shape = chosen(method=method, layout="deepseek"), chosen(method=method, layout="deepseek").deepseek
    assert {(p.rope_dims, p.kv_rank, p.rope_groups) for p in choice.plans} == {(shape.rope_dims, shape.kv_rank, 1)}
    expected = shape.rope_theta ** (-torch.arange(0, shape.rope_dims, 2).double() / shape.rope_dims)
    for weights, forecast in zip(choice.weights, choice.forecasts, strict=True):
        torch.testing.assert_close(weights.inv_freq, expected[None], rtol=1e-6, atol=0)
        assert list(forecast.rope_frequencies) == weights.inv_freq[0].tolist()
        assert not weights.scaled_rope
    budget = latent_budget(programs["llama-gqa"].sites[0], make_config(cache_ratio=0.6))
    assert all(p.elements_after <= budget for p in choice.plans)


def test_deepseek_layout_of_scaled_frequencies_is_the_models_own(programs):
    captured = programs["llama-llama3-rope"]
    choice = choose(captured, method="fisher", layout="deepseek", cache_ratio=0.6)
    assert choice.deepseek.rope_theta is None
    own = sorted(captured.sites[0].rope.inv_freq, reverse=True)
    assert choice.deepseek.rope_dims == len(own) * 2
    torch.testing.assert_close(choice.weights[0].inv_freq[0], torch.tensor(own).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["fisher", "transmla"])
def test_a_model_that_no_checkpoint_can_express_is_refused(programs, method):
    with pytest.raises(RefusedError, match="its keys have a norm"):
        choose(programs["qwen3"], method=method, layout="deepseek")


def test_rope_dims_without_a_table_are_refused(programs):
    with pytest.raises(UsageError, match="no rope key of 0 channels"):
        choose(programs["llama-gqa"], method="fisher", layout="deepseek", rope_dims=0)


def test_layers_in_which_nothing_rotates_take_no_part_in_choosing_rope_dims():
    rotating, still = (measured(Layer(heads=2, kv_heads=2, dim=16, pairs=n, v_dim=16, width=32)) for n in (8, 0))
    assert _collapses([rotating, still], make_config(rope_dims=4)) == [4]
    assert _collapses([rotating, still], make_config()) == [1, 2, 4, 8]
    assert _collapses([still], make_config(rope_dims=4)) == [1]
    assert _collapses([rotating], make_config(rope_dims=6)) == []


def test_uniform_rank_is_one_rank(chosen):
    assert len({p.kv_rank for p in chosen(method="fisher", uniform_rank=True).plans}) == 1


def test_forecasts_say_what_rotates_and_what_it_costs(chosen):
    choice = chosen(method="fisher")
    for plan, forecast, weights in zip(choice.plans, choice.forecasts, choice.weights, strict=True):
        assert 2 * len(forecast.rope_frequencies) == 2 * len(forecast.rope_own) == plan.rope_dims
        assert list(forecast.rope_frequencies) == weights.inv_freq[0].tolist()
        assert math.isfinite(forecast.predicted_loss)
        assert forecast.predicted_loss >= 0
    assert choice.deepseek is None


@given(layers(), st.data())
def test_worth_by_transmla_is_the_variance_of_balanced_keys_and_values(layer, data):
    """Of its principal components: what the first ones leave out of keys and values that are equally long."""
    assume(not layer.key_norm and not layer.value_norm)
    site, statistics = layer.site(), layer.statistics()
    split = split_rope(site, rotary_channels(site, layer.weights(), statistics), 0, 0)
    factors = balanced_factors(site, layer.weights(), statistics, split)
    rows, keys = joint_rows(site, layer.weights(), split), site.kv_heads * site.qk_dim
    covariance = statistics.moment

    def lengths(matrix):
        return ((matrix @ covariance) * matrix).sum(1).sqrt()

    assume(float(lengths(rows[:keys]).mean()) > 1e-6 * float(lengths(rows[keys:]).mean()))
    balance = lengths(rows[:keys]).mean() / lengths(rows[keys:]).mean()
    scale = torch.ones(len(rows), 1).double()
    scale[:keys] /= balance
    rank = data.draw(st.integers(0, len(factors.loss)))
    owners = [site.value_owners.index(i) for i in range(max(site.value_owners) + 1)]
    up = torch.cat([factors.key_up.flatten(0, 1), factors.value_up[owners].flatten(0, 1)])
    rest = scale * (rows - up[:, :rank] @ factors.down[:rank])
    whole = float(lengths(scale * rows).square().sum())
    assert float(lengths(rest).square().nan_to_num().sum()) == pytest.approx(
        float(factors.loss[rank:].sum()), abs=1e-9 * whole
    )


def test_other_methods_say_what_ranks_leave_out_too(chosen):
    for settings in ({"method": "transmla"}, {"method": "mha2mla", "selection": "uniform"}):
        choice = chosen(**settings)
        for plan, forecast in zip(choice.plans, choice.forecasts, strict=True):
            ranks, shares = zip(*forecast.spectrum, strict=True)
            assert (shares[0], shares[-1]) == (1.0, 0.0)
            assert list(shares) == sorted(shares, reverse=True)
            assert ranks[-1] == plan.exact_rank > plan.kv_rank
            assert forecast.predicted_loss is None
