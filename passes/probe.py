"""Recover what lies between a projection and the attention product by asking the graph, not by reading it.

Each function feeds chosen numbers into a sub-graph and decides from the answers: is it position-wise, is it linear,
which projection row feeds which channel, which channels rotate and how fast, what is added to the scores. A graph that
spells the same mathematics differently gives the same answers.

Shapes: ``B`` batch, ``S`` length, ``N`` projection outputs, ``H`` heads, ``D`` head channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator, example_inputs
from mla_compile.passes.trace import Anchor, DataFlow, MismatchError, ProjectionNode
from mla_compile.site import Mask, RejectCode, Rope

__all__ = [
    "SHORT",
    "Operand",
    "longest_length",
    "probe_linear",
    "probe_mask",
    "probe_probabilities",
    "probe_rope",
    "probe_rows",
]

_aten = torch.ops.aten
SHORT = 13
"""Length of the short probes: prime, and unlike any usual head count or width."""
_LONG = 8192
"""Upper end of the long probes of queries, keys and values, which refine frequencies and notice what changes late."""
_LONG_MASK = 600
"""Upper end of the long probe of the mask, whose cost is quadratic; larger windows must be numbers in the graph."""
_EXACT = 1e-9
"""Relative error above which a float64 evaluation is not rounding."""
_ROTATES = 1e-10
"""Off-diagonal size above which a channel pair rotates; channels that do not rotate give exact zeros."""
_TABLE = 2e-3
"""Radians a rotation table may be off a constant frequency: float32 tables reach 5e-4 at position 8192."""
_MASKED = -1e4
"""Additive mask values below this mean 'not visible'."""


@dataclass(frozen=True)
class Operand:
    """Queries, keys or values of one anchor as a function of their projection's output.

    Attributes:
        evaluator: Evaluates the graph in between.
        anchor: The attention anchor.
        role: ``query``, ``key`` or ``value``.
        projection: The projection the operand comes from.
    """

    evaluator: GraphEvaluator
    anchor: Anchor
    role: str
    projection: ProjectionNode

    @property
    def node(self) -> Node:
        """The operand's node."""
        return getattr(self.anchor, self.role)  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        """Outputs of the projection.

        Raises:
            MismatchError: The projection's output is not ``[B, S, ...]`` or ``[B*S, N]``.
        """
        self._flattened()
        shape = self.projection.node.meta["val"].shape
        return math.prod(int(d) for d in shape[1 if self._flattened() else 2 :])

    def _flattened(self) -> bool:
        """Whether the projection works on ``[B*S, N]``."""
        shape = self.projection.node.meta["val"].shape
        tokens = self.evaluator.nodes[self.evaluator.program.tokens].meta["val"].shape
        batch, length = (_expression(d) for d in tokens)
        rest = shape[2:] if len(shape) > 2 else shape[1:]
        if all(isinstance(d, int) for d in rest):
            if len(shape) > 2 and _expression(shape[0]) == batch and _expression(shape[1]) == length:
                return False
            if len(shape) == 2 and _expression(shape[0]) == batch * length:
                return True
        raise MismatchError(
            RejectCode.LAYOUT,
            f"the {self.role} projection's output is arranged as {[str(d) for d in shape]}, not [batch, length, ...]",
        )

    def place(self, values: Tensor) -> Tensor:
        """Arrange ``[B, S, N]`` as the projection's output."""
        static = [int(d) for d in self.projection.node.meta["val"].shape[1 if self._flattened() else 2 :]]
        batch, length = values.shape[:2]
        return values.reshape([batch * length, *static] if self._flattened() else [batch, length, *static])

    def __call__(self, values: Tensor) -> Tensor:
        """Map projection outputs ``[B, S, N]`` to the operand ``[B, S, H, D]``."""
        batch, length = values.shape[:2]
        inputs = example_inputs(self.evaluator.program, batch, length)
        (result,) = self.evaluator.run([self.node], {self.projection.node: self.place(values.double())}, inputs)
        return self.canonical(result, batch, length)

    def canonical(self, result: Tensor, batch: int, length: int) -> Tensor:
        """Arrange an operand as ``[B, S, H, D]``."""
        if self.anchor.scores.target in (_aten.einsum.default, _aten.baddbmm.default) or (
            self.anchor.output.target is _aten.einsum.default
        ):
            raise MismatchError(RejectCode.LAYOUT, "attention is written with einsum or baddbmm products")
        if not self.anchor.fused and self.role == "key":
            result = result.transpose(-1, -2)
        if result.dim() == 3 and result.shape[0] % batch == 0 and result.shape[1] == length:
            result = result.unflatten(0, (batch, -1))
        if result.dim() != 4 or result.shape[0] != batch or result.shape[2] != length:
            raise MismatchError(
                RejectCode.LAYOUT,
                f"the {self.role} is arranged as {tuple(result.shape)}, not [batch, heads, length, dim]",
            )
        return result.transpose(1, 2)


