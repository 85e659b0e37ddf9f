"""Anchors and the projections behind them, found by data flow."""

from __future__ import annotations

import models
import pytest
import torch
import zoo
from torch import nn

from mla_compile.passes.trace import (
    Anchor,
    DataFlow,
    MismatchError,
    find_anchors,
    module_path,
    read_projection,
)
from mla_compile.site import RejectCode

ROLES = ("query", "key", "value")
WEIGHTS = {
    "llama-gqa": [f"model.layers.0.self_attn.{r}_proj.weight" for r in "qkv"],
    "nanogpt": ["attentions.0.qkv.weight"] * 3,
    "complex-llama": [f"attentions.0.w{r}.weight" for r in "qkv"],
}


def anchors(program):
    return find_anchors(DataFlow(program), program)


@pytest.mark.parametrize("name", models.CONVERTIBLE)
def test_one_anchor_per_layer(programs, name):
    found = anchors(programs[name].program)
    assert len(found) == models.LAYERS
    spelled_out = name in ("nanogpt-spelled-out", "complex-llama")
    for anchor in found:
        assert anchor.fused is not spelled_out
        assert (anchor.scores is anchor.softmax is anchor.output) is not spelled_out


def test_anchor_of_a_spelled_out_layer(zoo_programs):
    (anchor,) = anchors(zoo_programs[zoo.SpelledOut])
    assert anchor.scores.target is torch.ops.aten.matmul.default
    assert anchor.scores.args == (anchor.query, anchor.key)
    assert anchor.softmax.target is torch.ops.aten.softmax.int
    assert anchor.output.args == (anchor.probabilities, anchor.value)


@pytest.mark.parametrize("name", WEIGHTS)
def test_projection_behind_every_operand(programs, name):
    program = programs[name].program
    flow, anchor = DataFlow(program), anchors(program)[0]
    found = [read_projection(flow, getattr(anchor, role), role) for role in ROLES]
    assert [flow.parameter_name(p.weight) for p in found] == WEIGHTS[name]
    assert len({p.source for p in found}) == 1


@pytest.mark.parametrize("kind", [zoo.Attention, zoo.FlatProduct], ids=["linear", "addmm"])
def test_parts_of_a_projection(zoo_programs, kind):
    program = zoo_programs[kind]
    flow, (anchor,) = DataFlow(program), anchors(program)
    found = read_projection(flow, anchor.key, "key")
    assert found.source in flow.hidden
    assert flow.parameter_name(found.weight) == "layers.0.k.weight"
    assert flow.parameter_name(found.bias) == "layers.0.k.bias"


def test_projection_by_a_parameter_has_no_bias(zoo_programs):
    program = zoo_programs[zoo.ParameterProduct]
    flow, (anchor,) = DataFlow(program), anchors(program)
    assert read_projection(flow, anchor.query, "query").bias is None


def test_activations_weights_and_shapes_are_told_apart(zoo_programs):
    """A size of an activation, and what is made from sizes alone, is neither."""
    program = zoo_programs[zoo.Masked]
    flow = DataFlow(program)
    kinds = {str(n.target): n for n in program.exported.graph.nodes if n.op == "call_function"}
    assert kinds["aten.embedding.default"] in flow.hidden
    assert kinds["aten.layer_norm.default"] in flow.hidden
    assert kinds["aten.tril.default"] not in flow.hidden | flow.static | flow.weighted
    assert kinds["aten.sym_size.int"] not in flow.hidden | flow.static | flow.weighted
    assert set(flow.parameters) <= flow.static & flow.weighted
    assert set(flow.parameters.values()) == {name for name, _ in zoo.model(zoo.Masked).named_parameters()}


def test_what_is_computed_from_weights_alone_is_a_weight(zoo_programs):
    program = zoo_programs[zoo.ParameterProduct]
    flow, (anchor,) = DataFlow(program), anchors(program)
    weight = read_projection(flow, anchor.key, "key").weight
    assert weight.target is torch.ops.aten.add.Tensor
    assert weight in flow.static & flow.weighted
    assert flow.parameter_name(weight) == f"<{weight.name}>", "it is made of several parameters"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (zoo.TwoProducts, "fed by 2 products"),
        (zoo.WithoutValues, "not multiplied with values"),
        (zoo.MixedProbabilities, "not multiplied with values"),
    ],
)
def test_attention_that_is_no_anchor_is_listed_with_its_reason(zoo_programs, kind, reason):
    ((node, mismatch),) = anchors(zoo_programs[kind])
    assert mismatch.code == RejectCode.ANCHOR
    assert reason in mismatch.reason
    assert node.target is torch.ops.aten.softmax.int


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (zoo.TwoProjections, r"2 projections \(layers.0.k.weight, layers.0.v.weight\)"),
        (zoo.NoProjection, "'embedding', which is not a linear projection"),
    ],
)
def test_operand_without_one_projection_is_a_mismatch(kind, reason):
    class Plain(zoo.TinyLM):
        def forward(self, ids):  # without a norm, whose output has another name
            return self.head(self.layers[0](self.tokens(ids), ids))

    program = zoo.program_of(zoo.model(kind, kind=Plain))
    flow, (anchor,) = DataFlow(program), anchors(program)
    with pytest.raises(MismatchError, match=reason) as caught:
        read_projection(flow, anchor.key, "key")
    assert caught.value.code == RejectCode.PROJECTION


class Classifier(zoo.TinyLM):
    """Neither the head's softmax nor that of a gate is attention."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.gate = nn.Linear(zoo.WIDTH, 3)

    def forward(self, ids):
        logits = super().forward(ids)
        return logits.softmax(-1) + self.gate(self.tokens(ids)).softmax(-1)[..., :1]


def test_softmax_over_one_projection_is_no_anchor():
    found = anchors(zoo.program_of(zoo.model(zoo.SpelledOut, kind=Classifier)))
    assert [isinstance(a, Anchor) for a in found] == [True]


def test_module_path_is_the_innermost_or_the_fallback(zoo_programs):
    program = zoo_programs[zoo.Attention]
    (anchor,) = anchors(program)
    assert module_path(anchor.output, "attention_0") == "layers.0"
    placeholder = next(iter(program.exported.graph.nodes))
    assert module_path(placeholder, "attention_0") == "attention_0"
