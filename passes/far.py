"""Ask what is added to scores at distances that are too long to be looked at.

Looking at a mask costs the square of its length. But a graph that makes its mask from positions may be told that its
few tokens stand anywhere, ``[0, 1, 5, 1023, 1024, ...]``: the nodes that count tokens get those numbers, and tables
their rows. What is found so is exact, at the price of a short probe. Numbers that no count meets (the diagonal of
``triu``) are made small instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import Arguments
from mla_compile.passes.layout import SHORT
from mla_compile.passes.masks import MASKED, agrees, slopes_agree, visible
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.probe import exceeds
from mla_compile.passes.scorer import Scorer
from mla_compile.passes.trace import DataFlow, beside_scores, upstream
from mla_compile.program import Role
from mla_compile.site import Mask, RejectCode

__all__ = ["far_mask"]

_aten = torch.ops.aten
_FARTHEST = 100_000
"""Positions that are asked for, where no table ends before."""
_MOST_BIAS = 8e3
"""Slopes times distances stay below this, so that they do not look like masked scores."""
_AFFORDABLE = 4100
"""Length up to which a mask that is the same for all heads is looked at as a whole where there is a reason to."""
_LARGEST = 2.0**31
"""Numbers from here on are no lengths; they hide masked scores."""
_SMALL = (5, 7)
"""What numbers are replaced by."""
_COUNTING = frozenset(
    {_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.cumsum.default, _aten.linspace.default}
)
_LOOKS_UP = frozenset({_aten.index.Tensor, _aten.gather.default, _aten.index_select.default, _aten.embedding.default})
_BY_DIAGONAL = frozenset({_aten.tril.default, _aten.triu.default, _aten.slice.Tensor, _aten.diagonal.default})
"""Operators that depend on positions without a node that counts them."""

Bend = Callable[[Tensor], Tensor]
"""What becomes of raw scores on their way to the softmax."""


@dataclass(frozen=True)
class _Number:
    """A number in a graph that may be a length.

    Attributes:
        node: The node that has it.
        place: Where in its ``(args, kwargs)`` it stands; empty for a constant's own value.
        value: The number.
    """

    node: Node
    place: tuple[Any, ...]
    value: float

    def evaluate(self, scorer: Scorer, small: int, scores: Tensor | None = None) -> Tensor:
        """Logits at the short length with a small number of the same sign in its place."""
        number = small if self.value > 0 else -small
        if not self.place:
            given = {self.node: torch.full_like(scorer.evaluator.constant(self.node), number)}
            return scorer(scorer.sizes.short, scores, overrides=given)
        own: Arguments = (self.node.args, dict(self.node.kwargs))
        return scorer(scorer.sizes.short, scores, patched={self.node: _with(own, self.place, type(self.value)(number))})


@dataclass(frozen=True)
class _Positions:
    """A layer whose tokens may be told to stand anywhere.

    Attributes:
        scorer: Its scores.
        counts: Nodes that count tokens, by their values at the short length.
        tables: Tables with entries per position, and the axes of these.
        given: Values of nodes that look up what has no entries far out.
        farthest: The largest position.
    """

    scorer: Scorer
    counts: dict[Node, Tensor]
    tables: dict[Node, tuple[int, ...]]
    given: dict[Node, Tensor]
    farthest: int

    def __call__(self, positions: Tensor, scores: Tensor | None = None) -> Tensor:
        """Logits ``[B, H, S, S]`` of tokens at these positions."""
        overrides = dict(self.given)
        for node, value in self.counts.items():
            step = value[..., 1:2] - value[..., :1]
            overrides[node] = (value[..., :1] + step * positions).to(value.dtype)
        for node, axes in self.tables.items():
            table = self.scorer.evaluator.constant(node)
            for axis in axes:
                table = table.index_select(axis, positions)
            overrides[node] = table
        short = self.scorer.sizes.short
        return self.scorer(short, scores, overrides=overrides)[..., :short]


def far_mask(
    scorer: Scorer, flow: DataFlow, slopes: tuple[float, ...] | None, mask: Mask, shown: int, bend: Bend
) -> Mask:
    """Find the window or chunk of a causal mask, and check that there is nothing else, far beyond what was looked at.

    Args:
        scorer: The layer's scores.
        flow: Data flow of the graph.
        slopes: Slopes that were found.
        mask: The mask that was found.
        shown: Length up to which both are known to be right.
        bend: What becomes of raw scores.

    Raises:
        MismatchError: Scores change in another way than by a window or chunk.
    """
    positions = _positions(scorer, flow, slopes, shown) if mask.causal else None
    if positions is not None:
        try:
            mask = _by_positions(positions, slopes, mask, shown, bend)
        except (RuntimeError, IndexError):
            positions = None  # something has no entries that far
    lengths = [_longest_table(scorer, shown)]
    for name, window, chunked in _windows_by_number(scorer, positions, mask, shown, bend):
        found = Mask(window, chunked=chunked)
        if mask.window is not None and (mask.chunked or chunked) and mask != found:
            raise MismatchError(RejectCode.MASK, f"the mask is {mask}, and {found} too, at '{name}'")
        if mask.window is None or window < mask.window:
            mask = found
            lengths.append(window + 2)
    apart = len(slopes or (0,))  # heads of which each has numbers of its own
    longest = max((n for n in lengths if n * n * apart <= _AFFORDABLE**2), default=0)
    if mask.causal and longest > shown:
        _check_whole(scorer, slopes, mask, longest)
    return mask


def _positions(scorer: Scorer, flow: DataFlow, slopes: tuple[float, ...] | None, shown: int) -> _Positions | None:
    """What has to be overridden for tokens to stand elsewhere; None where there is nothing that counts them."""
    short, inputs = scorer.sizes.short, scorer.evaluator.program.user_inputs
    beside = sorted((n for n in beside_scores(scorer.anchor) if n not in flow.hidden), key=lambda n: n.name)
    counting = [
        n
        for n in beside
        if n.target in _COUNTING or (n.name in inputs and inputs[n.name][0] == Role.POSITIONS and n.op == "placeholder")
    ]
    looking = [n for n in beside if n.target in _LOOKS_UP and n.args[0] not in flow.static]
    values = dict(zip([*counting, *looking], scorer.values([*counting, *looking]), strict=True))
    counts = {n: v for n in counting if _is_count(v := values[n], short) and not isinstance(_last(n), int)}
    given = {n: values[n] for n in looking if bool((values[n] == values[n].flatten()[0]).all())}
    tables = {}
    for node in beside:
        if node.name in scorer.evaluator.constants and not any(u.target in _LOOKS_UP for u in node.users):
            axes = tuple(i for i, size in enumerate(node.meta["val"].shape) if int(size) >= shown)
            if axes:
                tables[node] = axes
    if not counts and not tables:
        return None
    ends = [int(n.meta["val"].shape[i]) for n, axes in tables.items() for i in axes]
    if slopes is not None:
        ends.append(int(_MOST_BIAS / max(abs(s) for s in slopes)))
    limit = scorer.evaluator.program.max_positions or _FARTHEST
    if tables or limit <= shown:  # otherwise it is what a configuration says, and the graph goes on
        ends.append(limit)
    farthest = min([_FARTHEST, *ends]) - 1
    return _Positions(scorer, counts, tables, given, farthest) if farthest > shown else None


def _last(node: Node) -> Any:  # noqa: ANN401 - int or symbolic size
    shape = node.meta["val"].shape
    return shape[-1] if len(shape) else 1


def _is_count(value: Tensor, length: int) -> bool:
    """Whether values go up by one step per token."""
    if value.dim() == 0 or value.shape[-1] != length or value.dtype == torch.bool:
        return False
    steps = value.diff(dim=-1)
    return bool((steps == steps.flatten()[0]).all()) and bool(steps.any())


def _by_positions(ask: _Positions, slopes: tuple[float, ...] | None, mask: Mask, shown: int, bend: Bend) -> Mask:
    farthest, few = ask.farthest, torch.arange(SHORT)
    generator = torch.Generator().manual_seed(11)
    spread = [_spread(farthest, torch.rand(SHORT - 1, generator=generator)) for _ in range(3)]
    asked = [few, *spread, *(few * k for k in (61, 256, 701, 1024, 4096) if 12 * k <= farthest)]
    # What changes at a far place alone, chunks behind a window, is met only by tokens on both sides of it.
    borders = {int(abs(n.value)) for n in _numbers(ask.scorer, beside_scores(ask.scorer.anchor), shown)}
    asked += [border - SHORT // 2 + few for border in sorted(borders) if border <= farthest - SHORT]
    if mask.window is None and not all(agrees(ask(p), p, slopes, mask) for p in asked):
        mask = _windowed(ask, asked, slopes, _first_hidden(ask))
    if mask.window is not None and SHORT < mask.window < farthest - SHORT:
        asked.append(torch.cat([few[:6], mask.window - 1 + few[:7]]))
    scores = torch.rand(1, ask.scorer.heads, SHORT, SHORT, generator=generator, dtype=torch.float64) + 0.5
    scores *= 1 - torch.eye(SHORT)
    for positions in asked:
        added = ask(positions)
        if not slopes_agree(added, positions, slopes):
            raise MismatchError(
                RejectCode.SCORES, f"beyond {shown} tokens what is added to the scores is not linear in the distance"
            )
        if not agrees(added, positions, slopes, mask):
            raise MismatchError(
                RejectCode.MASK, f"beyond {shown} tokens the mask is neither causal nor causal in windows or chunks"
            )
        if not ask.scorer.anchor.fused:
            _check_scores(ask(positions, scores), added, added >= MASKED, scores, bend, shown)
    return mask


def _windowed(ask: _Positions, asked: list[Tensor], slopes: tuple[float, ...] | None, hidden: int | None) -> Mask:
    """The mask that hides the first token from a distance on: by chunks where that is what is asked for says."""
    chunks = Mask(hidden, chunked=True)
    if hidden is not None and all(agrees(ask(positions), positions, slopes, chunks) for positions in asked):
        return chunks
    return Mask(hidden)


def _check_scores(logits: Tensor, added: Tensor, seen: Tensor, scores: Tensor, bend: Bend, shown: int) -> None:
    wanted = bend(scores[0])
    moved = torch.where(seen[0], logits[0] - added[0] - wanted, 0.0)
    if exceeds(moved, 1e-6 * float(wanted.abs().max())):
        raise MismatchError(RejectCode.SCORES, f"beyond {shown} tokens scores pass through something else than before")


def _spread(farthest: int, jitter: Tensor) -> Tensor:
    """Increasing positions from 0 on, near and far alike."""
    places = (farthest ** ((torch.arange(SHORT - 1) + jitter) / (SHORT - 1))).long()
    order = torch.arange(SHORT - 1)
    places = (places - order).cummax(0).values.clamp(min=1) + order
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.minimum(places, farthest - SHORT + 2 + order)])


def _first_hidden(ask: _Positions) -> int | None:
    """The distance from which on the first token is hidden; None where that is nowhere."""
    low, high, order = 0, ask.farthest + 1, torch.arange(1, SHORT)
    while high - low > 1:
        distances = low + torch.maximum(order, order * (high - low) // SHORT)
        distances = torch.minimum(distances, ask.farthest - (SHORT - 1) + order)
        places = torch.cat([torch.zeros(1, dtype=torch.long), distances])
        seen = (ask(places)[0, 0, :, 0] >= MASKED).tolist()
        inside = [(int(d), s) for d, s in zip(places, seen, strict=True) if low < d < high]
        if not inside:
            return high if high <= ask.farthest else None
        low = max([low, *(d for d, s in inside if s)])
        high = min([high, *(d for d, s in inside if not s)])
        if high <= low:
            return None  # seen beyond what is hidden: no window
    return high if high <= ask.farthest else None


def _check_whole(scorer: Scorer, slopes: tuple[float, ...] | None, mask: Mask, length: int) -> None:
    """Look at a mask of one head and one sequence at some length, if it can be evaluated."""
    try:
        added = scorer(length, torch.zeros(1, 1, length, length, dtype=torch.float64))[..., :length]
    except (RuntimeError, IndexError):
        return  # heads are told apart, or a table is shorter
    if not agrees(added, torch.arange(length), slopes, mask):
        raise MismatchError(
            RejectCode.MASK, f"up to {length} tokens the mask is neither causal nor causal in windows or chunks"
        )


def _longest_table(scorer: Scorer, shown: int) -> int:
    """Length that tables of the mask have, or that the model has, if that is less; 0 without such tables."""
    lengths = []
    for node in beside_scores(scorer.anchor):
        if node.name in scorer.evaluator.constants:
            sides = [int(n) for n in node.meta["val"].shape if int(n) > shown]
            lengths.extend([min(sides)] if len(sides) > 1 else [])
    return min([*lengths, scorer.evaluator.program.max_positions or _AFFORDABLE]) if lengths else 0


def _windows_by_number(
    scorer: Scorer, positions: _Positions | None, mask: Mask, shown: int, bend: Bend
) -> Iterator[tuple[str, int, bool]]:
    """Windows and chunks that numbers in the graph make, which are made small to see at a short length what they do.

    Yields:
        The node that has the number, the window, and whether it is a chunk.

    Raises:
        MismatchError: One does anything but nothing, hide scores that are hidden already, or make a window or chunk.
    """
    short = scorer.sizes.short
    keys = scorer.sizes.key_length(short)
    base = scorer(short)[..., :keys]
    known = visible(base)
    scores = torch.rand(1, scorer.heads, short, keys, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    scores = (scores + 0.5) * (1 - torch.eye(short, keys))
    scores[..., 0] *= not scorer.sizes.cross
    for number in _numbers(scorer, _unmet(scorer, positions), shown):
        constant, name = abs(number.value), number.node.name
        try:
            first, second = (number.evaluate(scorer, small)[..., :keys] for small in _SMALL)
            moved = None if scorer.anchor.fused else number.evaluate(scorer, _SMALL[0], scores)[..., :keys]
        except MismatchError as mismatch:
            raise MismatchError(
                mismatch.code, f"from {constant:g} tokens on, at '{name}', {mismatch.reason}"
            ) from mismatch
        except (RuntimeError, IndexError):
            continue  # a size: nothing fits when it changes
        if moved is not None and moved.shape == scores.shape and first.shape[-2:] == base.shape[-2:]:
            _check_scores(moved, first, (first >= MASKED) & (base >= MASKED), scores, bend, shown)
        if first.shape == base.shape and not exceeds(torch.where(base < MASKED, 0.0, first - base), 1e-9):
            continue  # the number that hides masked scores, or one that does not matter
        try:
            read = visible(first)
            small, larger = read[1], visible(second)[1]
        except MismatchError as mismatch:
            raise MismatchError(
                mismatch.code, f"from {constant:g} tokens on, at '{name}', {mismatch.reason}"
            ) from mismatch
        if read == known:
            continue
        if small.causal != mask.causal:
            raise MismatchError(RejectCode.MASK, f"from {constant:g} tokens on, at '{name}', the mask changes its kind")
        steps = None if small.window is None or larger.window is None else larger.window - small.window
        if small.window is None or steps != _SMALL[1] - _SMALL[0] or small.chunked != larger.chunked:
            raise MismatchError(
                RejectCode.MASK,
                f"from {constant:g} tokens on, at '{name}', the mask changes otherwise than by windows or chunks",
            )
        yield name, int(abs(number.value)) + small.window - _SMALL[0], small.chunked


def _unmet(scorer: Scorer, positions: _Positions | None) -> list[Node]:
    """Nodes beside the scores with numbers that may shape the mask, and that no asked position meets."""
    beside = beside_scores(scorer.anchor)
    met: set[Node] = set()
    if positions is not None:
        moved = {*positions.counts, *positions.tables}
        met = {n for n in beside if not moved.isdisjoint(upstream([n]))}

    def meets(node: Node) -> bool:
        users = [u for u in node.users if u in beside]
        return node in met or (bool(users) and met.issuperset(users))

    return [n for n in beside if n.target in _BY_DIAGONAL or not meets(n)]


def _numbers(scorer: Scorer, nodes: Iterable[Node], shown: int) -> Iterator[_Number]:
    """Numbers of nodes beyond the lengths that the mask was looked at."""
    for node in sorted(nodes, key=lambda n: n.name):
        value = scorer.evaluator.scalar(node)
        if value is not None and shown <= abs(value) < _LARGEST:
            yield _Number(node, (), value)
        for place, number in _literals((node.args, dict(node.kwargs)), ()):
            if shown <= abs(number) < _LARGEST:
                yield _Number(node, place, number)


def _literals(arguments: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], float]]:  # noqa: ANN401
    """Every number among nested arguments, with the way to it."""
    if type(arguments) in (int, float):
        yield place, arguments
    elif isinstance(arguments, tuple | list):
        for i, argument in enumerate(arguments):
            yield from _literals(argument, (*place, i))
    elif isinstance(arguments, dict):
        for name, argument in arguments.items():
            yield from _literals(argument, (*place, name))


def _with(arguments: Any, place: tuple[Any, ...], number: float) -> Any:  # noqa: ANN401 - nested arguments
    """Nested arguments with another number at one place."""
    if not place:
        return number
    first, rest = place[0], place[1:]
    if isinstance(arguments, dict):
        return arguments | {first: _with(arguments[first], rest, number)}
    return tuple(_with(a, rest, number) if i == first else a for i, a in enumerate(arguments))
