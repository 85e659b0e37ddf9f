"""One rope key for all heads where keys have norms: what is measured, what is factorised, and what comes out.

The models are those of ``zoo`` with the norms of Qwen 3 (per head), OLMo 2 (over the whole width) and Gemma 3 (per
head, beside soft-caps and windows), and their odder relatives.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
import pytest
import torch
import zoo
from conversion import difference, in_chunks
from observed import observe_sites
from torch import Tensor, nn

from mla_compile.config import make_config
from mla_compile.errors import RefusedError
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.fisher import assemble, fisher, joint_factors
from mla_compile.passes.insert_latent import insert_latent
from mla_compile.passes.layers import require_scalable
from mla_compile.passes.lower_onnx import lower_to_onnx
from mla_compile.passes.rope_split import RopeSplit, rotary_channels, split_rope
from mla_compile.passes.statistics import collect_statistics, key_weighting
from mla_compile.passes.task import Task
from mla_compile.passes.transmla import balanced_factors, transmla
from mla_compile.passes.weights import SiteWeights, input_width, read_site
from mla_compile.plan import shared_rope_plan
from mla_compile.program import Program
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.site import AttentionSite
from mla_compile.site_statistics import SiteStatistics

# Both sides are float32 models of two layers with other orders of products: 3e-7 was observed, and 5e-2 or more where
# the scales do not reach the rope keys.
LOGITS = 1e-5
LENGTH = 12
WINDOWS = torch.randint(0, zoo.VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(5))
IDS = torch.randint(0, zoo.VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


class PerHead(zoo.HalfRope):
    """Norms with gains on every head, in front of the rotation; two query heads share a key (Qwen 3).

    The key heads differ in size, so that their norms do.
    """

    kv_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.query_gain, self.key_gain = (nn.Parameter(torch.rand(zoo.DIM) + 1.0) for _ in range(2))
        with torch.no_grad():
            self.k.weight[: zoo.DIM] *= 6

    def normed(self, x: Tensor) -> Tensor:
        return zoo.rms(x)

    def queries(self, q: Tensor) -> Tensor:
        return super().queries(self.normed(q) * self.query_gain)

    def keys(self, k: Tensor) -> Tensor:
        return super().keys(self.normed(k) * self.key_gain)


class WholeWidth(zoo.HalfRope):
    """One norm for all heads, each of which has its own keys (OLMo 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.rand(2, zoo.HEADS * zoo.DIM) + 1.0)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().project(x)
        return zoo.rms(q) * self.gains[0], zoo.rms(k) * self.gains[1], v


