"""Describe what stands between a projection and its heads when it is not linear: QK-norm, in any spelling.

The graph between projection and operand is cut where it is linear again. What lies before the cut is compared with the
norms there are; nothing is concluded from operator names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.probe import Operand, exceeds, matching_rows, probe_linear
from mla_compile.passes.trace import DataFlow
from mla_compile.site import NormKind, RejectCode

__all__ = ["FoundNorm", "describe_norm", "linear_again", "nodes_between"]

_PROBES = 6
_FIT = 1e-7
"""Relative error of a norm's formula; float32 gains inside the graph are exact in float64, so only rounding is left."""


@dataclass(frozen=True)
class FoundNorm:
    """A norm, per entry of the node behind it.

    Attributes:
        kind: ``rms`` or ``layer``.
        eps: What is added to the mean square.
        size: How many neighbouring entries are normalised together.
        rows: ``[N]`` projection output of every entry.
        gain: ``[N]`` factors behind the norm.
        offset: ``[N]`` constants added behind the norm.
    """

    kind: NormKind
    eps: float
    size: int
    rows: Tensor
    gain: Tensor
    offset: Tensor

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Projection outputs that are normalised together."""
        return tuple(tuple(group) for group in self.rows.reshape(-1, self.size).tolist())


def linear_again(operand: Operand, flow: DataFlow, generator: torch.Generator) -> tuple[Operand, bool]:
    """Find the first node behind the projection from which on the operand is linear.

    Args:
        operand: An operand that is not linear in its projection.
        flow: Data flow of the graph.
        generator: Source of random probes.

    Returns:
        The operand with that node as its base, and whether the base depends on position (a norm behind the rotation).

    Raises:
        MismatchError: There is none.
    """
    for node in _cuts(operand, flow):
        later = replace(operand, base=node)
        try:
            probe_linear(later, generator)
        except (MismatchError, RuntimeError):
            continue
        # Without position, the same outputs at every position give the same activations.
        probe = torch.randn(2, 1, operand.width, generator=generator, dtype=torch.float64)
        probe = probe.expand(-1, operand.sizes.short, -1)
        got = _values(operand, later, probe)
        return later, exceeds(got - got[:, :1], 1e-9)
    raise MismatchError(RejectCode.NONLINEAR, f"something non-linear stands between projection and {operand.role}")


def describe_norm(operand: Operand, later: Operand, flow: DataFlow, generator: torch.Generator) -> FoundNorm:
    """Describe what a projection passes through on the way to ``later``'s base as a norm.

    Args:
        operand: The operand with the projection as its base.
        later: The same with the base from which on it is linear.
        flow: Data flow of the graph.
        generator: Source of random probes.

    Raises:
        MismatchError: It is no RMS, layer or L2 norm over the last axis or the whole width.
    """
    probes = torch.randn(_PROBES, 1, operand.width, generator=generator, dtype=torch.float64)
    probes = probes.expand(-1, operand.sizes.short, -1)
    shape = later.base.meta["val"].shape
    sizes = {int(shape[-1]), later.width}
    for node in _inputs_of_norm(operand, later, flow):
        before = replace(operand, base=node)
        try:
            entering = _values(operand, before, probes)[:, 0]
        except (MismatchError, RuntimeError):
            continue
        found = matching_rows(probes[:3, 0], entering[:3]) if entering.shape[1] == later.width else None
        if found is None or exceeds(found[1] - 1, 1e-9):
            continue
        for size in sizes:
            for kind in get_args(NormKind):
                norm = _fit(kind, size, found[0], operand, later, probes)
                if norm is not None:
                    return norm
    raise MismatchError(
        RejectCode.NONLINEAR, f"what stands between projection and {operand.role} is no RMS, layer or L2 norm"
    )


def _fit(kind: NormKind, size: int, rows: Tensor, operand: Operand, later: Operand, probes: Tensor) -> FoundNorm | None:
    """Fit gain, offset and eps of one kind of norm; None if they do not explain what is seen."""

    def centred(magnitude: float) -> tuple[Tensor, Tensor]:
        """Entries of the groups, and what leaves the norm, ``[probes, groups, size]``."""
        y = (probes[:, 0, rows] * magnitude).unflatten(1, (-1, size))
        y = y - y.mean(-1, keepdim=True) if kind == "layer" else y
        left = _values(operand, later, probes * magnitude)[:, 0].unflatten(1, (-1, size))
        return y, left

    y, left = centred(1e4)  # where no eps matters
    normed = y / y.square().mean(-1, keepdim=True).sqrt()
    mean, mean_left = normed.mean(0), left.mean(0)
    gain = ((normed - mean) * (left - mean_left)).sum(0) / (normed - mean).square().sum(0)
    offset = mean_left - gain * mean
    offset = torch.where(offset.abs() < 1e-7 * gain.abs(), torch.zeros_like(offset), offset)
    if exceeds(left - gain * normed - offset, _FIT * float(left.abs().max())):
        return None
    y, left = centred(1e-2)
    inverse = ((left - offset) * y).sum(-1) / (gain * y.square()).sum(-1)
    eps = float((inverse.pow(-2) - y.square().mean(-1)).mean())
    eps = eps if eps > 1e-16 else 0.0
    for magnitude in (1e-3, 1e-2, 1.0):
        y, left = centred(magnitude)
        expected = gain * y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() + offset
        if exceeds(left - expected, 10 * _FIT * float(left.abs().max())):
            return None
    return FoundNorm(kind, eps, size, rows, gain.flatten(), offset.flatten())


def _values(operand: Operand, target: Operand, outputs: Tensor) -> Tensor:
    """Entries ``[B, S, N]`` of another operand's base for given projection outputs ``[B, S, M]``."""
    return target.flatten(operand.value_of(target.base, outputs), *outputs.shape[:2])


def nodes_between(operand: Operand, end: Node, flow: DataFlow) -> list[Node]:
    """Nodes on the ways from an operand's base to ``end``, in graph order, both included."""
    behind = flow.behind(end, lambda n: n is operand.base)
    reached = {operand.base}
    for node in operand.evaluator.graph.nodes:
        if node in behind and any(i in reached for i in node.all_input_nodes):
            reached.add(node)
    return [n for n in operand.evaluator.graph.nodes if n in reached and n in behind]


def _cuts(operand: Operand, flow: DataFlow) -> Iterator[Node]:
    """Nodes that every way from the projection to the operand passes, the projection excluded, first to last."""

    def passes(node: Node) -> bool:
        return operand.base not in flow.behind(operand.node, lambda n: n is node)

    way = nodes_between(operand, operand.node, flow)
    yield from (n for n in way[1:] if isinstance(n.meta.get("val"), Tensor) and passes(n))


def _inputs_of_norm(operand: Operand, later: Operand, flow: DataFlow) -> Iterator[Node]:
    """Nodes between projection and base, nearest to the base first; one of them is what the norm reads."""
    way = nodes_between(operand, later.base, flow)
    yield from (n for n in reversed(way[:-1]) if isinstance(n.meta.get("val"), Tensor))
