"""Models that are refused for a reason of their own are told that reason, and a remedy that is one."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import mla_compile
from mla_compile.errors import LoadError, RefusedError
from mla_compile.passes.recognise import recognise
from mla_compile.site import RejectCode
from mla_compile.sources.capture import capture

IDS = torch.randint(zoo.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))


class FlexibleMask(zoo.HalfRope):
    def attend(self, q, k, v, x, ids):
        length = x.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
        return flex_attention(q, k, v, block_mask=mask, scale=zoo.SCALE)


class FlexibleScores(zoo.HalfRope):
    def attend(self, q, k, v, x, ids):
        return flex_attention(q, k, v, lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf), scale=zoo.SCALE)


@pytest.mark.parametrize("kind", [FlexibleMask, FlexibleScores])
def test_flex_attention_is_named_with_what_to_write_instead(kind):
    """Also beside a layer that converts. The remedy is one: the same layer by the operator that is named converts."""
    model = zoo.model(kind, zoo.HalfRope)
    found = recognise(zoo.program_of(model))
    assert [s.index for s in found.sites] == [1]
    (rejection,) = found.rejections
    assert (rejection.code, rejection.path) == (RejectCode.ANCHOR, "layers.0")
    with pytest.raises(RefusedError, match="flex_attention, whose mask and scores are functions") as caught:
        mla_compile.compile(model, (IDS,), exact=True)
    assert "scaled_dot_product_attention with a mask" in caught.value.remedy
    model.layers[0].__class__ = zoo.Masked
    with torch.no_grad():
        zoo.sites_of(zoo.program_of(model))


def test_a_transformers_model_with_flex_attention_is_told_what_to_call():
    """Its export fails in a line of transformers, which is no user's to change."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attn_implementation="flex_attention")).eval()
    with pytest.raises(LoadError, match="LlamaForCausalLM attends by flex_attention") as caught:
        capture(model, None)
    assert "set_attn_implementation('sdpa')" in caught.value.remedy
    model.set_attn_implementation("sdpa")
    assert len(recognise(capture(model, None)).sites) == 1


class CountedPositions(zoo.TinyLM):
    """Positions are counted from the tokens that are no padding (RoBERTa)."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.places = nn.Embedding(64, zoo.WIDTH)

    def positions(self, ids):
        real = (ids != zoo.PADDING).long()
        return real.cumsum(1) * real + zoo.PADDING

    def embed(self, ids):
        return super().embed(ids) + self.places(self.positions(ids))


class ClampedPositions(CountedPositions):
    def positions(self, ids):
        return ((ids != zoo.PADDING).long().cumsum(-1) - 1).clamp(min=0)


class CountedPadding(CountedPositions):
    """Every token is told how much of its sequence is padding."""

    def positions(self, ids):
        return (ids == zoo.PADDING).long().sum(1, keepdim=True).expand_as(ids)


@pytest.mark.parametrize("kind", [CountedPositions, ClampedPositions, CountedPadding])
def test_positions_that_depend_on_token_ids_are_named(kind):
    with pytest.raises(RefusedError, match=r"counts some of the token ids, at '(cumsum|sum_1)'") as caught:
        mla_compile.compile(zoo.model(zoo.Attention, kind=kind), (IDS,), exact=True)
    assert "torch.arange" in caught.value.remedy


class PlainPositions(CountedPositions):
    """What the remedy says."""

    def positions(self, ids):
        return torch.arange(ids.shape[1])


class AllCounted(CountedPositions):
    """All tokens are counted, whatever they are: an ordinary count in other words."""

    def positions(self, ids):
        return torch.ones_like(ids).cumsum(1) - 1


@pytest.mark.parametrize("kind", [PlainPositions, AllCounted])
def test_positions_that_depend_on_no_token_convert(kind):
    mla_compile.compile(zoo.model(zoo.Attention, kind=kind), (IDS,), exact=True)
