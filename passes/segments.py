"""Cut a graph between its attention layers, where little passes from one part to the next.

A part, a *segment*, reads weights of its own, the model's inputs, and the few values that the parts before it hand on;
so one can be run after another with the weights of one at a time in memory
(:mod:`~mla_compile.passes.layerwise`). Nothing is known of blocks or residual streams: of all places between two layers
that one is taken where the fewest numbers are alive. What does not depend on which tokens are given (position tables,
masks) is not handed on but computed by every segment that needs it.

Any graph can be cut anywhere. A model without a narrow place only hands on more.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx import Node

from mla_compile.passes.trace import SHAPE_ONLY, upstream

__all__ = ["Mark", "Segment", "cut_graph", "downstream", "value_bytes"]

_ASSUMED = (1, 64)
"""Batch and length that places to cut are compared at."""
_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Mark:
    """A layer: graphs are cut between two of them.

    Attributes:
        node: Name of a node of the layer.
        together: Names of nodes behind it whose values its segment must have, computed or handed on.
    """

    node: str
    together: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A part of a graph that can be run by itself.

    Attributes:
        nodes: What it computes, in order, and the inputs and weights it is given.
        reads: What earlier segments hand on to it.
        writes: What it hands on to later ones.
        results: Nodes whose values are wanted of it, computed or read.
        frees: What is not needed any more after each node.
    """

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    writes: tuple[Node, ...]
    results: tuple[Node, ...]
    frees: Mapping[Node, tuple[Node, ...]]

    @property
    def weights(self) -> tuple[Node, ...]:
        """Weights and constants it is given."""
        return tuple(n for n in self.nodes if n.op == "get_attr")


def cut_graph(graph: fx.Graph, tokens: str, wanted: Sequence[str], marks: Sequence[Mark]) -> tuple[Segment, ...]:
    """Cut a graph in front of every mark, and behind the last.

    Args:
        graph: Of a module whose weights are attributes and whose inputs are placeholders.
        tokens: Placeholder of the token ids; activations are what depends on their content.
        wanted: Nodes whose values are wanted; what none of them depends on is left out.
        marks: Layers in order; none for one segment.

    Returns:
        The segments in order.
    """
    nodes = {n.name: n for n in graph.nodes}
    needed = upstream(nodes[name] for name in wanted)
    order = [n for n in graph.nodes if n in needed]
    content = _content(order, nodes[tokens])
    own = [n for n in order if n in content]
    place = {n: i for i, n in enumerate(own)}
    until = {n: max((place[u] for u in n.users if u in place), default=place[n]) for n in own}
    at: dict[int, list[Node]] = {}
    for mark in marks:
        at.setdefault(place[nodes[mark.node]], []).extend(nodes[name] for name in mark.together)
    for position, together in at.items():
        for node in together:
            until[node] = max(until[node], position)
    starts = [0, *_narrowest(own, until, sorted(at), nodes[tokens]), len(own)]

    bound = {n for together in at.values() for n in together}
    alone = {nodes[name] for name in wanted} - bound
    segments = []
    for begin, end in itertools.pairwise(starts):
        part = own[begin:end]
        reads = [n for n in own[:begin] if until[n] >= begin and _is_read(n, part, at, begin, end)]
        inside = upstream(part, functools.partial(_is_before, place, begin))
        found = [n for n in order if n in inside and place.get(n, begin) >= begin]
        writes = [n for n in part if until[n] >= end]
        with_marks = {n for position, together in at.items() if begin <= position < end for n in together}
        asked = [n for n in (*reads, *part) if n in with_marks or (n in alone and place[n] >= begin)]
        segments.append(
            Segment(tuple(found), tuple(reads), tuple(writes), tuple(asked), _frees(found, reads, {*writes, *asked}))
        )
    return tuple(segments)


def _is_read(node: Node, part: Sequence[Node], at: Mapping[int, Sequence[Node]], begin: int, end: int) -> bool:
    members = {*part}
    if any(u in members for u in node.users):
        return True
    return any(node in together for position, together in at.items() if begin <= position < end)


def _narrowest(own: Sequence[Node], until: Mapping[Node, int], marks: Sequence[int], tokens: Node) -> list[int]:
    """The place in front of every mark, and behind the last one, at which the fewest numbers are alive."""
    if not marks:
        return []
    change = [[0, 0] for _ in range(len(own) + 1)]  # values of unknown size come first
    for i, node in enumerate(own):
        size = _elements(node, tokens, *_ASSUMED)
        for step, sign in ((i + 1, 1), (until[node] + 1, -1)):
            change[step][0] += sign * (size is None)
            change[step][1] += sign * (size or 0)
    alive, total = [], [0, 0]
    for unknown, size in change:
        total = [total[0] + unknown, total[1] + size]
        alive.append(tuple(total))
    cuts = []
    for before, mark in zip([0, *marks], [*marks, len(own) - 1], strict=True):
        candidates = range(before + 1, mark + 1)
        if candidates:
            cuts.append(min(reversed(candidates), key=alive.__getitem__))  # the last of equals: layers stay whole
    return cuts


def _frees(found: Sequence[Node], reads: Sequence[Node], keep: set[Node]) -> dict[Node, tuple[Node, ...]]:
    last: dict[Node, Node] = {}
    for node in found:
        for read in node.all_input_nodes:
            last[read] = node
    freed: dict[Node, list[Node]] = {}
    for node in (*found, *reads):
        if node not in keep and node.op != "get_attr" and node in last:
            freed.setdefault(last[node], []).append(node)
    return {node: tuple(dead) for node, dead in freed.items()}


def _content(order: Iterable[Node], tokens: Node) -> set[Node]:
    """What depends on which tokens are given, and not only on how many."""
    found: set[Node] = set()
    for node in order:
        shape_only = node.target is _SIZE or node.target in SHAPE_ONLY
        if any(i in found or (i is tokens and not shape_only) for i in node.all_input_nodes):
            found.add(node)
    return found


def downstream(graph: fx.Graph, sources: Iterable[str]) -> set[str]:
    """Names of all nodes that depend on some, themselves included."""
    found = {*sources}
    for node in graph.nodes:
        if any(i.name in found for i in node.all_input_nodes):
            found.add(node.name)
    return found


def _is_before(place: Mapping[Node, int], begin: int, node: Node) -> bool:
    return place.get(node, begin) < begin


def value_bytes(node: Node, tokens: Node, batch: int, length: int) -> int:
    """Memory of a node's value for so many sequences of so many tokens; 0 where its shape is not known.

    Args:
        node: Any node.
        tokens: Placeholder of the token ids ``[batch, length]`` of the same graph.
        batch: How many sequences.
        length: Tokens of each.
    """
    value = node.meta.get("val")
    size = 0
    if isinstance(value, Tensor):  # narrow types are computed in float32
        size = max(value.element_size(), 4) if value.is_floating_point() else value.element_size()
    return (_elements(node, tokens, batch, length) or 0) * size


def _elements(node: Node, tokens: Node, batch: int, length: int) -> int | None:
    """Numbers in a node's value; None where nothing is known of it, 1 where it is one number."""
    value = node.meta.get("val")
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return 1
    expressions = [size if isinstance(size, int) else size.node.expr for size in value.shape]
    long = tokens.meta["val"].shape[1].node.expr
    bound = {s: length if s == long else batch for e in expressions for s in getattr(e, "free_symbols", ())}
    return math.prod(e if isinstance(e, int) else int(e.subs(bound)) for e in expressions)
