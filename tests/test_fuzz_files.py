"""Damaged and hostile files beside and inside models: ONNX and its weights, tokenizers, indices, text, what was saved.

As in :mod:`test_fuzz_doors`: an exit code and one sentence, or the result that whole files give; never a traceback,
never half an output, no foreign code run, and nothing read from outside the folder of a file.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
import torch
from doors import Hostile, damages, entrance, few, fuzzed, knock
from hypothesis import given
from hypothesis import strategies as st
from onnx.external_data_helper import ExternalDataInfo

from mla_compile.disk.statistics_cache import StatisticsCache
from mla_compile.errors import LoadError
from mla_compile.site_statistics import SiteStatistics
from mla_compile.text.corpus import read_documents

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
RUN = ("--prompt", "One", "--max-new-tokens", 2, "--kernel", "standard")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small model of several files as transformers saves it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    models.llama(num_hidden_layers=1, vocab_size=1024).save_pretrained(folder, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory) -> Path:
    """The model as an ONNX file, with its weights in a second file."""
    folder = tmp_path_factory.mktemp("converted")
    knock(checkpoint, "--out", folder / "model.onnx", "--method", "mha2mla", "--no-verify", codes={0})
    model = onnx.load(folder / "model.onnx")
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024
    )
    knock("run", folder / "model.onnx", *RUN, codes={0})
    return folder


@contextlib.contextmanager
def refused_by_name(path: Path) -> Iterator[None]:
    """The body may refuse a file, in a sentence that names it; nothing else may happen."""
    try:
        yield
    except LoadError as error:
        told = str(error)
        assert str(path) in told
        assert told.endswith(".")


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 2000),
        st.sampled_from([2**31, -(2**40), 10**30]),
        st.floats(),
        st.text(max_size=5),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@fuzzed
@given(data=st.data())
def test_damaged_onnx_files(data, converted, tmp_path):
    name = data.draw(st.sampled_from(["model.onnx", "model.onnx.data"]))
    with entrance(tmp_path) as folder:
        shutil.copytree(converted, folder / "model")
        whole = (converted / name).read_bytes()
        damaged = data.draw(damages(whole))
        (folder / "model" / name).write_bytes(damaged)
        told = knock("run", folder / "model" / "model.onnx", *RUN)
        if name == "model.onnx.data" and damaged[: len(whole)] != whole:
            assert told, "other weights, and nobody was told"


@few
@given(data=st.data())
def test_weights_that_lie_elsewhere(data, converted, tmp_path):
    """Where the weights of a file lie is written in it: another place, size or file."""
    with entrance(tmp_path) as folder:
        shutil.copytree(converted, folder / "model")
        shutil.copy(converted / "model.onnx.data", folder / "outside.data")
        path = folder / "model" / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        tensor = data.draw(st.sampled_from([t for t in model.graph.initializer if t.external_data]))
        before = ExternalDataInfo(tensor)
        place = data.draw(
            st.sampled_from(["../outside.data", str(folder / "outside.data"), "", ".", "none.data", "model.onnx", "\0"])
        )
        numbers = st.sampled_from(["-1", "0", "7", str(2**40), str(2**63), str(10**30), "x", "", "1.5"])
        changed = data.draw(st.sampled_from(["location", "offset", "length"]))
        value = place if changed == "location" else data.draw(numbers)
        for entry in tensor.external_data:
            if entry.key == changed:
                entry.value = value
        path.write_bytes(model.SerializeToString())
        told = knock("run", path, *RUN)
        same = str(getattr(before, changed)) == value
        assert told or same, f"{changed}={value!r} of {tensor.name} gave a result"


@few
@given(data=st.data())
def test_damaged_tokenizers(data, converted, tmp_path):
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    with entrance(tmp_path) as folder:
        shutil.copytree(converted, folder / "model")
        path = folder / "model" / name
        known = json.loads(path.read_text())
        key = data.draw(st.sampled_from(sorted(known)))
        changed = json.dumps(known | {key: data.draw(json_values)}).encode()
        path.write_bytes(data.draw(st.one_of(damages(path.read_bytes()), st.just(changed))))
        knock("run", folder / "model" / "model.onnx", *RUN)


@few
@given(data=st.data())
def test_indices_of_anything(data, checkpoint, tmp_path):
    with entrance(tmp_path) as folder:
        shutil.copytree(checkpoint, folder / "model")
        path = folder / "model" / "model.safetensors.index.json"
        shutil.copy(next(checkpoint.glob("*.safetensors")), folder / "outside.safetensors")
        known = json.loads(path.read_text())
        tensor = data.draw(st.sampled_from(sorted(known["weight_map"])))
        elsewhere = st.sampled_from(["../outside.safetensors", str(folder / "outside.safetensors"), ".", "", "none"])
        there = known["weight_map"] | {tensor: data.draw(elsewhere | json_values)}
        other = data.draw(json_values)
        content = data.draw(
            st.sampled_from([known | {"weight_map": there}, known | {"weight_map": other}, other, {"metadata": other}])
        )
        path.write_text(json.dumps(content))
        assert knock("inspect", folder / "model", codes={2})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_no_code_of_a_checkpoint_runs(name, form, checkpoint, tmp_path):
    """Neither as a file by itself, nor as the weights of a folder; with ``--unsafe-load`` the former does."""
    mark, folder = tmp_path / "mark", tmp_path / "model"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    path = folder / name
    torch.save({"weight": Hostile(mark)}, path) if form == "torch" else path.write_bytes(pickle.dumps(Hostile(mark)))
    assert knock("inspect", path, codes={2})
    assert knock("inspect", folder, codes={2})
    assert knock("plan", folder, "--method", "mha2mla", codes={2})
    assert not mark.exists()
    if form == "torch":
        assert knock("inspect", path, "--unsafe-load", codes={2})
        assert mark.exists()


@fuzzed
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(str.encode),
        json_values.map(lambda x: json.dumps({"text": x}).encode()),
    ),
    suffix=st.sampled_from([".txt", ".jsonl"]),
)
def test_text_of_anything(content, suffix, tmp_path):
    with entrance(tmp_path) as folder:
        path = folder / f"text{suffix}"
        path.write_bytes(content)
        with refused_by_name(path):
            documents = read_documents(path)
            assert documents
            assert all(isinstance(d, str) and d.strip() for d in documents)


@few
@given(content=st.binary(max_size=200))
def test_parquet_of_anything(content, checkpoint, tmp_path):
    with entrance(tmp_path) as folder:
        (folder / "text.parquet").write_bytes(content)
        assert knock("plan", checkpoint, "--calibration", folder / "text.parquet", codes={2})


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[SiteStatistics, bytes]:
    """Statistics of one layer, and the file that keeps them."""
    generator = torch.Generator().manual_seed(0)
    names = [f for f in SiteStatistics.__dataclass_fields__ if f != "tokens"]
    known = SiteStatistics(5, **{name: torch.rand(3, 3, generator=generator) for name in names})
    folder = tmp_path_factory.mktemp("statistics")
    StatisticsCache(folder).recall("key", lambda: (known,))
    return known, (folder / "key.safetensors").read_bytes()


@fuzzed
@given(data=st.data())
def test_damaged_statistics_are_measured_anew(data, measured, tmp_path):
    known, whole = measured
    with entrance(tmp_path) as folder:
        (folder / "key.safetensors").write_bytes(data.draw(damages(whole)))
        found = StatisticsCache(folder).recall("key", lambda: (known,)).value
        assert len(found) == 1
        for name in SiteStatistics.__dataclass_fields__:
            assert np.array_equal(np.asarray(getattr(found[0], name)), np.asarray(getattr(known, name)))


MEASUREMENT = {"models": [{"name": "a", "perplexity_ratio": 1.5, "cache_ratio": 0.5}]}


@fuzzed
@given(
    content=st.one_of(
        json_values.map(json.dumps), json_values.map(lambda x: json.dumps({"models": x})), st.text(max_size=30)
    ),
    model=json_values,
)
def test_measurements_of_anything(content, model, converted, tmp_path):
    """What ``report --eval`` reads; also one that begins as it should."""
    with entrance(tmp_path) as folder:
        shutil.copy(converted / "report.json", folder)
        (folder / "eval.json").write_text(content, encoding="utf-8", errors="surrogatepass")
        assert knock("report", folder, "--eval", folder / "eval.json", "--out", folder / "x.html", codes={2})
        (folder / "eval.json").write_text(json.dumps({"models": [{"perplexity_ratio": 1.5, "method": model}]}))
        told = knock("report", folder, "--eval", folder / "eval.json", "--out", folder / "x.html")
        assert (folder / "x.html").is_file() is not bool(told)


@fuzzed
@given(data=st.data())
def test_damaged_gguf_files(data, tmp_path):
    """The answers that a GGUF file keeps are read before llama.cpp is asked."""
    gguf = pytest.importorskip("gguf")
    from mla_compile.artifacts import gguf_check

    with entrance(tmp_path) as folder:
        path = folder / "model.gguf"
        writer = gguf.GGUFWriter(path, "deepseek2")
        writer.add_array(gguf_check.IDS, [1, 2, 3])
        writer.add_uint32(gguf_check.GREEDY, 1)
        writer.add_array(gguf_check.LOGITS, [0.5, 1.5])
        writer.add_float32(gguf_check.TOLERANCE, 0.25)
        writer.add_tensor("x", np.ones(8, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert gguf_check._kept(path).ids.tolist() == [1, 2, 3]
        path.write_bytes(data.draw(damages(path.read_bytes())))
        with refused_by_name(path):
            assert gguf_check._kept(path).logits.dim() == 2
