"""Complex numbers as pairs of real ones: the same results, and no complex number left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mla_compile.passes.real_pairs import write_pairs

SIZE = (2, 3, 4)


class Turned(nn.Module):
    """Rotates channel pairs, as models that write rotations with complex numbers do."""

    def forward(self, x, angle):
        turn = torch.polar(torch.ones_like(angle), angle) * 0.5
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn[:, :, None].expand(*pairs.shape[:-1], -1)).flatten(3)


class Rearranged(nn.Module):
    """Every operator that moves axes, and arithmetic with real numbers."""

    def forward(self, x, angle):
        z = torch.complex(x[..., :4], x[..., 4:])
        z = -(z * angle[:, :, None, :] * 2).reshape(2, 3, -1)[:, :, 2:].unsqueeze(-2).clone()
        return torch.view_as_real(z[1].unsqueeze(0) * z).view(2, 3, -1)


class Conjugated(nn.Module):
    """Does what is not known of complex numbers."""

    def forward(self, x, angle):
        z = torch.polar(x[..., 0, :4].abs(), angle)
        return torch.view_as_real(z.conj().resolve_conj() * z)


def exported(module):
    torch.manual_seed(0)
    inputs = torch.randn(*SIZE, 8), torch.randn(*SIZE[:2], 4)
    return torch.export.export(module, inputs).run_decompositions({}), inputs


def has_complex(program) -> bool:
    values = [n.meta.get("val") for n in program.graph.nodes]
    return any(isinstance(v, torch.Tensor) and v.is_complex() for v in values)


@pytest.mark.parametrize("module", [Turned(), Rearranged()], ids=["turned", "rearranged"])
def test_pairs_are_what_complex_numbers_are(module):
    program, inputs = exported(module)
    assert has_complex(program)
    expected = module(*inputs)
    write_pairs(program)
    assert not has_complex(program)
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-6, atol=1e-6)


def test_what_is_not_known_is_left_as_it_is():
    program, _ = exported(Conjugated())
    before = str(program.graph)
    write_pairs(program)
    assert str(program.graph) == before
