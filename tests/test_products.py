"""Products in other words: what is written in their place computes the same, and what is no product stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch.export import Dim, export

from mla_compile import api
from mla_compile.passes.recognise import recognise
from mla_compile.site import RejectCode
from mla_compile.sources.products import has_other_products, spell_products

ROUNDING = 1e-5  # float32 through a few layers; ten times below what is allowed
_aten = torch.ops.aten
OTHERS = {_aten.tensordot.default, _aten.conv1d.default, _aten.conv1d.padding, _aten.convolution.default}


class Computed(nn.Module):
    """A function of an activation ``[batch, length, 4]`` and a weight."""

    def __init__(self, compute, *shapes):
        super().__init__()
        torch.manual_seed(0)
        self.compute = compute
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x):
        return self.compute(x, *self.weights)


def program_of(module: nn.Module, x: Tensor, table: dict | None = None) -> torch.export.ExportedProgram:
    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    return export(module, (x,), dynamic_shapes=dynamic).run_decompositions(table)


PRODUCTS = {
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), (4, 3)),
    "a weight stored output-first": (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), (3, 4)),
    "axes counted from the end": (lambda x, w: torch.tensordot(x, w, dims=([-1], [-2])), (4, 3)),
    "a weight of three axes": (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), (2, 4, 3)),
    "a weight on the left": (lambda x, w: torch.tensordot(w, x, dims=([0], [2])), (4, 3)),
    "two axes": (lambda x, w: torch.tensordot(x.unflatten(2, (2, 2)), w, dims=2), (2, 2, 3)),
    "two axes crosswise": (lambda x, w: torch.tensordot(x.unflatten(2, (2, 2)), w, dims=([2, 3], [1, 0])), (2, 2, 3)),
    "no axes": (lambda x, w: torch.tensordot(x, w, dims=0), (2,)),
    "a convolution": (lambda x, w: F.conv1d(x.transpose(1, 2), w).transpose(1, 2), (3, 4, 1)),
    "a convolution with a bias": (lambda x, w, b: F.conv1d(x.mT, w, b).mT, (3, 4, 1), (3,)),
    "a convolution of what was permuted": (lambda x, w: F.conv1d(x.permute(0, 2, 1), w), (3, 4, 1)),
    "a convolution of channels that were first": (lambda x, w: F.conv1d(x.transpose(1, 2) * 2, w), (3, 4, 1)),
    "same padding": (lambda x, w: F.conv1d(x.mT, w, padding="same"), (3, 4, 1)),
    "one position at any distance": (lambda x, w: F.conv1d(x.mT, w, dilation=3), (3, 4, 1)),
}


@pytest.mark.parametrize("table", [{}, None], ids=["whole", "decomposed"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_written_computes_the_same(name, table):
    """Oracle: torch's own operator, at sizes other than those of the export."""
    compute, *shapes = PRODUCTS[name]
    module = Computed(compute, *shapes)
    program = program_of(module, torch.randn(2, 5, 4), table)
    if table is None and "convolution" not in name and not has_other_products(program):
        return  # torch's own decomposition left ordinary products
    assert has_other_products(program)
    spell_products(program)
    assert not has_other_products(program)
    assert not OTHERS & {node.target for node in program.graph.nodes}
    program.graph.lint()
    x = torch.randn(3, 7, 4)
    torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=1e-5)  # the same products


OTHER_OPERATORS = {
    "a sum by broadcasting": (lambda x, w: torch.tensordot(x, w, dims=([2], [0])), (1, 3)),
    "a kernel of three": (lambda x, w: F.conv1d(x.mT, w, padding=1), (3, 4, 3)),
    "a kernel of two that are apart": (lambda x, w: F.conv1d(x.mT, w, dilation=2), (3, 4, 2)),
    "channels by groups": (lambda x, w: F.conv1d(x.mT, w, groups=2), (6, 2, 1)),
    "every channel by itself": (lambda x, w: F.conv1d(x.mT, w, groups=4), (4, 1, 1)),
    "every other position": (lambda x, w: F.conv1d(x.mT, w, stride=2), (3, 4, 1)),
    "positions around": (lambda x, w: F.conv1d(x.mT, w, padding=1), (3, 4, 1)),
    "a transposed convolution": (lambda x, w: F.conv_transpose1d(x.mT, w), (4, 3, 1)),
    "a convolution of two axes": (lambda x, w: F.conv2d(x.mT[:, :, None], w), (3, 4, 1, 1)),
}


@pytest.mark.parametrize("table", [{}, None], ids=["whole", "decomposed"])
@pytest.mark.parametrize("name", OTHER_OPERATORS)
def test_what_is_no_other_product_stays(name, table):
    compute, *shapes = OTHER_OPERATORS[name]
    assert not has_other_products(program_of(Computed(compute, *shapes), torch.randn(2, 5, 4), table))


class Tensordot(zoo.HalfRope):
    def project(self, x):
        return tuple(torch.tensordot(x, p.weight.t(), dims=1) + p.bias for p in (self.q, self.k, self.v))


