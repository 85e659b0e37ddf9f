"""Training from a folder to a folder: what is learned, what changes, and what other ways to compute it give."""

from __future__ import annotations

import json
import math
import pickle
import resource
import shutil
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

import mla_compile
from mla_compile import Recipe, finetune
from mla_compile.cli import main
from mla_compile.errors import LoadError, TrainingError, UsageError
from mla_compile.sources.capture import capture
from mla_compile.training import trainer
from mla_compile.training.run import _check_out
from training import LENGTH, SETTINGS, assert_same, counting

MIXED = {"match_steps": 4, "objective": "kl=1,next-token=0.01,attention=0.5"}


@pytest.fixture
def fresh_engine():
    """Another precision takes another state of accelerate."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def loss(folder, windows):
    """Oracle: mean of -log p(next token), spelled out."""
    with torch.no_grad():
        logits = mla_compile.load(folder)(windows).logits.double()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


def test_the_text_is_learned(plain, converted, data):
    training = plain.report["training"]
    assert [p["step"] for p in plain.curve] == [0, 2, 4, 6, 8]
    assert [p["tokens"] for p in plain.curve] == [p["step"] * 4 * LENGTH for p in plain.curve]
    # float32 sums against float64.
    assert training["before"] == pytest.approx(loss(converted, data[-4:]), rel=1e-5)
    assert training["after"] == pytest.approx(loss(plain.folder, data[-4:]), rel=1e-5)
    assert training["after"] < training["before"] - 0.3
    assert training["held_out_tokens"] == 4 * (LENGTH - 1)


def test_the_folder_is_like_the_one_it_came_from(plain, converted):
    files = {path.name for path in plain.folder.iterdir()}
    assert files == {path.name for path in converted.iterdir()} | {"recipe.yaml", "checkpoints"}
    before, after = (mla_compile.load(folder) for folder in (converted, plain.folder))
    assert before.rows == after.rows
    assert {n: x.shape for n, x in before.state_dict().items()} == {n: x.shape for n, x in after.state_dict().items()}
    assert all(p.requires_grad for p in after.parameters())


@pytest.mark.parametrize(
    ("train_", "others"), [("latent", ()), ("attention", ("o_proj", "norm")), ("all", ("mlp", "o_proj"))]
)
def test_only_what_is_asked_for_changes(train, converted, train_, others):
    found = train(train=train_, tokens=4 * LENGTH).weights
    before = mla_compile.load(converted).state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, found[name])}
    matrices = {n for n in before if n.rpartition(".")[2] in ("query", "row", "key_up", "value_up")}
    assert matrices <= changed
    for other in others:
        assert any(other in name for name in changed)
    if train_ == "latent":
        assert changed == matrices
    assert any("mlp" in name for name in changed) == (train_ == "all")


def test_pieces_of_a_step_make_the_same_step(plain, train):
    found = train(accumulate=2)
    # Sums in another order; Adam divides by the gradient's own size, which makes more of it where that is small.
    assert_same(found.weights, plain.weights, 1e-3)


def test_recomputed_activations_make_the_same_step(plain, train):
    found = train(recompute=True)
    assert_same(found.weights, plain.weights, 1e-6)


def test_bfloat16_learns_as_much(plain, train, fresh_engine):
    found = train(mixed_precision="bf16")
    after = [t.report["training"]["after"] for t in (found, plain)]
    assert after[0] == pytest.approx(after[1], abs=0.05)  # nats, of which the training gains more than 0.3
    assert all(x.dtype != torch.bfloat16 for x in found.weights.values())


def test_checkpoints_that_are_kept(plain):
    names = sorted(path.name for path in (plain.folder / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008"]
    held = {path.name for path in (plain.folder / "checkpoints" / names[0]).iterdir()}
    assert {"model.safetensors", "recipe.yaml", "state.json", "optimizer.bin"} <= held


def test_training_ends_where_nothing_improves(train):
    """The weights of the best evaluation are chosen, wherever training ended."""
    found = train(rate=0.5, patience=2, tokens=40 * 4 * LENGTH)
    training = found.report["training"]
    assert training["steps"] == training["best_step"] + 2 * SETTINGS["every"] < 40
    assert training["after"] == min(p["held_out"] for p in found.curve)


def test_a_loss_that_is_not_finite_ends_training(train, monkeypatch, tmp_path, converted):
    forward = trainer.Student.forward
    calls = []

    def broken(self, ids, objective, wanted):
        calls.append(torch.is_grad_enabled())
        return forward(self, ids, objective, wanted) * (math.nan if sum(calls) == 4 else 1.0)

    monkeypatch.setattr(trainer.Student, "forward", broken)
    with pytest.raises(TrainingError, match=r"not finite at step 4.*checkpoints"):
        train(tmp_path / "model")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["checkpoints"]
    assert (tmp_path / "model" / "checkpoints" / "step-00000002" / "model.safetensors").is_file()


def test_a_full_disk_leaves_earlier_checkpoints_whole(plain, train, tmp_path, monkeypatch):
    """Writing fails in the middle of a file; with room again, training goes on to the same weights."""
    out, save = tmp_path / "model", trainer.Checkpoints.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def starved(self, accelerator, state):
        if state.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        save(self, accelerator, state)

    monkeypatch.setattr(trainer.Checkpoints, "save", starved)
    try:
        with pytest.raises(TrainingError, match=r"step 4 could not be written.*--resume"):
            train(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000000", "step-00000002"]
    found = train(out, resume=True)
    assert [p["held_out"] for p in found.curve] == [p["held_out"] for p in plain.curve]
    assert_same(found.weights, plain.weights, 0)


# ---- objectives


def test_a_teacher_is_approached(train, programs, converted, tmp_path):
    """KL to the original falls, by the definition spelled out."""
    original = programs["llama-gqa"].module
    archive = tmp_path / "original.pt2"
    torch.export.save(programs["llama-gqa"].program.exported, archive)
    text = models.tokens(44, LENGTH, seed=5)

    def divergence(folder):
        with torch.no_grad():
            expected = models.logits(original, text).double().log_softmax(-1)
            got = mla_compile.load(folder)(text).logits.double().log_softmax(-1)
        return float((expected.exp() * (expected - got)).sum(-1).mean())

    learning = {"text": text, "teacher": archive, "train": "latent", "rate": 0.02}
    found, mixed = train(**learning), train(**learning, **MIXED)
    assert found.report["training"]["objective"] == "kl"
    for trained in (found, mixed):  # untrained models predict much alike: there is little to win
        assert divergence(trained.folder) < 0.96 * divergence(converted)
    other = models.llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    torch.export.save(capture(other, models.example(other)).exported, archive)
    with pytest.raises(UsageError, match="another training, with another teacher"):
        train(found.folder, resume=True, **learning)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "text", "problem"),
    [
        ({}, counting(1), "one window"),
        ({}, counting(44) + 90, "knows only 97"),
        ({"objective": "kl"}, None, "--teacher"),
        ({"batch": 3, "accumulate": 1, "match_steps": 0, "objective": "next-token,kl=2"}, None, "--teacher"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(train, tmp_path, data, changes, text, problem):
    with pytest.raises(UsageError, match=problem):
        train(tmp_path / "model", text=data if text is None else text, **changes)
    assert not (tmp_path / "model").exists()


def test_windows_longer_than_the_model_are_refused(converted, data, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "short")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": LENGTH - 1}))
    with pytest.raises(UsageError, match=r"Windows of 16 tokens .* --seq-len 15"):
        finetune(folder, data, tmp_path / "model", Recipe(**SETTINGS))


def test_a_teacher_with_another_vocabulary_is_refused(train, tmp_path):
    archive = tmp_path / "other.pt2"
    other = models.llama(vocab_size=98)
    torch.export.save(capture(other, models.example(other)).exported, archive)
    with pytest.raises(UsageError, match="predicts 98 tokens"):
        train(tmp_path / "model", teacher=archive)


def test_a_folder_is_not_overwritten(plain, train, converted, data):
    with pytest.raises(UsageError, match="--resume"):
        train(plain.folder)
    with pytest.raises(UsageError, match="another training, with another rate"):
        train(plain.folder, resume=True, rate=0.03)
    with pytest.raises(UsageError, match="another training, with another text"):
        train(plain.folder, resume=True, text=counting(44, seed=1))
    with pytest.raises(UsageError, match="folder of the converted model"):
        finetune(converted, data, converted, Recipe(**SETTINGS), resume=True)


def test_a_version_in_a_name_is_no_suffix(converted, tmp_path):
    _check_out(converted, tmp_path / "llama-3.2-1b-tuned", resume=False, force=False)
    with pytest.raises(UsageError, match="not named like a folder"):
        _check_out(converted, tmp_path / "model.onnx", resume=False, force=False)


def test_another_model_does_not_go_on(plain, data, tmp_path):
    out = tmp_path / "model"
    shutil.copytree(plain.folder / "checkpoints", out / "checkpoints")
    with pytest.raises(UsageError, match="another training, with another model"):
        finetune(plain.folder, data, out, Recipe(**SETTINGS), resume=True)


def test_the_command_names_what_is_wrong(converted, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("one two")
    words = ["finetune", str(converted), "--data", str(text), "--out", str(tmp_path / "out")]
    assert main([*words, "--objective", "kll"]) == 2
    assert "'kll' is not one of next-token, kl, attention" in capsys.readouterr().err
    assert main(words) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "installed", "used"),
    [
        ("auto", [], None),
        ("auto", ["wandb"], None),
        ("auto", ["tensorboard", "wandb"], "tensorboard"),
        ("none", ["tensorboard"], None),
        ("wandb", ["wandb"], "wandb"),
        ("all", [], "all"),
    ],
)
def test_the_curve_goes_to_what_is_installed(monkeypatch, asked, installed, used):
    monkeypatch.setattr(trainer, "get_available_trackers", lambda: installed)
    assert trainer._tracker(Recipe(tracker=asked)) == used


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(trainer, "get_available_trackers", lambda: [])
    with pytest.raises(UsageError, match="'wandb' is not installed"):
        trainer._tracker(Recipe(tracker="wandb"))
    with pytest.raises(UsageError, match=r"no tracker 'wandbb'.*tensorboard"):
        trainer._tracker(Recipe(tracker="wandbb"))


# ---- damaged checkpoints


class Payload:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["state.json", "recipe.yaml", "model.safetensors", "optimizer.bin"])
@pytest.mark.parametrize("damage", ["cut", "other", "pickle"])
def test_a_damaged_checkpoint_is_told_and_runs_no_code(plain, train, tmp_path, name, damage):
    out, run = tmp_path / "model", tmp_path / "was run"
    shutil.copytree(plain.folder / "checkpoints", out / "checkpoints")
    (out / "checkpoints" / "step-notes").mkdir()  # what is none of ours is left alone
    file = out / "checkpoints" / "step-00000008" / name
    content = {"cut": file.read_bytes()[:20], "other": b"[1, 2]", "pickle": pickle.dumps(Payload(run), protocol=2)}
    file.write_bytes(content[damage])
    with pytest.raises(LoadError, match=r"step-00000008' is damaged \(.*Remove it"):
        train(out, resume=True)
    assert not run.exists()
    assert not (out / "model.pt2").exists()
