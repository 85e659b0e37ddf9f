"""Which query heads share keys and values: repeated heads become distinct ones, those of a group side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mla_compile.passes.mismatch import MismatchError
from mla_compile.site import Projection, RejectCode

__all__ = ["chosen_heads", "distinct_heads", "scaled_heads", "side_by_side", "value_heads"]


def side_by_side(key: Projection, heads: int) -> tuple[int, ...] | None:
    """Order query heads so that those that share a key head stand side by side; None if they do or cannot.

    Args:
        key: Keys as the attention product reads them, repeated for grouped queries or not.
        heads: Query heads.
    """
    distinct = list(dict.fromkeys(key.rows))
    owners = [distinct.index(rows) for rows in key.rows]
    if len(owners) != heads or owners == sorted(owners) or len({owners.count(i) for i in owners}) != 1:
        return None
    return tuple(sorted(range(heads), key=owners.__getitem__))


def chosen_heads(projection: Projection, chosen: Sequence[int]) -> Projection:
    """Some heads of a projection, in this order."""
    norm = projection.norm
    if norm is not None and norm.per_head and projection.activation is None:
        norm = replace(norm, groups=tuple(norm.groups[i] for i in chosen))
    return replace(
        projection,
        rows=tuple(projection.rows[i] for i in chosen),
        gain=tuple(projection.gain[i] for i in chosen),
        offset=None if projection.offset is None else tuple(projection.offset[i] for i in chosen),
        norm=norm,
        turned=None if projection.turned is None else tuple(projection.turned[i] for i in chosen),
    )


def scaled_heads(projection: Projection, factors: Sequence[float]) -> Projection:
    """Heads multiplied by one number each, whatever is read of them."""

    def scaled(numbers: tuple[tuple[float, ...], ...] | None) -> tuple[tuple[float, ...], ...] | None:
        if numbers is None:
            return None
        return tuple(tuple(factor * x for x in head) for factor, head in zip(factors, numbers, strict=True))

    # Queries that are turned back have gains of one; others have no second ones.
    gain = projection.gain if projection.turned is not None else scaled(projection.gain)
    assert gain is not None
    return replace(projection, gain=gain, offset=scaled(projection.offset), turned=scaled(projection.turned))


def value_heads(projection: Projection, heads: int) -> Projection:
    """Reduce value heads repeated for neighbouring query heads; which heads share values may differ from keys.

    Raises:
        MismatchError: Their number does not divide that of the query heads.
    """
    rows = projection.rows
    if heads % len(rows):
        raise MismatchError(RejectCode.GROUPING, f"{heads} query heads cannot share {len(rows)} value heads evenly")
    repeats = max(
        r
        for r in range(1, len(rows) + 1)
        if len(rows) % r == 0 and all(h == rows[i // r * r] for i, h in enumerate(rows))
    )
    return chosen_heads(projection, range(0, len(rows), repeats))


def distinct_heads(projection: Projection, heads: int) -> Projection:
    """Reduce key or value heads repeated for grouped queries to the distinct ones.

    Raises:
        MismatchError: Query head ``h`` does not use head ``h // (heads / distinct)``.
    """
    distinct = list(dict.fromkeys(projection.rows))
    if heads % len(distinct):
        raise MismatchError(
            RejectCode.GROUPING, f"{heads} query heads cannot share {len(distinct)} key/value heads evenly"
        )
    group = heads // len(distinct)
    if len(projection.rows) not in (heads, len(distinct)) or (
        len(projection.rows) == heads
        and any(distinct.index(rows) != h // group for h, rows in enumerate(projection.rows))
    ):
        raise MismatchError(RejectCode.GROUPING, "query heads are not grouped contiguously over key/value heads")
    return chosen_heads(projection, [projection.rows.index(rows) for rows in distinct])
