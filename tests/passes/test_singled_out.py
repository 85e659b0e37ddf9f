"""Ids that a graph treats unlike others."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

from mla_compile.passes.singled_out import singled_out


class Asking(zoo.TinyLM):
    """Adds a segment of some ids."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.segments = nn.Embedding(2, zoo.WIDTH)
        table = torch.zeros(zoo.VOCABULARY, dtype=torch.long)
        table[4000:4002], table[11] = 3, 5
        self.register_buffer("table", table)
        self.register_buffer("few", torch.tensor([77, 78]))

    def embed(self, ids):
        return super().embed(ids) + self.segments(self.among(ids).long())


class Equal(Asking):
    def among(self, ids):
        return ids == 4321


class EqualAsFloat(Asking):
    def among(self, ids):
        return ids.float() == 4321.0


class Between(Asking):
    def among(self, ids):
        return (ids >= 1000) & (ids < 1010)


class OneOfFew(Asking):
    def among(self, ids):
        return torch.isin(ids, self.few)


class LookedUp(Asking):
    def among(self, ids):
        return self.table[ids] > 2


class Unknown(Asking):
    def among(self, ids):
        return (ids == -100) | (ids == zoo.VOCABULARY) | (ids == float("inf"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Equal, {4321}),
        (EqualAsFloat, {4321}),
        (Between, {999, 1000, 1001, 1009, 1010, 1011}),
        (OneOfFew, {77, 78}),
        (LookedUp, {11, 4000, 0}),
        (Unknown, set()),
    ],
)
def test_ids_are_found(kind, expected):
    found = singled_out(zoo.program_of(zoo.model(zoo.HalfRope, kind=kind)))
    # Small numbers are axes, and what an id is scaled by: they are tried too, at no price.
    assert {number for number in found if number > 10} == {number for number in expected if number > 10}
    assert expected <= {*found}


def test_an_ordinary_model_has_none():
    assert {number for number in singled_out(zoo.program_of(zoo.model(zoo.HalfRope))) if number > 10} == set()
