"""Rotations that have begun at position 0, and factors of scores per head: both end in the weights of queries."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import zoo
from conversion import convert, difference, in_chunks
from torch import Tensor

import mla_compile
from mla_compile.display.layers import show_layers
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.offset_rotation import common_rope, turn_by_phases, with_phases
from mla_compile.passes.recognise import plain_layers, recognise
from mla_compile.report import summarise_site
from mla_compile.site import RejectCode, Rope
from mla_compile.sources.capture import capture

FREQUENCIES = [50.0 ** (-i / 3) for i in range(3)]


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, zoo.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "ahead"), [(zoo.RopeFromOne, 0), (zoo.KeysAhead, -3)])
def test_only_what_queries_are_ahead_of_keys_is_left(zoo_programs, kind, ahead):
    (site,) = zoo.sites_of(zoo_programs[kind])
    assert site.rope.inv_freq == pytest.approx(FREQUENCIES, rel=1e-6)
    assert torch.equal(torch.tensor(site.key.rows), torch.arange(zoo.HEADS * zoo.DIM).view(zoo.HEADS, -1))
    assert torch.tensor(site.key.gain) == pytest.approx(torch.ones(zoo.HEADS, zoo.DIM), rel=1e-6)
    expected = [math.remainder(ahead * f, 2 * math.pi) for f in FREQUENCIES] if ahead else []
    assert [*site.rope.phases] == pytest.approx(expected, abs=1e-6)


def test_biases_and_gains_in_front_of_the_rotation_are_found(zoo_programs):
    """Gains of either sign, of which some heads differ from the first in a pair's order of signs."""
    program = zoo_programs[zoo.InterleavedKeysBehind]
    (site,) = zoo.sites_of(program)
    gain = program.exported.state_dict["layers.0.gain"].detach().squeeze(1).abs()
    found = torch.tensor(site.key.gain).abs()
    rows = torch.tensor(site.key.rows).sort().values
    assert torch.equal(rows, torch.arange(zoo.HEADS * zoo.DIM).view(zoo.HEADS, -1))
    torch.testing.assert_close(found.sort().values, gain.sort().values, rtol=1e-6, atol=0)
    assert site.error < 1e-9


@pytest.mark.parametrize("kind", [zoo.KeysAhead, zoo.NormedKeysAhead, zoo.LearnedTemperature])
def test_layers_of_one_kind_are_measured_once_and_have_numbers_of_their_own(kind):
    first, second = zoo.sites_of(zoo.program_of(zoo.model(kind, kind)))
    assert first.rope.phases == pytest.approx(second.rope.phases, abs=1e-6)
    assert (first.scores.factors == second.scores.factors) == (first.scores.factors is None)


def test_phases_of_one_operand_follow_the_order_of_a_pair():
    known = Rope(((3, 0), (1, 4)), (1.0, 0.5))
    assert with_phases(known, {(0, 3): 0.25}, "key").phases == (-0.25, 0.0)
    assert with_phases(known, {}, "key") == known
    with pytest.raises(MismatchError, match="channels of the value are turned that do not rotate by position"):
        with_phases(Rope(), {(0, 3): 0.25}, "value")


def test_angles_between_queries_and_keys_are_the_shortest():
    query, key = (Rope(((0, 1),), (0.5,), (phase,)) for phase in (3.0, -3.0))
    assert common_rope(query, key).phases == pytest.approx((6.0 - 2 * math.pi,))
    assert common_rope(query, query).phases == ()
    with pytest.raises(MismatchError, match="queries and keys rotate differently"):
        common_rope(query, Rope(((0, 1),), (0.6,)))


def test_turning_is_what_complex_numbers_do():
    rope = Rope(((0, 2), (3, 1)), (1.0, 0.5), (0.7, -2.0))
    heads = torch.randn(2, 3, 5, dtype=torch.float64)
    turned = turn_by_phases(heads, rope)
    for (a, b), phase in zip(rope.pairs, rope.phases, strict=True):
        z = torch.complex(heads[..., a], heads[..., b]) * complex(math.cos(phase), math.sin(phase))
        torch.testing.assert_close(torch.complex(turned[..., a], turned[..., b]), z)
    assert torch.equal(turned[..., 4], heads[..., 4])


