"""Tell layers of one kind: attention sub-graphs that are the same but for the names and values of their weights.

A model of 32 layers has one or two kinds. What is expensive to find out (rotations and masks over thousands of
positions) is found out once per kind; every layer is still read and verified by itself.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator
from mla_compile.passes.trace import Anchor, DataFlow, beside_scores, upstream

__all__ = ["kind_of"]


def kind_of(anchor: Anchor, flow: DataFlow, evaluator: GraphEvaluator) -> str:
    """Fingerprint of what lies between an anchor's output and its projections.

    Operators, literals, symbolic shapes and which value goes where are part of it, and so are the contents of buffers
    (tables, frequencies) and of parameters that decide what is hidden (a window); of other parameters only the shapes
    are, because layers differ in them.

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
    told = _told(anchor, flow)
    for node, number in numbers.items():
        value = node.meta.get("val")
        shape = tuple(map(str, value.shape)) if isinstance(value, Tensor) else ""
        if node.op != "call_function":
            what = _leaf(node, flow, evaluator, told)
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


def _told(anchor: Anchor, flow: DataFlow) -> set[Node]:
    """What the yes or no of a mask is made of, and single numbers beside the scores."""
    beside = beside_scores(anchor) - flow.hidden
    flags: set[Node] = set()
    single: set[Node] = set()
    for node in beside:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            flags |= {node} if value.dtype == torch.bool else set()
            single |= {node} if all(isinstance(n, int) and n == 1 for n in value.shape) else set()
    return upstream(flags, among=beside) | single


def _leaf(node: Node, flow: DataFlow, evaluator: GraphEvaluator, told: set[Node]) -> str:
    if node in flow.parameters and node not in told:
        return "parameter"
    if node.name not in evaluator.constants:
        return f"{node.op} {node.target}"
    value = evaluator.constant(node)
    return f"buffer {hashlib.sha256(value.detach().contiguous().cpu().numpy().tobytes()).hexdigest()}"
