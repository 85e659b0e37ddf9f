"""Reports in a folder that several results go to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_compile.artifacts.companions import displaced, keep_reports, stored_report
from mla_compile.artifacts.gguf_file import cost_of_biases


def fill(folder: Path, *models: str, **report: object) -> str:
    """Write models and their report, which is returned."""
    folder.mkdir(exist_ok=True)
    for name in models:
        (folder / name).write_text("weights")
    text = json.dumps({"artifacts": dict.fromkeys(models, 7), **report})
    (folder / "report.json").write_text(text)
    return text


@pytest.mark.parametrize(
    "shards", [["model.safetensors"], ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]]
)
def test_a_file_in_the_folder_of_a_checkpoint_leaves_the_report_of_that(shards, tmp_path):
    before = fill(tmp_path, *shards, checkpoint={"without_biases": 0.25})
    fill(tmp_path / ".new", "m.onnx")
    keep_reports(tmp_path / ".new")
    (told,) = displaced(tmp_path, {"m.onnx": 7})
    assert "were those of model.safetensors, and" in told
    (tmp_path / ".new" / "model.safetensors.report.json").rename(tmp_path / "model.safetensors.report.json")
    fill(tmp_path, "m.onnx")
    assert stored_report(tmp_path / "model.safetensors").read_text() == before
    assert cost_of_biases(tmp_path) == "; leaving them out would cost 0.25 nats per token"


def test_a_checkpoint_in_the_place_of_another_has_its_report_alone(tmp_path):
    fill(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (tmp_path / "model.safetensors.report.json").write_text("of an earlier one")
    new = fill(tmp_path / ".new", "model.safetensors")
    assert displaced(tmp_path, {"model.safetensors": 7}) == ()
    keep_reports(tmp_path / ".new")
    assert (tmp_path / ".new" / "model.safetensors.report.json").read_text() == new