def _expression(size: Any) -> Any:  # noqa: ANN401 - int or sympy expression
    return size if isinstance(size, int) else size.node.expr


def _exceeds(values: Tensor, limit: float) -> bool:
    """Whether any magnitude is above a limit, or is no number at all."""
    return not bool((values.abs() <= limit).all())


def probe_linear(operand: Operand, generator: torch.Generator) -> None:
    """Check that the operand is a position-wise affine function of the projection output.

    Raises:
        MismatchError: It mixes positions, or is not affine.
    """
    batch, length, width = 3, SHORT, operand.width
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
    if _exceeds(residual, _EXACT * float(combined.abs().max())):
        raise MismatchError(
            RejectCode.NONLINEAR, f"something non-linear, such as a norm, stands between projection and {operand.role}"
        )


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
    spread = probes.expand(3, SHORT, -1)
    offset = operand(torch.zeros_like(spread))[0, 0]
    seen = operand(spread)[:, 0] - offset
    heads, dim = seen.shape[1:]
    seen, probes = seen.reshape(3, -1), probes[:, 0]
    wanted = probes[1:] / probes[:1]
    ratios = seen[1:] / seen[:1]
    error = ((ratios[:, :, None] - wanted[:, None, :]) / wanted[:, None, :]).abs().amax(0)
    best, rows = torch.nan_to_num(error, nan=math.inf).min(-1)
    if _exceeds(best, 1e-6):
        raise MismatchError(RejectCode.ROW_MAP, f"the {operand.role} is not a re-arrangement of its projection's rows")
    gain = seen[0] / probes[0][rows]
    return rows.reshape(heads, dim), gain.reshape(heads, dim), offset


def probe_rope(operand: Operand, rows: Tensor, gain: Tensor) -> Rope:
    """Measure how channels rotate with position.

    Args:
        operand: Queries or keys.
        rows: ``[H, D]`` from :func:`probe_rows`.
        gain: ``[H, D]`` from :func:`probe_rows`.

    Raises:
        MismatchError: Position acts otherwise than by rotating channel pairs at constant frequencies.
    """
    dim = rows.shape[1]
    one_hot = torch.zeros(dim, SHORT, operand.width, dtype=torch.float64)
    for channel in range(dim):
        one_hot[channel, :, rows[:, channel]] = 1.0
    base = operand(torch.zeros(1, SHORT, operand.width, dtype=torch.float64))
    # moves[s, h, i, j]: what channel i of head h receives from channel j at position s.
    moves = (operand(one_hot) - base).permute(1, 2, 3, 0) / gain[None, :, None, :]
    if _exceeds(moves - moves[:, :1], 1e-6):
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
    long = longest_length(operand.evaluator, lambda n: operand(torch.zeros(1, n, operand.width)), _LONG)
    ones = torch.zeros(1, long, operand.width, dtype=torch.float64)
    for channels in (first, still):
        ones[..., rows[0, channels]] = 1.0 / gain[0, channels]
    turned = (operand(ones) - operand(torch.zeros_like(ones)))[0, :, 0]
    if _exceeds(turned[:, still] - 1, 1e-6):
        raise MismatchError(RejectCode.ROPE, f"the {operand.role} is scaled by position")
    if not pairs:
        return Rope()
    real, imaginary = turned[:, first], turned[:, second]
    if _exceeds(real.square() + imaginary.square() - 1, _TABLE):
        raise MismatchError(RejectCode.ROPE, f"channel pairs of the {operand.role} are not rotated but also scaled")
    angles = torch.atan2(imaginary, real)
    frequency = angles[1].clone()
    unwrapped = angles.clone()
    for position in range(2, long):
        turns = torch.round((frequency * position - angles[position]) / (2 * math.pi))
        unwrapped[position] = angles[position] + 2 * math.pi * turns
        frequency = unwrapped[position] / position
    positions = torch.arange(long, dtype=torch.float64)[:, None]
    frequency = (positions * unwrapped).sum(0) / positions.square().sum()
    if _exceeds(unwrapped - positions * frequency, _TABLE):
        raise MismatchError(
            RejectCode.ROPE, f"the {operand.role}'s rotation is not proportional to position up to length {long}"
        )
    # A negative frequency is the same pair read in the other order.
    ordered = [(pair, f) if f >= 0 else (pair[::-1], -f) for pair, f in zip(pairs, frequency.tolist(), strict=True)]
    return Rope(tuple((a, b) for (a, b), _ in ordered), tuple(f for _, f in ordered))


