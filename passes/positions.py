"""Derive from the positions whatever in a graph still counts from zero: aranges, tables, sines, anything in between.

What the activations take from the places of tokens enters them at a few borders: values with a length axis that depend
on no token. Where a count can simply be replaced by the positions (an embedding of ``arange(length)``), it is. Where
axes stand in the way, the value is made for all tokens so far and the rows of the new tokens are looked up in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from mla_compile.errors import RefusedError
from mla_compile.passes.evaluate import GraphEvaluator, example_inputs
from mla_compile.passes.layout import Sizes
from mla_compile.passes.probe import longest_length
from mla_compile.passes.trace import DataFlow, blank_activations, upstream
from mla_compile.program import Program

__all__ = ["repair_positions"]

_aten = torch.ops.aten
_LONG_COUNT = 8192
"""Length up to which a count is followed."""
_BATCH, _LENGTH = 2, 7
"""Sizes a replacement is tried with."""


@dataclass(frozen=True)
class _Border:
    """Where places enter the activations.

    Attributes:
        node: A value that depends on places and not on tokens (original graph).
        user: An activation computed from it (original graph).
        counters: Counts the value is made from.
    """

    node: Node
    user: Node
    counters: tuple[str, ...]


def repair_positions(program: Program, graph: fx.Graph, position_ids: Node, attention_mask: Node) -> None:
    """Make a rewritten graph take places from its inputs.

    Args:
        program: The original.
        graph: The graph that is being rewritten; dead nodes are gone.
        position_ids: Its input ``[B, S]``.
        attention_mask: Its input ``[B, P + S]``.

    Raises:
        RefusedError: A value depends on places in a way that is not understood.
    """
    evaluator, flow, sizes = GraphEvaluator(program), DataFlow(program), Sizes.of(program)
    alive = {n.name: n for n in graph.nodes}
    counters = _counters(program, evaluator, flow, alive)
    borders = _borders(evaluator, flow, sizes, alive, counters)
    tables: dict[Node, Node] = {}
    for border in borders:
        if border.counters and _counting_suffices(evaluator, border):
            continue
        table = _table(evaluator, flow, sizes, border)
        _look_up(graph, alive, evaluator.nodes, sizes, border, table, (position_ids, attention_mask), tables)
    for name, first in counters.items():
        node = alive[name]
        with graph.inserting_after(node):
            shifted = graph.call_function(_aten.add.Scalar, (position_ids, first)) if first else position_ids
        # Members of the same chain are replaced in their own turn; what makes tables goes on counting.
        replaced = {u for u in node.users if u is not shifted and u.name not in counters and u.name in evaluator.nodes}
        node.replace_all_uses_with(shifted, delete_user_cb=replaced.__contains__)


def _sizes(evaluator: GraphEvaluator) -> Sizes:
    assert isinstance(evaluator.program, Program)
    return Sizes.of(evaluator.program)


def _borders(
    evaluator: GraphEvaluator, flow: DataFlow, sizes: Sizes, alive: Mapping[str, Node], counters: Mapping[str, int]
) -> list[_Border]:
    found = []
    for node in evaluator.graph.nodes:
        value = node.meta.get("val")
        if node.name not in alive or node in flow.hidden or node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if not _length_axes(sizes, value) or node in flow.tokens:
            continue
        behind = _behind(node)
        mine = tuple(n.name for n in behind if n.name in counters)
        if not mine and any(n.op == "placeholder" and n.name not in evaluator.constants for n in behind):
            continue  # made from an input of the user, who gives it for the new tokens
        users = [u for u in node.users if u in flow.hidden and u.name in alive]
        found += [_Border(node, user, mine) for user in users]
    return found


def _behind(node: Node) -> set[Node]:
    """Everything a value is made from, sizes of tensors excepted."""
    return {n for n in _with_sizes(node) if n.target is not _aten.sym_size.int}


def _length_axes(sizes: Sizes, value: Tensor) -> list[int]:
    return [i for i, d in enumerate(value.shape) if not isinstance(d, int) and d.node.expr == sizes.length]


def _counting_suffices(evaluator: GraphEvaluator, border: _Border) -> bool:
    """Whether the user gets the same when every count is given once per sequence."""
    inputs = example_inputs(evaluator.program, _BATCH, _LENGTH)
    counts = [evaluator.nodes[name] for name in border.counters]
    try:
        values = evaluator.run([*counts, border.node], {}, inputs)
        lifted = {n: v.expand(_BATCH, _LENGTH) for n, v in zip(counts, values, strict=False)}
        (got,) = evaluator.run([border.node], lifted, inputs)
    except (RuntimeError, IndexError):
        return False
    return _same_for_user(evaluator, border, values[-1], got)


def _same_for_user(evaluator: GraphEvaluator, border: _Border, value: Tensor, replacement: Tensor) -> bool:
    """Whether a border's user computes the same from a replacement, on random activations."""
    inputs = example_inputs(evaluator.program, _BATCH, _LENGTH)
    sizes, generator = _sizes(evaluator), torch.Generator().manual_seed(3)
    overrides: dict[Node, Tensor] = {}
    for other in border.user.all_input_nodes:
        seen = other.meta.get("val")
        if other is not border.node and isinstance(seen, Tensor) and seen.is_floating_point():
            shape = sizes.bind(seen.shape, _BATCH, _LENGTH)
            overrides[other] = torch.randn(shape, generator=generator, dtype=torch.float64)
    try:
        results = [evaluator.run([border.user], {**overrides, border.node: v}, inputs)[0] for v in (value, replacement)]
    except (RuntimeError, IndexError, TypeError):
        return False
    return results[0].shape == results[1].shape and torch.equal(results[0], results[1])


