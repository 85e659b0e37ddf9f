"""Models run layer by layer, against the same models run whole."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
import zoo
from observed import observe_sites

from mla_compile.config import make_config
from mla_compile.errors import RefusedError, UsageError
from mla_compile.passes.activations import SiteRun
from mla_compile.passes.converted import converted_logits, original_logits
from mla_compile.passes.fisher import fisher
from mla_compile.passes.kept import KeptValues
from mla_compile.passes.layer_errors import layer_errors
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.methods import nothing_left_out
from mla_compile.passes.recognise import recognise
from mla_compile.passes.statistics import collect_statistics
from mla_compile.passes.task import Task
from mla_compile.sources.capture import capture

LENGTH = 8
IDS = torch.randint(0, zoo.VOCABULARY, (5, LENGTH), generator=torch.Generator().manual_seed(1))
BOUND = 100.0
"""MiB: some 60 of them are the statistics of 24 layers, which are the result; activations of a layer are some 10."""
CUT = Resources(whole=0)
ONE_BATCH = Resources(whole=0, kept=1)
# The same operators on the same numbers; only autograd's sums of several gradients may be ordered otherwise.
CLOSE = 1e-6
FIELDS = ("mean", "moment", "query", "distance", "output", "attended", "key_squares", "key_moment", "key_mean")


def relative(got, expected):
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def assert_same(found, expected, tolerance=CLOSE):
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        for name in FIELDS:
            if getattr(wanted, name) is None:
                assert getattr(got, name) is None
            else:
                assert relative(getattr(got, name), getattr(wanted, name)) <= tolerance, name


def layered(program, sites, batch=2, resources=CUT, gradients=True, length=LENGTH):
    return SiteRun(program, sites, (batch, length), gradients=gradients, resources=resources)


# ---- where a graph is cut


@pytest.mark.parametrize("name", ["llama-gqa", "nanogpt", "nanogpt-table", "complex-llama", "mistral-window"])
def test_one_activation_is_handed_on_between_layers(programs, name):
    """Embeddings, a segment per layer, and the head; tables and masks are made where they are read."""
    captured = programs[name]
    run = layered(captured.program, captured.sites)
    segments = run.layerwise.segments
    assert len(segments) == models.LAYERS + 2
    for before, after in itertools.pairwise(segments):
        (value,) = before.writes
        assert after.reads == (value,)
        assert tuple(value.meta["val"].shape[2:]) == (models.WIDTH,)
    outputs = [[site.output for site in captured.sites if site.output in {n.name for n in s.nodes}] for s in segments]
    assert outputs == [[], *([site.output] for site in captured.sites), []]


def test_weights_are_read_by_the_segment_of_their_layer_only(programs):
    captured = programs["llama-gqa"]
    segments = layered(captured.program, captured.sites).layerwise.segments
    for layer in range(models.LAYERS):
        owners = [i for i, s in enumerate(segments) if any(f"layers.{layer}." in str(n.target) for n in s.weights)]
        assert owners == [layer + 1]
    assert {n.target for n in segments[-1].weights} == {"lm_head.weight"}


def test_a_small_model_is_one_segment(programs):
    captured = programs["llama-gqa"]
    (whole,) = layered(captured.program, captured.sites, resources=Resources()).layerwise.segments
    assert not whole.reads
    assert not whole.writes


# ---- what comes out


@pytest.fixture(scope="module")
def whole(mixed):
    return collect_statistics(mixed.program, mixed.sites, IDS, batch=2)


@pytest.mark.parametrize("resources", [CUT, ONE_BATCH], ids=["cut", "one batch at a time"])
def test_statistics_layer_by_layer_are_those_of_the_whole(mixed, whole, resources):
    run = layered(mixed.program, mixed.sites, resources=resources)
    assert len(run.layerwise.segments) > len(mixed.sites)
    assert_same(collect_statistics(mixed.program, mixed.sites, IDS, batch=2, run=run), whole)


def test_statistics_with_activations_in_files_are_those_of_the_whole(mixed, whole, tmp_path):
    run = layered(mixed.program, mixed.sites, resources=Resources(whole=0, folder=tmp_path / "here"))
    assert_same(collect_statistics(mixed.program, mixed.sites, IDS, batch=2, run=run), whole)
    assert [*tmp_path.rglob("*")] == [tmp_path / "here"]  # nothing is left


@pytest.mark.parametrize("name", ["llama-gqa", "llama-yarn", "nanogpt-spelled-out", "complex-llama"])
@pytest.mark.parametrize("gradients", [True, False])
def test_activations_layer_by_layer_are_those_of_the_whole(programs, name, gradients):
    captured, ids = programs[name], models.tokens(2, LENGTH)
    expected = observe_sites(captured.program, captured.sites, gradients=gradients)(ids)
    found = observe_sites(captured.program, captured.sites, gradients=gradients, resources=CUT)(ids)
    for got, wanted in zip(found, expected, strict=True):
        assert (got.gradient is None) == (not gradients)
        for field, value in vars(wanted).items():
            if value is not None and value.numel():
                assert relative(getattr(got, field), value) <= CLOSE, field


class Shared(zoo.TinyLM):
    """Something made once from the tokens is read by every layer, and every layer's output by the last."""

    def forward(self, ids):
        x = first = self.embed(ids)
        kept = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x + 0.1 * first), ids)
            kept.append(x)
        return self.head(x + sum(kept))


