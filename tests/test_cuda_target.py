"""``--target cuda``: the file's structure, and its numbers with a stand-in for an operator that needs a GPU.

The stand-in is written from the operator's own description (its schema in ONNX Runtime), in numpy; no kernel of it has
been run. What is tested is everything around it: packing, lengths, blocks, and where results go.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conversion import convert
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxruntime.capi import onnxruntime_pybind11_state

from mla_compile import cli
from mla_compile.config import make_config
from mla_compile.errors import RefusedError, UsageError
from mla_compile.passes.lower_onnx import CacheForm, lower_to_onnx
from mla_compile.runtime.onnx_cache import BLOCKS, CacheLayer
from mla_compile.runtime.onnx_paged import BLOCK, MICROSOFT, paged_function, paged_problem
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.onnx_variant import Variant

TINY = str(Path(__file__).parent.parent / "examples" / "tiny-llama")
HALF = 5e-3  # of the largest logit: caches and queries have eleven bits; 1e-3 was observed


class PagedAttention(OpRun):
    """Attention to a latent cache in blocks, as the operator's schema describes it."""

    op_domain = MICROSOFT

    def _run(
        self, query, key, value, cache, value_cache, cumulative, past_seqlens, block_table, *further, **attributes
    ):
        assert (value, value_cache, further) == (None, None, ())
        assert (attributes["kv_num_heads"], attributes["kv_cache_layout"]) == (1, "LATENT")
        assert not attributes["do_rotary"]
        for tensor in (cumulative, past_seqlens, block_table):
            assert tensor.dtype == np.int32
        for tensor in (query, key, cache):
            assert tensor.dtype == np.float16
        heads, width = attributes["num_heads"], attributes["v_head_size"]
        window = attributes.get("local_window_size", -1) or -1
        cache, outputs = cache.copy(), np.zeros((len(query), heads * width), query.dtype)
        for sequence, (begin, end) in enumerate(itertools.pairwise(cumulative)):
            for new, token in enumerate(range(begin, end)):
                place = past_seqlens[sequence] + new
                cache[block_table[sequence, place // BLOCK], place % BLOCK, 0] = key[token]
                rows = cache[block_table[sequence]].reshape(-1, cache.shape[-1])[: place + 1].astype(np.float32)
                rows = rows[-window:] if window > 0 else rows
                scores = query[token].reshape(heads, -1).astype(np.float32) @ rows.T * attributes["scale"]
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                outputs[token] = (weights @ rows[:, :width]).reshape(-1)
        return outputs, cache


@pytest.fixture(scope="module")
def made(programs, tmp_path_factory):
    written = {}
    for name in ("llama-gqa", "mistral-window"):
        case = programs[name]
        model = convert(case.program, case.sites, exact=False, cache_ratio=0.5)
        path = tmp_path_factory.mktemp(name) / "cuda.onnx"
        settings = {"opset": 24, "inline": False, "metadata": {}, "caches": CacheForm(static=True, paged=True)}
        lower_to_onnx(model.graph, model.rows, path, **settings)
        written[name] = path, model
    return written


def test_nodes_are_as_the_schema_of_the_wheel_says(made):
    """Oracle: the schema that ONNX Runtime itself registers."""
    schemas = onnxruntime_pybind11_state.get_all_operator_schema()
    (schema,) = [s for s in schemas if (s.domain, s.name) == (MICROSOFT, "PagedAttention")]
    names = [i.name for i in schema.inputs]
    for variant in (Variant(), Variant(softcap=True, window=True, sinks=True)):
        (node,) = [n for n in paged_function(24, variant).node if n.op_type == "PagedAttention"]
        assert node.domain == MICROSOFT
        assert {a.name for a in node.attribute} <= set(schema.attributes)
        given = {name for name, value in zip(names, node.input, strict=False) if value}
        needed = {"query", "key", "key_cache", "cumulative_sequence_length", "past_seqlens", "block_table"}
        assert given == needed | ({"head_sink"} if variant.sinks else set())
        assert len(node.output) == 2
    for path, model in made.values():
        file = onnx.load(path)
        onnx.checker.check_model(file)
        assert {(o.domain, o.version) for o in file.opset_import} >= {(MICROSOFT, 1), ("", 24)}
        caches = [v for v in (*file.graph.input, *file.graph.output) if v.name.endswith("latent")]
        assert len(caches) == 2 * len(model.rows)
        for value in caches:
            kind = value.type.tensor_type
            assert kind.elem_type == onnx.TensorProto.FLOAT16
            dims = [d.dim_param or d.dim_value for d in kind.shape.dim]
            assert dims[:3] == [BLOCKS, BLOCK, 1]


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_everything_around_the_operator_is_right(made, name):
    """In pieces, padded on both sides; oracle: the module in PyTorch."""
    path, model = made[name]
    ids, mask = models.tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, 17:] = 0
    with torch.no_grad():
        # With windows padding belongs to the left, for the module; the file does not mind.
        expected = model(ids[:2], mask[:2]).logits
    evaluator = ReferenceEvaluator(inline_local_functions(onnx.load(path)), new_ops=[PagedAttention])
    room = 32
    caches = {
        f"past_key_values.{i}.latent": np.zeros((3 * room // BLOCK, BLOCK, 1, row), np.float16)
        for i, row in enumerate(model.rows)
    }
    parts, done, positions = [], 0, np.maximum(mask.numpy().cumsum(1) - 1, 0)
    for size in (12, 1, 4, 3):
        own = slice(done, done + size)
        given = {
            "input_ids": ids[:, own].numpy(),
            "attention_mask": mask[:, : done + size].numpy(),
            "position_ids": positions[:, own],
            **caches,
        }
        logits, *presents = evaluator.run(None, given)
        caches = dict(zip(caches, presents, strict=True))
        parts.append(logits)
        done += size
    got = torch.from_numpy(np.concatenate(parts, 1))[:2]
    real = mask[:2] != 0
    assert (got[real] - expected[real]).abs().max() <= HALF * expected[real].abs().max()


def test_a_cache_in_blocks_has_whole_blocks():
    class Value:
        name, type, shape = "past_key_values.0.latent", "tensor(float16)", [BLOCKS, BLOCK, 1, 40]

    layer = CacheLayer.of(Value)
    assert layer.static
    assert [layer.rows(n) for n in (1, 16, 17)] == [16, 16, 32]
    assert layer.shape(3, layer.rows(17)) == (6, 16, 1, 40)
    assert layer.row_bytes == 80


def test_what_the_operator_does_not_compute_is_refused(programs):
    assert "ALiBi" in paged_problem(Variant(slopes=True))
    assert "own chunk" in paged_problem(Variant(window=True, chunked=True))
    assert "norms" in paged_problem(Variant(key_scales=True))
    assert paged_problem(Variant(sinks=True, softcap=True, window=True)) is None
    with pytest.raises(UsageError, match="half precision"):
        make_config(cache_layout="paged", cache_type="int8")
    from mla_compile.passes.plain_caches import with_plain_caches

    plain = with_plain_caches(programs["nanogpt"].program)
    with pytest.raises(RefusedError, match="it was not converted"):
        lower_to_onnx(
            plain.module, plain.rows, None, opset=24, inline=False, metadata={}, caches=CacheForm(True, paged=True)
        )


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="there is a provider")
def test_without_the_provider_a_sentence_says_what_to_install(made, tmp_path, capsys):
    path, _ = made["llama-gqa"]
    with pytest.raises(UsageError, match=r"made with --target cuda.*--provider cuda"):
        OnnxDecoder(path)
    with pytest.raises(UsageError, match=r"pip install 'mla-compile\[gpu\]'"):
        OnnxDecoder(path, providers=["CUDAExecutionProvider"])
    assert cli.main(["model", "--out", str(tmp_path / "folder"), "--target", "cuda"]) == 2
    assert "--target cuda is an ONNX file" in capsys.readouterr().err


def test_a_saved_folder_becomes_such_a_file_too(tmp_path, capsys):
    saved, file = tmp_path / "saved", tmp_path / "out" / "model.onnx"
    assert cli.main([TINY, "--out", str(saved), "--kv-rank", "16", "--method", "mha2mla", "--no-verify"]) == 0
    assert cli.main(["export", str(saved), "--out", str(file), "--cache-layout", "paged"]) == 0
    assert "this target is experimental" in capsys.readouterr().err
    assert "PagedAttention" in {n.op_type for f in onnx.load(file).functions for n in f.node}
