"""A layer that is attention but cannot be converted keeps an ordinary cache, beside latent ones."""

from __future__ import annotations

import pytest
import torch
import zoo
from conversion import difference, in_chunks
from torch import Tensor

import mla_compile
from mla_compile.errors import RefusedError
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.site import RejectCode

TOLERANCE = 1e-4  # of the largest logit: float32 through three layers stays below 1e-5


def normed(k: Tensor) -> Tensor:
    """Norms of half a head each behind the rotation, which turns channels of one into the other: no row of a latent."""
    return zoo.rms(k.unflatten(-1, (2, -1))).flatten(-2)


class NormBehindRope(zoo.HalfRope):
    def keys(self, k: Tensor) -> Tensor:
        return normed(super().keys(k))


class Repeated(zoo.GroupedByRepetition):
    def keys(self, k: Tensor) -> Tensor:
        return normed(super().keys(k))


class Expanded(zoo.GroupedByExpansion):
    def keys(self, k: Tensor) -> Tensor:
        return normed(super().keys(k))


class WithSink(zoo.Sink):
    def keys(self, k: Tensor) -> Tensor:
        return super().keys(k).tanh()


class WithSlopes(zoo.LinearBias):
    def keys(self, k: Tensor) -> Tensor:
        return super().keys(k).tanh()


class WithMergedHeads(zoo.MergedHeads):
    def keys(self, k: Tensor) -> Tensor:
        return super().keys(k).tanh()


class ByLetters(zoo.ByEinsum):
    def keys(self, k: Tensor) -> Tensor:
        return super().keys(k).tanh()


KEPT = {
    NormBehindRope: zoo.HEADS,
    Repeated: 2,
    Expanded: 2,
    WithSink: zoo.HEADS,
    WithSlopes: zoo.HEADS,
    WithMergedHeads: zoo.HEADS,
    ByLetters: zoo.HEADS,
    zoo.windowed(5, NormBehindRope): zoo.HEADS,
}
"""Layers that are kept, and the heads their cache must hold."""


@pytest.mark.parametrize("kind", KEPT, ids=lambda k: k.__name__)
def test_a_kept_layer_decodes_beside_converted_ones(kind, tmp_path):
    module = zoo.model(zoo.HalfRope, kind, zoo.HalfRope)
    ids = torch.randint(0, zoo.VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(2))
    compiled = mla_compile.compile(module, (ids,), exact=True)
    (kept,) = compiled.report.kept
    assert (kept.index, kept.path, kept.code) == (1, "layers.1", RejectCode.NONLINEAR)
    assert kept.plain.kv_heads == KEPT[kind]
    assert compiled.report.to_dict()["kept"][0]["kept"] is True
    assert "1 attention layers were not converted" in str(compiled.report)
    with torch.no_grad():
        expected = module(ids)
        assert difference(compiled.module(ids).logits, expected) <= TOLERANCE
        assert difference(in_chunks(compiled.module, ids, (6, 1, 4, 1, 1, 1)), expected) <= TOLERANCE
        cache = compiled.module(ids).cache
    assert cache[1].shape == (2, 14, KEPT[kind] * 2 * zoo.DIM)
    assert compiled.report.cache_bytes_after == 4 * sum(c.shape[2] for c in cache)
    compiled.to_onnx(tmp_path / "kept.onnx")
    decoder = OnnxDecoder(tmp_path / "kept.onnx")
    mask = torch.ones_like(ids).numpy()
    logits, _ = decoder.step(ids.numpy(), mask, mask.cumsum(1) - 1, decoder.empty_cache(2))
    assert difference(torch.from_numpy(logits), expected) <= TOLERANCE


def test_padding_beside_a_kept_layer():
    module = zoo.model(zoo.HalfRope, NormBehindRope)
    ids = torch.randint(0, zoo.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    compiled = mla_compile.compile(module, (ids,), exact=True)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    padded[1] = torch.randint(0, zoo.VOCABULARY, (12,))
    with torch.no_grad():
        got = compiled.module(padded, mask).logits[0, 3:]
        assert difference(got, module(ids)[0]) <= TOLERANCE


def test_a_model_of_kept_layers_alone_is_refused():
    module = zoo.model(NormBehindRope, NormBehindRope)
    with pytest.raises(RefusedError, match=r"2 of 2 attention layers .* cannot be converted: layers\.0: "):
        mla_compile.compile(module, (torch.zeros(2, 5, dtype=torch.long),), exact=True)
