"""Training from a folder to a folder: what is learned, what changes, and what other ways to compute it give."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import resource
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import models
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import mla_compile
from mla_compile import Recipe, finetune
from mla_compile.cli import main
from mla_compile.display import show_training
from mla_compile.errors import LoadError, TrainingError, UsageError
from mla_compile.report import Training, TrainingPoint
from mla_compile.runtime.module import LatentModel
from mla_compile.sources.capture import capture
from mla_compile.training import checkpoints, run, trainer
from mla_compile.training.objectives import Student, Teacher, TeacherAnswers
from mla_compile.training.packing import PackedText
from mla_compile.training.run import _check_out
from training import LENGTH, MATCHING, SETTINGS, assert_same, assert_same_curve, counting

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
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


@pytest.mark.parametrize("changes", [{}, MATCHING], ids=["next-token", "matching, kl and attention"])
def test_pieces_of_a_step_make_the_same_step(request, train, changes):
    one = request.getfixturevalue("matching" if changes else "plain")
    found = train(accumulate=2, teacher=request.getfixturevalue("archive") if changes else None, **changes)
    # Sums in another order; Adam divides by the gradient's own size, which makes more of it where that is small.
    assert_same(found.weights, one.weights, 1e-3)
    assert_same_curve(found.curve, one.curve)


@pytest.mark.parametrize("objective", ["next-token", "kl=0.5,next-token=2", "attention"])
def test_losses_of_a_batch_are_means_of_those_of_its_pieces(compiled, programs, data, objective):
    """And every part is what its name says, spelled out in float64."""
    weights = Recipe(objective=objective).weights
    student = Student(compiled.module, matching="attention" in weights, recompute=False)
    teacher = Teacher.of(programs["llama-gqa"].program, torch.device("cpu"), layers="attention" in weights)
    ids, parts = data[:4], tuple(weights)

    def losses(ids):
        return dict(zip(parts, student(ids, parts, teacher.answer(ids, parts)), strict=True))

    with torch.no_grad():
        whole, pieces = losses(ids), [losses(piece) for piece in ids.split((1, 1, 1, 1))]
        logits = compiled.module(ids).logits.double().log_softmax(-1)
        expected = teacher.score(ids).double().log_softmax(-1)
    for part in parts:
        assert float(whole[part]) == pytest.approx(sum(float(p[part]) for p in pieces) / 4, rel=1e-6)
    if "kl" in parts:
        kl = (expected.exp() * (expected - logits)).sum(-1).mean()
        assert float(whole["kl"]) == pytest.approx(float(kl), rel=1e-4)
    if "next-token" in parts:
        surprise = -logits[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        assert float(whole["next-token"]) == pytest.approx(float(surprise), rel=1e-6)


def test_an_evaluation_runs_every_model_once(compiled, data, monkeypatch):
    calls, forward = [], LatentModel.forward
    monkeypatch.setattr(LatentModel, "forward", lambda self, ids: (calls.append(ids), forward(self, ids))[1])
    recipe = Recipe(**SETTINGS, seq_len=LENGTH)
    run = SimpleNamespace(
        recipe=recipe,
        text=PackedText(data[:-4].int(), data[-4:].int()),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        student=Student(compiled.module, matching=False, recompute=False),
        teacher=None,
        _wanted=lambda ids, parts: TeacherAnswers(),
        _finite=lambda value, *_: value,
    )
    held_out, objective = trainer._Run.measure(run, 0)
    assert held_out == objective
    assert len(calls) == 1


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

    def broken(self, ids, parts, wanted):
        calls.append(torch.is_grad_enabled())
        return forward(self, ids, parts, wanted) * (math.nan if sum(calls) == 4 else 1.0)

    monkeypatch.setattr(trainer.Student, "forward", broken)
    with pytest.raises(TrainingError, match=r"not finite at step 4.*checkpoints"):
        train(tmp_path / "model")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["checkpoints"]
    assert (tmp_path / "model" / "checkpoints" / "step-00000002" / "model.safetensors").is_file()


@pytest.mark.parametrize("broken", ["converted model", "teacher"])
def test_a_loss_that_never_was_finite_is_not_the_trainings(train, monkeypatch, tmp_path, archive, broken):
    forward = trainer.Student.forward

    def lost(self, ids, parts, wanted):
        factors = [math.nan if (part == "kl") == (broken == "teacher") else 1.0 for part in parts]
        return forward(self, ids, parts, wanted) * torch.tensor(factors)

    monkeypatch.setattr(trainer.Student, "forward", lost)
    with pytest.raises(TrainingError, match=f"Before any training .*{broken} gives no finite loss") as caught:
        train(tmp_path / "model", teacher=archive)
    assert not any(words in str(caught.value) for words in ("checkpoint", "--rate", "nothing is left"))
    assert not (tmp_path / "model").exists()


def test_a_full_disk_at_the_first_checkpoint_leaves_nothing(train, tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer.Accelerator, "save_state", full)
    with pytest.raises(TrainingError, match=r"step 0 could not .*nothing is left.*Free some space, and begin again"):
        train(tmp_path / "model")
    assert not (tmp_path / "model").exists()


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


def test_a_teacher_is_approached(train, programs, converted, archive, tmp_path):
    """KL to the original falls, by the definition spelled out."""
    original = programs["llama-gqa"].module
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
    torch.export.save(capture(other, models.example(other)).exported, tmp_path / "other.pt2")
    with pytest.raises(UsageError, match="another training, with another teacher"):
        train(found.folder, resume=True, **{**learning, "teacher": tmp_path / "other.pt2"})


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "text", "problem"),
    [
        ({}, counting(1), "one window"),
        ({}, counting(44) + 90, "knows only 97"),
        ({"objective": "kl"}, None, "--teacher"),
        ({"batch": 3, "accumulate": 1, "match_steps": 0, "objective": "next-token,kl=2"}, None, "--teacher"),
        ({"objective": "next-token", "teacher": "any"}, None, "asks no teacher"),
        ({"seq_len": 2 * LENGTH}, None, "windows have 16 tokens, and a seq_len of 32"),
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
    with pytest.raises(UsageError, match=r"a training that is finished\. Train it further into a new folder"):
        train(plain.folder)
    with pytest.raises(UsageError, match="another training, with another rate, and it is finished"):
        train(plain.folder, resume=True, rate=0.03)
    with pytest.raises(UsageError, match="another training, with another text"):
        train(plain.folder, resume=True, text=counting(44, seed=1))
    with pytest.raises(UsageError, match="folder of the converted model"):
        finetune(converted, data, converted, Recipe(**SETTINGS), resume=True)


def test_other_settings_are_refused_before_anything_is_loaded(plain, converted, data, tmp_path, monkeypatch):
    out = tmp_path / "model"
    shutil.copytree(plain.folder / "checkpoints", out / "checkpoints")
    monkeypatch.setattr(run, "open_saved", Mock(side_effect=AssertionError("loaded")))
    with pytest.raises(UsageError, match=r"with another tokens\. Resume with the same settings"):
        finetune(converted, data, out, Recipe(**{**SETTINGS, "tokens": 10**6}), resume=True)
    with pytest.raises(AssertionError, match="loaded"):
        finetune(converted, data, out, Recipe(**SETTINGS), resume=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"objective": "kl"}, "The objective 'kl' learns from another model, and none was given."),
        ({"match_steps": 2}, "The objective 'next-token' with 2 steps of matching learns from another model, and none"),
    ],
)
def test_a_missing_teacher_is_told_before_anything_is_read(tmp_path, settings, told):
    with pytest.raises(UsageError) as caught:
        finetune(tmp_path / "nowhere", tmp_path / "nothing.txt", tmp_path / "out", Recipe(**settings))
    assert caught.value.message.startswith(told)


def test_tokens_that_whole_steps_exceed_are_told(train, caplog, data):
    taken = SETTINGS["batch"] * data.shape[1]
    found = train(tokens=3, every=1)
    assert found.report["training"]["tokens"] == taken
    assert f"Training takes {taken} tokens, not 3: whole steps of {SETTINGS['batch']} windows" in caplog.text
    caplog.clear()
    train(tokens=taken, every=1)
    assert "Training takes" not in caplog.text


@pytest.mark.parametrize("there", [None, "checkpoints", "checkpoints/.step-00000000"])
def test_nothing_to_go_on_from_is_told(train, tmp_path, there):
    if there:
        (tmp_path / "model" / there).mkdir(parents=True)
    before = {*tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="no checkpoints to go on from"):
        train(tmp_path / "model", resume=True)
    assert {*tmp_path.rglob("*")} == before


def test_beginning_anew_removes_a_trainings_files_only(plain, train, converted, data, tmp_path, monkeypatch):
    out = shutil.copytree(plain.folder, tmp_path / "model")
    precious = out / "checkpoints" / "mine" / "precious.bin"
    precious.parent.mkdir()
    precious.touch()
    (out / "checkpoints" / ".step-00000004").mkdir()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Accelerator, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(converted, data, out, Recipe(**SETTINGS), force=True)
    assert precious.is_file()
    assert not {"step-00000006", "step-00000008", ".step-00000004"} & {p.name for p in (out / "checkpoints").iterdir()}
    assert not {"model.pt2", "report.json", "recipe.yaml"} & {p.name for p in out.iterdir()}
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path, **_: Path(path / "gone").rmdir())
    with pytest.raises(UsageError, match="could not be removed"):
        finetune(converted, data, out, Recipe(**SETTINGS), force=True)


def test_steps_of_before_say_nothing_of_the_time_left(plain, converted, data, tmp_path):
    out = tmp_path / "model"
    shutil.copytree(plain.folder / "checkpoints", out / "checkpoints")
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    display = Mock()
    finetune(converted, data, out, Recipe(**SETTINGS), resume=True, display=display)
    assert call("train", 2) in display.started.mock_calls
    assert display.advanced.call_count == 2


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_nothing_is_sharded(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "Accelerator", lambda **_: Mock(distributed_type=DistributedType.NO))
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(UsageError, match=rf"on accelerators only, and there is none\. Train without {kind}"):
        trainer.start_engine(Recipe(), tmp_path)


def test_deepspeed_that_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "Accelerator", Mock(side_effect=ImportError("DeepSpeed is not available")))
    with pytest.raises(UsageError, match=r"Run: pip install 'mla-compile\[deepspeed\]'"):
        trainer.start_engine(Recipe(), tmp_path)


def test_what_a_step_is_is_told_to_deepspeed():
    plugin = Mock(zero_stage=2, deepspeed_config={"gradient_clipping": "auto"})
    trainer._set_up_deepspeed(plugin, Recipe(clip=0.5, batch=8, accumulate=4))
    assert plugin.deepspeed_config == {"gradient_clipping": 0.5, "gradient_accumulation_steps": 4}
    trainer._set_up_deepspeed(plugin, Recipe(mixed_precision="bf16"))
    assert plugin.deepspeed_config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    plugin.zero_stage = 3
    with pytest.raises(UsageError, match="Choose stage 2 or less"):
        trainer._set_up_deepspeed(plugin, Recipe())


def test_a_teacher_with_another_tokenizer_is_refused_whatever_tokenizer_was_given(converted, tmp_path):
    teacher, text = tmp_path / "teacher", tmp_path / "text.txt"
    models.llama(vocab_size=1024, num_hidden_layers=1).save_pretrained(teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, teacher / name)
    shutil.copytree(teacher, tmp_path / "other")
    words = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["Once"], vocabulary["the"] = vocabulary.get("the", 0), vocabulary.get("Once", 1)
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    text.write_text("Once upon a time. " * 50)
    with pytest.raises(UsageError, match=r"has another vocabulary than '.*other'"):
        finetune(
            converted, str(text), tmp_path / "out", Recipe(**SETTINGS), teacher=teacher,
            tokenizer=str(tmp_path / "other"),
        )  # fmt: skip


# ---- what is shown


@pytest.mark.parametrize("best", [0, 2])
@pytest.mark.parametrize(
    ("objective", "column"),
    [
        ("next-token", None),
        ("kl", "held-out kl (nats per token)"),
        ("attention", "held-out attention (squared error, relative)"),
        ("kl=1,attention=2", "held-out kl=1,attention=2 (weighted sum)"),
    ],
)
def test_the_figure_that_chooses_is_shown_with_its_unit(capsys, objective, column, best):
    points = (TrainingPoint(0, 0, None, 2.5, 0.25), TrainingPoint(2, 64, 0.75, 2.125, 0.125))
    training = Training(objective, "all", 2, 64, best, 2.5, 2.125, 60, points)
    report = {"source": "x", "artifacts": {}, "training": asdict(training)}
    show_training(report, Path("out"))
    shown = capsys.readouterr()
    lines = [line.split("\t") for line in shown.out.splitlines()]
    wanted = [[], [column]][column is not None]
    assert ["step", "tokens", "training loss", *wanted, "held-out loss (nats per token)"] in lines
    assert ["2", "64", "0.7500", *(["0.1250"] if column else []), "2.1250"] in lines
    assert ("weights of step 0 are kept" in shown.err) == (best == 0)
    assert len(training.warnings) == (best == 0)


def test_a_training_without_gain_is_told_in_its_report(train, tmp_path):
    found = train(rate=100.0, tokens=4 * LENGTH, warm_up=0.0, decay=0.0)
    assert found.report["training"]["best_step"] == 0
    assert [w for w in found.report["warnings"] if "weights of step 0 are kept" in w]


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
