"""Sizes of caches in two halves, which programs that know of keys and values only can keep."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["half_width", "halves_bytes"]


def half_width(rows: Sequence[int]) -> int:
    """Numbers of a half row, in all layers: the longest row decides, and others are filled up with zeros."""
    return (max(rows) + 1) // 2


def halves_bytes(rows: Sequence[int]) -> int:
    """Bytes a token takes in float32 caches of two halves."""
    return 4 * len(rows) * 2 * half_width(rows)
