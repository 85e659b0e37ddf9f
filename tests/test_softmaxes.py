"""Softmaxes that are written out: what is one converts, and the user's graph stays as it is."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.export import Dim, export

from mla_compile import api
from mla_compile.sources.softmaxes import has_other_softmaxes

ROUNDING = 1e-5  # float32 through one layer; ten times below what is allowed
KINDS = {
    kind.__name__: kind
    for kind in (
        zoo.OwnSoftmax,
        zoo.ShiftedSoftmax,
        zoo.HiddenExponentials,
        zoo.DividedLate,
        zoo.ExponentialOfLogSoftmax,
        zoo.LessLogSumExp,
    )
}


def exported(kind, decomposed):
    model = zoo.model(kind)
    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = export(model, (torch.randint(zoo.VOCABULARY, (2, 5)),), dynamic_shapes=dynamic)
    return model, program.run_decompositions({}) if decomposed else program


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_softmaxes_of_any_spelling_convert(name, decomposed):
    """Oracle: the module itself, called directly; then token by token."""
    model, program = exported(KINDS[name], decomposed)
    before = str(program.graph)
    compiled = api.compile(program, exact=True, check=False)
    assert str(program.graph) == before
    assert zoo.error_in_two_pieces(compiled.module, model) <= ROUNDING


@pytest.mark.parametrize("kind", [zoo.TwoBases, zoo.MoreThanTheSum, zoo.SumOfQueries, zoo.SpelledOut])
def test_what_is_no_other_softmax_stays(kind):
    assert not has_other_softmaxes(exported(kind, True)[1])
