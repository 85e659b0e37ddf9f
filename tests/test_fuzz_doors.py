"""Damaged and hostile files at every door: an exit code and one sentence, never a traceback, and no foreign code run.

``MLA_COMPILE_FUZZ=500 pytest tests/test_fuzz_doors.py`` tries more of them than a run of all tests does.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import models
import pytest
import torch
from doors import Hostile, damages, entrance, few, fuzzed, knock
from hypothesis import given
from hypothesis import strategies as st
from torch.export import Dim, export, save

import mla_compile

NUMBERS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "vocab_size")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A small model as ``torch.export`` saves it; not its bytes, which hypothesis would show, and warn of doing so."""
    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    save(export(models.handwritten(models.NanoGPT), (models.tokens(2, 8),), dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small model as transformers saves it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    models.llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A converted model, as a folder."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    compiled = mla_compile.compile(models.llama(), cache_ratio=0.5, method="mha2mla", check=False)
    compiled.save(folder)
    return folder


@fuzzed
@given(data=st.data())
def test_damaged_archives(data, archive, tmp_path):
    with entrance(tmp_path) as folder:
        (folder / "model.pt2").write_bytes(data.draw(damages(archive.read_bytes())))
        knock("inspect", folder / "model.pt2")


@fuzzed
@given(
    names=st.lists(
        st.sampled_from(["data.pkl", "models/model.json", "archive/version", "x/serialized.json"]), max_size=3
    ),
    content=st.binary(max_size=100),
)
def test_archives_of_other_things(names, content, tmp_path):
    with entrance(tmp_path) as folder:
        with zipfile.ZipFile(folder / "model.pt2", "w") as file:
            for name in dict.fromkeys(names):
                file.writestr(name, content)
        assert knock("inspect", folder / "model.pt2", codes={2})


@pytest.mark.parametrize("form", ["torch", "pickle", "weights", "archive"])
def test_no_code_of_a_pickle_runs(form, archive, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    hostile = Hostile(mark)
    if form == "torch":
        torch.save(hostile, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    elif form == "weights":
        torch.save({"weight": torch.zeros(2), "other": hostile}, path)
    else:  # every part of a real archive replaced by the pickle
        path = tmp_path / "model.pt2"
        with zipfile.ZipFile(archive) as real, zipfile.ZipFile(path, "w") as file:
            for name in real.namelist():
                kept = name.endswith((".json", "version", "archive_format", "byteorder"))
                file.writestr(name, real.read(name) if kept else pickle.dumps(hostile))
    assert knock("inspect", path, codes={2})
    assert not mark.exists()
    pickle.loads(pickle.dumps(hostile))
    assert mark.exists()  # it would have


other = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.floats(), st.text(max_size=5), st.lists(st.integers(0, 3))
)


@fuzzed
@given(data=st.data())
def test_configurations_of_anything(data, checkpoint, tmp_path):
    with entrance(tmp_path) as folder:
        shutil.copytree(checkpoint, folder / "model")
        path = folder / "model" / "config.json"
        known = json.loads(path.read_text())
        keys = data.draw(st.lists(st.sampled_from([*NUMBERS, *known]), min_size=1, max_size=3))
        path.write_text(json.dumps(known | {key: data.draw(other) for key in keys}))
        knock("inspect", folder / "model")


@fuzzed
@given(text=st.one_of(st.text(max_size=30), st.recursive(other, lambda x: st.lists(x), max_leaves=3).map(json.dumps)))
def test_configurations_that_are_none(text, checkpoint, tmp_path):
    with entrance(tmp_path) as folder:
        shutil.copytree(checkpoint, folder / "model")
        (folder / "model" / "config.json").write_text(text, encoding="utf-8")
        assert knock("inspect", folder / "model", codes={2})


@fuzzed
@given(data=st.data())
def test_damaged_weights(data, checkpoint, tmp_path):
    """The header of a safetensors file is its length and JSON; both may say anything."""
    whole = (checkpoint / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = data.draw(damages(whole[8 : 8 + length]))
    said = data.draw(st.one_of(st.just(len(header)), st.integers(0, 2**64 - 1)))
    with entrance(tmp_path) as folder:
        shutil.copytree(checkpoint, folder / "model")
        (folder / "model" / "model.safetensors").write_bytes(struct.pack("<Q", said) + header + whole[8 + length :])
        words = (folder / "model", "--out", folder / "out.onnx", "--method", "mha2mla", "--no-verify")
        told = knock(*words, codes={0, 2, 3, 5})
        left = {p.name for p in folder.iterdir()}
        assert left == {"model"} if told else "out.onnx" in left


@few
@given(data=st.data())
def test_damaged_converted_folders(data, converted, tmp_path):
    name = data.draw(st.sampled_from(["model.pt2", "report.json", "mla_config.yaml", "config.json"]))
    with entrance(tmp_path) as folder:
        shutil.copytree(converted, folder / "model")
        (folder / "model" / name).write_bytes(data.draw(damages((converted / name).read_bytes())))
        knock("report", folder / "model", "--force")
        knock("export", folder / "model", "--out", folder / "out.onnx", codes={0, 2, 3, 5})
        assert {p.name for p in folder.iterdir()} - {"model", "config.json", "generation_config.json"} <= {
            "out.onnx",
            "report.json",
            "report.html",
        }