class TensordotPerHead(zoo.HalfRope):
    """Weights ``[heads, head_dim, width]``; heads come out behind the positions."""

    def project(self, x):
        layers = (self.q, self.k, self.v)
        return tuple(
            torch.tensordot(x, p.weight.view(zoo.HEADS, zoo.DIM, -1), dims=([2], [2])).flatten(2) for p in layers
        )


class WeightsFirst(zoo.HalfRope):
    """The weight is the first factor: channels come out first."""

    def project(self, x):
        layers = (self.q, self.k, self.v)
        return tuple(torch.tensordot(p.weight, x, dims=([1], [2])).permute(1, 2, 0) for p in layers)


class Convolution(zoo.HalfRope):
    """A convolution of one position, with other arguments where they do nothing."""

    def __init__(self, **options):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(zoo.WIDTH, zoo.HEADS * zoo.DIM, 1, **options) for _ in range(3))

    def project(self, x):
        return tuple(c(x.transpose(1, 2)).transpose(1, 2) for c in self.convolutions)


class DilatedConvolution(Convolution):
    def __init__(self):
        super().__init__(dilation=2, padding="same")


class KeysByConvolution(Convolution):
    """Keys alone: values and they still read one activation."""

    def project(self, x):
        return self.q(x), super().project(x)[1], self.v(x)


class TiedConvolution(Convolution):
    """Keys and values of one weight."""

    def project(self, x):
        q, k, _ = super().project(x)
        return q, k, self.convolutions[1](x.permute(0, 2, 1)).mT


class ChannelsFirst(Convolution):
    """The activation that is read has its channels first, and no activation is its transposition."""

    def project(self, x):
        turned = x.transpose(1, 2) * 2.0
        return tuple(c(turned).transpose(1, 2) for c in self.convolutions)


CONVERTED = (
    Tensordot,
    TensordotPerHead,
    WeightsFirst,
    Convolution,
    DilatedConvolution,
    KeysByConvolution,
    TiedConvolution,
    ChannelsFirst,
)


@pytest.mark.parametrize("decomposed", [False, True])
def test_projections_by_other_products_convert(decomposed):
    """Every layer of a model in other words. Oracle: the module itself, called directly; then in two pieces."""
    model = zoo.model(*CONVERTED)
    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = export(model, (torch.randint(zoo.VOCABULARY, (2, 5)),), dynamic_shapes=dynamic)
    program = program.run_decompositions({}) if decomposed else program
    before = str(program.graph)
    compiled = api.compile(program, exact=True, check=False)
    assert str(program.graph) == before
    assert len(compiled.report.sites) == len(CONVERTED)
    assert zoo.error_in_two_pieces(compiled.module, model) <= ROUNDING


class ConvolutionOfThree(Convolution):
    """Causal: every position sees two before it."""

    def __init__(self):
        super().__init__()
        self.convolutions[1] = nn.Conv1d(zoo.WIDTH, zoo.HEADS * zoo.DIM, 3)

    def project(self, x):
        turned = x.transpose(1, 2)
        return self.q(x), self.convolutions[1](F.pad(turned, (2, 0))).transpose(1, 2), self.v(x)


class ConvolutionByGroups(KeysByConvolution):
    def __init__(self):
        super().__init__()
        self.convolutions[1] = nn.Conv1d(zoo.WIDTH, zoo.HEADS * zoo.DIM, 1, groups=2)


class KeysOfActivations(zoo.HalfRope):
    """The other factor is made of activations, the same for all of a batch."""

    def project(self, x):
        made = x.mean((0, 1))[:, None] * self.k.weight
        return self.q(x), torch.tensordot(x, made, dims=1), self.v(x)


class KernelOfActivations(zoo.HalfRope):
    """So is the kernel of a convolution."""

    def project(self, x):
        made = x.mean((0, 1))[:, None] * self.k.weight
        return self.q(x), F.conv1d(x.mT, made[..., None]).mT, self.v(x)


class SumOverTwoAxes(zoo.HalfRope):
    """Heads and channels are summed together: one matrix, in a form that is not read."""

    def project(self, x):
        weight = self.k.weight.view(zoo.HEADS * zoo.DIM, zoo.HEADS, zoo.DIM)
        return self.q(x), torch.tensordot(x.unflatten(2, (zoo.HEADS, -1)), weight, dims=([2, 3], [1, 2])), self.v(x)


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        (ConvolutionOfThree, RejectCode.PROJECTION, "'conv1d'"),
        (ConvolutionByGroups, RejectCode.PROJECTION, "'conv1d_1'"),
        (KeysOfActivations, RejectCode.PROJECTION, "not a linear projection"),
        (KernelOfActivations, RejectCode.PROJECTION, "not a linear projection"),
        (SumOverTwoAxes, RejectCode.PROJECTION, "is not one matrix"),
    ],
)
def test_what_is_more_than_a_product_is_refused(kind, code, said):
    """The reason names what stands in the place of the projection, not the tokens that everything is made of."""
    found = recognise(zoo.program_of(zoo.model(kind)))
    assert not found.sites
    (rejection,) = found.rejections
    assert rejection.code == code
    assert said in rejection.reason
    assert "'embedding'" not in rejection.reason
