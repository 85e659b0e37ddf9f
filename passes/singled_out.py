"""Token ids that a graph treats unlike others: what a check on random ids would hardly ever meet.

A separator behind which positions are counted anew, or an id whose rows of a table are unlike those around them, turns
something on that is off for almost all random text.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.program import Program

__all__ = ["singled_out"]

_aten = torch.ops.aten
_MOST = 16
"""Ids that are told."""
_FEW = 64
"""Numbers in a constant that names ids itself; a larger one is looked up by them."""
_VALUES = 8
"""Different numbers in a table that is looked up, of each of which one id is told."""
_ORDERS = frozenset(
    {
        _aten.lt,
        _aten.le,
        _aten.gt,
        _aten.ge,
        _aten.clamp,
        _aten.clamp_min,
        _aten.clamp_max,
        _aten.floor_divide,
        _aten.bucketize,
    }
)
"""Operators at whose number ids fall on two sides: those beside it are told too."""


def singled_out(program: Program) -> tuple[int, ...]:
    """Find ids that a graph compares ids with, and ids whose entries in a table are rare.

    Args:
        program: The original.

    Returns:
        Ids that the model reads, each once, in the order of the graph; no more than sixteen.
    """
    known = program.known_tokens
    found: dict[int, None] = {}
    for node in _of_ids(program):
        around = (-1, 0, 1) if getattr(node.target, "overloadpacket", None) in _ORDERS else (0,)
        found |= {int(number) + step: None for number in _numbers(node, program) for step in around}
    return tuple([number for number in found if 0 <= number < known][:_MOST])


def _of_ids(program: Program) -> Iterator[Node]:
    """Operators on ids, and on what is computed of them, as far as it is no activation."""
    of_ids = {program.tokens}
    for node in program.exported.graph.nodes:
        if node.op != "call_function" or not any(n.name in of_ids for n in node.all_input_nodes):
            continue
        yield node
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not (value.is_floating_point() and value.dim() > 2):
            of_ids.add(node.name)


def _numbers(node: Node, program: Program) -> Iterator[float]:
    """Whole numbers that an operator on ids is given."""
    constants = [n for n in node.all_input_nodes if n.op == "placeholder" and n.name not in program.user_inputs]
    for constant in constants:
        value = program.constant(constant.name).detach()
        if value.numel() <= _FEW:
            yield from _whole(value)
        elif not value.is_floating_point() and value.numel() == max(value.shape):
            yield from _first_of_each(value.flatten())
    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, int | float) and not isinstance(argument, bool):
            yield from _whole(torch.tensor(argument, dtype=torch.float64))


def _whole(value: Tensor) -> Iterator[float]:
    numbers = value.flatten().double()
    yield from numbers[numbers.isfinite() & (numbers == numbers.round())].tolist()


def _first_of_each(table: Tensor) -> Iterator[float]:
    """The first id of each of the rarest numbers in a table."""
    values, counts = table.unique(return_counts=True)
    for value in values[counts.argsort()][:_VALUES]:
        yield float((table == value).nonzero()[0, 0])
