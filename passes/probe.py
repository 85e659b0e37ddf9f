"""Recover what lies between a projection and the attention product by asking the graph, not by reading it.

Each function feeds chosen numbers into a sub-graph and decides from the answers: is it position-wise, is it linear,
which projection row feeds which channel, which channels rotate and how fast, what is added to the scores. A graph that
spells the same mathematics differently gives the same answers.

Shapes: ``B`` batch, ``S`` length, ``N`` projection outputs, ``H`` heads, ``D`` head channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator, example_inputs
from mla_compile.passes.layout import SHORT, Layout, Sizes, per_token, token_axes
from mla_compile.passes.mismatch import MismatchError
from mla_compile.site import RejectCode, Rope

__all__ = [
    "SHORT",
    "Operand",
    "exceeds",
    "longest_length",
    "matching_rows",
    "mixes_positions",
    "probe_linear",
    "probe_rope",
    "probe_rows",
]

_LONG = 8192
"""Upper end of the long probes of queries, keys and values, which refine frequencies and notice what changes late."""
_EXACT = 1e-9
"""Error above which a float64 evaluation of numbers near one is not rounding."""
_ROTATES = 1e-10
"""Off-diagonal size above which a channel pair rotates; channels that do not rotate give exact zeros."""
_NEIGHBOURS = 8
"""Random ratios on either side that are looked at when a row is searched."""
_TABLE = 2e-3
"""Radians a rotation table may be off a constant frequency: float32 tables reach 5e-4 at position 8192."""


@dataclass(frozen=True)
class Operand:
    """Queries, keys or values of one anchor as a function of an earlier node, their base.

    Attributes:
        evaluator: Evaluates the graph in between.
        sizes: Batch and length symbols.
        role: ``query``, ``key`` or ``value``.
        base: The projection's output, or an activation between it and the operand.
        node: The operand.
        layout: The operand's axes.
    """

    evaluator: GraphEvaluator
    sizes: Sizes
    role: str
    base: Node
    node: Node
    layout: Layout

    @property
    def width(self) -> int:
        """Entries of the base per token."""
        return math.prod(self.entries)

    @property
    def entries(self) -> list[int]:
        """Axes of the base beside batch and positions."""
        shape = self.base.meta["val"].shape
        return [int(d) for d, axis in zip(shape, self._axes, strict=True) if axis == "d"]

    @property
    def _axes(self) -> tuple[str, ...]:
        try:
            return token_axes(self.sizes, self.base.meta["val"].shape)
        except MismatchError as mismatch:
            raise MismatchError(mismatch.code, f"the {self.role}'s projection: {mismatch.reason}") from mismatch

    def place(self, values: Tensor) -> Tensor:
        """Arrange ``[B, S, N]`` as the base."""
        axes, rest = self._axes, self.entries
        if axes[0] == "bs":
            return values.reshape(-1, *rest)
        x = values.reshape(*values.shape[:2], *rest)
        plain = iter(range(2, x.dim()))
        return x.permute([0 if a == "b" else 1 if a == "s" else next(plain) for a in axes])

    def flatten(self, result: Tensor, batch: int, length: int) -> Tensor:
        """Undo :meth:`place`."""
        return per_token(self._axes, result, batch, length)

    def __call__(self, values: Tensor) -> Tensor:
        """Map values of the base ``[B, S, N]`` to the operand ``[B, S, H, D]``."""
        result = self.value_of(self.node, values.double())
        return self.layout.arrange(result, "bthd" if "t" in self.layout.axes else "bshd", len(values))

    def value_of(self, node: Node, values: Tensor) -> Tensor:
        """Value of a node, as it is in the graph, for values of the base ``[B, S, N]``."""
        batch, length = values.shape[:2]
        inputs = example_inputs(self.evaluator.program, batch, length, sizes=self.sizes)
        (result,) = self.evaluator.run([node], {self.base: self.place(values)}, inputs)
        return result


def exceeds(values: Tensor, limit: float) -> bool:
    """Whether any magnitude is above a limit, or is no number at all."""
    return not bool((values.abs() <= limit).all())


def probe_linear(operand: Operand, generator: torch.Generator) -> None:
    """Check that the operand is a position-wise affine function of the projection output.

    Raises:
        MismatchError: It mixes positions, or is not affine.
    """
    batch, length, width = 3, operand.sizes.short, operand.width
    first, second = (torch.randn(batch, length, width, generator=generator, dtype=torch.float64) for _ in range(2))
    base, a = operand(torch.zeros_like(first)), operand(first)
    changed = first.clone()
    changed[batch - 1, length // 2] = second[batch - 1, length // 2]
    moved = (operand(changed) - a).abs().amax((2, 3)) > _EXACT
    expected = torch.zeros_like(moved)
    expected[batch - 1, length // 2] = True
    if not torch.equal(moved, expected):
        raise MismatchError(
            RejectCode.POSITION_MIXING, f"the {operand.role} at one position depends on other positions"
        )
    combined = operand(0.7 * first - 1.3 * second) - base
    residual = combined - (0.7 * (a - base) - 1.3 * (operand(second) - base))
    if exceeds(residual, _EXACT * float(combined.abs().max())):
        raise MismatchError(RejectCode.NONLINEAR, f"something non-linear stands between projection and {operand.role}")


def mixes_positions(operand: Operand, bases: Sequence[Node]) -> bool:
    """Whether an operand at one position is seen to depend on other positions of nodes behind it.

    Args:
        operand: The operand; its own base is not looked at.
        bases: Nodes with one entry per token that are given random values together.

    Returns:
        False also where that cannot be evaluated.
    """
    generator, short = torch.Generator().manual_seed(8), operand.sizes.short
    inputs = example_inputs(operand.evaluator.program, 1, short, sizes=operand.sizes)
    first: dict[Node, Tensor] = {}
    second: dict[Node, Tensor] = {}
    try:
        for base in bases:
            source = replace(operand, base=base)
            values = torch.randn(1, short, source.width, generator=generator, dtype=torch.float64)
            changed = values.clone()
            changed[:, short // 2] *= 2
            first[base], second[base] = source.place(values), source.place(changed)
        results = [operand.evaluator.run([operand.node], given, inputs)[0] for given in (first, second)]
    except (MismatchError, RuntimeError, IndexError):
        return False
    order = "bthd" if "t" in operand.layout.axes else "bshd"
    moved = (operand.layout.arrange(results[0] - results[1], order, 1).abs().amax((2, 3)) > _EXACT)[0]
    return bool(moved[: short // 2].any() or moved[short // 2 + 1 :].any())


def probe_rows(operand: Operand, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Find which projection output feeds each channel at position 0, where no rotation happens yet.

    Two ratios of three random probes identify an output uniquely.

    Returns:
        Row indices ``[H, D]`` (int64), gains ``[H, D]`` and offsets ``[H, D]`` (float64).

    Raises:
        MismatchError: The operand is not a scaled re-arrangement of projection outputs.
    """
    probes = torch.randn(3, 1, operand.width, generator=generator, dtype=torch.float64)
    probes = probes.sign() * (probes.abs() + 0.3)
    spread = probes.expand(3, operand.sizes.short, -1)
    offset = operand(torch.zeros_like(spread))[0, 0]
    seen = operand(spread)[:, 0] - offset
    heads, dim = seen.shape[1:]
    found = matching_rows(probes[:, 0], seen.reshape(3, -1))
    if found is None:
        raise MismatchError(RejectCode.ROW_MAP, f"the {operand.role} is not a re-arrangement of its projection's rows")
    rows, gain = found
    return rows.reshape(heads, dim), gain.reshape(heads, dim), offset


