"""Tables that token ids are looked up in without ``nn.Embedding`` are spelled like one, which passes look for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from mla_compile.program import Role, input_role

__all__ = ["has_other_tables", "spell_tables"]

_aten = torch.ops.aten
_SAME = frozenset({_aten._to_copy.default, _aten.clone.default, _aten.alias.default})
"""What makes no other ids of ids, and no other ones and zeros of ones and zeros."""
_PRODUCTS = frozenset({_aten.matmul.default, _aten.mm.default, _aten.bmm.default})
_INTEGERS = (torch.int32, torch.int64)


def has_other_tables(exported: ExportedProgram) -> bool:
    """Whether ids index a weight, or a product with their one-hot codes chooses its rows."""
    return any(True for _ in _lookups(exported))


def spell_tables(exported: ExportedProgram) -> None:
    """Write ``weight[ids]`` and ``one_hot(ids) @ weight`` as the rows of an embedding, which they are.

    Args:
        exported: The graph, which is changed.
    """
    for node, table, ids in [*_lookups(exported)]:
        node.target, node.args, node.kwargs = _aten.embedding.default, (table, ids), {}
    for node in reversed([*exported.graph.nodes]):
        if node.target in (_aten.one_hot.default, *_SAME) and not node.users:
            exported.graph.erase_node(node)
    exported.graph_module.recompile()


def _lookups(exported: ExportedProgram) -> Iterator[tuple[Node, Node, Node]]:
    """Every node that looks token ids up, with the table and the ids."""
    for node in exported.graph.nodes:
        arguments: Any = node.args
        if node.target is _aten.index.Tensor and len(arguments[1]) == 1:
            table, ids = arguments[0], arguments[1][0]
        elif node.target in _PRODUCTS:
            codes, table = _origin(arguments[0]), arguments[1]
            if codes.target is not _aten.one_hot.default or _rows(table) != codes.args[1]:
                continue
            ids = codes.args[0]
        else:
            continue
        if isinstance(ids, Node) and _is_tokens(exported, ids) and _rows(table) and _is_weight(exported, table):
            yield node, table, ids


def _origin(node: Node) -> Node:
    while node.target in _SAME:
        node = node.all_input_nodes[0]
    return node


def _rows(table: Node) -> int | None:
    """Rows of a matrix; None of what is none."""
    value = table.meta.get("val")
    return int(value.shape[0]) if isinstance(value, Tensor) and value.dim() == 2 else None


def _is_tokens(exported: ExportedProgram, ids: Node) -> bool:
    start = _origin(ids)
    given = start.op == "placeholder" and start.name in exported.graph_signature.user_inputs
    return given and ids.meta["val"].dtype in _INTEGERS and input_role(start.name, start.meta["val"]) == Role.TOKENS


def _is_weight(exported: ExportedProgram, table: Node) -> bool:
    """Whether it is made of parameters, and of nothing that a user gives."""
    seen, stack = set(), [table]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    starts = {node.name for node in seen if node.op == "placeholder"}
    signature = exported.graph_signature
    return bool(starts & {*signature.inputs_to_parameters}) and not starts & {*map(str, signature.user_inputs)}
