"""Low-rank adapters: what they change, and that they are part of the weights in the end."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrize

import mla_compile
from mla_compile.errors import LoadError, UsageError
from mla_compile.training import run, trainer
from mla_compile.training.recipe import make_recipe
from training import LENGTH, assert_same
from training.test_trainer import loss

pytest.importorskip("peft")

RANK = 2
LORA = {"lora_rank": RANK, "lora_alpha": 3, "train": "all"}


@pytest.fixture(scope="module")
def adapted(train):
    return train(**LORA)


def test_matrices_change_by_the_rank_of_adapters_and_nothing_else_does(adapted, converted):
    before, after = mla_compile.load(converted).state_dict(), adapted.weights
    changed = {name: after[name] - value for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"query", "row", "key_up", "value_up", "weight"}
    for name, change in changed.items():
        # Singular values behind the adapters' are what float32 sums of weight and change were rounded by.
        assert change.dim() in (2, 3), name
        values = torch.linalg.svdvals(change.double())
        assert (values[..., RANK:] < 1e-5 * values[..., :1]).all(), name
    assert not any("norm" in name for name in changed)


def test_merged_weights_compute_what_adapters_did(adapted, data):
    training = adapted.report["training"]
    # float32 sums against float64; the loss during training was that of weights with adapters beside them.
    assert training["after"] == pytest.approx(loss(adapted.folder, data[-4:]), rel=1e-5)
    assert training["after"] < training["before"] - 0.1
    assert not any(parametrize.is_parametrized(m) for m in mla_compile.load(adapted.folder).modules())


def test_adapters_go_on_where_they_were(adapted, train, monkeypatch, tmp_path):
    save = trainer.Checkpoints.save

    def interrupted(self, accelerator, state):
        save(self, accelerator, state)
        if state.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "model", **LORA)
    monkeypatch.undo()
    found = train(tmp_path / "model", resume=True, **LORA)
    assert [p["held_out"] for p in found.curve] == [p["held_out"] for p in adapted.curve]
    assert_same(found.weights, adapted.weights, 0)


def test_adapters_reach_graphs_that_are_cut_and_those_that_match(adapted, train, archive):
    assert_same(train(recompute=True, **LORA).weights, adapted.weights, 1e-6)
    matching = {"teacher": archive, "match_steps": 3, "objective": "attention", "tokens": 4 * 4 * LENGTH, "rate": 0.02}
    curve = train(**{**LORA, **matching}).curve
    assert min(p["objective"] for p in curve) < curve[0]["objective"]


def test_what_adapters_need(monkeypatch):
    with pytest.raises(UsageError, match="lora_rank above 0"):
        make_recipe(lora_alpha=8)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(LoadError, match=r"pip install 'mla-compile\[train,lora\]'"):
        run._require_packages(make_recipe(lora_rank=2))
