"""Training of the new matrices: what it may change, what it must reach, and how it ends."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import models
import pytest
import torch
import zoo
from conversion import latent_weights

from mla_compile import api
from mla_compile.config import make_config
from mla_compile.conversion.admission import require_room_to_polish
from mla_compile.conversion_cost import polish_cost
from mla_compile.errors import UsageError
from mla_compile.passes import polish as module
from mla_compile.passes.factorise import factorise_mha2mla
from mla_compile.passes.fisher import fisher
from mla_compile.passes.polish import polish
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.passes.weights import read_site
from mla_compile.plan import plan_layers
from mla_compile.progress import Stages, machine_memory

LENGTH, STEPS = 16, 40
TEXT, UNSEEN = models.tokens(256, LENGTH, seed=1), models.tokens(16, LENGTH, seed=2)


def task_of(captured, windows=TEXT, **settings):
    return Task(captured.program, captured.sites, (), make_config(**settings), windows, Stages())


def divergence(program, model, ids):
    """Oracle: KL(original || converted) per token, spelled out."""
    with torch.no_grad():
        expected = program.flat_module()(*program.inputs(ids)).double().log_softmax(-1)
        got = model(ids).logits.double().log_softmax(-1)
        return float((expected.exp() * (expected - got)).sum(-1).mean())


def tensors(weights):
    found = [[getattr(w, f.name) for f in fields(w)] for w in weights]
    return [x for layer in found for x in layer if isinstance(x, torch.Tensor)]


class Polished:
    """A model cut to a small cache without regard to text, and what training makes of it."""

    def __init__(self, captured):
        self.task = task_of(captured)
        self.given = latent_weights(captured.program, captured.sites, exact=False, rope_dims=0, kv_rank=4)
        self.given_before = [x.clone() for x in tensors(self.given)]
        self.state_before = {n: x.clone() for n, x in captured.program.exported.state_dict.items()}
        self.found = polish(self.task, self.given, STEPS)


@pytest.fixture(scope="module")
def polished(programs):
    return Polished(programs["llama-gqa"])


def test_the_model_comes_closer_on_text_it_has_not_seen(polished):
    task = polished.task
    before, after = (
        divergence(task.program, task.rewrite(w), UNSEEN) for w in (polished.given, polished.found.weights)
    )
    assert after < 0.9 * before  # random weights, of which a rank of 4 holds only so much


def test_the_report_is_of_windows_kept_out_of_training(polished):
    task, report = polished.task, polished.found.report
    expected = [divergence(task.program, task.rewrite(w), TEXT[-16:]) for w in (polished.given, polished.found.weights)]
    # Logits are float32.
    assert [report.before, report.after] == pytest.approx(expected, rel=1e-4)
    assert report.steps == STEPS
    assert polished.found.notes == ()
    assert [t.name for t in task.stages.timings] == ["polish"]


def test_nothing_that_was_given_changes(polished):
    state = polished.task.program.exported.state_dict
    assert all(torch.equal(state[n], x) for n, x in polished.state_before.items())
    assert all(map(torch.equal, tensors(polished.given), polished.given_before))
    assert all(p.grad is None for p in polished.task.program.flat_module().parameters())


def test_only_the_new_matrices_change(polished):
    model = polished.task.rewrite(polished.found.weights)
    old = [x for n, x in model.named_parameters() if ".latent_" not in n]
    assert {x.data_ptr() for x in old} <= {x.data_ptr() for x in polished.task.program.flat_module().parameters()}
    for before, after in zip(polished.given, polished.found.weights, strict=True):
        for field in ("query", "row", "key_up", "value_up"):
            assert getattr(before, field).shape == getattr(after, field).shape
            assert not torch.equal(getattr(before, field), getattr(after, field))
        assert torch.equal(before.inv_freq, after.inv_freq)


def test_training_is_deterministic(polished, programs):
    again = polish(task_of(programs["llama-gqa"]), polished.given, STEPS)
    assert all(map(torch.equal, tensors(again.weights), tensors(polished.found.weights)))
    assert again.report == polished.found.report


def test_passes_of_any_size_make_the_same_step(programs, polished, monkeypatch):
    """A step over a large vocabulary takes several passes."""
    monkeypatch.setattr(module, "_LOGITS", 3 * LENGTH * models.VOCABULARY)
    parts = polish(task_of(programs["llama-gqa"]), polished.given, STEPS)
    # Adam's first steps are signs of gradients, which rounding may turn where they are all but zero.
    assert parts.report.after == pytest.approx(polished.found.report.after, rel=1e-2)


def test_every_kind_of_attention_can_be_trained(mixed):
    """Constant entries go on being 1, and weights of the same shapes take the place of the old ones."""
    settings = {"exact": False, "rope_dims": 0, "kv_rank": 6}
    given = latent_weights(mixed.program, mixed.sites, **settings)
    text = torch.randint(0, zoo.VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(2))
    task = Task(mixed.program, mixed.sites, (), make_config(), text)
    found = polish(task, given, 2)
    assert found.report.after < found.report.before
    constants = 0
    for site, before, after in zip(mixed.sites, given, found.weights, strict=True):
        shapes = [[None if x is None else x.shape for x in (w.row, w.row_bias, w.query_bias)] for w in (before, after)]
        assert shapes[0] == shapes[1]
        if site.needs_constant(after.key_up.shape[1]):
            constants += 1
            last = after.key_up.shape[2] - 1
            assert not after.row[last].any()
            assert after.row_bias[last] == 1
    assert constants > 1


class NormedPerHead(zoo.HalfRope):
    """Norms on every key head in front of the rotation (Qwen 3)."""

    kv_heads = 2

    def keys(self, k):
        return super().keys(zoo.rms(k))


def test_rope_keys_in_front_of_norms_can_be_trained():
    program = zoo.program_of(zoo.model(NormedPerHead, NormedPerHead))
    text = torch.randint(0, 40, (64, 8), generator=torch.Generator().manual_seed(2))
    config = make_config(method="fisher", kv_rank=4, rope_dims=2)
    task = Task(program, recognise(program).sites, (), config, text)
    weights = fisher(task).weights
    assert all(w.scaled_rope for w in weights)
    found = polish(task, weights, 20)
    assert found.report.after < found.report.before
    assert all(w.scaled_rope for w in found.weights)


def test_what_does_not_help_is_undone(programs, polished, monkeypatch):
    monkeypatch.setattr(module, "_RATE", 3.0)
    found = polish(task_of(programs["llama-gqa"]), polished.given, 2)
    assert all(a is b for a, b in zip(found.weights, polished.given, strict=True))
    assert found.report.after == found.report.before
    assert "undone" in found.notes[0]


def test_a_loss_that_is_not_finite_ends_training_with_the_last_good_weights(programs, polished, monkeypatch):
    monkeypatch.setattr(module, "_share", lambda step, steps: 1.0 if step < 6 else 1e30)
    found = polish(task_of(programs["llama-gqa"]), polished.given, STEPS)
    assert all(x.isfinite().all() for x in tensors(found.weights))
    assert found.report.steps == 6
    assert found.report.after < found.report.before
    assert f"after 6 of {STEPS} steps" in found.notes[0]


def test_a_single_window_is_trained_on(programs, polished):
    found = polish(task_of(programs["llama-gqa"], TEXT[:1]), polished.given, 3)
    assert found.report.after < found.report.before


def test_what_cannot_fit_is_refused_before_anything_is_measured(programs, monkeypatch):
    captured = programs["llama-gqa"]
    asked = {"method": "fisher", "calibration": TEXT, "check": False, "statistics_cache": False}
    monkeypatch.setattr("mla_compile.conversion.admission.free_memory", lambda _: 10**5)
    monkeypatch.setattr("mla_compile.conversion.causal.METHODS", {})
    with pytest.raises(UsageError, match=r"matrices alone take .* GB, and this machine has 0\.0 GB") as caught:
        api.compile(captured.module, models.example(captured.module), polish_steps=1, **asked)
    assert "--polish-steps" in caught.value.remedy
    with pytest.raises(KeyError):  # the method, which is not there: without polishing nothing is refused
        api.compile(captured.module, models.example(captured.module), **asked)


@pytest.mark.parametrize("memory", [10**12, None])
def test_what_fits_and_what_nobody_can_tell_is_polished(programs, monkeypatch, memory):
    monkeypatch.setattr("mla_compile.conversion.admission.free_memory", lambda _: memory)
    require_room_to_polish(task_of(programs["llama-gqa"], method="fisher", polish_steps=1))


def test_what_is_trained_takes_what_is_said(programs):
    """The figure that a refusal names: five numbers in float32 for every one that is trained."""
    captured = programs["llama-gqa"]
    config = make_config(method="mha2mla", selection="uniform", cache_ratio=0.5)
    plans = plan_layers(captured.sites, [models.WIDTH] * len(captured.sites), config)
    weights = [
        factorise_mha2mla(site, read_site(captured.program, site), plan, config, None)
        for site, plan in zip(captured.sites, plans, strict=True)
    ]
    model = task_of(captured).rewrite(weights)
    stored = {name: p.detach() for name, p in model.named_parameters()}
    layers = [module._Layer.of(site, w, stored) for site, w in zip(captured.sites, weights, strict=True)]
    trained = sum(p.numel() for layer in layers for p in layer.parameters.values())
    cost = polish_cost(captured.sites, plans, [models.WIDTH] * len(plans), config, 10**5, 4, 10)
    # Values have an up-projection per query head only behind a refit, which is what is counted.
    assert 20 * trained <= cost.least_memory_bytes <= 1.4 * 20 * trained
    assert cost.least_memory_bytes < cost.memory_bytes


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the oracle is Linux's own account")
@pytest.mark.parametrize(("limit", "told"), [(None, None), ("max\n", None), ("1000000\n", 10**6), (f"{2**60}\n", None)])
def test_memory_is_the_machines_or_the_containers(tmp_path, monkeypatch, limit, told):
    path = tmp_path / "memory.max"
    if limit is not None:
        path.write_text(limit)
    monkeypatch.setattr("mla_compile.progress.Path", lambda _: path)
    whole = re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert machine_memory() == (told or int(whole.group(1)) * 1024)
