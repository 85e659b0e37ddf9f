"""An ONNX file against its PyTorch module: logits, greedy tokens, and the bytes of its cache."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mla_compile.errors import VerificationError
from mla_compile.passes.onnx_pieces import PiecewiseSession
from mla_compile.passes.quantise_cache import check_quantisable, with_quantised_rows
from mla_compile.passes.retype import NARROW
from mla_compile.passes.retype_onnx import write_float32_copy
from mla_compile.runtime.generate import Ids
from mla_compile.runtime.masks import kept_rows
from mla_compile.runtime.module import LatentModel, cache_dtype
from mla_compile.runtime.onnx_cache import OnnxCache
from mla_compile.runtime.onnx_halves import halves_bytes
from mla_compile.runtime.onnx_quantised import quantised_bytes
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.runtime.torch_decoder import TorchDecoder
from mla_compile.text.evaluate import relative_error
from mla_compile.verification.agreement import (
    QUANTISED_TOLERANCE,
    TOLERANCE,
    WHOLE,
    cache_bytes,
    chunks,
    equal_share,
    greedy,
    greedy_tokens,
    in_float32,
    require_bytes,
    require_equal,
    require_rounding,
    rounding_error,
    wide_bytes,
)

__all__ = ["check_lowering", "check_onnx", "quantised"]


def quantised(converted: LatentModel) -> LatentModel:
    """The same model with a cache of numbers that codes and scales stand for; weights are shared."""
    return LatentModel(with_quantised_rows(converted.graph), converted.rows)


def check_lowering(
    converted: LatentModel, path: Path, ids: Tensor, planned_bytes: int, cache_type: str
) -> dict[str, Any]:
    """Run the third link on an ONNX file.

    Args:
        converted: The converted PyTorch module.
        path: The file.
        ids: ``[batch, length]`` token ids.
        planned_bytes: Cache bytes per token the plan promised.
        cache_type: What its cache holds.

    Returns:
        What a :class:`~mla_compile.report.Verification` says of a file, by name.

    Raises:
        VerificationError: The runtimes disagree, or the cache is not as small as planned.
    """
    if cache_dtype(converted.graph) in NARROW:
        return _check_narrow(converted, path, ids, planned_bytes)
    decoder = _opened(path, converted)
    reference, cost = converted, None
    if cache_type == "int8":
        reference = quantised(converted)
        with torch.inference_mode():
            cost = relative_error(reference(ids).logits, converted(ids).logits)
    error, same, measured = check_onnx(reference, decoder, ids, planned_bytes, cost)
    return {
        "lowering_error": error,
        "lowering_greedy": same,
        "cache_bytes_per_token": measured,
        "quantisation_error": cost,
    }


def _check_narrow(converted: LatentModel, path: Path, ids: Tensor, planned_bytes: int) -> dict[str, Any]:
    """Run the third link on a file in float16 or bfloat16.

    A float32 copy of the file must equal the module in float32, as tightly as ever. ONNX Runtime's CPU provider runs
    float16 besides, whose roundings must not be much larger than the module's own.
    """
    dtype, wide = cache_dtype(converted.graph), in_float32(converted)
    with _float32_copy(path, converted) as decoder:
        copied = planned_bytes * torch.float32.itemsize // dtype.itemsize
        error, same, measured = check_onnx(wide, decoder, ids, copied)
    found = {
        "lowering_error": error,
        "lowering_greedy": same,
        "lowering_copy": True,
        "cache_bytes_per_token": measured * dtype.itemsize // torch.float32.itemsize,
    }
    if dtype != torch.float16:
        return found
    decoder = _opened(path, converted)
    with torch.inference_mode():
        exact = wide(ids).logits
        usual = rounding_error(converted(ids).logits.float(), exact)
    logits = torch.from_numpy(_onnx_in_chunks(decoder, ids.numpy())).float()
    own = rounding_error(logits, exact)
    require_rounding("ONNX Runtime", own, usual, dtype)
    _require_planned(decoder, planned_bytes)
    held = decoder.measured_bytes(_filled(decoder, ids))
    require_bytes(held, len(ids) * cache_bytes(converted, ids.shape[1]), ids)
    return {**found, "lowering_rounding": own}


def _opened(path: Path, converted: LatentModel) -> OnnxDecoder:
    """A file of a model; one that is large is run piece by piece."""
    return OnnxDecoder(path, session=PiecewiseSession(path) if wide_bytes(converted) > WHOLE else None)


@contextlib.contextmanager
def _float32_copy(path: Path, converted: LatentModel) -> Iterator[OnnxDecoder]:
    """The same in float32: from a copy beside it, or one that is made piece by piece and never written."""
    if wide_bytes(converted) > WHOLE:
        yield OnnxDecoder(path, session=PiecewiseSession(path, wide=True))
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / path.name
        write_float32_copy(path, copy)
        yield OnnxDecoder(copy)


def check_onnx(
    converted: LatentModel,
    decoder: OnnxDecoder,
    ids: Tensor,
    planned_bytes: int,
    quantisation_error: float | None = None,
) -> tuple[float, float, int]:
    """Compare a loaded ONNX file with a PyTorch module.

    Args:
        converted: The converted PyTorch module; with rounded rows, if the file has a quantised cache.
        decoder: The ONNX file in ONNX Runtime.
        ids: ``[batch, length]`` token ids.
        planned_bytes: Cache bytes per token the plan promised.
        quantisation_error: What quantised rows change in ``converted``; None if the cache is not quantised.

    Returns:
        Relative logit error, greedy agreement, and measured cache bytes per token.

    Raises:
        VerificationError: The runtimes disagree, or the cache is not as small as planned.
    """
    with torch.inference_mode():
        logits = converted(ids).logits.float()
    error = relative_error(torch.from_numpy(_onnx_in_chunks(decoder, ids.numpy())), logits)
    tolerance = TOLERANCE if quantisation_error is None else max(TOLERANCE, QUANTISED_TOLERANCE * quantisation_error)
    require_equal("ONNX Runtime", "the converted PyTorch module", error, tolerance)
    prompt = ids[0, : ids.shape[1] - ids.shape[1] // 2]
    count = greedy_tokens(converted, ids)
    ours, theirs = (greedy(model, prompt, count) for model in (decoder, TorchDecoder(converted)))
    held = [decoder.measured_bytes(_filled(decoder, part)) for part in (ids[:, :1], ids)]
    _require_planned(decoder, planned_bytes)
    held_by_one = cache_bytes if quantisation_error is None else _quantised_cache_bytes
    held_by_one = _halved_cache_bytes if decoder.halves else held_by_one
    require_bytes(held[1], len(ids) * held_by_one(converted, ids.shape[1]), ids)
    return error, equal_share(ours, theirs), held[0] // len(ids)


def _filled(decoder: OnnxDecoder, ids: Tensor) -> OnnxCache:
    """The cache of whole sequences."""
    ones = np.ones(ids.shape, np.int64)
    return decoder.step(ids.numpy(), ones, ones.cumsum(1) - 1, decoder.empty_cache(*ids.shape))[1]


def _require_planned(decoder: OnnxDecoder, planned_bytes: int) -> None:
    if decoder.cache_bytes_per_token != planned_bytes:
        raise VerificationError(
            f"A token takes {decoder.cache_bytes_per_token} bytes of cache, but the plan says {planned_bytes}.",
            "Report this with the model's config.json.",
        )


def _halved_cache_bytes(model: LatentModel, tokens: int) -> int:
    """Bytes that both halves of the rows of one sequence of so many tokens take; windows drop none."""
    return tokens * halves_bytes(model.rows)


def _quantised_cache_bytes(model: LatentModel, tokens: int) -> int:
    """Bytes that codes and scales of one sequence of so many tokens take."""
    norms = check_quantisable(model.graph, model.rows)
    layers = zip(model.rows, norms, model.windows, strict=True)
    return sum(quantised_bytes([row], [norm]) * kept_rows(tokens, window) for row, norm, window in layers)


def _onnx_in_chunks(decoder: OnnxDecoder, ids: Ids) -> np.ndarray:
    cache, parts, done = decoder.empty_cache(*ids.shape), [], 0
    for size in chunks(ids.shape[1]):
        part = ids[:, done : done + size]
        positions = np.broadcast_to(np.arange(done, done + size), part.shape)
        logits, cache = decoder.step(part, np.ones((len(ids), done + size), np.int64), positions, cache)
        parts.append(logits)
        done += size
    return np.concatenate(parts, 1)