@dataclass(frozen=True)
class _Table:
    """A value as a table of places: its length axis, and how it is arranged for its user.

    Attributes:
        axis: The length axis.
        shape: The value's symbolic shape.
        batch: The user's batch axis.
        rank: The user's rank.
    """

    axis: int
    shape: tuple[Any, ...]
    batch: int
    rank: int

    def steps(self) -> tuple[list[int], list[int], list[int]]:
        """How rows ``[B, S, rest...]`` become a value for the user.

        Returns:
            Axes to drop (from the last), the permutation of what is left, and places for new axes of size 1.
        """
        pad = self.rank - len(self.shape)
        rest = [i for i in range(len(self.shape)) if i != self.axis]
        names: list[Any] = ["B", "S", *rest]
        dropped = [k for k, name in enumerate(names) if name == self.batch - pad and name != "S"]
        left = [name for k, name in enumerate(names) if k not in dropped]
        wanted: list[Any] = [
            "B" if i == self.batch else None if i < pad else "S" if i - pad == self.axis else i - pad
            for i in range(self.rank)
        ]
        order = [left.index(name) for name in wanted if name is not None]
        return dropped[::-1], order, [i for i, name in enumerate(wanted) if name is None]

    def arrange(self, rows: Tensor) -> Tensor:
        """Apply :meth:`steps` to a tensor."""
        dropped, order, added = self.steps()
        for axis in dropped:
            rows = rows.select(axis, 0)
        rows = rows.permute(order)
        for axis in added:
            rows = rows.unsqueeze(axis)
        return rows


def _table(evaluator: GraphEvaluator, flow: DataFlow, sizes: Sizes, border: _Border) -> _Table:
    """Describe a border's value as a table of places.

    Raises:
        RefusedError: A place's entry depends on how many places there are, or its user reads more than one place.
    """
    value, user = border.node.meta["val"], border.user.meta["val"]
    axes = _length_axes(sizes, value)
    batches = [i for i, d in enumerate(user.shape) if not isinstance(d, int) and d.node.expr == sizes.batch]
    fits = len(axes) == 1 and len(batches) == 1 and user.dim() >= value.dim()
    made_by_user = any(n.op == "placeholder" and n.name not in evaluator.constants for n in _behind(border.node))
    if fits and not made_by_user:
        table = _Table(axes[0], tuple(value.shape), batches[0], user.dim())
        place = table.batch - (table.rank - len(table.shape))
        size = 1 if place < 0 else table.shape[place]
        if size == 1 or (not isinstance(size, int) and size.node.expr == sizes.batch):
            try:
                if _is_table(evaluator, border, table):
                    return table
            except (RuntimeError, IndexError):
                pass
    raise RefusedError(
        f"Positions are counted at '{border.node.name}' and used at '{border.user.name}' in a way that is not "
        "understood.",
        "Index a table of positions, or add positions to a batch of them, in the model instead.",
    )


