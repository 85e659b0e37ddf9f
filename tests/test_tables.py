"""Embeddings without ``nn.Embedding``: what is the same converts, and what is none is named as the reason."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mla_compile import api
from mla_compile.errors import RefusedError
from mla_compile.sources.capture import capture
from mla_compile.sources.tables import has_other_tables

ROUNDING = 1e-5  # float32 through two layers; ten times below what is allowed


class Spelled(models.NanoGPT):
    """One layer, whose tokens are looked up in one way or another."""

    def __init__(self, how):
        super().__init__()
        self.how, self.scale = how, nn.Linear(1, models.WIDTH)

    def forward(self, ids):
        weight = self.tokens.weight
        match self.how:
            case "indexed":
                x = weight[ids]
            case "indexed by other integers":
                x = (2 * weight)[ids.int()]
            case "one-hot":
                x = F.one_hot(ids, models.VOCABULARY).float() @ weight
            case "shifted":
                x = weight[(ids - 1).clamp(min=0)]
            case "of positions":
                x = self.tokens(ids) + weight[torch.arange(ids.shape[1])]
            case "a number":
                x = self.scale(ids[..., None].float())
        return self.head(x + self.attentions[0](self.norms[0](x)))


def spelled(how):
    torch.manual_seed(0)
    return Spelled(how).eval()


@pytest.mark.parametrize("how", ["indexed", "indexed by other integers", "one-hot"])
def test_tables_of_any_spelling_convert(how):
    """Oracle: the module itself, called directly."""
    model, ids = spelled(how), models.tokens(2, 12)
    compiled = api.compile(model, (models.tokens(2, 8),), exact=True, check=False)
    with torch.no_grad():
        got, expected = compiled.module(ids).logits, model(ids)
    assert (got - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("how", ["shifted", "of positions"])
def test_what_is_no_table_of_tokens_stays(how):
    program = capture(spelled(how), (models.tokens(2, 8),))
    assert not has_other_tables(program.exported)
    assert any(n.target is torch.ops.aten.index.Tensor for n in program.exported.graph.nodes)


def test_tokens_that_are_looked_up_nowhere_are_the_reason():
    with pytest.raises(RefusedError, match="are looked up in no table of embeddings"):
        api.compile(spelled("a number"), (models.tokens(2, 8),), exact=True)
