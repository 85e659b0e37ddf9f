"""Layers of one kind are probed once, and still described by themselves."""

from __future__ import annotations

import models
import pytest
import torch
import zoo
from torch import Tensor, nn

from mla_compile.passes import operands, recognise
from mla_compile.passes.evaluate import GraphEvaluator
from mla_compile.passes.kinds import kind_of
from mla_compile.passes.trace import DataFlow, find_anchors


def kinds(program) -> list[str]:
    flow, evaluator = DataFlow(program), GraphEvaluator(program)
    return [kind_of(anchor, flow, evaluator) for anchor in find_anchors(flow, program)]


class OtherTheta(zoo.HalfRope):
    def queries(self, q: Tensor) -> Tensor:
        return zoo.rotate(q, 60.0)

    def keys(self, k: Tensor) -> Tensor:
        return zoo.rotate(k, 60.0)


class Learned(zoo.Attention):
    """Frequencies are parameters: layers of one kind that rotate differently."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.rand(()) * 50 + 20)

    def queries(self, q: Tensor) -> Tensor:
        return zoo.rotate(q, self.theta)

    def keys(self, k: Tensor) -> Tensor:
        return zoo.rotate(k, self.theta)


def test_equal_layers_are_of_one_kind_and_others_are_not(zoo_programs):
    del zoo_programs
    first, second, third = kinds(zoo.program_of(zoo.model(zoo.HalfRope, zoo.HalfRope, OtherTheta)))
    assert first == second
    assert first != third
    one, other = kinds(zoo.program_of(zoo.model(zoo.windowed(5), zoo.windowed(6))))
    assert one != other


def test_the_long_probes_run_once_per_kind(monkeypatch):
    measured = []
    probe = operands.probe_rope
    monkeypatch.setattr(operands, "probe_rope", lambda o, *rest: measured.append(o.role) or probe(o, *rest))
    found = recognise.recognise(zoo.program_of(zoo.model(*[zoo.HalfRope] * 4)))
    assert len(found.sites) == 4
    assert measured == ["query", "key", "value"]
    assert len({s.rope for s in found.sites}) == 1


def test_a_layer_of_the_same_kind_that_rotates_otherwise_is_measured_anew():
    torch.manual_seed(4)
    module = zoo.model(Learned, Learned)
    thetas = [layer.theta.item() for layer in module.layers]
    assert thetas[0] != pytest.approx(thetas[1])
    program = zoo.program_of(module)
    assert len(set(kinds(program))) == 1
    sites = recognise.recognise(program).sites
    for site, theta in zip(sites, thetas, strict=True):
        assert site.rope.inv_freq == pytest.approx([theta ** (-i / 3) for i in range(3)], rel=1e-5)


def test_norm_gains_and_sinks_are_a_layers_own(programs):
    sites = programs["qwen3"].recognition.sites
    assert sites[0].key.gain != sites[1].key.gain
    program = zoo.program_of(zoo.model(zoo.Sink, zoo.Sink))
    first, second = recognise.recognise(program).sites
    assert (first.sinks, second.sinks) == ("layers.0.sink", "layers.1.sink")
    assert first.scores.sinks != second.scores.sinks
    assert len(sites) == models.LAYERS


class Temperature(zoo.SpelledOut):
    """The scale of the scores is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(()) + 0.5)

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return super().scores(q, k, x) * self.temperature


def test_what_is_learned_about_scores_is_each_layers_own_without_conversion_too():
    program = zoo.program_of(zoo.model(*[zoo.Sink] * 2, *[Temperature] * 2))
    scores = [layer.plain and layer.plain.scores for layer in recognise.plain_layers(program)]
    assert scores == [site.scores for site in recognise.recognise(program).sites]
    assert len({s.sinks for s in scores[:2]}) == len({s.scale for s in scores[2:]}) == 2


def test_an_operator_that_fails_on_made_up_values_is_a_reason():
    """An operator may raise any error, and a layer that cannot be evaluated is refused with what it says."""

    program = zoo.program_of(zoo.model(zoo.Masked))

    def fails(*arguments: object, **named: object) -> Tensor:
        raise TypeError("ones() takes other arguments")

    node = next(n for n in program.exported.graph.nodes if "aten.ones" in str(n.target))
    node.target = fails
    (rejection,) = recognise.recognise(program).rejections
    assert rejection.reason.endswith("cannot be evaluated on 13 tokens (ones() takes other arguments)")
