"""Look for what changes queries, keys or values only beyond the lengths at which they are looked at.

Rotations that slow down in sequences longer than trained on, or factors that grow from a far position on, do nothing in
a sequence of thousands of tokens. They enter an operand by values that are no activations: a few numbers per sequence,
or one per position, which are cheap to make for a million tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import example_inputs
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.norm import nodes_between
from mla_compile.passes.probe import Operand
from mla_compile.passes.trace import DataFlow, blank_activations, upstream
from mla_compile.site import RejectCode

__all__ = ["require_same_far"]

_SIZE = torch.ops.aten.sym_size.int
_SHOWN, _FAR = 8192, (16_384, 131_072, 1_048_576)
"""Length up to which operands are followed, and those at which the few numbers are looked at again."""
_FEW, _MOST = 4096, 2**24
"""Numbers per sequence that are few, and numbers that one step may make."""


def require_same_far(operand: Operand, flow: DataFlow, remade: Iterable[Node] | None = None) -> None:
    """Check that no number which joins an operand behind its base, and looks constant, changes far away.

    Args:
        operand: Queries, keys or values.
        flow: Data flow of the graph.
        remade: Activations that are made anew at every position, so that only the length must not change them; None
            for those between the operand and its base, which must not change with the position either.

    Raises:
        MismatchError: One changes with the length (``POSITION_MIXING``), or with the position (``ROPE``).
    """
    limit = operand.evaluator.program.max_positions or _FAR[-1]
    if operand.sizes.fixed or limit <= _SHOWN:
        return
    between = nodes_between(operand, operand.node, flow) if remade is None else [*remade]
    borders = _borders(operand, flow, between)
    near, shown = (_values(operand, flow, borders, length) for length in (operand.sizes.short, _SHOWN))
    for length in sorted({min(far, limit) for far in _FAR}):
        far = _values(operand, flow, borders, length)
        for node in borders:
            if node not in near or node not in shown or node not in far or not _steady(near[node], shown[node]):
                continue
            where = f"between {_SHOWN} and {length} tokens, at '{node.name}'"
            if not _same(shown[node], far[node]):
                raise MismatchError(RejectCode.POSITION_MIXING, f"the {operand.role} changes with the length {where}")
            if remade is None and not _steady(near[node], far[node]):
                raise MismatchError(RejectCode.ROPE, f"the {operand.role} is changed by position {where}")


def _borders(operand: Operand, flow: DataFlow, between: Sequence[Node]) -> list[Node]:
    """Few numbers per sequence that join values with a length, and one per position that joins wider values."""
    starts = {i for n in between for i in n.all_input_nodes if i not in flow.hidden}
    behind = upstream(starts, lambda n: n.target is _SIZE or n in flow.hidden)

    def lengths(node: Node) -> int | None:
        """Length axes of a node with few numbers beside them; None of any other."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node in flow.hidden:
            return None
        rest = [d for d in value.shape if isinstance(d, int) or d.node.expr != operand.sizes.length]
        few = all(isinstance(d, int) or d.node.expr == operand.sizes.batch for d in rest)
        count = math.prod(d for d in rest if isinstance(d, int))
        axes = len(value.shape) - len(rest)
        return axes if few and axes <= 1 and count <= (1 if axes else _FEW) else None

    def joins(node: Node) -> bool:
        own = lengths(node)
        users = [u for u in node.users if u in behind or u in between]
        return own is not None and node not in flow.static and any(lengths(u) not in (0, own) for u in users)

    return [n for n in operand.evaluator.graph.nodes if n in behind and joins(n)]


def _values(operand: Operand, flow: DataFlow, nodes: Sequence[Node], length: int) -> dict[Node, Tensor]:
    """Values of nodes ``[numbers]`` for a length, in float64, of those that can be made at little cost."""
    sizes, evaluator, found = operand.sizes, operand.evaluator, {}
    inputs = example_inputs(evaluator.program, 1, length, sizes=sizes)
    for node in nodes:
        behind = upstream([node], lambda n: n.target is _SIZE or n in flow.hidden)
        given = blank_activations(flow, node, lambda shape: sizes.bind(shape, 1, length))
        tensors = [n.meta["val"] for n in behind - given.keys() if isinstance(n.meta.get("val"), Tensor)]
        if any(math.prod(sizes.bind(value.shape, 1, length)) > _MOST for value in tensors):
            continue
        try:
            (value,) = evaluator.run([node], given, inputs)
        except (RuntimeError, IndexError):
            continue  # a table ends before
        found[node] = value.double().flatten()
    return found


def _same(shown: Tensor, far: Tensor) -> bool:
    """Whether numbers of a longer sequence begin with those of a shorter one."""
    return torch.allclose(shown, far[: len(shown)], rtol=1e-9, atol=0.0)


def _steady(near: Tensor, far: Tensor) -> bool:
    """Whether numbers of a short sequence are those of a longer one, and go on in equal steps where it has more."""
    if not _same(near, far):
        return False
    if len(far) == len(near):
        return True
    line = far[0] + (far[1] - far[0]) * torch.arange(len(far), dtype=torch.float64)
    return torch.allclose(line, far, rtol=1e-9, atol=1e-9)
