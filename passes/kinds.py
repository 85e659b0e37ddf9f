"""Tell layers of one kind: attention sub-graphs that are the same but for the names and values of their weights.

A model of 32 layers has one or two kinds. What is expensive to find out (rotations and masks over thousands of
positions) is found out once per kind; every layer is still read and verified by itself.
"""

from __future__ import annotations

import hashlib

from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator
from mla_compile.passes.trace import Anchor, DataFlow

__all__ = ["kind_of"]


def kind_of(anchor: Anchor, flow: DataFlow, evaluator: GraphEvaluator) -> str:
    """Fingerprint of what lies between an anchor's output and its projections.

    Operators, literals, symbolic shapes and which value goes where are part of it, and so are the contents of buffers
    (tables, frequencies); of parameters only the shapes are, because layers differ in them.

    Args:
        anchor: The attention anchor.
        flow: Data flow of the graph.
        evaluator: Reads buffers.
    """
    numbers: dict[Node, int] = {}
    lines: list[str] = []
    stack = [anchor.output]
    while stack:
        node = stack.pop()
        if node in numbers:
            continue
        numbers[node] = len(numbers)
        if node.op == "call_function" and flow.projection(node) is None:
            stack.extend(reversed(node.all_input_nodes))
    for node, number in numbers.items():
        value = node.meta.get("val")
        shape = tuple(map(str, value.shape)) if isinstance(value, Tensor) else ""
        if node.op != "call_function":
            what = _leaf(node, flow, evaluator)
        elif flow.projection(node) is not None:
            what = "projection"
        else:
            renamed = {n: f"%{numbers[n]}" for n in node.all_input_nodes}
            what = f"{node.target}{_named(node.args, renamed)}{_named(tuple(sorted(node.kwargs.items())), renamed)}"
        lines.append(f"{number} {what} {shape}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _named(arguments: object, names: dict[Node, str]) -> object:
    if isinstance(arguments, Node):
        return names[arguments]
    if isinstance(arguments, tuple | list):
        return [_named(a, names) for a in arguments]
    return repr(arguments)


def _leaf(node: Node, flow: DataFlow, evaluator: GraphEvaluator) -> str:
    if node in flow.parameters:
        return "parameter"
    if node.name not in evaluator.constants:
        return f"{node.op} {node.target}"
    value = evaluator.constant(node)
    return f"buffer {hashlib.sha256(value.contiguous().cpu().numpy().tobytes()).hexdigest()}"
