"""Einsums with an ellipsis are spelled with one letter per axis, which passes read."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

__all__ = ["has_ellipses", "spell_ellipses"]

_EINSUM = torch.ops.aten.einsum.default
_ELLIPSIS = "..."


def has_ellipses(exported: ExportedProgram) -> bool:
    """Whether an einsum leaves axes unnamed."""
    return any(True for _ in _unnamed(exported))


def spell_ellipses(exported: ExportedProgram) -> None:
    """Write a letter for every axis that an ellipsis stands for, the last axes alike in all operands.

    Args:
        exported: The graph, which is changed.
    """
    for node in _unnamed(exported):
        arguments: Any = node.args
        ranks = [operand.meta["val"].dim() for operand in arguments[1]]
        node.args = (_named(arguments[0], ranks), *arguments[1:])
    exported.graph_module.recompile()


def _unnamed(exported: ExportedProgram) -> Iterator[Node]:
    for node in exported.graph.find_nodes(op="call_function", target=_EINSUM):
        if _ELLIPSIS in str(node.args[0]):
            yield node


def _named(equation: str, ranks: list[int]) -> str:
    """The same equation without ellipses; an output that is not written is that of torch: what occurs once, sorted."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    counts = [
        rank - len(part.replace(_ELLIPSIS, "")) if _ELLIPSIS in part else 0
        for part, rank in zip(parts, ranks, strict=True)
    ]
    free = [c for c in string.ascii_letters if c not in equation][: max(counts)]
    if not arrow:
        letters = inputs.replace(",", "").replace(_ELLIPSIS, "")
        output = _ELLIPSIS + "".join(sorted(c for c in letters if letters.count(c) == 1))
    named = [
        part.replace(_ELLIPSIS, "".join(free[len(free) - count :])) for part, count in zip(parts, counts, strict=True)
    ]
    return f"{','.join(named)}->{output.replace(_ELLIPSIS, ''.join(free))}"
