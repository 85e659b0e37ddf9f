"""What is seen of attention layers on text, against what the modules themselves compute and differentiate."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.nn.functional as F
import zoo
from observed import observe_outputs, observe_sites

from mla_compile.errors import RefusedError
from mla_compile.passes.activations import attend_site
from mla_compile.passes.recognise import recognise

# Both sides run in float32 and in another order of sums: some tens of roundings of 6e-8, relative to the largest.
CLOSE = 1e-5
LENGTH = 11
IDS = torch.randint(0, zoo.VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def relative(got, expected):
    assert got.shape == expected.shape
    assert expected.abs().max() > 0, "nothing to compare with"
    return float((got - expected).abs().max() / expected.abs().max())


def loss(logits, ids):
    """Sum of the next tokens' losses."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


class Seen:
    """What goes into every layer and its output projection; noise may be added to the latter."""

    def __init__(self, layers, norms, noise=None):
        self.sources, self.outputs, self.noise = {}, {}, noise or {}
        for i, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
            norm.register_forward_hook(lambda _, __, y, i=i: self.sources.__setitem__(i, y.detach()))
            layer.out.register_forward_pre_hook(lambda _, given, i=i: self.attended(i, *given))

    def attended(self, i, y):
        y = y if i not in self.noise else y + self.noise[i]
        y.retain_grad()
        self.outputs[i] = y
        return (y,)


@pytest.fixture(scope="module")
def mixed_seen(mixed):
    return mixed.look(IDS)


@pytest.fixture(scope="module")
def true_mixed():
    """The hand-written model's own inputs, attention outputs and gradients, per layer."""
    module = zoo.model(*zoo.MIXED.values())
    seen = Seen(module.layers, module.norms)
    loss(module(IDS), IDS).backward()
    return seen


def in_graph_order(site, heads):
    """``[B, S, H * Dv]`` as the layer's output projection reads them."""
    if site.order is None:
        return heads.flatten(2)
    back = torch.empty_like(heads)
    back[:, :, list(site.order)] = heads
    return back.flatten(2)


def test_the_mixed_model_has_what_is_special(mixed):
    """The cases that the tests below are for do occur."""
    sites = mixed.sites
    assert any(s.order is not None for s in sites)
    assert any(s.value.heads != s.kv_heads for s in sites)
    assert any(s.query.turned is not None for s in sites)
    assert any(s.value.norm is not None and s.value.offset is not None for s in sites)
    assert any(s.key.norm is not None and not s.key.norm.per_head for s in sites)
    assert any(s.softcap and s.scores.sinks is not None for s in sites)
    assert any(s.slopes is not None and s.scores.sinks is not None and s.order is not None for s in sites)
    assert any(s.mask.window for s in sites)
    assert any("bh" in s.output_axes for s in sites)


@pytest.mark.parametrize("index", range(len(zoo.MIXED)), ids=zoo.MIXED)
def test_a_site_attends_as_its_layer(mixed, mixed_seen, true_mixed, index):
    """Heads as described, rotated and attended to from scratch, are what the output projection reads."""
    site, seen = mixed.sites[index], mixed_seen[index]
    attended = attend_site(site, seen.query, seen.key, seen.value)
    assert relative(in_graph_order(site, attended.output), true_mixed.outputs[index].detach()) < CLOSE
    assert relative(seen.source, true_mixed.sources[index]) < CLOSE


@pytest.mark.parametrize("index", range(len(zoo.MIXED)), ids=zoo.MIXED)
def test_gradients_are_those_of_the_module(mixed, mixed_seen, true_mixed, index):
    got = in_graph_order(mixed.sites[index], mixed_seen[index].gradient)
    # Gradients pass through up to twenty layers: ten times the rounding of one.
    assert relative(got, true_mixed.outputs[index].grad) < 10 * CLOSE