def matching_rows(probes: Tensor, seen: Tensor) -> tuple[Tensor, Tensor] | None:
    """Find for each entry seen the one entry of the probes it is a constant multiple of.

    Args:
        probes: ``[3, N]`` values given.
        seen: ``[3, M]`` values seen.

    Returns:
        Indices ``[M]`` into the probes and factors ``[M]``, or None if some entry is no multiple of one probe.
    """
    wanted, ratios = probes[1:] / probes[:1], seen[1:] / seen[:1]
    order = wanted[0].argsort()
    place = torch.searchsorted(wanted[0][order], torch.nan_to_num(ratios[0]))
    # Some of thousands of random ratios are nearly equal: the second ratio decides among the nearest.
    near = (place[:, None] + torch.arange(-_NEIGHBOURS, _NEIGHBOURS)).clamp(0, len(order) - 1)
    candidates = order[near]
    error = ((ratios[:, :, None] - wanted[:, candidates]) / wanted[:, candidates]).abs().amax(0)
    best, choice = torch.nan_to_num(error, nan=math.inf).min(-1)
    if exceeds(best, 1e-6):
        return None
    rows = candidates.gather(1, choice[:, None])[:, 0]
    return rows, seen[0] / probes[0][rows]


def probe_rope(operand: Operand, rows: Tensor, gain: Tensor) -> Rope:
    """Measure how channels rotate with position.

    Args:
        operand: Queries or keys.
        rows: ``[H, D]`` from :func:`probe_rows`.
        gain: ``[H, D]`` from :func:`probe_rows`.

    Raises:
        MismatchError: Position acts otherwise than by rotating channel pairs at constant frequencies.
    """
    dim, short = rows.shape[1], operand.sizes.short
    one_hot = torch.zeros(dim, short, operand.width, dtype=torch.float64)
    for channel in range(dim):
        one_hot[channel, :, rows[:, channel]] = 1.0
    base = operand(torch.zeros(1, short, operand.width, dtype=torch.float64))
    # moves[s, h, i, j]: what channel i of head h receives from channel j at position s.
    moves = (operand(one_hot) - base).permute(1, 2, 3, 0) / gain[None, :, None, :]
    if exceeds(moves - moves[:, :1], 1e-6):
        raise MismatchError(RejectCode.ROPE, f"heads of the {operand.role} rotate differently")
    moves = moves[:, 0]
    off_diagonal = moves.abs().amax(0).fill_diagonal_(0.0) > _ROTATES
    if (off_diagonal.sum(0) > 1).any() or not torch.equal(off_diagonal, off_diagonal.T):
        raise MismatchError(RejectCode.ROPE, f"channels of the {operand.role} do not rotate in pairs")
    pairs = [(int(a), int(b)) for a, b in off_diagonal.nonzero().tolist() if a < b]
    return _frequencies(operand, rows, gain, pairs)


