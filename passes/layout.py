"""Which axis of a tensor is which: batch, heads, positions and channels, however an author ordered or merged them.

Axes are named by letters: ``b`` batch, ``h`` heads (several when query heads are grouped), ``s`` query positions, ``t``
key positions, ``d`` channels; ``bh`` is batch and heads merged into one axis. Symbolic sizes tell batch and positions
apart from heads and channels; a product's own rule tells the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.einsum import einsum_parts
from mla_compile.passes.mismatch import MismatchError
from mla_compile.program import AnyProgram, Program
from mla_compile.site import RejectCode

__all__ = [
    "SHORT",
    "Layout",
    "Sizes",
    "attended_layout",
    "fused_layout",
    "per_token",
    "score_layouts",
    "score_lengths",
    "token_axes",
]

_aten = torch.ops.aten


SHORT = 13
"""Length of the short probes: prime, and unlike any usual head count or width."""
_MORE_KEYS = 4
"""How many more keys than queries there are in probes of cross attention."""
_OTHER_LENGTHS = (7, 11, 6, 9, 5, 10)
"""What symbols that are neither batch nor a length of the layer are bound to, one after the other."""


@dataclass(frozen=True)
class Sizes:
    """The sizes one attention layer is about, to recognise them in shapes and to choose them for probes.

    Attributes:
        batch: Symbol of the batch size.
        length: Number of queries: a symbol where it may be chosen, else a number or an expression of other symbols.
        keys: Number of keys; equal to ``length`` in self attention.
        batches: Every symbol that is bound to the batch size (an input that is only broadcast has one of its own).
        others: Further symbols of the inputs, and what they are bound to.
    """

    batch: Any
    length: Any
    keys: Any
    batches: tuple[Any, ...] = ()
    others: tuple[tuple[Any, int], ...] = ()

    @classmethod
    def of(cls, program: Program) -> Sizes:
        """Read the symbols of a causal language model from its token input."""
        tokens = program.user_inputs[program.tokens][1]
        batch, length = (_expression(d) for d in tokens.shape)
        return _complete(program, batch, length, length)

    @classmethod
    def around(cls, program: AnyProgram, query: Node, lengths: tuple[Any, Any]) -> Sizes:
        """Read the sizes of one attention layer.

        Args:
            program: The model.
            query: Its queries, one axis of which has the batch.
            lengths: How many queries and keys there are, as sizes of a traced shape.
        """
        if isinstance(program, Program) and not program.reads_another:
            return cls.of(program)  # one sequence is all there is
        free = {symbol for d in query.meta["val"].shape for symbol in getattr(_expression(d), "free_symbols", ())}
        firsts = [_expression(value.shape[0]) for _, value in program.user_inputs.values() if value.dim()]
        batch = next((e for e in firsts if e in free), firsts[0] if firsts else 0)
        return _complete(program, batch, *map(_expression, lengths))

    @property
    def cross(self) -> bool:
        """Whether keys are counted differently from queries."""
        return bool(self.keys != self.length)

    @property
    def fixed(self) -> bool:
        """Whether the length cannot be chosen (an image of so many patches)."""
        return not _is_free(self.length)

    @property
    def short(self) -> int:
        """Length of short probes: the one length there is, where it cannot be chosen."""
        return self._value(self.length) if self.fixed else SHORT

    def key_length(self, length: int) -> int:
        """How many keys there are in a probe with so many queries."""
        if not self.cross:
            return length
        return length + _MORE_KEYS if _is_free(self.keys) else self._value(self.keys)

    def of_keys(self) -> Sizes:
        """The same with keys in the place of queries, for what happens to keys before they meet queries."""
        if not self.cross:
            return self
        others = self.others if self.fixed else (*self.others, (self.length, SHORT))
        return replace(self, length=self.keys, others=tuple((s, n) for s, n in others if s != self.keys))

    def symbols(self, batch: int, length: int) -> dict[Any, int]:
        """What every symbol is bound to for a given batch and number of queries."""
        bound = dict(self.others) | dict.fromkeys((self.batch, *self.batches), batch)
        if _is_free(self.keys):
            bound[self.keys] = self.key_length(length)
        if not self.fixed:
            bound[self.length] = length
        return bound

    def bind(self, shape: Sequence[Any], batch: int, length: int) -> list[int]:
        """Evaluate a symbolic shape for a given batch and length."""
        symbols = self.symbols(batch, length)
        return [d if isinstance(d, int) else int(_expression(d).subs(symbols)) for d in shape]

    def _value(self, expression: Any) -> int:  # noqa: ANN401 - int or sympy expression
        return expression if isinstance(expression, int) else int(expression.subs(dict(self.others)))

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
        for merged in {"bh", "bs"} & {*axes}:
            place = axes.index(merged)
            x = x.unflatten(place, (batch, x.shape[place] // batch))
            axes[place : place + 1] = [*merged]
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


def _is_free(expression: Any) -> bool:  # noqa: ANN401 - int or sympy expression
    """Whether an expression is a symbol, which may be bound to any number."""
    return bool(getattr(expression, "is_symbol", False))


def _complete(program: AnyProgram, batch: Any, length: Any, keys: Any) -> Sizes:  # noqa: ANN401 - see _is_free
    """Sort the symbols of a program's inputs into batches and other sizes."""
    shapes = [[_expression(d) for d in value.shape] for _, value in program.user_inputs.values()]
    firsts = dict.fromkeys(e for shape in shapes for e in shape[:1] if _is_free(e) and e not in (length, keys))
    known = {batch, length, keys, *firsts}
    rest = dict.fromkeys(s for shape in shapes for e in shape for s in getattr(e, "free_symbols", ()) if s not in known)
    named = sorted(rest, key=str)
    others = tuple((s, _OTHER_LENGTHS[i % len(_OTHER_LENGTHS)]) for i, s in enumerate(named))
    return Sizes(batch, length, keys, tuple(firsts), others)


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
        for place in [i for i, name in enumerate(names) if name == "s"][1:]:
            if isinstance(expressions[place], int):
                names[place] = "d"  # a width that happens to be the number of tokens
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


def score_lengths(product: Node, left: Node, right: Node) -> tuple[Any, Any]:
    """How many queries (left) and keys (right) a product of the two is made of.

    Raises:
        MismatchError: The product is an einsum without an axis of its own for the queries.
    """
    shape = product.meta["val"].shape
    if product.target is not _aten.einsum.default:
        return shape[-2], shape[-1]
    first, second, output = _letters(product, left)
    own = [place for place, c in enumerate(output) if c in first and c not in second]
    if not own:
        raise MismatchError(RejectCode.LAYOUT, f"the einsum '{product.args[0]}' is not an attention product")
    return shape[next((i for i in own if not isinstance(shape[i], int)), own[-1])], shape[-1]


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
    parts, output = einsum_parts(str(arguments[0]))
    if "." in "".join(parts) or len(parts) != 2 or not output:
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
