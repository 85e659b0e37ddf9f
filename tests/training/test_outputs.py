"""Where a fine-tuned model goes: ONNX, DeepSeek checkpoints, and in one go with its conversion."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import models
import pytest
import torch

import mla_compile
from mla_compile import Recipe, finetune
from mla_compile.artifacts import saved_checkpoint
from mla_compile.artifacts.places import check_neighbours
from mla_compile.artifacts.saved import open_saved, save, write_saved_onnx, write_trained
from mla_compile.cli import main
from mla_compile.config import make_config
from mla_compile.disk.layer_store import LayerStore
from mla_compile.errors import TrainingError, UsageError
from mla_compile.progress import Stages
from mla_compile.report import Training, TrainingPoint
from mla_compile.reporting.reproduction import reproducing
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.tensorrt.reference import OnnxFixedDecoder
from mla_compile.training import trainer
from training import LENGTH, SETTINGS, assert_same, counting

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
ROUNDING = 1e-5  # of the largest logit; float32 in another order of operations


def logits(folder, ids):
    with torch.no_grad():
        return mla_compile.load(folder)(ids).logits


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_trained_folder_becomes_onnx(plain, cache, tmp_path):
    file, ids = tmp_path / "onnx" / "model.onnx", models.tokens(2, LENGTH)
    assert main(["export", str(plain.folder), "--out", str(file), "--cache", cache]) == 0
    decoder, expected = OnnxDecoder(file), logits(plain.folder, ids)
    error = (torch.from_numpy(decoder.logits(ids.numpy())) - expected).abs().max() / expected.abs().max()
    assert float(error) < ROUNDING
    report = json.loads((file.parent / "report.json").read_text())
    assert report["training"] == json.loads((plain.folder / "report.json").read_text())["training"]
    assert decoder.cache_bytes_per_token == report["cache"]["bytes_per_token_after"]
    assert [layer["kv_rank"] for layer in decoder.metadata["layers"]] == [8, 8]


def test_a_trained_folder_becomes_a_file_for_tensorrt(plain, tmp_path):
    file, ids = tmp_path / "tensorrt" / "model.onnx", models.tokens(2, LENGTH)
    assert main(["tensorrt", str(plain.folder), "--out", str(file), "--max-length", "32"]) == 0
    decoder, expected = OnnxFixedDecoder(file), logits(plain.folder, ids)
    error = (torch.from_numpy(decoder.logits(ids.numpy())) - expected).abs().max() / expected.abs().max()
    assert float(error) < ROUNDING


def test_a_folder_becomes_a_file_with_an_int8_cache(plain, tmp_path, capsys):
    file = tmp_path / "onnx" / "model.onnx"
    assert main(["export", str(plain.folder), "--out", str(file), "--cache-type", "int8"]) == 0
    report, decoder = json.loads((file.parent / "report.json").read_text()), OnnxDecoder(file)
    cost, error = (report["verification"][f"{name}_error"] for name in ("quantisation", "lowering"))
    assert f"rounded to int8, which changes its logits by {cost:.1e} (" in capsys.readouterr().out
    assert error <= cost / 2 < 0.1
    assert decoder.cache_bytes_per_token == report["cache"]["bytes_per_token_after"] == sum(decoder.rows) + 2 * 8
    assert report["cache"]["ratio"] == decoder.cache_bytes_per_token / report["cache"]["bytes_per_token_before"]
    assert decoder.metadata["config"]["cache_type"] == report["config"]["cache_type"] == "int8"


@pytest.fixture(scope="module")
def for_stock_code(data, tmp_path_factory) -> Path:
    """A folder in the layout of DeepSeek checkpoints, trained."""
    place = tmp_path_factory.mktemp("stock")
    settings = {"layout": "deepseek", "method": "transmla", "kv_rank": 16, "rope_dims": 8}
    mla_compile.compile(models.llama(), calibration=data, check=False, **settings).save(place / "converted")
    finetune(place / "converted", data, place / "trained", Recipe(**SETTINGS))
    return place / "trained"


@pytest.mark.parametrize("preset", ["none", "flashmla"])
def test_a_trained_folder_becomes_a_checkpoint_for_stock_code(for_stock_code, preset, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out, ids = tmp_path / "checkpoint", models.tokens(2, LENGTH)
    words = ["export", str(for_stock_code), "--out", str(out), "--format", "deepseek", "--preset", preset]
    assert main(words) == 0
    assert "in stock transformers it equals the PyTorch module" in capsys.readouterr().out
    model, expected = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), logits(for_stock_code, ids)
    with torch.no_grad():
        error = (model(ids).logits - expected).abs().max() / expected.abs().max()
    assert float(error) < ROUNDING
    assert (model.config.kv_lora_rank, model.config.qk_rope_head_dim) == (
        (512, 64) if preset == "flashmla" else (16, 8)
    )
    assert main(["verify", str(out), "--quiet"]) == 0
    report, trained = (json.loads((folder / "report.json").read_text()) for folder in (out, for_stock_code))
    assert report["training"] == trained["training"]
    assert report["checkpoint"]["error"] < ROUNDING
    assert report["layers"] == trained["layers"]
    tokens = trained["training"]["tokens"]
    assert f"| loss on held-out text, fine-tuned on {tokens} tokens |" in (out / "README.md").read_text()
    convert, train, export = reproducing(report)[-3:]
    assert "layout='deepseek'" in convert or "layout" in "".join(reproducing(report))
    assert "format=" not in convert
    asked = f"--format deepseek{' --preset flashmla' if preset == 'flashmla' else ''}"
    assert (train.split(" --")[0], export) == (
        "mla-compile finetune converted",
        f"mla-compile export finetuned --out checkpoint {asked}",
    )


def test_a_trained_folder_becomes_a_checkpoint_in_shards(for_stock_code, tmp_path):
    words = ["export", str(for_stock_code), "--out", str(tmp_path / "out"), "--format", "deepseek"]
    assert main([*words, "--shard-size", "0.001"]) == 0
    assert main([*words, "--force"]) == 0
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_file_beside_the_model_that_it_is_of_leaves_the_model_its_report(for_stock_code, tmp_path):
    """What is told of the file is not told of what the model becomes afterwards, nor of the model saved again."""
    folder, out = tmp_path / "folder", tmp_path / "checkpoint"
    shutil.copytree(for_stock_code, folder)
    before = {name: (folder / name).read_bytes() for name in ("report.json", "report.html")}
    assert main(["export", str(folder), "--out", str(folder / "model.onnx"), "--cache", "static", "-q"]) == 0
    assert {name: (folder / f"model.pt2.{name}").read_bytes() for name in before} == before
    assert main(["export", str(folder), "--out", str(out), "--format", "deepseek", "-q"]) == 0
    report, trained = json.loads((out / "report.json").read_text()), json.loads(before["report.json"])
    assert report["config"] == {**trained["config"], "format": "deepseek"}
    assert report["warnings"][: len(trained["warnings"])] == trained["warnings"]
    assert not any("were those of" in warning for warning in report["warnings"])
    for again in (tmp_path / "again", folder):
        save(mla_compile.load(folder), again, like=folder, force=True)
        assert {name: (again / name).read_bytes() for name in before} == before
    assert {name: (folder / f"model.pt2.{name}").read_bytes() for name in before} == before


def test_a_folder_becomes_a_file_for_llama_cpp(tmp_path, capsys):
    pytest.importorskip("gguf", reason="llama.cpp's package gguf is not installed")
    text, folder, file = tmp_path / "text.txt", tmp_path / "converted", tmp_path / "out" / "model.gguf"
    text.write_text("Once upon a time there was a small cat that ran to a big red ball. " * 100)
    words = ["convert", str(TINY), "--out", str(folder), "--layout", "deepseek", "--calibration", str(text), "-q"]
    assert main([*words, "--method", "transmla", "--no-verify", "--cache-ratio", "0.5"]) == 0
    assert main(["export", str(folder), "--out", str(file)]) == 0
    report = json.loads((file.parent / "report.json").read_text())
    assert report["checkpoint"]["error"] < ROUNDING
    assert (report["config"]["format"], report["artifacts"]) == ("gguf", {"model.gguf": file.stat().st_size})
    assert [p.name for p in file.parent.iterdir() if p.name.startswith(".")] == []
    assert "model.gguf" in capsys.readouterr().out


def test_what_is_told_of_a_checkpoint_is_not_told_of_the_file_made_of_it(for_stock_code, tmp_path, monkeypatch):
    """A rotation that is scaled is for transformers only in a checkpoint, and carried in a file for llama.cpp."""
    pytest.importorskip("gguf", reason="llama.cpp's package gguf is not installed")
    saved, file = open_saved(for_stock_code), tmp_path / "out" / "model.gguf"

    def checkpoint(saved, _, **__):
        return {
            **saved.report,
            "checkpoint": {"error": 0.0, "caveats": ["rotations are scaled"]},
            "warnings": ["of it"],
        }

    monkeypatch.setattr(saved_checkpoint, "write_saved_checkpoint", checkpoint)
    monkeypatch.setattr(saved_checkpoint, "write_and_check", lambda _source, file, *_: file.write_bytes(b"GGUF") * 0.0)
    report = saved_checkpoint.write_saved_gguf(saved, file, stages=Stages())
    assert report["warnings"] == saved.report["warnings"]
    assert report["checkpoint"] == {"error": 0.0, "caveats": [], "llama_cpp_error": 0.0}


def test_a_folder_becomes_nothing_that_it_does_not_fit(plain, for_stock_code, tmp_path, capsys):
    def refusal(folder, out, *options):
        assert main(["export", str(folder), "--out", str(tmp_path / out), *options]) == 2
        assert not (tmp_path / out).exists()
        return capsys.readouterr().err

    stock = ("--format", "deepseek")
    assert "converted with the layout free" in refusal(plain.folder, "a", *stock)
    assert "--format deepseek" in refusal(plain.folder, "a")
    assert "names a file" in refusal(for_stock_code, "a.onnx", *stock)
    assert "--cache" in refusal(for_stock_code, "a", *stock, "--cache", "static")
    assert "--shard-size" in refusal(for_stock_code, "a.onnx", "--shard-size", "1")
    assert "preset" in refusal(for_stock_code, "a.onnx", "--preset", "flashmla")
    assert "not one of auto" in refusal(for_stock_code, "a", "--format", "hf")
    assert main(["export", str(for_stock_code), "--out", str(for_stock_code), *stock, "--force"]) == 2
    assert "is the folder of the converted model" in capsys.readouterr().err


def test_a_checkpoint_is_not_made_of_a_damaged_report(for_stock_code, tmp_path, capsys):
    folder = shutil.copytree(for_stock_code, tmp_path / "damaged")
    report = json.loads((folder / "report.json").read_text())
    del report["layers"][0]["scale"]
    (folder / "report.json").write_text(json.dumps(report))
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), "--format", "deepseek"]) == 2
    assert "is damaged (KeyError: 'scale')" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "report.json", "report.html"])
def test_what_belongs_to_another_model_is_not_replaced(plain, tmp_path, name):
    folder = shutil.copytree(plain.folder, tmp_path / "saved")
    (folder / "config.json").write_text('{"model_type": "ours"}')
    other = tmp_path / "other" / name
    other.parent.mkdir()
    other.write_text('"precious"')
    with pytest.raises(UsageError, match="belongs to something else"):
        write_saved_onnx(open_saved(folder), other.parent / "model.onnx", make_config(), force=False)
    assert [other.read_text()] == ['"precious"'] * len(list(other.parent.iterdir()))


def test_what_genai_is_told_is_not_replaced(converted, tmp_path):
    told = tmp_path / "genai_config.json"
    told.write_text("precious")
    file, saved = tmp_path / "b.onnx", open_saved(converted)
    with pytest.raises(UsageError, match=r"genai_config.json' exists already and belongs to something else"):
        write_saved_onnx(saved, file, make_config(cache_layout="genai"), force=False)
    assert [f.read_text() for f in tmp_path.iterdir()] == ["precious"]
    check_neighbours(file, "", saved.assets, force=False)  # other layouts tell it nothing
    write_saved_onnx(saved, file, make_config(cache_layout="genai"), force=True)
    assert json.loads(told.read_text())["model"]["decoder"]["filename"] == "b.onnx"


def test_a_model_is_not_saved_into_the_folder_of_its_original(converted, tmp_path):
    folder, original = shutil.copytree(converted, tmp_path / "saved"), tmp_path / "original"
    original.mkdir()
    (original / "config.json").write_text("precious")
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "source": str(original)}))
    with pytest.raises(UsageError, match="is the folder of the original model"):
        save(mla_compile.load(folder), original, like=folder, force=True)
    assert [f.read_text() for f in original.iterdir()] == ["precious"]


def test_what_was_measured_of_other_weights_is_told_apart(converted, tmp_path):
    """Trained twice: what is kept apart is that of the conversion."""
    saved = open_saved(converted)
    quality = {"original": 20.0, "converted": 5000.0, "ratio": 250.0, "tokens": 64, "held_out": True}
    measured = {"loss": 1.5, "output": 0.5}
    report = {
        **saved.report,
        "quality": quality,
        "verification": {"rewrite_error": 1e-7},
        "layers": [{**layer, "measured": measured} for layer in saved.report["layers"]],
        "warnings": ["perplexity grows 250.0 times"],
    }
    saved = dataclasses.replace(saved, report=report)
    curve = tuple(TrainingPoint(step, 100 * step, None, loss, loss) for step, loss in enumerate((8.5, 4.25)))
    training = Training("kl", "latent", 1, 100, 1, 8.5, 4.25, 64, curve)
    for name in ("once", "twice"):
        folder = tmp_path / name
        found = write_trained(saved, saved.module, training, {}, folder)
        assert (found["quality"], found["verification"]) == (None, None)
        assert not any(layer["measured"] for layer in found["layers"])
        assert found["warnings"] == ["before fine-tuning: perplexity grows 250.0 times"]
        assert found["before_training"]["quality"] == quality
        assert found["before_training"]["layers"] == [measured] * len(report["layers"])
        page = (folder / "report.html").read_text()
        head = page[page.index('id="summary"') : page.index("</header>")]
        assert "8.5000 → 4.2500" in head
        assert "× 250" not in head
        assert "perplexity before fine-tuning" in page
        assert "--calibration TEXT" in page
        saved = open_saved(folder)
    file = tmp_path / "onnx" / "model.onnx"
    checked = write_saved_onnx(saved, file, make_config(), force=False)["verification"]
    assert "lowering_error" in checked
    assert "rewrite_error" not in checked


def test_training_is_drawn_without_text_of_the_conversion(plain):
    page = (plain.folder / "report.html").read_text()
    assert "Loss of the next token while training" in page
    assert "<dt>fine-tuning</dt>" in page


GO = {"method": "mha2mla", "kv_rank": 8, "rope_dims": 4, "check": False, "finetune_tokens": 3 * 16 * LENGTH}


def test_a_killed_training_in_one_go_goes_on_and_then_removes_its_checkpoints(programs, monkeypatch, tmp_path):
    original, text, store = programs["llama-gqa"].program.exported, counting(44), LayerStore(tmp_path / "store")
    alone = mla_compile.compile(original, finetune=text, **GO)
    save, saved = trainer.Checkpoints.save, []

    def killed_at(step):
        def killed(self, accelerator, state):
            save(self, accelerator, state)
            saved.append(state.step)
            if state.step == step:
                raise KeyboardInterrupt

        return killed

    monkeypatch.setattr(trainer.Checkpoints, "save", killed_at(3))
    with pytest.raises(KeyboardInterrupt):
        mla_compile.compile(original, finetune=text, store=store, **GO)
    assert (store.folder / "checkpoints" / "step-00000003").is_dir()
    monkeypatch.setattr(trainer.Checkpoints, "save", killed_at(None))
    found = mla_compile.compile(original, finetune=text, store=store, **GO)
    assert saved == [0, 3]
    assert found.report.training == alone.report.training
    assert_same(found.module.state_dict(), alone.module.state_dict(), 0)
    assert not (store.folder / "checkpoints").exists()


def test_checkpoints_of_another_training_in_one_go_are_not_taken(programs, monkeypatch, tmp_path):
    original, text, store = programs["llama-gqa"].program.exported, counting(44), LayerStore(tmp_path / "store")
    (store.folder / "checkpoints" / "step-00000003").mkdir(parents=True)  # damaged
    found = mla_compile.compile(original, finetune=text, store=store, **GO)
    assert found.report.training.steps == 3
    assert not (store.folder / "checkpoints").exists()
    lost = torch.full((1,), math.nan, requires_grad=True)
    monkeypatch.setattr(trainer.Student, "forward", lambda *_: lost)
    monkeypatch.setattr(trainer._Run, "measure", lambda *_: (1.0, 1.0))
    with pytest.raises(TrainingError, match=r"step 1; .*nothing is left of it\. Begin anew by mla-comp") as caught:
        mla_compile.compile(original, finetune=text, store=store, **GO)
    assert "checkpoints" not in str(caught.value)


def test_the_command_line_converts_trains_and_writes_onnx(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out" / "model.onnx"
    text.write_text("Once upon a time there was a small cat that ran to a big red ball. " * 100)
    words = ["convert", str(TINY), "--out", str(out), "--method", "mha2mla", "--cache-ratio", "0.5", "-q"]
    assert main([*words, "--finetune", str(text), "--finetune-tokens", "512", "--no-verify"]) == 0
    training = json.loads((out.parent / "report.json").read_text())["training"]
    assert (training["objective"], training["steps"]) == ("kl", 1)
    assert training["curve"][1]["objective"] < training["curve"][0]["objective"]
    assert "tokens of training" in capsys.readouterr().out
    assert OnnxDecoder(out).logits(torch.tensor([[1, 2, 3]]).numpy()).shape == (1, 3, 1024)
    assert {p.name for p in tmp_path.iterdir()} == {"text.txt", "out"}
    assert not [*out.parent.glob(".*")]


def test_conversion_and_training_in_one_go(tmp_path):
    """The result is a DeepSeek checkpoint that stock transformers agrees with; the original keeps its weights."""
    original, text = models.llama(), counting(44)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    settings = {"format": "deepseek", "layout": "deepseek", "method": "transmla", "kv_rank": 16, "rope_dims": 8}
    compiled = mla_compile.compile(
        original, calibration=text, finetune=text, finetune_tokens=640, check=False, **settings
    )
    training = compiled.report.training
    assert (training.objective, training.steps) == ("kl", 3)  # of 16 windows, which 640 tokens begin the third of
    assert training.curve[-1].objective < training.curve[0].objective
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    report = compiled.to_deepseek(tmp_path / "checkpoint")
    assert report.checkpoint.error < ROUNDING
    written = json.loads((tmp_path / "checkpoint" / "report.json").read_text())
    assert written["training"]["best_step"] == training.best_step
