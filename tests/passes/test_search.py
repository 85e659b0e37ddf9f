"""Sizes by trial: the search on made-up losses, shared ranks and divergence against brute force."""

from __future__ import annotations

import itertools
import math

import models
import pytest
import torch
from conversion import convert
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mla_compile.errors import VerificationError
from mla_compile.passes.search import _FRACTIONS, _OWN, Divergence, Shares, global_ranks, require_finite, search_shares
from mla_compile.runtime.module import LatentOutput

# ---- how much of a row rotates


def recorded(loss):
    tried = []

    def cost(shares):
        tried.append(shares)
        return loss(shares)

    return tried, cost


@given(st.floats(_FRACTIONS[0], _FRACTIONS[-1]), st.floats(0.4, 1.0))
def test_search_finds_the_minimum_of_a_convex_loss(rope, own):
    """To within what it can tell apart: a quarter of the way between grid points in rope, the nearest share of own."""
    tried, cost = recorded(lambda s: (s.rope - rope) ** 2 + 0.1 * (s.own - own) ** 2)
    found = search_shares(cost)
    points = sorted({*_FRACTIONS, *((a + b) / 2 for a, b in itertools.pairwise(_FRACTIONS))})
    assert abs(found.rope - rope) == pytest.approx(min(abs(p - rope) for p in points))
    assert abs(found.own - own) == pytest.approx(min(abs(o - own) for o in (*_OWN, Shares(0.1).own)))
    assert cost(found) == min(map(cost, set(tried)))


@given(st.dictionaries(st.sampled_from(_FRACTIONS), st.floats(0, 9), min_size=1), st.integers(0, 2**16))
def test_search_tries_no_split_twice_and_returns_the_best_it_tried(known, seed):
    """Whatever the loss, convex or not."""

    def loss(shares):
        return known.get(shares.rope, 1 + hash((shares.rope, shares.own, seed)) % 7)

    tried, cost = recorded(loss)
    found = search_shares(cost)
    assert len(tried) == len(set(tried))
    assert loss(found) == min(map(loss, tried))


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_search_stays_where_a_split_is_possible(low, high):
    low, high = sorted((low, high))

    def loss(shares):
        return shares.rope if low <= shares.rope <= high else math.inf

    possible = [f for f in _FRACTIONS if low <= f <= high]
    if possible:
        assert search_shares(loss).rope <= min(possible)
        assert math.isfinite(loss(search_shares(loss)))


def test_search_comes_back_where_nothing_is_possible():
    assert isinstance(search_shares(lambda _: math.inf), Shares)


# ---- how layers share what is left


@st.composite
def ladders(draw: st.DrawFn):
    """Some layers' losses, falling, and the ranks that each may have."""
    losses, rungs = [], []
    for size in draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)):
        losses.append(torch.tensor(sorted(draw(st.lists(st.floats(0, 9), min_size=size, max_size=size)), reverse=True)))
        rungs.append(sorted(draw(st.sets(st.integers(0, size), min_size=1))))
    return [loss.double() for loss in losses], rungs


def left_out(losses, ranks):
    return sum(float(loss[rank:].sum()) for loss, rank in zip(losses, ranks, strict=True))


@given(ladders(), st.integers(0, 20))
def test_shared_ranks_leave_out_least(given_layers, spare):
    """Against every possible choice."""
    losses, rungs = given_layers
    total = sum(ladder[0] for ladder in rungs) + spare
    ranks = global_ranks(losses, total, rungs)
    assert sum(ranks) <= total
    assert all(rank in ladder for rank, ladder in zip(ranks, rungs, strict=True))
    best = min(left_out(losses, choice) for choice in itertools.product(*rungs) if sum(choice) <= total)
    assert left_out(losses, ranks) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_a_larger_rank_is_skipped_for_two_smaller_ones_that_are_worth_more():
    """The next 16 entries of the first layer are worth most by themselves, but 8 more of both others together more."""
    losses = [torch.full((48,), 1.0), torch.full((24,), 0.9), torch.full((24,), 0.9)]
    assert global_ranks([x.double() for x in losses], 63, [[32, 48], [8, 16, 24], [8, 16, 24]]) == [32, 16, 8]
    assert global_ranks([x.double() for x in losses], 64, [[32, 48], [8, 16, 24], [8, 16, 24]]) == [48, 8, 8]


# ---- how far a converted model is from the original

LENGTH = 16


class Same(nn.Module):
    """Answers with given logits."""

    def __init__(self, logits):
        super().__init__()
        self.answer = logits

    def forward(self, ids):
        return LatentOutput(self.answer(ids), ())


def test_the_original_is_no_distance_from_itself(programs):
    captured = programs["llama-gqa"]
    measure = Divergence(captured.program, models.tokens(3, LENGTH))
    assert measure(Same(lambda ids: models.logits(captured.module, ids))) == pytest.approx(0.0, abs=1e-7)
    shifted = measure(Same(lambda ids: models.logits(captured.module, ids) + 3.0))
    assert shifted == pytest.approx(0.0, abs=1e-6), "logits are known up to a constant"


def test_divergence_is_the_kl_divergence_of_predictions(programs):
    """Summed token by token in float64; the measure sums float32, some hundreds of numbers."""
    captured, ids = programs["llama-gqa"], models.tokens(3, LENGTH)
    model = convert(captured.program, captured.sites, exact=False, cache_ratio=0.3)
    with torch.no_grad():
        p, q = (x.double().softmax(-1) for x in (models.logits(captured.module, ids), model(ids).logits))
    expected = float((p * (p / q).log()).sum()) / ids.numel()
    got = Divergence(captured.program, ids)(model)
    assert got == pytest.approx(expected, rel=1e-4)
    assert got > 0


def test_divergence_looks_at_a_few_windows_only(programs, monkeypatch):
    captured, ids = programs["llama-gqa"], models.tokens(6, LENGTH)
    monkeypatch.setattr("mla_compile.passes.search._PROBE_TOKENS", 2 * LENGTH + 3)
    seen = []

    def answer(asked):
        seen.append(asked)
        return models.logits(captured.module, asked)

    Divergence(captured.program, ids)(Same(answer))
    assert torch.equal(torch.cat(seen), ids[:2])
    monkeypatch.setattr("mla_compile.passes.search._PROBE_LOGITS", LENGTH * models.VOCABULARY - 1)
    seen.clear()
    Divergence(captured.program, ids)(Same(answer))
    assert torch.equal(torch.cat(seen), ids[:1]), "one at least"


def test_what_overflows_is_told_and_not_compared(programs, monkeypatch):
    """It is not a cache ratio that leaves no room."""
    captured, ids = programs["llama-gqa"], models.tokens(2, LENGTH)
    answer = models.logits(captured.module, ids)
    broken = answer.clone()
    broken[0, 3] = math.nan
    given = iter(broken.split(1))
    assert Divergence(captured.program, ids)(Same(lambda _: next(given))) == math.inf
    with pytest.raises(VerificationError, match=r"the converted model predicts .* is no number"):
        require_finite(math.inf)
    monkeypatch.setattr("mla_compile.passes.search.original_logits", lambda *_, **__: iter(broken.split(1)))
    with pytest.raises(VerificationError, match=r"the original model predicts .* is no number"):
        Divergence(captured.program, ids)
