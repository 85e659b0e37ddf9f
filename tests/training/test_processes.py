"""Training in processes of its own: killed and resumed, and shared by two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import mla_compile
from training import MATCHING, assert_same, assert_same_curve


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


def test_a_training_killed_in_a_checkpoint_goes_on_to_the_same_curve(plain, train, worker, tmp_path):
    out = tmp_path / "model"
    done = run(*worker(out, "--kill", "4"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "model.pt2").exists()
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000000", "step-00000002", ".step-00000004"}
    found = train(out, resume=True)
    assert found.curve == plain.curve
    assert_same(found.weights, plain.weights, 0)
    assert not [*(out / "checkpoints").glob(".*")]


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": (
        "accelerate.commands.launch",
        "--cpu",
        *("--num_processes", "2", "--num_machines", "1", "--num_cpu_threads_per_process", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ),
}


@pytest.mark.parametrize(
    ("launcher", "kind"),
    [("torchrun", "plain"), ("accelerate", "plain"), ("torchrun", "sharded"), ("torchrun", "matching")],
)
def test_two_processes_train_as_one(request, worker, launcher, kind, tmp_path):
    out, sharded = tmp_path / "model", kind == "sharded"
    one = request.getfixturevalue("matching" if kind == "matching" else "plain")
    changes = {**MATCHING, "teacher": str(request.getfixturevalue("archive"))} if kind == "matching" else {}
    words = worker(out, *(["--shard"] if sharded else []), **changes)
    done = run("-m", *LAUNCHERS[launcher], *words)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (out / "checkpoints" / "step-00000008").iterdir()}
    assert ("pytorch_model_fsdp_0" in names) == sharded
    # Means over halves of the batch; Adam divides by the gradient's size, which makes more of it where that is small.
    assert_same(mla_compile.load(out).state_dict(), one.weights, 1e-3)
    assert_same_curve(json.loads((out / "report.json").read_text())["training"]["curve"], one.curve)


def test_deepspeed_trains_as_one_process(plain, worker, tmp_path):
    """Gradients and the optimiser's states in halves; and from a checkpoint on, to the same curve."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: .[deepspeed]")
    out, launch = tmp_path / "model", ("-m", *LAUNCHERS["torchrun"])
    for options in ([], ["--resume"]):
        done = run(*launch, *worker(out, "--deepspeed", *options))
        assert done.returncode == 0, done.stderr
        last = out / "checkpoints" / "step-00000008"
        assert len([*last.rglob("zero_pp_rank_*_optim_states.pt")]) == 2
        assert_same(mla_compile.load(out).state_dict(), plain.weights, 1e-3)
        assert_same_curve(json.loads((out / "report.json").read_text())["training"]["curve"], plain.curve)
        shutil.rmtree(last)
        for name in ("model.pt2", "report.json", "report.html"):
            (out / name).unlink()


def test_deepspeed_computes_products_in_bfloat16(plain, worker, tmp_path):
    """And keeps weights in float32, which small steps are not lost in."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: .[deepspeed]")
    out = tmp_path / "model"
    done = run("-m", *LAUNCHERS["torchrun"], *worker(out, "--deepspeed", mixed_precision="bf16"))
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "report.json").read_text())["training"]
    assert found["after"] == pytest.approx(plain.report["training"]["after"], abs=0.05)
    assert found["before"] != plain.report["training"]["before"], "products are rounded"
    weights = [w for w in mla_compile.load(out).state_dict().values() if w.is_floating_point()]
    assert {w.dtype for w in weights} == {torch.float32}
    assert any(bool((w != w.bfloat16()).any()) for w in weights)
