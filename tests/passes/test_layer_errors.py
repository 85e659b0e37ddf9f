"""Errors layer by layer, against a layer spoiled by a known amount."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from conversion import latent_weights
from observed import observe_outputs

from mla_compile.passes.insert_latent import insert_latent
from mla_compile.passes.layer_errors import layer_errors
from mla_compile.runtime.module import LatentModel

IDS = torch.randint(0, zoo.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(5))
LOST = 0.25
"""Share of one layer's values that is lost."""
ROUNDING = 1e-5
"""Of float32 against float64 sums, relative."""


def measure(mixed, weights, **settings):
    graph = insert_latent(mixed.program, mixed.sites, weights, torch.float32)
    return layer_errors(mixed.program, mixed.sites, weights, LatentModel(graph.module, graph.rows), IDS, **settings)


@pytest.fixture(scope="module")
def exact(mixed):
    return latent_weights(mixed.program, mixed.sites)


def test_exact_layers_have_no_errors(mixed, exact):
    for found in measure(mixed, exact):
        assert found.output < ROUNDING
        assert found.loss < ROUNDING


@pytest.mark.parametrize("index", [0, len(zoo.MIXED) // 2, len(zoo.MIXED) - 1])
def test_a_spoiled_layer_is_measured_alone(mixed, exact, index):
    spoiled = [replace(w, value_up=(1 - LOST) * w.value_up) if i == index else w for i, w in enumerate(exact)]
    found = measure(mixed, spoiled, batch=2)

    with torch.no_grad():
        output = observe_outputs(mixed.program, mixed.sites)(IDS)[index].double()
    bias = exact[index].output_bias
    error = LOST * (output - (0.0 if bias is None else bias))
    gradient = mixed.look(IDS)[index].gradient.double()
    price = (gradient * error).sum((2, 3)).square().mean() / 2
    assert found[index].output == pytest.approx(float(error.norm() / output.norm()), rel=1e-4)
    assert found[index].loss == pytest.approx(float(price), rel=1e-4)
    others = [f for i, f in enumerate(found) if i != index]
    assert all(f.output < ROUNDING and f.loss < ROUNDING for f in others)  # those behind it see the original's inputs


def test_without_gradients_there_is_no_price(mixed, exact):
    assert all(f.loss is None and f.output < ROUNDING for f in measure(mixed, exact, gradients=False))