def test_what_many_layers_read_is_kept_once_and_its_gradients_are_summed():
    program = zoo.program_of(zoo.model(*[zoo.HalfRope] * 3, kind=Shared))
    sites = recognise(program).sites
    run = layered(program, sites)
    assert max(len(s.reads) for s in run.layerwise.segments) > 2
    expected = collect_statistics(program, sites, IDS, batch=2)
    assert_same(collect_statistics(program, sites, IDS, batch=2, run=run), expected)


def test_narrow_weights_are_widened_segment_by_segment():
    module = models.handwritten(models.ComplexLlama).bfloat16()
    program = capture(module, (models.tokens(2, 5),))
    assert program.dtype == torch.bfloat16
    sites, ids = recognise(program).sites, models.tokens(5, LENGTH)
    run = layered(program, sites)
    assert [len(s.reads) for s in run.layerwise.segments] == [0] + [1] * (models.LAYERS + 1)
    assert all(n.meta.get("val") is not None for s in run.layerwise.segments[1:] for n in s.writes)
    expected = collect_statistics(program, sites, ids, batch=2)
    assert_same(collect_statistics(program, sites, ids, batch=2, run=run), expected)


# ---- how it runs


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("resources", [Resources(), CUT, ONE_BATCH], ids=["whole", "cut", "one batch at a time"])
def test_progress_is_told_as_many_steps_as_were_announced(programs, gradients, resources):
    captured, seen = programs["llama-gqa"], []
    run = layered(captured.program, captured.sites, resources=resources, gradients=gradients)

    def count(batches):
        for ids in batches:
            seen.append(len(ids))
            yield ids

    batches = models.tokens(5, LENGTH).split(2)
    assert sum(1 for _ in run.run(batches, count)) == 3 * models.LAYERS
    assert len(seen) == run.steps(3)
    assert {*seen} == {1, 2}


def test_segments_are_told_as_they_begin(programs):
    captured, told = programs["llama-gqa"], []
    batches = models.tokens(4, LENGTH).split(2)
    [*layered(captured.program, captured.sites).run(batches, tell=told.append)]
    forward = [f"segment {n} of {models.LAYERS + 2}" for n in range(1, models.LAYERS + 2)]
    backward = [f"segment {n} of {models.LAYERS + 2}, backward" for n in range(models.LAYERS + 2, 1, -1)]
    assert told == forward + backward
    [*layered(captured.program, captured.sites, resources=Resources()).run(batches, tell=told.append)]
    assert len(told) == len(forward + backward)


def test_every_site_sees_the_batches_in_order(programs):
    captured = programs["llama-gqa"]
    run = layered(captured.program, captured.sites)
    seen = [(site, batch) for batch, site, _ in run.run(models.tokens(5, LENGTH).split(2))]
    assert seen == [(site, batch) for site in reversed(range(models.LAYERS)) for batch in range(3)]


