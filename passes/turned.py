"""Read queries and keys of which something is done behind their rotation: norms, gains, factors of position.

Queries are not cached, so nothing about them need be understood: as the attention product reads them they are taken
from the graph, and turned back by the keys' rotation for an operator that turns them. A key's norm must commute with
its rotation, which an RMS norm over whole heads does; its gains need not, because they may be moved to the queries:
``(G R q) . (g R k) = (g G R q) . (R k)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import example_inputs
from mla_compile.passes.layout import token_axes
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.norm import nodes_between
from mla_compile.passes.probe import SHORT, Operand, exceeds, longest_length
from mla_compile.passes.trace import DataFlow
from mla_compile.program import Program
from mla_compile.site import Norm, Rope

__all__ = ["Unscaled", "as_read", "gains_turn", "looks_ahead", "scaled_by_place", "turn_back"]

_LONG, _LONG_WITH_WEIGHTS = 8192, 600
"""Length up to which queries are compared with those of a shorter sequence: made from projections, or with them."""


@dataclass(frozen=True)
class Unscaled(Operand):
    """Keys as a function of their projection, divided by what a norm and its gains multiply them with.

    Attributes:
        norm: The norm, with one group per head or one for all.
        gain: ``[H, D]`` factors behind it.
    """

    norm: Norm
    gain: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Map projection outputs ``[B, S, N]`` to ``[B, S, H, D]``; linear if the norm commutes with what follows."""
        squares = values.double()[..., torch.tensor(self.norm.groups)].square().mean(-1)
        return super().__call__(values) * (squares + self.norm.eps).sqrt().unsqueeze(-1) / self.gain


def as_read(operand: Operand, moves: frozenset[Any]) -> Operand:
    """Queries as a function of the nearest node to the product that has an axis of its own for the batch.

    Args:
        operand: The queries; their base is not looked at.
        moves: Operators that only move or repeat entries.

    Raises:
        MismatchError: There is none.
    """
    node: Any = operand.node
    while True:
        try:
            token_axes(operand.sizes, node.meta["val"].shape)
        except MismatchError:
            if node.op != "call_function" or node.target not in moves:
                raise
            node = node.args[0]
        else:
            return replace(operand, base=node)


def scaled_by_place(operand: Operand, flow: DataFlow) -> bool:
    """Whether one number per position joins the operand behind its base, which may act only far beyond any probe."""

    def one_per_place(node: Node) -> bool:
        value = node.meta.get("val")
        if node in flow.hidden or not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        shape: list[Any] = list(value.shape)
        symbols = [d.node.expr for d in shape if not isinstance(d, int)]
        return operand.sizes.length in symbols and all(d == 1 for d in shape if isinstance(d, int))

    return any(one_per_place(i) for n in nodes_between(operand, operand.node, flow) for i in n.all_input_nodes)


def looks_ahead(given: Operand, activation: Node, projected: bool) -> bool:
    """Whether an activation at one position depends on how many tokens follow, or on what they are.

    Such queries cannot be made piece by piece, and what they do to a long sequence a short run does not show.

    Args:
        given: The queries with the node behind them as their base that is given random values.
        activation: What is made from it.
        projected: Whether that node is the projection; else its products with weights are evaluated too.
    """
    long, program, sizes = _LONG if projected else _LONG_WITH_WEIGHTS, given.evaluator.program, given.sizes
    if sizes.fixed:
        return False  # nothing is made piece by piece where there is one length only
    alone = isinstance(program, Program) and not program.reads_another
    values = torch.randn(1, long, given.width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    inputs = example_inputs(program, 1, long, sizes=sizes)
    read = replace(given, base=activation)

    def made(length: int) -> Tensor:
        given_inputs = {name: value[:, :length] for name, value in inputs.items()}
        if not alone:
            given_inputs = example_inputs(program, 1, length, sizes=sizes)
        (got,) = given.evaluator.run([activation], {given.base: given.place(values[:, :length])}, given_inputs)
        return read.flatten(got, 1, length)

    whole = made(longest_length(given.evaluator, sizes, made, long))[:, :SHORT]
    return exceeds(whole - made(SHORT), 1e-9 * float(whole.abs().max()))


def gains_turn(gain: Tensor, rope: Rope) -> bool:
    """Whether gains ``[H, D]`` are equal within every rotating pair, so that they commute with the rotation."""
    return all(torch.allclose(gain[:, a], gain[:, b], rtol=1e-9, atol=0.0) for a, b in rope.pairs)


def turn_back(heads: Tensor, rope: Rope) -> Tensor:
    """Undo the rotation of ``[B, S, H, D]`` at positions from 0, in float64."""
    angle = torch.outer(
        torch.arange(heads.shape[1], dtype=torch.float64), torch.tensor(rope.inv_freq, dtype=torch.float64)
    )[None, :, None]
    first, second = ([pair[i] for pair in rope.pairs] for i in (0, 1))
    cos, sin, a, b = angle.cos(), angle.sin(), heads[..., first], heads[..., second]
    result = heads.clone()
    result[..., first], result[..., second] = a * cos + b * sin, b * cos - a * sin
    return result
