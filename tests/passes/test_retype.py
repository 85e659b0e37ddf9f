"""Oracle of widening: the same module with its weights made float32 by torch itself."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from torch import Tensor, nn

from mla_compile.passes.retype import is_narrow, widened
from mla_compile.sources.capture import capture
from mla_compile.text.evaluate import original_scorer


class Typed(nn.Module):
    """Every place in which a graph names a type: conversions, creations, products, sums and softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.tokens.weight  # of two readers
        self.register_buffer("table", torch.randn(8, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids: Tensor) -> Tensor:
        own = self.tokens.weight.dtype
        x = self.tokens(ids)
        mean = x.float().square().mean(-1, keepdim=True, dtype=torch.float32)
        x = (x.float() * torch.rsqrt(mean + 1e-6)).to(own) + self.table
        x = x * torch.ones(8, dtype=own) + torch.full((8,), 0.125, dtype=own)
        places = torch.arange(ids.shape[1], dtype=own)[:, None]
        x = x + 0.25 * torch.softmax(x, -1, dtype=torch.float32).to(own) + places.to(torch.float16).to(own)
        return self.head(x.cumsum(-1, dtype=own))


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=str)
def typed(request):
    torch.manual_seed(0)
    module = Typed().eval().to(request.param)
    return module, capture(module, (torch.zeros(2, 5, dtype=torch.long),))


@pytest.mark.parametrize("stored", [False, True])
def test_a_widened_graph_computes_what_the_model_computes_in_float32(typed, stored):
    module, program = typed
    ids = models.tokens(2, 7) % 11
    narrow = program.flat_module()
    wide = widened(narrow, stored=stored)
    with torch.no_grad():
        # The model that was made float32 still rounds its places to float16, which holds whole numbers exactly.
        expected, got = copy.deepcopy(module).float()(ids), wide(ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert is_narrow(wide) is not stored
    assert is_narrow(narrow)
    with torch.no_grad():
        torch.testing.assert_close(narrow(ids), module(ids), rtol=0, atol=0)


def test_weights_are_shared_unless_they_are_stored_anew(typed):
    _, program = typed
    narrow = program.flat_module()
    own = {p.data_ptr() for p in narrow.parameters()}
    assert {p.data_ptr() for p in widened(narrow).parameters()} <= own
    assert len([*widened(narrow, stored=True).parameters()]) == len([*widened(narrow).parameters()])  # tied once


def test_a_float32_graph_is_left_as_it_is(programs):
    module = programs["llama-gqa"].program.flat_module()
    assert widened(module) is module
    assert not is_narrow(module)


def test_gradients_reach_narrow_weights(typed):
    _, program = typed
    wide = widened(program.flat_module())
    wide(torch.tensor([[1, 2, 3], [4, 5, 6]])).sum().backward()
    found = [p for p in wide.parameters() if p.grad is not None]
    assert found
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in found)
    for parameter in found:
        parameter.grad = None


def test_the_original_in_float32_is_closer_to_the_weights_than_the_original_itself(typed):
    module, program = typed
    ids = models.tokens(1, 6) % 11
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(ids)
        wide, narrow = original_scorer(program, widened(program.flat_module()))(ids), original_scorer(program)(ids)
    assert (wide - exact).abs().max() < 1e-3 * (narrow - exact).abs().max()
