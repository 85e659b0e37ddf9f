"""Which axis of a tensor is which: batch, heads, positions and channels, however an author ordered or merged them.

Axes are named by letters: ``b`` batch, ``h`` heads (several when query heads are grouped), ``s`` query positions, ``t``
key positions, ``d`` channels; ``bh`` is batch and heads merged into one axis. Symbolic sizes tell batch and positions
apart from heads and channels; a product's own rule tells the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.mismatch import MismatchError
from mla_compile.program import Program
from mla_compile.site import RejectCode

__all__ = ["Layout", "Sizes", "attended_layout", "fused_layout", "per_token", "score_layouts", "token_axes"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Sizes:
    """The symbolic batch and length of a program, to recognise them in shapes.

    Attributes:
        batch: Symbol of the batch size.
        length: Symbol of the sequence length.
    """

    batch: Any
    length: Any

    @classmethod
    def of(cls, program: Program) -> Sizes:
        """Read the symbols from the token input."""
        tokens = next(n for n in program.exported.graph.nodes if n.name == program.tokens)
        return cls(*(_expression(d) for d in tokens.meta["val"].shape))

    def bind(self, shape: Sequence[Any], batch: int, length: int) -> list[int]:
        """Evaluate a symbolic shape for a given batch and length."""
        symbols = {self.batch: batch, self.length: length}
        return [d if isinstance(d, int) else int(d.node.expr.subs(symbols)) for d in shape]

    def leading(self, shape: Sequence[Any]) -> tuple[str, ...]:
        """Name the axes before positions and channels.

        Raises:
            MismatchError: An axis is neither batch, heads, nor both merged.
        """
        names = []
        for size in shape:
            expression = _expression(size)
            if expression == self.batch and "b" not in names:
                names.append("b")
            elif isinstance(size, int):
                names.append("h")
            elif getattr(expression / self.batch, "is_integer", False) and (expression / self.batch).is_number:
                names.append("bh")
            else:
                raise MismatchError(
                    RejectCode.LAYOUT, f"an axis of size '{size}' is neither the batch nor heads in {_shown(shape)}"
                )
        return tuple(names)


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of a tensor's axes.

    Attributes:
        axes: One name per axis.
    """

    axes: tuple[str, ...]

    def arrange(self, x: Tensor, order: str, batch: int) -> Tensor:
        """Bring a tensor to a plain order with one axis per letter, e.g. ``bshd``.

        Args:
            x: A tensor in this layout.
            order: The wanted letters; heads on several axes are flattened, missing ones become size 1.
            batch: The batch size, to split a merged axis.
        """
        axes = list(self.axes)
        if "bh" in axes:
            place = axes.index("bh")
            x = x.unflatten(place, (batch, x.shape[place] // batch))
            axes[place : place + 1] = ["b", "h"]
        for letter in order:
            if letter not in axes:
                x, axes = x.unsqueeze(0), [letter, *axes]
        places = [[i for i, a in enumerate(axes) if a == letter] for letter in order]
        sizes = [math.prod(x.shape[i] for i in group) for group in places]
        return x.permute([i for group in places for i in group]).reshape(sizes)

    def place(self, x: Tensor, order: str, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`arrange`: from a plain order to this layout's shape."""
        split = [[size for size, axis in zip(shape, self.axes, strict=True) if axis == letter] for letter in order]
        if "bh" in self.axes:
            split = [[x.shape[i]] if letter in "bh" else split[i] for i, letter in enumerate(order)]
        x = x.reshape([size for group in split for size in group])
        return x.permute(self.permutation(order)).reshape(list(shape))

    def permutation(self, order: str) -> list[int]:
        """Which axis of a plain order, its heads split as here, stands at each place of this layout."""
        axes = [letter for axis in self.axes for letter in axis]  # "bh" is b, then h
        named: list[tuple[str, int]] = []
        for axis in axes:
            named.append((axis, sum(1 for a, _ in named if a == axis)))
        plain = [(letter, k) for letter in order for k in range(axes.count(letter))]
        return [plain.index(name) for name in named]


def _expression(size: Any) -> Any:  # noqa: ANN401 - int or sympy expression
    return size if isinstance(size, int) else size.node.expr


def _shown(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def token_axes(sizes: Sizes, shape: Sequence[Any]) -> tuple[str, ...]:
    """Name the axes of an activation with one entry per token: ``b s d...``, ``s b d...``, or ``bs d`` merged.

    Raises:
        MismatchError: Batch and length are not found, or not each once.
    """
    expressions = [_expression(d) for d in shape]
    if len(shape) >= 2 and expressions[0] == sizes.batch * sizes.length:
        names = ["bs"]
    else:
        names = ["b" if e == sizes.batch else "s" if e == sizes.length else "d" for e in expressions]
    rest = [d for d, name in zip(shape, names + ["d"] * len(shape), strict=False) if name == "d"]
    names = (names + ["d"] * len(shape))[: len(shape)]
    if sorted(n for n in names if n != "d") not in (["b", "s"], ["bs"]) or not all(isinstance(d, int) for d in rest):
        raise MismatchError(RejectCode.LAYOUT, f"it is arranged as {_shown(shape)}, not [batch, length, ...]")
    return tuple(names)


def per_token(axes: Sequence[str], x: Tensor, batch: int, length: int) -> Tensor:
    """Bring an activation with the axes of :func:`token_axes` to ``[B, S, N]``."""
    if axes[0] != "bs":
        x = x.permute([axes.index("b"), axes.index("s"), *(i for i, a in enumerate(axes) if a == "d")])
    return x.reshape(batch, length, -1)


def fused_layout(sizes: Sizes, operand: Node, positions: str) -> Layout:
    """Layout of an operand (or the output) of a fused attention operator: ``... positions, channels``."""
    return Layout((*sizes.leading(operand.meta["val"].shape[:-2]), positions, "d"))


def score_layouts(sizes: Sizes, product: Node, left: Node, right: Node) -> tuple[Layout, Layout, Layout]:
    """Layouts of queries, keys and scores of a product of queries (left) and keys (right).

    Raises:
        MismatchError: The product does not contract one channel axis, or sums over positions.
    """
    if product.target is _aten.einsum.default:
        letters = _letters(product, left)
        contracted = set(letters[0]) & set(letters[1]) - set(letters[2])
        roles = _einsum_roles(sizes, product, letters, {letters[2][-1]: "t"} | dict.fromkeys(contracted, "d"))
        return tuple(Layout(tuple(roles[c] for c in part)) for part in letters)  # type: ignore[return-value]
    shapes = [n.meta["val"].shape for n in (left, right, product)]
    return (
        Layout((*sizes.leading(shapes[0][:-2]), "s", "d")),
        Layout((*sizes.leading(shapes[1][:-2]), "d", "t")),
        Layout((*sizes.leading(shapes[2][:-2]), "s", "t")),
    )


def attended_layout(sizes: Sizes, product: Node, weights: Node, value: Node) -> tuple[Layout, Layout, Layout]:
    """Layouts of attention weights, values and output of their product; weights may stand on either side.

    Raises:
        MismatchError: The product does not contract one axis of positions.
    """
    if product.target is _aten.einsum.default:
        letters = _letters(product, weights)
        contracted = set(letters[0]) & set(letters[1]) - set(letters[2])
        own = set(letters[1]) - set(letters[0])
        roles = _einsum_roles(sizes, product, letters, dict.fromkeys(contracted, "t") | dict.fromkeys(own, "d"))
        return tuple(Layout(tuple(roles[c] for c in part)) for part in letters)  # type: ignore[return-value]
    if product.args[0] is not weights and product.args[1] is not weights:
        raise MismatchError(RejectCode.LAYOUT, f"the product '{product.name}' is not read by this version")
    if product.args[0] is not weights:
        raise MismatchError(RejectCode.LAYOUT, "values stand to the left of the attention weights")
    shapes = [n.meta["val"].shape for n in (weights, value, product)]
    return (
        Layout((*sizes.leading(shapes[0][:-2]), "s", "t")),
        Layout((*sizes.leading(shapes[1][:-2]), "t", "d")),
        Layout((*sizes.leading(shapes[2][:-2]), "s", "d")),
    )


def _letters(product: Node, first: Node) -> tuple[str, str, str]:
    """Subscripts of an einsum's two operands, ``first`` before the other, and of its output."""
    arguments: Any = product.args
    inputs, output = str(arguments[0]).replace(" ", "").split("->")
    parts = inputs.split(",")
    if "." in inputs or len(parts) != 2:
        raise MismatchError(RejectCode.LAYOUT, f"the einsum '{arguments[0]}' is not read by this version")
    operands = list(arguments[1])
    if operands[0] is not first:
        parts = parts[::-1]
    return parts[0], parts[1], output


def _einsum_roles(sizes: Sizes, product: Node, letters: tuple[str, str, str], known: dict[str, str]) -> dict[str, str]:
    roles = dict(known)
    shape = dict(zip(letters[2], product.meta["val"].shape, strict=True))
    for letter in letters[2]:
        if letter not in roles:
            expression = _expression(shape[letter])
            roles[letter] = "b" if expression == sizes.batch else "s" if expression == sizes.length else "h"
    missing = {c for part in letters for c in part} - set(roles)
    counts = sorted(r for r in roles.values() if r != "h")
    if missing or len(counts) != len(set(counts)):
        raise MismatchError(RejectCode.LAYOUT, f"the einsum '{product.args[0]}' is not an attention product")
    return roles