def test_nothing_is_kept_behind_its_last_reader(programs, monkeypatch):
    captured, held = programs["llama-gqa"], []
    put = KeptValues.put

    def counted(self, batch, values):
        put(self, batch, values)
        held.append(len(self._held))

    monkeypatch.setattr(KeptValues, "put", counted)
    batches = models.tokens(4, LENGTH).split(2)
    [*layered(captured.program, captured.sites, gradients=False).run(batches)]
    assert max(held) <= 2 + 1  # of two batches: what one segment reads, and one value of the next


def test_a_conversion_layer_by_layer_is_that_of_the_whole(programs):
    """Statistics, sizes that are tried, values that are refitted, errors of layers: everything that runs a model."""
    captured, windows = programs["complex-llama"], models.tokens(12, LENGTH)
    found = []
    for resources in (Resources(), CUT):
        config = make_config(method="fisher", kv_rank=12, rope_dims=8)
        task = Task(captured.program, captured.sites, (), config, windows, resources=resources)
        choice = fisher(task)
        errors = layer_errors(
            captured.program,
            captured.sites,
            choice.weights,
            task.rewrite(choice.weights),
            windows,
            resources=resources,
        )
        found.append((choice, errors))
    (whole, whole_errors), (cut, cut_errors) = found
    assert cut.plans == whole.plans
    for got, expected in zip(cut.weights, whole.weights, strict=True):
        products = [w.key_up @ w.row[: w.key_up.shape[2]] for w in (got, expected)]  # signs of entries may differ
        assert relative(*products) < 1e-4
    for got, expected in zip(cut_errors, whole_errors, strict=True):
        assert got.output == pytest.approx(expected.output, rel=1e-4)
        assert got.loss == pytest.approx(expected.loss, rel=1e-4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_memory_is_that_of_a_layer(tmp_path):
    """A deep model with mapped weights: neither its weights nor all layers' activations are in memory at a time."""
    script = str(Path(__file__).parent / "memory_worker.py")
    # Memory that is freed goes back at once, so that it is not counted.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 2.5 * BOUND
    assert found["whole"] > 2 * BOUND  # the bound means something
    assert found["layers"] < BOUND


class SilentLM(zoo.TinyLM):
    """A model that lets no gradient through."""

    def forward(self, ids):
        return super().forward(ids).detach()


def test_a_model_without_derivatives_is_refused():
    program = zoo.program_of(zoo.model(zoo.HalfRope, kind=SilentLM))
    run = layered(program, recognise(program).sites)
    with pytest.raises(RefusedError, match=r"cannot be run backward .*\. Pass --no-gradients"):
        [*run.run([IDS])]


def test_a_folder_that_cannot_be_written_is_told(programs, tmp_path, monkeypatch):
    captured = programs["llama-gqa"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mla_compile.passes.kept.save_file", full)
    run = layered(captured.program, captured.sites, resources=Resources(whole=0, folder=tmp_path))
    with pytest.raises(UsageError, match=r"could not be written .*No space left.*Make room"):
        [*run.run([models.tokens(2, LENGTH)])]
    assert not [*tmp_path.iterdir()]


def test_logits_layer_by_layer_are_those_of_the_whole(programs):
    captured, ids = programs["llama-gqa"], models.tokens(3, LENGTH)
    program, batches = captured.program, ids.split(2)
    expected = program.flat_module()(*program.inputs(ids)).detach()
    found = torch.cat([*original_logits(program, captured.sites, batches, CUT)])
    assert relative(found, expected) <= CLOSE
    model = Task(program, captured.sites, (), make_config(exact=True), None)
    model = model.rewrite(nothing_left_out(model).weights)
    whole = torch.cat([*converted_logits(model, batches, Resources())])
    assert relative(torch.cat([*converted_logits(model, batches, CUT)]), whole) <= CLOSE
    assert relative(whole, expected) < 1e-4  # another order of float32 products
