"""``LatentModel``: what it fills in when the caller leaves it out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mla_compile.runtime.module import LatentModel, positions_from_mask

ROWS = (3, 5)


class Recorder(nn.Module):
    """Stands for a rewritten graph: remembers its arguments and grows the caches by ones."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.register_parameter("counts", nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False))
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.calls = []

    def forward(self, ids, mask, positions, *past):
        self.calls.append((mask, positions, past))
        batch, new = ids.shape
        return torch.zeros(batch, new, 7), *(
            torch.cat([p, torch.ones(batch, new, p.shape[2], dtype=p.dtype)], 1) for p in past
        )


@pytest.mark.parametrize(
    ("mask", "new", "expected"),
    [
        pytest.param([1, 1, 1, 1], 4, [0, 1, 2, 3], id="none"),
        pytest.param([0, 0, 1, 1], 4, [0, 0, 0, 1], id="left"),
        pytest.param([1, 1, 0, 0], 4, [0, 1, 1, 1], id="right"),
        pytest.param([0, 1, 1, 1, 1], 2, [2, 3], id="left, after a cache"),
        pytest.param([1, 1, 0, 1, 1], 2, [2, 3], id="right padding of a cached prompt"),
        pytest.param([0, 7, -2, 1], 2, [1, 2], id="any non-zero number is real"),
        pytest.param([0, 0], 2, [0, 0], id="nothing real"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.float32])
def test_position_is_the_number_of_real_tokens_before(mask, new, expected, dtype):
    found = positions_from_mask(torch.tensor([mask], dtype=dtype), new)
    assert found.dtype == torch.long
    assert found.tolist() == [expected]


def test_without_cache_and_mask_all_tokens_are_real_and_counted_from_zero():
    graph = Recorder()
    result = LatentModel(graph, ROWS, (0, 0))(torch.zeros(2, 4, dtype=torch.long))
    ((mask, positions, past),) = graph.calls
    assert mask.tolist() == [[1] * 4] * 2
    assert positions.tolist() == [[0, 1, 2, 3]] * 2
    assert [p.shape for p in past] == [(2, 0, 3), (2, 0, 5)]
    assert [c.shape for c in result.cache] == [(2, 4, 3), (2, 4, 5)]
    assert result.logits.shape == (2, 4, 7)


def test_with_a_cache_the_mask_covers_it_and_positions_go_on():
    graph = Recorder()
    model = LatentModel(graph, ROWS, (0, 0))
    cache = model(torch.zeros(1, 4, dtype=torch.long)).cache
    model(torch.zeros(1, 2, dtype=torch.long), past=list(cache))
    mask, positions, past = graph.calls[-1]
    assert mask.tolist() == [[1] * 6]
    assert positions.tolist() == [[4, 5]]
    assert all(torch.equal(given, kept) for given, kept in zip(past, cache, strict=True))


def test_no_new_tokens_are_an_error():
    with pytest.raises(ValueError, match="There are no new tokens"):
        LatentModel(Recorder(), ROWS, (0, 0))(torch.zeros(2, 0, dtype=torch.long))


def test_positions_are_counted_from_the_mask_that_is_given():
    graph = Recorder()
    LatentModel(graph, ROWS, (0, 0))(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 0]]))
    assert graph.calls[0][1].tolist() == [[0, 0, 1], [0, 1, 1]]


def test_what_the_caller_gives_is_used():
    graph = Recorder()
    mask, positions = torch.tensor([[1, 0]]), torch.tensor([[5, 9]])
    LatentModel(graph, ROWS, (0, 0))(torch.zeros(1, 2, dtype=torch.long), mask, positions)
    assert graph.calls[0][0] is mask
    assert graph.calls[0][1] is positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_cache_holds_no_tokens_in_the_weights_type(dtype):
    cache = LatentModel(Recorder(dtype), ROWS, (0, 0)).empty_cache(3)
    assert [c.shape for c in cache] == [(3, 0, 3), (3, 0, 5)]
    assert {c.dtype for c in cache} == {dtype}
    assert not any(c.requires_grad for c in cache)


def test_a_full_window_does_not_tell_how_many_tokens_there_were():
    model = LatentModel(Recorder(), ROWS, (3, 4))
    past = [torch.zeros(1, 2, 3), torch.zeros(1, 3, 5)]
    with pytest.raises(ValueError, match="Pass attention_mask over all tokens so far"):
        model(torch.zeros(1, 1, dtype=torch.long), past=past)
    model(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 9, dtype=torch.long), past=past)
    # One layer whose window is not full yet, or that has none, is enough.
    model(torch.zeros(1, 1, dtype=torch.long), past=[past[0], torch.zeros(1, 2, 5)])
    assert [mask.shape[1] for mask, _, _ in model.graph.calls] == [9, 3]


def test_layers_that_see_one_token_begin_without_a_mask():
    """Their caches are always empty; without one there were no tokens."""
    model = LatentModel(Recorder(), ROWS, (1, 1))
    model(torch.zeros(1, 4, dtype=torch.long))
    assert model.graph.calls[0][0].tolist() == [[1] * 4]


def test_cached_elements_stop_at_the_window():
    model = LatentModel(Recorder(), ROWS, (0, 4))
    assert [model.cached_elements(tokens) for tokens in (0, 2, 3, 10)] == [0, 16, 24, 45]