def test_outputs_are_those_of_the_module(mixed, true_mixed):
    with torch.inference_mode():
        found = observe_outputs(mixed.program, mixed.sites)(IDS)
    for index, (site, output) in enumerate(zip(mixed.sites, found, strict=True)):
        assert relative(in_graph_order(site, output), true_mixed.outputs[index].detach()) < CLOSE


@pytest.mark.parametrize("name", ["llama-gqa", "llama-yarn", "complex-llama", "nanogpt"])
def test_a_site_attends_as_its_graph(programs, name):
    captured, ids = programs[name], models.tokens(2, LENGTH)
    outputs = observe_outputs(captured.program, captured.sites)(ids)
    activations = observe_sites(captured.program, captured.sites, gradients=False)(ids)
    for site, seen, output in zip(captured.sites, activations, outputs, strict=True):
        assert seen.gradient is None
        attended = attend_site(site, seen.query, seen.key, seen.value)
        assert relative(attended.output, output.detach()) < CLOSE


@pytest.mark.parametrize("layer", range(models.LAYERS))
def test_gradients_are_finite_differences_of_the_loss(programs, layer):
    """Central differences in float64, along a random direction of the layer's attention output."""
    captured, ids = programs["nanogpt"], models.tokens(2, LENGTH)
    seen = observe_sites(captured.program, captured.sites, gradients=True)(ids)[layer]
    direction = torch.randn(2, LENGTH, models.WIDTH, generator=torch.Generator().manual_seed(layer)).double()
    values = []
    for step in (1e-4, -1e-4):
        module = copy.deepcopy(captured.module).double()
        Seen(module.attentions, module.norms[::2], {layer: step * direction})
        values.append(float(loss(module(ids), ids).detach()))
    expected = (values[0] - values[1]) / 2e-4  # the third derivative adds some 1e-8
    got = float((seen.gradient.flatten(2).double() * direction).sum())
    assert got == pytest.approx(expected, rel=1e-4)


def test_the_slope_of_a_soft_cap_is_its_derivative(mixed, mixed_seen):
    index = list(zoo.MIXED).index("soft-cap")
    site, seen = mixed.sites[index], mixed_seen[index]
    slope = attend_site(site, seen.query, seen.key, seen.value).slope
    scores = (seen.query.transpose(1, 2) @ seen.key.permute(0, 2, 3, 1)).double() * site.scale
    scores.requires_grad_()
    (5 * torch.tanh(scores / 5)).sum().backward()
    assert relative(slope.double(), scores.grad) < CLOSE


def test_looking_leaves_the_model_as_it_is(programs):
    """The parameters are the user's: no gradients gather in them, trainable or frozen, and results are the same."""
    captured, ids = programs["llama-gqa"], models.tokens(2, LENGTH)
    module, found = captured.module, []
    try:
        for trainable in (True, False):
            module.requires_grad_(trainable)
            found.append(observe_sites(captured.program, captured.sites, gradients=True)(ids))
            assert all(p.grad is None and p.requires_grad == trainable for p in module.parameters())
    finally:
        module.requires_grad_(True)
    for trained, frozen in zip(*found, strict=True):
        assert torch.equal(trained.gradient, frozen.gradient)
        assert not any(x.requires_grad for x in (*vars(trained).values(), *vars(frozen).values()))


def test_every_batch_is_looked_at_anew(programs):
    captured = programs["llama-gqa"]
    look = observe_sites(captured.program, captured.sites, gradients=True)
    first, second = models.tokens(2, LENGTH), models.tokens(1, 5, seed=1)
    alone = look(first)
    look(second)
    for before, after in zip(alone, look(first), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(before).values(), vars(after).values(), strict=True))


class SilentLM(zoo.TinyLM):
    """A model that lets no gradient through."""

    def forward(self, ids):
        return super().forward(ids).detach()


def test_a_model_without_derivatives_is_refused():
    program = zoo.program_of(zoo.model(zoo.HalfRope, kind=SilentLM))
    look = observe_sites(program, recognise(program).sites, gradients=True)
    with pytest.raises(RefusedError, match=r"cannot be run backward .*\. Pass --no-gradients"):
        look(IDS)
