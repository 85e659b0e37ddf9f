"""Whole model families: what each attention layer should be recognised as, and what a conversion must compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mla_compile.api import CompiledModel
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_session import OnnxDecoder

__all__ = [
    "DIM",
    "HEADS",
    "LAYERS",
    "LONGEST",
    "PIECES",
    "TOLERANCE",
    "VOCABULARY",
    "WIDTH",
    "Family",
    "Layer",
    "assert_equal",
    "assert_equal_in_onnx",
    "assert_equal_when_padded",
    "difference",
    "in_pieces",
    "logits",
    "onnx_in_pieces",
    "tokens",
]

VOCABULARY, WIDTH, HEADS, DIM, LAYERS, LONGEST = 97, 64, 4, 16, 2, 128


@dataclass(frozen=True)
class Layer:
    """One attention layer as its configuration describes it.

    Attributes:
        heads: Query heads.
        kv_heads: Distinct key/value heads.
        qk_dim: Channels of one query or key head.
        v_dim: Channels of one value head.
        layout: Arrangement of rotary pairs.
        rotary_dim: Channels that rotate.
        theta: Base of the rotary frequencies, when they are plain powers of it.
        scale: Everything constant between ``q . k`` and the softmax, wherever it is written.
        window: Tokens a query sees, itself included.
        chunked: Whether it sees those of its own chunk of as many.
        softcap: Bound of the scores; 0 for none.
        sinks: Name of the parameter with one logit per head that has no key.
        slopes: ALiBi slopes, as they reach the softmax.
        key_norm: Kind of the norm on keys.
        per_head: Whether that norm is taken over each head, not over all of them.
        value_norm: Kind of the norm on values, which is taken over each head.
        value_heads: Distinct value heads, if they are not as many as those of the keys.
    """

    heads: int = HEADS
    kv_heads: int = HEADS
    qk_dim: int = DIM
    v_dim: int = DIM
    layout: str = "none"
    rotary_dim: int = 0
    theta: float | None = None
    scale: float = DIM**-0.5
    window: int | None = None
    chunked: bool = False
    softcap: float = 0.0
    sinks: str | None = None
    slopes: tuple[float, ...] | None = None
    key_norm: str | None = None
    per_head: bool = True
    value_norm: str | None = None
    value_heads: int | None = None


@dataclass(frozen=True)
class Family:
    """A model, and what its layers are.

    Attributes:
        build: Makes the model with fixed weights, in evaluation mode.
        layers: Every attention layer, in order.
        huggingface: Whether it is compiled without example inputs.
        frequencies: Radians per position of a layer's pairs, where they are no plain powers of ``theta``.
    """

    build: Callable[[], nn.Module]
    layers: tuple[Layer, ...]
    huggingface: bool = False
    frequencies: Callable[[nn.Module, int], Tensor] | None = None


# ---- checks


TOLERANCE = 1e-4
"""Of the largest logit; float32 through two layers stays below 1e-5."""
PIECES = (7, 1, 3, 1, 2, 1)
PROMPTS = (5, 12, 9)


def tokens(batch: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Random token ids, among them some that models may take for padding or separators."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    special = torch.rand(batch, length, generator=generator) < 0.15
    return torch.where(special, torch.randint(0, 3, (batch, length), generator=generator), ids)


def logits(module: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the original model, whatever it returns."""
    with torch.no_grad():
        result = module(ids)
    return result if isinstance(result, Tensor) else result.logits


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number; infinite for what is not a number."""
    assert got.shape == expected.shape
    found = float((got - expected).detach().abs().max() / expected.detach().abs().max())
    return found if math.isfinite(found) else math.inf


def in_pieces(model: LatentModel, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logits of whole sequences that are fed part by part."""
    past, parts, done = None, [], 0
    with torch.no_grad():
        for part in ids.split(list(sizes), 1):
            done += part.shape[1]
            result = model(part, attention_mask=torch.ones_like(ids[:, :done]), past=past)
            past = result.cache
            parts.append(result.logits)
    return torch.cat(parts, 1)


def onnx_in_pieces(decoder: OnnxDecoder, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """The same in ONNX Runtime."""
    cache, parts, done = decoder.empty_cache(len(ids)), [], 0
    for size in sizes:
        part = ids[:, done : done + size].numpy()
        positions = np.broadcast_to(np.arange(done, done + size), part.shape)
        got, cache = decoder.step(part, np.ones((len(ids), done + size), np.int64), positions, cache)
        parts.append(torch.from_numpy(got))
        done += size
    return torch.cat(parts, 1)


def assert_equal(compiled: CompiledModel, original: nn.Module, ids: Tensor, sizes: Sequence[int] = PIECES) -> None:
    """Prefill, pieces, single tokens and left-padded batches of a conversion are what the original computes.

    Args:
        compiled: The conversion, which leaves nothing out.
        original: The model itself, which is only ever run on whole, unpadded sequences.
        ids: ``[batch, length]`` token ids.
        sizes: Lengths of the pieces, which add up to the length.
    """
    model, expected = compiled.module, logits(original, ids)
    with torch.no_grad():
        assert difference(model(ids).logits, expected) <= TOLERANCE, "the whole sequence at once"
    assert difference(in_pieces(model, ids, sizes), expected) <= TOLERANCE, "in pieces"
    few = min(ids.shape[1], 8)
    assert difference(in_pieces(model, ids[:, :few], (1,) * few), expected[:, :few]) <= TOLERANCE, "token by token"
    assert_equal_when_padded(model, original, int(ids.max()) + 1)


def assert_equal_when_padded(model: LatentModel, original: nn.Module, vocabulary: int) -> None:
    """A left-padded batch, and one more token for it, are the sequences alone; padding is a token like any other."""
    longest = max(PROMPTS)
    ids, following = tokens(len(PROMPTS), longest, 5, vocabulary), tokens(len(PROMPTS), 1, 6, vocabulary)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in PROMPTS])
    with torch.no_grad():
        first = model(ids, mask)
        second = model(following, torch.cat([mask, torch.ones_like(following)], 1), past=first.cache)
    for row, length in enumerate(PROMPTS):
        alone = torch.cat([ids[row, longest - length :], following[row]])
        got = torch.cat([first.logits[row, longest - length :], second.logits[row]])
        assert difference(got, logits(original, alone[None])[0]) <= TOLERANCE, "a left-padded batch"


def assert_equal_in_onnx(
    compiled: CompiledModel, original: nn.Module, ids: Tensor, folder: Path, sizes: Sequence[int] = PIECES
) -> None:
    """The written file, in pieces, is what the original computes."""
    compiled.to_onnx(folder / "model.onnx")
    decoder = OnnxDecoder(folder / "model.onnx", threads=1)
    got = onnx_in_pieces(decoder, ids, sizes)
    assert difference(got, logits(original, ids)) <= TOLERANCE, "ONNX Runtime, in pieces"
