"""Whole models with an int8 cache: the file against the module whose rows are rounded, and what cannot have one."""

from __future__ import annotations

import copy
import re

import models
import numpy as np
import onnx
import pytest
import torch
import zoo
from conversion import convert, difference, latent_weights
from onnx import TensorProto
from test_kept import NormBehindRope

from mla_compile.errors import RefusedError, VerificationError
from mla_compile.passes.insert_latent import insert_latent
from mla_compile.passes.lower_onnx import CacheForm, lower_to_onnx
from mla_compile.passes.quantise_cache import check_quantisable
from mla_compile.passes.recognise import recognise
from mla_compile.runtime.generate import generate
from mla_compile.runtime.onnx_quantised import quantised_bytes
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.torch_decoder import TorchDecoder
from mla_compile.verification.onnx import check_lowering, quantised

# A number between two codes gets either by a rounding, and moves the logits: to 1e-3 in these models, where quantising
# all rows moves them by 1e-2. Most runs stay below 1e-5.
LOGITS = 5e-3
FILES = {"llama-gqa": True, "mistral-window": False, "qwen3": True}
"""Models, and whether their caches are static; the last has norms of keys."""
SIZES = (9, 3, 1, 1)


class File:
    """A converted model, the same with rounded rows, and its file."""

    def __init__(self, captured, path, static):
        self.path = path
        self.windows = [site.mask.window or 0 for site in captured.sites]
        self.model = convert(captured.program, captured.sites, exact=False, cache_ratio=0.5)
        self.norms = [site.key_scales(1) for site in captured.sites]  # kept in float32, behind two scales
        self.row_bytes = quantised_bytes(self.model.rows, self.norms)
        self.rounded = quantised(self.model)
        settings = {"opset": 24 if static else 23, "inline": False, "metadata": {}}
        caches = CacheForm(static=static, quantised=True)
        lower_to_onnx(self.model.graph, self.model.rows, path, **settings, caches=caches)


@pytest.fixture(scope="module", params=FILES)
def file(request, programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return File(programs[request.param], folder / "model.onnx", FILES[request.param])


def in_pieces(decoder, ids, mask):
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    cache, parts, done = decoder.empty_cache(*ids.shape), [], 0
    for size in SIZES:
        own = slice(done, done + size)
        logits, cache = decoder.step(ids[:, own], mask[:, : done + size], positions[:, own], cache)
        parts.append(logits)
        done += size
    return torch.from_numpy(np.concatenate(parts, 1)), cache


def test_a_file_gives_the_logits_of_rounded_rows(file):
    """Prompts of different lengths, then a piece, then single tokens; the window is 6 tokens long."""
    ids = models.tokens(3, sum(SIZES))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    with torch.no_grad():
        expected, exact = (model(ids, mask).logits[mask != 0] for model in (file.rounded, file.model))
    logits, cache = in_pieces(OnnxDecoder(file.path, threads=1), ids.numpy(), mask.numpy())
    assert difference(logits[mask != 0], expected) <= LOGITS < difference(expected, exact)
    kept = [min(sum(SIZES), window - 1) if window else sum(SIZES) for window in file.windows]
    layers = zip(file.model.rows, file.norms, kept, strict=True)
    assert cache.nbytes == 3 * sum((row + 8 + 3 * norms) * count for row, norms, count in layers)


def test_rounded_rows_are_cached(file):
    """Fed in pieces the module is the same as at once: what it caches is what it attended to."""
    ids = models.tokens(2, sum(SIZES))
    with torch.no_grad():
        whole = file.rounded(ids).logits
        first = file.rounded(ids[:, :9])
        rest = file.rounded(ids[:, 9:], torch.ones_like(ids), past=first.cache)
    assert difference(torch.cat([first.logits, rest.logits], 1), whole) < LOGITS


def test_the_interface_is_as_documented(file):
    graph = onnx.load(file.path).graph
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    for layer, (row, norms) in enumerate(zip(file.model.rows, file.norms, strict=True)):
        for name in ("past_key_values", "present"):
            codes, scales = types[f"{name}.{layer}.latent"], types[f"{name}.{layer}.scale"]
            assert (codes.elem_type, scales.elem_type) == (TensorProto.UINT8, TensorProto.FLOAT)
            assert (codes.shape.dim[2].dim_value, scales.shape.dim[2].dim_value) == (row - norms, 2 + norms)
            assert codes.shape.dim[1].dim_param == scales.shape.dim[1].dim_param


def test_generation_goes_on_as_the_module_does(file):
    prompts = [[5, 9, 40, 7, 3], [8], [11, 12, 13]]
    expected = generate(TorchDecoder(file.rounded), prompts, 6)
    assert OnnxDecoder(file.path, threads=1).generate(prompts, 6) == expected


def test_a_file_is_checked_against_rounded_rows(file):
    """And one that computes with other rows is caught, by more than rounding explains."""
    ids, planned = models.tokens(2, 16), file.row_bytes
    found = check_lowering(file.model, file.path, ids, planned, "int8")
    assert found["cache_bytes_per_token"] == planned
    assert found["lowering_error"] <= LOGITS < found["quantisation_error"] < 0.2
    with pytest.raises(VerificationError, match=re.escape(f"but the plan says {planned + 1}")):
        check_lowering(file.model, file.path, ids, planned + 1, "int8")
    other = copy.deepcopy(file.model)
    for parameter in other.parameters():
        if parameter.dim() == 3:  # up-projections
            parameter.data *= 1.5
    with pytest.raises(VerificationError, match="ONNX Runtime differs from the converted PyTorch module"):
        check_lowering(other, file.path, ids, planned, "int8")


def test_what_cannot_be_quantised_is_named(mixed):
    """Oracle: what every layer was recognised as."""
    weights = latent_weights(mixed.program, mixed.sites, exact=False, rope_dims=2, kv_rank=8)
    graph = insert_latent(mixed.program, mixed.sites, weights, torch.float32)
    expected = []
    for site in mixed.sites:
        nope = site.qk_dim - 2
        if site.needs_constant(nope):
            expected.append(f"layer {site.index} has a constant in its latent, for the biases of its keys or values")
    assert 4 < len(expected) < len(mixed.sites)
    with pytest.raises(RefusedError) as caught:
        check_quantisable(graph.module, graph.rows)
    assert str(caught.value) == f"The cache cannot be int8: {'; '.join(expected)}. Use --cache-type float32."


def test_layers_that_were_kept_are_named(tmp_path):
    program = zoo.program_of(zoo.model(zoo.HalfRope, NormBehindRope))
    found = recognise(program)
    weights = latent_weights(program, found.sites)
    graph = insert_latent(program, found.sites, weights, torch.float32, found.rejections)
    settings = {"opset": 23, "inline": False, "metadata": {}, "caches": CacheForm(quantised=True)}
    with pytest.raises(RefusedError, match="cannot be int8: layer 1 was not converted, and keeps keys and values"):
        lower_to_onnx(graph.module, graph.rows, tmp_path / "model.onnx", **settings)
    assert not any(tmp_path.iterdir())
