"""Keys and values of two linear layers in a row convert as one projection; what is not linear in between is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from zoo import DIM, HEADS, WIDTH

from mla_compile import api
from mla_compile.passes.recognise import recognise
from mla_compile.passes.weights import read_site
from mla_compile.site import RejectCode

RANK = 5
ROUNDING = 1e-5  # float32 through a few layers; ten times below what is allowed


class Factored(zoo.HalfRope):
    """Queries, keys and values are products of two layers each, with biases."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(WIDTH, RANK) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(RANK, HEADS * DIM) for _ in range(3))

    def between(self, x):
        return x

    def project(self, x):
        return tuple(up(self.between(down(x))) for down, up in zip(self.down, self.up, strict=True))


class FactoredKeys(Factored):
    def project(self, x):
        return self.q(x), self.up[1](self.between(self.down[1](x))), self.v(x)


class FactoredValues(Factored):
    def project(self, x):
        return self.q(x), self.k(x), self.up[2](self.between(self.down[2](x)))


class WithoutBiases(Factored):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(WIDTH, RANK, bias=False) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(RANK, HEADS * DIM, bias=False) for _ in range(3))


class BiasedInFront(WithoutBiases):
    """Only the first layer has a bias, of which the second makes one."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(WIDTH, RANK) for _ in range(3))


class SoftCappedWithBias(BiasedInFront, zoo.SoftCapped):
    """A soft-cap sees the bias of keys, which do not rotate and so go through the latent."""

    def queries(self, q):
        return q

    keys = queries


class ThreeInARow(Factored):
    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(RANK, RANK)

    def between(self, x):
        return self.middle(x)


class Tied(zoo.HalfRope):
    """One weight, twice: as it is, and turned."""

    def project(self, x):
        return self.q(x), self.k(x) @ self.k.weight, self.v(x)


class Twice(zoo.HalfRope):
    """One square layer, applied twice."""

    def project(self, x):
        return self.q(x), self.k(self.k(x)), self.v(x)


class ScaledBetween(FactoredKeys):
    """A gain, a bias and a part of the channels in another order: all of it linear."""

    def __init__(self):
        super().__init__()
        self.down[1] = nn.Linear(WIDTH, 2 * RANK)
        self.gain, self.bias = nn.Parameter(torch.rand(RANK) + 0.5), nn.Parameter(torch.randn(RANK))

    def between(self, x):
        return x[..., ::2].flip(-1) * self.gain + self.bias


class Flattened(FactoredKeys):
    """Batch and positions are merged between the two layers."""

    def project(self, x):
        flat = torch.addmm(self.down[1].bias, x.flatten(0, 1), self.down[1].weight.T)
        k = torch.addmm(self.up[1].bias, flat, self.up[1].weight.T).view(*x.shape[:2], -1)
        return self.q(x), k, self.v(x)


class OtherProducts(FactoredKeys):
    """A convolution of one position, then an einsum with a weight per head."""

    def project(self, x):
        down = F.conv1d(x.mT, self.down[1].weight[..., None], self.down[1].bias).mT
        k = torch.einsum("bsr,hdr->bshd", down, self.up[1].weight.view(HEADS, DIM, RANK)).flatten(2)
        return self.q(x), k, self.v(x)


class NormedKeys(FactoredKeys):
    """With a norm behind both."""

    def keys(self, k):
        return super().keys(F.rms_norm(k, (DIM,)))


class OneLatent(Factored):
    """Keys and values of one latent behind a norm, as in DeepSeek's models, which stays what they are made from."""

    def project(self, x):
        latent = F.rms_norm(self.down[1](x), (RANK,))
        return self.q(x), self.up[1](latent), self.up[2](latent)


CONVERTED = (
    Factored,
    FactoredKeys,
    FactoredValues,
    WithoutBiases,
    BiasedInFront,
    SoftCappedWithBias,
    ThreeInARow,
    Tied,
    Twice,
    ScaledBetween,
    Flattened,
    OtherProducts,
    NormedKeys,
    OneLatent,
)


@pytest.fixture(scope="module")
def model():
    return zoo.model(*CONVERTED)


@pytest.fixture(scope="module")
def program(model):
    return zoo.program_of(model)


def test_projections_in_a_row_convert(model):
    """Oracle: the module itself; then in two pieces. Nothing is left out."""
    compiled = api.compile(model, (torch.randint(zoo.VOCABULARY, (2, 5)),), exact=True)
    assert len(compiled.report.sites) == len(CONVERTED)
    assert zoo.error_in_two_pieces(compiled.module, model) <= ROUNDING


