"""Caches in two halves, and onnxruntime-genai: the same greedy tokens as our own decoder."""

from __future__ import annotations

import json
import shutil

import models
import numpy as np
import onnx
import pytest
import torch
from conversion import convert, difference

from mla_compile.artifacts.companions import copy_assets
from mla_compile.artifacts.fuse import write_fused
from mla_compile.artifacts.genai import genai_config_of, write_genai_config
from mla_compile.artifacts.onnx_files import stored_metadata
from mla_compile.config import make_config
from mla_compile.errors import LoadError, RefusedError, UsageError
from mla_compile.passes.lower_onnx import CacheForm, lower_to_onnx
from mla_compile.program import Assets
from mla_compile.runtime.cpu.library import compiler
from mla_compile.runtime.onnx_function import attention_function
from mla_compile.runtime.onnx_halves import half_width, halves_bytes
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.onnx_variant import CACHED, LATENT, Variant

LOGITS = 1e-4  # as in tests/passes/test_lower_onnx.py: 1e-6 was observed
ASSETS = Assets(config={"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 96, "pad_token_id": 95})
TOKENS = 20


@pytest.fixture(scope="module")
def folders(programs, tmp_path_factory):
    """A model with a window too, so that one row is longer; rows are odd in one layer."""
    made = {}
    for name in ("llama-gqa", "mistral-window"):
        case = programs[name]
        model = convert(case.program, case.sites, exact=False, cache_ratio=0.52)
        for static in (False, True):
            folder = tmp_path_factory.mktemp(f"{name}-{static}")
            file = folder / "model.onnx"
            settings = {"opset": 24, "inline": False, "metadata": {}, "caches": CacheForm(static=static, halves=True)}
            lower_to_onnx(model.graph, model.rows, file, **settings)
            write_genai_config(file, model.rows, ASSETS, static=static)
            made[name, static] = folder, model
    return made


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_halves_give_the_logits_of_the_module(folders, name, static):
    """Padded on the left, in pieces: many queries are unfolded, few are folded."""
    folder, model = folders[name, static]
    decoder, ids = OnnxDecoder(folder / "model.onnx", threads=1), models.tokens(3, 14)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = model(ids, mask).logits
    for sizes in ((14,), (9, 1, 3, 1)):
        cache, parts, done = decoder.empty_cache(3, 14), [], 0
        for size in sizes:
            own, seen = slice(done, done + size), mask[:, : done + size].numpy()
            positions = np.maximum(seen.cumsum(1) - 1, 0)[:, own]
            logits, cache = decoder.step(ids[:, own].numpy(), seen, positions, cache)
            parts.append(logits)
            done += size
        assert difference(torch.from_numpy(np.concatenate(parts, 1))[mask != 0], expected[mask != 0]) <= LOGITS
    assert decoder.measured_bytes(cache) == 3 * 14 * halves_bytes(model.rows)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_genai_generates_the_same_tokens(folders, static):
    """One prompt, and two of different lengths, which genai pads on the right."""
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install 'mla-compile[genai]'")
    folder, _ = folders["llama-gqa", static]
    decoder = OnnxDecoder(folder / "model.onnx", threads=1)
    for prompts, sequences in greedy(genai, folder):
        for wanted, got in zip(decoder.generate(prompts, TOKENS, stop=[96]), sequences, strict=True):
            assert got[: len(wanted)] == wanted
            assert len(wanted) > 1


def greedy(genai, folder):
    """What onnxruntime-genai makes of some prompts: pairs of prompts and their continuations."""
    model, made = genai.Model(str(folder)), []
    for prompts in ([[5, 9, 40, 7, 3]], [[5, 9, 40], [11, 12]]):
        longest = max(map(len, prompts))
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=longest + TOKENS, batch_size=len(prompts), do_sample=False)
        generator = genai.Generator(model, settings)
        padded = [prompt + [95] * (longest - len(prompt)) for prompt in prompts]
        generator.append_tokens(np.array(padded, np.int32) if len(prompts) > 1 else padded[0])
        while not generator.is_done():
            generator.generate_next_token()
        made.append((prompts, [generator.get_sequence(i)[longest:].tolist() for i in range(len(prompts))]))
    return made


def test_the_configuration_names_what_the_file_has(folders):
    for (name, static), (folder, model) in folders.items():
        config = json.loads((folder / "genai_config.json").read_text())
        decoder = config["model"]["decoder"]
        graph = onnx.load(folder / decoder["filename"]).graph
        inputs = {
            value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim] for value in graph.input
        }
        outputs = {value.name for value in graph.output}
        for layer in range(decoder["num_hidden_layers"]):
            for kind in ("key", "value"):
                shape = inputs[decoder["inputs"][f"past_{kind}_names"] % layer]
                assert shape[1::2] == [decoder["num_key_value_heads"], decoder["head_size"]]
                assert decoder["outputs"][f"present_{kind}_names"] % layer in outputs
        assert {"input_ids", "attention_mask"} <= decoder["inputs"].keys() & inputs.keys()
        assert decoder["head_size"] == half_width(model.rows)
        assert config["search"]["past_present_share_buffer"] is static, name
        assert config["model"]["vocab_size"] == models.VOCABULARY


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_the_fused_kernel_reads_halves(folders, name, static):
    path = folders[name, static][0] / "model.onnx"
    prompts = [[5, 9, 40], [11, 12]]
    fused = OnnxDecoder(path, kernel="fused", threads=1)
    assert fused.fused
    assert fused.generate(prompts, TOKENS) == OnnxDecoder(path, threads=1).generate(prompts, TOKENS)