class Capped(PerHead, zoo.SpelledOut):
    """A soft-cap bends the logits behind the norms' scales (Gemma 2 with the norms of Gemma 3)."""

    def scores(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return 3 * torch.tanh(super().scores(q, k, x) / 3)


class Windowed(PerHead, zoo.windowed(5)):
    """A sliding window (Gemma 3)."""


class Centred(PerHead):
    """Layer norms without biases."""

    def normed(self, x: Tensor) -> Tensor:
        return super().normed(x - x.mean(-1, keepdim=True))


class ValuesToo(zoo.NormedKeysAndValues):
    """Norms of keys and of values (Gemma 4)."""


class Shifted(PerHead):
    """Norms with biases: what they add rotates."""

    def keys(self, k: Tensor) -> Tensor:
        return zoo.rotate(self.normed(k) + self.key_gain)


class ShiftedStill(zoo.Attention):
    """Nothing rotates: a bias behind the norm is the same for all logits of a query."""

    def keys(self, k: Tensor) -> Tensor:
        return zoo.rms(k) + 0.5


KINDS = {
    "per head": PerHead,
    "whole width": WholeWidth,
    "soft-cap": Capped,
    "window": Windowed,
    "layer norm": Centred,
    "values too": ValuesToo,
    "behind the rotation": zoo.NormBehindRotation,
    "whole width, behind the rotation": zoo.WideNormBehindRotation,
    "gains behind the rotation": zoo.GainsBehindRotation,
}


@dataclass(frozen=True)
class Normed:
    """A model of two equal layers, and what is known of them."""

    module: nn.Module
    program: Program

    @classmethod
    def of(cls, kind: type[nn.Module]) -> Normed:
        module = zoo.model(kind, kind)
        return cls(module, zoo.program_of(module))

    @cached_property
    def sites(self) -> tuple[AttentionSite, ...]:
        return zoo.sites_of(self.program)

    @cached_property
    def weights(self) -> list[SiteWeights]:
        return [read_site(self.program, site) for site in self.sites]

    @cached_property
    def statistics(self) -> tuple[SiteStatistics, ...]:
        return collect_statistics(self.program, self.sites, WINDOWS)

    @cached_property
    def splits(self) -> list[RopeSplit]:
        """Every rotary pair of every key head, mixed within its frequency."""
        splits = []
        for site, weights, measured in zip(self.sites, self.weights, self.statistics, strict=True):
            channels = rotary_channels(site, weights, measured)
            count = len(channels.moment)
            splits.append(split_rope(site, channels, count, own=count))
        return splits

    def whole(self, factorise=joint_factors) -> list[LatentWeights]:
        """Latent weights that leave nothing out."""
        found = []
        for site, weights, measured, split in zip(self.sites, self.weights, self.statistics, self.splits, strict=True):
            plan = shared_rope_plan(site, input_width(self.program, site), len(split.inv_freq), 10**6)
            factors = factorise(site, weights, measured, split)
            found.append(assemble(site, weights, split, factors, plan.kv_rank))
        return found

    def converted(self, weights) -> LatentModel:
        graph = insert_latent(self.program, self.sites, weights, torch.float32)
        return LatentModel(graph.module, graph.rows)

    @cached_property
    def kept(self) -> LatentModel:
        return self.converted(self.whole())

    def task(self, **settings: object) -> Task:
        config = make_config(**settings)
        return Task(self.program, self.sites, (), config, WINDOWS)


class Models:
    """Models by their attention, made at first use."""

    def __init__(self) -> None:
        self._made: dict[type[nn.Module], Normed] = {}

    def __getitem__(self, kind: type[nn.Module]) -> Normed:
        if kind not in self._made:
            self._made[kind] = Normed.of(kind)
        return self._made[kind]


@pytest.fixture(scope="module")
def normed() -> Models:
    return Models()


every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

# ---- what is measured


@every_kind
def test_key_scales_are_those_of_the_description(normed, kind):
    """The keys seen are the scale times what the weights make of the input."""
    model = normed[kind]
    for site, weights, seen in zip(
        model.sites, model.weights, observe_sites(model.program, model.sites, gradients=False)(IDS), strict=True
    ):
        plain = torch.einsum("bsw,hdw->bshd", seen.source.double(), weights.key.weight) + weights.key.bias
        assert seen.key_scale.shape == (*IDS.shape, len(site.key.norm.groups))
        # float32 activations of some tens of products.
        torch.testing.assert_close((plain * seen.key_scale[..., None]).float(), seen.key, rtol=1e-4, atol=1e-5)


def test_keys_without_norms_have_no_scales(normed):
    model = normed[zoo.HalfRope]
    (seen, *_) = observe_sites(model.program, model.sites, gradients=False)(IDS)
    assert seen.key_scale.shape == (*IDS.shape, 0)
    measured = model.statistics[0]
    assert measured.key_squares is None
    assert measured.key_moment is None
    factors, _, moment = key_weighting(model.sites[0], measured)
    assert torch.equal(factors, torch.ones(zoo.HEADS).double())
    assert moment is measured.moment


@pytest.mark.parametrize("kind", [PerHead, WholeWidth])
def test_statistics_weigh_inputs_as_the_norms_do(normed, kind):
    """By the module's own activations, all text at once."""
    model, inputs = normed[kind], {}
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for i, norm in enumerate(model.module.norms):
            hook = norm.register_forward_hook(lambda _, __, y, i=i: inputs.__setitem__(i, y.double().flatten(0, 1)))
            hooks.callback(hook.remove)
        model.module(WINDOWS)
    for i, (site, measured) in enumerate(zip(model.sites, model.statistics, strict=True)):
        layer, x = model.module.layers[i].double(), inputs[i]
        with torch.no_grad():
            heads = layer.k(x).unflatten(1, (1 if kind is WholeWidth else site.kv_heads, -1))
        layer.float()
        squares = (1 / (heads.square().mean(-1) + 1e-3)).expand(-1, site.kv_heads)
        torch.testing.assert_close(measured.key_squares, squares.mean(0), rtol=1e-5, atol=0)
        expected = torch.einsum("t,td,te->de", squares.mean(1), x, x) / len(x)
        torch.testing.assert_close(measured.key_moment, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_channels_of_one_norm_for_all_heads_are_those_of_normalised_keys(normed):
    """There nothing is approximated: energy times moment is what the normalised keys have."""
    model = normed[WholeWidth]
    found = [[], []]
    for ids in WINDOWS.split(4):
        for place, seen in enumerate(observe_sites(model.program, model.sites, gradients=False)(ids)):
            found[place].append(seen)
    for site, weights, measured, seen in zip(model.sites, model.weights, model.statistics, found, strict=True):
        channels = rotary_channels(site, weights, measured)
        keys = torch.cat([s.key.double().flatten(0, 1) for s in seen])
        first, second = torch.tensor(site.rope.pairs).unbind(1)
        z = torch.complex(keys[..., first], keys[..., second]).flatten(1)
        moment = z.T @ z.conj() / len(z)
        unweighted = measured.query.diagonal(dim1=1, dim2=2)
        energy = (unweighted[:, first] + unweighted[:, second]) * site.scale**2 / 4
        got = channels.energy.flatten()[:, None] * channels.moment
        torch.testing.assert_close(
            got, energy.flatten()[:, None] * moment, rtol=1e-4, atol=1e-5 * float(got.abs().max())
        )


# ---- what is factorised


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("factorise", [joint_factors, balanced_factors])
def test_factors_serve_normalised_keys(normed, factorise, rank):
    """The error of keys behind their norms, and of values, is smaller than where the norms were not looked at."""
    model = normed[PerHead]
    site, weights, measured = model.sites[0], model.weights[0], model.statistics[0]
    split = split_rope(site, rotary_channels(site, weights, measured), 0, 0)
    x = torch.cat([s[0].source.double().flatten(0, 1) for s in _looks(model)])
    scales = torch.cat([s[0].key_scale.double().flatten(0, 1) for s in _looks(model)])
    queries = split.query_rest @ measured.query @ split.query_rest.mT * site.scale**2

    def cost(measured: SiteStatistics) -> float:
        factors = factorise(site, weights, measured, split)
        latent = x @ factors.down[:rank].T
        keys = torch.einsum("tw,gdw->tgd", x, weights.key.weight) - torch.einsum(
            "tr,gdr->tgd", latent, factors.key_up[..., :rank]
        )
        values = torch.einsum("tw,gdw->tgd", x, weights.value.weight) - torch.einsum(
            "tr,gdr->tgd", latent, factors.value_up[..., :rank]
        )
        if factorise is balanced_factors:  # keys and values count as much as each other, whatever the loss says
            whole = torch.einsum("tw,gdw->tgd", x, weights.key.weight) * scales[..., None]
            balance = whole.square().sum() / torch.einsum("tw,gdw->tgd", x, weights.value.weight).square().sum()
            return float(((keys * scales[..., None]).square().sum() / balance + values.square().sum()) / len(x))
        keys = (keys * scales[..., None]).repeat_interleave(site.heads // site.kv_heads, 1)
        owners = torch.tensor(site.value_owners).repeat_interleave(site.heads // len(site.value_owners))
        metric = measured.output * measured.attended[:, None, None]
        of_values = torch.einsum("thd,hde,the->", values[:, owners], metric, values[:, owners])
        return float((torch.einsum("thd,hde,the->", keys, queries, keys) + of_values) / len(x))

    assert cost(measured) < 0.95 * cost(replace(measured, key_squares=None, key_moment=None))


def _looks(model: Normed):
    look = observe_sites(model.program, model.sites, gradients=False)
    return [look(ids) for ids in WINDOWS.split(4)]


# ---- what comes out


@every_kind
def test_everything_kept_keeps_the_logits(normed, kind):
    model = normed[kind]
    assert all(w.scaled_rope and w.rope_shift is None for w in model.whole())
    assert all(len(w.inv_freq) == 1 for w in model.whole())
    with torch.no_grad():
        expected = model.module(IDS)
        assert difference(model.kept(IDS).logits, expected) <= LOGITS
        assert difference(in_chunks(model.kept, IDS, (5, 1, 1, LENGTH - 7)), expected) <= LOGITS


@every_kind
def test_everything_kept_by_transmla_keeps_the_logits(normed, kind):
    model = normed[kind]
    with torch.no_grad():
        got = model.converted(model.whole(balanced_factors))(IDS).logits
        assert difference(got, model.module(IDS)) <= LOGITS


@every_kind
def test_padded_prompts_are_those_of_each_alone(normed, kind):
    model, lengths = normed[kind], (5, LENGTH)
    mask = torch.stack([(torch.arange(LENGTH) >= LENGTH - n).long() for n in lengths])
    with torch.no_grad():
        got = model.kept(IDS * mask, mask)
        following = model.kept(IDS[:, :1], torch.cat([mask, mask.new_ones(2, 1)], 1), past=got.cache)
        for row, n in enumerate(lengths):
            alone = torch.cat([IDS[row, LENGTH - n :], IDS[row, :1]])[None]
            both = torch.cat([got.logits[row, LENGTH - n :], following.logits[row]])
            assert difference(both, model.module(alone)[0]) <= LOGITS


@every_kind
@pytest.mark.parametrize("inline", [False, True])
def test_onnx_runtime_computes_the_same(normed, kind, inline, tmp_path):
    model, path = normed[kind], tmp_path / "model.onnx"
    lower_to_onnx(model.kept.graph, model.kept.rows, path, opset=23, inline=inline, metadata={})
    with torch.no_grad():
        expected = model.module(IDS)
    decoder, cache, parts = OnnxDecoder(path, threads=1), None, []
    assert difference(torch.from_numpy(decoder.logits(IDS.numpy())), expected) <= LOGITS
    cache = decoder.empty_cache(2)
    for start, end in ((0, 5), (5, 6), (6, LENGTH)):
        mask, position = np.ones((2, end), np.int64), np.tile(np.arange(start, end), (2, 1))
        logits, cache = decoder.step(IDS[:, start:end].numpy(), mask, position, cache)
        parts.append(torch.from_numpy(logits))
    assert difference(torch.cat(parts, 1), expected) <= LOGITS
    if not inline:
        nodes = [n for n in onnx.load(path).graph.node if n.op_type.startswith("LatentAttention")]
        assert [next(a.i for a in n.attribute if a.name == "scaled_rope") for n in nodes] == [1, 1]


def test_without_components_no_rope_key_is_scaled(normed):
    """Keys that do not rotate: the scale is that of the latent's product, as ever."""
    model = normed[zoo.NormedKeys]
    assert not any(w.scaled_rope for w in model.whole())
    with torch.no_grad():
        assert difference(model.kept(IDS).logits, model.module(IDS)) <= LOGITS


def test_rope_keys_in_front_of_their_norms_have_no_shift_behind_them(normed):
    weights = normed[PerHead].whole()[0]
    with pytest.raises(ValueError, match="in front of their norms have no shift behind them"):
        replace(weights, rope_shift=torch.ones(1, 2))


# ---- the methods


@pytest.mark.parametrize("kind", [PerHead, WholeWidth, Capped, Windowed])
@pytest.mark.parametrize("method", [fisher, transmla])
def test_truncated_models_decode_to_what_they_print_at_once(normed, kind, method):
    model = normed[kind]
    choice = method(model.task(cache_ratio=0.75))
    converted = model.converted(choice.weights)
    assert converted.rows == tuple(p.elements_after for p in choice.plans)
    assert all(w.scaled_rope == (w.inv_freq.numel() > 0) for w in choice.weights)
    with torch.no_grad():
        whole = converted(IDS).logits
        assert difference(in_chunks(converted, IDS, (5, 1, LENGTH - 6)), whole) <= LOGITS
        # It is not the original, and not far from it.
        assert 1e-3 < difference(whole, model.module(IDS)) < 0.5


@pytest.mark.parametrize("method", [fisher, transmla])
def test_a_bias_behind_a_norm_that_rotates_is_refused(normed, method):
    model = normed[Shifted]
    with pytest.raises(RefusedError, match=r"key norm of layers\.0") as refused:
        method(model.task(cache_ratio=0.75))
    assert "mha2mla" in refused.value.remedy


def test_weights_with_a_bias_behind_a_norm_are_not_assembled(normed):
    with pytest.raises(ValueError, match="shift behind their norm"):
        normed[Shifted].whole()


def test_a_bias_behind_a_norm_that_softmax_does_not_see_is_dropped(normed):
    model = normed[ShiftedStill]
    assert model.weights[0].key.shift.any()
    require_scalable(model.sites[0], model.weights[0])
    with torch.no_grad():
        assert difference(model.kept(IDS).logits, model.module(IDS)) <= LOGITS
