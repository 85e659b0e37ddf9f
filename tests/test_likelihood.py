"""Log-likelihoods against a direct computation from the logits of one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from mla_compile.text.likelihood import log_likelihoods, scored_windows

VOCABULARY, PREFIX, LONGEST = 13, 5, 6
EXACT = 1e-12  # the same float64 sums in another order

_generator = torch.Generator().manual_seed(0)
TABLE = torch.randn(VOCABULARY, 8, generator=_generator, dtype=torch.float64)
HEAD = torch.randn(8, VOCABULARY, generator=_generator, dtype=torch.float64)


def score(ids):
    """Causal, told apart by everything before a place, and no longer than it may be."""
    assert ids.shape[1] <= LONGEST
    return (TABLE[ids].cumsum(1).sin() @ HEAD) * 2


def direct(given: list[int], targets: list[int]) -> tuple[float, bool]:
    """Oracle: the last predictions of one sequence."""
    logits = score(torch.tensor([given]))[0, -len(targets) :]
    probabilities = [row.softmax(-1)[token] for row, token in zip(logits, targets, strict=True)]
    return sum(float(p.log()) for p in probabilities), logits.argmax(-1).tolist() == targets


def likelihoods(*pairs, batch=3):
    return log_likelihoods(score, pairs, prefix=PREFIX, longest=LONGEST, batch=batch)


def greedy(context: list[int], count: int) -> list[int]:
    ids = list(context)
    for _ in range(count):
        ids.append(int(score(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(context) :]


CASES = {
    "one token": (([1, 2], [3]), [([1, 2], [3])]),
    "several tokens": (([1, 2], [3, 4]), [([1, 2, 3], [3, 4])]),
    "empty context": (([], [3, 4]), [([PREFIX, 3], [3, 4])]),
    "just fits": (([1, 2, 3], [4, 6, 7, 8]), [([1, 2, 3, 4, 6, 7], [4, 6, 7, 8])]),
    "context too long": (([9, 1, 2, 3, 4, 6], [7, 8]), [([1, 2, 3, 4, 6, 7], [7, 8])]),
    "continuation too long": (
        ([1, 2], [3, 4, 6, 7, 8, 9, 10, 11]),
        [([2, 3, 4, 6, 7, 8], [3, 4, 6, 7, 8, 9]), ([4, 6, 7, 8, 9, 10], [10, 11])],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_pair(case):
    pair, parts = CASES[case]
    ((value, likely),) = likelihoods(pair)
    expected = [direct(*part) for part in parts]
    assert value == pytest.approx(sum(v for v, _ in expected), rel=EXACT)
    assert likely == all(flag for _, flag in expected)


def test_every_token_of_a_text_is_predicted_once_with_all_the_context_that_fits():
    tokens = [PREFIX, *range(10)]
    assert [(list(given), list(targets)) for given, targets in scored_windows(tokens, 10, 4)] == [
        ([PREFIX, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]


def test_the_flag_says_whether_greedy_decoding_writes_the_continuation():
    context = [1, 2]
    written = greedy(context, 3)
    other = [*written[:1], (written[1] + 1) % VOCABULARY, written[2]]
    assert [flag for _, flag in likelihoods((context, written), (context, other))] == [True, False]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_pairs_do_not_disturb_each_other(batch):
    pairs = [pair for pair, _ in CASES.values()]
    together, alone = likelihoods(*pairs, batch=batch), [likelihoods(pair)[0] for pair in pairs]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=EXACT)
    assert [flag for _, flag in together] == [flag for _, flag in alone]


def test_nothing_is_certain():
    assert likelihoods(([1, 2], [])) == [(0.0, True)]


def test_only_the_logits_that_are_read_are_asked_for():
    """The same as of all logits; contexts of several lengths, run together behind padding."""
    asked = []

    def last(ids, tokens):
        asked.append((ids.shape[1], tokens))
        return score(ids)[:, -tokens:]

    pairs = [([1, 2, 3, 4], [6]), ([1, 2, 3], [4, 6]), ([7, 8, 9], [3]), ([2], [5, 1])]
    sizes = {"prefix": PREFIX, "longest": LONGEST, "batch": 3}
    assert log_likelihoods(score, pairs, last=last, **sizes) == log_likelihoods(score, pairs, **sizes)
    assert asked == [(4, 2), (2, 2)]