def _frequencies(operand: Operand, rows: Tensor, gain: Tensor, pairs: list[tuple[int, int]]) -> Rope:
    """Follow ``1`` in every pair's first channel, ``exp(i p f)``, over the longest sequence the graph can evaluate.

    Channels outside the pairs must stay 1 all the way.
    """
    first = torch.tensor([a for a, _ in pairs], dtype=torch.long)
    second = torch.tensor([b for _, b in pairs], dtype=torch.long)
    still = torch.tensor([c for c in range(rows.shape[1]) if all(c not in pair for pair in pairs)], dtype=torch.long)
    turned = torch.empty(0)

    def follow(length: int) -> None:
        """Long and wide evaluations are most of what recognition costs: there is one, if nothing is added."""
        nonlocal turned
        ones = torch.zeros(1, length, operand.width, dtype=torch.float64)
        zeros = torch.zeros_like(ones) if adds else None
        for channels in (first, still):
            ones[..., rows[0, channels]] = 1.0 / gain[0, channels]
        turned = operand(ones)[0, :, 0].clone()
        if zeros is not None:
            turned -= operand(zeros)[0, :, 0]

    short = operand.sizes.short
    adds = bool(operand(torch.zeros(1, short, operand.width)).any())
    long = longest_length(operand.evaluator, operand.sizes, follow, _LONG)
    if long == short:
        follow(short)
    if exceeds(turned[:, still] - 1, 1e-6):
        raise MismatchError(RejectCode.ROPE, f"the {operand.role} is scaled by position")
    if not pairs:
        return Rope()
    real, imaginary = turned[:, first], turned[:, second]
    if exceeds(real.square() + imaginary.square() - 1, _TABLE):
        raise MismatchError(RejectCode.ROPE, f"channel pairs of the {operand.role} are not only rotated but scaled too")
    start = torch.atan2(imaginary[0], real[0])  # where positions are not counted from 0
    unwrapped = torch.atan2(imaginary, real)
    unwrapped = torch.remainder(unwrapped - start + math.pi, 2 * math.pi) - math.pi
    positions = torch.arange(long, dtype=torch.float64)[:, None]
    known = 2
    while known < long:  # what is known up to a position tells the turns up to nearly twice that position
        ahead = slice(known, 2 * known - 1)
        expected = positions[ahead] * (unwrapped[known - 1] / (known - 1))
        unwrapped[ahead] += 2 * math.pi * torch.round((expected - unwrapped[ahead]) / (2 * math.pi))
        known = 2 * known - 1
    if bool(((start != 0) & (unwrapped.abs().amax(0) < _EXACT)).any()):
        raise MismatchError(
            RejectCode.ROW_MAP, f"channels of the {operand.role} are mixed in pairs, the same at every position"
        )
    frequency = (positions * unwrapped).sum(0) / positions.square().sum()
    if exceeds(unwrapped - positions * frequency, _TABLE):
        raise MismatchError(
            RejectCode.ROPE, f"the {operand.role}'s rotation is not proportional to position up to length {long}"
        )
    # A negative frequency is the same pair read in the other order.
    found = zip(pairs, frequency.tolist(), start.tolist(), strict=True)
    ordered = [(pair, f, p) if f >= 0 else (pair[::-1], -f, -p) for pair, f, p in found]
    phases = tuple(p for _, _, p in ordered) if start.any() else ()
    return Rope(tuple((a, b) for (a, b), _, _ in ordered), tuple(f for _, f, _ in ordered), phases)


def longest_length(evaluator: GraphEvaluator, sizes: Sizes, attempt: Callable[[int], object], wanted: int) -> int:
    """Longest length, at most ``wanted`` and the model's own limit, at which something can be evaluated.

    Tables inside the model (positions, masks) may end earlier; then lengths are halved until it works. Where the length
    cannot be chosen it is the one there is.
    """
    if sizes.fixed:
        return sizes.short
    length = min(evaluator.program.max_positions or wanted, wanted)
    while length > SHORT:
        try:
            attempt(length)
        except (RuntimeError, IndexError):
            length //= 2
        else:
            return length
    return SHORT