def _is_table(evaluator: GraphEvaluator, border: _Border, table: _Table) -> bool:
    def made(length: int) -> Tensor:
        (value,) = evaluator.run([border.node], {}, example_inputs(evaluator.program, _BATCH, length))
        return value.movedim(table.axis, 0)

    long = made(longest_length(evaluator, _sizes(evaluator), made, _LONG_COUNT))
    short = made(_LENGTH)
    if not torch.equal(long[:_LENGTH], short) or not torch.equal(long[:12], made(12)):
        return False
    places = torch.arange(_LENGTH).expand(_BATCH, _LENGTH)
    return _same_for_user(evaluator, border, short.movedim(0, table.axis), table.arrange(short[places]))


def _look_up(
    graph: fx.Graph,
    alive: Mapping[str, Node],
    originals: Mapping[str, Node],
    sizes: Sizes,
    border: _Border,
    table: _Table,
    inputs: tuple[Node, Node],
    tables: dict[Node, Node],
) -> None:
    """Give the border's user the rows of the new tokens' positions, from a table of all tokens so far."""
    position_ids, attention_mask = inputs
    user = alive[border.user.name]
    with graph.inserting_before(alive[border.node.name]):
        total = graph.call_function(_aten.sym_size.int, (attention_mask, 1))
    with graph.inserting_before(user):
        if border.node not in tables:
            copies: dict[Node, Node] = {}
            behind = _with_sizes(alive[border.node.name])
            for live in [n for n in graph.nodes if n in behind]:
                size = originals[live.name].meta["val"] if live.target is _aten.sym_size.int else None
                if live.op != "call_function" or isinstance(size, int):
                    copies[live] = live
                elif size is not None:
                    copies[live] = total if size.node.expr == sizes.length else live
                else:
                    copies[live] = graph.node_copy(live, copies.__getitem__)
            made = copies[alive[border.node.name]]
            front = [table.axis, *(i for i in range(len(table.shape)) if i != table.axis)]
            made = graph.call_function(_aten.permute.default, (made, front)) if table.axis else made
            tables[border.node] = graph.call_function(_aten.index.Tensor, (made, [position_ids]))
        rows = tables[border.node]
        dropped, order, added = table.steps()
        for axis in dropped:
            rows = graph.call_function(_aten.select.int, (rows, axis, 0))
        if order != sorted(order):
            rows = graph.call_function(_aten.permute.default, (rows, order))
        for axis in added:
            rows = graph.call_function(_aten.unsqueeze.default, (rows, axis))
    user.replace_input_with(alive[border.node.name], rows)


def _with_sizes(node: Node) -> set[Node]:
    """Everything a value is made from, sizes included, but not what they are sizes of."""
    return upstream([node], lambda n: n.target is _aten.sym_size.int)


def _counters(program: Program, evaluator: GraphEvaluator, flow: DataFlow, alive: Mapping[str, Node]) -> dict[str, int]:
    """Live integer nodes that evaluate to ``c + arange(length)``, and their ``c``."""
    found: dict[str, int] = {}
    sizes = _sizes(evaluator)
    for node in evaluator.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op != "call_function"
            or node.name not in alive
            or node in flow.hidden
            or not isinstance(value, Tensor)
            or value.is_floating_point()
            or value.is_complex()
            or value.dtype == torch.bool
            or not 1 <= value.dim() <= 2
            or isinstance(value.shape[-1], int)
        ):
            continue

        def start(length: int, node: Node = node) -> int | None:
            given = blank_activations(flow, node, lambda shape: sizes.bind(shape, 2, length))
            return _start(evaluator.run([node], given, example_inputs(program, 2, length))[0], length)

        # The long one tells a count from one that stops or starts anew (a clamp, a remainder).
        try:
            starts = {start(length) for length in (7, 12, longest_length(evaluator, sizes, start, _LONG_COUNT))}
        except (RuntimeError, IndexError, TypeError):
            continue  # made in pieces of a fixed size, or of a size in the data: it counts places inside, if anything
        if len(starts) == 1 and (first := starts.pop()) is not None:
            found[node.name] = first
    return found


def _start(values: Tensor, length: int) -> int | None:
    """The ``c`` for which values are ``c + arange(length)``, if there is one."""
    if values.shape[-1] != length:
        return None
    first = (values - torch.arange(length)).unique()
    return int(first[0]) if len(first) == 1 else None
