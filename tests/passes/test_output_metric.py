"""What stands behind attention, against the output projection's own weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from mla_compile.passes.output_metric import output_metrics
from mla_compile.passes.recognise import recognise

ROUNDING = 1e-12  # float64, sums of some tens of products


def expected(program, site, index):
    """The output projection's Gram matrix by head, from the parameter itself."""
    weight = program.exported.state_dict[f"layers.{index}.out.weight"].detach().double()
    columns = weight.unflatten(1, (site.heads, site.v_dim))
    if site.order is not None:
        columns = columns[:, list(site.order)]
    return torch.einsum("nhd,nhe->hde", columns, columns)


@pytest.fixture(scope="module")
def of_mixed(mixed):
    return output_metrics(mixed.program, mixed.sites)


@pytest.mark.parametrize("index", range(len(zoo.MIXED)), ids=zoo.MIXED)
def test_the_metric_is_that_of_the_output_projection(mixed, of_mixed, index):
    wanted = expected(mixed.program, mixed.sites[index], index)
    assert (of_mixed[index] - wanted).abs().max() < ROUNDING * wanted.abs().max()


class Gated(zoo.HalfRope):
    """Outputs are multiplied with something else that the token says (Qwen3-Next)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(zoo.WIDTH, zoo.HEADS * zoo.DIM)

    def forward(self, x, ids):
        hold, self.out = self.out, nn.Identity()
        y = super().forward(x, ids)
        self.out = hold
        return self.out(self.behind(y, x))

    def behind(self, y, x):
        return y * self.gate(x).sigmoid()


class Normed(Gated):
    """A norm stands between attention and the output projection."""

    def behind(self, y, x):
        return F.rms_norm(y, (y.shape[-1],))


class Scaled(Gated):
    """Something linear stands there."""

    def behind(self, y, x):
        return 3 * y


class Twice(Gated):
    """Outputs are read by two products."""

    def behind(self, y, x):
        return y + self.gate(y)


class Bare(Gated):
    """No product is of the outputs alone."""

    def behind(self, y, x):
        return y + x


def test_what_is_not_one_linear_map_has_no_metric():
    program = zoo.program_of(zoo.model(Gated, Normed, Scaled, Twice, Bare))
    sites = recognise(program).sites
    gated, normed, scaled, twice, bare = output_metrics(program, sites)
    assert gated is normed is twice is bare is None
    wanted = 9 * expected(program, sites[2], 2)
    assert (scaled - wanted).abs().max() < ROUNDING * wanted.abs().max()