def test_fused_is_what_genai_is_told_of(folders, tmp_path):
    """In another folder with the rest of the model; in its own only if that is wanted."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install 'mla-compile[genai]'")
    source = tmp_path / "source"
    shutil.copytree(folders["llama-gqa", True][0], source)
    copy_assets(ASSETS, source)
    told = (source / "genai_config.json").read_text()
    with pytest.raises(UsageError, match=r"genai_config\.json' names 'model\.onnx'.*one file per folder.*--force"):
        write_fused(source / "model.onnx", source / "fused.onnx")
    assert (source / "genai_config.json").read_text() == told
    assert not (source / "fused.onnx").exists()
    write_fused(source / "model.onnx", tmp_path / "other" / "fused.onnx")
    assert {"config.json", "genai_config.json"} <= {path.name for path in (tmp_path / "other").iterdir()}
    with pytest.raises(UsageError, match="belongs to something else"):
        write_fused(source / "model.onnx", tmp_path / "other" / "again.onnx")
    expected = greedy(genai, source)
    write_fused(source / "model.onnx", source / "fused.onnx", force=True)
    for folder in (source, tmp_path / "other"):
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        assert (decoder["filename"], decoder["session_options"]["custom_ops_library"]) == ("fused.onnx", "fused.so")
        assert greedy(genai, folder) == expected
    (source / "genai_config.json").write_text(told)
    assert greedy(genai, source) == expected


def test_a_damaged_configuration_is_said(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders["llama-gqa", True][0], source)
    (source / "genai_config.json").write_text("{}")
    with pytest.raises(LoadError, match=r"genai_config\.json' is damaged"):
        write_fused(source / "model.onnx", tmp_path / "fused.onnx")
    (source / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "another.onnx"}}}))
    assert genai_config_of(source / "model.onnx") is None


def test_halves_of_odd_and_unequal_rows():
    assert half_width([10, 7]) == 5
    assert half_width([6, 9]) == 5
    assert halves_bytes([6, 9]) == 2 * 2 * 5 * 4


def test_what_has_no_halves_is_said(programs):
    with pytest.raises(UsageError, match="codes need a third for their scales"):
        make_config(cache_layout="genai", cache_type="int8")
    with pytest.raises(ValueError, match="Two halves"):
        attention_function(CACHED, 24, Variant(halves=True))
    for scales in ({"key_scales": True}, {"value_scales": True}, {"softcap": True, "slopes": True}):
        attention_function(LATENT, 24, Variant(halves=True, **scales))
    case = programs["llama-gqa"]
    from mla_compile.passes.plain_caches import with_plain_caches

    plain = with_plain_caches(case.program)
    with pytest.raises(RefusedError, match="were not converted"):
        lower_to_onnx(
            plain.module, plain.rows, None, opset=24, inline=False, metadata={}, caches=CacheForm(halves=True)
        )


@pytest.mark.parametrize("kind", ["GPT2Config", "GPTJConfig", "LlamaConfig"])
def test_the_longest_sequence_by_either_name(kind):
    """GPT-2 and GPT-J call it ``n_positions``. Oracle: transformers, which knows the name of each."""
    import transformers

    config = getattr(transformers, kind)(max_position_embeddings=48)
    assets = Assets(config=config.to_dict())
    assert assets.longest == config.max_position_embeddings == 48
    assert stored_metadata("model", {}, [], (1, 1), assets)["max_position_embeddings"] == 48
    assert Assets().longest is None