def test_weights_are_the_product(model, program):
    """Oracle: the two layers in float64; heads by their place."""
    layer, site = model.layers[0], zoo.sites_of(program)[0]
    up, down = layer.up[1], layer.down[1]
    weight = up.weight.double() @ down.weight.double()
    bias = up.weight.double() @ down.bias.double() + up.bias.double()
    found = read_site(program, site).key
    torch.testing.assert_close(found.weight.flatten(0, 1), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.bias.flatten(), bias, rtol=0, atol=1e-12)
    assert site.key.parameters == tuple(f"layers.0.{n}.1.{p}" for n in ("up", "down") for p in ("weight", "bias"))


def test_what_keys_and_values_share_stays_what_they_are_projected_from(program):
    shared = zoo.sites_of(program)[CONVERTED.index(OneLatent)]
    assert shared.key.inner is shared.value.inner is None
    alone = zoo.sites_of(program)[CONVERTED.index(FactoredKeys)]
    assert alone.value.inner is None
    assert alone.key.origin == alone.value.origin == alone.value.source


def test_a_bias_in_front_is_a_bias(program):
    sites = zoo.sites_of(program)
    site = sites[CONVERTED.index(SoftCappedWithBias)]
    assert site.key.bias is None
    assert site.key.biased
    assert site.needs_constant(DIM)
    assert not sites[CONVERTED.index(WithoutBiases)].key.biased


class RectifiedBetween(FactoredKeys):
    def between(self, x):
        return x.relu()


class NormedBetween(FactoredValues):
    def between(self, x):
        return F.rms_norm(x, (RANK,))


class GatedBetween(FactoredKeys):
    """An activation that saturates slowly."""

    def between(self, x):
        return x + 1e-3 * x.tanh()


class PlacesBetween(FactoredKeys):
    """Positions are added between the two layers."""

    def between(self, x):
        return x + torch.arange(x.shape[1])[:, None] * 0.01


class ScaledByPlaceBetween(FactoredValues):
    def between(self, x):
        return x * (1 + torch.arange(x.shape[1])[:, None] * 0.01)


class LateBetween(FactoredValues):
    """The same from position 5000 on."""

    def between(self, x):
        return x * (torch.arange(x.shape[1])[:, None] - 4999).clamp(min=1)


class FarBetween(FactoredKeys):
    """The same from position 20000 on."""

    def between(self, x):
        return x * (torch.arange(x.shape[1])[:, None] / 20_000).clamp(min=1)


class ShiftedBetween(FactoredKeys):
    def between(self, x):
        return F.pad(x, (0, 0, 1, 0))[:, :-1]


class MixedOverTheBatch(FactoredValues):
    def between(self, x):
        return x - x.mean(0)


class Scrambled(FactoredKeys):
    """Tokens of a batch change places."""

    def between(self, x):
        return x.reshape(x.shape[1], x.shape[0], RANK).transpose(0, 1)


class EmptiedBetween(FactoredValues):
    """Zeros for one token among thousands, known by its id."""

    def forward(self, x, ids):
        self.real = (ids != zoo.PADDING)[..., None]
        return super().forward(x, ids)

    def between(self, x):
        return x * self.real


class ResidualBetween(Factored):
    """Two ways lead from one layer to the other."""

    def __init__(self):
        super().__init__()
        self.down[1], self.up[1] = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HEADS * DIM)

    def project(self, x):
        return self.q(x), self.up[1](self.down[1](x) + x), self.v(x)


class TwoBetween(Factored):
    """A sum of two layers."""

    def project(self, x):
        return self.q(x), self.up[1](self.down[1](x) + self.down[0](x)), self.v(x)


REFUSED = [
    (RectifiedBetween, "key", RejectCode.NONLINEAR),
    (NormedBetween, "value", RejectCode.NONLINEAR),
    (GatedBetween, "key", RejectCode.NONLINEAR),
    (PlacesBetween, "key", RejectCode.ROPE),
    (ScaledByPlaceBetween, "value", RejectCode.ROPE),
    (LateBetween, "value", RejectCode.ROPE),
    (FarBetween, "key", RejectCode.ROPE),
    (ShiftedBetween, "key", RejectCode.POSITION_MIXING),
    (MixedOverTheBatch, "value", RejectCode.POSITION_MIXING),
    (Scrambled, "key", RejectCode.POSITION_MIXING),
    (EmptiedBetween, "value", RejectCode.MASK),
    (ResidualBetween, "key", RejectCode.PROJECTION),
    (TwoBetween, "key", RejectCode.PROJECTION),
]


def test_what_is_no_projection_in_between_is_refused():
    """All in one model, of which no layer may convert."""
    found = recognise(zoo.program_of(zoo.model(*(kind for kind, *_ in REFUSED))))
    assert not found.sites
    for (kind, role, code), rejection in zip(REFUSED, found.rejections, strict=True):
        assert rejection.code == code, kind
        assert rejection.reason.startswith(f"the {role} is projected twice (layers."), kind
        assert "and what is done in between is not" in rejection.reason