def longest_length(evaluator: GraphEvaluator, attempt: Callable[[int], object], wanted: int) -> int:
    """Longest length, at most ``wanted`` and the model's own limit, at which something can be evaluated.

    Tables inside the model (positions, masks) may end earlier; then lengths are halved until it works.
    """
    length = min(evaluator.program.max_positions or wanted, wanted)
    while length > SHORT:
        try:
            attempt(length)
        except (RuntimeError, IndexError):
            length //= 2
        else:
            return length
    return SHORT


def _added(
    evaluator: GraphEvaluator,
    anchor: Anchor,
    length: int,
    scores: Tensor | None = None,
    patched: Mapping[Node, tuple[Any, ...]] | None = None,
    overrides: Mapping[Node, Tensor] | None = None,
) -> Tensor:
    """Return what reaches the softmax for given raw scores ``[B, H, S, S]`` (zeros by default)."""
    batch = 2
    inputs = example_inputs(evaluator.program, batch, length)
    given = dict(overrides or {})
    if not anchor.fused:
        shape = [_bind(d, evaluator, batch, length) for d in anchor.scores.meta["val"].shape]
        raw = torch.zeros(shape, dtype=torch.float64) if scores is None else scores.reshape(shape)
        (added,) = evaluator.run([anchor.softmax.args[0]], {**given, anchor.scores: raw}, inputs, patched)  # type: ignore[list-item]
        return added.reshape(batch, -1, *added.shape[-2:])
    arguments = dict(zip(("q", "k", "v", "attn_mask", "dropout_p", "is_causal"), anchor.scores.args, strict=False))
    arguments |= anchor.scores.kwargs
    added = torch.zeros(batch, 1, length, length, dtype=torch.float64)
    mask = arguments.get("attn_mask")
    if isinstance(mask, Node):
        (value,) = evaluator.run([mask], given, inputs, patched)
        value = torch.where(value, 0.0, -math.inf).double() if value.dtype == torch.bool else value.double()
        added = added + value
    if arguments.get("is_causal"):
        added = added.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    return added


def _bind(size: Any, evaluator: GraphEvaluator, batch: int, length: int) -> int:  # noqa: ANN401 - int or SymInt
    """Evaluate a symbolic size for a given batch and length."""
    if isinstance(size, int):
        return size
    tokens = evaluator.nodes[evaluator.program.tokens].meta["val"].shape
    symbols = {_expression(tokens[0]): batch, _expression(tokens[1]): length}
    return int(size.node.expr.subs(symbols))


def probe_mask(evaluator: GraphEvaluator, flow: DataFlow, anchor: Anchor, heads: int, dim: int) -> tuple[float, Mask]:
    """Measure the score scale and classify the mask.

    Args:
        evaluator: Evaluates the graph.
        flow: Data flow, to notice masks that depend on activations.
        anchor: The attention anchor.
        heads: Query heads.
        dim: Channels per query head, for the fused operator's default scale.

    Returns:
        The factor between ``q . k`` and the logits, and the mask.

    Raises:
        MismatchError: Scores are not merely scaled and masked, or the mask is of another kind.
    """
    if anchor.fused:
        mask_node = anchor.scores.kwargs.get(
            "attn_mask", anchor.scores.args[3] if len(anchor.scores.args) > 3 else None
        )
        if isinstance(mask_node, Node) and mask_node in flow.hidden:
            raise MismatchError(RejectCode.MASK, "the mask depends on the activations")
        given = anchor.scores.kwargs.get("scale")
        scale = float(given) if given is not None else dim**-0.5  # type: ignore[arg-type]
    else:
        scale = _probe_scale(evaluator, anchor, heads)
    mask = _visible(_added(evaluator, anchor, SHORT), SHORT)
    long = longest_length(evaluator, lambda n: _added(evaluator, anchor, n), _LONG_MASK)
    if mask.window is None:
        mask = _visible(_added(evaluator, anchor, long), long)
    elif mask != _visible(_added(evaluator, anchor, long), long):
        raise MismatchError(RejectCode.MASK, "the mask changes its kind with the length")
    if mask.window is not None:
        return scale, mask
    small = 5
    for constant, node, attempt in _constants(evaluator, anchor, long):
        try:
            window = _visible(attempt(small), SHORT).window
        except MismatchError as mismatch:
            if node.meta["val"].is_floating_point():
                continue  # the number that hides masked scores, not one that positions are compared with
            raise MismatchError(
                mismatch.code, f"from {constant} tokens on, at '{node.name}', {mismatch.reason}"
            ) from mismatch
        except RuntimeError:
            continue  # a size: nothing fits when it changes
        if window is not None:
            return scale, Mask(window=constant + window - small)
    return scale, mask


