"""A user teaches an operator's meaning, and models that call it convert."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor

import mla_compile
from mla_compile.errors import LoadError, RefusedError, UsageError

NAME = "mla_compile_tests::own_attention"


@torch.library.custom_op(NAME, mutates_args=())
def own_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


@own_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(v)


class Own(zoo.HalfRope):
    """Attention by an operator nobody has heard of."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        return torch.ops.mla_compile_tests.own_attention(q, k, v, zoo.SCALE)


def meaning(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("operator", [NAME, f"{NAME}.default", torch.ops.mla_compile_tests.own_attention.default])
def test_a_taught_operator_converts(operator):
    module, ids = zoo.model(Own), torch.randint(0, zoo.VOCABULARY, (2, 9))
    with pytest.raises(RefusedError, match="No attention was found"):
        mla_compile.compile(module, (ids,), exact=True)
    forget = mla_compile.register_pattern(operator, meaning)
    try:
        compiled = mla_compile.compile(module, (ids,), exact=True)
    finally:
        forget()
    with torch.no_grad():
        expected, found = module(ids), compiled.module(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert compiled.report.sites[0].rope.layout == "half"


def test_a_meaning_that_fails_is_the_models_fault_and_a_defect_of_ours_is_not(monkeypatch):
    def refuses(*arguments):
        raise RefusedError("This operator is not taught yet.", "Wait.")

    def fails(*arguments):
        raise KeyError("key")

    module = zoo.model(Own)
    for bad, error, said in ((refuses, RefusedError, "not taught yet"), (fails, LoadError, "could not be normalised")):
        forget = mla_compile.register_pattern(NAME, bad)
        try:
            with pytest.raises(error, match=said):
                zoo.program_of(module)
        finally:
            forget()
    monkeypatch.setattr("mla_compile.sources.exported.spell_tables", fails)
    with pytest.raises(KeyError):
        zoo.program_of(module)


def test_what_was_taught_can_be_forgotten():
    forget = mla_compile.register_pattern(NAME, meaning)
    forget()
    forget()  # and again, without harm
    with pytest.raises(RefusedError, match="No attention was found"):
        mla_compile.compile(zoo.model(Own), (models.tokens(2, 5),), exact=True)


@pytest.mark.parametrize("name", ["nonsense", "nonsense::attention", "aten::nonsense", "::", ""])
def test_an_unknown_operator_is_named(name):
    with pytest.raises(UsageError, match=f"There is no operator '{name}'"):
        mla_compile.register_pattern(name, meaning)


def test_a_meaning_is_a_function():
    with pytest.raises(UsageError, match="is a str, which cannot be called"):
        mla_compile.register_pattern(NAME, "softmax")
