"""A quantised cache in PyTorch: what a file with one is compared with, and which layers can have one.

The rows that ``mla::latent_attention`` is given are replaced by what their codes stand for, so that it caches and
attends to that. Codes and scales are those of :mod:`mla_compile.runtime.onnx_quantised`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_KEPT = "was not converted, and keeps keys and values"
_PROBED = 16
"""Random tokens that rows are looked at for: an entry that is the same for all of them is a constant."""


def quantised_row(row: Tensor, cos: Tensor, sin: Tensor, rank: int) -> Tensor:
    """What the codes of new rows stand for.

    Rope keys are cached rotated: they are rotated, quantised, and rotated back. Inverse norms stay as they are.

    Args:
        row: ``[B, S, R]``: latent, then rope keys, then inverse norms.
        cos: ``[B, S, n, d/2]``.
        sin: The same.
        rank: Length of the latent.

    Returns:
        Rows of the same shape, up to a scale's rounding of ``row``.
    """
    rope = 2 * cos.shape[2] * cos.shape[3]
    latent, keys, norms = row.split([rank, rope, row.shape[-1] - rank - rope], -1)
    quantised = _rounded(latent, LATENT_LEVELS)
    if not rope:
        return torch.cat([quantised, norms], -1)
    real, imaginary = keys.unflatten(2, (cos.shape[2], 2, cos.shape[3])).unbind(3)
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], 3)
    real, imaginary = _rounded(turned.flatten(2), ROPE_LEVELS).view_as(turned).unbind(3)
    length = cos.square() + sin.square()
    back = torch.stack([real * cos + imaginary * sin, imaginary * cos - real * sin], 3) / length[..., None, :]
    return torch.cat([quantised, back.flatten(2), norms], -1)


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


def check_quantisable(module: fx.GraphModule, rows: Sequence[int]) -> tuple[int, ...]:
    """Refuse layers whose cache holds something that codes of a few bits would spoil.

    Args:
        module: The rewritten graph.
        rows: Cache row length per layer.

    Returns:
        How many inverse norms a row ends in, per layer; they are not quantised.

    Raises:
        RefusedError: There are such layers; each is named with its reason.
    """
    found = _Rows(module)
    with torch.no_grad():
        logits, *_ = found.run(*_tokens(torch.zeros(1, 1, dtype=torch.long)), *_empty(module, rows))
        vocabulary = known_tokens(module) or logits.shape[-1]
        ids = torch.randint(0, vocabulary, (1, _PROBED), generator=torch.Generator().manual_seed(0))
        found.run(*_tokens(ids), *_empty(module, rows))
    caches = [found.caches[n.name] for n in module.graph.find_nodes(op="placeholder") if n.name in found.caches]
    reasons = [f"layer {layer} {cache.reason}" for layer, cache in enumerate(caches) if cache.reason]
    if reasons:
        raise RefusedError(f"The cache cannot be int8: {'; '.join(reasons)}.", "Use --cache-type float32.")
    return tuple(cache.norms for cache in caches)


@dataclass(frozen=True)
class _Cache:
    """A layer's cache.

    Attributes:
        reason: Why its rows cannot be quantised; None if they can.
        norms: How many inverse norms they end in.
    """

    reason: str | None
    norms: int = 0


class _Rows(fx.Interpreter):
    """Runs a graph and looks at the new rows of every cache."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.caches: dict[str, _Cache] = {}

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        if n.target in (_CACHED, _LATENT):
            cache = n.args[2]
            assert isinstance(cache, fx.Node)
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.caches[cache.name] = _looked_at(*args[:7]) if n.target is _LATENT else _Cache(_KEPT)
        return super().run_node(n)


def _looked_at(
    _query: Tensor, row: Tensor, _past: Tensor, _mask: Tensor, cos: Tensor, _sin: Tensor, key_up: Tensor
) -> _Cache:
    """A cache whose new rows are these, of the arguments of latent attention."""
    rank, rope = key_up.shape[2], 2 * cos.shape[2] * cos.shape[3]
    return _Cache(_reason(row[..., :rank]), row.shape[2] - rank - rope)


def _reason(latent: Tensor) -> str | None:
    if ((latent == latent[:, :1]) & (latent != 0)).all(1).any():
        return "has a constant in its latent, for the biases of its keys or values"
    return None


def _tokens(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None]


def _empty(module: fx.GraphModule, rows: Sequence[int]) -> list[Tensor]:
    like = next(p for p in module.parameters() if p.is_floating_point())
    return [like.new_empty(1, 0, row) for row in rows]
