"""Perplexity, divergence and agreement against their definitions, on models that are tables of random logits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mla_compile.conversion.verdict import require_quality
from mla_compile.errors import QualityGateError, VerificationError
from mla_compile.report import Quality
from mla_compile.text.evaluate import compare, perplexity, streamed_perplexity, worst

VOCABULARY = 11
EXACT = 1e-12  # float64 sums of a few hundred terms in another order


def table(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, VOCABULARY, (7, 9), generator=torch.Generator().manual_seed(0))


def test_figures_are_those_of_the_definitions(windows):
    """Oracle: sums over single tokens in Python's own arithmetic."""
    first, second = table(1), table(2)
    loss = divergence = same = count = 0.0
    for row in windows.tolist():
        for token, following in itertools.pairwise(row):
            p, q = (
                [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
                for logits in (first[token].tolist(), second[token].tolist())
            )
            loss -= math.log(q[following])
            divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            same += p.index(max(p)) == q.index(max(q))
            count += 1
    base, other = compare([lambda ids: first[ids], lambda ids: second[ids]], windows, batch=3)
    assert (base.kl, base.top1) == (0.0, 1.0)
    assert other.perplexity.tokens == base.perplexity.tokens == count == 7 * 8
    assert other.perplexity.loss == pytest.approx(loss / count, rel=EXACT)
    assert other.perplexity.value == pytest.approx(math.exp(loss / count), rel=EXACT)
    assert other.kl == pytest.approx(divergence / count, rel=EXACT)
    assert other.top1 == same / count
    assert perplexity(lambda ids: second[ids], windows, batch=2).loss == pytest.approx(loss / count, rel=EXACT)


def test_the_same_model_is_at_no_distance(windows):
    """Also where some tokens are ruled out altogether."""
    logits = table(1)
    logits[:, 3] = -math.inf
    kept = windows.masked_fill(windows == 3, 4)
    _, again = compare([lambda ids: logits[ids]] * 2, kept)
    assert (again.kl, again.top1) == (0.0, 1.0)


def test_only_one_batch_is_run_at_a_time(windows):
    """Every model sees a batch before any model sees the next one."""
    seen = []

    def scorer(name):
        def score(ids):
            seen.append((name, len(ids)))
            return table(1)[ids]

        return score

    compare([scorer("a"), scorer("b")], windows, batch=3)
    assert seen == [("a", 3), ("b", 3), ("a", 3), ("b", 3), ("a", 1), ("b", 1)]


def test_the_worst_of_errors_hides_no_nan():
    assert worst(0.0, 2.0, 1.0) == 2.0
    for errors in itertools.permutations([0.0, math.nan, 1.0]):
        assert math.isnan(worst(*errors))


def test_a_loss_that_is_no_number_is_told_and_passes_no_gate():
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(VerificationError, match="loss on the text is not a number"):
        perplexity(lambda ids: torch.full((*ids.shape, 5), torch.nan), ids)
    with pytest.raises(VerificationError, match="loss on the text is not a number"):
        streamed_perplexity([torch.full((2, 4, 5), torch.nan)], [ids])
    with pytest.raises(QualityGateError):
        require_quality(Quality(2.0, math.nan, 6, held_out=True), 1.5)
