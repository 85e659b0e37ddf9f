"""Statistics of layers on text, against autograd and plain loops in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import models
import pytest
import torch
import zoo

from mla_compile.errors import RefusedError
from mla_compile.passes.activations import attend_site
from mla_compile.passes.recognise import recognise
from mla_compile.passes.statistics import collect_statistics, logit_fisher, logit_spread
from mla_compile.site_statistics import SiteStatistics

# Products of float32 activations that were summed in another order: some tens of roundings of 6e-8.
CLOSE = 1e-5
LENGTH = 8
IDS = torch.randint(0, zoo.VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def relative(got, expected):
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def mixed_seen(mixed):
    return mixed.look(IDS)


@pytest.fixture(scope="module")
def mixed_statistics(mixed):
    return collect_statistics(mixed.program, mixed.sites, IDS, batch=2)


def turned(site, heads):
    """Rotate ``[B, S, H, D]`` as complex numbers."""
    heads = heads.double().clone()
    for (a, b), speed in zip(site.rope.pairs, site.rope.inv_freq, strict=True):
        turn = torch.polar(torch.ones(heads.shape[1]).double(), speed * torch.arange(heads.shape[1]).double())
        pair = torch.complex(heads[..., a], heads[..., b]) * turn[None, :, None]
        heads[..., a], heads[..., b] = pair.real, pair.imag
    return heads


def explicit(site, seen):
    """Attention head by head in float64: scaled logits (leaves), attention weights and outputs ``[B, S, Dv]``."""
    query, key, length = turned(site, seen.query), turned(site, seen.key), seen.query.shape[1]
    for head in range(site.heads):
        own, value = head * site.kv_heads // site.heads, head * site.value.heads // site.heads
        logits = torch.einsum("bmd,bjd->bmj", query[:, :, head], key[:, :, own]) * site.scale
        logits.requires_grad_()
        scores = site.softcap * torch.tanh(logits / site.softcap) if site.softcap else logits
        distance = torch.arange(length)[:, None] - torch.arange(length)
        if site.slopes is not None:
            scores = scores - site.slopes[head] * distance
        hidden = (distance < 0) | (distance >= (site.mask.window or length))
        exponential = scores.masked_fill(hidden, -math.inf).exp()
        total = exponential.sum(-1, keepdim=True)
        if site.scores.sinks is not None:
            total = total + math.exp(site.scores.sinks[head])
        weights = exponential / total
        yield logits, weights @ seen.value[:, :, value].double()


def slopes(site, seen):
    """Derivative of the loss by every scaled logit, ``[B, H, S, S]``, by autograd through the above."""
    found = []
    for head, (logits, output) in enumerate(explicit(site, seen)):
        (slope,) = torch.autograd.grad((output * seen.gradient[:, :, head].double()).sum(), logits)
        found.append(slope)
    return torch.stack(found, 1)


@pytest.mark.parametrize("index", range(len(zoo.MIXED)), ids=zoo.MIXED)
def test_logit_fisher_is_the_squared_derivative_of_the_loss(mixed, mixed_seen, index):
    site, seen = mixed.sites[index], mixed_seen[index]
    got = logit_fisher(site, seen, attend_site(site, seen.query, seen.key, seen.value))
    # A difference of two sums that nearly cancel is squared.
    assert relative(got.double(), slopes(site, seen).square()) < 10 * CLOSE


def by_loops(site, seen) -> SiteStatistics:
    """The definitions, token by token."""
    batch, length = seen.source.shape[:2]
    tokens, source = batch * length, seen.source.double()
    slope = slopes(site, seen)
    outputs = torch.stack([o.detach() for _, o in explicit(site, seen)], 2)
    mean, moment = torch.zeros(source.shape[2]).double(), torch.zeros(source.shape[2], source.shape[2]).double()
    query = torch.zeros(site.heads, site.qk_dim, site.qk_dim).double()
    distance = torch.zeros(site.heads, length).double()
    output = torch.zeros(site.heads, site.v_dim, site.v_dim).double()
    squares = torch.zeros(site.heads, 2).double()
    for b in range(batch):
        for m in range(length):
            mean += source[b, m] / tokens
            moment += torch.outer(source[b, m], source[b, m]) / tokens
            for h in range(site.heads):
                q, g = seen.query[b, m, h].double(), seen.gradient[b, m, h].double()
                query[h] += slope[b, h, m].square().sum() * torch.outer(q, q) / tokens
                output[h] += torch.outer(g, g) / tokens
                value = seen.value[b, m, h * site.value.heads // site.heads].double()
                squares[h] += torch.stack([outputs[b, m, h].square().sum(), value.square().sum()])
                for j in range(m + 1):
                    distance[h, m - j] += slope[b, h, m, j] ** 2
    share = distance / distance.sum(1, keepdim=True)
    return SiteStatistics(tokens, mean, moment, query, share, output, squares[:, 0] / squares[:, 1])


@pytest.mark.parametrize("index", range(len(zoo.MIXED)), ids=zoo.MIXED)
def test_statistics_are_their_definitions(mixed, mixed_seen, mixed_statistics, index):
    expected, got = by_loops(mixed.sites[index], mixed_seen[index]), mixed_statistics[index]
    assert got.tokens == expected.tokens == IDS.numel()
    for name in ("mean", "moment", "query", "distance", "output", "attended"):
        assert getattr(got, name).dtype == torch.float64
        assert relative(getattr(got, name), getattr(expected, name)) < 10 * CLOSE, name


# ---- without gradients


def metric_roots(site):
    """Any square root of a metric per head, ``[H, Dv, Dv]``."""
    shape = (site.heads, site.v_dim, site.v_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("index", range(len(zoo.MIXED)), ids=zoo.MIXED)
def test_logit_spread_is_what_gradients_of_the_metric_would_give(mixed, mixed_seen, index):
    """Oracle: squared derivatives for every column of a root of the metric as the gradient, summed."""
    site, seen = mixed.sites[index], mixed_seen[index]
    roots, attended = metric_roots(site), attend_site(site, seen.query, seen.key, seen.value)
    wanted = sum(
        logit_fisher(site, replace(seen, gradient=column.float().expand_as(seen.gradient)), attended)
        for column in roots.unbind(2)
    )
    got = logit_spread(site, seen, attended, roots @ roots.mT)
    assert (got >= 0).all()
    assert relative(got, wanted) < 10 * CLOSE


def test_statistics_without_gradients_run_no_backward_pass(mixed, mixed_statistics, monkeypatch):
    metrics = [metric_roots(site) @ metric_roots(site).mT for site in mixed.sites]

    def refuse(*arguments, **keywords):
        raise AssertionError("the model was differentiated")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with pytest.raises(AssertionError, match="differentiated"):
        collect_statistics(mixed.program, mixed.sites, IDS)
    found = collect_statistics(mixed.program, mixed.sites, IDS, metrics=metrics)
    for got, with_gradients, metric in zip(found, mixed_statistics, metrics, strict=True):
        assert relative(got.output, metric) < CLOSE
        assert (got.query.diagonal(dim1=1, dim2=2) > 0).any()
        assert got.query.isfinite().all()
        assert relative(got.distance.sum(1), torch.ones(len(got.distance)).double()) < CLOSE
        for name in ("mean", "moment", "attended"):  # which no gradient enters
            assert relative(getattr(got, name), getattr(with_gradients, name)) < CLOSE, name


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_statistics_do_not_depend_on_the_batch_size(programs, batch):
    captured, ids = programs["llama-gqa"], models.tokens(5, LENGTH)
    expected = collect_statistics(captured.program, captured.sites, ids)
    for got, wanted in zip(
        collect_statistics(captured.program, captured.sites, ids, batch=batch), expected, strict=True
    ):
        assert got.tokens == wanted.tokens
        for name in ("mean", "moment", "query", "distance", "output", "attended"):
            assert relative(getattr(got, name), getattr(wanted, name)) < CLOSE, name


def test_progress_sees_every_batch_once(programs):
    captured, sizes = programs["llama-gqa"], []

    def count(batches):
        for ids in batches:
            sizes.append(tuple(ids.shape))
            yield ids

    collect_statistics(captured.program, captured.sites, models.tokens(5, LENGTH), batch=2, progress=count)
    assert sizes == [(2, LENGTH), (2, LENGTH), (1, LENGTH)]


def test_a_window_hides_what_lies_beyond_it(mixed, mixed_statistics):
    index = list(zoo.MIXED).index("window")
    window = mixed.sites[index].mask.window
    distance = mixed_statistics[index].distance
    assert 1 < window < LENGTH
    assert (distance[:, :window] > 0).all()
    assert not distance[:, window:].any()


@pytest.fixture(scope="module")
def three_layers():
    module = zoo.model(zoo.HalfRope, zoo.HalfRope, zoo.HalfRope)
    program = zoo.program_of(module)
    return module, program, recognise(program).sites


@pytest.mark.parametrize("projection", ["q", "k", "v"])
@pytest.mark.parametrize("broken", range(3))
def test_what_is_not_finite_is_refused_by_the_name_of_its_layer(three_layers, broken, projection):
    """NaN in one layer makes every later layer NaN, and the gradients of every earlier one."""
    module, program, sites = three_layers
    weight = getattr(module.layers[broken], projection).weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = math.nan
        with pytest.raises(RefusedError, match=f"of {sites[broken].path} are not finite"):
            collect_statistics(program, sites, IDS)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_gradients_that_are_not_finite_are_refused_by_the_name_of_the_layer_they_reach_first(three_layers):
    module, program, sites = three_layers
    weight = module.head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = math.inf
        with pytest.raises(RefusedError, match=f"of {sites[2].path} are not finite"):
            collect_statistics(program, sites, IDS)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
