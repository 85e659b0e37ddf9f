"""Two processes that share a calibration, against one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

from mla_compile.config import make_config
from mla_compile.errors import LoadError, ShareDone, UsageError
from mla_compile.passes.layers import measure_layers
from mla_compile.passes.methods import mha2mla
from mla_compile.passes.statistics import SiteSums
from mla_compile.passes.task import Task
from mla_compile.progress import Stages
from mla_compile.text.processes import Processes, join_processes

pytest.importorskip("accelerate")

LENGTH = 8
WORKER = Path(__file__).parent / "calibration_worker.py"
# Both sides add the same float64 numbers, in another order.
CLOSE = 1e-12
LAUNCHED = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]


def relative(got, expected):
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


@pytest.fixture(scope="module")
def text():
    return models.tokens(9, LENGTH)  # three batches: one process gets one more than the other


@pytest.fixture(scope="module")
def shared(programs, text, tmp_path_factory):
    """What each of two processes (gloo, on CPUs) found, in turn: measured, remembered, without gradients, norms."""
    folder = tmp_path_factory.mktemp("shared")
    torch.export.save(programs["complex-llama"].program.exported, folder / "model.pt2")
    torch.save(text, folder / "text.pt")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    words += [str(folder / name) for name in ("model.pt2", "text.pt", "", "cache")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{i}.pt") for i in range(2)]


@pytest.mark.parametrize("place", range(3), ids=["measured", "remembered", "without gradients"])
def test_two_processes_find_the_statistics_of_one(programs, text, shared, place):
    captured = programs["complex-llama"]
    config = make_config(gradients=place < 2)
    alone = measure_layers(Task(captured.program, captured.sites, (), config, text)).layers
    for got, layer in zip(shared[0][place], alone, strict=True):
        assert got["tokens"] == text.numel()
        for name, expected in vars(layer.statistics()).items():
            if isinstance(expected, torch.Tensor):
                assert relative(got[name], expected) < CLOSE, name


def test_two_processes_choose_the_components_of_one(programs, text, shared):
    captured = programs["complex-llama"]
    config = make_config(method="mha2mla", selection="2-norm")
    alone = mha2mla(Task(captured.program, captured.sites, (), config, text)).weights
    for got, expected in zip(shared[0][3], alone, strict=True):
        assert relative(got, expected.row) < CLOSE


def test_only_the_first_process_goes_on(shared):
    assert shared[1] == [None] * 4


# ---- one process


def test_sums_over_parts_of_a_text_merge(programs, text):
    """By any cut, and whichever part comes first."""
    captured = programs["complex-llama"]
    task = Task(captured.program, captured.sites, (), make_config(), text)
    run, batches = task.site_run(3, gradients=True), text.split(3)

    def sums(part):
        found = [SiteSums.zeros(s, w, LENGTH) for s, w in zip(captured.sites, run.widths, strict=True)]
        for _, number, seen in run.run(part):
            found[number].add(SiteSums.of_batch(captured.sites[number], seen, None))
        return found

    whole = sums(batches)
    parts = [sums([ids]) for ids in batches]
    for order in itertools.permutations(parts):
        for expected, first, *rest in zip(whole, *order, strict=True):
            for name, value in vars(expected).items():
                merged = sum((getattr(other, name) for other in rest), getattr(first, name))
                assert value.numel() == 0 or relative(merged, value) < CLOSE, name


def test_batches_are_dealt_out_in_turn():
    dealt = [Processes(index, 3).share(range(8)) for index in range(3)]
    assert [[*part] for part in dealt] == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    for name in (*LAUNCHED, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert join_processes() == Processes()


@pytest.mark.parametrize(("names", "count"), [(["WORLD_SIZE"], "4"), (["WORLD_SIZE", "RANK"], "1"), (LAUNCHED, "1")])
def test_variables_of_something_else_are_no_launcher(monkeypatch, names, count):
    """Images of clusters set some; a single process does without accelerate."""
    for name in (*LAUNCHED, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, count)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert join_processes() == Processes()


def test_launched_processes_need_accelerate(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoadError, match="takes the package accelerate"):
        join_processes()


def test_another_process_has_nothing_to_do_without_text(monkeypatch, programs):
    from mla_compile import api
    from mla_compile.conversion import request

    monkeypatch.setattr(Processes, "wait", lambda self: None)
    monkeypatch.setattr(request, "join_processes", lambda: Processes(1, 2))
    program, text = programs["nanogpt"].program.exported, models.tokens(12, 16)
    with pytest.raises(ShareDone):
        api.compile(program, method="mha2mla", share=True)
    with pytest.raises(UsageError, match="Convert without --finetune"):
        api.compile(program, method="mha2mla", share=True, finetune=text)


def test_the_command_line_ends_well_in_other_processes(monkeypatch, tmp_path):
    from mla_compile import api, cli

    def done(*_, **__):
        raise ShareDone

    monkeypatch.setattr(api, "compile", done)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        cli.main(["model", "--out", str(tmp_path / "a.onnx"), "--quiet"])
    assert ended.value.code == 0


def test_a_stage_counts_the_steps_of_its_own_share(programs, text):
    captured = programs["complex-llama"]
    task = Task(captured.program, captured.sites, (), make_config(), text, Stages(), processes=Processes(1, 2))
    assert task.shared_steps(task.site_run(4, gradients=True), 4) == 1
