"""``mla-compile tensorrt``: from a converted folder to a checked file."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch

from mla_compile import tensorrt
from mla_compile.cli import main
from mla_compile.passes.lower_onnx import export_rewritten
from mla_compile.runtime.tensorrt.functions import PARTIAL


@pytest.fixture(scope="module")
def folder(lowered, tmp_path_factory):
    """A converted model, as ``convert`` writes it."""
    model, place = lowered("llama-gqa").model, tmp_path_factory.mktemp("converted")
    torch.export.save(export_rewritten(model.graph, model.rows), place / "model.pt2")
    (place / "mla_config.yaml").write_text("method: mha2mla\n")
    return place


def test_writes_a_checked_file_and_names_the_command(folder, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    assert main(["tensorrt", str(folder), "--out", str(out), "--splits", "5", "--batch", "3", "--room", "90"]) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"largest relative difference (\S+)\)", said)[1]) < 1e-4
    assert f"trtexec --onnx={out} --saveEngine={tmp_path / 'model.plan'} " in said
    assert "--minShapes=input_ids:1x1,lengths:1,position_ids:1x1,past_key_values.0.latent:1x90x32," in said
    assert "--maxShapes=input_ids:3x64,lengths:3,position_ids:3x64,past_key_values.0.latent:3x90x32," in said
    (splits,) = {
        a.i for n in onnx.load(out).graph.node if n.op_type == PARTIAL for a in n.attribute if a.name == "splits"
    }
    assert splits == 5


def test_a_file_that_computes_something_else_is_not_written(folder, tmp_path, capsys, monkeypatch):
    lower = tensorrt.lower_to_tensorrt_onnx

    def spoil(module, rows, path, **settings):
        lower(module, rows, path, **settings)
        model = onnx.load(path)
        node = next(n for n in model.graph.node if n.op_type == PARTIAL)
        next(a for a in node.attribute if a.name == "scale").f *= np.float32(1.1)
        onnx.save(model, path)

    monkeypatch.setattr(tensorrt, "lower_to_tensorrt_onnx", spoil)
    assert main(["tensorrt", str(folder), "--out", str(tmp_path / "model.onnx")]) == 5
    assert "ONNX Runtime" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_other_names_and_folders_are_refused(folder, tmp_path, capsys):
    assert main(["tensorrt", str(folder), "--out", str(tmp_path / "model.plan")]) == 2
    assert "Name it with the suffix .onnx" in capsys.readouterr().err
    assert main(["tensorrt", str(tmp_path), "--out", str(tmp_path / "model.onnx")]) == 2
    assert "holds no converted model" in capsys.readouterr().err
