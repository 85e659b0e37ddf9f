"""Families of models: each layer is what its configuration says, and the conversion computes what the model does."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

import mla_compile
from families import (
    DIM,
    PIECES,
    TOLERANCE,
    VOCABULARY,
    Family,
    Layer,
    assert_equal,
    assert_equal_in_onnx,
    handwritten,
    huggingface,
    tokens,
)
from mla_compile.api import CompiledModel
from mla_compile.errors import MlaCompileError, RefusedError
from mla_compile.site import AttentionSite

# The models hold frequencies, or sines and cosines, in float32, which rounds by 6e-8.
ROUNDED = {"rel": 2e-6, "abs": 1e-8}
LENGTH = sum(PIECES)
CONVERTIBLE = {**huggingface.CONVERTIBLE, **{f"own-{name}": f for name, f in handwritten.CONVERTIBLE.items()}}
REFUSED = huggingface.REFUSED | handwritten.REFUSED


def convert(family: Family) -> tuple[nn.Module, CompiledModel]:
    """A model and its conversion with nothing left out."""
    module = family.build()
    inputs = None if family.huggingface else (tokens(2, 5),)
    return module, mla_compile.compile(module, inputs, exact=True)


def described(site: AttentionSite) -> Layer:
    """A site in the words of an expectation; what needs a comparison of floats is left at its default."""
    return Layer(
        heads=site.heads,
        kv_heads=site.kv_heads,
        qk_dim=site.qk_dim,
        v_dim=site.v_dim,
        layout=site.rope.layout,
        rotary_dim=site.rope.rotary_dim,
        window=site.mask.window,
        chunked=site.mask.chunked,
        sinks=site.sinks,
        key_norm=None if site.key.norm is None else site.key.norm.kind,
        per_head=site.key.norm is None or site.key.norm.per_head,
        value_norm=None if site.value.norm is None else site.value.norm.kind,
        value_heads=None if site.value_rows == site.kv_heads * site.v_dim else site.value_rows // site.v_dim,
    )


def factors(site: AttentionSite) -> Tensor:
    """``[heads, dim]``: everything that multiplies ``q . k``, wherever the model has it."""
    query, key = (torch.tensor(p.turned or p.gain, dtype=torch.float64) for p in (site.query, site.key))
    return site.scale * query * key.repeat_interleave(site.heads // site.kv_heads, 0)


def frequencies(family: Family, layer: Layer, module: nn.Module, index: int) -> list[float]:
    if not layer.rotary_dim:
        return []
    if layer.theta is not None:
        return [layer.theta ** (-2 * i / layer.rotary_dim) for i in range(layer.rotary_dim // 2)]
    return family.frequencies(module, index).double().tolist()


def assert_described(site: AttentionSite, layer: Layer, expected_frequencies: list[float]) -> None:
    plain = dataclasses.replace(layer, theta=None, scale=DIM**-0.5, softcap=0.0, slopes=None)
    assert described(site) == plain
    assert list(site.rope.inv_freq) == pytest.approx(expected_frequencies, **ROUNDED)
    assert site.softcap == pytest.approx(layer.softcap, **ROUNDED)
    assert (site.slopes is None) == (layer.slopes is None)
    if layer.slopes is not None:
        assert list(site.slopes) == pytest.approx(list(layer.slopes), **ROUNDED)
    if layer.key_norm is None:  # else gains are the weights of the norms
        assert site.logit_scale == pytest.approx(layer.scale, **ROUNDED)
        torch.testing.assert_close(
            factors(site), torch.full((layer.heads, layer.qk_dim), layer.scale).double(), rtol=2e-6, atol=0
        )
    assert site.error < 1e-6


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_family(name, tmp_path):
    family = CONVERTIBLE[name]
    module, compiled = convert(family)
    sites = compiled.report.sites
    assert [s.index for s in sites] == list(range(len(family.layers)))
    for index, (site, layer) in enumerate(zip(sites, family.layers, strict=True)):
        assert_described(site, layer, frequencies(family, layer, module, index))
    assert compiled.report.verification.conversion_error <= TOLERANCE
    # Only Falcon computes slopes in bfloat16, in a model of any type.
    rounded = [
        w for w in compiled.report.warnings if "slopes in bfloat16, which counts distances exactly up to 256" in w
    ]
    assert len(rounded) == (name == "falcon-alibi")
    ids = tokens(3, LENGTH, seed=11)
    assert_equal(compiled, module, ids)
    assert_equal_in_onnx(compiled, module, ids, tmp_path)


STILL = ("llama-bias", "qwen3", "gemma2", "olmo2", "cohere-qk-norm", "stablelm-qk-norm", "gpt-oss", "phi3")
"""Families whose channels go through the latent in ways of their own: biases, norms, soft-caps, sinks."""


@pytest.mark.parametrize("kept", [0, 1], ids=["none rotate", "half rotate"])
@pytest.mark.parametrize("name", STILL)
def test_channels_that_stand_still_go_through_the_latent_exactly(name, kept, tmp_path):
    """With all RoPE kept, nothing of a key is in the latent; these models hold all rotations or every other one still.

    Biases are large, so that one that is lost would show.
    """
    module = CONVERTIBLE[name].build()
    for buffer, value in module.named_buffers():
        if "inv_freq" in buffer:
            value[kept::2] = 0.0
            value[: len(value) * (1 - kept)] = 0.0
    with torch.no_grad():
        for parameter, value in module.named_parameters():
            if parameter.endswith(("k_proj.bias", "v_proj.bias")):
                value.mul_(3)
    compiled = mla_compile.compile(module, exact=True)
    for site, plan in zip(compiled.report.sites, compiled.report.plans, strict=True):
        assert site.rope.rotary_dim == plan.rope_dims
        assert plan.rope_dims < site.qk_dim
        assert plan.key_scales == (0 if site.key.norm is None else len(site.key.norm.groups))
    ids = tokens(3, LENGTH, seed=11)
    assert_equal(compiled, module, ids)
    assert_equal_in_onnx(compiled, module, ids, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_be_refused(name):
    with pytest.raises(MlaCompileError) as caught:
        convert(REFUSED[name])
    assert isinstance(caught.value, RefusedError)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(("name", "code"), [("phi3-longrope-switching", "verify"), ("bucket-bias", "scores")])
def test_scores_of_long_sequences_are_not_misread(name, code):
    """Speeds that switch at 33 tokens, and a bias that is linear in short distances alone."""
    with pytest.raises(RefusedError, match=rf"2 of 2 attention layers .*\[{code}\].*\[{code}\]"):
        convert(REFUSED[name])


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_expectations_are_those_of_the_models(name):
    """The models export no graph here: they are what this file says they are, causal, and attention counts in them."""
    family = CONVERTIBLE[name]
    module = family.build()
    ids = tokens(2, LENGTH, seed=3)
    first, late = ids.clone(), ids.clone()
    first[:, :3] = (first[:, :3] + 1) % VOCABULARY
    late[:, 10:] = (late[:, 10:] + 1) % VOCABULARY
    with torch.no_grad():
        base, early, changed = (_logits(module, x) for x in (ids, first, late))
    largest = float(base.abs().max())
    assert math.isfinite(largest)
    assert float((base - changed)[:, :10].abs().max()) <= 1e-5 * largest, "later tokens change earlier logits"
    assert float((base - early)[:, 3:].abs().max()) > 0.1 * largest, "earlier tokens do not matter"


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    result = module(ids)
    return result if isinstance(result, Tensor) else result.logits
