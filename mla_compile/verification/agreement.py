"""What two computations must have in common, and how far apart they may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mla_compile.errors import VerificationError
from mla_compile.passes.retype import type_name, widened
from mla_compile.runtime.generate import Decoder, generate
from mla_compile.runtime.module import LatentModel, LatentOutput, cache_dtype
from mla_compile.text.evaluate import Scorer, differences, relative_error, worst

__all__ = [
    "GREEDY_TOKENS",
    "QUANTISED_TOLERANCE",
    "ROUNDING_FACTOR",
    "TOLERANCE",
    "WHOLE",
    "cache_bytes",
    "chunks",
    "equal_share",
    "greedy",
    "greedy_original",
    "greedy_tokens",
    "in_chunks",
    "in_float32",
    "in_steps",
    "require_bytes",
    "require_equal",
    "require_rounding",
    "rounding_error",
    "wide_bytes",
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
WHOLE = 2**31
"""Bytes of weights in float32 up to which a file is run as a whole: ONNX Runtime packs them for products besides."""
_FEW_TOKENS = 4
"""Greedy tokens of larger models, every one of which reads all weights again."""


def greedy(decoder: Decoder, prompt: Tensor, count: int) -> list[int]:
    """Greedy continuation by a cache; see :func:`greedy_original`."""
    return generate(decoder, [prompt.tolist()], count)[0]


def greedy_original(score: Scorer, prompt: Tensor, count: int, known: int | None = None) -> list[int]:
    """Greedy continuation of the unconverted model, recomputing the whole sequence at every step.

    Args:
        score: The original model.
        prompt: ``[length]`` token ids.
        count: Tokens to add, at most.
        known: How many ids it can read; others, which a wide head may predict, are not chosen.
    """
    ids = prompt[None]
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, score(ids)[:, -1:, :known].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def worst_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest relative error among outputs of the same names."""
    return worst(*(relative_error(got[name].float(), value.float()) for name, value in expected.items()))


def greedy_tokens(model: LatentModel, ids: Tensor) -> int:
    """How many greedy tokens are compared: fewer of a large model, and no more than half of the text."""
    return min(GREEDY_TOKENS if wide_bytes(model) <= WHOLE else _FEW_TOKENS, ids.shape[1] // 2)


def wide_bytes(model: LatentModel) -> int:
    """Bytes of a model's weights in float32."""
    return torch.float32.itemsize * sum(p.numel() for p in (*model.parameters(), *model.buffers()))


def in_float32(model: LatentModel) -> LatentModel:
    """The same model computing in float32, with shared weights; the model itself, if it does already."""
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
    found, largest = differences(got, expected)
    tokens = torch.nan_to_num(found, nan=torch.inf, posinf=torch.inf).amax(-1)
    typical = tokens.median() if tokens.isfinite().all() else tokens.max()
    return float(typical / largest)


def require_rounding(what: str, error: float, usual: float, dtype: torch.dtype) -> None:
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


def cache_bytes(model: LatentModel, tokens: int) -> int:
    """Bytes that the rows of one sequence of so many tokens take."""
    return model.cached_elements(tokens) * cache_dtype(model.graph).itemsize


def require_bytes(held: int, expected: int, ids: Tensor) -> None:
    """Compare the bytes of a cache's tensors with what so many tokens are to take.

    Raises:
        VerificationError: They differ.
    """
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


def in_chunks(model: LatentModel, ids: Tensor) -> Tensor:
    """Logits of a model that is given a text in chunks, and single tokens at the end."""
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


def equal_share(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Fraction of tokens that agree before the first difference; either may have ended behind it."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
    return same / len(theirs) if theirs else 1.0