def _visible(added: Tensor, length: int) -> Mask:
    """Check that only a mask is added to the scores, and name it."""
    if added.shape[-1] != length:
        raise MismatchError(RejectCode.SCORES, "the softmax sees extra columns (attention sinks or a null key)")
    if _exceeds(torch.where(added < _MASKED, 0.0, added), 1e-6):
        raise MismatchError(RejectCode.SCORES, "a bias is added to the scores (ALiBi, relative positions)")
    return _classify(added)


def _probe_scale(evaluator: GraphEvaluator, anchor: Anchor, heads: int) -> float:
    generator = torch.Generator().manual_seed(5)
    base = _added(evaluator, anchor, SHORT)
    scores = torch.rand(2, heads, SHORT, SHORT, generator=generator, dtype=torch.float64) + 0.5
    visible = (base > _MASKED).expand(2, heads, *base.shape[-2:])[..., :SHORT]
    scales = []
    for magnitude in (1e-2, 1.0, 1e3):
        moved = (_added(evaluator, anchor, SHORT, scores * magnitude) - base)[..., :SHORT].expand_as(scores)
        ratio = (moved / (scores * magnitude))[visible]
        if _exceeds(ratio - ratio[0], 1e-6 * float(ratio[0].abs())):
            raise MismatchError(RejectCode.SCORES, "scores pass through something other than one constant factor")
        scales.append(float(ratio[0]))
    if max(scales) - min(scales) > 1e-6 * abs(scales[0]):
        raise MismatchError(RejectCode.SCORES, "scores are soft-capped")
    return scales[1]


def _classify(added: Tensor) -> Mask:
    """Name the visibility pattern of an additive mask ``[B, H, S, S]``."""
    visible = added >= _MASKED
    if (visible != visible[:1, :1]).any():
        raise MismatchError(RejectCode.MASK, "the mask differs between heads or sequences")
    length = visible.shape[-1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    pattern = visible[0, 0]
    if torch.equal(pattern, distance >= 0):
        return Mask()
    window = int(pattern[-1].sum())
    if torch.equal(pattern, (distance >= 0) & (distance < window)):
        return Mask(window)
    if pattern.all():
        raise MismatchError(
            RejectCode.MASK, "attention is bidirectional: nothing is cached, so there is no cache to shrink"
        )
    raise MismatchError(RejectCode.MASK, "the mask is neither causal nor a causal sliding window")


def _constants(
    evaluator: GraphEvaluator, anchor: Anchor, shown: int
) -> Iterator[tuple[int, Node, Callable[[int], Tensor]]]:
    """List integer constants that may shape the mask beyond the lengths it was looked at (a 4096-token window).

    Args:
        evaluator: Evaluates the graph.
        anchor: The attention anchor.
        shown: Length at which the mask was seen; smaller constants would have shown.

    Yields:
        The constant, the node it is in, and a function that evaluates the mask at the short length with a smaller
        constant in its place.
    """
    mask = anchor.scores.kwargs.get("attn_mask", (*anchor.scores.args, None, None, None, None)[3])
    start = mask if anchor.fused else anchor.softmax.args[0]
    if not isinstance(start, Node):
        return
    seen, stack = set(), [start]
    while stack:
        node = stack.pop()
        if node in seen or (node is anchor.scores and not anchor.fused):
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
        value = evaluator.scalar(node)
        if value is not None and shown <= abs(value) < 2**31:
            yield (
                abs(value),
                node,
                lambda small, node=node, sign=1 if value > 0 else -1: _added(  # type: ignore[misc]
                    evaluator, anchor, SHORT, overrides={node: torch.tensor(sign * small)}
                ),
            )
        for place, number in enumerate(node.args):
            if type(number) is int and shown <= abs(number) < 2**31:
                yield (
                    abs(number),
                    node,
                    lambda small, node=node, place=place, sign=1 if number > 0 else -1: _added(  # type: ignore[misc]
                        evaluator,
                        anchor,
                        SHORT,
                        patched={node: (*node.args[:place], sign * small, *node.args[place + 1 :])},
                    ),
                )


def probe_probabilities(evaluator: GraphEvaluator, anchor: Anchor) -> None:
    """Check that softmax probabilities reach the value product unchanged.

    Raises:
        MismatchError: They are scaled, mixed or gated on the way.
    """
    if anchor.probabilities is None:
        return
    shape = [_bind(d, evaluator, 2, SHORT) for d in anchor.softmax.meta["val"].shape]
    given = torch.rand(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    inputs = example_inputs(evaluator.program, 2, SHORT)
    (arrived,) = evaluator.run([anchor.probabilities], {anchor.softmax: given}, inputs)
    if arrived.numel() != given.numel() or _exceeds(arrived.reshape(given.shape) - given, 1e-12):
        raise MismatchError(RejectCode.SCORES, "probabilities are changed between softmax and values")
