"""Queries of a rank: the best for logits, by sampling and against what is best for queries alone."""

from __future__ import annotations

import dataclasses

import models
import pytest
import torch

from mla_compile.config import make_config
from mla_compile.conversion.causal import Case, choose, finish
from mla_compile.disk.layer_store import LayerStore
from mla_compile.passes import layers
from mla_compile.passes.layers import measure_layers
from mla_compile.passes.low_rank import truncated_svd
from mla_compile.passes.methods import METHODS
from mla_compile.passes.query_rank import full_query_rank, with_query_rank
from mla_compile.passes.task import Task
from mla_compile.text.processes import Processes


@pytest.fixture(scope="module")
def task(programs):
    captured = programs["llama-gqa"]
    config = make_config(method="transmla", layout="deepseek", kv_rank=20, rope_dims=8, gradients=False)
    return Task(captured.program, captured.sites, (), config, models.tokens(8, 32))


@pytest.fixture(scope="module")
def weights(task):
    return METHODS["transmla"](task).weights


def logit_error(layer, changed, moment):
    """Mean square of what logits change by, over sampled inputs of queries and keys at random angles."""
    generator = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp(min=0).sqrt()
    x, y = (root @ torch.randn(len(root), 4000, generator=generator, dtype=torch.float64) for _ in range(2))
    rank, half = layer.key_up.shape[2], layer.inv_freq.shape[1]
    row = layer.row @ y
    still = (layer.key_up @ row[:rank]).repeat_interleave(len(layer.query) // len(layer.key_up), 0)
    angle = 6.283185307 * torch.rand(half, 4000, generator=generator, dtype=torch.float64)
    real, imaginary = row[rank:].view(2, half, -1)
    turned = torch.cat([real * angle.cos() - imaginary * angle.sin(), real * angle.sin() + imaginary * angle.cos()])
    keys = torch.cat([still, turned.expand(len(still), -1, -1)], 1)
    return float((((layer.query - changed.query) @ x) * keys).sum(1).square().mean())


def test_the_rank_is_that_and_logits_change_least(task, weights):
    moments = [measured.statistics().moment for measured in measure_layers(task).layers]
    for layer, changed, moment in zip(weights, with_query_rank(weights, moments, 12), moments, strict=True):
        assert torch.linalg.matrix_rank(changed.query.flatten(0, 1), rtol=1e-9) == 12
        best = truncated_svd(layer.query.flatten(0, 1), 12)
        up, down = best.up, best.down
        plain = type(layer)(**{**layer.__dict__, "query": (up @ down).view_as(layer.query)})
        assert logit_error(layer, changed, moment) < 0.9 * logit_error(layer, plain, moment)


def test_nothing_changes_at_the_full_rank(weights):
    full = full_query_rank(weights[0])
    assert full == 64
    assert with_query_rank(weights, [torch.eye(64)] * len(weights), full) == weights


@pytest.mark.parametrize("method", ["transmla", "fisher"])
@pytest.mark.parametrize("tokens", [256, 48], ids=["enough", "too few"])
def test_the_text_is_measured_once_and_together_with_other_processes(task, method, tokens, tmp_path, monkeypatch):
    """They have left when the sizes are chosen: nobody answers whoever asks again."""
    asked, measured, collect = [], [], layers.collect_statistics
    monkeypatch.setattr(Processes, "agreed", lambda self, value: asked.append(value) or value)
    monkeypatch.setattr(layers, "collect_statistics", lambda *a, **k: measured.append(collect(*a, **k)) or measured[-1])
    config = task.config.model_copy(update={"method": method, "format": "deepseek", "q_rank": 12})
    windows = models.tokens(8, 32).flatten()[:tokens].view(-1, 16)
    task = dataclasses.replace(task, config=config, windows=windows, store=LayerStore(tmp_path))
    case = Case(None, task, None, ())
    choice = choose(case)
    finished = finish(case, choice).weights
    assert len(measured) == len(asked) == 1
    for layer, statistics, moment in zip(finished, *measured, choice.moments, strict=True):
        assert torch.equal(moment, layers.certain(statistics).moment)
        assert torch.linalg.matrix_rank(layer.query.flatten(0, 1), rtol=1e-9) == 12
