"""Read operands whose rotation is not at rest at position 0, because their positions are counted from another number.

There a channel is made of two rows of the projection, ``R(phase) (g_a y_a, g_b y_b)``. The same rotation at every
position commutes with RoPE, so of queries and keys only the difference of their phases is seen,
``R(m f + s) q . R(n f + t) k = R(m f) R(s - t) q . R(n f) k``, and that is a fixed rotation of the queries' weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.probe import Operand
from mla_compile.site import RejectCode, Rope

__all__ = ["OffsetRows", "common_rope", "probe_offset_rows", "turn_by_phases", "with_phases"]

_NOTHING = 1e-10
"""Relative size below which a row does not take part in a channel."""
_EXACT = 1e-6
"""Relative error of a rotation; sines and cosines of float32 tables are off by 6e-8."""
_ENTRIES = 2**23
"""Numbers that are given to the operand at once."""
_STILL = 1e-9
"""Radians between queries and keys that are none."""


@dataclass(frozen=True)
class OffsetRows:
    """Which projection outputs feed the channels of an operand in front of its rotation.

    Attributes:
        rows: ``[H, D]`` indices of projection outputs.
        gain: ``[H, D]`` factors.
        offset: ``[H, D]`` constants.
        phases: Radians by which a pair of channels is turned at position 0, for those that are.
    """

    rows: Tensor
    gain: Tensor
    offset: Tensor
    phases: Mapping[tuple[int, int], float]


def probe_offset_rows(operand: Operand) -> OffsetRows | None:
    """Find which projection outputs feed each channel in front of a rotation that has begun at position 0.

    Args:
        operand: Queries, keys or values, affine in their projection.

    Returns:
        The rows, or None where channels are no rotated pairs of projection outputs.

    Raises:
        MismatchError: They are, but heads are turned by different angles.
    """
    entries, added = _entries(operand)
    heads, dim = added.shape
    rows, gain = torch.zeros(heads, dim, dtype=torch.long), torch.zeros(heads, dim, dtype=torch.float64)
    phases: dict[tuple[int, int], float] = {}
    for head in range(heads):
        made = entries[head]
        largest = max((abs(x) for channel in made for x in channel.values()), default=0.0)
        parts = [{row: x for row, x in channel.items() if abs(x) > _NOTHING * largest} for channel in made]
        if any(len(part) not in (1, 2) for part in parts):
            return None
        for a, part in enumerate(parts):
            if len(part) == 1:
                ((row, factor),) = part.items()
                rows[head, a], gain[head, a] = row, factor
                continue
            partners = [b for b in range(dim) if b != a and parts[b].keys() == part.keys()]
            if len(partners) != 1:
                return None
            (b,) = partners
            if a > b:
                continue
            first, second = sorted(part)
            matrix = torch.tensor([[parts[c][r] for r in (first, second)] for c in (a, b)], dtype=torch.float64)
            found = _turned(matrix, phases.get((a, b)))
            if found is None:
                return None
            swapped, phase, gains = found
            if abs(math.remainder(phase - phases.setdefault((a, b), phase), 2 * math.pi)) > _EXACT:
                raise MismatchError(RejectCode.ROPE, f"heads of the {operand.role} rotate differently")
            rows[head, [a, b]] = torch.tensor([second, first] if swapped else [first, second])
            gain[head, [a, b]] = gains
    if not phases:
        return None
    rope = Rope(tuple(phases), (0.0,) * len(phases), tuple(-phase for phase in phases.values()))
    return OffsetRows(rows, gain, turn_by_phases(added, rope), phases)


def _entries(operand: Operand) -> tuple[list[list[dict[int, float]]], Tensor]:
    """What every channel at position 0 receives from every projection output, by head, and what is added to it."""
    short, width = operand.sizes.short, operand.width
    added = operand(torch.zeros(1, short, width, dtype=torch.float64))[0, 0]
    found: list[list[dict[int, float]]] = [[{} for _ in range(added.shape[1])] for _ in range(added.shape[0])]
    size = max(1, _ENTRIES // (short * width))
    for start in range(0, width, size):
        count = min(size, width - start)
        ones = torch.zeros(count, short, width, dtype=torch.float64)
        ones[torch.arange(count), :, torch.arange(start, start + count)] = 1.0
        moved = operand(ones)[:, 0] - added
        places = (moved.abs() > _NOTHING).nonzero()
        for (row, head, channel), x in zip(places.tolist(), moved[places.unbind(1)].tolist(), strict=True):
            found[head][channel][start + row] = x
    return found, added


def _turned(matrix: Tensor, known: float | None) -> tuple[bool, float, Tensor] | None:
    """Split ``[2, 2]`` into a rotation behind two gains, ``R(phase) diag(gains)``, its columns swapped or not.

    Either order of the columns has such a rotation, a quarter of a turn apart. Of one head the determinant decides,
    which makes gains of the same sign; further heads take the angle that is known.

    Returns:
        Whether the columns are swapped, the angle and the gains ``[2]``; None where the columns are not orthogonal.
    """
    sizes = matrix.square().sum(0).sqrt()
    if not bool(sizes.all()) or abs(float(matrix[:, 0] @ matrix[:, 1])) > _EXACT * float(sizes.prod()):
        return None
    choices = []
    for swapped in (False, True):
        columns = matrix.flip(1) if swapped else matrix
        phase = math.atan2(float(columns[1, 0]), float(columns[0, 0]))
        if known is not None:  # the same line, in either direction
            phase = min((phase, phase + math.pi), key=lambda p: abs(math.remainder(p - known, 2 * math.pi)))
        direction = torch.tensor([math.cos(phase), math.sin(phase)], dtype=torch.float64)
        across = torch.stack([-direction[1], direction[0]])
        gains = torch.stack([direction @ columns[:, 0], across @ columns[:, 1]])
        away = float(gains[1] < 0) if known is None else abs(math.remainder(phase - known, 2 * math.pi))
        choices.append((away, swapped, phase, gains))
    _, swapped, phase, gains = min(choices, key=lambda choice: choice[0])
    return swapped, phase, gains


def with_phases(known: Rope, phases: Mapping[tuple[int, int], float], role: str) -> Rope:
    """A rotation that is known, with the phases of one operand.

    Args:
        known: Pairs and frequencies.
        phases: From :func:`probe_offset_rows`, or nothing.
        role: The operand, for the message.

    Raises:
        MismatchError: Channels are turned that are no pair of the rotation.
    """
    own = tuple(phases.get((a, b), -phases.get((b, a), 0.0)) for a, b in known.pairs)
    if any(pair not in known.pairs and pair[::-1] not in known.pairs for pair in phases):
        raise MismatchError(RejectCode.ROPE, f"channels of the {role} are turned that do not rotate by position")
    return replace(known, phases=own if any(own) else ())


def common_rope(query: Rope, key: Rope) -> Rope:
    """The rotation of queries and keys; its phases are those of queries relative to keys.

    Raises:
        MismatchError: They rotate at different speeds, or different channels rotate.
    """
    if query.pairs != key.pairs or any(
        abs(a - b) > 1e-6 * max(a, b) for a, b in zip(query.inv_freq, key.inv_freq, strict=True)
    ):
        raise MismatchError(RejectCode.ROPE, "queries and keys rotate differently")
    none = (0.0,) * len(query.pairs)
    phases = tuple(
        math.remainder(q - k, 2 * math.pi) for q, k in zip(query.phases or none, key.phases or none, strict=True)
    )
    return replace(query, phases=phases if any(abs(p) > _STILL for p in phases) else ())


def turn_by_phases(heads: Tensor, rope: Rope) -> Tensor:
    """Turn channels ``[..., D]`` by a rotation's phases, the same at every position."""
    if not rope.phases:
        return heads
    phase = torch.tensor(rope.phases, dtype=torch.float64)
    cos, sin = phase.cos().to(heads.dtype), phase.sin().to(heads.dtype)
    first, second = ([pair[i] for pair in rope.pairs] for i in (0, 1))
    a, b, turned = heads[..., first], heads[..., second], heads.clone()
    turned[..., first], turned[..., second] = a * cos - b * sin, b * cos + a * sin
    return turned
