"""Check a conversion against the original model; a conversion that fails leaves no output behind.

A lossy conversion cannot be compared with the original directly, so correctness is checked in links, each of which has
an exact answer:

1. rewrite: the same graph surgery with the full rank and every rotary pair must reproduce the original;
2. decode: the converted model in chunks and token by token must equal the same model on the whole sequence;
3. lowering: ONNX Runtime must equal the converted PyTorch module; with a quantised cache, the same module with rows
   that are rounded as the cache rounds them, which alone is compared with the module that it comes from.

In float16 and bfloat16 every link is of the same computation in float32, where it is exact again, and what the type's
roundings change is compared with what they change in the original.

What is left between the original and the converted model is then the price of the smaller cache, which is reported.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mla_compile.errors import VerificationError
from mla_compile.passes.onnx_pieces import PiecewiseSession
from mla_compile.passes.quantise_cache import with_quantised_rows
from mla_compile.passes.retype import NARROW, type_name, widened
from mla_compile.passes.retype_onnx import write_float32_copy
from mla_compile.report import Verification
from mla_compile.runtime.generate import Ids, generate
from mla_compile.runtime.masks import kept_rows
from mla_compile.runtime.module import LatentModel, LatentOutput, cache_dtype
from mla_compile.runtime.onnx_cache import OnnxCache
from mla_compile.runtime.onnx_halves import halves_bytes
from mla_compile.runtime.onnx_quantised import quantised_bytes
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.text.evaluate import Scorer, relative_error

__all__ = [
    "GREEDY_TOKENS",
    "QUANTISED_TOLERANCE",
    "ROUNDING_FACTOR",
    "TOLERANCE",
    "TorchDecoder",
    "check_lowering",
    "check_module",
    "check_onnx",
    "chunks",
    "greedy_original",
    "in_float32",
    "in_steps",
    "quantised",
    "require_equal",
    "rounding_error",
    "worst_error",
]

TOLERANCE = 1e-4
"""Largest relative logit difference taken for rounding: float32 through tens of layers stays below 1e-5 in practice."""
QUANTISED_TOLERANCE = 0.5
"""The same where rows are quantised, over what quantising changes: a number that lies between two codes gets either by
a rounding of float32, and every row behind it is another. A tenth was observed in models of four million parameters."""
ROUNDING_FACTOR = 4
"""How much more the roundings of float16 or bfloat16 may change in a converted model than in the original.

Both multiply as many matrices, one behind the other, and every product is rounded once; a latent layer adds two
roundings, of the latent and of what is folded into queries. What roundings do is random: 0.5 to 1.4 times what they do
to the original was observed in models of fifteen families."""
GREEDY_TOKENS = 32
_WHOLE = 2**31
"""Bytes of weights in float32 up to which a file is run as a whole: ONNX Runtime packs them for products besides."""
_FEW_TOKENS = 4
"""Greedy tokens of larger models, every one of which reads all weights again."""


class TorchDecoder:
    """A :class:`LatentModel` behind the decoder interface of :mod:`mla_compile.runtime.generate`."""

    def __init__(self, model: LatentModel) -> None:
        self._model = model

    def empty_cache(self, batch: int, tokens: int | None = None) -> tuple[Tensor, ...]:
        """A cache of no tokens, which grows by itself."""
        return self._model.empty_cache(batch)

    def step(
        self, ids: Ids, attention_mask: Ids, position_ids: Ids, cache: tuple[Tensor, ...]
    ) -> tuple[np.ndarray, tuple[Tensor, ...]]:
        """Run new tokens; see :class:`~mla_compile.runtime.generate.Decoder`."""
        given = (torch.from_numpy(np.ascontiguousarray(x)) for x in (ids, attention_mask, position_ids))
        with torch.inference_mode():
            result = self._model(*given, past=cache)
        return result.logits.float().numpy(), result.cache


def greedy_original(score: Scorer, prompt: Tensor, count: int) -> list[int]:
    """Greedy continuation of the unconverted model, recomputing the whole sequence at every step.

    Args:
        score: The original model.
        prompt: ``[length]`` token ids.
        count: Tokens to add.
    """
    ids = prompt[None]
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, score(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def worst_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest relative error among outputs of the same names."""
    return max(relative_error(got[name].float(), value.float()) for name, value in expected.items())


