"""ONNX forms of operators that the exporter does not know: grouped products of mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import opset18

__all__ = ["translations"]


op: Any = opset18  # its annotations describe onnxscript's own symbolic values


def _grouped_product(rows: Any, weights: Any, ends: Any) -> Any:  # noqa: ANN401 - the exporter's symbolic tensors
    """Multiply sorted rows ``[N, K]`` with the weight ``[E, K, M]`` of the expert they are sorted under.

    Rows ``ends[e - 1]`` to ``ends[e]`` belong to expert ``e``. One product per expert, on a slice of the rows: no
    weight is ever copied per token.
    """
    first = op.Constant(value_ints=[0])
    parts = []
    axis = op.Constant(value_ints=[0])
    for expert in range(weights.shape[0]):
        number = op.Constant(value_ints=[expert])
        last = op.Cast(op.Gather(ends, number, axis=0), to=7)
        weight = op.Squeeze(op.Gather(weights, number, axis=0), axis)
        parts.append(op.MatMul(op.Slice(rows, first, last, axis), weight))
        first = last
    return op.Concat(*parts, axis=0)


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Operators by what translates them; those of packages that are not loaded are left out."""
    found: dict[Callable[..., Any], Callable[..., Any]] = {}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        found[torch.ops.transformers.grouped_mm_fallback.default] = _grouped_product
    return found