class GivenPositions(zoo.TinyLM):
    """Positions are an input, and keys and queries add constants of their own to it."""

    ahead = (7, 3)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        frequency = torch.tensor(FREQUENCIES)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = norm(x)
            q, k, v = map(layer.split, layer.project(y), (zoo.HEADS,) * 3)
            q, k = (
                self.turned(h, (position_ids + first)[:, None, :, None] * frequency)
                for h, first in zip((q, k), self.ahead, strict=True)
            )
            attended = layer.attend(q, k, v, y, input_ids)
            x = x + layer.out(attended.transpose(1, 2).flatten(2))
        return self.head(x)

    @staticmethod
    def turned(x: Tensor, angle: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@pytest.mark.parametrize("ahead", [(3, 3), (7, 3), (0, 1000)])
def test_positions_that_are_given_and_shifted(ahead):
    kind = type("Shifted", (GivenPositions,), {"ahead": ahead})
    module = zoo.model(zoo.SpelledOut, zoo.SpelledOut, kind=kind)
    with torch.no_grad():
        for layer in module.layers:
            layer.q.weight.mul_(6)
    example = {"input_ids": tokens(2, 5), "position_ids": torch.arange(5).expand(2, 5).contiguous()}
    program = capture(module, example)
    model = convert(program, zoo.sites_of(program))
    ids, places = tokens(3, 12), torch.arange(12).expand(3, 12)
    with torch.no_grad():
        expected = module(ids, places)
        assert difference(model(ids).logits, expected) < 1e-5
        assert difference(in_chunks(model, ids, (5, 1, 4, 1, 1)), expected) < 1e-5
        mask = torch.tensor([[0] * 4 + [1] * 8] * 3)
        padded = model(ids, mask).logits[:, 4:]
        assert difference(padded, module(ids[:, 4:], places[:, :8])) < 1e-5


@pytest.mark.parametrize("kind", [zoo.KeysAhead, zoo.NormedKeysAhead, zoo.LearnedTemperature, zoo.CosineAttention])
def test_a_lossy_conversion_of_one_is_that_of_the_model_it_equals(kind):
    """With a smaller latent and fewer rotating pairs; checks against the original run within."""
    module = zoo.model(kind, zoo.HalfRope)
    compiled = mla_compile.compile(module, (tokens(2, 5),), method="mha2mla", kv_rank=12, rope_dims=2)
    verification = compiled.report.verification
    assert verification.rewrite_error < 1e-4
    assert verification.decode_error < 1e-4
    ids = tokens(2, 9)
    with torch.no_grad():
        assert 1e-6 < difference(compiled.module(ids).logits, module(ids)) < 1.0


def test_a_temperature_that_is_folded_is_that_of_a_model_without_one():
    module = zoo.model(zoo.LearnedTemperature)
    plain = copy.deepcopy(module)
    layer = plain.layers[0]
    with torch.no_grad():
        factor = layer.logit_scale.exp().clamp(max=10.0).view(-1, 1)
        for parameter in (layer.q.weight, layer.q.bias):
            parameter.copy_((parameter.unflatten(0, (zoo.HEADS, zoo.DIM)).flatten(1) * factor).view_as(parameter))
        layer.logit_scale.zero_()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert difference(module(ids), plain(ids)) < 1e-5
        program = zoo.program_of(module)
        model = convert(program, zoo.sites_of(program))
        assert difference(model(ids).logits, plain(ids)) < 1e-5


def test_the_temperatures_of_heads_are_shown(capsys):
    module = zoo.model(zoo.LearnedTemperature)
    layer, site = module.layers[0], zoo.sites_of(zoo.program_of(module))[0]
    row = summarise_site(site) | {"lossless_elements_per_token": site.elements_per_token}
    factors = layer.logit_scale.detach().exp().clamp(max=10.0).flatten()
    factors = (factors / factors[0] * row["logit_scales"][0]).tolist()
    assert row["logit_scale"] is None
    assert row["logit_scales"] == pytest.approx(factors, rel=1e-5)  # float32 gains
    show_layers([row])
    least, most = (f * row["qk_dim"] ** 0.5 for f in (min(factors), max(factors)))
    assert f"logits x{least:.4g} to x{most:.4g} by head" in capsys.readouterr().out


def test_a_layer_with_an_ordinary_cache_keeps_its_temperature():
    module = zoo.model(zoo.TemperatureOfRotatedValues, zoo.HalfRope)
    program = zoo.program_of(module)
    (rejection,) = recognise(program).rejections
    assert rejection.code == RejectCode.ROPE
    assert rejection.plain.scores.factors is not None
    assert [layer.plain is not None for layer in plain_layers(program)] == [True, True]


def test_the_reason_for_a_norm_behind_an_offset_rotation_says_what_was_looked_for(zoo_programs):
    (rejection,) = recognise(zoo_programs[zoo.NormBehindOffsetRotation]).rejections
    assert rejection.reason == (
        "something non-linear stands behind the rotation of the key: no RMS or L2 norm of channels that are at rest at "
        "position 0"
    )
