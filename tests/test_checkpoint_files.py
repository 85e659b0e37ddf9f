"""Checkpoints that are not whole, or not of their configuration: one sentence that names the file or tensor."""

from __future__ import annotations

import json
import shutil

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from mla_compile.cli import main
from mla_compile.errors import LoadError
from mla_compile.sources.checkpoint_files import has_weights, require_finite

NAME = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of several files."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    models.llama().save_pretrained(folder, max_shard_size="60KB")
    assert len([*folder.glob("*.safetensors")]) > 2
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def file_of(checkpoint, name: str):
    return checkpoint / json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"][name]


def change(checkpoint, name: str, value) -> None:
    """Write another value of a tensor, or none, into its file."""
    path = file_of(checkpoint, name)
    tensors = load_file(path)
    tensors = {k: v for k, v in tensors.items() if k != name} if value is None else {**tensors, name: value}
    save_file(tensors, path, {"format": "pt"})


def refused(checkpoint, capsys) -> str:
    """What the command line says of it; nothing is written."""
    out = checkpoint.parent / "out" / "model.onnx"
    assert main(["convert", str(checkpoint), "--out", str(out), "--method", "mha2mla", "--quiet"]) == 2
    assert not out.parent.exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_missing_file_is_named(checkpoint, capsys):
    path = file_of(checkpoint, NAME)
    path.unlink()
    assert f"lacks the file '{path.name}', which its index names." in refused(checkpoint, capsys)


def test_a_file_that_was_cut_short_is_named(checkpoint, capsys):
    path = file_of(checkpoint, NAME)
    path.write_bytes(path.read_bytes()[:-10])
    assert f"'{path}' is damaged or was cut short (" in refused(checkpoint, capsys)


def test_a_tensor_that_is_not_where_the_index_says_is_named(checkpoint, capsys):
    change(checkpoint, NAME, None)
    assert f"lacks the tensor '{NAME}', which the index says it has." in refused(checkpoint, capsys)


@pytest.mark.parametrize("places", ["3", '{"lm_head.weight": null}', '{"a": "b", "c": [1]}'])
def test_a_damaged_index_is_named(places, checkpoint, capsys):
    (checkpoint / "model.safetensors.index.json").write_text(f'{{"weight_map": {places}}}')
    assert "model.safetensors.index.json' is damaged (" in refused(checkpoint, capsys)


def test_a_tensor_of_another_shape_is_named(checkpoint, capsys):
    change(checkpoint, NAME, torch.zeros(16, 64))
    line = refused(checkpoint, capsys)
    assert f"The tensor '{NAME}' of '{checkpoint}' is of shape [16, 64]" in line
    assert "its configuration asks for [32, 64]." in line


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_tensor_with_numbers_that_are_none_is_named(checkpoint, capsys, number):
    value = load_file(file_of(checkpoint, NAME))[NAME]
    value[3, 4:6] = number
    change(checkpoint, NAME, value)
    assert f"The tensor '{NAME}' of '{checkpoint}' has 2 numbers that are NaN or infinite." in refused(
        checkpoint, capsys
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"num_hidden_layers": 1}, "tensors of layers that its configuration does not have, 'model.layers.1."),
        ({"num_hidden_layers": 3}, "tensors, 'model.layers.2."),
        ({"num_key_value_heads": 1}, "k_proj.weight' of "),
        ({"vocab_size": 98}, "of shape [97, 64], and its configuration asks for [98, 64]."),
    ],
    ids=["fewer-layers", "more-layers", "fewer-heads", "more-tokens"],
)
def test_a_configuration_of_another_model_is_refused(checkpoint, capsys, setting, words):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    assert words in refused(checkpoint, capsys)


def test_numbers_in_all_parts_of_a_tensor_are_looked_at(monkeypatch):
    monkeypatch.setattr("mla_compile.sources.checkpoint_files._CHUNK", 7)
    weights = {"a": torch.zeros(3, 5), "ids": torch.zeros(4, dtype=torch.long), "b": torch.zeros(20).half()}
    require_finite(weights, "model")
    weights["b"][19] = torch.inf
    with pytest.raises(LoadError, match="'b' of 'model' has 1 numbers"):
        require_finite(weights, "model")


def test_a_folder_with_only_an_index_says_that_it_has_weights(tmp_path):
    assert not has_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert has_weights(tmp_path)
