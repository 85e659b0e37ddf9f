"""Einsums with unnamed axes: the equation that is written for them computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from mla_compile.sources.ellipses import has_ellipses, spell_ellipses


class Contracted(nn.Module):
    def __init__(self, equation, *shapes):
        super().__init__()
        self.equation = equation
        self.factors = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x):
        return torch.einsum(self.equation, x, *self.factors)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...i,oi->...o", [(3, 4)]),
        ("... i, o i", [(3, 4)]),  # not written: the unnamed axes, then letters in the alphabet's order
        ("...bi,...i->b...", [(2, 4)]),  # fewer axes
        ("...i,i", [(4,)]),
        ("a...,...b->a...b", [(4, 6)]),
        ("...i,...i,...i->...", [(5, 4), (4,)]),
    ],
)
def test_the_equation_with_letters_computes_the_same(equation, shapes):
    """Oracle: torch with the ellipsis."""
    torch.manual_seed(0)
    module, x = Contracted(equation, *shapes), torch.randn(3, 2, 5, 4)
    program = export(module, (x,), dynamic_shapes=({0: Dim.DYNAMIC},)).run_decompositions({})
    assert has_ellipses(program)
    spell_ellipses(program)
    assert not has_ellipses(program)
    torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=1e-6)  # the same products