def check_module(
    original: Scorer,
    exact: LatentModel,
    converted: LatentModel,
    ids: Tensor,
    text: bool,
    *,
    wide_original: Scorer | None = None,
) -> Verification:
    """Run the first two links and measure the price of the conversion.

    Where numbers have fewer bits than float32, both links are of the same models computing in float32, so that they
    are as tight as ever, and one more compares what the type's roundings do to either model.

    Args:
        original: The unconverted model.
        exact: The same rewrite with nothing left out, computing in float32.
        converted: The conversion.
        ids: ``[batch, length]`` token ids, at least 2 long; up to half of the length is continued greedily.
        text: Whether they are the user's text.
        wide_original: The unconverted model, computing in float32, if it does not by itself.

    Raises:
        VerificationError: A link is broken.
    """
    wide = in_float32(converted)
    with torch.inference_mode():
        expected = (wide_original or original)(ids).float()
        rewrite_error = relative_error(exact(ids).logits, expected)
        whole = wide(ids).logits
        decode_error = relative_error(_in_chunks(wide, ids), whole)
    require_equal("The rewritten graph at full rank", "the original model", rewrite_error)
    require_equal("Decoding with the latent cache", "the same model on the whole sequence", decode_error)
    rounding = None
    if wide is not converted:
        with torch.inference_mode():
            rounding = (
                rounding_error(original(ids).float(), expected),
                rounding_error(_in_chunks(converted, ids).float(), whole),
            )
        _require_rounding("The converted model", rounding[1], rounding[0], cache_dtype(converted.graph))
    prompt = ids[0, : ids.shape[1] - ids.shape[1] // 2]
    count = _greedy_tokens(converted, ids)
    ours = generate(TorchDecoder(converted), [prompt.tolist()], count)[0]
    with torch.inference_mode():
        one, all_of_them = ([c.nbytes for c in converted(part).cache] for part in (ids[:, :1], ids))
    _require_bytes(sum(all_of_them), len(ids) * _cache_bytes(converted, ids.shape[1]), ids)
    return Verification(
        rewrite_error=rewrite_error,
        decode_error=decode_error,
        lowering_error=None,
        lowering_greedy=None,
        conversion_error=relative_error(whole, expected),
        conversion_greedy=_agreement(ours, greedy_original(original, prompt, count)),
        rounding=rounding,
        cache_bytes_per_token=sum(one) // len(ids),
        tokens=ids.numel(),
        text=text,
    )


def _greedy_tokens(model: LatentModel, ids: Tensor) -> int:
    return min(GREEDY_TOKENS if wide_bytes(model) <= _WHOLE else _FEW_TOKENS, ids.shape[1] // 2)


def wide_bytes(model: LatentModel) -> int:
    """Bytes of a model's weights in float32."""
    return torch.float32.itemsize * sum(p.numel() for p in (*model.parameters(), *model.buffers()))


def in_float32(model: LatentModel) -> LatentModel:
    """The same model computing in float32, with shared weights; the model itself, if it does already."""
    assert isinstance(model.graph, fx.GraphModule)
    graph = widened(model.graph)
    return model if graph is model.graph else LatentModel(graph, model.rows, model.windows)


def rounding_error(got: Tensor, expected: Tensor) -> float:
    """What roundings change, as a share of the largest logit: the largest difference of a token, in the median token.

    The median, because a rounding that makes a router choose another expert changes all of its token; infinite where
    anything overflows.

    Args:
        got: Logits ``[batch, length, vocabulary]``.
        expected: The same in float32.
    """
    differences = torch.nan_to_num((got - expected).abs(), nan=torch.inf, posinf=torch.inf).amax(-1)
    typical = differences.median() if differences.isfinite().all() else differences.max()
    return float(typical / expected.abs().max().clamp(min=1e-30))


def _require_rounding(what: str, error: float, usual: float, dtype: torch.dtype) -> None:
    """Refuse what a type's roundings do to a model, if they do much more than they do to the original.

    Raises:
        VerificationError: They do.
    """
    limit = ROUNDING_FACTOR * max(usual, torch.finfo(dtype).eps)
    if not error <= limit:
        name = type_name(dtype)
        raise VerificationError(
            f"{what} in {name} differs from itself in float32 by {error:.1e} of the largest logit, and the original by "
            f"{usual:.1e} (allowed: {limit:.0e}).",
            "No output was kept. Convert it with --dtype float32"
            + (", or with --dtype bfloat16, whose numbers do not overflow." if dtype == torch.float16 else "."),
        )


def quantised(converted: LatentModel) -> LatentModel:
    """The same model with a cache of numbers that codes and scales stand for; weights are shared."""
    assert isinstance(converted.graph, fx.GraphModule)
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
    error, greedy, measured = check_onnx(reference, decoder, ids, planned_bytes, cost)
    return {
        "lowering_error": error,
        "lowering_greedy": greedy,
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
        error, greedy, measured = check_onnx(wide, decoder, ids, copied)
    found = {
        "lowering_error": error,
        "lowering_greedy": greedy,
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
    _require_rounding("ONNX Runtime", own, usual, dtype)
    _require_planned(decoder, planned_bytes)
    held = decoder.measured_bytes(_filled(decoder, ids))
    _require_bytes(held, len(ids) * _cache_bytes(converted, ids.shape[1]), ids)
    return {**found, "lowering_rounding": own}


def _opened(path: Path, converted: LatentModel) -> OnnxDecoder:
    """A file of a model; one that is large is run piece by piece."""
    return OnnxDecoder(path, session=PiecewiseSession(path) if wide_bytes(converted) > _WHOLE else None)


@contextlib.contextmanager
def _float32_copy(path: Path, converted: LatentModel) -> Iterator[OnnxDecoder]:
    """The same in float32: from a copy beside it, or one that is made piece by piece and never written."""
    if wide_bytes(converted) > _WHOLE:
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
    prompt = ids[0, : ids.shape[1] - ids.shape[1] // 2].tolist()
    count = _greedy_tokens(converted, ids)
    greedy = _agreement(decoder.generate([prompt], count)[0], generate(TorchDecoder(converted), [prompt], count)[0])
    held = [decoder.measured_bytes(_filled(decoder, part)) for part in (ids[:, :1], ids)]
    _require_planned(decoder, planned_bytes)
    held_by_one = _cache_bytes if quantisation_error is None else _quantised_cache_bytes
    held_by_one = _halved_cache_bytes if decoder.halves else held_by_one
    _require_bytes(held[1], len(ids) * held_by_one(converted, ids.shape[1]), ids)
    return error, greedy, held[0] // len(ids)


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


def _cache_bytes(model: LatentModel, tokens: int) -> int:
    """Bytes that the rows of one sequence of so many tokens take."""
    return model.cached_elements(tokens) * cache_dtype(model.graph).itemsize


def _halved_cache_bytes(model: LatentModel, tokens: int) -> int:
    """Bytes that both halves of the rows of one sequence of so many tokens take; windows drop none."""
    return tokens * halves_bytes(model.rows)


def _quantised_cache_bytes(model: LatentModel, tokens: int) -> int:
    """Bytes that codes and scales of one sequence of so many tokens take."""
    pairs = zip(model.rows, model.windows, strict=True)
    return sum(quantised_bytes([row]) * kept_rows(tokens, window) for row, window in pairs)


def _require_bytes(held: int, expected: int, ids: Tensor) -> None:
    """Compare the bytes of a cache's tensors with what so many tokens are to take."""
    if held != expected:
        raise VerificationError(
            f"The cache of {ids.numel()} tokens holds {held} bytes instead of {expected}.",
            "Report this with the model's config.json.",
        )


def require_equal(what: str, reference: str, error: float, tolerance: float | None = None) -> None:
    """Refuse a relative error that is no rounding.

    Raises:
        VerificationError: It is above the tolerance, :data:`TOLERANCE` by default.
    """
    tolerance = TOLERANCE if tolerance is None else tolerance
    if not error <= tolerance:
        raise VerificationError(
            f"{what} differs from {reference} by {error:.1e} of the largest logit (allowed: {tolerance:.0e}).",
            "No output was kept. Report this with the output of 'mla-compile inspect'.",
        )


def chunks(length: int) -> list[int]:
    """A long prefill, a chunk, and single tokens that add up to the length."""
    if length < 4:
        return [1] * length
    chunk = length // 4
    return [length - chunk - 2, chunk, 1, 1]


def _in_chunks(model: LatentModel, ids: Tensor) -> Tensor:
    return in_steps(lambda part, mask, past: model(part, attention_mask=mask, past=past), ids)


def in_steps(step: Callable[[Tensor, Tensor, Sequence[Tensor] | None], LatentOutput], ids: Tensor) -> Tensor:
    """Logits of tokens that are fed part by part, with a mask over all tokens so far and the cache of those before."""
    past: Sequence[Tensor] | None = None
    parts, done = [], 0
    for part in ids.split(chunks(ids.shape[1]), 1):
        done += part.shape[1]
        result = step(part, torch.ones_like(ids[:, :done]), past)
        past = result.cache
        parts.append(result.logits)
    return torch.cat(parts, 1)


def _onnx_in_chunks(decoder: OnnxDecoder, ids: Ids) -> np.ndarray:
    cache, parts, done = decoder.empty_cache(*ids.shape), [], 0
    for size in chunks(ids.shape[1]):
        part = ids[:, done : done + size]
        positions = np.broadcast_to(np.arange(done, done + size), part.shape)
        logits, cache = decoder.step(part, np.ones((len(ids), done + size), np.int64), positions, cache)
        parts.append(logits)
        done += size
    return np.concatenate(parts, 1)


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Fraction of tokens that agree before the first difference."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
    return same / len(theirs) if theirs else 1.0
