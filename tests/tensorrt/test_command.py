"""``mla-compile tensorrt``: from a converted folder to a checked file."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import sys

import numpy as np
import onnx
import pytest
import stand_in_engine
import torch

from mla_compile.artifacts import tensorrt as tensorrt_command
from mla_compile.cli import main
from mla_compile.runtime.tensorrt import engine
from mla_compile.runtime.tensorrt.engine import facts_path
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings
from mla_compile.runtime.tensorrt.functions import PARTIAL


def test_writes_a_checked_file_and_names_the_commands(folder, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    sizes = ["--splits", "5", "--max-batch", "3", "--max-length", "90", "--max-prompt", "64"]
    assert main(["tensorrt", str(folder), "--out", str(out), *sizes]) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"largest relative difference (\S+)\)", said)[1]) < 1e-4
    assert f"trtexec --onnx={out} --saveEngine={tmp_path / 'model.trtexec.plan'} --skipInference " in said
    assert "--minShapes=input_ids:1x1,lengths:1,position_ids:1x1,past_key_values.0.latent:1x1x90x32," in said
    assert "--maxShapes=input_ids:3x64,lengths:3,position_ids:3x64,past_key_values.0.latent:3x1x90x32," in said
    assert "--optShapes=input_ids:3x1,lengths:3,position_ids:3x1,past_key_values.0.latent:3x1x90x32," in said
    assert f"polygraphy inspect capability {out}" in said
    (splits,) = {
        a.i for n in onnx.load(out).graph.node if n.op_type == PARTIAL for a in n.attribute if a.name == "splits"
    }
    assert splits == 5


@pytest.fixture
def lowered_before(lowered, monkeypatch):
    """Lowering, which takes seconds, gives the file that the session has."""
    path = lowered("llama-gqa").path
    monkeypatch.setattr(
        tensorrt_command, "lower_to_tensorrt_onnx", lambda module, rows, target, **_: shutil.copyfile(path, target)
    )


@pytest.fixture
def tensorrt(monkeypatch, lowered_before):
    """ONNX Runtime in TensorRT's place, and a GPU as far as anyone asks."""
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in_engine.module())
    monkeypatch.setattr(tensorrt_command, "require_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(tensorrt_command, "architecture", lambda: 90)
    monkeypatch.setattr(tensorrt_command, "use_plugins", lambda: "Triton is not installed")
    monkeypatch.setattr(engine, "TensorRTDecoder", functools.partial(engine.TensorRTDecoder, device="cpu"))
    monkeypatch.setattr(tensorrt_command, "TensorRTDecoder", engine.TensorRTDecoder)
    asked = []

    def build(trt, path, settings, *, plugins, advance):
        asked.append((settings, plugins))
        return path.read_bytes(), 0

    monkeypatch.setattr(tensorrt_command, "build_engine", build)
    return asked


def test_writes_an_engine_with_its_file_and_its_facts(folder, tmp_path, capsys, tensorrt):
    out, times = tmp_path / "model.plan", tmp_path / "times"
    words = ["--max-batch", "3", "--max-prompt", "6", "--max-length", "32", "--timing-cache", str(times)]
    assert main(["tensorrt", str(folder), "--out", str(out), *words]) == 0
    said = capsys.readouterr().out
    assert "attention: standard operators (Triton is not installed)" in said
    assert tensorrt == [(EngineSettings(batch=3, prompt=6, room=32, timing_cache=times), False)]
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.plan",
        "model.plan.json",
        "model.onnx",
        "generation_config.json",
    }
    facts = json.loads((tmp_path / "model.plan.json").read_text())
    assert facts["tensorrt"] == stand_in_engine.VERSION
    assert facts["device"] == "NVIDIA H200"
    assert facts["eos_token_id"] == 7
    assert facts["onnx_sha256"] == hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()

    # Of the file alone, as on another machine; a name that exists stays.
    assert main(["tensorrt", str(tmp_path / "model.onnx"), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    other = tmp_path / "other.plan"
    assert main(["tensorrt", str(tmp_path / "model.onnx"), "--out", str(other), "--no-plugins"]) == 0
    assert "standard operators (as asked)" in capsys.readouterr().out
    assert json.loads(facts_path(other).read_text())["onnx"] == "model.onnx"


def test_an_engine_that_computes_something_else_is_not_written(
    folder, lowered, tmp_path, capsys, monkeypatch, tensorrt
):
    spoiled = onnx.load(lowered("llama-gqa").path)
    node = next(n for n in spoiled.graph.node if n.op_type == PARTIAL)
    next(a for a in node.attribute if a.name == "scale").f *= np.float32(3)
    monkeypatch.setattr(tensorrt_command, "build_engine", lambda *_, **__: (spoiled.SerializeToString(), 0))
    assert main(["tensorrt", str(folder), "--out", str(tmp_path / "model.plan")]) == 5
    assert "The engine differs from its file in ONNX Runtime" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_without_tensorrt_nothing_is_begun(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(tensorrt_command, "read_folder", None)
    for words in (["tensorrt", str(folder)], ["no-model", "--method", "mha2mla"]):
        assert main([*words, "--out", str(tmp_path / "model.plan")]) == 2
        assert "pip install 'mla-compile[tensorrt]'" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--out", "x.onnx", "--max-batch", "2", "--no-plugins"],
            "--max-batch, --no-plugins: only an engine of TensorRT",
        ),
        (["--out", "x.onnx", "--target", "tpu"], "--target tpu is not one of auto, cuda, tensorrt"),
        (["--out", "x.plan", "--format", "deepseek"], "The format deepseek is not for TensorRT"),
        (["--out", "x.onnx", "--target", "tensorrt", "--encoders"], "Only a causal language model"),
        (["--out", "x", "--target", "tensorrt"], "Name it with .onnx or .plan"),
    ],
)
def test_options_that_do_not_go_together(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "no-model", "--method", "mha2mla", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--refit", "--no-plugins"], "--refit, --no-plugins: only an engine is built so, and 'x.onnx' is none."),
        (["--version-compatible"], "--version-compatible: only an engine is built so"),
        (["--weight-streaming"], "--weight-streaming: only an engine is built so"),
        (["--timing-cache", "times"], "--timing-cache: only an engine is built so"),
    ],
)
def test_a_file_has_no_settings_of_an_engine(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for start in (["tensorrt", "folder"], ["convert", "no-model", "--method", "mha2mla", "--target", "tensorrt"]):
        assert main([*start, "--out", "x.onnx", *words]) == 2
        assert sentence in capsys.readouterr().err


def test_settings_that_something_else_decides_are_refused(capsys, tmp_path, tensorrt):
    words = ["tensorrt", str(tmp_path / "model.onnx"), "--out", str(tmp_path / "model.plan")]
    assert main([*words, "--max-length", "64", "--splits", "4"]) == 2
    assert "--max-length, --splits: the file that the engine is built of has that already" in capsys.readouterr().err
    words = ["tensorrt", str(tmp_path), "--out", str(tmp_path / "model.onnx"), "--plugin", "cpp", "--splits", "4"]
    assert main(words) == 2
    assert "Plugins of --plugin cpp choose splits themselves" in capsys.readouterr().err


def test_where_times_cannot_be_kept_is_said_before_anything_is_built(capsys, tmp_path, tensorrt, monkeypatch):
    monkeypatch.setattr(tensorrt_command, "read_folder", None)
    (tmp_path / "file").touch()
    places = {
        tmp_path: "is a folder. Name a file with --timing-cache",
        tmp_path / "file" / "times": "cannot be created. Choose another folder",
    }
    for times, sentence in places.items():
        for start in (["tensorrt", str(tmp_path)], ["convert", "no-model", "--method", "mha2mla"]):
            assert main([*start, "--out", str(tmp_path / "x.plan"), "--timing-cache", str(times)]) == 2
            assert sentence in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_not_written(folder, tmp_path, capsys, monkeypatch, lowered_before):
    lower = tensorrt_command.lower_to_tensorrt_onnx

    def spoil(module, rows, path, **settings):
        lower(module, rows, path, **settings)
        model = onnx.load(path)
        node = next(n for n in model.graph.node if n.op_type == PARTIAL)
        next(a for a in node.attribute if a.name == "scale").f *= np.float32(1.1)
        onnx.save(model, path)

    monkeypatch.setattr(tensorrt_command, "lower_to_tensorrt_onnx", spoil)
    assert main(["tensorrt", str(folder), "--out", str(tmp_path / "model.onnx")]) == 5
    assert "ONNX Runtime" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_other_names_and_folders_are_refused(folder, tmp_path, capsys):
    assert main(["tensorrt", str(folder), "--out", str(tmp_path / "model.engine")]) == 2
    assert "Name it with .onnx or .plan" in capsys.readouterr().err
    assert main(["tensorrt", str(tmp_path / "some.onnx"), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "Name an engine, with the suffix .plan" in capsys.readouterr().err
    assert main(["tensorrt", str(tmp_path), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "holds no converted model" in capsys.readouterr().err
