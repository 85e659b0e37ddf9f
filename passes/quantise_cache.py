"""A quantised cache in PyTorch: what a file with one is compared with, and which layers can have one.

The rows that ``mla::latent_attention`` is given are replaced by what their codes stand for, so that it caches and
attends to that. Codes and scales are those of :mod:`mla_compile.runtime.onnx_quantised`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mla_compile.errors import RefusedError
from mla_compile.runtime import ops  # noqa: F401 - registers the operators
from mla_compile.runtime.module import known_tokens
from mla_compile.runtime.onnx_quantised import LATENT_LEVELS, ROPE_LEVELS, SMALLEST

__all__ = ["check_quantisable", "quantised_row", "with_quantised_rows", "with_rows"]

_LATENT = torch.ops.mla.latent_attention.default
_CACHED = torch.ops.mla.cached_attention.default
_PROBED = 16
"""Random tokens that rows are looked at for: an entry that is the same for all of them is a constant."""


def quantised_row(row: Tensor, cos: Tensor, sin: Tensor, rank: int) -> Tensor:
    """What the codes of new rows stand for.

    Rope keys are cached rotated: they are rotated, quantised, and rotated back.

    Args:
        row: ``[B, S, R]``: latent, then rope keys.
        cos: ``[B, S, n, d/2]``.
        sin: The same.
        rank: Length of the latent.

    Returns:
        Rows of the same shape, up to a scale's rounding of ``row``.
    """
    latent, keys = row.split([rank, row.shape[-1] - rank], -1)
    quantised = _rounded(latent, LATENT_LEVELS)
    if not keys.shape[-1]:
        return quantised
    real, imaginary = keys.unflatten(2, (cos.shape[2], 2, cos.shape[3])).unbind(3)
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], 3)
    real, imaginary = _rounded(turned.flatten(2), ROPE_LEVELS).view_as(turned).unbind(3)
    length = cos.square() + sin.square()
    back = torch.stack([real * cos + imaginary * sin, imaginary * cos - real * sin], 3) / length[..., None, :]
    return torch.cat([quantised, back.flatten(2)], -1)


def _rounded(x: Tensor, levels: int) -> Tensor:
    """The nearest of ``2 levels + 1`` even steps between minus and plus the largest size along the last axis."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / levels
    return (x / scale).round() * scale


def with_quantised_rows(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a rewritten graph so that every layer caches, and attends to, quantised rows; weights are shared."""
    return with_rows(module, quantised_row)


def with_rows(module: fx.GraphModule, row_of: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> fx.GraphModule:
    """Copy a rewritten graph so that every layer caches, and attends to, other rows; weights are shared.

    Args:
        module: The graph.
        row_of: Makes new rows, with the arguments and the result of :func:`quantised_row`.
    """

    def with_rank(row: Tensor, cos: Tensor, sin: Tensor, key_up: Tensor) -> Tensor:
        return row_of(row, cos, sin, key_up.shape[2])

    replaced = copy.copy(module)
    replaced.graph = copy.deepcopy(module.graph)
    for node in replaced.graph.nodes:
        if node.target is _LATENT:
            _, row, _, _, cos, sin, key_up, *_ = node.args
            with replaced.graph.inserting_before(node):
                new = replaced.graph.call_function(with_rank, (row, cos, sin, key_up))
            node.update_arg(1, new)
    replaced.recompile()
    return replaced


def check_quantisable(module: fx.GraphModule, rows: Sequence[int]) -> None:
    """Refuse layers whose cache holds something that codes of a few bits would spoil.

    Args:
        module: The rewritten graph.
        rows: Cache row length per layer.

    Raises:
        RefusedError: There are such layers; each is named with its reason.
    """
    found = _Rows(module)
    with torch.no_grad():
        logits, *_ = found.run(*_tokens(torch.zeros(1, 1, dtype=torch.long)), *_empty(module, rows))
        found.reasons.clear()
        vocabulary = known_tokens(module) or logits.shape[-1]
        ids = torch.randint(0, vocabulary, (1, _PROBED), generator=torch.Generator().manual_seed(0))
        found.run(*_tokens(ids), *_empty(module, rows))
    reasons = [f"layer {layer} {reason}" for layer, reason in enumerate(found.reasons) if reason]
    if reasons:
        raise RefusedError(f"The cache cannot be int8: {'; '.join(reasons)}.", "Use --cache-type float32.")


class _Rows(fx.Interpreter):
    """Runs a graph and says of every layer why its rows cannot be quantised, None if they can."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.reasons: list[str | None] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        if target is _CACHED:
            self.reasons.append("was not converted, and keeps keys and values")
        elif target is _LATENT:
            _, row, _, _, cos, _, key_up, *_ = args
            self.reasons.append(_reason(row, key_up.shape[2], 2 * cos.shape[2] * cos.shape[3]))
        return super().call_function(target, args, kwargs)


def _reason(row: Tensor, rank: int, rope: int) -> str | None:
    if row.shape[2] > rank + rope:
        return "caches inverse norms beside its latent"
    latent = row[..., :rank]
    if ((latent == latent[:, :1]) & (latent != 0)).all(1).any():
        return "has a constant in its latent, for the biases of its keys or values"
    return None


def _tokens(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None]


def _empty(module: fx.GraphModule, rows: Sequence[int]) -> list[Tensor]:
    like = next(p for p in module.parameters() if p.is_floating_point())
    return [like.new_empty(1, 0, row) for row in rows]
